"""Formats: what a stored number is.

A stored number is a **code**, a small unsigned integer, and a format is the agreement on which number each code stands
for. Four bits tell sixteen codes apart, whatever they stand for; where the sixteen numbers lie is the whole difference
between formats:

    uint4      0   1   2   3 ...  15            integers.py     evenly spaced; a scale and a zero point place the ruler
    int4      -8  -7  -6 ...  7                 integers.py     evenly spaced around zero; stored as two's complement
    fp4_e2m1   0  .5   1  1.5  2  3  4  6, +-   floats.py       spaced in proportion to size: sign, exponent, mantissa
    nf4       -1  -.70  -.53 ... 0 ... .72  1   codebooks.py    anywhere: a list, here as dense as a normal distribution
    trit      -1   0   1                        integers.py     three numbers, five of which share a byte
    mx_int8   -2 ... -1/64   0   1/64 ...       fixed_point.py  integers with a binary point

Every format object answers to the same few names:

    format.name       what files call it, such as "int4" or "fp8_e4m3fn"; `get(name)` gives the object back
    format.bits       the bits of one code
    format.encode(x)  the code of the number nearest to each x, unsigned integers
    format.decode(c)  the number of each code, float32
    format.round(x)   decode(encode(x)): the numbers as they come back
    format.pack(c)    codes as bytes, each in its own few bits; unpack and packed_size belong to it

NumPy arrays, torch tensors and Python numbers go in, and the same kind comes out. A format knows nothing of scales:
those belong to the tensor that is stored, `qlearn.tensor.QuantizedTensor`.

Two families are agreements on blocks, codes and scale together, and have functions of their own: `microscaling.py`
(MXFP8, MXFP6, MXFP4, MXINT8 and NVFP4) and the block types of GGUF files, `gguf_blocks/`.
"""

from qlearn.formats import codebooks, floats, integers, microscaling
from qlearn.formats.codebooks import CODEBOOKS
from qlearn.formats.fixed_point import MX_INT8
from qlearn.formats.integers import TRIT, Integers

_INTEGERS = [Integers(bits, signed) for signed in (True, False) for bits in range(1, 9)]

FORMATS = {**{format.name: format for format in _INTEGERS}, **floats.FORMATS, **CODEBOOKS}
FORMATS |= {format.name: format for format in (TRIT, MX_INT8)}

__all__ = ["FORMATS", "Integers", "codebooks", "floats", "get", "integers", "microscaling"]


def get(name):
    """Return the format of that name. Raises ValueError, listing the known ones, when there is none.

    >>> get("int4"), get("nf4").bits, get("fp8_e4m3fn").max
    (Integers(bits=4, signed=True), 4, 448.0)
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown: choose from {', '.join(FORMATS)}")
    return FORMATS[name]
