"""GPTQ: round one column at a time, and let the columns that are left make up for the error.

Round-to-nearest treats each weight as if it stood alone. But a row of weights acts as a sum, y = w₁x₁ + w₂x₂ + ...,
and when x₁ and x₂ tend to be large together, an error in w₁ can be taken back by a small change of w₂. GPTQ does so: it
rounds column 1, shifts all other columns so that the output of the layer changes as little as possible, rounds column 2
as it now is, and so on. Each column is rounded once, to a grid as ever; only what is rounded has moved.

What "as little as possible" means is said by the inputs seen in calibration. The error of the output is

    Σ ‖W x − Q x‖²  over the inputs x   ∝   tr (W − Q) H (W − Q)ᵀ         with the Hessian H = (2 / n) Σ x xᵀ,

the rows of W do not disturb each other, and when column i of a row w is set to q, the best shift of the columns F that
are left is found by calculus (Optimal Brain Surgeon, 1993). Column i counts among F once more:

    w_F  ←  w_F − (w_i − q) / [H_F⁻¹]_ii · [H_F⁻¹]_i,F                    and the error grows by (w_i − q)² / [H_F⁻¹]_ii

`gptq_steps` is these lines and nothing else. It keeps the inverse of H, and after each column takes that column out of
it by one step of Gaussian elimination. For d columns that is d updates of a d × d matrix.

**The fast form.** All rows are treated in the same order, so the row of H_F⁻¹ that each step needs can be known in
advance: up to a factor it is a row of the upper triangular U with H⁻¹ = Uᵀ U. That is what GPTQ added to the older
method, and what `gptq` does. It is quick because

* U comes from one Cholesky factorization. Factor H with its columns in reverse order, invert the triangular factor,
  and reverse again: that is U. (The authors invert H and factor the inverse, which costs more and rounds twice.)
* Columns are treated in blocks of 128. Within a block each column updates the rest of the block only; then one matrix
  product brings all errors of the block to all columns behind it. The result is the same, and most of the work is
  matrix multiplication.

**Groups.** The grid of a group is set when its first column's turn comes, from the weights as they are by then. With
`static_groups` all grids are set at the beginning, from the original weights.

**Order.** Late columns take the errors of the early ones, and the last can pass its own to none. So it helps to begin
with the columns of the largest inputs, those with the largest H_ii. `act_order="static"` sorts the whole row; the
columns of a group are then treated at different times, so its grid must be static. `act_order="group"` sorts within
each group, and sorts the groups, which stay whole: their grids can be set late. Either way codes and grids are stored
in the original order.

Sources: GPTQ (arXiv 2210.17323), algorithm 1, whose symbols are used here; Optimal Brain Quantization (arXiv
2208.11580); `act_order="group"` after GPTQModel, where it is called group-aware reordering.
"""

import warnings
from typing import NamedTuple

import torch

from qlearn.formats.integers import Integers, integer_range
from qlearn.kernels import dispatch
from qlearn.methods.affine import absmax, zero_point
from qlearn.methods.blocking import block_shape, check_weight
from qlearn.methods.hessian import damped_cholesky, normalize
from qlearn.methods.statistics import InputStatistics
from qlearn.tensor import QuantizedTensor

ACT_ORDERS = (False, "static", "group")
COMPILED_FROM = 2**14  # weights: with fewer, torch is done before Numba would be imported


