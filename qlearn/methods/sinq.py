"""SINQ, Sinkhorn-normalized quantization: a second scale for each column, so that an outlier has two ways to give.

Round-to-nearest gives each group of a row its scale, and one outlier makes the steps of its whole group coarse. SINQ
balances a tile of the matrix first (`sinkhorn.py`): it divides the columns by mu1 and the rows by mu2 so that all of
them vary about equally, and only then rounds. Both vectors come back when the matrix is read,

    W  ≈  (codes − zero) · scale · mu2 · mu1           scale · mu2 is one number for each group of a row, as ever
          (of the group)   (of the row) (of the column)    mu1 is `column_scales`

so all that is stored beyond round-to-nearest is mu1: 16 bits a column, 16 / rows bits a weight.

    [ 0.1  -0.2   0.1  3.0 ]      a large column:  mu1 takes it, and the row keeps its fine steps
    [-0.1   0.1   0.2 -2.0 ]      a large row:     mu2 takes it, as its scale would have done anyway
    [ 0.2   0.1  -0.1  2.5 ]

No calibration text is needed. In a product with inputs, mu1 can go to the inputs: W x = (W / mu1)(mu1 · x).

**What it lowers.** Hardly the squared error of the weights: large columns now have larger errors, and small ones
smaller. But which columns are small? Those that read large inputs, on the whole: in the bundled model the size of a
column and of what it reads have a rank correlation of -0.2 to -0.4, in all kinds of layers but k. So errors are moved
to where inputs are small. At 3 bits in groups of 64 the weights of each kind are off by as much as before, 19 to 20 %,
and the outputs by 3 to 16 % less than before, in all kinds of layers but k (`bench/results/weights_only.json`).

**Tiles.** A tile is all rows of g consecutive columns, g the group size, so a group is a row of a tile and mu1 has one
number for each column of the matrix. With `tile_rows` the rows are cut into bands too; each band has a mu1 of its own,
which balances better and costs more: 16 / tile_rows bits a weight.

**The rounding.** With `shift`, a group uses the interval from its smallest to its largest weight, as zero-point does:

    scale = (max − min) / (2**bits − 1)     zero = −round(min / scale)     code = clamp(round(w / scale) + zero)

It is not widened to contain 0, as `zero_point` has it; a group that does not, which is rare, has a zero outside of the
grid. Without `shift`, the grid is that of `absmax`. With `normal_float` the codes stand for the values of NF4 or NF3,
and `shift` means that the mean of a group is taken off first. With `hqq`, the turns of HQQ move the zero.

**Scales of 8 bits.** `small_scales` stores the scales in 8 bits, 32 of them to a step and a minimum of their own, as
the authors' package does by default, and zeros that are no integers in 8 bits too, all to one step and minimum. Zeros
that are integers of the grid take `bits` bits in any case, which loses nothing; the package has them in 16 bits, or in
8, where they are rounded once more.

**The gate.** Since 2026 the authors' code does not balance a matrix that has a kurtosis above 5 (the mean of the fourth
powers over the square of the mean square; 3 for a normal distribution). Their table was made without that. It is
`kurtosis=5.0` here, and off unless asked for.

**Tiny weights.** As in the authors' code, no interval is taken to be narrower than 0.0001, and no deviation smaller
than 0.001. A matrix whose weights are all of that size loses what it held; multiply it by a constant first.

**What differs from the authors' code.** A group size that does not divide is an error, where theirs halves it. A group
of equal weights decodes to them; theirs needs a zero so large that a float16 cannot hold it. Without shift, theirs uses
13 of the 16 codes of 4 bits, and divides by 0 at 2 bits.

Source: SINQ (arXiv 2509.22944), sections 2 and 3, and the authors' package `sinq`: `dual_shift.py`, `quantizer.py`,
`optimize.py`. mu1 and mu2 are their names.
"""

from dataclasses import dataclass

import torch

from qlearn.formats.codebooks import NF3, NF4
from qlearn.formats.integers import Integers
from qlearn.methods.blocking import block_shape, check_weight
from qlearn.methods.hqq import starting_grid, turns
from qlearn.methods.sinkhorn import sinkhorn
from qlearn.methods.storing import eight_bit_scales, eight_bit_zeros, integral_zeros, stored
from qlearn.tensor import QuantizedTensor

NARROW = 1e-4  # no interval is taken to be narrower
ORDER = 16  # states that balancing looks at, in the authors' code


