"""What a warp does with 16 rows of 64 bytes of trits: the four products of `ternary.py`, which explains them.

Each function here is the `product` of a Recipe: given the bytes from a row to the next, it makes a device function.
Lane 4g + t takes 16 bytes of row g and of row g + 8, and multiplies them by what `ternary_columns.py` laid down for it.
Two sets of sums are used in turns, so that a product of the tensor core need not wait for the one before.
"""

import numpy as np

from qlearn.kernels.cuda import device_function, ptx

from numba import float32, int32, uint32  # isort: skip - after qlearn.kernels.cuda has chosen

PER_BYTE = 5


@device_function
def added(a, b):
    """The sum of two int32 that are kept as words."""
    return uint32(int32(a) + int32(b))


def two_bits_int8(between):
    down = np.uint32(8 * between)

    @device_function
    def word(low, high, x, c, d):
        """16 trits of two rows each."""
        top = uint32(0xC0C0C0C0)
        c = ptx.mma_int8(
            low & top, high & top, uint32(low << uint32(2)) & top, uint32(high << uint32(2)) & top,
            x[0], x[1], c[0], c[1], c[2], c[3],
        )  # fmt: skip
        d = ptx.mma_int8(
            uint32(low << uint32(4)) & top, uint32(high << uint32(4)) & top,
            uint32(low << uint32(6)) & top, uint32(high << uint32(6)) & top,
            x[2], x[3], d[0], d[1], d[2], d[3],
        )  # fmt: skip
        return c, d

    @device_function
    def product(at, beside, x_at, x_stride, extra_at, extra_stride, group, used, lane, acc):
        g, t16 = uint32(lane >> uint32(2)), uint32(uint32(lane & uint32(3)) * uint32(16))
        x_at = uint32(x_at + uint32(min(g, uint32(used - uint32(1)))) * x_stride + group * uint32(256) + t16)
        low, high = ptx.load_shared_4(uint32(at + t16)), ptx.load_shared_4(uint32(at + down + t16))
        zero = uint32(0)
        c, d = (acc[0], acc[1], acc[2], acc[3]), (zero, zero, zero, zero)
        c, d = word(low[0], high[0], ptx.load_shared_4(x_at), c, d)
        c, d = word(low[1], high[1], ptx.load_shared_4(uint32(x_at + uint32(64))), c, d)
        c, d = word(low[2], high[2], ptx.load_shared_4(uint32(x_at + uint32(128))), c, d)
        c, d = word(low[3], high[3], ptx.load_shared_4(uint32(x_at + uint32(192))), c, d)
        acc[0], acc[1] = added(c[0], d[0]), added(c[1], d[1])
        acc[2], acc[3] = added(c[2], d[2]), added(c[3], d[3])

    return product


def two_bits_half(between):
    down = np.uint32(8 * between)

    @device_function
    def word(low, high, x, y, c, d):
        top = uint32(0xC000C000)
        c = ptx.mma_half(
            low & top, high & top, uint32(low << uint32(2)) & top, uint32(high << uint32(2)) & top,
            x[0], x[1], c[0], c[1], c[2], c[3],
        )  # fmt: skip
        d = ptx.mma_half(
            uint32(low << uint32(4)) & top, uint32(high << uint32(4)) & top,
            uint32(low << uint32(6)) & top, uint32(high << uint32(6)) & top,
            x[2], x[3], d[0], d[1], d[2], d[3],
        )  # fmt: skip
        c = ptx.mma_half(
            uint32(low << uint32(8)) & top, uint32(high << uint32(8)) & top,
            uint32(low << uint32(10)) & top, uint32(high << uint32(10)) & top,
            y[0], y[1], c[0], c[1], c[2], c[3],
        )  # fmt: skip
        d = ptx.mma_half(
            uint32(low << uint32(12)) & top, uint32(high << uint32(12)) & top,
            uint32(low << uint32(14)) & top, uint32(high << uint32(14)) & top,
            y[2], y[3], d[0], d[1], d[2], d[3],
        )  # fmt: skip
        return c, d

    @device_function
    def fetched(low, high, x_at, c, d):
        return word(low, high, ptx.load_shared_4(x_at), ptx.load_shared_4(uint32(x_at + uint32(64))), c, d)

    @device_function
    def product(at, beside, x_at, x_stride, extra_at, extra_stride, group, used, lane, acc):
        g, t16 = uint32(lane >> uint32(2)), uint32(uint32(lane & uint32(3)) * uint32(16))
        x_at = uint32(x_at + uint32(min(g, uint32(used - uint32(1)))) * x_stride + group * uint32(512) + t16)
        low, high = ptx.load_shared_4(uint32(at + t16)), ptx.load_shared_4(uint32(at + down + t16))
        zero = float32(0)
        c, d = (zero, zero, zero, zero), (zero, zero, zero, zero)
        c, d = fetched(low[0], high[0], x_at, c, d)
        c, d = fetched(low[1], high[1], uint32(x_at + uint32(128)), c, d)
        c, d = fetched(low[2], high[2], uint32(x_at + uint32(256)), c, d)
        c, d = fetched(low[3], high[3], uint32(x_at + uint32(384)), c, d)
        acc[0] += c[0] + d[0]
        acc[1] += c[1] + d[1]
        acc[2] += c[2] + d[2]
        acc[3] += c[3] + d[3]

    return product