def gptq(
    weight,
    bits=4,
    group_size=None,
    *,
    inputs,
    sym=False,
    percdamp=0.01,
    act_order=False,
    static_groups=False,
    blocksize=128,
    clip="minmax",
    scale_dtype=torch.float16,
):
    """Quantize a matrix so that the output of its layer changes little.

    weight: (rows, columns), floating point; or a stack of matrices that are treated together, (batch, rows, columns),
    such as the experts of a mixture.
    bits: 2 to 8.  group_size: consecutive weights of a row that share a scale; None for one scale a row.
    inputs: what the layer was given in calibration: an InputStatistics, or floating point (tokens, columns); for a
    stack a list of them, one for each matrix.
    sym: False for the grids of `zero_point`, True for those of `absmax`; clip and scale_dtype as for these.
    percdamp: damping, as a share of the mean of the Hessian's diagonal; see `hessian.py`.
    act_order: False, "static" or "group", the order of the columns; True is "static".
    static_groups: set the grids of all groups before the first column is rounded.
    blocksize: columns between two large updates; it changes nothing but the speed.
    Returns a QuantizedTensor of the same kind and size as `zero_point` or `absmax` returns; for a stack a list.
    Raises ValueError as they do, and for inputs that do not fit or are not finite, for an unknown act_order, for
    percdamp or blocksize out of range, and for a Hessian that no damping makes positive definite.
    Warns when more damping was needed, and when there was no input but zeros: such a weight is rounded to nearest.

    Two channels that always carry the same: 1.4 + 1.4 is best stored as 1 + 2.

    >>> weight = torch.tensor([[1.4, 1.4, 0.0, 3.0]])
    >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    >>> gptq(weight, bits=2, inputs=x).codes().tolist(), zero_point(weight, bits=2).codes().tolist()
    ([[1, 2, 0, 3]], [[1, 1, 0, 3]])
    """
    weight = torch.as_tensor(weight)
    stacked = weight.dim() == 3
    if not stacked:
        weight, inputs = check_weight(weight)[None], [inputs]
    W = check_weight(weight.flatten(0, 1)).view(weight.shape)
    grids = _Grids(W, bits, group_size, sym, clip=clip, scale_dtype=scale_dtype)
    starts = _starts(W.shape[-1], grids.group_size, blocksize)
    H, counts = _hessians(inputs, W)
    order, late = _order(H.diagonal(dim1=-2, dim2=-1), act_order, grids.group_size, static_groups)
    U = _upper_factor(H, order, percdamp, counts)
    del H
    quantized = grids.pack(_sweep(W, U, order, grids, late, starts))
    return quantized if stacked else quantized[0]


class Step(NamedTuple):
    """The state after one column.

    column: its index.  codes: float32 (rows,).  quantized: float32 (rows,), the values the codes stand for.
    error: float32 (rows,), (w − q) / [H_F⁻¹]_ii, what the other columns are shifted by, times a row of the inverse.
    weight: float32 (rows, columns): columns that are done hold their quantized values, the others what they are now.
    loss: tr (W − weight) H (W − weight)ᵀ, the error of the output so far, with the undamped H.
    """

    column: int
    codes: torch.Tensor
    quantized: torch.Tensor
    error: torch.Tensor
    weight: torch.Tensor
    loss: float


def gptq_steps(
    weight,
    hessian,
    bits=4,
    group_size=None,
    *,
    sym=False,
    percdamp=0.01,
    act_order=False,
    static_groups=False,
    clip="minmax",
    scale_dtype=torch.float16,
):
    """GPTQ column by column, in float64 and in the plainest form: to read, to draw, and to test `gptq` against.

    hessian: (columns, columns), (2 / n) Σ x xᵀ.  Everything else as for `gptq`.
    Yields a Step after each column.  Raises what `gptq` raises, when the first one is asked for.

    >>> weight, hessian = torch.tensor([[1.4, 1.4, 0.0, 3.0]]), torch.eye(4)
    >>> hessian[0, 1] = hessian[1, 0] = 0.9
    >>> for step in gptq_steps(weight, hessian, bits=2, percdamp=0):
    ...     print(step.column, step.weight.numpy().round(2), round(step.loss, 3))
    0 [[1.   1.76 0.   3.  ]] 0.03
    1 [[1. 2. 0. 3.]] 0.088
    2 [[1. 2. 0. 3.]] 0.088
    3 [[1. 2. 0. 3.]] 0.088
    """
    original, hessian = check_weight(weight).double(), hessian.double()
    if hessian.shape != (original.shape[1],) * 2:
        raise ValueError(
            f"a Hessian of shape {tuple(hessian.shape)} does not fit {original.shape[1]} columns; pass its own"
        )
    grids = _Grids(original, bits, group_size, sym, clip=clip, scale_dtype=scale_dtype)
    order, late = _order(hessian.diagonal()[None], act_order, grids.group_size, static_groups)
    H = normalize(hessian.clone())
    damped_cholesky(H[None], percdamp)
    Hinv = torch.linalg.inv(H)
    W = original.clone()
    for turn, i in enumerate(order[0].tolist()):
        group = i // grids.group_size
        at = slice(None), group
        if late and turn % grids.group_size == 0:
            grids.set(at, W[:, group * grids.group_size : (group + 1) * grids.group_size])
        codes, q = grids.round(W[:, i], *grids.get(at))
        error = (W[:, i] - q) / Hinv[i, i]
        W -= torch.outer(error, Hinv[i])
        W[:, i] = q
        Hinv -= torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
        moved = original - W
        loss = (moved @ hessian * moved).sum().item()
        yield Step(i, codes.float(), q.float(), error.float(), W.float(), loss)


