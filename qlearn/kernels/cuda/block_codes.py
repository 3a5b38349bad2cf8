"""The block types that `block_products.py` multiplies with: how a lane gets numbers out of their bytes.

**Codes become float16 without arithmetic.** The smallest float16 above zero is 2**-24, and its whole multiples up to
1023 are the numbers whose exponent bits are 0. So a code in the lowest bits of 16, all others cleared, *is* the number
code · 2**-24. A mask is all it takes for two codes; the multiplication is exact; and 2**24 goes into the scale. A code
four bits further up is code · 2**-20, just as well. One word of 8 codes costs 5 instructions:

    w & 0x000F000F     (w >> 8) & 0x000F000F     w & 0x00F000F0     (w >> 8) & 0x00F000F0

Signed codes of 8 bits are made positive by flipping the highest bit, which adds 128. The bits of E2M1, sign, two of
exponent, one of mantissa, become a float16 if they are moved to its sign and to where its exponent ends; what differs
is the bias, 2**14.

**Words.** A block of 18 bytes begins at an even address, not at a multiple of four. But two of them are nine words:

    word    0        1     2     3     4         5     6     7     8          d, d': the scales
    bytes   d  0 1   2-5   6-9   10-13 14 15 d'  0-3   4-7   8-11  12-15

and the first block's codes are put together from two words each by one instruction. Lane t of four takes word t. The
other lanes of the warp are at other rows, an odd multiple of 16 bytes further on, so that all meet different banks.

**The same for every type:** a lane owns in each block of 32 columns the codes that `half_columns.py` has the inputs
for, four words of two numbers; and a block is  step · code − offset,  for its first 16 columns and for the others.

Source of the layouts: `formats/gguf_blocks`, `formats/microscaling.py`.
"""

from typing import NamedTuple

import numpy as np

from qlearn.kernels.cuda import device_function, ptx

from numba import float32, int32, uint32  # isort: skip - after qlearn.kernels.cuda has chosen

LOW, HIGH = 0x000F000F, 0x00F000F0
TO_24, TO_20, TO_14 = 2.0**24, 2.0**20, 2.0**14


class Blocks(NamedTuple):
    """What a warp has to know of a block type.

    pieces, align: as in Recipe, for 256 columns.  offset: whether there is one.
    codes: maker, for each pair of blocks of 32, of a device function (at, t4) -> 8 words, what lane t = t4 / 4 owns.
    steps: device function (at, beside, j) -> step, offset of the first 16 columns of block j; step, offset of the
    others.
    order: of the inputs.
    """

    pieces: tuple
    align: int
    offset: bool
    codes: object
    steps: object
    order: str = "stacked"


# --- what lanes take out of the bytes ---


def word_at(offset):
    """A device function: the four bytes at an address, a multiple of 4, plus an offset, which may be none."""
    by, whole = offset % 4, np.uint32(offset - offset % 4)
    selector = np.uint32(0x3210 + 0x1111 * by)
    if by == 0:

        @device_function
        def word(at):
            return ptx.load_shared_1(uint32(at + whole))

    else:

        @device_function
        def word(at):
            low, high = ptx.load_shared_1(uint32(at + whole)), ptx.load_shared_1(uint32(at + whole + uint32(4)))
            return ptx.permute_bytes(low, high, selector)

    return word


@device_function
def nibbles(w):
    """Eight codes of four bits, in the order of stacked blocks: times 2**-24, times 2**-20."""
    v = uint32(w >> uint32(8))
    return w & uint32(LOW), v & uint32(LOW), w & uint32(HIGH), v & uint32(HIGH)


@device_function
def signed_bytes(w):
    """Four codes of eight bits, plus 128, times 2**-24."""
    even, flip = uint32(0x00FF00FF), uint32(0x00800080)
    return uint32((w & even) ^ flip), uint32((uint32(w >> uint32(8)) & even) ^ flip)


@device_function
def six_bits(q, h):
    """Four codes, times 2**-24: the low halves of the bytes of q, and above them bits 4 and 5 of the bytes of h."""
    v = uint32(ptx.and_or(h, uint32(0x30303030), q & uint32(0x0F0F0F0F)))
    return v & uint32(0x00FF00FF), uint32(v >> uint32(8)) & uint32(0x00FF00FF)


@device_function
def e2m1(w):
    """Eight E2M1, times 2**-14, in the order of stacked blocks."""
    sign, rest = uint32(0x80008000), uint32(0x0E000E00)
    return (
        ptx.and_or(uint32(w << uint32(12)), sign, uint32(w << uint32(9)) & rest),
        ptx.and_or(uint32(w << uint32(4)), sign, uint32(w << uint32(1)) & rest),
        ptx.and_or(uint32(w << uint32(8)), sign, uint32(w << uint32(5)) & rest),
        ptx.and_or(w, sign, uint32(w >> uint32(3)) & rest),
    )


@device_function
def power_of_two(e):
    """2**(e - 127)."""
    bits = uint32(e << uint32(23))
    if e == uint32(0):
        bits = uint32(0x00400000)
    return ptx.float_of_bits(bits)


# --- block types ---


