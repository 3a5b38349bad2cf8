"""The parts of one look at a tile, for `sinq.py`: how far do its rows and columns spread, and which step follows?

A block of threads has some rows of a tile in shared memory, as they came, and two vectors of reciprocals,
a = 1 / mu1 for columns and b = 1 / mu2 for rows. The balanced numbers are w · a · b. A row's deviation is b times that
of w · a, a column's a times that of w · b, so each walk multiplies once.

**Every walk is made twice**, first for the mean and then for the squares of what is left of each number without it.
One walk with sum and sum of squares would do as well where means are small; where they are not, the two nearly cancel.

**Sums that were made apart are joined** as Chan, Golub and LeVeque do. Of parts with n_k numbers, sum s_k, and squares
M_k about their own mean:

    mean = Σ s_k / n          squares = Σ M_k + (s_k − n_k mean)² / n_k
"""

import math

import numpy as np

from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.pieces import eight_floats, readers, size_of

from numba import float32, int32, uint32, uint64  # isort: skip

# The method's constants, as in qlearn.methods.sinkhorn (which stands on a higher floor; a test compares them).
STEP = 0.7, 2.0
LOG_MU = -0.3, 10.0
SIGMA = 1e-3, 1e3

_LOW_STEP, _HIGH_STEP = map(np.float32, STEP)
_LOW_LOG, _HIGH_LOG = map(np.float32, LOG_MU)
_LOW_SIGMA, _HIGH_SIGMA = map(np.float32, SIGMA)


