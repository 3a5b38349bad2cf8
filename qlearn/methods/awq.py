"""AWQ, activation-aware weight quantization: make room for the weights that meet large inputs.

A layer computes y = W x, so an error in a weight reaches the output multiplied by the input. In a language model a few
input channels are much larger than all others, in every text, and it is the columns of W that read them which must be
stored with care. Keeping those columns in 16 bits would help, and would be a nuisance to every kernel. AWQ scales
instead:

    W x  =  (W · s) (x / s)          column j of W times s[j], channel j of x divided by it: nothing has changed
    W'   =  Q(W · s) / s             but what is rounded is W · s

Rounding errs by up to half a step of the grid, however large the weight. So a column that is made twice as large has
half the error when it is divided again, as long as it does not stretch the grid of its group: then all other columns of
the group pay for it. How far to go is found by trying. The candidates are s = mean|x|^ratio for ratios from 0, which
scales nothing, to almost 1, which makes all channels equally large; the one with the smallest error of the output wins.
No gradient is needed, and one ratio for a layer is all that is fitted to the calibration text.

**Where 1/s goes.** x / s costs nothing where the operation in front of the layer can produce it, such as a norm with
weight / s (`qlearn/models/folding.py`). Elsewhere the factors are stored with the matrix, as `column_scales` = 1/s in
float16, and are counted in its bits per weight. To lose nothing by that, s is chosen such that 1/s is a float16.

**Clipping.** Then the grid of a group may end before its largest weight, if that lowers the error of the output: a few
weights are cut off, all others get finer steps. What a group adds to the output is wrong by e · x, e the errors of its
weights and x the inputs it reads; the mean square of that is e G eᵀ, with G the mean of x xᵀ over the calibration
text. Each group of each row tries ten lengths of its grid, and keeps the best.

**What differs from the authors' code.** It does not clip the projections to q and k, found by their names: the error
of a single layer says little about their product. Here every layer is clipped: on the bundled model that is no worse at
4 bits, and better at 3 and 2. The authors measure clipping on a sample of inputs, here G is made from all of them. The
`duo` search is AutoAWQ's, but for ratio 0, which leaves the weights alone here too: what the search measures is never
worse than without any scaling.

Source: AWQ (arXiv 2306.00978), section 3; the authors' `auto_scale.py` and `auto_clip.py`; AutoAWQ's `quantizer.py`.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from qlearn.methods.affine import absmax, zero_point
from qlearn.methods.blocking import block_shape, check_weight, from_blocks, to_blocks
from qlearn.methods.statistics import statistics_of

CLIPS = tuple(1 - i / 20 for i in range(10))  # the lengths of the grid that are tried: 1, 0.95 ... 0.55


def awq(
    weight,
    bits=4,
    group_size=None,
    *,
    inputs,
    scale=None,
    clip=True,
    sym=False,
    n_grid=20,
    duo=False,
    scale_dtype=torch.float16,
):
    """Quantize a matrix, its columns scaled by what they read.

    weight: (rows, columns), floating point.  bits: 2 to 8.  group_size: consecutive weights of a row that share a
    scale; None for one scale a row.
    inputs: what the layer was given in calibration: an InputStatistics, or floating point (tokens, columns).
    scale: None searches for s. A tensor (columns,) is s itself; where its inverse is no float16, it is rounded so that
    it is. The number 1 says that there is no s: nothing is searched and nothing stored, as is right for a weight that
    has been scaled already, its 1/s folded into the layer in front; the inputs are then those of the scaled weight.
    clip: whether groups may be clipped.  sym: False for the grids of `zero_point`, True for those of `absmax`.
    n_grid, duo: how `search_scale` goes about it.  scale_dtype: of the stored scales of the groups.
    Returns a QuantizedTensor like those of `zero_point` and `absmax`, with `column_scales` = 1/s unless there is no s.
    Raises ValueError as they do, for inputs that do not fit, and for a scale that is not positive.

    The second channel is 100 times as large as the first, so its column gets the finer steps:

    >>> weight, x = torch.tensor([[0.9, 0.16, -0.6, 0.2]]), torch.tensor([[1.0, 100.0, 1.0, 1.0]])
    >>> qt = awq(weight, bits=3, inputs=x)
    >>> float(x @ weight.T), float(x @ qt.dequantize().T), float(x @ zero_point(weight, bits=3).dequantize().T)
    (16.5, 16.57339096069336, 21.8642578125)
    """
    weight = check_weight(weight)
    statistics = statistics_of(inputs, weight)
    options = {"sym": sym, "scale_dtype": scale_dtype}
    if scale is None:
        scale = search_scale(weight, bits, group_size, inputs=statistics, n_grid=n_grid, duo=duo, **options).scale
    column_scales = None
    if isinstance(scale, torch.Tensor) or scale != 1:
        column_scales = _inverse(scale, weight)
        weight = weight / column_scales.float()
    if clip:
        weight = clip_groups(weight, bits, group_size, inputs=statistics, column_scales=column_scales, **options)
    return replace(_grid(bits, group_size, **options)(weight), column_scales=column_scales)


class ScaleSearch(NamedTuple):
    """The best scale, float32 (columns,); the ratio it was made with; the losses of all that were tried, by ratio."""

    scale: torch.Tensor
    ratio: float
    losses: dict


def search_scale(
    weight,
    bits=4,
    group_size=None,
    *,
    inputs,
    loss=None,
    sym=False,
    n_grid=20,
    duo=False,
    scale_dtype=torch.float16,
):
    """The best scale for the columns of a matrix, or of several that read the same inputs.

    weight: (rows, columns), or a list of such matrices.  bits, group_size, inputs, sym, scale_dtype: as for `awq`.
    loss: what is made small, a function of the list of matrices W' -> float; None for the mean squared error of the
    layer's outputs on the sample of the inputs.
    n_grid: how many ratios are tried, 0, 1 / n_grid ...  duo: whether the columns' own size counts too:
    s = mean|x|^ratio / size^(1 - ratio), size the mean of a column's weights in units of the largest of their groups.
    Returns a ScaleSearch.  Raises ValueError as `awq` does.

    >>> found = search_scale(torch.tensor([[0.9, 0.16, -0.6, 0.2]]), 3, inputs=torch.tensor([[1.0, 100.0, 1.0, 1.0]]))
    >>> found.ratio, found.losses[found.ratio] < found.losses[0]
    (0.3, True)
    """
    weights = [check_weight(w) for w in (weight if isinstance(weight, list | tuple) else [weight])]
    statistics = statistics_of(inputs, *weights)
    grid = _grid(bits, group_size, sym, scale_dtype)
    loss = _output_error(weights, statistics) if loss is None else loss
    losses, scales = {}, {}
    for ratio, scale in _candidates(weights, statistics, group_size, n_grid, duo):
        losses[ratio] = loss([grid(w * scale).dequantize() / scale for w in weights])
        scales[ratio] = scale
    best = min(losses, key=losses.get)  # of equals the first, which scales least
    return ScaleSearch(scales[best], best, losses)


def clip_groups(weight, bits=4, group_size=None, *, inputs, column_scales=None, sym=False, scale_dtype=torch.float16):
    """A matrix with its largest weights cut off, wherever that lowers what their group adds to the output's error.

    weight, bits, group_size, inputs, sym, scale_dtype: as for `awq`.
    column_scales: (columns,), what the inputs are multiplied by on their way to this weight, 1/s; None for ones.
    Returns float32 (rows, columns).  Raises ValueError as `awq` does.

    The large weight reads nothing but zeros:

    >>> clip_groups(torch.tensor([[0.3, -0.1, 1.0]]), bits=2, inputs=torch.tensor([[1.0, 1.0, 0.0]]))
    tensor([[ 0.3000, -0.1000,  0.5500]])
    """
    weight = check_weight(weight)
    block = block_shape(weight.shape, group_size)
    grid = _grid(bits, group_size, sym, scale_dtype)
    gram = _gram(statistics_of(inputs, weight), block[1], column_scales).to(weight.device)
    blocks = to_blocks(weight, block)  # (rows, groups, n)
    largest = blocks.abs().amax(-1, keepdim=True)
    best, least = blocks, torch.full_like(largest[..., 0], torch.inf)
    for length in CLIPS:
        clipped = blocks.clamp(-length * largest, length * largest)
        e = to_blocks(grid(from_blocks(clipped, weight.shape, block)).dequantize(), block) - blocks
        error = (torch.einsum("rgi,gij->rgj", e, gram) * e).sum(-1)
        best = torch.where((error < least)[..., None], clipped, best)
        least = torch.minimum(error, least)
    return from_blocks(best, weight.shape, block)


def _grid(bits, group_size, sym, scale_dtype):
    """Round-to-nearest: the method that is to store the weights is also the one that candidates are tried with."""
    return partial(absmax if sym else zero_point, bits=bits, group_size=group_size, scale_dtype=scale_dtype)


def _candidates(weights, statistics, group_size, n_grid, duo):
    """The scales to be tried: pairs (ratio, float32 (columns,)), their inverses all float16."""
    if not isinstance(n_grid, int) or n_grid < 1:
        raise ValueError(f"n_grid={n_grid!r} is no number of candidates; choose one from 1, usually 20")
    x = statistics.mean_abs.to(weights[0].device)
    size = _column_size(weights, group_size) if duo else None
    for ratio in (i / n_grid for i in range(n_grid)):
        scale = x**ratio
        if duo and ratio:
            scale = scale / (size ** (1 - ratio) + 1e-4)
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()  # the largest and the smallest are each other's inverse
        yield ratio, 1 / _inverse(scale, weights[0]).float()


def _column_size(weights, group_size):
    """How large the weights of each column are on average, the largest of a group of a row being 1; (columns,)."""
    weight = torch.cat(weights).abs()
    block = block_shape(weight.shape, group_size)
    blocks = to_blocks(weight, block)
    largest = blocks.amax(-1, keepdim=True)
    return from_blocks(blocks / torch.where(largest == 0, 1.0, largest), weight.shape, block).mean(0)


def _inverse(scale, weight):
    """1/s as it is stored: float16 (columns,)."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=weight.device)
    if scale.shape != weight.shape[1:] or not ((scale > 0) & torch.isfinite(scale)).all():
        raise ValueError(
            f"a scale of shape {tuple(scale.shape)} does not fit {weight.shape[1]} columns or is not positive; pass "
            "one positive factor for each column, 1 for none at all, or None to search"
        )
    half = torch.finfo(torch.float16)
    return (1 / scale).clamp(half.tiny, half.max).half()


def _output_error(weights, statistics):
    """The default loss of the search: the mean squared error of the outputs W x on the sample of the inputs."""
    x = statistics.sample.to(weights[0].device)
    return lambda found: sum((x @ (a - b).T).square().mean().item() for a, b in zip(found, weights, strict=True))


def _gram(statistics, size, column_scales):
    """The mean of x xᵀ over the inputs of each group of columns: (groups, size, size)."""
    if statistics.hessian is not None:
        groups = statistics.hessian.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # (groups, size, groups, size)
        gram = groups.diagonal(dim1=0, dim2=2).movedim(-1, 0) / 2
    else:
        x = statistics.sample.unflatten(1, (-1, size)).movedim(1, 0)  # (groups, tokens, size)
        gram = x.mT @ x / x.shape[1]
    if column_scales is not None:
        c = column_scales.to(gram).view(-1, size)
        gram = gram * c[:, :, None] * c[:, None, :]
    return gram
