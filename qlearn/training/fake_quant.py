"""Fake quantization: a training that sees the quantized weights and improves the ones behind them.

Rounding is a staircase. Its derivative is zero on every step and does not exist at the edges, so a gradient that has
to pass through it arrives as nothing, and a weight that is rounded can never be told to move. Fake quantization keeps
the rounding and mends the derivative:

    forward     the layer computes with Q(w), exactly the numbers that will be stored
    backward    dL/dw := dL/dQ(w)         as if Q were the identity: the straight-through estimator

The float weights w live on behind the quantized ones. Small steps add up in them until one crosses the middle between
two grid points, and then Q(w) jumps.

**The clip mask.** Beyond the ends of the grid the staircase is flat for good: pushing such a weight outward changes
nothing, and the estimate would keep pushing. There the gradient is set to zero. The ends are those of torch's own
fake quantization: half a step beyond the outermost grid points, so a weight that is rounded to the end, and not cut
off, still learns.

Q is the method itself, `quantize(...).dequantize()`, whichever of the registry it is. So what the training sees is,
bit for bit, what is stored afterwards: an export that rounds in another way would undo part of what was learned.

**The scale learns too** where it is tied to a weight, as in `signed_absmax`: the group's largest weight decides how far
apart the grid points of all others lie. With `scale_gradient=True` it is told what that does to them.

Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons (2013); Jacob et al.,
Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (2018).
"""

import numpy as np
import torch

from qlearn.methods import quantize
from qlearn.methods.blocking import block_shape
from qlearn.methods.signed_absmax import check_bits, signed_absmax_values


def fake_quantize(
    weight, method="signed_absmax", bits=4, group_size=32, *, clip_mask=True, scale_gradient=False, **options
):
    """Quantized values forward, straight-through gradients backward.

    weight: floating point (rows, columns), usually a parameter that requires a gradient.
    method, bits, group_size, options: as for `qlearn.quantize`.  clip_mask: no gradient beyond the ends of the grid.
    scale_gradient: "signed_absmax" only; the largest weight of each group gets the gradient of the scale as well.
    Returns a tensor like weight, equal to quantize(weight, ...).dequantize() bit for bit when weight is float32.
    Raises what the method raises, and ValueError for a scale_gradient of another method.

    >>> w = torch.tensor([[0.31, -0.55, 0.98, -1.0]], requires_grad=True)
    >>> q = fake_quantize(w, bits=2, group_size=4)           # grid points -1, -0.5, 0, 0.5
    >>> q.sum().backward()
    >>> q.tolist(), w.grad.tolist()                          # 0.98 is cut off to 0.5, and gets no gradient
    ([[0.5, -0.5, 0.5, -1.0]], [[1.0, 1.0, 0.0, 1.0]])
    """
    if method == "signed_absmax":
        _check_signed(weight, bits, group_size, **options)
        return _SignedAbsmax.apply(weight, bits, group_size, clip_mask, scale_gradient)
    if scale_gradient:
        raise ValueError(f"scale_gradient=True is not there for {method!r}; use signed_absmax, or leave it out")
    with torch.no_grad():
        quantized = quantize(weight, method, bits=bits, group_size=group_size, **options)
        masked = clip_mask and quantized.hadamard is None  # a rotated grid ends at no particular weight
        inside = _inside(weight, quantized, symmetric=method in ("absmax", "mxint8")) if masked else None
        values = quantized.dequantize(weight.dtype)
    return _StraightThrough.apply(weight, values, inside)


def fake_round(x, format, scale=1.0):
    """Round to the grid of any format forward, straight-through backward, with the clip mask.

    x: floating point, any shape.  format: Integers, FloatFormat or Codebook.  scale: number or tensor that broadcasts
    over x; the grid points are scale times the format's numbers.
    Returns scale * format.round(x / scale), like x; numbers beyond the ends become the ends.
    Raises what `format.encode` raises.

    >>> from qlearn.formats.floats import FP4_E2M1
    >>> x = torch.tensor([0.7, -2.4, 9.0], requires_grad=True)
    >>> y = fake_round(x, FP4_E2M1)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, -2.0, 6.0], [1.0, 1.0, 0.0])
    """
    with torch.no_grad():
        first, last = _ends(format)
        scaled = x / scale
        values = format.round(scaled.clamp(*_outermost(format))).to(x.dtype) * scale
        inside = (scaled >= first) & (scaled <= last)
    return _StraightThrough.apply(x, values, inside)


