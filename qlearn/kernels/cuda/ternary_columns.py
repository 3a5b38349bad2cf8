"""The input of `ternary.py` in shared memory, in the order in which its products take it.

A lane's word holds 16 trits at 2 bits, or 20 at 1.6. Whoever lays down x takes as many columns, four at a time:
`quads` reads them from whatever x consists of. For 8-bit products they become a word of four int8, for others they
stay four floats, times the power of two of their row (`half_columns.py`).

    two bits, int8       column 4 b + 3 - k in byte b of word k            the order in which masks and shifts
    two bits, float16    columns 7 - k and 15 - k in word k                bring the trits

    five trits, float16  digit k of bytes 0 and 2, then of bytes 1 and 3, of the word
    five trits, int8     the same, in the high bytes of 16 bits; and once more for digit k + 1, in the next column

Rounding to 8 bits is BitNet's, in the same order of operations as in `kernels/cpu/ternary.py`: s = 127 · (1 /
max(largest, 1e-5)), X = round(x · s), ties to even.
"""

import numpy as np
import torch

from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.half_columns import factor_of, largest_of, parts_of
from qlearn.kernels.cuda.pieces import KINDS, size_of
from qlearn.kernels.cuda.row_roles import FACTORS, TOTALS
from qlearn.kernels.cuda.ternary_product import added

from numba import float32, int32, uint32, uint64  # isort: skip - after qlearn.kernels.cuda has chosen

EPSILON, QMAX, INFINITY = np.float32(1e-5), np.float32(127), np.uint32(0x7F800000)


def quads(dtype):
    """A device function (address) -> four floats."""
    if dtype == torch.float32:

        @device_function
        def quad(at):
            a, b, c, d = ptx.load_4(at)
            return ptx.float_of_bits(a), ptx.float_of_bits(b), ptx.float_of_bits(c), ptx.float_of_bits(d)

        return quad
    pair = ptx.floats_of_h2 if dtype == torch.float16 else ptx.floats_of_b2

    @device_function
    def quad(at):
        a, b = ptx.load_2(at)
        return pair(a) + pair(b)

    return quad


@device_function
def _byte(number):
    """A float rounded to the nearest integer, as eight bits."""
    return uint32(uint32(int32(ptx.round_even(number))) & uint32(255))


@device_function
def _zeros(at):
    zero = float32(0)
    return zero, zero, zero, zero


def codes_of(dtype):
    """A device function (address, factor) -> a word of four int8: x as it is, or rounded after multiplying."""
    if dtype == torch.int8:

        @device_function
        def codes(at, by):
            return ptx.load_1(at)

        return codes
    quad = quads(dtype)

    @device_function
    def codes(at, by):
        a, b, c, d = quad(at)
        low = uint32(_byte(a * by) | uint32(_byte(b * by) << uint32(8)))
        return uint32(low | uint32(_byte(c * by) << uint32(16)) | uint32(_byte(d * by) << uint32(24)))

    return codes


def bitnet_factor(threads):
    """A device function (base, token, thread): BitNet's scale of a row, also left among the FACTORS; NaN if need be."""
    largest = largest_of(threads)

    @device_function
    def factor(base, token, thread):
        bits = largest(base, token)
        by = ptx.float_of_bits(uint32(0x7FC00000))
        if bits < INFINITY:
            by = QMAX * (float32(1) / max(ptx.float_of_bits(bits), EPSILON))
        if thread == uint32(0):
            ptx.store_shared_float(uint32(base + uint32(FACTORS) + token * uint32(4)), by)
        return by

    return factor


@device_function
def _leave_total(base, token, thread, total):
    """Each warp leaves its part of a row's sum among the TOTALS."""
    for i in range(5):
        total += ptx.shuffle_xor_float(total, uint32(uint32(16) >> uint32(i)))
    if thread & uint32(31) == uint32(0):
        at = uint32(base + uint32(TOTALS) + token * uint32(128) + uint32(thread >> uint32(5)) * uint32(4))
        ptx.store_shared_float(at, total)


