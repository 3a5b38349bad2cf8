"""Codes become numbers of half precision: what a lane does with its words of a unit.

    the bits of a code q, put where the mantissa of 1024.0 ends, make the number 1024 + q        w & 15 | 0x6400
    one multiply-add takes off 1024 and the zero-point z, exactly                                 · 1 - (1024 + z)

Both work on two codes at once, since a word holds two numbers of half precision. Of a word with eight 4-bit codes, the
second pair lies four bits further up: there the same bits make 1024 + 16 q, and the multiply-add divides by 16 on the
way. A code that lies r bits up makes 1024 + 2^r q; this goes well for r + bits <= 10, and beyond that the word is
shifted first. The mantissa of bfloat16 has 7 bits instead of 10: there it is 128 + q, and every pair is shifted down.

Everything up to here is exact if z is a whole number. A zero-point with a fraction is subtracted by itself, and rounded
once.

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
    one = 0x3F803F80 if bfloat else 0x3C003C00
    fma = ptx.fma_b2 if bfloat else ptx.fma_h2

    @device_function
    def moved(words, by):
        return (
            fma(words[0], uint32(one), by), fma(words[1], uint32(one), by),
            fma(words[2], uint32(one), by), fma(words[3], uint32(one), by),
        )  # fmt: skip

    return moved


def numbers_of(bits, bfloat, half, j):
    """A device function: the four pairs of numbers that a lane owns for a j, of row g (half 0) or of row g + 8.

    half and j are known when it is made. Were they arguments, the compiler would choose the words of a tuple while the
    kernel runs, wherever it does not care to unroll a loop: that was measured, and took three times as long.
    """
    if bfloat:
        return _decode_bfloat(bits, half, j)
    low, bias, mask = 0x3C003C00, 0x64006400, 2**bits - 1 | (2**bits - 1) << 16
    if bits == 8:
        first = half * 8 + j // 2 * 4 + j % 2 * 2
        second = first + 1

        @device_function
        def decode(words, offsets):
            a, b = words[first], words[second]
            return (
                ptx.fma_h2(ptx.and_or(a, uint32(mask), uint32(bias)), uint32(low), offsets[0]),
                ptx.fma_h2(ptx.and_or(a >> uint32(8), uint32(mask), uint32(bias)), uint32(low), offsets[0]),
                ptx.fma_h2(ptx.and_or(b, uint32(mask), uint32(bias)), uint32(low), offsets[0]),
                ptx.fma_h2(ptx.and_or(b >> uint32(8), uint32(mask), uint32(bias)), uint32(low), offsets[0]),
            )

    elif bits == 4:
        sixteenth, which = 0x2C002C00, half * 4 + j

        @device_function
        def decode(words, offsets):
            a = words[which]
            b = a >> uint32(8)
            return (
                ptx.fma_h2(ptx.and_or(a, uint32(mask), uint32(bias)), uint32(low), offsets[0]),
                ptx.fma_h2(ptx.and_or(a, uint32(mask << 4), uint32(bias)), uint32(sixteenth), offsets[1]),
                ptx.fma_h2(ptx.and_or(b, uint32(mask), uint32(bias)), uint32(low), offsets[0]),
                ptx.fma_h2(ptx.and_or(b, uint32(mask << 4), uint32(bias)), uint32(sixteenth), offsets[1]),
            )

    elif bits == 3:
        third, two = 0x00040004, 0x00030003
        which, down, thirds = half * 2 + j // 2, 8 * (j % 2), 4 + half

        @device_function
        def decode(words, offsets):
            a = words[which] >> uint32(down)
            h = (words[thirds] >> uint32(4 * j)) << uint32(2)
            n0 = ptx.and_or(h, uint32(third), ptx.and_or(a, uint32(two), uint32(bias)))
            n1 = ptx.and_or(h >> uint32(1), uint32(third), ptx.and_or(a >> uint32(2), uint32(two), uint32(bias)))
            n2 = ptx.and_or(h >> uint32(2), uint32(third), ptx.and_or(a >> uint32(4), uint32(two), uint32(bias)))
            n3 = ptx.and_or(h >> uint32(3), uint32(third), ptx.and_or(a >> uint32(6), uint32(two), uint32(bias)))
            return (
                ptx.fma_h2(n0, uint32(low), offsets[0]), ptx.fma_h2(n1, uint32(low), offsets[0]),
                ptx.fma_h2(n2, uint32(low), offsets[0]), ptx.fma_h2(n3, uint32(low), offsets[0]),
            )  # fmt: skip

    else:
        fourth, sixteenth, last = 0x34003400, 0x2C002C00, 0x24002400
        which, down = half * 2 + j // 2, 8 * (j % 2)

        @device_function
        def decode(words, offsets):
            a = words[which] >> uint32(down)
            return (
                ptx.fma_h2(ptx.and_or(a, uint32(mask), uint32(bias)), uint32(low), offsets[0]),
                ptx.fma_h2(ptx.and_or(a, uint32(mask << 2), uint32(bias)), uint32(fourth), offsets[1]),
                ptx.fma_h2(ptx.and_or(a, uint32(mask << 4), uint32(bias)), uint32(sixteenth), offsets[2]),
                ptx.fma_h2(ptx.and_or(a, uint32(mask << 6), uint32(bias)), uint32(last), offsets[3]),
            )

    return decode


def _decode_bfloat(bits, half, j):
    """The same for bfloat16, where 128 + q is the most that the mantissa holds: every code is shifted down."""
    one, bias, mask = 0x3F803F80, 0x43004300, 2**bits - 1 | (2**bits - 1) << 16
    if bits == 8:
        nibble, sixteen, minus_128 = 0x000F000F, 0x41804180, 0xC300C300
        first = half * 8 + j // 2 * 4 + j % 2 * 2
        second = first + 1

        @device_function
        def number(word, offset):
            # 16 h + l - z: every step is an integer of at most eight bits, so each is exact
            high = ptx.fma_b2(
                ptx.and_or(word >> uint32(4), uint32(nibble), uint32(bias)), uint32(one), uint32(minus_128)
            )
            low = ptx.fma_b2(ptx.and_or(word, uint32(nibble), uint32(bias)), uint32(one), uint32(minus_128))
            code = ptx.fma_b2(high, uint32(sixteen), low)
            return ptx.fma_b2(code, uint32(one), offset)

        @device_function
        def decode(words, offsets):
            a, b = words[first], words[second]
            zero = offsets[0]
            return number(a, zero), number(a >> uint32(8), zero), number(b, zero), number(b >> uint32(8), zero)

    elif bits == 4:
        which = half * 4 + j

        @device_function
        def decode(words, offsets):
            a = words[which]
            return (
                ptx.fma_b2(ptx.and_or(a, uint32(mask), uint32(bias)), uint32(one), offsets[0]),
                ptx.fma_b2(ptx.and_or(a >> uint32(4), uint32(mask), uint32(bias)), uint32(one), offsets[0]),
                ptx.fma_b2(ptx.and_or(a >> uint32(8), uint32(mask), uint32(bias)), uint32(one), offsets[0]),
                ptx.fma_b2(ptx.and_or(a >> uint32(12), uint32(mask), uint32(bias)), uint32(one), offsets[0]),
            )

    elif bits == 3:
        third, two = 0x00040004, 0x00030003
        which, down, thirds = half * 2 + j // 2, 8 * (j % 2), 4 + half

        @device_function
        def decode(words, offsets):
            a = words[which] >> uint32(down)
            h = (words[thirds] >> uint32(4 * j)) << uint32(2)
            n0 = ptx.and_or(h, uint32(third), ptx.and_or(a, uint32(two), uint32(bias)))
            n1 = ptx.and_or(h >> uint32(1), uint32(third), ptx.and_or(a >> uint32(2), uint32(two), uint32(bias)))
            n2 = ptx.and_or(h >> uint32(2), uint32(third), ptx.and_or(a >> uint32(4), uint32(two), uint32(bias)))
            n3 = ptx.and_or(h >> uint32(3), uint32(third), ptx.and_or(a >> uint32(6), uint32(two), uint32(bias)))
            return (
                ptx.fma_b2(n0, uint32(one), offsets[0]), ptx.fma_b2(n1, uint32(one), offsets[0]),
                ptx.fma_b2(n2, uint32(one), offsets[0]), ptx.fma_b2(n3, uint32(one), offsets[0]),
            )  # fmt: skip

    else:
        which, down = half * 2 + j // 2, 8 * (j % 2)

        @device_function
        def decode(words, offsets):
            a = words[which] >> uint32(down)
            return (
                ptx.fma_b2(ptx.and_or(a, uint32(mask), uint32(bias)), uint32(one), offsets[0]),
                ptx.fma_b2(ptx.and_or(a >> uint32(2), uint32(mask), uint32(bias)), uint32(one), offsets[0]),
                ptx.fma_b2(ptx.and_or(a >> uint32(4), uint32(mask), uint32(bias)), uint32(one), offsets[0]),
                ptx.fma_b2(ptx.and_or(a >> uint32(6), uint32(mask), uint32(bias)), uint32(one), offsets[0]),
            )

    return decode
