"""How far the answers of a quantized model are from those of the model it was made of.

Perplexity asks whether the right token is still likely. The measures here do not care what is right: they compare the
two models' predictions P (reference) and Q (quantized) at the same positions of the same text.

    KL divergence   sum over the vocabulary of P log(P / Q), in nats, averaged over positions: 0 when Q = P, never
                    negative. It is what a reader of Q pays, in loss, for not having P, and it sees changes that
                    cancel in perplexity.
    flip rate       the share of positions at which the most likely token is another one: what greedy text shows.
    same top p      the share at which it is the same one, in percent, as llama-perplexity prints it.

The reference has to be run only once for a whole sweep of bit widths: `Reference` keeps its logits. That takes
4 bytes * vocabulary * scored tokens of main memory: 0.5 GB for 32,768 tokens of a vocabulary of 4,096, and 20 GB for
the same with 150,000, where `tokens=` should be a few thousand.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlearn.evaluate.perplexity import exp_mean, token_losses
from qlearn.evaluate.windows import passage, predict


class Reference:
    """The answers of the unquantized model on a text, kept so that a sweep runs it once.

    model, tokenizer: as it is before quantization; the model is not kept.
    text, convention, tokens, window, stride: which predictions count, see `windows.passage`.  progress: show a bar.
    Attributes: passage; perplexity; nbytes, the memory it holds.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> reference = Reference(model, tokenizer, tokens=64)
    >>> kl_divergence(model, reference), flip_rate(model, reference), same_top_p(model, reference)
    (0.0, 0.0, 100.0)
    """

    def __init__(
        self, model, tokenizer, text=None, convention="sliding", tokens=None, window=None, stride=None, progress=False
    ):
        self.passage = passage(model, tokenizer, text, convention, tokens, window, stride)
        self._logits, losses = [], []
        for logits, targets in predict(model, self.passage, progress):
            losses.append(token_losses(logits, targets))
            self._logits.append(logits.cpu())
        self.perplexity = exp_mean(losses)

    @property
    def tokens(self):
        """Length of the text in tokens."""
        return len(self.passage.ids)

    @property
    def nbytes(self):
        """Bytes of memory that the kept logits take."""
        return sum(logits.nbytes for logits in self._logits)

    def logits(self):
        """The reference's logits (positions, vocabulary), batch by batch as `predict` yields them."""
        return iter(self._logits)


@dataclass(frozen=True)
class Comparison:
    """What one pass of a model over a reference's text tells: `kl_divergence` in nats, `flip_rate` as a share of 1."""

    perplexity: float
    kl_divergence: float
    flip_rate: float

    @property
    def same_top_p(self):
        """Positions with the same most likely token, in percent."""
        return 100 * (1 - self.flip_rate)


def compare(model, reference, progress=False):
    """Run a model over a reference's text once and measure everything.

    model: a causal language model with the reference's vocabulary.  reference: a Reference.  Returns a Comparison.
    Raises ValueError when the vocabularies differ, and for a model that answers NaN.
    """
    losses, divergences, flips = [], [], 0
    for (logits, targets), kept in zip(predict(model, reference.passage, progress), reference.logits(), strict=True):
        kept = kept.to(logits.device)
        losses.append(token_losses(logits, targets))
        divergences.append(position_divergences(kept, logits))
        flips += (kept.argmax(-1) != logits.argmax(-1)).sum().item()
    divergences = torch.cat(divergences)
    return Comparison(exp_mean(losses), divergences.mean().item(), flips / len(divergences))


def position_divergences(reference, logits):
    """KL(softmax(reference) || softmax(logits)) at each position, in nats.

    reference, logits: (positions, vocabulary).  Returns float64 (positions,), none below 0.
    Raises ValueError for unequal shapes.

    >>> position_divergences(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()).tolist()
    [0.1438...]
    """
    if reference.shape != logits.shape:
        raise ValueError(
            f"the reference has logits of shape {tuple(reference.shape)} and the model {tuple(logits.shape)}; "
            "compare a model with the one it was made of"
        )
    log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(logits, -1)
    # A sum of terms of both signs: where P and Q are almost equal, rounding can leave it a hair below zero.
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().clamp(min=0)


def kl_divergence(model, reference):
    """Mean KL divergence from the reference to the model, in nats; arguments as for `compare`."""
    return compare(model, reference).kl_divergence


def flip_rate(model, reference):
    """Share of positions, 0 to 1, at which the most likely token is not the reference's; arguments as for `compare`."""
    return compare(model, reference).flip_rate


def same_top_p(model, reference):
    """Percentage of positions at which the most likely token is the reference's; arguments as for `compare`."""
    return compare(model, reference).same_top_p
