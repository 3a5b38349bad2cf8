"""What the kernels that quantize have in common: numbers come in by the octet, and go out as codes.

**Octets.** A thread takes eight consecutive numbers of a row at a time. In half precision they are 16 bytes, the widest
piece that a thread can load at once; in float32 they are two such pieces. `readers` makes the functions that load them,
for each of the three dtypes. Eight codes of b bits are b bytes, so an octet never shares a byte with another.

**Dividing by a scale.** Rounding to nearest asks for w / s, rounded as IEEE 754 says: a quotient a hair off is on the
wrong side of a tie once in some hundred thousand weights, and then the code is another one than the readable method's.
The compiler's division is exact and takes 10 instructions, one of them on a unit with an eighth of the speed. All
weights of a group are divided by the same scale. With its reciprocal at hand, rounded once, five are enough:

    q = x · (1/s)              the quotient, up to 2 units in the last place
    q = q + (x − q·s) · (1/s)  fma makes x − q·s without an error, so q is now off by less than a unit
    q = q + (x − q·s) · (1/s)  and now it is the number nearest to x / s  (Markstein, IBM J. Res. Dev. 34, 1990)

This holds while neither 1/s nor the remainders leave the range of float32. `divides_exactly` says whether s, between
2**-60 and 2**60, is safe. Then only a quotient below 2**-40 can still be off, and it is rounded to 0 in any case.

**Rounding** to a whole number is an addition. From 2**23 on, the floats are whole numbers, so 1.5 · 2**23 + q is
rounded to one, ties to even, and the low bits of the sum are the number in two's complement. It takes |q| < 2**22.
"""

import numpy as np
import torch

from qlearn.kernels.cuda import device_function, ptx

from numba import float32, uint32  # isort: skip

KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
LARGEST = {kind: torch.finfo(dtype).max for dtype, kind in KINDS.items()}
BITS = (2, 3, 4, 8)  # that codes are packed to
SHIFT = np.float32(1.5 * 2**23)


def size_of(kind):
    """Bytes of a number."""
    return 4 if kind == "float" else 2


def readers(kind):
    """(eight, eight_shared, two_shared): device functions address -> floats, of global and of shared memory."""
    if kind == "float":

        @device_function
        def eight(at):
            a, b, c, d = ptx.load_4(at)
            e, f, g, h = ptx.load_4(at + np.uint64(16))
            return _float(a), _float(b), _float(c), _float(d), _float(e), _float(f), _float(g), _float(h)

        @device_function
        def eight_shared(at):
            a, b, c, d = ptx.load_shared_4(at)
            e, f, g, h = ptx.load_shared_4(at + uint32(16))
            return _float(a), _float(b), _float(c), _float(d), _float(e), _float(f), _float(g), _float(h)

        @device_function
        def two_shared(at):
            a, b = ptx.load_shared_2(at)
            return _float(a), _float(b)

        return eight, eight_shared, two_shared

    pair = ptx.floats_of_h2 if kind == "half" else ptx.floats_of_b2

    @device_function
    def eight(at):
        a, b, c, d = ptx.load_4(at)
        (x0, x1), (x2, x3), (x4, x5), (x6, x7) = pair(a), pair(b), pair(c), pair(d)
        return x0, x1, x2, x3, x4, x5, x6, x7

    @device_function
    def eight_shared(at):
        a, b, c, d = ptx.load_shared_4(at)
        (x0, x1), (x2, x3), (x4, x5), (x6, x7) = pair(a), pair(b), pair(c), pair(d)
        return x0, x1, x2, x3, x4, x5, x6, x7

    @device_function
    def two_shared(at):
        return pair(ptx.load_shared_1(at))

    return eight, eight_shared, two_shared


def octet_storer(kind):
    """A device function (address, eight floats) that stores them as a dtype, 16 bytes at a time."""
    if kind == "float":

        @device_function
        def put(at, x0, x1, x2, x3, x4, x5, x6, x7):
            bits = ptx.bits_of_float
            ptx.store_4(at, bits(x0), bits(x1), bits(x2), bits(x3))
            ptx.store_4(at + np.uint64(16), bits(x4), bits(x5), bits(x6), bits(x7))

        return put
    pair = ptx.h2_of_floats if kind == "half" else ptx.b2_of_floats

    @device_function
    def put(at, x0, x1, x2, x3, x4, x5, x6, x7):
        ptx.store_4(at, pair(x0, x1), pair(x2, x3), pair(x4, x5), pair(x6, x7))

    return put


