"""The quickest way to see what quantization did: let the model write.

Greedy, so that the same weights always write the same text, and a difference between two texts is a difference
between two models.
"""

from qlearn.evaluate.completions import complete


def generate(model, tokenizer, prompt, max_new_tokens=64):
    """The greedy continuation of a prompt.

    model, tokenizer: any causal language model of transformers.  max_new_tokens: where to stop if the model does not.
    prompt: str; it best ends with a letter or a sign, without the newline: tokenizers join white space with what
    follows it.
    Returns the continuation alone, a str.  Raises ValueError for an empty prompt, or one too long for the model.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> generate(model, tokenizer, "import numpy as", max_new_tokens=1)
    ' np'
    """
    return complete(model, tokenizer, [prompt], max_new_tokens)[0]