def total_of(threads):
    """A device function (base, token): the sum of a row, from what the warps left."""
    warps = threads // 32

    @device_function
    def total(base, token):
        at, found = uint32(base + uint32(TOTALS) + token * uint32(128)), float32(0)
        for w in range(warps):
            found += ptx.load_shared_float(uint32(at + uint32(w * 4)))
        return found

    return total


def int8_arranger(dtype, threads, bits):
    """The `arrange` of a Recipe for 8-bit products. dtype: of x; if it is not int8, x is rounded as BitNet does."""
    rounds, size = dtype != torch.int8, 1 if dtype == torch.int8 else size_of(KINDS[dtype])
    factor, put = bitnet_factor(threads), _put_16_codes if bits == 2 else _put_20_codes
    codes, quads_each = codes_of(dtype), 4 if bits == 2 else 5
    parts, group_bytes = 1 if bits == 2 else 2, 256 if bits == 2 else 640

    @device_function
    def arrange(x, base, x_at, x_stride, extra_at, extra_stride, thread, K, tokens):
        source = ptx.global_address(x)
        words = uint32(uint32(x_stride - uint32(64)) // uint32(group_bytes) * uint32(16))
        last = uint32(uint32(K) >> uint32(2))  # of the quads
        for token in range(tokens):
            by = float32(1)
            if rounds:
                by = factor(base, uint32(token), thread)
            to = uint32(x_at + uint32(token) * uint32(parts) * x_stride)
            unit, total = thread, uint32(0)
            while unit < words:
                q = uint32(unit * uint32(quads_each))
                at = source + uint64(q) * uint64(4 * size)
                step = uint64(4 * size)
                none = uint32(0)
                q0 = codes(at, by) if q < last else none
                q1 = codes(at + step, by) if uint32(q + uint32(1)) < last else none
                q2 = codes(at + step * uint64(2), by) if uint32(q + uint32(2)) < last else none
                q3 = codes(at + step * uint64(3), by) if uint32(q + uint32(3)) < last else none
                q4 = none
                if quads_each == 5:
                    q4 = codes(at + step * uint64(4), by) if uint32(q + uint32(4)) < last else none
                    total = ptx.dot_4(q0, uint32(0x01010101), total)
                    total = ptx.dot_4(q1, uint32(0x01010101), total)
                    total = ptx.dot_4(q2, uint32(0x01010101), total)
                    total = ptx.dot_4(q3, uint32(0x01010101), total)
                    total = ptx.dot_4(q4, uint32(0x01010101), total)
                put(to, x_stride, unit, q0, q1, q2, q3, q4)
                unit = uint32(unit + uint32(threads))
            if quads_each == 5:
                for i in range(5):
                    total = added(total, ptx.shuffle_xor(total, uint32(uint32(16) >> uint32(i))))
                if thread & uint32(31) == uint32(0):
                    place = uint32(base + uint32(TOTALS) + uint32(token) * uint32(128))
                    ptx.store_shared_1(uint32(place + uint32(thread >> uint32(5)) * uint32(4)), total)
            source += uint64(uint32(K)) * uint64(size)

    return arrange


def int_total_of(threads):
    """`total_of` for integers."""
    warps = threads // 32

    @device_function
    def total(base, token):
        at, found = uint32(base + uint32(TOTALS) + token * uint32(128)), int32(0)
        for w in range(warps):
            found += int32(ptx.load_shared_1(uint32(at + uint32(w * 4))))
        return found

    return total


def _transposed(k):
    """A device function: byte k of four words, in a word."""
    two = np.uint32(k | (4 + k) << 4)

    @device_function
    def column(a, b, c, d):
        return ptx.permute_bytes(ptx.permute_bytes(a, b, two), ptx.permute_bytes(c, d, two), uint32(0x5410))

    return column


_byte_3, _byte_2, _byte_1, _byte_0 = (_transposed(k) for k in (3, 2, 1, 0))


@device_function
def _put_16_codes(to, x_stride, unit, a, b, c, d, none):
    """The inputs of a word with 16 trits: word unit % 4 of lane unit / 4 % 4."""
    at = uint32(to + uint32(unit >> uint32(4)) * uint32(256) + uint32(unit & uint32(3)) * uint32(64))
    at = uint32(at + uint32(uint32(unit >> uint32(2)) & uint32(3)) * uint32(16))
    ptx.store_shared_4(at, _byte_3(a, b, c, d), _byte_2(a, b, c, d), _byte_1(a, b, c, d), _byte_0(a, b, c, d))


def _digit(k):
    """A device function: columns k and 10 + k of 20 in the high bytes of 16 bits."""
    first, second = k % 4, (k + 10) % 4

    def taken(q):  # which of the five words
        return q // 4

    low, high = taken(k), taken(k + 10)
    selector = np.uint32(first << 4 | (4 + second) << 12)

    @device_function
    def digit(words):
        return ptx.permute_bytes(words[low], words[high], selector) & uint32(0xFF00FF00)

    return digit


_even = [_digit(k) for k in range(5)]
_odd = [_digit(k) for k in range(5, 10)]


@device_function
def _place_of(unit):
    """Where the words of an even or odd word of 20 trits begin; the next digit's lie 64 bytes further on."""
    at = uint32(uint32(unit >> uint32(4)) * uint32(640) + uint32(uint32(unit & uint32(3)) >> uint32(1)) * uint32(320))
    at = uint32(at + uint32(uint32(unit >> uint32(2)) & uint32(3)) * uint32(16))
    return uint32(at + uint32(unit & uint32(1)) * uint32(8))


_even_0, _even_1, _even_2, _even_3, _even_4 = _even
_odd_0, _odd_1, _odd_2, _odd_3, _odd_4 = _odd


@device_function
def _put_20_codes(to, x_stride, unit, a, b, c, d, e):
    """The inputs of a word with 20 trits, twice: for D_k in one column column k - 1, in the next column k."""
    at, words, zero = uint32(to + _place_of(unit)), (a, b, c, d, e), uint32(0)
    e0, e1, e2, e3, e4 = _even_0(words), _even_1(words), _even_2(words), _even_3(words), _even_4(words)
    o0, o1, o2, o3, o4 = _odd_0(words), _odd_1(words), _odd_2(words), _odd_3(words), _odd_4(words)
    ptx.store_shared_2(at, e0, o0)
    ptx.store_shared_2(uint32(at + uint32(64)), e1, o1)
    ptx.store_shared_2(uint32(at + uint32(128)), e2, o2)
    ptx.store_shared_2(uint32(at + uint32(192)), e3, o3)
    ptx.store_shared_2(uint32(at + uint32(256)), e4, o4)
    at = uint32(at + x_stride)
    ptx.store_shared_2(at, e1, o1)
    ptx.store_shared_2(uint32(at + uint32(64)), e2, o2)
    ptx.store_shared_2(uint32(at + uint32(128)), e3, o3)
    ptx.store_shared_2(uint32(at + uint32(192)), e4, o4)
    ptx.store_shared_2(uint32(at + uint32(256)), zero, zero)


def half_arranger(dtype, threads, bits):
    """The `arrange` of a Recipe for products of float16."""
    scaled, size, parts = dtype != torch.float16, size_of(KINDS[dtype]), parts_of(dtype)
    factor, put = factor_of(threads), _put_16_halves if bits == 2 else _put_20_halves
    quad, quads_each, group_bytes = quads(dtype), 4 if bits == 2 else 5, 512 if bits == 2 else 640

    @device_function
    def arrange(x, base, x_at, x_stride, extra_at, extra_stride, thread, K, tokens):
        source = ptx.global_address(x)
        words = uint32(uint32(x_stride - uint32(64)) // uint32(group_bytes) * uint32(16))
        last = uint32(uint32(K) >> uint32(2))  # of the quads
        for token in range(tokens):
            by = float32(1)
            if scaled:
                by = factor(base, uint32(token), thread)
            to = uint32(x_at + uint32(token) * uint32(parts) * x_stride)
            unit, total = thread, float32(0)
            while unit < words:
                q = uint32(unit * uint32(quads_each))
                at = source + uint64(q) * uint64(4 * size)
                step = uint64(4 * size)
                v0 = quad(at) if q < last else _zeros(at)
                v1 = quad(at + step) if uint32(q + uint32(1)) < last else _zeros(at)
                v2 = quad(at + step * uint64(2)) if uint32(q + uint32(2)) < last else _zeros(at)
                v3 = quad(at + step * uint64(3)) if uint32(q + uint32(3)) < last else _zeros(at)
                v4 = _zeros(at)
                if quads_each == 5:
                    v4 = quad(at + step * uint64(4)) if uint32(q + uint32(4)) < last else _zeros(at)
                sum, left = put(to, unit, v0 + v1 + v2 + v3 + v4, by)
                total += sum
                if parts == 2:
                    sum, left = put(uint32(to + x_stride), unit, left, float32(1))
                    total += sum
                unit = uint32(unit + uint32(threads))
            if quads_each == 5:
                _leave_total(base, uint32(token), thread, total)
            source += uint64(uint32(K)) * uint64(size)

    return arrange


@device_function
def _rounded(a, b, by):
    """Two numbers times a factor in a word, the sum of the word's numbers, and what is left of both."""
    a, b = a * by, b * by
    word = ptx.h2_of_floats(a, b)
    c, d = ptx.floats_of_h2(word)
    return word, c + d, a - c, b - d


@device_function
def _put_16_halves(to, unit, x, by):
    """The inputs of a word with 16 trits. Returns their sum, and what is left of each."""
    w0, s0, r7, r15 = _rounded(x[7], x[15], by)
    w1, s1, r6, r14 = _rounded(x[6], x[14], by)
    w2, s2, r5, r13 = _rounded(x[5], x[13], by)
    w3, s3, r4, r12 = _rounded(x[4], x[12], by)
    w4, s4, r3, r11 = _rounded(x[3], x[11], by)
    w5, s5, r2, r10 = _rounded(x[2], x[10], by)
    w6, s6, r1, r9 = _rounded(x[1], x[9], by)
    w7, s7, r0, r8 = _rounded(x[0], x[8], by)
    at = uint32(to + uint32(unit >> uint32(4)) * uint32(512) + uint32(unit & uint32(3)) * uint32(128))
    at = uint32(at + uint32(uint32(unit >> uint32(2)) & uint32(3)) * uint32(16))
    ptx.store_shared_4(at, w0, w1, w2, w3)
    ptx.store_shared_4(uint32(at + uint32(64)), w4, w5, w6, w7)
    zero = float32(0)
    left = (r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15, zero, zero, zero, zero)
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)), left


