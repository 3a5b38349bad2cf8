"""The four operands of quantized attention, each on its grid. `attention.py` has the whole and says why.

Every function returns numbers of the grid, in floating point, and the scale that they are still to be multiplied by:
integers and their step; for FP4, whose scales lie along what is summed up, the finished numbers and 1.

    Q, K    int8, int4     q_int = round(q / s), s = max|q| / 127 (or 7), one for each block of tokens
            FP4            along d
    P       fp16           as it is
            FP8            448 · p in E4M3, s = 1/448
            FP4            along the keys; rows stretched first, s = max p / (448 · 6), or 1 without two levels
    V       fp16           as it is
            FP8            v / s in E4M3, s = max|v| / 448, one for each channel over all keys
            FP4            along the keys

Products of integers are exact in float32 as long as no sum exceeds 2**24: up to d = 1040 for int8. Beyond that, which
no model comes near, the codes are float64.

A block of FP4 that is cut short at the end is filled up with zeros. They change neither its scale nor the product.

Source: as `attention.py`. SageAttention's kernels round halves of integers away from zero, here they go to the even
integer.
"""

import torch
import torch.nn.functional as F

from qlearn.formats.integers import integer_range
from qlearn.formats.microscaling import BLOCK_FORMATS
from qlearn.methods.e2m1 import mx_scale, round_e2m1

INTEGERS = {"int8": 8, "int4": 4}
FP4 = ("mxfp4", "nvfp4")
Q_BITS = ("float", *INTEGERS, *FP4)
P_BITS = ("float", "fp16", "fp8", *FP4)
FP8_MAX = 448.0
LARGEST = {"nvfp4": 448.0 * 6, "mxfp4": 6.0}  # that a row of P is stretched to
EXACT_IN_FLOAT32 = 2**24


def smooth(x, block):
    """Subtract from tokens the mean of their block.

    x: (..., tokens, d).  block: consecutive tokens; the last one may be shorter.
    Returns (x - mean, mean), both of the shape of x.

    >>> smooth(torch.tensor([[1.0, 5.0], [3.0, 5.0], [7.0, 8.0]]), block=2)
    (tensor([[-1.,  0.],
            [ 1.,  0.],
            [ 0.,  0.]]), tensor([[2., 5.],
            [2., 5.],
            [7., 8.]]))
    """
    mean = torch.cat([part.mean(-2, keepdim=True).expand_as(part) for part in x.split(block, -2)], -2)
    return x - mean, mean


def round_qk(x, bits, block):
    """Q or K on a grid.

    x: (..., tokens, d).  bits: one of Q_BITS.  block: how many consecutive tokens share an integer scale.
    Returns numbers of the shape of x, and scales (..., tokens, 1).

    >>> round_qk(torch.tensor([[0.6, -1.0], [0.0, 0.25], [0.0, 0.0]]), "int4", block=2)
    (tensor([[ 4., -7.],
            [ 0.,  2.],
            [ 0.,  0.]]), tensor([[0.1429],
            [0.1429],
            [1.0000]]))
    """
    if bits in FP4:
        return round_blocks(x, bits), torch.ones_like(x[..., :1])
    if bits == "float":
        return x, torch.ones_like(x[..., :1])
    _, largest_code = integer_range(INTEGERS[bits], symmetric=True)
    tokens = F.pad(x.abs().amax(-1), (0, -x.shape[-2] % block)).unflatten(-1, (-1, block))
    largest = tokens.amax(-1, keepdim=True).expand_as(tokens).flatten(-2)[..., : x.shape[-2], None]
    scale = largest / largest_code
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (x / scale).round().clamp(-largest_code, largest_code)
    return codes if x.shape[-1] * largest_code**2 <= EXACT_IN_FLOAT32 else codes.double(), scale


def round_p(p, bits, two_level=True):
    """A tile of P on a grid.

    p: (..., queries, keys), in 0 ... 1.  bits: one of P_BITS.  two_level: stretch rows first; FP4 only.
    Returns numbers of the shape of p, and scales that are broadcast over them.

    A row of small numbers. The smallest scale of NVFP4 is 2**-9, so they are an eighth and a sixteenth of it:

    >>> p = torch.tensor([[2.0**-12, 2.0**-13]])
    >>> for two_level in (False, True):
    ...     numbers, scale = round_p(p, "nvfp4", two_level)
    ...     print(numbers * scale / 2**-12)
    tensor([[0., 0.]])
    tensor([[1.0000, 0.5000]])
    """
    one = p.new_ones(1)
    if bits == "float":
        return p, one
    if bits == "fp16":
        return p.half().to(p), one
    if bits == "fp8":
        return to_fp8(p * FP8_MAX), one / FP8_MAX
    scale = one
    if two_level:
        scale = p.amax(-1, keepdim=True) / LARGEST[bits]
        scale = torch.where(scale == 0, 1.0, scale)
    return round_blocks(p / scale, bits), scale


def round_v(v, bits):
    """V on a grid.

    v: (..., keys, d_v).  bits: one of P_BITS.
    Returns numbers of the shape of v, and scales (..., 1, d_v) or one that is 1.  Raises ValueError for numbers beyond
    float16 if they are to be that.
    """
    one = v.new_ones(1)
    if bits == "float":
        return v, one
    if bits == "fp16":
        half = v.half().to(v)
        if not torch.isfinite(half).all():
            raise ValueError(f"v reaches {v.abs().max():.6g}, too large for float16; choose another pv, such as fp8")
        return half, one
    if bits == "fp8":
        scale = v.abs().amax(-2, keepdim=True) / FP8_MAX
        scale = torch.where(scale == 0, 1.0, scale)
        return to_fp8(v / scale), scale
    return round_blocks(v.mT, bits).mT, one


def to_fp8(x):
    """Numbers up to 448 rounded to E4M3, ties to even, in the dtype of x. The cast is torch's."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def round_blocks(x, name):
    """Numbers in blocks along the last axis, by the default rules of `formats.microscaling`: as x in shape and dtype.

    NVFP4 has no scale for the tensor here, as in SageAttention3. The numbers are those of the format's own `round`,
    which would fetch every tile of P from the GPU; these few lines (`e2m1.py`) stay where x is, and compute in float32.

    >>> round_blocks(torch.tensor([[0.26, 1.4, -6.0, 0.0]]), "nvfp4")
    tensor([[ 0.5000,  1.5000, -6.0000,  0.0000]])
    """
    size = BLOCK_FORMATS[name].block_size
    blocks = F.pad(x, (0, -x.shape[-1] % size)).float().unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    if name == "nvfp4":
        scale = (largest / 6).clamp(2.0**-9, FP8_MAX).to(torch.float8_e4m3fn).float()
    else:
        scale = mx_scale(largest)
    rounded = round_e2m1(blocks * (1 / scale)) * scale
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x)
