"""A few vectors times a matrix of 2, 3, 4 or 8 bits: y = x W^T for up to 32 rows of x.

When a language model writes, each token needs every weight once, for one multiplication and one addition. So the time
is that of reading the weights, and the arithmetic only has to keep out of the way. A matrix of 28,672 x 8,192 with 4
bits and a scale for 128 weights is 121 MB; at 4.1 TB/s that is 29.3 µs.

The weights lie in units of 16 rows by 128 inputs (`layout.py`). A block takes every 132nd tile of 16 rows (on a GPU
with 132 multiprocessors), and has warps of three kinds:

**One warp fetches.** Shared memory holds a ring of stages, of 16 units each. A single lane asks for the copy of the
next units into a stage that is empty (`cp.async.bulk`); the copy runs by itself and reports to a barrier. So 50 to 100
kB a multiprocessor are always on the way, with hardly an instruction spent.

**Eight or sixteen warps multiply.** Each takes its units of a stage as soon as it is full, and says when it has read
them. The tensor core multiplies 16 x 16 numbers of the weight with 16 x 8 of the input, both in half precision, and
adds up in float32. With a single vector seven of the eight columns are wasted; that costs nothing, since the memory is
slower anyway. The codes become numbers by two instructions for two codes (`numbers.py`). What is multiplied by the
scale of a group are sums in float32: the scale never has to fit the half precision.

**One warp finishes.** The warps of a block share the inputs of a tile, so each ends with sums of a part of them. They
go to shared memory, the last warp adds them up and writes y, and the others are at the next tile by then. Nowhere does
a warp wait for all others.

The last warp also has x copied to shared memory at the beginning. If x is too long for that, the inputs are cut in
slices, and a block works on one of them; a second, small kernel adds up.

**Overlap.** Nothing of the weights depends on the kernel before. So with `overlap` a block begins to fill its ring
while that one still runs, and waits for it only before it reads x. The weights must be complete before the first of a
row of such launches begins.

The same kernel serves M from 1 to 8; for 16 and 32 only the number of column tiles changes.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.launch import OPT_IN_SHARED, Kernel, multiprocessors, registers_for
from qlearn.kernels.cuda.layout import INPUTS, ROWS, unit_bytes
from qlearn.kernels.cuda.numbers import constant_offsets, moved_by, numbers_of, offsets_of, words_of

from numba import cuda, float32, int32, types, uint32, uint64  # isort: skip - after qlearn.kernels.cuda has chosen

MAX_ROWS = 32
CAPABILITY = (9, 0)
COLUMNS = 8  # of the input, in one multiplication of a tensor core
PADDED = 20  # floats for the sums of 16 rows: so the lanes of a warp write to different banks
SHARED_MOST = OPT_IN_SHARED[CAPABILITY] * 1024


def matmul(x, units, overlap=False):
    """x W^T.

    x: float16 or bfloat16 (M, columns), 1 <= M <= 32.  units: Units (rows, columns), on the same device.
    overlap: see the top.
    Returns (M, rows) in the dtype of x.
    Raises ValueError for another dtype or shape.
    """
    y = torch.empty(len(x), units.shape[0], dtype=x.dtype, device=x.device)
    prepare(x, units, y, overlap=overlap)()
    return y


def prepare(x, units, y, plan=None, overlap=False):
    """A function without arguments that computes y = x W^T, as often as it is called. The arguments as for `matmul`."""
    plan = plan_for(x, units) if plan is None else plan
    M, N, K, slices = len(x), *units.shape, plan.slices
    to = y if slices == 1 else torch.empty(slices, M, N + -N % ROWS, dtype=torch.float32, device=x.device)
    factors = units.data[:4].view(torch.float32) if units.column_scales is None else units.column_scales
    row_units, row_tiles = -(-K // INPUTS), -(-N // ROWS)
    product = kernel(plan.form).prepare(
        plan.blocks, units.data, x, factors, to, N, K, M,
        row_units, -(-row_units // slices), *divmod(row_tiles, plan.blocks // slices), slices, int(overlap),
        overlap=overlap, shared_bytes=plan.shared_bytes,
    )  # fmt: skip
    if slices == 1:
        return product
    sum_up = add_slices(plan.form.bfloat).prepare(-(-(N + -N % ROWS) * M // 1024), to, y, N, M, slices, overlap=overlap)

    def both():
        product()
        sum_up()

    return both


class Form(NamedTuple):
    """What a kernel is compiled for.

    bits, group, zeros: as in Units.  bfloat: bfloat16 instead of float16.  scaled: the input is multiplied by column
    scales.  tiles: column tiles of 8 rows of x: 1, 2 or 4.  warps: that multiply.  per_stage: units in a stage.
    stages: in the ring.  sliced: a block sees only a slice of the inputs.
    """

    bits: int
    group: int
    zeros: str | None
    bfloat: bool
    scaled: bool
    tiles: int
    warps: int
    per_stage: int
    stages: int
    sliced: bool = False


class Plan(NamedTuple):
    """How a product is carried out. blocks: a multiple of slices.  shared_bytes: for a block."""

    form: Form
    blocks: int
    slices: int
    shared_bytes: int


def plan_for(x, units, warps=None, per_stage=None, stages=None, slices=None, per_multiprocessor=None):
    """The Plan for a product; what is not given is chosen."""
    _check(x, units)
    M, tiles, row_units, row_tiles = len(x), 1, -(-units.shape[1] // INPUTS), -(-units.shape[0] // ROWS)
    while tiles * COLUMNS < M:
        tiles *= 2
    usual = _USUAL[tiles if M > 2 else 0]
    warps, per_stage = warps or usual.warps, per_stage or usual.per_stage
    if per_stage != warps and per_stage % (2 * warps):  # a warp takes one unit of a stage, or two by two
        raise ValueError(f"per_stage={per_stage} with {warps} warps; pass {warps} or a multiple of {2 * warps}")
    form = Form(
        units.bits, units.group, units.zeros, x.dtype == torch.bfloat16, units.column_scales is not None, tiles,
        warps, per_stage, stages or max(2, usual.bytes_ahead // (per_stage * units.unit_bytes)),
    )  # fmt: skip
    side_by_side = per_multiprocessor or usual.side_by_side
    for count in [1, 2, 4, 8, 16, 32] if slices is None else [slices]:
        part_units = -(-row_units // count)
        shared = _shared(form).x + M * _row_bytes(part_units)
        if count <= row_units and shared * side_by_side <= SHARED_MOST:
            used = -(-row_units // part_units)  # with 5 units and 4 slices, the first 3 have all
            teams = min(max(1, multiprocessors() * side_by_side // used), row_tiles)
            return Plan(form._replace(sliced=used > 1), teams * used, used, shared)
    raise ValueError(f"{M} rows of {units.shape[1]} numbers do not fit into shared memory; pass fewer rows")


class _Usual(NamedTuple):
    """What was fastest (`NOTES.md`). bytes_ahead: of the ring.  side_by_side: blocks on a multiprocessor."""

    warps: int
    per_stage: int
    bytes_ahead: int
    side_by_side: int


_USUAL = {  # by column tiles; 0 for one or two rows of x
    0: _Usual(8, 16, 51_000, 2),
    1: _Usual(16, 32, 102_000, 1),
    2: _Usual(16, 16, 51_000, 1),
    4: _Usual(8, 16, 51_000, 1),
}


def _check(x, units):
    if x.dtype not in (torch.float16, torch.bfloat16) or x.dim() != 2 or x.shape[1] != units.shape[1]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; pass float16 or bfloat16 (M, {units.shape[1]})")
    if not 1 <= len(x) <= MAX_ROWS or not x.is_contiguous():
        raise ValueError(f"x has {len(x)} rows, strides {x.stride()}; pass 1 to {MAX_ROWS} contiguous rows")
    if x.device != units.data.device:
        raise ValueError(f"x is on {x.device} and the weight on {units.data.device}; move one of them")
    if x.data_ptr() % 16:
        raise ValueError("x begins at an address that is no multiple of 16, where it cannot be copied from; clone it")


class _Shared(NamedTuple):
    """Where in shared memory things begin, in bytes: the ring at 0, then these."""

    sums: int  # of the warps
    full: int  # barriers, 8 bytes each: a stage is there
    empty: int  # a stage has been read
    sums_full: int  # the sums of all warps are there
    sums_empty: int  # they have been read
    x_full: int  # the input is there
    x_scaled: int  # it has been multiplied by the column scales
    x: int


def _shared(form):
    """The places in shared memory."""
    sums = form.stages * form.per_stage * unit_bytes(form.bits, form.group, form.zeros)
    full = sums + _buffers(form) * _sums_bytes(form)
    empty = full + 8 * form.stages
    sums_full = empty + 8 * form.stages
    sums_empty = sums_full + 8 * _buffers(form)
    x_full = sums_empty + 8 * _buffers(form)
    x = x_full + 16
    return _Shared(sums, full, empty, sums_full, sums_empty, x_full, x_full + 8, x + -x % 16)


def _buffers(form):
    """How often there is room for the sums of the warps."""
    return 2 if form.tiles <= 2 else 1


def _sums_bytes(form):
    """Bytes of the sums of the warps: of 16 rows for each row of x."""
    return form.warps * COLUMNS * form.tiles * PADDED * 4


def _row_bytes(units):
    """Bytes from one row of x in shared memory to the next: so that two rows begin in different banks."""
    return units * 256 + 64


@functools.cache
def kernel(form):
    """The kernel of a form: (units, x, column_scales, y, N, K, M, how the work is shared) -> y."""
    warps, stages, at, unit = form.warps, form.stages, _shared(form), unit_bytes(form.bits, form.group, form.zeros)
    full_at, empty_at, buffers = at.full, at.empty, _buffers(form)
    sums_full_at, sums_empty_at = at.sums_full, at.sums_empty
    x_full_at, x_scaled_at, ask_for_x, fill_up = at.x_full, at.x_scaled, _ask_for_x(form), _fill_up(form)
    fetch_stages, multiply_tiles, finish_tiles = _fetch_stages(form), _multiply_tiles(form), _finish_tiles(form)
    forever = 2**31 - 1

    def matmul(units, x, column_scales, y, N, K, M, row_units, part_units, tiles, more_tiles, slices, overlap):
        shared = cuda.shared.array(0, uint32)
        base = ptx.shared_address(shared)
        thread = uint32(cuda.threadIdx.x)
        lane, warp = thread & uint32(31), thread >> uint32(5)
        # the slice of this block, and its tiles: some blocks have one more
        team, part, teams = uint32(cuda.blockIdx.x), uint32(0), uint32(cuda.gridDim.x)
        if form_sliced:
            part = uint32(team % uint32(slices))
            team, teams = uint32(team // uint32(slices)), uint32(teams // uint32(slices))
        first_unit = uint32(part * uint32(part_units))
        count = uint32(min(uint32(part_units), uint32(uint32(row_units) - first_unit)))
        mine = int32(tiles + int32(team < uint32(more_tiles)))
        tile_bytes = uint64(row_units) * uint64(unit)
        source = ptx.global_address(units) + uint64(team) * tile_bytes + uint64(first_unit) * uint64(unit)
        step = uint64(teams) * tile_bytes
        if warp == uint32(warps) and lane == uint32(0):
            for s in range(stages):
                ptx.barrier_init(uint32(base + uint32(full_at + 8 * s)), uint32(1))
            ptx.barriers_visible()
            fetch_stages(source, step, count, base, mine, int32(0), int32(stages))
        if warp == uint32(warps + 1):
            fill_up(base, first_unit, count, lane, K, M)
        if warp == uint32(warps + 1) and lane == uint32(0):
            ptx.barrier_init(uint32(base + uint32(x_full_at)), uint32(1))
            ptx.barriers_visible()
            if overlap == int32(0):
                ask_for_x(x, base, first_unit, count, K, M)
            ptx.barrier_init(uint32(base + uint32(x_scaled_at)), uint32(warps))
            for s in range(stages):
                ptx.barrier_init(uint32(base + uint32(empty_at + 8 * s)), uint32(warps))
            for b in range(buffers):
                ptx.barrier_init(uint32(base + uint32(sums_full_at + 8 * b)), uint32(warps))
                ptx.barrier_init(uint32(base + uint32(sums_empty_at + 8 * b)), uint32(1))
        ptx.let_next_kernel_start()
        cuda.syncthreads()
        if warp < uint32(warps):
            multiply_tiles(column_scales, base, warp, lane, K, M, mine, first_unit, count)
        elif warp == uint32(warps):
            if lane == uint32(0):
                fetch_stages(source, step, count, base, mine, int32(stages), int32(forever))
        else:
            ptx.wait_for_last_kernel()
            if overlap != int32(0) and lane == uint32(0):
                ask_for_x(x, base, first_unit, count, K, M)
            finish_tiles(y, base, lane, N, M, mine, team, teams, part)

    form_sliced, threads = form.sliced, (warps + 2) * 32
    matmul.__name__ = f"matmul_w{form.bits}g{form.group}_{'bf16' if form.bfloat else 'fp16'}_m{8 * form.tiles}"
    side_by_side = 2 if form.tiles == 1 and warps <= 8 else 1
    return Kernel(matmul, threads, registers=registers_for(warps + 2, side_by_side), needs=CAPABILITY)


def _fetch_stages(form):
    """A device function, for one thread: ask for the copies of stages number `begin` to `end`, in the order of need.

    A stage is some units of a tile; the last of a tile may be shorter.
    """
    at, stages = _shared(form), form.stages
    full_at, empty_at, stage_bytes = at.full, at.empty, form.per_stage * unit_bytes(form.bits, form.group, form.zeros)
    unit = unit_bytes(form.bits, form.group, form.zeros)

    @device_function
    def fetch_stages(source, step, count, base, mine, begin, end):
        number, stage, turn, part_bytes = int32(0), uint32(0), uint32(1), uint32(count * uint32(unit))
        for _ in range(mine):
            offset = uint32(0)
            while offset < part_bytes:
                if number >= end:
                    return
                if number >= begin:
                    if begin > int32(0):
                        bar = uint32(base + uint32(empty_at) + stage * uint32(8))
                        while ptx.barrier_done(bar, turn) == uint32(0):
                            pass
                    size = uint32(min(uint32(part_bytes - offset), uint32(stage_bytes)))
                    bar = uint32(base + uint32(full_at) + stage * uint32(8))
                    ptx.barrier_expect(bar, size)
                    ptx.copy_bulk(uint32(base + stage * uint32(stage_bytes)), source + uint64(offset), size, bar)
                offset = uint32(offset + uint32(stage_bytes))
                number = int32(number + int32(1))
                stage = uint32(stage + uint32(1))
                if stage == uint32(stages):
                    stage = uint32(0)
                    turn = uint32(turn ^ uint32(1))
            source = source + step

    return fetch_stages


def _multiply_tiles(form):
    """A device function: what the multiplying warps do."""
    at, per_stage, stages = _shared(form), form.per_stage, form.stages
    unit = unit_bytes(form.bits, form.group, form.zeros)
    full_at, empty_at, x_at, no_sums = at.full, at.empty, at.x, (np.float32(0),) * (4 * form.tiles)
    await_x, stage_product, hand_over = _await_x(form), _stage_product(form), _hand_over(form)

    @device_function
    def multiply_tiles(column_scales, base, warp, lane, K, M, mine, first_unit, count):
        x_stride = uint32(count * uint32(256) + uint32(64))
        await_x(column_scales, base, warp, lane, K, M, first_unit, count)
        stage, turn = uint32(0), uint32(0)
        for n in range(mine):
            acc = no_sums
            left = int32(int32(count) - int32(warp))
            xa = uint32(base + uint32(x_at) + warp * uint32(256))
            while left > int32(-int32(warp)):
                while ptx.barrier_done(uint32(base + uint32(full_at) + stage * uint32(8)), turn) == uint32(0):
                    pass
                here = uint32(base + stage * uint32(per_stage * unit) + warp * uint32(unit))
                acc = stage_product(here, xa, x_stride, lane, M, left, acc)
                xa = uint32(xa + uint32(per_stage * 256))
                left = int32(left - int32(per_stage))
                ptx.sync_warp()
                if lane == uint32(0):
                    ptx.barrier_arrive(uint32(base + uint32(empty_at) + stage * uint32(8)))
                stage = uint32(stage + uint32(1))
                if stage == uint32(stages):
                    stage = uint32(0)
                    turn = uint32(turn ^ uint32(1))
            hand_over(base, uint32(n), warp, lane, M, acc)

    return multiply_tiles


def _ask_for_x(form):
    """A device function, for one thread: ask for the copies of this slice of the input."""
    x_full_at, x_at = _shared(form).x_full, _shared(form).x

    @device_function
    def ask_for_x(x, base, first_unit, count, K, M):
        begin = uint32(first_unit * uint32(128))
        row_bytes = uint32(uint32(min(uint32(uint32(K) - begin), uint32(count * uint32(128)))) * uint32(2))
        source = ptx.global_address(x) + uint64(begin) * uint64(2)
        bar = uint32(base + uint32(x_full_at))
        ptx.barrier_expect(bar, uint32(uint32(M) * row_bytes))
        for row in range(M):
            to = uint32(base + uint32(x_at) + uint32(row) * (count * uint32(256) + uint32(64)))
            ptx.copy_bulk(to, source + uint64(row) * uint64(K) * uint64(2), row_bytes, bar)

    return ask_for_x


def _fill_up(form):
    """A device function, for a warp: zeros behind the last numbers of the input, up to a whole unit."""
    x_at = _shared(form).x

    @device_function
    def fill_up(base, first_unit, count, lane, K, M):
        row_end = uint32(count * uint32(256))
        at = uint32(uint32(uint32(K) - first_unit * uint32(128)) * uint32(2) + lane * uint32(16))  # 240 bytes at most
        if at < row_end:
            for row in range(M):
                to = uint32(base + uint32(x_at) + uint32(row) * (row_end + uint32(64)) + at)
                ptx.store_shared_4(to, uint32(0), uint32(0), uint32(0), uint32(0))

    return fill_up


def _await_x(form):
    """A device function: wait until the input is there, and multiply the column scales in."""
    at, threads, scaled, multiplied = _shared(form), form.warps * 32, form.scaled, _multiplied(form.bfloat)
    x_full_at, x_scaled_at, x_at = at.x_full, at.x_scaled, at.x

    @device_function
    def await_x(column_scales, base, warp, lane, K, M, first_unit, count):
        while ptx.barrier_done(uint32(base + uint32(x_full_at)), uint32(0)) == uint32(0):
            pass
        if scaled:
            begin, row_end = uint32(first_unit * uint32(128)), uint32(count * uint32(256))
            row_bytes = uint32(min(uint32(uint32(uint32(K) - begin) * uint32(2)), row_end))
            factors = ptx.global_address(column_scales) + uint64(begin) * uint64(4)
            for row in range(M):
                at = uint32((warp * uint32(32) + lane) * uint32(16))
                while at < row_bytes:
                    to = uint32(base + uint32(x_at) + uint32(row) * (row_end + uint32(64)) + at)
                    v = multiplied(ptx.load_shared_4(to), factors + uint64(at) * uint64(2))
                    ptx.store_shared_4(to, v[0], v[1], v[2], v[3])
                    at = uint32(at + uint32(threads * 16))
            ptx.sync_warp()
            if lane == uint32(0):
                ptx.barrier_arrive(uint32(base + uint32(x_scaled_at)))
            while ptx.barrier_done(uint32(base + uint32(x_scaled_at)), uint32(0)) == uint32(0):
                pass

    return await_x


def _multiplied(bfloat):
    """A device function: eight numbers of half precision times eight float32."""
    floats_of = ptx.floats_of_b2 if bfloat else ptx.floats_of_h2
    pair_of = ptx.b2_of_floats if bfloat else ptx.h2_of_floats

    @device_function
    def multiplied(v, factors):
        f, h = ptx.load_4(factors), ptx.load_4(factors + uint64(16))
        v0, v1, v2, v3 = floats_of(v[0]), floats_of(v[1]), floats_of(v[2]), floats_of(v[3])
        return (
            pair_of(v0[0] * ptx.float_of_bits(f[0]), v0[1] * ptx.float_of_bits(f[1])),
            pair_of(v1[0] * ptx.float_of_bits(f[2]), v1[1] * ptx.float_of_bits(f[3])),
            pair_of(v2[0] * ptx.float_of_bits(h[0]), v2[1] * ptx.float_of_bits(h[1])),
            pair_of(v3[0] * ptx.float_of_bits(h[2]), v3[1] * ptx.float_of_bits(h[3])),
        )

    return multiplied


def _stage_product(form):
    """A device function: what a warp does with its units of a stage, of which there may be fewer at the end of a tile.

    The codes of the next unit are fetched before the last one is used, so that a warp never waits for them.
    """
    warps, unit = form.warps, unit_bytes(form.bits, form.group, form.zeros)
    fetch, unit_product, rounds = words_of(form.bits), _unit_product(form), form.per_stage // form.warps
    if rounds == 1:

        @device_function
        def stage_product(at, xa, x_stride, lane, M, left, acc):
            if left > int32(0):
                acc = unit_product(fetch(at, lane), at, xa, x_stride, lane, M, acc)
            return acc

    else:

        @device_function
        def stage_product(at, xa, x_stride, lane, M, left, acc):
            for _ in range(rounds // 2):
                other = uint32(at + uint32(warps * unit))
                words, more = fetch(at, lane), fetch(other, lane)
                if left > int32(0):
                    acc = unit_product(words, at, xa, x_stride, lane, M, acc)
                if left > int32(warps):
                    acc = unit_product(more, other, uint32(xa + uint32(warps * 256)), x_stride, lane, M, acc)
                at, xa = uint32(other + uint32(warps * unit)), uint32(xa + uint32(2 * warps * 256))
                left = int32(left - int32(2 * warps))
            return acc

    return stage_product


def _unit_product(form):
    """A device function: what a warp does with a unit. It returns acc, 4 sums for each column tile."""
    one, two, three, four = (_quarter(form, j) for j in range(4))
    nothing, scales_at = (np.float32(0),) * (8 * form.tiles), ROWS * INPUTS * form.bits // 8

    @device_function
    def unit_product(words, at, xa, x_stride, lane, M, acc):
        g = uint32(lane >> uint32(2))
        xa = uint32(xa + uint32(lane & uint32(3)) * uint32(16))
        at = uint32(at + uint32(scales_at) + g * uint32(2))
        group = float32(0), float32(0)
        acc, part, group = one(words, at, xa, g, x_stride, M, acc, nothing, group)
        acc, part, group = two(words, at, xa, g, x_stride, M, acc, part, group)
        acc, part, group = three(words, at, xa, g, x_stride, M, acc, part, group)
        acc, part, group = four(words, at, xa, g, x_stride, M, acc, part, group)
        return acc

    return unit_product


def _quarter(form, j):
    """A device function: the inputs 32 j ... 32 j + 31 of a unit.

    part: the sums of a group so far.  group: its scales for the two rows of the lane.
    """
    bits, bfloat, nothing = form.bits, form.bfloat, (np.float32(0),) * (8 * form.tiles)
    multiply, add = _columns(form)
    of_group = 4 * form.group // INPUTS  # how many quarters share a scale
    begins, ends, scale_at, x_at = j % of_group == 0, (j + 1) % of_group == 0, j // of_group * 32, j * 64
    zeros_at = INPUTS // form.group * ROWS * 2  # behind the scales
    low_numbers, high_numbers = numbers_of(bits, bfloat, 0, j), numbers_of(bits, bfloat, 1, j)
    has_zeros, exact, constants = form.zeros is not None, form.zeros != "float", constant_offsets(bits, bfloat)
    offsets, moved = offsets_of(bits, bfloat), moved_by(bfloat)
    pair_of = ptx.b2_of_floats if bfloat else ptx.h2_of_floats

    @device_function
    def quarter(words, at, xa, g, x_stride, M, acc, part, group):
        place = uint32(at + uint32(scale_at))
        if begins:
            low, high = ptx.load_shared_half(place), ptx.load_shared_half(uint32(place + uint32(16)))
            group = low, high
            part = nothing
        if has_zeros:
            zero_low = ptx.load_shared_half(uint32(place + uint32(zeros_at)))
            zero_high = ptx.load_shared_half(uint32(place + uint32(zeros_at + 16)))
            if exact:
                a, b = low_numbers(words, offsets(zero_low)), high_numbers(words, offsets(zero_high))
            else:
                a, b = low_numbers(words, offsets(float32(0))), high_numbers(words, offsets(float32(0)))
                a, b = moved(a, pair_of(-zero_low, -zero_low)), moved(b, pair_of(-zero_high, -zero_high))
        else:
            a, b = low_numbers(words, constants), high_numbers(words, constants)
        part = multiply(uint32(0), a, b, uint32(xa + uint32(x_at)), g, x_stride, M, part)
        if ends:
            acc = add(acc, part, group[0], group[1])
        return acc, part, group

    return quarter


def _columns(form, tiles=None):
    """Two device functions: the multiplications with all column tiles, and the sums times the scales.

    They are put together from those for half as many tiles, so that every place in a tuple is known when they are made.
    Loops over arrays of sums took 2.5 times as long (`NOTES.md`).
    """
    tiles = form.tiles if tiles is None else tiles
    mma = ptx.mma_bfloat if form.bfloat else ptx.mma_half
    if tiles == 1:

        @device_function
        def multiply(first, a, b, xa, g, x_stride, M, part):
            row = uint32(min(uint32(g + first), uint32(uint32(M) - uint32(1))))
            v = ptx.load_shared_4(uint32(xa + row * x_stride))
            p = mma(a[0], b[0], a[1], b[1], v[0], v[1], part[0], part[1], part[2], part[3])
            return p + mma(a[2], b[2], a[3], b[3], v[2], v[3], part[4], part[5], part[6], part[7])

        @device_function
        def add(acc, part, low, high):
            return (
                acc[0] + low * (part[0] + part[4]), acc[1] + low * (part[1] + part[5]),
                acc[2] + high * (part[2] + part[6]), acc[3] + high * (part[3] + part[7]),
            )  # fmt: skip

    else:
        multiply_half, add_half = _columns(form, tiles // 2)
        of_part, of_acc, half = 4 * tiles, 2 * tiles, COLUMNS * tiles // 2

        @device_function
        def multiply(first, a, b, xa, g, x_stride, M, part):
            one = multiply_half(first, a, b, xa, g, x_stride, M, part[:of_part])
            return one + multiply_half(uint32(first + uint32(half)), a, b, xa, g, x_stride, M, part[of_part:])

        @device_function
        def add(acc, part, low, high):
            return add_half(acc[:of_acc], part[:of_part], low, high) + add_half(acc[of_acc:], part[of_part:], low, high)

    return multiply, add


def _hand_over(form):
    """A device function: the sums of a warp go where the last warp finds them, as soon as there is room."""
    at, tiles, padded, sums_bytes, buffers = _shared(form), form.tiles, PADDED, _sums_bytes(form), _buffers(form)
    sums_at, sums_full_at, sums_empty_at = at.sums, at.sums_full, at.sums_empty

    @device_function
    def hand_over(base, number, warp, lane, M, acc):
        g, t = uint32(lane >> uint32(2)), uint32(lane & uint32(3))
        buffer, turn = uint32(number % uint32(buffers)), uint32(number // uint32(buffers) & uint32(1))
        empty = uint32(base + uint32(sums_empty_at) + buffer * uint32(8))
        while ptx.barrier_done(empty, uint32(turn ^ uint32(1))) == uint32(0):
            pass
        start = uint32(base + uint32(sums_at) + buffer * uint32(sums_bytes) + g * uint32(4))
        for c in range(tiles):
            column = uint32(uint32(8 * c) + t * uint32(2))
            out = uint32(start + (warp * uint32(COLUMNS * tiles) + column) * uint32(4 * padded))
            if column < uint32(M):
                ptx.store_shared_float(out, acc[4 * c])
                ptx.store_shared_float(uint32(out + uint32(32)), acc[4 * c + 2])
            if uint32(column + uint32(1)) < uint32(M):
                ptx.store_shared_float(uint32(out + uint32(4 * padded)), acc[4 * c + 1])
                ptx.store_shared_float(uint32(out + uint32(4 * padded + 32)), acc[4 * c + 3])
        ptx.sync_warp()
        if lane == uint32(0):
            ptx.barrier_arrive(uint32(base + uint32(sums_full_at) + buffer * uint32(8)))

    return hand_over


def _finish_tiles(form):
    """A device function: what the last warp does. It adds up the sums of the others, and writes y (or this slice's)."""
    at, sums_bytes, sliced, buffers, warps = _shared(form), _sums_bytes(form), form.sliced, _buffers(form), form.warps
    sums_at, sums_full_at, sums_empty_at = at.sums, at.sums_full, at.sums_empty
    between = COLUMNS * form.tiles * PADDED * 4
    store_rows = _store_rows(form.bfloat)

    @device_function
    def finish_tiles(y, base, lane, N, M, mine, team, teams, part):
        row = uint32(uint32(lane & uint32(3)) * uint32(4))  # a lane takes four rows of a column
        to = ptx.global_address(y)
        padded = uint32(uint32(N) + uint32(15)) & uint32(0xFFFFFFF0)
        for n in range(mine):
            buffer, turn = uint32(uint32(n) % uint32(buffers)), uint32(uint32(n) // uint32(buffers) & uint32(1))
            while ptx.barrier_done(uint32(base + uint32(sums_full_at) + buffer * uint32(8)), turn) == uint32(0):
                pass
            line = uint32((team + uint32(n) * teams) * uint32(16) + row)
            start = uint32(base + uint32(sums_at) + buffer * uint32(sums_bytes) + row * uint32(4))
            column = uint32(lane >> uint32(2))
            while column < uint32(M):
                a, b, c, d = float32(0), float32(0), float32(0), float32(0)
                for k in range(warps):
                    v = ptx.load_shared_floats(uint32(start + column * uint32(4 * PADDED) + uint32(k * between)))
                    a, b, c, d = a + v[0], b + v[1], c + v[2], d + v[3]
                if sliced:
                    place = uint64(uint32(part * uint32(M) + column)) * uint64(padded) + uint64(line)
                    ptx.store_floats(to + place * uint64(4), a, b, c, d)
                else:
                    store_rows(to + (uint64(column) * uint64(N) + uint64(line)) * uint64(2), line, N, a, b, c, d)
                column = uint32(column + uint32(8))
            ptx.sync_warp()
            if lane == uint32(0):
                ptx.barrier_arrive(uint32(base + uint32(sums_empty_at) + buffer * uint32(8)))

    return finish_tiles


def _store_rows(bfloat):
    """A device function: four neighbouring numbers of y, as far as there are so many."""
    store = ptx.store_bfloat if bfloat else ptx.store_half

    @device_function
    def store_rows(place, line, N, a, b, c, d):
        if line < uint32(N):
            store(place, a)
        if uint32(line + uint32(1)) < uint32(N):
            store(place + uint64(2), b)
        if uint32(line + uint32(2)) < uint32(N):
            store(place + uint64(4), c)
        if uint32(line + uint32(3)) < uint32(N):
            store(place + uint64(6), d)

    return store_rows


@functools.cache
def add_slices(bfloat):
    """The kernel that adds up slices, in the same order always: (float32 (slices, M, N filled up), y, N, M, slices)."""
    store_rows = _store_rows(bfloat)

    def add_slices(parts, y, N, M, slices):
        padded = uint32(uint32(N) + uint32(15)) & uint32(0xFFFFFFF0)
        index = uint32(uint32(cuda.blockIdx.x) * uint32(256) + uint32(cuda.threadIdx.x)) * uint32(4)
        column, line = uint32(index // padded), uint32(index % padded)
        ptx.let_next_kernel_start()
        ptx.wait_for_last_kernel()
        if column < uint32(M):
            a, b, c, d = float32(0), float32(0), float32(0), float32(0)
            for s in range(slices):
                place = uint64(uint32(uint32(s) * uint32(M) + column)) * uint64(padded) + uint64(line)
                v = ptx.load_floats(ptx.global_address(parts) + place * uint64(4))
                a, b, c, d = a + v[0], b + v[1], c + v[2], d + v[3]
            store_rows(
                ptx.global_address(y) + (uint64(column) * uint64(N) + uint64(line)) * uint64(2), line, N, a, b, c, d
            )

    return Kernel(add_slices, 256, needs=CAPABILITY)


def _compiled():
    """What `COMPILED` lists: every form of codes and of zeros, each of the others once or twice; as they are used."""
    for bits, group, zeros, bfloat, scaled, tiles, sliced in (
        (4, 128, None, False, False, 1, False),
        (4, 64, "integer", True, False, 1, False),
        (4, 64, "float", False, False, 2, False),
        (4, 128, "integer", True, True, 4, True),
        (2, 64, "integer", False, False, 1, True),
        (2, 32, "float", True, False, 2, False),
        (3, 64, "integer", False, True, 1, False),
        (3, 128, None, True, False, 4, False),
        (8, 128, None, False, False, 1, False),
        (8, 64, "float", True, True, 1, False),
    ):
        usual = _USUAL[tiles if scaled else 0 if tiles == 1 else tiles]
        stages = max(2, usual.bytes_ahead // (usual.per_stage * unit_bytes(bits, group, zeros)))
        form = Form(bits, group, zeros, bfloat, scaled, tiles, usual.warps, usual.per_stage, stages, sliced)
        half = types.uint16 if bfloat else types.float16
        flat, x, factors = (types.Array(d, n, "C") for d, n in ((types.uint8, 1), (half, 2), (types.float32, 1)))
        y = types.Array(types.float32, 3, "C") if sliced else x
        yield f"matmul {form}", kernel(form), (flat, x, factors, y, *[types.int32] * 9), CAPABILITY
    for bfloat in (False, True):
        y = types.Array(types.uint16 if bfloat else types.float16, 2, "C")
        signature = types.Array(types.float32, 3, "C"), y, *[types.int32] * 3
        yield f"add_slices {'bfloat' if bfloat else 'half'}", add_slices(bfloat), signature, CAPABILITY


COMPILED = list(_compiled())
