"""Perplexity: how many tokens the model hesitates between.

A model that gives the token that really came the probability p is charged -log p nats. The mean of that over a text
is the loss, and

    perplexity = exp(loss)

reads as a number of equally likely choices: a model that knows nothing and spreads its bet over all V tokens has
perplexity V, one that is always right and sure has 1. Quantization raises it. Which tokens of the text count is a
convention (`windows.py`).

Perplexity moves little when errors cancel: some tokens become likelier by accident, others less so. `divergence.py`
sees both.
"""

import torch
import torch.nn.functional as F

from qlearn.evaluate.windows import passage, predict


def perplexity(
    model, tokenizer, text=None, convention="sliding", tokens=None, window=None, stride=None, progress=False
):
    """exp of the mean negative log-likelihood of a text's tokens.

    model, tokenizer: any causal language model of transformers, in eval mode.
    text: str; None takes the evaluation text of the package.  convention: "sliding" or "llama.cpp".
    tokens, window, stride: see `windows.passage`.  progress: show a bar.
    Returns a float; inf where the loss is too large for one.
    Raises ValueError for bad arguments, and for a model that answers NaN.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> perplexity(model, tokenizer, "import os" + chr(10), tokens=3) < 100    # of a vocabulary of 4,096
    True
    """
    text = passage(model, tokenizer, text, convention, tokens, window, stride)
    losses = [token_losses(*batch) for batch in predict(model, text, progress)]
    return exp_mean(losses)


def token_losses(logits, targets):
    """-log p of each target, in nats.

    logits: (positions, vocabulary).  targets: (positions,).  Returns float64 (positions,), so that long sums stay
    exact.
    Raises ValueError when a logit is NaN.
    """
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    if losses.isnan().any():
        raise ValueError("the model's output is not a number; look for a weight or a scale that is NaN or infinite")
    return losses


def exp_mean(losses):
    """exp of the mean over a list of loss vectors.

    >>> round(exp_mean([torch.tensor([2.0]).log(), torch.tensor([8.0]).log()]), 4)
    4.0
    """
    return torch.cat(losses).double().mean().exp().item()