class _Grids:
    """The scales and zeros of all groups. They start as those of the weights given; `set` fits one group anew."""

    def __init__(self, W, bits, group_size, sym, **options):
        self.method, self.bits, self.sym, self.options = absmax if sym else zero_point, bits, sym, options
        _, self.group_size = block_shape(W.shape[-2:], group_size)
        self.scales, self.zeros = self._fit(W)  # (..., rows, groups), float32
        self.low, self.high = integer_range(bits, signed=sym, symmetric=sym)

    def _fit(self, W):
        """The very grids that absmax or zero_point would choose."""
        qt = self.method(W.reshape(-1, W.shape[-1]), self.bits, self.group_size, **self.options)
        zeros = torch.zeros_like(qt.scales) if self.sym else qt.zero_points()
        return [grid.float().view(*W.shape[:-1], -1).to(W.dtype) for grid in (qt.scales, zeros)]

    def set(self, at, columns):
        """Fit a group anew. at: its index into scales.  columns: (..., rows, group_size), its weights by now."""
        scales, zeros = self._fit(columns)
        self.scales[at], self.zeros[at] = scales[..., 0], zeros[..., 0]

    def get(self, at):
        """Scale and zero of a group, (..., rows)."""
        return self.scales[at], self.zeros[at]

    def round(self, w, scale, zero):
        """The codes of weights, and the values they stand for: both as floating point (..., rows)."""
        codes = ((w / scale).round() + zero).clamp(self.low, self.high)
        return codes, (codes - zero) * scale

    def pack(self, codes):
        """A QuantizedTensor for each of (batch, rows, columns) codes."""
        dtype, format = self.options["scale_dtype"], Integers(self.bits, signed=self.sym)
        return [
            QuantizedTensor.from_codes(
                c, scales.to(dtype), format, (1, self.group_size), None if self.sym else zeros.to(torch.uint8)
            )
            for c, scales, zeros in zip(codes, self.scales, self.zeros, strict=True)
        ]


def _order(diagonal, act_order, group_size, static_groups=False):
    """In which order the columns are treated, and whether grids are set late.

    diagonal: (batch, columns), of the Hessians.  Returns int64 (batch, columns), bool.
    """
    act_order = "static" if act_order is True else act_order
    if act_order not in ACT_ORDERS:
        raise ValueError(f"act_order={act_order!r} is unknown; choose False, 'static' or 'group'")
    batch, columns = diagonal.shape
    if act_order == "static":
        return diagonal.argsort(descending=True, stable=True), False
    order = torch.arange(columns, device=diagonal.device).expand(batch, columns)
    if act_order == "group":
        groups = diagonal.view(batch, -1, group_size)
        inside = groups.argsort(descending=True, stable=True)
        whole = groups.amax(-1).argsort(descending=True, stable=True)[..., None].expand_as(inside)
        order = (inside.gather(1, whole) + whole * group_size).view(batch, columns)
    return order, not static_groups


def _hessians(inputs, W):
    """The Hessians (batch, columns, columns) and the numbers of tokens they sum up."""
    batch, _, columns = W.shape
    statistics = [x if isinstance(x, InputStatistics) else InputStatistics.from_inputs(x, sample=0) for x in inputs]
    if len(statistics) != batch:
        raise ValueError(f"{len(statistics)} inputs were given for {batch} matrices; give one to each")
    for one in statistics:
        if one.in_features != columns:
            raise ValueError(
                f"inputs of {one.in_features} channels do not fit a weight of {columns} columns; pass this layer's own"
            )
        if one.hessian is None:
            raise ValueError("these statistics were collected with hessian=False; GPTQ needs hessian=True")
    silent = sum(not one.abs_max.any() for one in statistics)
    if silent:
        warnings.warn(
            f"{silent} of {batch} weights of {columns} columns got no calibration input but zeros, and are rounded to "
            "nearest; calibrate with more or other text",
            stacklevel=3,
        )
    hessians = [one.hessian.to(W.device) for one in statistics]
    return hessians[0][None] if batch == 1 else torch.stack(hessians), [one.count for one in statistics]


