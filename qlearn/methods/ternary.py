"""Ternary and binary weights: BitNet's two roundings.

**Ternary** (BitNet b1.58). A weight becomes -1, 0 or 1, times one scale for the whole matrix:

    beta = mean|W|        V = clip(round(W / beta), -1, 1)        W' = beta * V

    W       0.9  -0.2   0.1  -0.8         beta = 2.0 / 4 = 0.5
    W/beta  1.8  -0.4   0.2  -1.6
    V       1     0     0    -1
    W'      0.5   0     0    -0.5

The *mean* magnitude is the point. With the largest one, as in `absmax`, everything below half of it is 0: of normally
distributed weights, whose largest is some four standard deviations out, nineteen of twenty. The mean is at 0.8 standard
deviations, and so three of ten become 0, and seven keep their sign. `scale="absmax"` is here to see that.

Three values are log2(3) = 1.58 bits. Stored are 1.6, five trits to a byte (`formats.integers.Trits`), or on request 2
bits, which are unpacked with shifts alone.

**Binary** (the first BitNet). One bit, the sign of what is left when the mean is taken off; the scale is the same:

    alpha = mean W        V = 1 where W > alpha, else -1          W' = beta * V

Neither is meant for weights that were trained as floats: it makes noise of them. A network that is *trained* under
these roundings (`training/bitlinear.py`) learns to use them, and reads them from here.

Source: BitNet, arXiv 2310.11453, equations 1 to 3; BitNet b1.58, arXiv 2402.17764, equations 1 to 3, with the smallest
scale of 1e-5 and the order of operations from the code of The Era of 1-bit LLMs: Training Tips, Code and FAQ
(microsoft/unilm, 2024).
"""

import torch

from qlearn.formats.codebooks import SIGN
from qlearn.formats.integers import TRIT, Integers
from qlearn.methods.blocking import block_shape, check_weight, from_blocks, to_blocks
from qlearn.tensor import QuantizedTensor

EPSILON = 1e-5  # the smallest scale, so that a matrix of zeros divides by something
SCALES = ("absmean", "absmax")


def ternary(weight, bits=1.6, group_size=None, *, scale="absmean", scale_dtype=torch.float16):
    """Quantize a matrix to -1, 0, 1 times a scale.

    weight: (rows, columns), floating point.  bits: what a code is stored in, 1.6 or 2.
    group_size: None for one scale in all; else consecutive weights of a row that share one.
    scale: "absmean", BitNet's; or "absmax", the largest magnitude.
    Returns a QuantizedTensor of trits.
    Raises ValueError for a weight that is not a finite matrix, for other bits, for a group size that does not divide
    the columns, for an unknown scale, and for a scale that `scale_dtype` cannot hold.

    >>> qt = ternary(torch.tensor([[0.9, -0.2, 0.1, -0.8]]))
    >>> qt.codes().tolist(), qt.dequantize().tolist()
    ([[1, 0, 0, -1]], [[0.5, 0.0, 0.0, -0.5]])
    """
    format = check_ternary_bits(bits)
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose from {', '.join(SCALES)}")
    return _quantize(weight, absmean if scale == "absmean" else _by_largest, format, group_size, scale_dtype)


def binary(weight, bits=1, group_size=None, *, scale_dtype=torch.float16):
    """Quantize a matrix to its signs about the mean, times the mean magnitude.

    weight, group_size, scale_dtype: as for `ternary`; with groups, each has its own mean as well.  bits: 1.
    Returns a QuantizedTensor whose codes are 0 for -1, and 1 for 1.  Raises ValueError as `ternary` does.

    >>> qt = binary(torch.tensor([[0.9, -0.2, 0.1, -0.8]]))
    >>> qt.codes().tolist(), qt.dequantize().tolist()
    ([[1, 0, 1, 0]], [[0.5, -0.5, 0.5, -0.5]])
    """
    if bits != 1:
        raise ValueError(f"bits={bits} is not what signs are stored in; pass bits=1")
    return _quantize(weight, signs, SIGN, group_size, scale_dtype)


def absmean(weight):
    """BitNet b1.58's rounding.

    weight: float32, any shape; the last axis shares a scale.
    Returns (V, float32 like weight; beta, float32 with a last axis of 1).

    >>> absmean(torch.tensor([0.9, -0.2, 0.1, -0.8]))
    (tensor([ 1., -0.,  0., -1.]), tensor([0.5000]))
    """
    beta = weight.abs().mean(-1, keepdim=True).clamp(min=EPSILON)
    return (weight * (1 / beta)).round().clamp(-1, 1), beta


def signs(weight):
    """The first BitNet's rounding. Arguments and results as for `absmean`.

    >>> signs(torch.tensor([0.9, -0.2, 0.1, -0.8]))
    (tensor([ 1., -1.,  1., -1.]), tensor([0.5000]))
    """
    above = weight > weight.mean(-1, keepdim=True)
    return torch.where(above, 1.0, -1.0), weight.abs().mean(-1, keepdim=True).clamp(min=EPSILON)


def check_ternary_bits(bits):
    """The format of trits that are stored in so many bits, or a ValueError that says which there are."""
    if bits == 2:
        return Integers(2)
    if bits != TRIT.bits:
        raise ValueError(
            f"bits={bits} is not what trits are stored in; pass 1.6 (five to a byte) or 2 (four to a byte)"
        )
    return TRIT


def _by_largest(weight):
    """As `absmean`, with the largest magnitude for a scale."""
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=EPSILON)
    return (weight * (1 / largest)).round().clamp(-1, 1), largest


def _quantize(weight, rounding, format, group_size, scale_dtype):
    """The QuantizedTensor that a rounding makes of each block."""
    weight = check_weight(weight)
    block = block_shape(weight.shape, group_size, per="tensor" if group_size is None else "row")
    V, beta = rounding(to_blocks(weight, block))
    if (beta > torch.finfo(scale_dtype).max).any():
        raise ValueError(
            f"a scale of {beta.max().item():.3g} does not fit {scale_dtype}; pass scale_dtype=torch.float32"
        )
    codes = from_blocks(format.from_unsigned(format.encode(V)), weight.shape, block)
    return QuantizedTensor.from_codes(codes, beta[..., 0].to(scale_dtype), format, block)