class Plan:
    """Where things lie in a block's shared memory, in bytes, and which thread takes what.

    Thread t has row t. Warp w has rows 32w ... 32w + 31, along them as well as down the columns, where each lane has
    two columns. A row of 32 columns takes half a warp, so a warp then reads two rows at a time.
    """

    def __init__(self, kind, group, threads):
        self.kind, self.group, self.threads, self.warps = kind, group, threads, threads // 32
        self.stride = group * size_of(kind) + 16  # of a row; 16 more, lest 8 threads in 8 rows meet in the same banks
        self.lanes = min(32, group // 2)  # to a row, in the walk down columns
        self.at_once = 32 // self.lanes  # rows that a warp reads at a time
        self.record = 2 * group + 2  # floats that a member lays down: of each column sum and squares, of rows extremes
        places = {
            "a": 4 * group,  # 1 / mu1
            "mu1": 4 * group,
            "b": 4 * threads,  # 1 / mu2
            "sums": 4 * self.warps * self.at_once * group,  # of columns, in the rows of a warp
            "squares": 4 * self.warps * self.at_once * group,
            "extremes": 8 * 32,  # the largest and the smallest deviation that a warp has met
            "ticket": 16,
        }
        self.bytes = threads * self.stride
        for name, count in places.items():
            setattr(self, name, self.bytes)
            self.bytes += count


def row_spread(plan):
    """A device function (address of a row, of a, octets of a row) -> the standard deviation of w · a in that row.

    The octets are given, though they are known, so that the compiler does not write the loop out: all the addresses
    in it would take a hundred registers.
    """
    _, eight, _ = readers(plan.kind)
    octet = 8 * size_of(plan.kind)
    one_over_n, one_over_n_1 = np.float32(1 / plan.group), np.float32(1 / (plan.group - 1))

    @device_function
    def spread(row, a, octets):
        even = odd = float32(0)
        at, a_at, end = row, a, uint32(a + uint32(octets) * uint32(32))
        while a_at != end:
            x0, x1, x2, x3, x4, x5, x6, x7 = eight(at)
            a0, a1, a2, a3, a4, a5, a6, a7 = eight_floats(a_at)
            even, odd = ptx.fma(x0, a0, even), ptx.fma(x1, a1, odd)
            even, odd = ptx.fma(x2, a2, even), ptx.fma(x3, a3, odd)
            even, odd = ptx.fma(x4, a4, even), ptx.fma(x5, a5, odd)
            even, odd = ptx.fma(x6, a6, even), ptx.fma(x7, a7, odd)
            at, a_at = uint32(at + uint32(octet)), uint32(a_at + uint32(32))
        m = float32(-(even + odd) * one_over_n)
        even = odd = float32(0)
        at, a_at, end = row, a, uint32(a + uint32(octets) * uint32(32))
        while a_at != end:
            x0, x1, x2, x3, x4, x5, x6, x7 = eight(at)
            a0, a1, a2, a3, a4, a5, a6, a7 = eight_floats(a_at)
            x0, x1, x2, x3 = ptx.fma(x0, a0, m), ptx.fma(x1, a1, m), ptx.fma(x2, a2, m), ptx.fma(x3, a3, m)
            x4, x5, x6, x7 = ptx.fma(x4, a4, m), ptx.fma(x5, a5, m), ptx.fma(x6, a6, m), ptx.fma(x7, a7, m)
            even, odd = ptx.fma(x0, x0, even), ptx.fma(x1, x1, odd)
            even, odd = ptx.fma(x2, x2, even), ptx.fma(x3, x3, odd)
            even, odd = ptx.fma(x4, x4, even), ptx.fma(x5, x5, odd)
            even, odd = ptx.fma(x6, x6, even), ptx.fma(x7, x7, odd)
            at, a_at = uint32(at + uint32(octet)), uint32(a_at + uint32(32))
        return float32(math.sqrt((even + odd) * one_over_n_1))

    return spread


def column_sums(plan):
    """A device function (base, warp, lane, rows of this block) that lays down sums and squares of w · b for this warp.

    They lie in chunks: those of a warp, or of every second row of it.
    """
    _, _, two = readers(plan.kind)
    size, stride, lanes, at_once = size_of(plan.kind), plan.stride, plan.lanes, plan.at_once
    parts = max(1, plan.group // 64)  # of a row: a warp takes 64 columns at a time
    row_bytes, b_bytes, group = stride * at_once, 4 * at_once, plan.group
    B, SUMS, SQUARES = plan.b, plan.sums, plan.squares

    @device_function
    def four_b(at):
        """1 / mu2 of four rows of a chunk."""
        if at_once == 1:
            b0, b1, b2, b3 = ptx.load_shared_4(at)
            return ptx.float_of_bits(b0), ptx.float_of_bits(b1), ptx.float_of_bits(b2), ptx.float_of_bits(b3)
        return (
            ptx.load_shared_float(at),
            ptx.load_shared_float(at + uint32(b_bytes)),
            ptx.load_shared_float(at + uint32(2 * b_bytes)),
            ptx.load_shared_float(at + uint32(3 * b_bytes)),
        )

    @device_function
    def sum_down(at, b, rows):
        """Sums of w · b in two columns, four rows at a time."""
        s0 = s1 = float32(0)
        last, end = (
            uint32(b + uint32(rows // int32(4)) * uint32(4 * b_bytes)),
            uint32(b + uint32(rows) * uint32(b_bytes)),
        )
        while b != last:
            b0, b1, b2, b3 = four_b(b)
            (x0, y0), (x1, y1) = two(at), two(at + uint32(row_bytes))
            (x2, y2), (x3, y3) = two(at + uint32(2 * row_bytes)), two(at + uint32(3 * row_bytes))
            s0, s1 = ptx.fma(x0, b0, s0), ptx.fma(y0, b0, s1)
            s0, s1 = ptx.fma(x1, b1, s0), ptx.fma(y1, b1, s1)
            s0, s1 = ptx.fma(x2, b2, s0), ptx.fma(y2, b2, s1)
            s0, s1 = ptx.fma(x3, b3, s0), ptx.fma(y3, b3, s1)
            at, b = uint32(at + uint32(4 * row_bytes)), uint32(b + uint32(4 * b_bytes))
        while b != end:
            x0, y0 = two(at)
            b0 = ptx.load_shared_float(b)
            s0, s1 = ptx.fma(x0, b0, s0), ptx.fma(y0, b0, s1)
            at, b = uint32(at + uint32(row_bytes)), uint32(b + uint32(b_bytes))
        return s0, s1

    @device_function
    def squares_down(at, b, rows, m0, m1):
        """Sums of squares of w · b + m in two columns."""
        s0 = s1 = float32(0)
        last, end = (
            uint32(b + uint32(rows // int32(4)) * uint32(4 * b_bytes)),
            uint32(b + uint32(rows) * uint32(b_bytes)),
        )
        while b != last:
            b0, b1, b2, b3 = four_b(b)
            (x0, y0), (x1, y1) = two(at), two(at + uint32(row_bytes))
            (x2, y2), (x3, y3) = two(at + uint32(2 * row_bytes)), two(at + uint32(3 * row_bytes))
            x0, x1, x2, x3 = ptx.fma(x0, b0, m0), ptx.fma(x1, b1, m0), ptx.fma(x2, b2, m0), ptx.fma(x3, b3, m0)
            y0, y1, y2, y3 = ptx.fma(y0, b0, m1), ptx.fma(y1, b1, m1), ptx.fma(y2, b2, m1), ptx.fma(y3, b3, m1)
            s0, s1 = ptx.fma(x0, x0, s0), ptx.fma(y0, y0, s1)
            s0, s1 = ptx.fma(x1, x1, s0), ptx.fma(y1, y1, s1)
            s0, s1 = ptx.fma(x2, x2, s0), ptx.fma(y2, y2, s1)
            s0, s1 = ptx.fma(x3, x3, s0), ptx.fma(y3, y3, s1)
            at, b = uint32(at + uint32(4 * row_bytes)), uint32(b + uint32(4 * b_bytes))
        while b != end:
            x0, y0 = two(at)
            b0 = ptx.load_shared_float(b)
            x0, y0 = ptx.fma(x0, b0, m0), ptx.fma(y0, b0, m1)
            s0, s1 = ptx.fma(x0, x0, s0), ptx.fma(y0, y0, s1)
            at, b = uint32(at + uint32(row_bytes)), uint32(b + uint32(b_bytes))
        return s0, s1

    @device_function
    def lay_down(base, warp, lane, here):
        sub = lane // uint32(lanes)  # which of the rows that the warp reads at a time
        rows = rows_of_chunk(here, warp * uint32(at_once) + sub, at_once)
        first = warp * uint32(32) + sub
        one_over_n = float32(1) / float32(max(rows, int32(1)))
        for part in range(parts):
            column = uint32(part * 64) + (lane % uint32(lanes)) * uint32(2)
            at = base + first * uint32(stride) + column * uint32(size)
            b = base + uint32(B) + first * uint32(4)
            s0, s1 = sum_down(at, b, rows)
            q0, q1 = squares_down(at, b, rows, -s0 * one_over_n, -s1 * one_over_n)
            place = base + ((warp * uint32(at_once) + sub) * uint32(group) + column) * uint32(4)
            ptx.store_shared_float(place + uint32(SUMS), s0)
            ptx.store_shared_float(place + uint32(SUMS + 4), s1)
            ptx.store_shared_float(place + uint32(SQUARES), q0)
            ptx.store_shared_float(place + uint32(SQUARES + 4), q1)

    return lay_down


@device_function
def rows_of_chunk(here, chunk, at_once):
    """How many of the `here` rows of a block belong to a chunk, int32."""
    in_warp = min(max(int32(here) - int32(chunk) // int32(at_once) * int32(32), int32(0)), int32(32))
    return int32((in_warp - int32(chunk) % int32(at_once) + int32(at_once - 1)) // int32(at_once))


def join_chunks(plan):
    """A device function (base, column, rows of this block) -> sum and squares of w · b in this block."""
    at_once, down = plan.at_once, 4 * plan.group
    full = np.float32(32 // at_once)  # rows of a whole chunk
    one_over_full, SUMS, SQUARES = np.float32(at_once / 32), plan.sums, plan.squares

    @device_function
    def join(base, column, here):
        place = base + column * uint32(4)
        whole = uint32(place + uint32(here // int32(32) * int32(at_once)) * uint32(down))
        end = uint32(place + uint32((here + int32(31)) // int32(32) * int32(at_once)) * uint32(down))
        total, squares, at = float32(0), float32(0), place
        while at != end:
            total += ptx.load_shared_float(at + uint32(SUMS))
            at = uint32(at + uint32(down))
        mean, at = total / float32(here), place
        while at != whole:
            off = ptx.fma(-mean, full, ptx.load_shared_float(at + uint32(SUMS)))
            squares += ptx.fma(off * off, one_over_full, ptx.load_shared_float(at + uint32(SQUARES)))
            at = uint32(at + uint32(down))
        sub = int32(0)
        while at != end:  # the last rows, fewer than 32
            rows = float32(max((here % int32(32) - sub + int32(at_once - 1)) // int32(at_once), int32(0)))
            off = ptx.load_shared_float(at + uint32(SUMS)) - rows * mean
            squares += off * off / ptx.max_float(rows, float32(1)) + ptx.load_shared_float(at + uint32(SQUARES))
            at, sub = uint32(at + uint32(down)), int32(sub + int32(1))
        return total, squares

    return join


def join_members(plan):
    """A device function (address of this column's sum in the first record, members, their rows, rows of the tile) ->
    the standard deviation of w · b in the tile."""
    record, squares_at = 4 * plan.record, 4 * plan.group

    @device_function
    def off_mean(at, rows, mean):
        """Squares about the mean, of the rows of one member."""
        off = ptx.fma(-mean, rows, ptx.load_fresh(at))
        return ptx.fma(off, off / rows, ptx.load_fresh(at + uint64(squares_at)))

    @device_function
    def join(first, members, per_block, band_rows):
        total, at, last = float32(0), first, uint64(first + uint64(uint32(members - int32(1)) * uint32(record)))
        while at != last:
            total += ptx.load_fresh(at)
            at = uint64(at + uint64(record))
        mean = (total + ptx.load_fresh(last)) / float32(band_rows)
        squares, at, rows = float32(0), first, float32(per_block)
        while at != last:
            squares += off_mean(at, rows, mean)
            at = uint64(at + uint64(record))
        squares += off_mean(last, float32(band_rows - per_block * int32(members - int32(1))), mean)
        return float32(math.sqrt(squares / float32(int32(band_rows - int32(1)))))

    return join


@device_function
def extremes_of_warp(largest, smallest):
    """The largest and the smallest of what the lanes of a warp bring."""
    for turn in range(5):
        distance = uint32(16) >> uint32(turn)
        largest = ptx.max_float(largest, ptx.shuffle_xor_float(largest, distance))
        smallest = ptx.min_float(smallest, ptx.shuffle_xor_float(smallest, distance))
    return largest, smallest


@device_function
def target_of(smallest):
    """The deviation that all others are brought down to; smallest: the smallest of the tile as it came."""
    return ptx.min_float(ptx.max_float(smallest, _LOW_SIGMA), _HIGH_SIGMA) + float32(1e-6)


@device_function
def next_log(u, sigma, target):
    """The logarithm of a scale after a step."""
    factor = ptx.min_float(ptx.max_float(sigma, _LOW_SIGMA), _HIGH_SIGMA) / target
    factor = ptx.min_float(ptx.max_float(factor, _LOW_STEP), _HIGH_STEP)
    return ptx.min_float(ptx.max_float(u + float32(math.log(factor)), _LOW_LOG), _HIGH_LOG)