def storer(kind):
    """A device function (address, float32) that stores a number of a dtype."""
    return {"half": ptx.store_half, "bfloat": ptx.store_bfloat, "float": ptx.store_float}[kind]


_float = ptx.float_of_bits


@device_function
def eight_floats(at):
    """Eight float32 of shared memory."""
    a, b, c, d = ptx.load_shared_4(at)
    e, f, g, h = ptx.load_shared_4(at + uint32(16))
    return _float(a), _float(b), _float(c), _float(d), _float(e), _float(f), _float(g), _float(h)


@device_function
def quotient(x, y, inverse):
    """x / y; inverse: 1 / y, rounded once."""
    minus = -y
    q = ptx.mul(x, inverse)
    q = ptx.fma(ptx.fma(minus, q, x), inverse, q)
    return ptx.fma(ptx.fma(minus, q, x), inverse, q)


@device_function
def divides_exactly(scale):
    """Whether `quotient` by this scale is x / scale, for all that matters."""
    return scale > float32(2.0**-60) and scale < float32(2.0**60)


@device_function
def code_of(x, low, high):
    """The whole number nearest to x, cut off at low and high, as the bits of an int32 whose upper half is to be masked.

    low and high are whole numbers, so it makes no difference that x is cut off first.
    """
    return ptx.bits_of_float(ptx.min_float(ptx.max_float(x, low), high) + float32(SHIFT))


def packer(bits):
    """A device function (eight words with a code in their low bits) -> (low word, high word) of the octet's bits."""
    mask = np.uint32(2**bits - 1)
    if bits == 8:

        @device_function
        def pack(a, b, c, d, e, f, g, h):
            low = ptx.permute_bytes(ptx.permute_bytes(a, b, uint32(0x0040)), ptx.permute_bytes(c, d, uint32(0x0040)),
                                    uint32(0x5410))  # fmt: skip
            high = ptx.permute_bytes(ptx.permute_bytes(e, f, uint32(0x0040)), ptx.permute_bytes(g, h, uint32(0x0040)),
                                     uint32(0x5410))  # fmt: skip
            return low, high

        return pack
    if bits == 4:
        # Codes 0 and 4 lie in the halves of a word, 1 and 5 in the next ...: three shifts bring all to their places.
        halves, both = np.uint32(0x5410), np.uint32(0x000F000F)

        @device_function
        def pack(a, b, c, d, e, f, g, h):
            ae, bf = ptx.permute_bytes(a, e, halves) & both, ptx.permute_bytes(b, f, halves) & both
            cg, dh = ptx.permute_bytes(c, g, halves) & both, ptx.permute_bytes(d, h, halves) & both
            return uint32(ae | bf << uint32(4) | cg << uint32(8) | dh << uint32(12)), uint32(0)

        return pack
    b1, b2, b3, b4, b5, b6, b7 = (np.uint32(bits * k) for k in range(1, 8))

    @device_function
    def pack(a, b, c, d, e, f, g, h):
        low = (a & mask) | (b & mask) << b1 | (c & mask) << b2 | (d & mask) << b3
        return uint32(low | (e & mask) << b4 | (f & mask) << b5 | (g & mask) << b6 | (h & mask) << b7), uint32(0)

    return pack


def four_octets(bits):
    """A device function (address, low and high word of four octets) that stores 32 codes, 4 · bits bytes."""
    if bits == 2:

        @device_function
        def put(at, a, ah, b, bh, c, ch, d, dh):
            ptx.store_1(at, a | b << uint32(16))
            ptx.store_1(at + np.uint64(4), c | d << uint32(16))

    elif bits == 3:

        @device_function
        def put(at, a, ah, b, bh, c, ch, d, dh):
            ptx.store_1(at, a | b << uint32(24))
            ptx.store_1(at + np.uint64(4), b >> uint32(8) | c << uint32(16))
            ptx.store_1(at + np.uint64(8), c >> uint32(16) | d << uint32(8))

    elif bits == 4:

        @device_function
        def put(at, a, ah, b, bh, c, ch, d, dh):
            ptx.store_4(at, a, b, c, d)

    else:

        @device_function
        def put(at, a, ah, b, bh, c, ch, d, dh):
            ptx.store_4(at, a, ah, b, bh)
            ptx.store_4(at + np.uint64(16), c, ch, d, dh)

    return put
