"""Codebooks: a format that is nothing but a list of values, in rising order; the code of a value is its place in the
list.

Integers and floats space their values by a rule. A codebook may put them anywhere, so it can put them where the
numbers are. The weights of a network are roughly normally distributed, and **NormalFloat** (NF4, from QLoRA) asks for
a list in which every value is used equally often: it takes quantiles of the normal distribution. Two wishes shape the
rest:

- zero must be exact. So the two halves are made apart: 2**(b-1) quantiles above zero, one fewer below it, and zero
  itself.
- the extreme quantiles, 0 and 1, lie at infinity. So the halves begin at a probability a little inside, 1 - (1/(2 *
  2**b) + 1/(2 * (2**b - 1))) / 2, the mean of half a step of 2**b values and half a step of one value fewer.

Scaled so that the largest value is 1, the list covers -1 ... 1, and a block of weights divided by its largest
magnitude uses it.

The nearest value is found by counting how many of the points halfway between neighbours lie below x: that count is the
code. A number exactly halfway goes to the lower value, as in bitsandbytes; numbers beyond an end go to that end.

**The dynamic map** stores numbers whose sizes differ by powers of ten, in 8 bits. After the sign, zeros count down a
decimal exponent, a one ends them, and the bits that are left divide the decade evenly: 64 values from 0.1 to 1, 32 from
0.01 to 0.1 ... 1 from 0.0000001 to 0.000001, each the middle of its part. With both signs these are 254; 0 and 1
complete the list, -1 is not in it. So large numbers have three digits of precision and small ones are not lost. QLoRA
stores the scales of NF4 with it, and 8-bit optimizers their states.

Sources: Dettmers et al., QLoRA (arXiv 2305.14314), section 3 and appendix E; Dettmers, 8-Bit Approximations for
Parallelism in Deep Learning (arXiv 1511.04561). The tables are those of bitsandbytes (NF4, dynamic map) and SINQ (NF3).
"""

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from qlearn.formats.arrays import Table, as_floats, blockwise, to_numpy
from qlearn.formats.base import Format


@dataclass(frozen=True)
class Codebook(Format):
    """A format given by its values: 2 to 256 finite numbers in strictly rising order, kept as float32. Codes are uint8.

    >>> ends_and_middle = Codebook("ternary", (-1, 0, 1))
    >>> ends_and_middle.bits, ends_and_middle.encode([-3.0, -0.5, 0.4, 0.6]).tolist(), ends_and_middle.round(0.6)
    (2, [0, 0, 1, 2], 1.0)
    """

    name: str
    values: tuple

    def __post_init__(self):
        values = np.asarray(self.values, dtype=np.float32)
        if values.ndim != 1 or not 2 <= values.size <= 256:
            raise ValueError(f"codebook {self.name!r} has values of shape {values.shape}: list 2 to 256 numbers")
        if not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
            raise ValueError(f"codebook {self.name!r} must be finite and strictly rising: sort it and drop repeats")
        object.__setattr__(self, "values", tuple(values.tolist()))

    @property
    def bits(self):
        """Bits of one code."""
        return (len(self.values) - 1).bit_length()

    @property
    def count(self):
        """How many codes there are."""
        return len(self.values)

    def encode(self, x):
        """Return the code of the value nearest to each number: uint8 of the shape of x; an int for a Python number.

        x: numbers, infinities too, of any shape and float dtype. A tie goes to the lower value.
        Raises ValueError for NaN.
        """
        array, restore = to_numpy(x)
        array = as_floats(array)
        if np.isnan(array).any():
            raise ValueError(f"NaN has no nearest value in codebook {self.name!r}: replace it first")
        return restore(blockwise(self._count_midpoints_below, array, np.uint8))

    def decode(self, codes):
        """Return the value of each code, float32, same shape. Raises ValueError for codes beyond the list.

        >>> NF4.decode([0, 7, 15]).tolist()
        [-1.0, 0.0, 1.0]
        """
        return self._table.look_up(codes)

    @cached_property
    def _table(self):
        return Table(np.array(self.values, dtype=np.float32))

    @cached_property
    def _midpoints(self):
        exact = self._table.numbers.astype(np.float64)  # half the sum of two float32 is exact in float64
        return (exact[:-1] + exact[1:]) / 2

    def _count_midpoints_below(self, x):
        # For 16 values five times faster than np.searchsorted (6.5 ms against 34 ms for a million), which it equals.
        x = x.astype(np.float64)
        code = np.zeros(x.shape, np.uint8)
        for midpoint in self._midpoints:
            code += x > midpoint
        return code


def normal_float(bits, offset=None):
    """Return the 2**bits values of NormalFloat, derived from quantiles of the normal distribution: float32, -1 ... 1.

    The probabilities are spaced in float32, as they were when the published table was made; in exact arithmetic the
    values differ in the seventh digit.

    bits: 2 to 8; ValueError otherwise.
    offset: the outermost probability; None for the formula above. bitsandbytes has it rounded, to 0.9677083 for NF4.

    >>> normal_float(4, offset=0.9677083)[:3].tolist() == list(NF4.values[:3])
    True
    """
    if bits not in range(2, 9):
        raise ValueError(f"NormalFloat of {bits} bits is not defined: choose bits from 2 to 8")
    count = 2 ** (bits - 1)
    if offset is None:
        offset = 1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(float(p)) for p in _evenly_spaced(offset, 0.5, count + 1)[:-1]]
    below = [-quantile(float(p)) for p in _evenly_spaced(offset, 0.5, count)[:-1]]
    values = np.array(sorted([*below, 0.0, *above]), dtype=np.float32)
    return values / values.max()


def dynamic_map(bits=8):
    """Return the 2**bits values of the signed dynamic map, in rising order: float32, above -1 and up to 1.

    As for `normal_float`, every step is taken in float32, as when the published table is made.
    bits: 2 to 8; ValueError otherwise.

    >>> dynamic_map(3).tolist()                     # one value below 0.1, two above it, both signs, and 0 and 1
    [-0.7749999761581421, -0.32500001788139343, -0.055000003427267075, 0.0, 0.055000003427267075,
    0.32500001788139343, 0.7749999761581421, 1.0]
    """
    if bits not in range(2, 9):
        raise ValueError(f"a dynamic map of {bits} bits is not defined: choose bits from 2 to 8")
    decades = bits - 1
    values = [np.float32([0, 1])]
    for i in range(decades):
        edges = _evenly_spaced(0.1, 1, 2**i + 1)
        middles = np.float32(10.0 ** (i + 1 - decades)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


def _evenly_spaced(start, end, count):
    """What torch.linspace gives in float32: steps from the start in the first half, back from the end in the second.

    Each value is rounded once, after the sum, as processors do that multiply and add in one instruction.
    """
    start, end, index = np.float32(start), np.float32(end), np.arange(count, dtype=np.float64)
    step = np.float64((end - start) / np.float32(count - 1))
    values = np.where(index < count // 2, np.float64(start) + step * index, end - step * (count - 1 - index))
    return values.astype(np.float32)


NF4 = Codebook(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip

NF3 = Codebook(
    "nf3",
    (
        -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
        0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
    ),
)  # fmt: skip

SIGN = Codebook("sign", (-1.0, 1.0))  # one bit: the weights of the first BitNet

DYNAMIC8 = Codebook("dynamic8", tuple(dynamic_map(8).tolist()))

CODEBOOKS = {codebook.name: codebook for codebook in (NF4, NF3, SIGN, DYNAMIC8)}
