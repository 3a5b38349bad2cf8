"""Greedy completions: the text a model writes when it always takes the most likely token.

Greedy text is deterministic, so two models can be compared by what they write. Prompts of different lengths go
through the model together when the shorter ones are padded on the left: the last token of every prompt is then in the
last column, where the next one is appended, and the padding is masked out of the attention.
"""

import torch

from qlearn.evaluate.windows import context_length


def complete(model, tokenizer, prompts, max_new_tokens=96):
    """Continue each prompt greedily.

    prompts: list of str; each best ends with a letter or a sign: tokenizers join white space with what follows it.
    max_new_tokens: length at which a continuation is cut, if the model does not end it before.
    Returns a list of str: the continuations alone, without special tokens.
    Raises ValueError for a prompt without tokens, or one that leaves no room for the continuation.
    """
    encoded = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    _check(prompts, encoded, max_new_tokens, context_length(model))
    padding = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    longest = max(map(len, encoded))
    ids = torch.full((len(encoded), longest), padding)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    device = next(model.parameters()).device
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
            do_sample=False, num_beams=1, repetition_penalty=1.0, pad_token_id=padding,
        )  # fmt: skip
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written[:, longest:].tolist()]


def _check(prompts, encoded, max_new_tokens, limit):
    if not prompts:
        raise ValueError("there is no prompt to complete; give at least one string")
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens; give the model something to continue")
        if len(tokens) + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_new_tokens={max_new_tokens} exceed the {limit} tokens this "
                "model reads; shorten one of them"
            )
