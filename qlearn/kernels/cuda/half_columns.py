"""The input as columns of float16, in the order in which a tensor core takes it.

`row_stream.py` says why: float16 as it is, bfloat16 and float32 times a power of two, float32 as two columns, the
nearest float16 and what is left. This is done once by every block of threads, while its first weights are on the way.

**The order.** A product of a tensor core has 16 inputs, of which lane 4g + t of a warp gives four, for column g. The
others do not care which four, as long as the weights that it gives belong to the same. So for 32 inputs, two products,
a lane gives eight, and it takes those whose weights lie together in memory. In `stacked` blocks a byte holds the
weights i and i + 16, and t owns the bytes 4t ... 4t + 3:

    product 1   (4t, 4t + 2)         (4t + 1, 4t + 3)             a pair is a word, as the weights come out of theirs
    product 2   (4t + 16, 4t + 18)   (4t + 17, 4t + 19)           by masking every other byte

In `consecutive` blocks a byte holds two neighbours, and the pairs are (8t, 8t + 4), (8t + 1, 8t + 5), and so on.

**Sums.** A format whose codes are not symmetric stands for  scale · code − offset. The scale is multiplied with the sum
of code · x of a block, and the offset with the sum of x. So the sums of every 16 inputs are left beside them; they are
the sums of what was really rounded to float16.
"""

import torch

from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.pieces import KINDS, readers, size_of
from qlearn.kernels.cuda.row_roles import FACTORS, LARGEST

from numba import float32, uint32, uint64  # isort: skip - after qlearn.kernels.cuda has chosen

DTYPES = tuple(KINDS)
X_BYTES = 512  # of 256 inputs
SUM_BYTES = 64  # and of their sums


def parts_of(dtype):
    """Columns that a row of x takes."""
    return 2 if dtype == torch.float32 else 1


def arranger(dtype, threads, order):
    """The `arrange` of a Recipe. order: "stacked" or "consecutive"."""
    put = _put_stacked if order == "stacked" else _put_consecutive
    kind, parts, scaled = KINDS[dtype], parts_of(dtype), dtype != torch.float16
    size, fetch, factor = size_of(kind), _fetcher(kind), factor_of(threads)

    @device_function
    def leave(to, x_stride, sums, sums_stride, octet, thread, values, by):
        at = uint32(sums + uint32(octet >> uint32(1)) * uint32(4))
        total, left = put(to, octet, values, by)
        total += ptx.shuffle_xor_float(total, uint32(1))
        if thread & uint32(1) == uint32(0):
            ptx.store_shared_float(at, total)
        if parts == 2:
            total, left = put(uint32(to + x_stride), octet, left, float32(1))
            total += ptx.shuffle_xor_float(total, uint32(1))
            if thread & uint32(1) == uint32(0):
                ptx.store_shared_float(uint32(at + sums_stride), total)

    @device_function
    def arrange(x, base, x_at, x_stride, sums_at, sums_stride, thread, K, tokens):
        source, count = ptx.global_address(x), uint32(uint32(K) >> uint32(3))
        for token in range(tokens):
            by = float32(1)
            if scaled:
                by = factor(base, uint32(token), thread)
            to = uint32(x_at + uint32(token) * uint32(parts) * x_stride)
            sums = uint32(sums_at + uint32(token) * uint32(parts) * sums_stride)
            first = thread
            while first < count:  # a multiple of 32, so that the lanes of a warp stay together
                second, third = uint32(first + uint32(threads)), uint32(first + uint32(2 * threads))
                fourth = uint32(third + uint32(threads))
                a = fetch(source, first, count)
                b = fetch(source, second, count)
                c = fetch(source, third, count)
                d = fetch(source, fourth, count)
                leave(to, x_stride, sums, sums_stride, first, thread, a, by)
                if second < count:
                    leave(to, x_stride, sums, sums_stride, second, thread, b, by)
                if third < count:
                    leave(to, x_stride, sums, sums_stride, third, thread, c, by)
                if fourth < count:
                    leave(to, x_stride, sums, sums_stride, fourth, thread, d, by)
                first = uint32(fourth + uint32(threads))
            source += uint64(uint32(K)) * uint64(size)

    return arrange


def _fetcher(kind):
    """A device function (address of a row, octet, count) -> eight numbers, or zeros past the end.

    It is called four times before the first result is used, so that a thread waits for memory once, not four times.
    """
    size, eight = size_of(kind), readers(kind)[0]

    @device_function
    def fetch(source, octet, count):
        zero = float32(0)
        values = (zero, zero, zero, zero, zero, zero, zero, zero)
        if octet < count:
            values = eight(source + uint64(octet) * uint64(8 * size))
        return values

    return fetch


