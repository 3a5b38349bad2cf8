"""The warps of `row_stream.py` that do not multiply: how slices of rows are asked for, and how sums are added up.

Who waits for whom is said by barriers in shared memory. A barrier goes through phases, 0, 1, 2, ...; one waits for the
end of a phase by whether its number is even or odd.

    full      of each stage     a phase ends when both loaders have asked and all bytes are there
    empty     of each stage     ... when every multiplier has done with what was in it
    summed    of two buffers    ... when every multiplier has left its sums of a tile; tiles take turns
    added     of two buffers    ... when the adder has read them
"""

from qlearn.kernels.cuda import device_function, ptx

from numba import float32, int32, uint32, uint64  # isort: skip - after qlearn.kernels.cuda has chosen

ROWS = 16  # of a tile
LOADERS = 2
EACH = ROWS // LOADERS
COLUMNS = 8  # of the input, in one multiplication of a tensor core
MAX_STAGES = 16
# where things lie in shared memory, in bytes
FULL, EMPTY, SUMMED, ADDED, FACTORS, LARGEST, TOTALS, SUMS = 0, 128, 256, 272, 288, 320, 1344, 2432


def load_slice(recipe, slice_groups, between):
    """A device function: a loader asks for its rows of a slice; fewer where the matrix ends, to the right and below."""
    first_piece, second_piece = (*recipe.pieces, 0)[:2]
    two = second_piece > 0

    @device_function
    def copies(to, source, size, row_bytes, count, bar):
        if count == uint32(EACH):  # nearly always: then there is no loop
            for _ in range(EACH):
                ptx.copy_bulk(to, source, size, bar)
                to, source = uint32(to + uint32(between)), source + row_bytes
        else:
            for _ in range(count):
                ptx.copy_bulk(to, source, size, bar)
                to, source = uint32(to + uint32(between)), source + row_bytes

    @device_function
    def load(weights, beside, base, ring, stage, tile, part, groups, N, from_row):
        here = uint32(min(uint32(groups - part * uint32(slice_groups)), uint32(slice_groups)))
        row = uint32(tile * uint32(ROWS) + from_row)
        count = uint32(0)
        if row < uint32(N):
            count = uint32(min(uint32(uint32(N) - row), uint32(EACH)))
        bar = uint32(base + uint32(FULL) + stage * uint32(8))
        to = uint32(ring + stage * uint32(ROWS * between) + from_row * uint32(between))
        ptx.barrier_expect(bar, uint32(count * here * uint32(first_piece + second_piece)))
        row_bytes = uint64(uint32(groups * uint32(first_piece)))
        source = ptx.global_address(weights) + uint64(row) * row_bytes
        source += uint64(uint32(part * uint32(slice_groups * first_piece)))
        copies(to, source, uint32(here * uint32(first_piece)), row_bytes, count, bar)
        if two:
            to = uint32(to + uint32(slice_groups * first_piece))
            row_bytes = uint64(uint32(groups * uint32(second_piece)))
            source = ptx.global_address(beside) + uint64(row) * row_bytes
            source += uint64(uint32(part * uint32(slice_groups * second_piece)))
            copies(to, source, uint32(here * uint32(second_piece)), row_bytes, count, bar)

    return load


def hand_over(recipe, warps):
    """A device function: a multiplier leaves its sums of 16 rows to the adder, once those before last are added up."""
    columns, warp_bytes = recipe.columns, ROWS * recipe.columns * 4
    store = ptx.store_shared_1 if recipe.whole else ptx.store_shared_float
    number = uint32 if recipe.whole else float32

    @device_function
    def give(base, n, warp, lane, acc):
        buffer, g, t = uint32(n & uint32(1)), uint32(lane >> uint32(2)), uint32(lane & uint32(3))
        if n >= uint32(2):
            free = uint32(base + uint32(ADDED) + buffer * uint32(8))
            turn = uint32(uint32(uint32(n >> uint32(1)) - uint32(1)) & uint32(1))
            if lane == uint32(0):
                while ptx.barrier_done(free, turn) == uint32(0):
                    pass
            ptx.sync_warp()
        if columns < 8:  # the lanes of a row hold parts of the same sums
            for i in range(4):
                acc[i] += ptx.shuffle_xor_float(acc[i], uint32(2))
        if columns < 4:
            for i in range(4):
                acc[i] += ptx.shuffle_xor_float(acc[i], uint32(1))
        to = uint32(base + uint32(SUMS) + uint32(buffer * uint32(warps) + warp) * uint32(warp_bytes))
        to = uint32(to + g * uint32(columns * 4) + t * uint32(8))
        if columns == 1:
            if t == uint32(0):
                store(to, number(acc[0]))
                store(uint32(to + uint32(32)), number(acc[2]))
        elif t < uint32(columns // 2):
            store(to, number(acc[0]))
            store(uint32(to + uint32(4)), number(acc[1]))
            store(uint32(to + uint32(columns * 32)), number(acc[2]))
            store(uint32(to + uint32(columns * 32 + 4)), number(acc[3]))
        ptx.sync_warp()
        if lane == uint32(0):
            ptx.barrier_expect(uint32(base + uint32(SUMMED) + buffer * uint32(8)), uint32(0))

    return give


def add_up(recipe, warps):
    """A device function: the adder waits for the sums of all multipliers, and writes 16 rows of y."""
    columns, parts, y_bytes, whole = recipe.columns, recipe.parts, recipe.y_bytes, recipe.whole
    finish, store = recipe.finish, recipe.store

    @device_function
    def column_sum(at):
        if whole:
            total = int32(0)
            for w in range(warps):
                total += int32(ptx.load_shared_1(uint32(at + uint32(w * ROWS * columns * 4))))
            return total
        total = float32(0)
        for w in range(warps):
            total += ptx.load_shared_float(uint32(at + uint32(w * ROWS * columns * 4)))
        return total

    @device_function
    def take(base, n, tile, lane, y, scale, N, tokens):
        buffer = uint32(n & uint32(1))
        ready = uint32(base + uint32(SUMMED) + buffer * uint32(8))
        if lane == uint32(0):
            while ptx.barrier_done(ready, uint32(uint32(n >> uint32(1)) & uint32(1))) == uint32(0):
                pass
        ptx.sync_warp()
        sums = uint32(base + uint32(SUMS) + buffer * uint32(warps * ROWS * columns * 4))
        i = lane
        while i < uint32(uint32(tokens) * uint32(ROWS)):
            row, token = uint32(i & uint32(15)), uint32(i >> uint32(4))
            at = uint32(sums + row * uint32(columns * 4) + token * uint32(parts * 4))
            first = column_sum(at)
            second = column_sum(uint32(at + uint32(4))) if parts == 2 else first
            place = uint32(tile * uint32(ROWS) + row)
            if place < uint32(N):
                value = finish(first, second, base, token, scale)
                store(ptx.global_address(y) + uint64(uint32(token * uint32(N) + place)) * uint64(y_bytes), value)
            i = uint32(i + uint32(32))
        ptx.sync_warp()
        if lane == uint32(0):
            ptx.barrier_expect(uint32(base + uint32(ADDED) + buffer * uint32(8)), uint32(0))

    return take
