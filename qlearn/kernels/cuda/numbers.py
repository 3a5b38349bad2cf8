"""Codes become numbers of half precision: what a lane does with its words of a unit.

    the bits of a code q, put where the mantissa of 1024.0 ends, make the number 1024 + q        w & 15 | 0x6400
    one multiply-add takes off 1024 and the zero-point z, exactly                                 · 1 - (1024 + z)

Both work on two codes at once, since a word holds two numbers of half precision. Of a word with eight 4-bit codes, the
second pair lies four bits further up: there the same bits make 1024 + 16 q, and the multiply-add divides by 16 on the
way. A code that lies r bits up makes 1024 + 2^r q; this goes well for r + bits <= 10, and beyond that the word is
shifted first. The mantissa of bfloat16 has 7 bits instead of 10: there it is 128 + q, and every pair is shifted down.

Everything up to here is exact if z is a whole number. A zero-point with a fraction is subtracted by itself: then the
difference is rounded, and with bfloat16 the zero-point too.

`layout.py` says which pair lies where.
"""

import numpy as np

from qlearn.kernels.cuda import device_function, ptx

from numba import float32, uint32  # isort: skip - after qlearn.kernels.cuda has chosen


def words_of(bits):
    """A device function: the words of the codes that a lane owns in a unit."""
    if bits == 8:

        @device_function
        def fetch(at, lane):
            at += lane * uint32(16)
            low = ptx.load_shared_4(at) + ptx.load_shared_4(at + uint32(512))
            return low + ptx.load_shared_4(at + uint32(1024)) + ptx.load_shared_4(at + uint32(1536))

    elif bits == 4:

        @device_function
        def fetch(at, lane):
            at += lane * uint32(16)
            return ptx.load_shared_4(at) + ptx.load_shared_4(at + uint32(512))

    elif bits == 3:

        @device_function
        def fetch(at, lane):
            return ptx.load_shared_4(at + lane * uint32(16)) + ptx.load_shared_2(at + uint32(512) + lane * uint32(8))

    else:

        @device_function
        def fetch(at, lane):
            return ptx.load_shared_4(at + lane * uint32(16))

    return fetch


def _places(bits, bfloat):
    """How many bits up a code may lie when the multiply-add takes it: the r of the top of this file."""
    return (0,) if bfloat or bits in (3, 8) else (0, 4) if bits == 4 else (0, 2, 4, 6)


def offsets_of(bits, bfloat):
    """A device function: for a zero-point z, the words with -(1024 / 2^r + z) for each place r."""
    places = _places(bits, bfloat)
    if bfloat:
        top = 0.0 if bits == 8 else 128.0

        @device_function
        def offsets(zero):
            number = -(float32(top) + zero)
            return (ptx.b2_of_floats(number, number),)

    elif len(places) == 1:

        @device_function
        def offsets(zero):
            number = -(float32(1024) + zero)
            return (ptx.h2_of_floats(number, number),)

    elif len(places) == 2:

        @device_function
        def offsets(zero):
            r0, r4 = -(float32(1024) + zero), -(float32(64) + zero)
            return ptx.h2_of_floats(r0, r0), ptx.h2_of_floats(r4, r4)

    else:

        @device_function
        def offsets(zero):
            r0, r2 = -(float32(1024) + zero), -(float32(256) + zero)
            r4, r6 = -(float32(64) + zero), -(float32(16) + zero)
            return (
                ptx.h2_of_floats(r0, r0),
                ptx.h2_of_floats(r2, r2),
                ptx.h2_of_floats(r4, r4),
                ptx.h2_of_floats(r6, r6),
            )

    return offsets


def constant_offsets(bits, bfloat):
    """The same words for the one number that symmetric codes are too large by, 2**(bits - 1)."""
    middle = 2 ** (bits - 1)
    if bfloat:
        top = -float((0 if bits == 8 else 128) + middle)
        return (np.uint32(ptx.word_of_bfloats([top, top])),)
    return tuple(np.uint32(ptx.word_of_halves([-(1024 / 2**r + middle)] * 2)) for r in _places(bits, bfloat))


def moved_by(bfloat):
    """A device function: four words of pairs, each plus the same."""
    fma, _, one = _arithmetic(bfloat)

    @device_function
    def moved(words, by):
        return (
            fma(words[0], uint32(one), by), fma(words[1], uint32(one), by),
            fma(words[2], uint32(one), by), fma(words[3], uint32(one), by),
        )  # fmt: skip

    return moved