@device_function
def _put_20_halves(to, unit, x, by):
    """The inputs of a word with 20 trits. Returns their sum, and what is left of each."""
    a0, s0, r0, r10 = _rounded(x[0], x[10], by)
    b0, s1, r5, r15 = _rounded(x[5], x[15], by)
    a1, s2, r1, r11 = _rounded(x[1], x[11], by)
    b1, s3, r6, r16 = _rounded(x[6], x[16], by)
    a2, s4, r2, r12 = _rounded(x[2], x[12], by)
    b2, s5, r7, r17 = _rounded(x[7], x[17], by)
    a3, s6, r3, r13 = _rounded(x[3], x[13], by)
    b3, s7, r8, r18 = _rounded(x[8], x[18], by)
    a4, s8, r4, r14 = _rounded(x[4], x[14], by)
    b4, s9, r9, r19 = _rounded(x[9], x[19], by)
    at = uint32(to + _place_of(unit))
    ptx.store_shared_2(at, a0, b0)
    ptx.store_shared_2(uint32(at + uint32(64)), a1, b1)
    ptx.store_shared_2(uint32(at + uint32(128)), a2, b2)
    ptx.store_shared_2(uint32(at + uint32(192)), a3, b3)
    ptx.store_shared_2(uint32(at + uint32(256)), a4, b4)
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + (s8 + s9)
    left = (r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15, r16, r17, r18, r19)
    return total, left
