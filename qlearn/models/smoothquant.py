"""SmoothQuant: moving the difficulty of quantizing from the activations into the weights.

In a language model a few channels of the hidden states are much larger than all others (`outliers.py`). A grid for the
whole tensor has to reach them, so its steps are coarse, and the ordinary channels come out as a handful of levels. A
scale for each channel would mend that, and cannot be had: an integer product sums over the channels, so a factor that
differs between them does not come out of the sum. But it can be moved to the other side before anything is rounded:

    X W  =  (X / s) (s · W)          channel j of the inputs divided by s[j], row j of W times s[j]: nothing has changed

    s[j] = max|X[j]|^alpha / max|W[j]|^(1 - alpha)

With alpha = 1 the channels of X all get the same maximum, and the weights the whole trouble; with 0 it is the other way
round; with 0.5 both sides of a channel have the same maximum, the root of the product of the two. (Here the rows of a
weight are outputs, as in nn.Linear, so it is its column j that is multiplied.)

The division costs nothing if the operation before the layer does it along with its own: a norm, by its weight, or a
linear layer, by its rows. `folding.py` finds that operation, by trying. Layers that read the same tensor share one s,
whose max|W[j]| is taken over all of them. In a Llama those groups are q, k, v behind the first norm of a block; gate
and up behind the second; down, whose inputs are a product with the outputs of up. Only the inputs of o are left as they
are where several heads of q share one of v, since a channel of v then becomes several.

The paper smooths behind norms alone, and leaves the inputs of down and o as they are. That is `norms_only=True`. It is
enough for models whose outliers are in the hidden states; the largest ones of the bundled model are in front of down.

Source: SmoothQuant (arXiv 2211.10438), equations 3 and 4, and the authors' `smooth.py`.
"""

import torch

from qlearn.models.calibration import resolve_ids
from qlearn.models.folding import fold
from qlearn.models.outliers import channel_maxima

TINY = 1e-5  # a channel that stays below this has nothing to smooth


def smooth(model, alpha=0.5, calibration=None, tokenizer=None, norms_only=False, progress=True):
    """Smooth the inputs of a model's linear layers, in place; what the model computes stays the same but for rounding.

    alpha: 0 ... 1, how much of the difficulty goes into the weights.
    calibration, tokenizer: as for `quantize_model`.
    norms_only: do as the paper does, and let no linear layer divide.  progress: show a bar.
    Returns the factors: dict name of a layer -> s, float32 (in_features,), for the layers that were smoothed.
    Raises ValueError for an alpha out of range, and for calibration that does not fit the model, which is unchanged
    then.

    >>> import qlearn
    >>> from qlearn.models.calibration import calibration_ids
    >>> model, tokenizer = qlearn.load_model()
    >>> factors = smooth(model, calibration=calibration_ids(tokenizer, tokens=64), norms_only=True, progress=False)
    >>> [name.removeprefix("model.layers.0.") for name in factors][:5]
    ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.gate_proj', 'mlp.up_proj']
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is out of range; choose 0 to 1, usually 0.5")
    ids, factors = resolve_ids(model, calibration, tokenizer), {}
    for block, group, maxima in channel_maxima(model, ids, progress):
        s = smoothing_factors(maxima, [block.module.get_submodule(name).weight for name in group], alpha)
        if fold(block, group, s, norms_only):
            factors |= {f"{block.name}.{name}": s for name in group}
    return factors


def smoothing_factors(x_max, weights, alpha=0.5):
    """s[j] = x_max[j]**alpha / max|W[j]|**(1 - alpha); 1 for a channel that is as good as zero on either side.

    x_max: float32 (in,), max|X[j]|.  weights: matrices (out, in) that read X.  Returns float32 (in,).

    >>> smoothing_factors(torch.tensor([1.0, 64.0, 0.0]), [torch.tensor([[0.5, 1.0, 1.0], [-1.0, 0.25, 1.0]])])
    tensor([1., 8., 1.])
    """
    w_max = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    s = x_max**alpha / w_max ** (1 - alpha)
    return torch.where((x_max > TINY) & (w_max > TINY), s, 1.0)
