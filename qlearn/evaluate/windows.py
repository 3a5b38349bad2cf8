"""Cutting a text into the windows a model reads, and asking the model about them.

A causal language model turns n tokens into n predictions: the logits at position i say what token i + 1 is likely to
be. A text is longer than a model can read at once, so it is cut into windows, and one has to say which of the
predictions count: those at the start of a window were made with hardly any context and are poor. Two conventions are
in use, and their numbers must never be compared with each other.

    "sliding"    Windows of 2048 tokens, or of as many as the model was made for, each starting `stride` tokens after
                 the one before. Every token of the text is scored once, in the first window that holds it, the last
                 and shorter window included; only a token that starts a window cannot be scored there, having nothing
                 before it. A stride as long as the window (the default: windows side by side) is what the tables of
                 GPTQ, AWQ and SINQ use; half the window is what Hugging Face's page on perplexity describes, at twice
                 the time.
    "llama.cpp"  What llama-perplexity does: chunks of 512 tokens side by side, a shorter rest dropped. Of a chunk of n
                 tokens only those at n/2 + 1 ... n - 1 are scored (the logits at n/2 ... n - 2 predict them): 255 of
                 512, all with at least 257 tokens before them. For a model whose texts begin with a BOS token, the
                 first token of each chunk is replaced by it.

A `Passage` is a text cut in one of these ways. Equally long windows go through the model together, and only the
logits that are scored are computed. The text is plain text: a string in it that looks like a special token is not
taken for one.
"""

import inspect
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm.auto import tqdm

from qlearn.evaluate.texts import evaluation_text

CONVENTIONS = ("sliding", "llama.cpp")
LOGITS_AT_ONCE = 2**24  # numbers: 64 MiB of float32


@dataclass(frozen=True)
class Window:
    """Tokens start ... end - 1 are read together; of these, first ... end - 1 are scored."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Passage:
    """A text as tokens and windows.

    ids: int64 (tokens,).  windows: in reading order.  bos: the token that replaces the first of each window, or None.
    """

    ids: torch.Tensor
    windows: tuple[Window, ...]
    bos: int | None = None

    @property
    def scored(self):
        """How many tokens are scored."""
        return sum(window.end - window.first for window in self.windows)

    def batch(self, windows):
        """Equally long windows as a matrix of tokens (windows, length), BOS in the first column where it is given."""
        ids = torch.stack([self.ids[window.start : window.end] for window in windows])
        if self.bos is not None:
            ids[:, 0] = self.bos
        return ids


def sliding(count, width, stride):
    """Windows of `width` tokens over `count` tokens, each `stride` after the one before, every token scored once.

    >>> sliding(10, 4, 4)[1:]        # the last window holds two tokens, and scores the second
    [Window(start=4, first=5, end=8), Window(start=8, first=9, end=10)]
    >>> sliding(7, 4, 2)             # overlapping: from the second window on, only the new tokens are scored
    [Window(start=0, first=1, end=4), Window(start=2, first=4, end=6), Window(start=4, first=6, end=7)]
    """
    windows, done = [], 0
    for start in range(0, count, stride):
        end = min(start + width, count)
        first = max(done, start + 1)
        if first < end:
            windows.append(Window(start, first, end))
        done = end
        if end == count:
            break
    return windows


def second_halves(count, width):
    """Chunks of `width` tokens side by side, scored from the token after the middle one on; a shorter rest is dropped.

    >>> second_halves(1030, 512)
    [Window(start=0, first=257, end=512), Window(start=512, first=769, end=1024)]
    """
    return [Window(start, start + width // 2 + 1, start + width) for start in range(0, count - width + 1, width)]


def passage(model, tokenizer, text=None, convention="sliding", tokens=None, window=None, stride=None):
    """Cut a text for a model.

    text: str; None takes the evaluation text that ships with the package.
    tokens: use only so many of the text's first tokens.
    window: tokens in a window; None takes min(2048, the longest the model was made for), or 512 for "llama.cpp".
    stride: "sliding" only; tokens from one window's start to the next one's; None takes the window.
    Returns a Passage.  Raises ValueError for an unknown convention, sizes that make no sense, and a text with nothing
    to score.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r} is unknown; choose from {', '.join(CONVENTIONS)}")
    width, stride = _sizes(model, convention, window, stride)
    ids = _encode(tokenizer, evaluation_text() if text is None else text, tokens)
    if convention == "sliding":
        windows, bos = sliding(len(ids), width, stride), None
    else:
        windows, bos = second_halves(len(ids), width), bos_token(tokenizer)
    if not windows:
        needed = 2 if convention == "sliding" else width
        raise ValueError(
            f"the text has {len(ids)} tokens, and {convention} needs at least {needed}; give a longer text"
        )
    return Passage(ids, tuple(windows), bos)


def context_length(model):
    """How many tokens the model was made to read at once; 2048 where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048


def predict(model, passage, progress=False):
    """Run the model over a passage.

    Yields, batch by batch, the logits that are scored (positions, vocabulary), half precision widened to float32, and
    the tokens they should have foretold (positions,); both on the model's device and in reading order.
    Raises ValueError for a model in training mode, whose dropout would make the answer random.
    """
    if model.training:
        raise ValueError("the model is in training mode, so dropout may be on; call model.eval() first")
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    with tqdm(total=passage.scored, desc="evaluating", unit=" tokens", disable=not progress, leave=False) as bar:
        for windows in _batches(model, passage):
            ids = passage.batch(windows).to(next(model.parameters()).device)
            ahead = windows[0].first - windows[0].start
            logits = _forward(model, ids, ahead - 1, keeps)
            yield logits.flatten(0, 1), ids[:, ahead:].flatten()
            bar.update(ids[:, ahead:].numel())


@torch.inference_mode()
def _forward(model, ids, first, keeps):
    """Logits at positions first ... length - 2, computing only those where the model knows how."""
    wanted = torch.arange(first, ids.shape[1] - 1, device=ids.device)
    if keeps:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, first:-1]
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _batches(model, passage):
    """Runs of equally shaped windows, as many at a time as keep the logits below LOGITS_AT_ONCE, but at least one."""
    vocabulary = model.config.get_text_config().vocab_size
    for (length, _), group in groupby(passage.windows, key=lambda w: (w.end - w.start, w.first - w.start)):
        group = list(group)
        size = max(1, LOGITS_AT_ONCE // (vocabulary * length))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _sizes(model, convention, window, stride):
    """The width and stride to use, checked."""
    longest = context_length(model)
    width = window if window is not None else min(2048 if convention == "sliding" else 512, longest)
    if not 2 < width <= longest:
        raise ValueError(f"window={width} is out of range; this model reads 3 to {longest} tokens at once")
    if stride is not None and convention != "sliding":
        raise ValueError(f"stride={stride} does not go with {convention}, whose chunks lie side by side; leave it out")
    stride = width if stride is None else stride
    if not 1 <= stride <= width:
        raise ValueError(f"stride={stride} is out of range; choose 1 to {width}, so that no token is left out")
    return width, stride


def _encode(tokenizer, text, tokens):
    """The first `tokens` tokens of a text, int64."""
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"the text is {text!r:.40}, and there is nothing to score; give a string of a few hundred words"
        )
    if tokens is not None and tokens < 2:
        raise ValueError(f"tokens={tokens} leaves nothing to score; ask for at least 2")
    ids = tokenizer(text, verbose=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids[:tokens], dtype=torch.int64)


def bos_token(tokenizer):
    """The BOS token, if the tokenizer begins every text with it: a GGUF file's tokenizer.ggml.add_bos_token."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None
