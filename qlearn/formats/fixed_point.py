"""Fixed point: integers with a binary point.

A signed integer of b bits times 2**-m has m bits behind the point. Its numbers are evenly spaced, as those of the
integer are, and it is the integer as far as bits go: two's complement, in b bits.

MX_INT8 is the element of MXINT8 (`microscaling.py`), 8 bits with 6 of them behind the point: from -2 to 127/64, in
steps of 1/64.

Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qlearn.formats.arrays import as_floats, to_numpy
from qlearn.formats.base import Format
from qlearn.formats.integers import Integers


@dataclass(frozen=True)
class FixedPoint(Format):
    """The number of a code is its two's complement times 2**-mantissa_bits. Codes are uint8.

    >>> MX_INT8.encode([1.0, -0.5, 1.99, -3.0]).tolist(), MX_INT8.decode([64, 127, 129]).tolist()
    ([64, 224, 127, 128], [1.0, 1.984375, -1.984375])
    """

    name: str
    bits: int
    mantissa_bits: int

    @property
    def max(self):
        """The largest number, a Python float."""
        return (2 ** (self.bits - 1) - 1) / 2**self.mantissa_bits

    def encode(self, x):
        """Return the code of the nearest number, uint8; ties to even, beyond the ends the end. ValueError for NaN."""
        array, restore = to_numpy(x)
        with np.errstate(over="ignore"):
            return restore(self._integers.encode(np.ldexp(as_floats(array), self.mantissa_bits)))

    def decode(self, codes):
        """Return the number of each code, float32, same shape. Raises ValueError for a code that does not fit."""
        return self._integers.decode(codes) / 2**self.mantissa_bits

    def to_unsigned(self, codes):
        """Return signed integers as they are stored, uint8."""
        return self._integers.to_unsigned(codes)

    def from_unsigned(self, codes):
        """Return stored codes as signed integers, int8."""
        return self._integers.from_unsigned(codes)

    @cached_property
    def _integers(self):
        return Integers(self.bits)


MX_INT8 = FixedPoint("mx_int8", 8, 6)