def _q4_0_codes(pair):
    first, second = word_at(pair * 36 + 2), word_at(pair * 36 + 20)

    @device_function
    def codes(at, t4):
        at = uint32(at + t4)
        return nibbles(first(at)) + nibbles(second(at))

    return codes


@device_function
def _q4_0_steps(at, beside, j):
    d = ptx.load_shared_half(uint32(at + j * uint32(18)))
    offset = d * float32(8)
    return d * float32(TO_24), offset, d * float32(TO_20), offset


def _q8_0_codes(pair):
    first, second, third, fourth = (word_at(pair * 68 + offset) for offset in (2, 18, 36, 52))

    @device_function
    def codes(at, t4):
        at = uint32(at + t4)
        return signed_bytes(first(at)) + signed_bytes(second(at)) + signed_bytes(third(at)) + signed_bytes(fourth(at))

    return codes


@device_function
def _q8_0_steps(at, beside, j):
    d = ptx.load_shared_half(uint32(at + j * uint32(34)))
    step, offset = d * float32(TO_24), d * float32(128)
    return step, offset, step, offset


def _q4_k_codes(pair):
    first, second = word_at(pair * 32 + 16), word_at(pair * 32 + 32)

    @device_function
    def codes(at, t4):
        at = uint32(at + t4)
        a0, a1, a2, a3 = nibbles(first(at))
        b0, b1, b2, b3 = nibbles(second(at))
        return a0, a1, b0, b1, a2, a3, b2, b3

    return codes


@device_function
def _q4_k_steps(at, beside, j):
    head = ptx.load_shared_4(at)
    d, dmin = ptx.floats_of_h2(head[0])
    by = uint32(uint32(j & uint32(3)) * uint32(8))
    first, second, third = uint32(head[1] >> by), uint32(head[2] >> by), uint32(head[3] >> by)
    scale, least = uint32(first & uint32(63)), uint32(second & uint32(63))
    if j >= uint32(4):
        scale = uint32(uint32(third & uint32(15)) | uint32(uint32(first >> uint32(2)) & uint32(48)))
        least = uint32(
            uint32(uint32(third >> uint32(4)) & uint32(15)) | uint32(uint32(second >> uint32(2)) & uint32(48))
        )
    unit = float32(TO_24)
    if uint32(j & uint32(1)) == uint32(1):
        unit = float32(TO_20)
    step, offset = d * float32(int32(scale)) * unit, dmin * float32(int32(least))
    return step, offset, step, offset


def _q6_k_codes(pair):
    half, down, up = np.uint32(pair // 2 * 64), np.uint32(pair % 2 * 4), np.uint32(4 - pair % 2 * 4)
    high_at = np.uint32(128 + pair // 2 * 32)

    @device_function
    def codes(at, t4):
        skip = uint32(at & uint32(2))  # every other super-block of 210 bytes begins between two words
        selector = uint32(uint32(0x3210) + uint32(0x1111) * skip)
        at = uint32(at - skip + t4)
        low, high = uint32(at + half), uint32(at + high_at)
        a, b = even_word(low, selector) >> down, even_word(uint32(low + uint32(16)), selector) >> down
        c, d = (
            even_word(uint32(low + uint32(32)), selector) >> down,
            even_word(uint32(low + uint32(48)), selector) >> down,
        )
        e, f = even_word(high, selector) << up, even_word(uint32(high + uint32(16)), selector) << up
        first = six_bits(uint32(a), uint32(e)) + six_bits(uint32(b), uint32(f))
        return first + six_bits(uint32(c), uint32(e >> uint32(2))) + six_bits(uint32(d), uint32(f >> uint32(2)))

    return codes


@device_function
def even_word(at, selector):
    """The four bytes at an address, or two bytes later."""
    return ptx.permute_bytes(ptx.load_shared_1(at), ptx.load_shared_1(uint32(at + uint32(4))), selector)


@device_function
def _q6_k_steps(at, beside, j):
    d = ptx.load_shared_half(uint32(at + uint32(208)))
    both = ptx.load_shared_short(uint32(at + uint32(192) + j * uint32(2)))
    first = d * float32(int32(uint32(both << uint32(24))) >> int32(24))
    second = d * float32(int32(uint32(both << uint32(16))) >> int32(24))
    return first * float32(TO_24), first * float32(32), second * float32(TO_24), second * float32(32)


def _mxfp4_codes(pair):
    first, second = word_at(pair * 34 + 1), word_at(pair * 34 + 18)

    @device_function
    def codes(at, t4):
        at = uint32(at + t4)
        return e2m1(first(at)) + e2m1(second(at))

    return codes


@device_function
def _mxfp4_steps(at, beside, j):
    step = power_of_two(ptx.load_shared_byte(uint32(at + j * uint32(17)))) * float32(TO_14)
    return step, float32(0), step, float32(0)


BLOCKS = {
    "Q4_0": Blocks((144,), 1, True, _q4_0_codes, _q4_0_steps),
    "Q8_0": Blocks((272,), 1, True, _q8_0_codes, _q8_0_steps),
    "Q4_K": Blocks((144,), 1, True, _q4_k_codes, _q4_k_steps),
    "Q6_K": Blocks((210,), 8, True, _q6_k_codes, _q6_k_steps),
    "MXFP4": Blocks((136,), 2, False, _mxfp4_codes, _mxfp4_steps),
}