def numbers_of(bits, bfloat, half, j):
    """A device function (words, offsets): the four pairs of numbers of a lane for a j, of row g (half 0) or g + 8.

    half and j are known when it is made. As arguments they would leave it to the compiler to unroll the loop over j,
    and where it did not, a product took three times as long (`NOTES.md`).
    """
    if bits == 3:
        return _three_bits(bfloat, half, j)
    if bits == 8 and bfloat:
        return _eight_bits_bfloat(half, j)
    fma, bias, _ = _arithmetic(bfloat)
    pairs = [_pair(bits, bfloat, half, j, p) for p in range(4)]
    (w0, s0, m0, f0, o0), (w1, s1, m1, f1, o1), (w2, s2, m2, f2, o2), (w3, s3, m3, f3, o3) = pairs

    @device_function
    def numbers(words, offsets):
        return (
            fma(ptx.and_or(words[w0] >> uint32(s0), uint32(m0), uint32(bias)), uint32(f0), offsets[o0]),
            fma(ptx.and_or(words[w1] >> uint32(s1), uint32(m1), uint32(bias)), uint32(f1), offsets[o1]),
            fma(ptx.and_or(words[w2] >> uint32(s2), uint32(m2), uint32(bias)), uint32(f2), offsets[o2]),
            fma(ptx.and_or(words[w3] >> uint32(s3), uint32(m3), uint32(bias)), uint32(f3), offsets[o3]),
        )

    return numbers


def _arithmetic(bfloat):
    """The multiply-add of a dtype, the word with twice 1024.0 (or 128.0), and the word with twice 1.0."""
    return (ptx.fma_b2, 0x43004300, 0x3F803F80) if bfloat else (ptx.fma_h2, 0x64006400, 0x3C003C00)


def _pair(bits, bfloat, half, j, p):
    """Where pair p lies, and what is done to it: word, bits to shift down, mask, factor, number of the offset."""
    if bits == 8:
        word, at = half * 8 + j // 2 * 4 + j % 2 * 2 + p // 2, 8 * (p % 2)
    elif bits == 4:
        word, at = half * 4 + j, 4 * p
    else:
        word, at = half * 2 + j // 2, 8 * (j % 2) + 2 * p
    up = 0 if bfloat else at % 8  # how far up it stays
    mask = (2**bits - 1 | (2**bits - 1) << 16) << up
    factor = _arithmetic(bfloat)[2] if bfloat else int(ptx.word_of_halves([2.0**-up] * 2))
    return word, at - up, mask, factor, _places(bits, bfloat).index(up)


def _three_bits(bfloat, half, j):
    """Two bits of a code lie in one word, the third in another."""
    fma, bias, one = _arithmetic(bfloat)
    third, two = 0x00040004, 0x00030003
    which, down, thirds = half * 2 + j // 2, 8 * (j % 2), 4 + half

    @device_function
    def numbers(words, offsets):
        a = words[which] >> uint32(down)
        h = (words[thirds] >> uint32(4 * j)) << uint32(2)
        n0 = ptx.and_or(h, uint32(third), ptx.and_or(a, uint32(two), uint32(bias)))
        n1 = ptx.and_or(h >> uint32(1), uint32(third), ptx.and_or(a >> uint32(2), uint32(two), uint32(bias)))
        n2 = ptx.and_or(h >> uint32(2), uint32(third), ptx.and_or(a >> uint32(4), uint32(two), uint32(bias)))
        n3 = ptx.and_or(h >> uint32(3), uint32(third), ptx.and_or(a >> uint32(6), uint32(two), uint32(bias)))
        return (
            fma(n0, uint32(one), offsets[0]), fma(n1, uint32(one), offsets[0]),
            fma(n2, uint32(one), offsets[0]), fma(n3, uint32(one), offsets[0]),
        )  # fmt: skip

    return numbers


def _eight_bits_bfloat(half, j):
    """128 + q has no room for eight bits. So it is 16 h + l; each step is an integer of eight bits, hence exact."""
    nibble, bias, one, sixteen, minus_128 = 0x000F000F, 0x43004300, 0x3F803F80, 0x41804180, 0xC300C300
    first = half * 8 + j // 2 * 4 + j % 2 * 2
    second = first + 1

    @device_function
    def number(word, offset):
        high = ptx.fma_b2(ptx.and_or(word >> uint32(4), uint32(nibble), uint32(bias)), uint32(one), uint32(minus_128))
        low = ptx.fma_b2(ptx.and_or(word, uint32(nibble), uint32(bias)), uint32(one), uint32(minus_128))
        return ptx.fma_b2(ptx.fma_b2(high, uint32(sixteen), low), uint32(one), offset)

    @device_function
    def numbers(words, offsets):
        a, b, zero = words[first], words[second], offsets[0]
        return number(a, zero), number(a >> uint32(8), zero), number(b, zero), number(b >> uint32(8), zero)

    return numbers
