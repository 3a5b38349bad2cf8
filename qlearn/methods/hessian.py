"""Making a Hessian fit to be inverted: dead columns and damping.

GPTQ needs the inverse of H = (2 / n) Σ x xᵀ, and often there is none.

* A channel that is always 0 leaves a row and a column of zeros. Such a column of the weight is **dead**: whatever is
  stored for it, no calibration input notices. Its place on the diagonal is filled, which makes it a column that has
  nothing to do with any other, and so it is rounded to nearest. (The authors' code sets the dead weights to 0 as well.
  Here they are kept: the channel may speak on another text.)
* Fewer tokens than columns, copies of channels, sums of channels: then some directions of the input space were never
  seen, and H is **singular**.
* A few enormous channels: then H has an inverse on paper, and in float32 the small directions drown in rounding.

**Damping** is the remedy for the last two: a share `percdamp` of the mean of the diagonal is added to the diagonal, as
if every channel had in addition carried a little noise of its own. The directions that were never seen then count a
little instead of not at all. Too little leaves the inverse meaningless, and the updates huge; too much makes H look
like a diagonal matrix, and GPTQ like round-to-nearest. 0.01 is customary.

Whether it was enough is decided by the Cholesky factorization, which exists only for positive definite matrices. Its
squared diagonal holds what is left of a column's own H[i, i] when the columns before it have explained what they can.
Where nothing is left but rounding, ten times the damping is tried, and a warning says so.
"""

import math
import warnings

import torch

LIMIT = 1.0  # a damping as large as the mean of the diagonal itself: what fails there is no Hessian
FLOOR = 0.01  # the first damping to try when none was asked for and none was not enough


def normalize(hessian):
    """Divide by the mean of the living diagonal and put a 1 where a column is dead; in place.

    hessian: floating point (..., n, n).  GPTQ does not change when its Hessian is multiplied by a number, so this costs
    nothing, and from here on percdamp is simply what is added to the diagonal.
    Returns the same tensor.  Raises ValueError for NaN or infinity.

    >>> normalize(torch.tensor([[6.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]]))
    tensor([[1.5000, 0.0000, 0.2500],
            [0.0000, 1.0000, 0.0000],
            [0.2500, 0.0000, 0.5000]])
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(
            "the Hessian holds NaN or infinity: the inputs overflow float32; scale the layer's inputs down"
        )
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.sum(-1) / (~dead).sum(-1).clamp(min=1)
    hessian /= torch.where(mean == 0, 1.0, mean)[..., None, None]
    diagonal.masked_fill_(dead, 1.0)
    return hessian


def damped_cholesky(hessian, percdamp=0.01, counts=None):
    """Damp normalized Hessians, in place, until each has a Cholesky factor, and return the factors.

    hessian: floating point (batch, n, n), from `normalize`.
    percdamp: what is added to the diagonal at first; where that is not enough, ten times as much, up to 1.
    counts: how many tokens each of the batch sums up, if known; for the messages only.
    Returns L, lower triangular (batch, n, n), with L Lᵀ the damped Hessian.
    Raises ValueError for a percdamp that is no number from 0 up, and for a matrix that is not positive definite even
    with percdamp=1.  Warns when the damping was increased.

    >>> damped_cholesky(torch.eye(2)[None] * 0.96, percdamp=0.04)
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    if not (isinstance(percdamp, (int, float)) and 0 <= percdamp < math.inf):
        raise ValueError(f"percdamp={percdamp!r} is no share of the mean diagonal; choose a number from 0 to 1")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    used = torch.full_like(diagonal[:, 0], percdamp)
    diagonal += used[:, None]
    while True:
        factor, failed = _cholesky(hessian)
        if not failed.any():
            break
        if used[failed].max() >= LIMIT:
            raise ValueError(_singular(hessian, failed, counts) + f" Not even percdamp={used.max():.3g} mends it.")
        more = torch.where(failed, (10 * used).clamp(FLOOR, LIMIT), used)
        diagonal += (more - used)[:, None]
        used = more
    increased = used > percdamp
    if increased.any():
        warnings.warn(
            _singular(hessian, increased, counts) + " percdamp, the share of the mean diagonal that is added to the "
            f"diagonal, was therefore raised from {percdamp:g} to {used.max():.3g}.",
            stacklevel=2,
        )
    return factor


def _cholesky(hessian):
    """The factors, and for which of the batch it failed: no pivot may be negative, or mere rounding."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    rounding = 8 * torch.finfo(hessian.dtype).eps
    pivots, own = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (factor, hessian))
    return factor, (info != 0) | (pivots.square() <= rounding * own).any(-1)


def _singular(hessian, which, counts):
    """A sentence on what is wrong, and the likely reason."""
    batch, columns = hessian.shape[:2]
    these = f"{int(which.sum())} of {batch} Hessians" if batch > 1 else "The Hessian"
    count = None if counts is None else min(n for n, failed in zip(counts, which.tolist(), strict=True) if failed)
    if count is not None and count < columns:
        why = f"{count} tokens are fewer than its columns, so calibrate with more"
    else:
        why = "some input channels are copies or sums of others, or a few of them dwarf the rest"
    return f"{these} of {columns} columns cannot be inverted in {hessian.dtype}: {why}."