def sinq(
    weight,
    bits=4,
    group_size=None,
    *,
    order=ORDER,
    tile_rows=None,
    shift=True,
    normal_float=False,
    hqq=False,
    small_scales=False,
    kurtosis=None,
    input_scale=None,
    scale_dtype=torch.float16,
):
    """Balance a matrix, then quantize it.

    weight: (rows, columns), floating point.  bits: 2 to 8.
    group_size: consecutive weights of a row that share a scale, and columns of a tile; None for all.
    order: of `sinkhorn`; 1 leaves the matrix as it is.  tile_rows: rows of a tile; None for all.
    shift, normal_float, hqq, small_scales, kurtosis: see above.
    input_scale: (columns,), factors for the columns of the balanced matrix before rounding, as A-SINQ finds them;
    None for none. They are divided out of `column_scales`.
    scale_dtype: of scales, column scales, and zeros that are no integers.
    Returns a QuantizedTensor with `column_scales` = mu1, unless nothing was balanced.
    Raises ValueError for a weight that is not a finite matrix, and for options out of range or at odds.

    A column of large weights no longer costs the others their steps:

    >>> weight = torch.tensor([[0.1, -0.2, 0.1, 3.0], [-0.1, 0.1, 0.2, -2.0], [0.2, 0.1, -0.1, 2.5]])
    >>> sinq(weight, bits=4).dequantize().round(decimals=2)
    tensor([[ 0.1000, -0.2000,  0.1000,  2.9200],
            [-0.1100,  0.0900,  0.2100, -1.8300],
            [ 0.2000,  0.1000, -0.1000,  2.3800]])
    >>> sinq(weight, bits=4, order=1).dequantize().round(decimals=2)
    tensor([[ 0.0000, -0.2100,  0.0000,  2.9900],
            [-0.1500,  0.1500,  0.1500, -2.0500],
            [ 0.1700,  0.1700, -0.1700,  2.4300]])
    """
    tiles = balanced_tiles(weight, group_size, order=order, tile_rows=tile_rows, kurtosis=kurtosis)
    grid = make_grid(bits, shift, normal_float, hqq)
    return tiles.quantize(grid, input_scale, small_scales=small_scales, scale_dtype=scale_dtype)


def balanced_tiles(weight, group_size=None, *, order=ORDER, tile_rows=None, kurtosis=None):
    """The first half of `sinq`, arguments as there: Tiles.

    Raises ValueError for a weight that is not a finite matrix, and for arguments out of range.
    """
    weight = check_weight(weight)
    block = block_shape(weight.shape, group_size)
    if order < 1:
        raise ValueError(f"order={order} looks at no state of the matrix; choose at least 1, usually {ORDER}")
    if kurtosis is not None and not kurtosis > 0:
        raise ValueError(f"kurtosis={kurtosis} lets no matrix pass; choose 5.0, say, or None for no gate")
    if tile_rows is not None and (not isinstance(tile_rows, int) or tile_rows < 1 or len(weight) % tile_rows):
        raise ValueError(f"tile_rows={tile_rows} does not divide the {len(weight)} rows; choose a positive divisor")
    gated = kurtosis is not None and fourth_moment(weight) > kurtosis
    tiles = weight.unflatten(0, (-1, tile_rows or len(weight))).unflatten(2, (-1, block[1])).transpose(1, 2)
    balanced, mu1, mu2, _ = sinkhorn(tiles, 1 if gated else order)
    return Tiles(balanced, mu1, mu2)


@dataclass(frozen=True)
class Tiles:
    """A matrix cut into tiles, each of them balanced: bands of r rows, cut into tiles of g columns.

    balanced: float32 (bands, tiles, r, g).  mu1: (bands, tiles, g).  mu2: (bands, tiles, r).
    """

    balanced: torch.Tensor
    mu1: torch.Tensor
    mu2: torch.Tensor

    def quantize(self, grid, input_scale=None, *, small_scales=False, scale_dtype=torch.float16):
        """The second half of `sinq`, arguments as there.  grid: what rounds the groups, as `make_grid` makes it."""
        balanced, mu1 = self.balanced, self.mu1
        bands, tiles, r, g = balanced.shape
        if input_scale is not None:
            s = _check_input_scale(input_scale, balanced).view(tiles, 1, g)
            balanced, mu1 = balanced * s, mu1 / s[:, 0]
        codes, scales, zeros = grid.fit(balanced)  # (bands, tiles, r, g), and two (bands, tiles, r, 1)
        codes = codes.transpose(1, 2).reshape(bands * r, tiles * g)
        scales, zeros = (
            None if x is None else x.transpose(1, 2).reshape(bands * r, tiles)
            for x in (scales * self.mu2[..., None], zeros)
        )
        scales, zeros = _store(scales, zeros, grid, small_scales, scale_dtype)
        column_scales = None
        if (mu1 != 1).any():
            column_scales = stored(mu1.flatten(1) if bands > 1 else mu1.flatten(), scale_dtype)
        return QuantizedTensor.from_codes(codes, scales, grid.format, (1, g), zeros=zeros, column_scales=column_scales)


