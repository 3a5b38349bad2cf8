"""Integers of 1 to 8 bits: their ranges, how signed ones are stored, and how codes are packed so that no bit is wasted.

**Ranges.** b bits tell 2**b values apart. Unsigned they are 0 ... 2**b - 1. Signed they are
-2**(b-1) ... 2**(b-1) - 1, one more below zero than above; a symmetric range leaves the lowest unused, so that every
number has its negative.

**Signs.** Stored codes are unsigned. A signed number is stored as its two's complement, cut to b bits: -1 in four bits
is 0b1111.

**Packing.** Memory comes in bytes, so a 3-bit code must share. All codes together form one stream of bits, written
from the lowest bit of a byte upward: code i occupies the bits i*b ... i*b + b - 1 of the stream, its own lowest bit
first, and bit j of the stream is bit j % 8 of byte j // 8. Two 4-bit codes make a byte, the first in its low half.
With 3 bits some codes lie across two bytes:

    byte 0            byte 1            byte 2                     each digit names the code that the bit belongs to,
    2 2 1 1 1 0 0 0   5 4 4 4 3 3 3 2   7 7 7 6 6 6 5 5            highest bit of each byte on the left

The picture repeats after 8 codes and 3 bytes. So `pack` and `unpack` need no loop over codes, only one over the few
places in the picture: all first codes at once, then all second ones, and so on. One million codes unpack in 0.8 ms
when b divides 8, else in about 3 ms (a compiled Numba loop was measured at 0.6 and 1.3 ms: not enough to keep a second
version).

**Trits**, the numbers -1, 0, 1 of ternary networks, hold log2(3) = 1.58 bits each. Five of them fit into a byte, since
3**5 = 243: the byte is the sum of (trit i + 1) * 3**i, the first trit being the lowest digit. That is 1.6 bits a trit.

A tensor on a GPU is packed and unpacked there, by the same lines with torch's operations in place of NumPy's.
"""

import math
from dataclasses import dataclass

import numpy as np

from qlearn.formats.arrays import as_floats, check_codes, check_stored, is_tensor, native, to_numpy
from qlearn.formats.base import Format

TRITS_PER_BYTE = 5


def integer_range(bits, signed=True, symmetric=False):
    """Return (low, high), the smallest and the largest integer of a grid.

    bits: 1 to 8.  symmetric: leave the lowest signed value unused, so that low = -high.
    Raises ValueError for other bits, and for a symmetric range that is unsigned or of 1 bit, which would hold only 0.

    >>> integer_range(4), integer_range(4, symmetric=True), integer_range(4, signed=False)
    ((-8, 7), (-7, 7), (0, 15))
    """
    _check_bits(bits)
    if symmetric and (not signed or bits == 1):
        kind = "signed" if signed else "unsigned"
        raise ValueError(f"no symmetric range has {bits} {kind} bits: take signed=True and at least 2 bits")
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1


def to_unsigned(numbers, bits):
    """Return the stored codes of signed integers: two's complement in the low bits of a uint8, same shape.

    Raises ValueError when a number is not an integer in integer_range(bits).

    >>> to_unsigned([-8, -1, 0, 7], bits=4).tolist()
    [8, 15, 0, 7]
    """
    numbers, restore = native(numbers)
    return restore(_as_uint8(check_codes(numbers, *integer_range(bits))) & (2**bits - 1))


def from_unsigned(codes, bits):
    """Return the signed integers of stored codes: int8, same shape. Raises ValueError when a code does not fit in bits.

    >>> from_unsigned([8, 15, 0, 7], bits=4).tolist()
    [-8, -1, 0, 7]
    """
    codes, restore = native(codes)
    codes = _as_uint8(check_stored(codes, *integer_range(bits, signed=False)))
    spare = 8 - bits  # lift the sign bit to the top of the byte; shifted back as a signed byte, it fills the spare bits
    return restore(_view_int8(codes << spare) >> spare)