class _StraightThrough(torch.autograd.Function):
    """Returns `values`, and hands the gradient on to `x` where `inside` holds."""

    @staticmethod
    def forward(ctx, x, values, inside):
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None


class _SignedAbsmax(torch.autograd.Function):
    """The whole of `signed_absmax` for training: nothing is packed, and no value is looked at, so that a GPU runs on.

    A stored weight is q * d with d = m / -half, m the group's largest weight. With u = w / d and the straight-through
    rule for q, calculus gives

        d(q d) / dw  =  1 where the weight is inside, 0 where it is cut off
        d(q d) / dd  =  q - u inside, q where it is cut off        (LSQ, Esser et al., arXiv 1902.08153)

    and the second, summed over the group and divided by -half, belongs to m.
    """

    @staticmethod
    def forward(ctx, weight, bits, group_size, clip_mask, scale_gradient):
        values, d = signed_absmax_values(weight.float(), bits, group_size)
        ctx.save_for_backward(weight, values, d)
        ctx.half, ctx.clip_mask, ctx.scale_gradient = 2 ** (bits - 1), clip_mask, scale_gradient
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient):
        weight, values, d = ctx.saved_tensors
        groups = weight.float().unflatten(-1, (d.shape[-2], -1))
        gradient_of_groups = gradient.float().view_as(groups)
        d = d.float() + (d == 0)  # a group of zeros: any d gives zeros
        u, q = groups / d, values.view_as(groups) / d
        inside = (u >= -ctx.half - 0.5) & (u <= ctx.half - 0.5)
        result = gradient_of_groups * inside if ctx.clip_mask else gradient_of_groups
        if ctx.scale_gradient:
            of_scale = (gradient_of_groups * (q - u * inside)).sum(-1, keepdim=True)
            result = result.scatter_add(-1, groups.abs().argmax(-1, keepdim=True), of_scale / -ctx.half)
        return result.flatten(-2).to(gradient.dtype), None, None, None, None


def _check_signed(weight, bits, group_size):
    """What `signed_absmax` checks, but for the values."""
    check_bits(bits)
    block_shape(weight.shape, group_size)


def _inside(weight, quantized, symmetric):
    """Which weights lie within the grid of their block, bool (rows, columns). symmetric: its lowest code is unused."""
    first, last = _ends(quantized.format)
    first = -last if symmetric else first
    zeros = quantized.zero_points()
    zeros = torch.zeros_like(quantized.scales.float()) if zeros is None else zeros
    low, high = _sorted_ends(first - zeros, last - zeros, quantized.scales)
    rows, columns = quantized.block
    if quantized.column_scales is not None:
        weight = weight / quantized.column_factors()
    blocked = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    return ((blocked >= low[:, None, :, None]) & (blocked <= high[:, None, :, None])).view(weight.shape)


def _sorted_ends(first, last, scales):
    """The ends of a grid after scaling, the lower one first: a negative scale turns the grid round."""
    a, b = first * scales.float(), last * scales.float()
    return torch.minimum(a, b), torch.maximum(a, b)


def _grid(format):
    """All finite numbers of a format, in order."""
    numbers = np.unique(format.decode(np.arange(format.count, dtype=np.uint32)))
    return numbers[np.isfinite(numbers)]


def _outermost(format):
    grid = _grid(format)
    return float(grid[0]), float(grid[-1])


def _ends(format):
    """Half a step beyond the outermost numbers of a format."""
    grid = _grid(format)
    return float(grid[0] - (grid[1] - grid[0]) / 2), float(grid[-1] + (grid[-1] - grid[-2]) / 2)