def fourth_moment(weight):
    """The kurtosis of all weights: 3 for a normal distribution, more with outliers.

    >>> round(fourth_moment(torch.tensor([[-1.0, 1.0, -1.0, 1.0]])), 3)
    1.0
    """
    square = (weight.float() - weight.float().mean()).square()
    return (square.square().mean() / square.mean().clamp(min=1e-6).square()).item()


class Uniform:
    """Evenly spaced codes from the smallest to the largest weight of a group."""

    integral = True

    def __init__(self, bits):
        self.format, self.qmax = Integers(bits, signed=False), 2**bits - 1

    def fit(self, groups):
        """groups: float32 (..., n).  Returns codes (..., n), scales (..., 1) and zeros (..., 1)."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        narrow = high - low < NARROW  # then 0 must be in it, or the zero would be astronomical
        low, high = torch.where(narrow, low.clamp(max=0), low), torch.where(narrow, high.clamp(min=0), high)
        scales = (high - low).clamp(min=NARROW) / self.qmax
        zeros = -(low / scales).round()
        return (groups / scales + zeros).round().clamp(0, self.qmax).to(torch.uint8), scales, zeros


class Moved(Uniform):
    """The same, and then HQQ moves the zero. As published: always 20 turns, of which each tile keeps the best."""

    integral = False

    def fit(self, groups):
        s, zero = starting_grid(groups, self.qmax)
        best, least = zero, torch.full_like(groups[..., :1, :1], torch.inf)
        for turn in turns(groups, s, zero, self.qmax):
            error = turn.error.mean((-2, -1), keepdim=True)
            best, least = torch.where(error < least, turn.next_zero, best), error.minimum(least)
        return turn.codes.to(torch.uint8), 1 / s, best


class Symmetric:
    """Evenly spaced codes around 0."""

    def __init__(self, bits):
        self.format, self.qmax = Integers(bits), 2 ** (bits - 1) - 1

    def fit(self, groups):
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=NARROW) / self.qmax
        return (groups / scales).round().clamp(-self.qmax, self.qmax).to(torch.int8), scales, None


class NormalFloat:
    """The values of NF4 or NF3, for groups whose mean was taken off (`shift`) or not."""

    integral = False

    def __init__(self, bits, shift):
        self.format, self.shift = {4: NF4, 3: NF3}[bits], shift

    def fit(self, groups):
        mean = groups.mean(-1, keepdim=True) * self.shift
        narrow = (groups - mean).abs().amax(-1, keepdim=True) < NARROW
        mean = torch.where(narrow, 0, mean)
        scales = (groups - mean).abs().amax(-1, keepdim=True).clamp(min=NARROW)
        zeros = -mean / scales
        return self.format.encode(groups / scales + zeros), scales, zeros if self.shift else None


def make_grid(bits, shift=True, normal_float=False, hqq=False):
    """What rounds groups, by the options of `sinq`; ValueError where they are out of range or at odds."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} is out of range; these grids have 2 to 8 bits")
    if normal_float and bits not in (3, 4):
        raise ValueError(f"there is no NormalFloat of {bits} bits here; choose 3 or 4, or normal_float=False")
    if hqq and (normal_float or not shift):
        raise ValueError("hqq=True moves the zeros of an evenly spaced grid; drop it, normal_float or shift=False")
    if normal_float:
        return NormalFloat(bits, shift)
    return (Moved if hqq else Uniform)(bits) if shift else Symmetric(bits)


def _store(scales, zeros, grid, small_scales, dtype):
    """Scales and zeros as they are stored."""
    scales = eight_bit_scales(scales) if small_scales else stored(scales, dtype)
    if zeros is None:
        return scales, None
    if grid.integral:
        return scales, integral_zeros(zeros, grid.qmax)
    return scales, eight_bit_zeros(zeros) if small_scales else stored(zeros, dtype, "zero")


def _check_input_scale(scale, tiles):
    scale = torch.as_tensor(scale, dtype=torch.float32, device=tiles.device)
    columns = tiles.shape[1] * tiles.shape[3]
    if scale.shape != (columns,) or not ((scale > 0) & torch.isfinite(scale)).all():
        raise ValueError(
            f"an input_scale of shape {tuple(scale.shape)} does not fit {columns} columns or is not positive; "
            "pass one positive factor for each column, or None"
        )
    return scale
