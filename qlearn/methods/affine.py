"""Absmax and zero-point: evenly spaced grids, the two methods every other one is measured against.

Both lay a ruler over a block of weights. The distance between two rulings is the **scale**; a weight is stored as the
number of the nearest ruling, and no error is larger than scale / 2, because the nearest ruling is never further away.

    absmax        scale = max|w| / qmax                  code = round(w / scale)          w' = code * scale
    zero-point    scale = (max - min) / (2**bits - 1)    code = round(w / scale) + zero   w' = (code - zero) * scale

Absmax is symmetric about zero. Of the 2**bits signed codes it leaves the lowest unused, so that a number and its
negative get codes
that are negatives of each other: qmax = 2**(bits - 1) - 1. Zero-point spends its codes on the interval that is really
occupied, which pays when that interval is lopsided. Its `zero` is the code of the number 0; it is an integer inside
the range, and the interval is widened to include 0 where it does not, so 0 itself always comes back as exactly 0.

**Clipping.** The interval need not reach the largest weight. `clip="percentile"` ends it at a percentile, and
`clip="mse"` tries each fraction of the full interval from 100 % down to 1 % and keeps the one with the smallest
squared error: a few weights are cut off so that all others get a finer ruler.

**Scales are rounded up.** A scale is stored in 16 bits. Were it rounded down, the ruler would end just before the
largest weight, and the bound of scale / 2 would fail; so it is rounded to the next float16 that is not smaller. A
block of zeros gets scale 1.
"""

import torch

from qlearn.formats.integers import Integers
from qlearn.methods.blocking import block_shape, check_weight, from_blocks, to_blocks
from qlearn.tensor import QuantizedTensor

CLIPS = ("minmax", "percentile", "mse")
FRACTIONS = torch.arange(100, 0, -1) / 100  # what clip="mse" tries, the full interval first so that a tie keeps it


def absmax(weight, bits=8, group_size=None, *, per="row", clip="minmax", percentile=99.9, scale_dtype=torch.float16):
    """Quantize a matrix on an integer grid that is symmetric about zero.

    weight: (rows, columns), floating point.  bits: 2 to 8.
    group_size: consecutive weights of a row that share a scale; None leaves it to `per`: "row", "column" or "tensor".
    clip: "minmax" covers every weight, "percentile" that share (in %) of each block, "mse" what gives the least
    squared error.
    Returns a QuantizedTensor of signed codes in -qmax ... qmax.
    Raises ValueError for a weight that is not a finite matrix, for bits or group sizes out of range, for an unknown
    option.

    >>> qt = absmax(torch.tensor([[0.9, -0.31, 0.14, -0.02, 0.6]]), bits=3)
    >>> qt.codes().tolist(), qt.bits_per_weight
    ([[3, -1, 0, 0, 2]], 6.4)
    """
    weight = check_weight(weight)
    block = block_shape(weight.shape, group_size, per)
    blocks = to_blocks(weight, block)  # (block rows, block columns, n)
    qmax = 2 ** (_check_bits(bits) - 1) - 1
    limit = _percentile(blocks.abs(), _share(clip, percentile))

    def fit(fraction):
        scale = store_scale(fraction * limit / qmax, scale_dtype)
        return scale, None, _round(blocks, scale).clamp(-qmax, qmax)

    scale, _, codes = _search(blocks, fit) if clip == "mse" else fit(1.0)
    codes = from_blocks(codes, weight.shape, block).to(torch.int8)
    return QuantizedTensor.from_codes(codes, scale, Integers(bits), block)


def zero_point(
    weight, bits=8, group_size=None, *, per="row", clip="minmax", percentile=99.9, scale_dtype=torch.float16
):
    """Quantize a matrix on an integer grid that covers just the interval in use.

    Arguments and errors as for `absmax`; "percentile" cuts half of what it cuts from each end.
    Returns a QuantizedTensor of unsigned codes, with one integer zero-point for each block, packed like the codes.

    >>> qt = zero_point(torch.tensor([[0.0, 0.5, 1.0, 1.5]]), bits=2)
    >>> qt.codes().tolist(), qt.zero_points().tolist(), qt.dequantize().tolist()
    ([[0, 1, 2, 3]], [[0.0]], [[0.0, 0.5, 1.0, 1.5]])
    """
    weight = check_weight(weight)
    block = block_shape(weight.shape, group_size, per)
    blocks = to_blocks(weight, block)
    qmax = 2 ** _check_bits(bits) - 1
    share = (100 + _share(clip, percentile)) / 2
    low = -_percentile(-blocks, share).clamp(min=0)
    high = _percentile(blocks, share).clamp(min=0)

    def fit(fraction):
        scale = store_scale(fraction * (high - low) / qmax, scale_dtype)
        zero = (-fraction * low / scale.float()).round().clamp(0, qmax)
        return scale, zero, (_round(blocks, scale) + zero[..., None]).clamp(0, qmax)

    scale, zero, codes = _search(blocks, fit) if clip == "mse" else fit(1.0)
    codes = from_blocks(codes, weight.shape, block).to(torch.uint8)
    return QuantizedTensor.from_codes(codes, scale, Integers(bits, signed=False), block, zeros=zero.to(torch.uint8))


def store_scale(scale, dtype=torch.float16):
    """A scale as it is stored: the nearest value of `dtype` that is not smaller, and 1 where the scale is 0.

    scale: float32, not negative.  Raises ValueError when it is larger than `dtype` can hold.

    >>> store_scale(torch.tensor([0.1, 0.0, 1e-9])).tolist()
    [0.10003662109375, 1.0, 5.960464477539063e-08]
    """
    scale = torch.where(scale == 0, 1.0, scale)
    if (scale > torch.finfo(dtype).max).any():
        raise ValueError(f"a scale of {scale.max().item():.3g} does not fit {dtype}; pass scale_dtype=torch.float32")
    stored = scale.to(dtype)
    if dtype == torch.float32:
        return stored
    # The bits of a positive float, read as an integer, count upwards: one more is the next float.
    return (stored.view(torch.int16) + (stored.float() < scale)).view(dtype)


def _round(blocks, scale):
    """The number of the nearest ruling; ties go to the even one."""
    return (blocks / scale.float()[..., None]).round()


def _search(blocks, fit):
    """The fit with the least squared error in each block, over all fractions of the interval.

    fit: fraction -> (scale, zero or None, codes).  Returns the same, each block with the fraction that suits it.
    """
    best, least = None, None
    for fraction in FRACTIONS.tolist():
        scale, zero, codes = fit(fraction)
        shifted = codes if zero is None else codes - zero[..., None]
        error = (shifted * scale.float()[..., None] - blocks).square().sum(-1)
        if best is None:
            best, least = (scale, zero, codes), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(
            None if new is None else torch.where(better.view(better.shape + (1,) * (new.dim() - 2)), new, old)
            for new, old in zip((scale, zero, codes), best, strict=True)
        )
    return best


def _percentile(blocks, share):
    """The nearest-rank percentile along the last axis: the smallest value that `share` percent do not exceed."""
    rank = max(1, -int(-share * blocks.shape[-1] // 100))
    return blocks.amax(-1) if rank == blocks.shape[-1] else blocks.kthvalue(rank, -1).values


def _share(clip, percentile):
    """The percentage of a block that the interval has to cover."""
    if clip not in CLIPS:
        raise ValueError(f"clip={clip!r} is unknown; choose from {', '.join(CLIPS)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} is no percentage; choose from above 0 to 100")
    return percentile if clip == "percentile" else 100


def _check_bits(bits):
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} is out of range; these grids have 2 to 8 bits")
    return bits