def measurer(dtype, threads, scaled=None):
    """The `measure` of a Recipe: each warp leaves the largest magnitude that it sees in each row.

    scaled: whether that is needed; by default, unless the dtype is float16.
    """
    kind, scaled = KINDS[dtype], dtype != torch.float16 if scaled is None else scaled
    size, fetch = size_of(kind), _fetcher(kind)

    @device_function
    def larger(largest, values):
        for i in range(8):
            # without the sign, floats are in order of their bits, and NaN is above all others
            largest = uint32(max(largest, uint32(ptx.bits_of_float(values[i]) & uint32(0x7FFFFFFF))))
        return largest

    @device_function
    def measure(x, base, thread, K, tokens):
        if scaled:
            source, count = ptx.global_address(x), uint32(uint32(K) >> uint32(3))
            for token in range(tokens):
                largest, first = uint32(0), thread
                while first < count:
                    second, third = uint32(first + uint32(threads)), uint32(first + uint32(2 * threads))
                    fourth = uint32(third + uint32(threads))
                    a = fetch(source, first, count)
                    b = fetch(source, second, count)
                    c = fetch(source, third, count)
                    d = fetch(source, fourth, count)
                    largest = larger(larger(larger(larger(largest, a), b), c), d)
                    first = uint32(fourth + uint32(threads))
                for i in range(5):
                    largest = uint32(max(largest, ptx.shuffle_xor(largest, uint32(uint32(16) >> uint32(i)))))
                if thread & uint32(31) == uint32(0):
                    at = uint32(base + uint32(LARGEST) + uint32(token) * uint32(128))
                    ptx.store_shared_1(uint32(at + uint32(thread >> uint32(5)) * uint32(4)), largest)
                source += uint64(uint32(K)) * uint64(size)

    return measure


def largest_of(threads):
    """A device function (base, token): the largest magnitude of a row, as bits, from what the warps left."""
    warps = threads // 32

    @device_function
    def largest(base, token):
        at, found = uint32(base + uint32(LARGEST) + token * uint32(128)), uint32(0)
        for w in range(warps):
            found = uint32(max(found, ptx.load_shared_1(uint32(at + uint32(w * 4)))))
        return found

    return largest


def factor_of(threads):
    """A device function (base, token, thread): the power of two for a row. Its inverse is left among the FACTORS."""
    largest = largest_of(threads)

    @device_function
    def factor(base, token, thread):
        exponent = uint32(max(uint32(largest(base, token) >> uint32(23)), uint32(15)))
        if thread == uint32(0):
            inverse = ptx.float_of_bits(uint32(uint32(exponent - uint32(14)) << uint32(23)))
            ptx.store_shared_float(uint32(base + uint32(FACTORS) + token * uint32(4)), inverse)
        return ptx.float_of_bits(uint32(uint32(uint32(268) - exponent) << uint32(23)))

    return factor


@device_function
def _rounded(a, b, by):
    """Two numbers times a factor in a word, the word's numbers, and what is left of both."""
    a, b = a * by, b * by
    word = ptx.h2_of_floats(a, b)
    c, d = ptx.floats_of_h2(word)
    return word, c, d, a - c, b - d


@device_function
def _put_stacked(to, octet, x, by):
    """Eight inputs into shared memory. Returns the sum of what they were rounded to, and what is left of each."""
    w0, a0, a2, r0, r2 = _rounded(x[0], x[2], by)
    w1, a1, a3, r1, r3 = _rounded(x[1], x[3], by)
    w2, a4, a6, r4, r6 = _rounded(x[4], x[6], by)
    w3, a5, a7, r5, r7 = _rounded(x[5], x[7], by)
    q = uint32(octet & uint32(3))
    at = uint32(to + uint32(octet >> uint32(2)) * uint32(64) + uint32(q & uint32(1)) * uint32(32))
    at = uint32(at + uint32(q >> uint32(1)) * uint32(8))
    ptx.store_shared_2(at, w0, w1)
    ptx.store_shared_2(uint32(at + uint32(16)), w2, w3)
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)), (r0, r1, r2, r3, r4, r5, r6, r7)


@device_function
def _put_consecutive(to, octet, x, by):
    """The same in the other order."""
    w0, a0, a4, r0, r4 = _rounded(x[0], x[4], by)
    w1, a1, a5, r1, r5 = _rounded(x[1], x[5], by)
    w2, a2, a6, r2, r6 = _rounded(x[2], x[6], by)
    w3, a3, a7, r3, r7 = _rounded(x[3], x[7], by)
    ptx.store_shared_4(uint32(to + octet * uint32(16)), w0, w1, w2, w3)
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)), (r0, r1, r2, r3, r4, r5, r6, r7)


def finisher(dtype):
    """The `finish` of a Recipe: the parts are added, and the power of two is taken back."""
    two, scaled = parts_of(dtype) == 2, dtype != torch.float16

    @device_function
    def finish(first, second, base, token, scale):
        value = first
        if two:
            value = first + second
        if scaled:
            value = value * ptx.load_shared_float(uint32(base + uint32(FACTORS) + token * uint32(4)))
        return value * scale

    return finish