@device_function
def _split(w):
    """The even bytes and the odd bytes of a word, each in 16 bits."""
    return w & uint32(0x00FF00FF), uint32(w >> uint32(8)) & uint32(0x00FF00FF)


def five_trits_int8(between):
    down = np.uint32(8 * between)

    def power(p):
        factor = np.uint32(3 ** (p + 1))
        offset = np.uint32(64 * p)

        @device_function
        def step(v, x_at, c, d):
            x = ptx.load_shared_4(uint32(x_at + offset))
            c = ptx.mma_uint8(
                uint32(v[0] * factor), uint32(v[2] * factor), uint32(v[1] * factor), uint32(v[3] * factor),
                x[0], x[1], c[0], c[1], c[2], c[3],
            )  # fmt: skip
            d = ptx.mma_uint8(
                uint32(v[4] * factor), uint32(v[6] * factor), uint32(v[5] * factor), uint32(v[7] * factor),
                x[2], x[3], d[0], d[1], d[2], d[3],
            )  # fmt: skip
            return c, d

        return step

    first, second, third, fourth, fifth = (power(p) for p in range(PER_BYTE))

    @device_function
    def words(low, low_next, high, high_next, x_at, c, d):
        v = _split(low) + _split(high) + _split(low_next) + _split(high_next)
        c, d = first(v, x_at, c, d)
        c, d = second(v, x_at, c, d)
        c, d = third(v, x_at, c, d)
        c, d = fourth(v, x_at, c, d)
        return fifth(v, x_at, c, d)

    @device_function
    def product(at, beside, x_at, x_stride, extra_at, extra_stride, group, used, lane, acc):
        g, t16 = uint32(lane >> uint32(2)), uint32(uint32(lane & uint32(3)) * uint32(16))
        x_at = uint32(x_at + uint32(min(g, uint32(used - uint32(1)))) * x_stride + group * uint32(640) + t16)
        low, high = ptx.load_shared_4(uint32(at + t16)), ptx.load_shared_4(uint32(at + down + t16))
        zero = uint32(0)
        c, d = (acc[0], acc[1], acc[2], acc[3]), (zero, zero, zero, zero)
        c, d = words(low[0], low[1], high[0], high[1], x_at, c, d)
        c, d = words(low[2], low[3], high[2], high[3], uint32(x_at + uint32(320)), c, d)
        acc[0], acc[1] = added(c[0], d[0]), added(c[1], d[1])
        acc[2], acc[3] = added(c[2], d[2]), added(c[3], d[3])

    return product


def five_trits_half(between):
    down = np.uint32(8 * between)

    @device_function
    def next_digits(v):
        """The first digit of each fraction, and what is left of it, for the eight words."""
        digit, rest = uint32(0x03000300), uint32(0x00FF00FF)
        w = (
            uint32(v[0] * uint32(3)), uint32(v[1] * uint32(3)), uint32(v[2] * uint32(3)), uint32(v[3] * uint32(3)),
            uint32(v[4] * uint32(3)), uint32(v[5] * uint32(3)), uint32(v[6] * uint32(3)), uint32(v[7] * uint32(3)),
        )  # fmt: skip
        return (
            w[0] & digit, w[1] & digit, w[2] & digit, w[3] & digit,
            w[4] & digit, w[5] & digit, w[6] & digit, w[7] & digit,
        ), (
            w[0] & rest, w[1] & rest, w[2] & rest, w[3] & rest, w[4] & rest, w[5] & rest, w[6] & rest, w[7] & rest,
        )  # fmt: skip

    @device_function
    def step(v, x_at, c, d):
        a, v = next_digits(v)
        x = ptx.load_shared_4(x_at)
        c = ptx.mma_half(a[0], a[2], a[1], a[3], x[0], x[1], c[0], c[1], c[2], c[3])
        d = ptx.mma_half(a[4], a[6], a[5], a[7], x[2], x[3], d[0], d[1], d[2], d[3])
        return v, c, d

    @device_function
    def words(low, low_next, high, high_next, x_at, c, d):
        v = _split(low) + _split(high) + _split(low_next) + _split(high_next)
        v, c, d = step(v, x_at, c, d)
        v, c, d = step(v, uint32(x_at + uint32(64)), c, d)
        v, c, d = step(v, uint32(x_at + uint32(128)), c, d)
        v, c, d = step(v, uint32(x_at + uint32(192)), c, d)
        v, c, d = step(v, uint32(x_at + uint32(256)), c, d)
        return c, d

    @device_function
    def product(at, beside, x_at, x_stride, extra_at, extra_stride, group, used, lane, acc):
        g, t16 = uint32(lane >> uint32(2)), uint32(uint32(lane & uint32(3)) * uint32(16))
        x_at = uint32(x_at + uint32(min(g, uint32(used - uint32(1)))) * x_stride + group * uint32(640) + t16)
        low, high = ptx.load_shared_4(uint32(at + t16)), ptx.load_shared_4(uint32(at + down + t16))
        zero = float32(0)
        c, d = (zero, zero, zero, zero), (zero, zero, zero, zero)
        c, d = words(low[0], low[1], high[0], high[1], x_at, c, d)
        c, d = words(low[2], low[3], high[2], high[3], uint32(x_at + uint32(320)), c, d)
        acc[0] += c[0] + d[0]
        acc[1] += c[1] + d[1]
        acc[2] += c[2] + d[2]
        acc[3] += c[3] + d[3]

    return product
