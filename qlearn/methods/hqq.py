"""HQQ, half-quadratic quantization: move the zero of each group until the weights fit its grid better.

Round-to-nearest lays the grid from the smallest to the largest weight of a group and leaves it there. HQQ keeps the
step and slides the grid along: its zero need not be an integer, and it is chosen such that the errors get small in a
sense that forgives outliers. No calibration text is needed, and a model of any size takes as long as reading it a few
dozen times.

With s the inverse of the scale and z the zero, both of a group,

    codes     W_q = round(W · s + z), clamped to 0 ... 2**bits − 1
    weights   W_r = (W_q − z) / s

and z is to make the sum of |W − W_r|**p small, p = 0.7. Powers below 1 count many small errors and shrug at a single
large one, which is what an outlier leaves behind. They also have no useful gradient, so the problem is split in halves
by a helper W_e, the share of the error that is given up as outliers:

    W_e  =  argmin |W_e|**p + β/2 (W_e − (W − W_r))²   ≈   shrink(W − W_r)
    z    =  argmin ‖W_q − z − (W − W_e) s‖²            =   mean over the group of W_q − (W − W_e) · s

    shrink(x)  =  sign(x) · max(0, |x| − |x|**(p − 1) / β)

The second half is ordinary least squares, whose answer is a mean. The halves take turns, up to 20 times, and stop when
the mean error of the matrix, mean |W − W_r|, does not get smaller any more.

**What that amounts to.** shrink(x) is 0 while |x|**(2 − p) is below 1/β: with β = 10, for all errors up to 0.17. The
weights of a language model are about 0.02, so W_e stays 0 from beginning to end, p plays no part, and HQQ is least
squares for the zero, in turn with rounding. In the bundled model, whose weights are about 0.07, no error is as large at
4 or 3 bits, and 50 of a million are at 2.

    >>> shrink(torch.tensor([0.02, 0.17, 0.18, 0.5]))
    tensor([0.0000, 0.0000, 0.0127, 0.3769])

**The published code is not its description.** By the description, β grows by κ = 1.01 in each turn. The package's
default solver does not do that; and when it stops because the last turn made things worse, it keeps that turn's zero,
one step past the best. `kappa=None` is this solver. `kappa=1.01` is the description, and the package's second solver:
β grows, and the best zero is kept. The zero one step past the best is a least-squares answer all the same, and on the
bundled model neither solver is better than the other.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023), equations 2 to 8; the
package `hqq`: `core/optimize.py` and `core/quantize.py`. p, β, κ and the names W_q, W_r, W_e are theirs.
"""

from typing import NamedTuple

import torch

from qlearn.formats.integers import Integers
from qlearn.methods.blocking import block_shape, check_weight, from_blocks, to_blocks
from qlearn.methods.storing import stored
from qlearn.tensor import QuantizedTensor

NARROW = 1e-4  # a group whose weights are no further apart has scale 1 and lives by its zero alone
FINEST = 2e4  # the largest s: 1/s must remain a float16


def hqq(
    weight,
    bits=4,
    group_size=None,
    *,
    axis=1,
    kappa=None,
    iters=20,
    round_zero=None,
    scale_dtype=torch.float16,
    zero_dtype=torch.float16,
):
    """Quantize a matrix on evenly spaced grids with zeros that are no integers.

    weight: (rows, columns), floating point.  bits: 1 to 8.
    group_size: consecutive weights that share a scale and a zero, in a row (axis=1) or in a column (axis=0); None for
    one a row or column.
    kappa: None for the published solver, a number above 1 for the described one: see above.
    iters: how many turns at most; 0 leaves the grid where round-to-nearest has it.
    round_zero: whether the zero that the first turn starts from is rounded; None does it for 4 bits, as published.
    Returns a QuantizedTensor of unsigned codes with floating-point zeros.
    Raises ValueError for a weight that is not a finite matrix, for bits, sizes or options out of range, and for scales
    or zeros that their types cannot hold.

    From 0 to 0.3 the grid of 2 bits has steps of 0.1, and three of these weights lie above their nearest ruling, none
    below. Moved up by 0.016, the mean of the errors, the grid errs less:

    >>> weight = torch.tensor([[0.0, 0.03, 0.13, 0.22, 0.3]])
    >>> plain, moved = (hqq(weight, bits=2, iters=n) for n in (0, 20))
    >>> plain.codes().tolist(), moved.codes().tolist(), round(moved.zero_points().item(), 3)
    ([[0, 0, 1, 2, 3]], [[0, 0, 1, 2, 3]], -0.16)
    >>> [round((weight - qt.dequantize()).abs().mean().item(), 4) for qt in (plain, moved)]
    [0.016, 0.0128]
    """
    weight = check_weight(weight)
    block = _block(weight.shape, group_size, axis)
    blocks = to_blocks(weight, block)
    qmax = 2 ** _check_bits(bits) - 1
    s, zero = starting_grid(blocks, qmax, bits == 4 if round_zero is None else round_zero)
    zero = solve(blocks, s, zero, qmax, kappa=kappa, iters=iters).zero
    codes = from_blocks(nearest(blocks, s, zero, qmax), weight.shape, block).to(torch.uint8)
    scales, zeros = stored(1 / s[..., 0], scale_dtype), stored(zero[..., 0], zero_dtype, "zero", "zero_dtype")
    return QuantizedTensor.from_codes(codes, scales, Integers(bits, signed=False), block, zeros=zeros)


