"""Signed absmax: llama.cpp's rule for its Q4_0 blocks, for any number of bits.

b bits make 2**b codes, an even number, so with zero among them one side has a code more than the other: 8 steps on one
side, 7 on the other at 4 bits, 2 and 1 at 2 bits. `absmax` leaves the extra code unused. Here the weight with the
largest magnitude gets it, whichever its sign:

    d = m / -2**(bits - 1)        m: the weight of the group with the largest magnitude, with its sign
    code = min(2**bits - 1, trunc(w / d + 2**(bits - 1) + 0.5))
    w' = (code - 2**(bits - 1)) * d

so d is negative where m is positive. At 4 bits the steps are 1/8 of the largest weight instead of 1/7, at 2 bits 1/2
instead of 1. What is paid: a weight near -m has one step less than it needs, and is cut off by up to one step.

With bits=4 and group_size=32 this is Q4_0, code for code and scale for scale (`qlearn.formats.gguf_blocks`), so a model
that was trained under it can be exported without any loss.
"""

from qlearn.formats.gguf_blocks import check_scales, signed_max, signed_max_values
from qlearn.formats.integers import Integers
from qlearn.methods.blocking import block_shape, check_weight, from_blocks, to_blocks
from qlearn.tensor import QuantizedTensor


def signed_absmax(weight, bits=4, group_size=32):
    """Quantize a matrix with the rule of Q4_0.

    weight: (rows, columns), floating point.  bits: 2 to 8.  group_size: consecutive weights of a row that share a
    scale; None for the whole row.
    Returns a QuantizedTensor of signed codes in -2**(bits - 1) ... 2**(bits - 1) - 1 with float16 scales, some of them
    negative.
    Raises ValueError for a weight that is not a finite matrix, for bits or group sizes out of range, and for a scale
    that float16 cannot hold.

    >>> import torch
    >>> qt = signed_absmax(torch.tensor([[0.5, -0.25, 0.7, 1.0]]), bits=2, group_size=4)
    >>> qt.codes().tolist(), qt.scales.tolist(), qt.dequantize().tolist()
    ([[-1, 1, -1, -2]], [[-0.5]], [[0.5, -0.5, 0.5, 1.0]])
    """
    weight = check_weight(weight)
    block = block_shape(weight.shape, group_size)
    codes, d = signed_max(to_blocks(weight, block), check_bits(bits))
    check_scales(d)
    codes = from_blocks(codes.char() - 2 ** (bits - 1), weight.shape, block)
    return QuantizedTensor.from_codes(codes, d[..., 0], Integers(bits), block)


def signed_absmax_values(weight, bits=4, group_size=32):
    """What `signed_absmax(...).dequantize()` gives, without packing the codes and without looking at the values.

    weight: float32 (rows, columns), group_size a divisor of the columns.  Returns (values, d): float32 (rows, columns)
    and float16 (rows, groups, 1). For training, which needs this of every matrix in every step.
    """
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))
    codes, d = signed_max(groups, bits)
    return signed_max_values(codes, d, bits).flatten(-2), d


def check_bits(bits):
    """The number of bits, or a ValueError that says which there are."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} is out of range; this grid has 2 to 8 bits")
    return bits