def packed_size(count, bits):
    """Return how many bytes `count` codes of `bits` bits take.

    >>> packed_size(10, bits=3)
    4
    """
    _check_bits(bits)
    return -(-_check_count(count) * bits // 8)


def pack(codes, bits):
    """Pack unsigned codes into a stream of bits.

    codes: integers 0 ... 2**bits - 1 of any shape, read row by row; list, NumPy array or torch tensor (any device).
    Returns 1-D uint8 of packed_size(number of codes, bits) bytes; unused bits of the last byte are 0.
    Raises ValueError for bits other than 1 ... 8 and for a code out of range.

    >>> pack([1, 2, 3], bits=4).tolist()        # 0x21, 0x03
    [33, 3]
    """
    codes, restore = native(codes)
    codes = _as_uint8(check_codes(codes, *integer_range(bits, signed=False))).reshape(-1)
    size = packed_size(len(codes), bits)
    per_picture, picture_bytes = _picture(bits)
    codes = _padded(codes, per_picture)
    packed = _zeros(codes, len(codes), picture_bytes)
    for place, (byte, shift) in enumerate(_places(bits)):
        packed[:, byte] |= codes[:, place] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= codes[:, place] >> (8 - shift)
    return restore(packed.reshape(-1)[:size])


def unpack(packed, bits, count):
    """Return the first `count` codes of a packed stream: 1-D uint8, each 0 ... 2**bits - 1. The inverse of `pack`.

    packed: 1-D uint8, NumPy array or torch tensor (any device); bytes past the last code are ignored.
    Raises ValueError for bits other than 1 ... 8, a negative count, another dtype, or too few bytes.

    >>> unpack(np.array([33, 3], dtype=np.uint8), bits=4, count=3).tolist()
    [1, 2, 3]
    """
    size = packed_size(count, bits)
    packed, restore = native(packed)
    packed = _check_packed(packed, size, f"{count} codes of {bits} bits")
    per_picture, picture_bytes = _picture(bits)
    packed = _padded(packed, picture_bytes)
    codes = _zeros(packed, len(packed), per_picture)
    for place, (byte, shift) in enumerate(_places(bits)):
        field = packed[:, byte] >> shift
        if shift + bits > 8:
            field = field | packed[:, byte + 1] << (8 - shift)
        codes[:, place] = field & (2**bits - 1)
    return restore(codes.reshape(-1)[:count])


def pack_trits(trits):
    """Pack numbers -1, 0, 1 of any shape, five to a byte in base 3, the first as the lowest digit.

    Returns 1-D uint8 of ceil(number of trits / 5) bytes, each at most 242; digits that are left over are 0.
    Raises ValueError for other numbers.

    >>> pack_trits([1, 0, -1, -1, -1, 0]).tolist()        # 2 + 1*3, and 1
    [5, 1]
    """
    trits, restore = native(trits)
    digits = _padded(_as_uint8(check_codes(trits, -1, 1) + 1).reshape(-1), TRITS_PER_BYTE)
    packed = _zeros(digits, len(digits))
    for place in range(TRITS_PER_BYTE):
        packed += digits[:, place] * 3**place
    return restore(packed)


def unpack_trits(packed, count):
    """Return the first `count` trits of packed bytes: 1-D int8 of -1, 0, 1. The inverse of `pack_trits`.

    Raises ValueError for a negative count, another dtype than uint8, too few bytes, or a byte above 242, which no five
    trits make.

    >>> unpack_trits(np.array([5, 1], dtype=np.uint8), count=6).tolist()
    [1, 0, -1, -1, -1, 0]
    """
    size = -(-_check_count(count) // TRITS_PER_BYTE)
    packed, restore = native(packed)
    packed = check_stored(_check_packed(packed, size, f"{count} trits"), 0, 3**TRITS_PER_BYTE - 1)
    digits = _zeros(packed, len(packed), TRITS_PER_BYTE)
    for place in range(TRITS_PER_BYTE):
        digits[:, place] = packed // 3**place % 3
    return restore(_view_int8(digits.reshape(-1)[:count] - 1))


@dataclass(frozen=True)
class Integers(Format):
    """A grid of integers as a format: named "int4" when signed, "uint4" when not; stored as unsigned codes in uint8.

    >>> int4 = Integers(4)
    >>> int4.encode([-20.0, -1.0, 2.5]).tolist(), int4.decode([8, 15, 2]).tolist(), Integers(4, signed=False).name
    ([8, 15, 2], [-8.0, -1.0, 2.0], 'uint4')
    """

    bits: int
    signed: bool = True

    def __post_init__(self):
        _check_bits(self.bits)

    @property
    def name(self):
        return f"int{self.bits}" if self.signed else f"uint{self.bits}"

    def encode(self, x):
        """Return the code of the integer nearest to each number, ties to even: uint8 of the shape of x.

        x: numbers of any shape and dtype; those beyond the range go to its end.
        Raises ValueError for NaN.
        """
        array, restore = to_numpy(x)
        rounded = np.rint(as_floats(array)).clip(*integer_range(self.bits, self.signed))
        if np.isnan(rounded).any():
            raise ValueError(f"NaN cannot be stored as {self.name}: replace it first")
        return restore(_as_uint8(rounded.astype(np.int16) & (2**self.bits - 1)))

    def decode(self, codes):
        """Return the integer of each code: float32 of the same shape. ValueError when a code does not fit in bits."""
        codes, restore = native(codes)
        numbers = self.from_unsigned(codes)
        return restore(numbers.float() if is_tensor(numbers) else numbers.astype(np.float32))

    def to_unsigned(self, codes):
        """Return integers of the range as they are stored, uint8; ValueError when one is out of range."""
        return to_unsigned(codes, self.bits) if self.signed else self._unchanged(codes, check_codes)

    def from_unsigned(self, codes):
        """Return stored codes as integers of the range: int8, or uint8 where the format is unsigned."""
        return from_unsigned(codes, self.bits) if self.signed else self._unchanged(codes, check_stored)

    def _unchanged(self, codes, check):
        codes, restore = native(codes)
        return restore(_as_uint8(check(codes, *integer_range(self.bits, signed=False))))


@dataclass(frozen=True)
class Trits(Format):
    """The numbers -1, 0, 1 as a format, "trit": its codes 0, 1, 2 are packed five to a byte, 1.6 bits each.

    >>> Trits().encode([-7.0, 0.4, 0.6]).tolist(), Trits().decode([0, 1, 2]).tolist(), Trits().packed_size(256)
    ([0, 1, 2], [-1.0, 0.0, 1.0], 52)
    """

    name = "trit"
    bits = 8 / TRITS_PER_BYTE
    count = 3

    def encode(self, x):
        """Return the code of the nearest trit, ties to even: uint8 of the shape of x. Raises ValueError for NaN."""
        array, restore = to_numpy(x)
        rounded = np.rint(as_floats(array)).clip(-1, 1)
        if np.isnan(rounded).any():
            raise ValueError("NaN cannot be stored as a trit: replace it first")
        return restore(_as_uint8(rounded.astype(np.int16) + 1))

    def decode(self, codes):
        """Return the trit of each code: float32 of the same shape. ValueError for a code that is not 0, 1 or 2."""
        codes, restore = native(codes)
        numbers = self.from_unsigned(codes)
        return restore(numbers.float() if is_tensor(numbers) else numbers.astype(np.float32))

    def to_unsigned(self, codes):
        """Return trits as they are stored, uint8 of 0, 1, 2; ValueError for other numbers."""
        codes, restore = native(codes)
        return restore(_as_uint8(check_codes(codes, -1, 1) + 1))

    def from_unsigned(self, codes):
        """Return stored codes as trits: int8."""
        codes, restore = native(codes)
        return restore(_view_int8(_as_uint8(check_stored(codes, 0, 2)) - 1))

    def pack(self, codes):
        """Return codes of any shape as bytes: see `pack_trits`."""
        return pack_trits(self.from_unsigned(codes))

    def unpack(self, packed, count):
        """Return the first `count` codes of packed bytes, uint8: see `unpack_trits`."""
        trits, restore = native(unpack_trits(packed, count))
        return restore(_as_uint8(trits + 1))

    def packed_size(self, count):
        """Return how many bytes `count` codes take: one for every five."""
        return -(-_check_count(count) // TRITS_PER_BYTE)


TRIT = Trits()


# ---- the picture that repeats ----------------------------------------------------------------------------------------


def _picture(bits):
    """Codes and bytes until a code begins with a byte again: 8 codes in 3 bytes at 3 bits, 4 in 3 at 6, 2 in 1 at 4."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def _places(bits):
    """The byte in which each code of the picture begins, and at which of its bits."""
    return [divmod(place * bits, 8) for place in range(_picture(bits)[0])]


# ---- NumPy and torch differ in names only ----------------------------------------------------------------------------


def _zeros(like, *shape):
    return like.new_zeros(shape) if is_tensor(like) else np.zeros(shape, like.dtype)


def _as_uint8(x):
    return x.byte() if is_tensor(x) else np.asarray(x).astype(np.uint8, copy=False)


def _view_int8(x):
    return x.char() if is_tensor(x) else x.view(np.int8)  # torch's cast wraps around as well


def _padded(flat, width):
    """Rows of `width`, the last one filled up with zeros; the same memory where nothing has to be filled."""
    rows = -(-len(flat) // width)
    if len(flat) < rows * width:
        padded = _zeros(flat, rows * width)
        padded[: len(flat)] = flat
        flat = padded
    return flat.reshape(rows, width)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_bits(bits):
    if bits not in range(1, 9):
        raise ValueError(f"integers of {bits} bits are not supported: choose bits from 1 to 8")


def _check_count(count):
    if count < 0:
        raise ValueError(f"count {count} is negative: it is the number of codes that were packed")
    return count


def _check_packed(packed, size, what):
    """Return the first `size` bytes."""
    if str(packed.dtype) not in ("uint8", "torch.uint8") or packed.ndim != 1:
        raise ValueError(f"packed codes are 1-D uint8, not {packed.ndim}-D {packed.dtype}: pass what pack returned")
    if len(packed) < size:
        raise ValueError(f"{what} take {size} bytes, but only {len(packed)} were given: the data is cut short")
    return packed[:size]