def starting_grid(blocks, qmax, round_zero=False):
    """The grid from the smallest to the largest weight of each group.

    blocks: float32 (..., n).  Returns s and the zero, float32 (..., 1).

    >>> starting_grid(torch.tensor([-1.0, 0.0, 2.0]), qmax=3)
    (tensor([1.]), tensor([1.]))
    """
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    width = high - low
    s = torch.where(width <= NARROW, 1.0, qmax / width).clamp(max=FINEST)
    zero = -low * s
    return s, zero.round() if round_zero else zero


class Solution(NamedTuple):
    """What `solve` finds: the zero, float32 (..., 1); and of each turn mean |W − W_r| of the matrix, and its zero."""

    zero: torch.Tensor
    errors: list
    zeros: list


def solve(blocks, s, zero, qmax, *, kappa=None, iters=20, beta=10.0, p=0.7):
    """Move the zeros of a grid, in turns, while the mean error of all weights gets smaller.

    blocks: float32 (..., n), the groups.  s, zero: (..., 1), where to start.  qmax: the largest code.
    kappa, iters: as for `hqq`.  beta, p: as above.
    Returns a Solution.  `errors[t]` belongs to `zeros[t]`, and the last error is the one that was not smaller, if the
    turns have ended by that.  Raises ValueError for values out of range.

    >>> blocks = torch.tensor([[0.0, 0.03, 0.13, 0.22, 0.3]])
    >>> found = solve(blocks, *starting_grid(blocks, 3), 3)
    >>> [round(error, 4) for error in found.errors], round(found.zero.item(), 4)
    ([0.016, 0.0128, 0.0128], -0.16)
    """
    if not (iters >= 0 and beta > 0 and 0 < p <= 1 and (kappa is None or kappa > 1)):
        raise ValueError(f"iters={iters}, beta={beta}, p={p}, kappa={kappa}: choose iters >= 0, beta > 0, 0 < p <= 1, "
                         "and kappa None or above 1")  # fmt: skip
    errors, zeros = [], []
    for turn in turns(blocks, s, zero, qmax, kappa=kappa, iters=iters, beta=beta, p=p):
        error = turn.error.mean().item()
        rising = bool(errors) and error >= errors[-1]
        errors.append(error)
        zeros.append(turn.zero)
        zero = turn.next_zero
        if rising:
            zero = zero if kappa is None else zeros[-2]
            break
    return Solution(zero, errors, zeros)


class Turn(NamedTuple):
    """One turn: its zero; the codes W_q with it; |W − W_r| for each weight; and the zero for the next turn."""

    zero: torch.Tensor
    codes: torch.Tensor
    error: torch.Tensor
    next_zero: torch.Tensor


def turns(blocks, s, zero, qmax, *, kappa=None, iters=20, beta=10.0, p=0.7):
    """The turns of HQQ one after another, without an end to stop at: arguments as for `solve`; yields `Turn`s."""
    for _ in range(iters):
        codes = nearest(blocks, s, zero, qmax)
        rest = blocks - (codes - zero) / s
        outliers = shrink(rest, beta, p)  # W_e
        following = (codes - (blocks - outliers) * s).mean(-1, keepdim=True)
        yield Turn(zero, codes, rest.abs(), following)
        zero, beta = following, beta * (kappa or 1)


def nearest(blocks, s, zero, qmax):
    """The codes W_q, float32."""
    return (blocks * s + zero).round().clamp(0, qmax)


def shrink(x, beta=10.0, p=0.7):
    """Bring numbers nearer to zero: the small ones all the way, the large ones hardly.

    >>> shrink(torch.tensor([-2.0, 0.1]), beta=1.0, p=1.0)          # p = 1 takes 1 / beta off each
    tensor([-1.,  0.])
    """
    size = x.abs()
    if (size < 0.99 * beta ** (1 / (p - 2))).all():  # the usual case, and powers would take most of the time
        return torch.zeros_like(x)
    return x.sign() * (size - size ** (p - 1) / beta).clamp(min=0)


def _block(shape, group_size, axis):
    """The (rows, columns) of a group."""
    if axis == 1:
        return block_shape(shape, group_size)
    if axis != 0:
        raise ValueError(f"axis={axis} is unknown; 1 has groups along the rows, 0 along the columns")
    return block_shape((shape[1], shape[0]), group_size)[::-1]


def _check_bits(bits):
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits} is out of range; these grids have 1 to 8 bits")
    return bits
