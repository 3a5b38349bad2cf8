"""A-SINQ: SINQ that also knows which columns meet large inputs.

SINQ looks at the weights alone. AWQ (`awq.py`) looks at the inputs: it multiplies the columns that read large ones by a
factor s before rounding, so that their errors, divided by s again, get smaller where they count. A-SINQ does one after
the other: a tile is balanced first, then its columns are multiplied by s, then it is rounded,

    W  ≈  Q(balanced · s) · mu2 · (mu1 / s)

and since SINQ stores a number for each column anyway, mu1 / s costs nothing: no operation in front of the layer has to
be found that could divide by s.

**The search** is AWQ's, with a measure of size for weights and inputs:

    s  =  x^α / (w^(1 − α) + 0.0001)        x = mean |X| of a channel, w = mean |W| of a column, of W as it was
    s  =  max(s, 0.0001),  then  s / √(max(s) · min(s))

for α = 0, 0.05 ... 0.95; the one with the smallest mean |X W'ᵀ − X Wᵀ| wins. The absolute error, where AWQ takes the
squared one, does not let a few tokens with huge outputs decide.

**What differs from the authors' code.** No s at all is a candidate too, so what the search measures is never worse than
plain SINQ. Candidates are rounded as the result will be. The inputs are those that the layer will really be given, with
all layers before it already quantized (`models/quantize.py`); the authors collect them once, in the unquantized model.

Source: SINQ (arXiv 2509.22944), section 2.4, and the authors' `awq.py` and `dual_shift.py`.
"""

import torch

from qlearn.methods.awq import ScaleSearch
from qlearn.methods.blocking import check_weight
from qlearn.methods.sinq import ORDER, balanced_tiles, make_grid
from qlearn.methods.statistics import statistics_of


def asinq(
    weight,
    bits=4,
    group_size=None,
    *,
    inputs,
    n_grid=20,
    order=ORDER,
    shift=True,
    normal_float=False,
    small_scales=False,
    scale_dtype=torch.float16,
):
    """Balance a matrix, multiply its columns by what they read, then quantize it.

    inputs: what the layer was given in calibration: an InputStatistics, or floating point (tokens, columns).
    n_grid: how many α are tried, 0, 1 / n_grid ...  All else as for `sinq`.
    Returns a QuantizedTensor with `column_scales` = mu1 / s.
    Raises ValueError as `sinq` does, and for inputs that do not fit.

    The second channel is a hundred times as large as the others:

    >>> generator = torch.Generator().manual_seed(0)
    >>> weight, x = (torch.randn(n, 64, generator=generator) for n in (32, 128))
    >>> x[:, 1] *= 100
    >>> qt = asinq(weight, bits=3, inputs=x)
    >>> from qlearn.methods.sinq import sinq
    >>> [round((x @ (w.dequantize() - weight).T).abs().mean().item(), 2) for w in (sinq(weight, bits=3), qt)]
    [12.44, 4.1]
    """
    tiles = balanced_tiles(weight, group_size, order=order)
    grid = make_grid(bits, shift, normal_float)
    s = _search(weight, tiles, grid, inputs, n_grid).scale
    return tiles.quantize(grid, s, small_scales=small_scales, scale_dtype=scale_dtype)


def search_input_scale(
    weight, bits=4, group_size=None, *, inputs, n_grid=20, order=ORDER, shift=True, normal_float=False
):
    """The search alone, arguments as for `asinq`.

    Returns a ScaleSearch: s, float32 (columns,), and its α, both None where plain SINQ is best; and the mean absolute
    errors of the output of all candidates, by α.
    """
    tiles = balanced_tiles(weight, group_size, order=order)
    return _search(weight, tiles, make_grid(bits, shift, normal_float), inputs, n_grid)


def _search(weight, tiles, grid, inputs, n_grid):
    weight = check_weight(weight)
    statistics = statistics_of(inputs, weight)
    x = statistics.sample.to(weight.device)
    candidates = {None: None, **_candidates(weight, statistics.mean_abs.to(weight.device), n_grid)}
    losses = {
        ratio: (x @ (tiles.quantize(grid, s, scale_dtype=torch.float32).dequantize() - weight).T).abs().mean().item()
        for ratio, s in candidates.items()
    }
    best = min(losses, key=losses.get)  # of equals the first
    return ScaleSearch(candidates[best], best, losses)


def _candidates(weight, x, n_grid):
    """dict α -> s."""
    if not isinstance(n_grid, int) or n_grid < 1:
        raise ValueError(f"n_grid={n_grid!r} is no number of candidates; choose one from 1, usually 20")
    w, found = weight.abs().mean(0), {}
    for ratio in (i / n_grid for i in range(n_grid)):
        s = (x**ratio).clamp(min=1e-4)
        s = (s / (w ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        found[ratio] = s / (s.max() * s.min()).sqrt()
    return found