def _upper_factor(H, order, percdamp, counts):
    """U of the columns in their order, upper triangular (batch, columns, columns), with the inverse of H = Uᵀ U."""
    backwards = order.flip(-1)
    batch = torch.arange(len(H), device=H.device)[:, None, None]
    A = normalize(H[batch, backwards[:, :, None], backwards[:, None, :]])
    L = damped_cholesky(A, percdamp, counts)
    del A  # these are the largest matrices there are, so none is kept longer than needed
    inverse = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).repeat(len(H), 1, 1).mT
    torch.linalg.solve_triangular(L, inverse, upper=False, out=inverse)
    del L
    return inverse.flip(-2, -1)


def _starts(columns, group_size, blocksize):
    """Where blocks begin, such that a group begins with a block or lies inside of one, and is up to date when fitted.

    >>> _starts(12, group_size=2, blocksize=5), _starts(12, group_size=6, blocksize=5)
    ([0, 4, 8], [0, 5, 6, 11])
    """
    if not isinstance(blocksize, int) or blocksize < 1:
        raise ValueError(f"blocksize={blocksize!r} is no number of columns; choose one from 1, such as 128")
    if group_size <= blocksize:
        return list(range(0, columns, blocksize // group_size * group_size))
    return [group + start for group in range(0, columns, group_size) for start in range(0, group_size, blocksize)]


def _sweep(W, U, order, grids, late, starts):
    """Treat all columns: W is (batch, rows, columns). Returns the codes, int8 or uint8, of the same shape."""
    each = torch.arange(len(W), device=W.device)
    W = W.mT.take_along_dim(order[..., None], 1)  # (batch, columns, rows): a column lies in one piece
    codes = torch.empty_like(W, dtype=torch.int8 if grids.sym else torch.uint8)
    scattered = not (order // grids.group_size).unflatten(1, (-1, grids.group_size)).diff().eq(0).all()
    round_columns = _compiled(W, U) or _round_columns
    for start, end in zip(starts, [*starts[1:], W.shape[1]], strict=True):
        Err = torch.empty_like(W[:, start:end])
        for first in range(start, end, end if scattered else grids.group_size):
            last = end if scattered else min(first + grids.group_size, end)
            groups = order[:, first : last if scattered else first + 1] // grids.group_size
            if late and first % grids.group_size == 0:
                grids.set((each, slice(None), groups[:, 0]), W[:, first : first + grids.group_size].mT)
            grid = grids.get((each[:, None], slice(None), groups))
            block = W[:, first:end], U[:, first:end, first:end]
            round_columns(*block, grids, *grid, codes[:, first:last], Err[:, first - start : last - start])
        W[:, end:].baddbmm_(U[:, start:end, end:].mT, Err, alpha=-1)
    return codes.take_along_dim(order.argsort()[..., None], 1).mT


def _round_columns(W, U, grids, scale, zero, codes, Err):
    """Round the first columns of a block and pass their errors on within it.

    W: (batch, columns, rows).  U: (batch, columns, columns).  scale, zero: (batch, n or 1, rows).
    codes, Err: (batch, n, rows), which are filled in.
    """
    for i in range(codes.shape[1]):
        grid = min(i, scale.shape[1] - 1)
        codes[:, i], q = grids.round(W[:, i], scale[:, grid], zero[:, grid])
        Err[:, i] = (W[:, i] - q) / U[:, i, i, None]
        W[:, i + 1 :].addcmul_(U[:, i, i + 1 :, None], Err[:, i, None], value=-1)


def _compiled(W, U):
    """A function that does the same to the last bit, and sooner; or None."""
    on_cpu = {W.device.type, U.device.type} == {"cpu"} and W.dtype == U.dtype == torch.float32
    if not on_cpu or W.numel() < COMPILED_FROM or dispatch.asked_for() not in (None, "cpu"):
        return None
    from qlearn.kernels.cpu import gptq as compiled  # here: it brings Numba

    return compiled.round_columns
