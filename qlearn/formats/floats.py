"""Floating-point formats, from FP32 down to four bits, by one description.

A floating-point number is a sign, an exponent and a mantissa, three fields of bits side by side, the sign on top:

    (-1)**sign * 2**(exponent - bias) * (1 + mantissa / 2**mantissa_bits)       exponent > 0: a normal number
    (-1)**sign * 2**(1 - bias)        * (0 + mantissa / 2**mantissa_bits)       exponent = 0: zero, or a subnormal one

Each power of two, a binade, is cut into 2**mantissa_bits equal steps; the step doubles from one binade to the next, so
the relative precision stays the same. Below the smallest normal number the step stops shrinking and the subnormals go
down to zero evenly.

Only three things differ between FP32 and FP4: how many bits each field has, the bias, and what the topmost codes mean
(`specials`):

    "ieee"   the top exponent is no number's: mantissa 0 is infinity, any other NaN      FP32 FP16 BF16 FP8_E5M2
    "nan"    only all ones is NaN, nothing is infinity: one more binade for numbers      FP8_E4M3FN E8M0
    "none"   every code is a finite number                                               FP6_E3M2 FP6_E2M3 FP4_E2M1

E8M0, the scale of the MX formats, has neither sign nor mantissa, nor a zero: exponent field 0 is one more power of
two, 2**-127.

**Encoding** rests on one fact: codes of positive numbers, read as integers, are in the order of the numbers. So a code
is a count of steps. Divide by the step of the binade (a power of two, hence exact), round to an integer, and add the
steps in all binades below. A mantissa that rounds up beyond its field carries into the exponent by itself, and from
the largest number into infinity.

Three ways to round: to the "nearest", a tie to the even code; toward "zero"; or "stochastic", up with probability
equal to the fraction of the step, so that the mean of many roundings is the number itself. Inputs are rounded once,
float64 included (ml_dtypes goes through float32, so the two part ways on a float64 within a hair of a tie).

What does not fit follows ml_dtypes, to the bit:

- Beyond the largest number: infinity, else NaN, else the largest number, whichever the format has.
  `overflow="saturate"` gives the largest number always, for infinities too. As IEEE 754 has it, a finite number that
  is rounded toward zero never overflows.
- NaN becomes the format's quiet NaN with its sign kept (payloads are lost). Where there is none (specials "none") it
  becomes zero, with the sign flipped: -0 for NaN. Look for NaN first if you care.
- E8M0: zero, -0 and all negative numbers become NaN; a positive number below 2**-127 becomes 2**-127; halfway between
  two powers of two is rounded up, and so is, to nearest, all between 2**-127 and 2**-126 (as if code 0 were zero).

Sources: IEEE 754-2019; OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0; ml_dtypes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from qlearn.formats.arrays import Table, as_floats, blockwise, check_codes, to_numpy
from qlearn.formats.base import Format

SPECIALS = ("ieee", "nan", "none")

# Each takes x / step, at least 0, and a source of random numbers in [0, 1), and returns a whole number of steps. All
# are exact: x / step is a float64, and so is its fraction.
ROUNDING = {
    "nearest": lambda steps, random: np.rint(steps),
    "zero": lambda steps, random: np.trunc(steps),
    "stochastic": lambda steps, random: np.floor(steps) + (random(steps.shape) < steps - np.floor(steps)),
}


class Fields(NamedTuple):
    """What the bits of a number say; every entry is a scalar, or an array for an array."""

    sign: int  # the three fields as they are stored
    exponent: int
    mantissa: int
    kind: str  # "zero", "subnormal", "normal", "inf" or "nan"
    power: int  # the number is (-1)**sign * 2**power * significand, unless kind says inf or nan
    significand: float
    value: float


@dataclass(frozen=True)
class FloatFormat(Format):
    """A floating-point format of at most 32 bits; see the top of this file for what the six entries mean.

    Codes are unsigned integers in the low `bits` bits of a uint8, uint16 or uint32.

    >>> FP8_E4M3FN.encode(0.3), FP8_E4M3FN.decode(42), FP8_E4M3FN.round([0.3, -1000.0])
    (42, 0.3125, array([0.3125,    nan], dtype=float32))
    """

    name: str
    sign_bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str

    def __post_init__(self):
        if self.specials not in SPECIALS:
            raise ValueError(f"specials {self.specials!r} of format {self.name!r} is unknown: choose from {SPECIALS}")
        if self.sign_bits not in (0, 1) or self.exponent_bits < 1 or not 0 <= self.mantissa_bits <= 23:
            layout = (self.sign_bits, self.exponent_bits, self.mantissa_bits)
            raise ValueError(f"format {self.name!r} has the layout {layout}: at most (1, 8, 23) bits are possible")
        if self.specials == "ieee" and self.mantissa_bits == 0:
            raise ValueError(f"format {self.name!r} needs a mantissa bit to tell infinity from NaN: use specials 'nan'")
        if self._lowest_power - self.mantissa_bits < -149 or (self._max_code >> self.mantissa_bits) - self.bias > 127:
            raise ValueError(f"format {self.name!r} reaches beyond FP32: choose another bias or fewer exponent bits")

    # ---- what the format can hold ------------------------------------------------------------------------------------

    @property
    def bits(self):
        """Bits of one number."""
        return self.sign_bits + self.exponent_bits + self.mantissa_bits

    @property
    def has_inf(self):
        return self.specials == "ieee"

    @property
    def has_nan(self):
        return self.specials != "none"

    @property
    def has_zero(self):
        """False only for a format with neither sign nor mantissa, which stores nothing but powers of two."""
        return self.sign_bits + self.mantissa_bits > 0

    @cached_property
    def max(self):
        """The largest finite number, a Python float."""
        return self.decode(self._max_code)

    @property
    def smallest_normal(self):
        """The smallest positive number of full precision, a Python float."""
        return 2.0**self._lowest_power

    @property
    def smallest_subnormal(self):
        """The smallest positive number, a Python float (the smallest normal number where there are no subnormals)."""
        return self.smallest_normal / 2**self.mantissa_bits

    @property
    def codes(self):
        """All codes, 0 ... 2**bits - 1, as an array. Raises ValueError for formats of more than 16 bits."""
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2**{self.bits} codes, too many for one array: choose a range yourself")
        return np.arange(2**self.bits, dtype=self._code_dtype)

    # ---- numbers to codes and back -----------------------------------------------------------------------------------

    def encode(self, x, mode="nearest", overflow=None, seed=None):
        """Return the code of each number: uint8, uint16 or uint32 of the shape of x; an int for a Python number.

        x: numbers of any shape and real dtype: scalar, list, NumPy array or torch tensor (by way of the CPU).
        mode: "nearest" (ties to even), "zero" or "stochastic".
        overflow: None, to infinity, else NaN, else the largest number, whichever the format has first; "saturate", to
            the largest number in any format.
        seed: for "stochastic", an int or a numpy Generator; None draws afresh each time.
        Raises ValueError for an unknown mode or overflow, or values that are not real numbers.

        >>> FP4_E2M1.encode([0.0, -0.0, 0.25, 5.0, -100.0]).tolist()
        [0, 8, 0, 6, 15]
        """
        if mode not in ROUNDING:
            raise ValueError(f"rounding mode {mode!r} is unknown: choose from {', '.join(ROUNDING)}")
        if overflow not in (None, "saturate"):
            raise ValueError(f"overflow {overflow!r} is unknown: choose None (as the format has it) or 'saturate'")
        random = np.random.default_rng(seed).random if mode == "stochastic" else None
        array, restore = to_numpy(x)
        return restore(blockwise(lambda b: self._encode(b, mode, overflow, random), as_floats(array), self._code_dtype))

    def decode(self, codes):
        """Return the number of each code: float32 of the same shape, which holds every number of every format exactly.

        Raises ValueError for codes that are not integers in 0 ... 2**bits - 1.

        >>> FP8_E5M2.decode(np.array([0, 1, 0x3C, 0x7C, 0xFC], dtype=np.uint8)).tolist()
        [0.0, 1.52587890625e-05, 1.0, inf, -inf]
        """
        if self.bits > 16:
            codes, restore = self._checked(codes)
            return restore(blockwise(self._value, codes, np.float32))
        return self._table.look_up(codes)

    def round(self, x, mode="nearest", overflow=None, seed=None):
        """Return the number of the format that x becomes, as float32: decode(encode(x, ...))."""
        return self.decode(self.encode(x, mode, overflow, seed))

    def fields(self, x):
        """Take numbers apart. Returns a `Fields`, of scalars for a scalar, else of NumPy arrays.

        x: integers are taken as codes, floats as values, which are rounded to the format first.

        >>> BF16.fields(-1.5)
        Fields(sign=1, exponent=127, mantissa=64, kind='normal', power=0, significand=1.5, value=-1.5)
        >>> BF16.fields(1).kind
        'subnormal'
        """
        array, restore = to_numpy(x)
        codes = self._checked(array if array.dtype.kind in "iu" else self.encode(array))[0]
        sign, exponent, mantissa = self._split(codes)
        power, significand = self._power_and_significand(exponent, mantissa)
        magnitude = self._magnitude(codes)
        kind = np.where(significand == 0, "zero", np.where(significand < 1, "subnormal", "normal"))
        kind = np.where(magnitude > self._max_code, "nan", kind)
        if self.has_inf:
            kind = np.where(magnitude == self._max_code + 1, "inf", kind)
        parts = (sign, exponent, mantissa, kind, power, significand, self._value(codes))
        return Fields(*(restore(part) if np.isscalar(x) else part for part in parts))

    # ---- neighbours --------------------------------------------------------------------------------------------------

    def next_up(self, codes):
        """Return the codes of the next larger numbers; the largest one (infinity where there is one) and NaN stay.

        Around zero as IEEE 754's nextUp: either zero is followed by the smallest positive number, and -0 follows the
        largest negative one.

        >>> FP4_E2M1.next_up(np.array([0b0000, 0b0110, 0b0111, 0b1001, 0b1000])).tolist()
        [1, 7, 7, 8, 1]
        """
        return self._next(codes, upward=True)

    def next_down(self, codes):
        """Return the codes of the next smaller numbers: the mirror image of `next_up`."""
        return self._next(codes, upward=False)

    def ulp(self, x):
        """Return the unit in the last place: the step between numbers in the binade of x. float32 of the shape of x.

        Zero and the subnormals have the step of the smallest binade, numbers beyond the largest that of the top one;
        infinities and NaN have none, which is NaN.

        >>> FP16.ulp(1.0), BF16.ulp(1.0), FP4_E2M1.ulp(5.0)
        (0.0009765625, 0.0078125, 2.0)
        """
        array, restore = to_numpy(x)
        x = np.abs(as_floats(array))
        step = np.ldexp(1.0, self._power(x) - self.mantissa_bits)
        return restore(np.where(np.isfinite(x), step, np.nan).astype(np.float32))

    # ---- the landmarks among the codes -------------------------------------------------------------------------------

    @property
    def _code_dtype(self):
        return np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32

    @property
    def _lowest_power(self):
        return 1 - self.bias if self.has_zero else -self.bias

    @property
    def _max_code(self):
        if self.specials == "ieee":
            return ((2**self.exponent_bits - 1) << self.mantissa_bits) - 1
        return 2 ** (self.exponent_bits + self.mantissa_bits) - (2 if self.specials == "nan" else 1)

    @property
    def _nan_code(self):
        """The quiet NaN: the top bit of the mantissa set, or all ones; zero where there is no NaN."""
        quiet = 1 << (self.mantissa_bits - 1) if self.has_inf else 0
        return self._max_code + 1 + quiet if self.has_nan else 0

    # ---- the arithmetic, on NumPy arrays -----------------------------------------------------------------------------

    @np.errstate(invalid="ignore")  # as in as_floats
    def _encode(self, x, mode, overflow, random):
        magnitude = np.fmin(np.abs(x.astype(np.float64)), 2 * self.max)  # NaN too: all of these overflow
        power = self._power(magnitude)
        steps = ROUNDING[mode](np.ldexp(magnitude, self.mantissa_bits - power), random)
        code = steps.astype(np.int64) + ((power - self._lowest_power).astype(np.int64) << self.mantissa_bits)
        if not self.has_zero:  # code 0 is the first power of two, where other formats have their zero
            code = np.maximum(code - 1, magnitude > self.smallest_normal if mode == "nearest" else 0)
        saturates = overflow == "saturate" or not self.has_nan or (mode == "zero" and np.isfinite(x))
        code = np.minimum(code, self._max_code + np.where(saturates, 0, 1))  # next to the largest: infinity, else NaN
        return self._with_sign_and_nan(code, x)

    def _with_sign_and_nan(self, code, x):
        nan = np.isnan(x)
        negative = np.signbit(x)
        if not self.sign_bits:
            nan |= x < 0
        if not self.has_zero:
            nan |= x == 0
        if not self.has_nan:
            negative ^= nan
        code = np.where(nan, self._nan_code, code)
        return code | (negative.astype(np.int64) << (self.bits - 1)) if self.sign_bits else code

    def _power(self, magnitude):
        """floor(log2(magnitude)), but no lower than the subnormals' binade and no higher than the top one."""
        in_range = np.fmax(np.fmin(magnitude, self.max), self.smallest_normal)
        return np.frexp(in_range)[1] - 1  # frexp puts the significand into [0.5, 1)

    def _checked(self, codes):
        array, restore = to_numpy(codes)
        return check_codes(array, 0, 2**self.bits - 1), restore

    def _magnitude(self, codes):
        return codes.astype(np.int64) & (2 ** (self.exponent_bits + self.mantissa_bits) - 1)

    def _split(self, codes):
        magnitude = self._magnitude(codes)
        sign = codes.astype(np.int64) >> (self.exponent_bits + self.mantissa_bits)
        return sign, magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)

    def _power_and_significand(self, exponent, mantissa):
        normal = (exponent > 0) | (not self.has_zero)
        return np.where(normal, exponent - self.bias, 1 - self.bias), normal + mantissa / 2**self.mantissa_bits

    def _value(self, codes):
        sign, exponent, mantissa = self._split(codes)
        power, significand = self._power_and_significand(exponent, mantissa)
        value = np.ldexp(significand, power)
        magnitude = self._magnitude(codes)
        value = np.where(magnitude > self._max_code, np.nan, value)
        if self.has_inf:
            value = np.where(magnitude == self._max_code + 1, np.inf, value)
        return np.where(sign == 1, -value, value).astype(np.float32)

    @cached_property
    def _table(self):
        return Table(self._value(self.codes))

    def _next(self, codes, upward):
        codes, restore = self._checked(codes)
        sign, magnitude = self._split(codes)[0], self._magnitude(codes)
        outward = (sign == 0) == upward
        crosses = ~outward & (magnitude == 0)  # both zeros are the same number, so the step goes past the other one
        if self.sign_bits:
            sign, outward = sign ^ crosses, outward | crosses
        top = self._max_code + self.has_inf
        moved = np.where(outward, np.minimum(magnitude + 1, top), np.maximum(magnitude - 1, 0))
        moved |= sign << (self.exponent_bits + self.mantissa_bits)
        return restore(np.where(magnitude > top, codes, moved).astype(self._code_dtype))


FP32 = FloatFormat("fp32", 1, 8, 23, 127, "ieee")
FP16 = FloatFormat("fp16", 1, 5, 10, 15, "ieee")
BF16 = FloatFormat("bf16", 1, 8, 7, 127, "ieee")
FP8_E4M3FN = FloatFormat("fp8_e4m3fn", 1, 4, 3, 7, "nan")
FP8_E5M2 = FloatFormat("fp8_e5m2", 1, 5, 2, 15, "ieee")
FP6_E3M2 = FloatFormat("fp6_e3m2", 1, 3, 2, 3, "none")
FP6_E2M3 = FloatFormat("fp6_e2m3", 1, 2, 3, 1, "none")
FP4_E2M1 = FloatFormat("fp4_e2m1", 1, 2, 1, 1, "none")
E8M0 = FloatFormat("e8m0", 0, 8, 0, 127, "nan")

FORMATS = {f.name: f for f in (FP32, FP16, BF16, FP8_E4M3FN, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1, E8M0)}
