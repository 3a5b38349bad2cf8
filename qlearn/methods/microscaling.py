"""Weights in the microscaling formats: four to eight bits with a small scale for each 32 or 16 of a row.

What the formats are, and how scales and elements are found, is said in `formats/microscaling.py`; here a matrix is put
into them and stored true to size. Nothing is learned, and there is no group size to choose: the block belongs to the
format, because hardware and files are made for it.

    method   bits  elements           scales                                        bits per weight
    mxfp4    4     E2M1               32 weights: a byte of E8M0, a power of two    4.25
    mxfp6    6     E2M3, or E3M2      32 weights: likewise                          6.25
    mxfp8    8     E4M3, or E5M2      32 weights: likewise                          8.25
    mxint8   8     fixed point        32 weights: likewise                          8.25
    nvfp4    4     E2M1               16 weights: a byte of E4M3; the matrix: 32    4.5 + 32 / weights

Where there are two kinds of elements, the default is the one with more mantissa and less range: the scale has moved the
block to its place already, and the weights within it rarely lie so far apart that range is what they lack.

The scales of the MX formats are a tensor of torch.float8_e8m0fnu, the dtype that files of such models have; those of
NVFP4 are QuantizedScales, E4M3 codes with the tensor scale for their only step.
"""

import torch

from qlearn.formats import microscaling
from qlearn.methods.blocking import check_weight
from qlearn.scales import QuantizedScales
from qlearn.tensor import QuantizedTensor

MXFP6 = {"e2m3": microscaling.MXFP6_E2M3, "e3m2": microscaling.MXFP6_E3M2}
MXFP8 = {"e4m3": microscaling.MXFP8_E4M3, "e5m2": microscaling.MXFP8_E5M2}


def mxfp4(weight, bits=4, group_size=None, *, scale_rule="floor", ties="even"):
    """Quantize a matrix to MXFP4.

    weight: (rows, columns), floating point, the columns a multiple of 32.  bits: 4.  group_size: 32, or None.
    scale_rule: "floor", "ceil", "even", "rceil", "ggml" or "mse".  ties: "even", "away", "down" or "ggml".
    Returns a QuantizedTensor of E2M1 codes with scales of torch.float8_e8m0fnu.
    Raises ValueError for a weight that is not a finite matrix, for columns that do not divide into blocks, for other
    bits or group sizes, and for unknown rules.

    >>> qt = mxfp4(torch.tensor([[6.5, 5.0, -3.1, 0.75] + [0.3] * 28]))
    >>> qt.dequantize()[0, :5].tolist(), qt.scales.float().tolist(), qt.bits_per_weight
    ([6.0, 4.0, -3.0, 1.0, 0.5], [[1.0]], 4.25)
    """
    return _mx(weight, microscaling.MXFP4, "mxfp4", bits, group_size, scale_rule, ties)


def mxfp6(weight, bits=6, group_size=None, *, element="e2m3", scale_rule="floor", ties="even"):
    """Quantize a matrix to MXFP6.

    element: "e2m3" (3 bits of mantissa, 7.5 the largest), or "e3m2" (2 bits, 28).
    bits: 6. All else as for `mxfp4`; ValueError for another element, too.

    >>> weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    >>> [round((mxfp6(weight, element=e).dequantize() - weight).square().mean().item(), 5) for e in MXFP6]
    [0.00082, 0.00296]
    """
    return _mx(weight, _choose(MXFP6, element, "mxfp6"), "mxfp6", bits, group_size, scale_rule, ties)


def mxfp8(weight, bits=8, group_size=None, *, element="e4m3", scale_rule="floor", ties="even"):
    """Quantize a matrix to MXFP8.

    element: "e4m3" (3 bits of mantissa, 448 the largest), or "e5m2" (2 bits, 57344).
    bits: 8. All else as for `mxfp4`; ValueError for another element, too.

    >>> mxfp8(torch.ones(2, 32), element="e5m2")
    QuantizedTensor(fp8_e5m2, shape=(2, 32), block=(1, 32))
    """
    return _mx(weight, _choose(MXFP8, element, "mxfp8"), "mxfp8", bits, group_size, scale_rule, ties)


def mxint8(weight, bits=8, group_size=None, *, scale_rule="floor", ties="even"):
    """Quantize a matrix to MXINT8: numbers -127/64 ... 127/64, times a power of two for each 32.

    bits: 8. All else as for `mxfp4`.

    >>> qt = mxint8(torch.tensor([[1.0, -0.5, 1.99, 0.01] * 8]))
    >>> qt.codes()[0, :4].tolist(), qt.scales.float().tolist()
    ([64, -32, 127, 1], [[1.0]])
    """
    return _mx(weight, microscaling.MXINT8, "mxint8", bits, group_size, scale_rule, ties)


def nvfp4(weight, bits=4, group_size=None, *, scale_rule="nearest", ties="even", tensor_scale=None):
    """Quantize a matrix to NVFP4.

    weight: (rows, columns), floating point, the columns a multiple of 16.  bits: 4.  group_size: 16, or None.
    scale_rule: "nearest" or "mse".  ties: as for `mxfp4`.
    tensor_scale: None for the largest magnitude / (448 * 6); or a positive number, for matrices that are to share one.
    Returns a QuantizedTensor of E2M1 codes with QuantizedScales.  Raises ValueError as `mxfp4` does.

    >>> qt = nvfp4(torch.full((32, 64), 0.75))
    >>> qt.scales.codes()[0].tolist(), qt.scales.steps.item(), qt.bits_per_weight == 4.5 + 32 / (32 * 64)
    ([126, 126, 126, 126], 0.00027901786961592734, True)
    """
    weight, block = _check(weight, microscaling.NVFP4, "nvfp4", bits, group_size)
    codes, scales, step = microscaling.NVFP4.quantize(weight, scale_rule, ties, tensor_scale)
    scales = QuantizedScales.from_codes(scales, microscaling.NVFP4.scale, step.view(1, 1))
    return QuantizedTensor.from_codes(codes, scales, microscaling.NVFP4.element, block)


def _mx(weight, format, method, bits, group_size, scale_rule, ties):
    weight, block = _check(weight, format, method, bits, group_size)
    codes, scales = format.quantize(weight, scale_rule, ties)
    codes = format.element.from_unsigned(codes)
    return QuantizedTensor.from_codes(codes, scales.view(torch.float8_e8m0fnu), format.element, block)


def _choose(formats, element, method):
    if element not in formats:
        raise ValueError(f"element={element!r} is unknown for {method}; choose from {', '.join(formats)}")
    return formats[element]


def _check(weight, format, method, bits, group_size):
    """(weight as float32, the shape of a block), or a ValueError that says what does not fit."""
    size = format.block_size
    if bits != format.element.bits:
        raise ValueError(f"bits={bits} is not what {method} stores; pass bits={format.element.bits}")
    if group_size not in (None, size):
        raise ValueError(f"group_size={group_size} is not the block of {method}; pass group_size={size}, or None")
    weight = check_weight(weight)
    if weight.shape[1] % size:
        raise ValueError(
            f"the blocks of {size} weights of {method} do not divide {weight.shape[1]} columns; leave this matrix out, "
            "or choose a method whose groups do"
        )
    return weight, (1, size)
