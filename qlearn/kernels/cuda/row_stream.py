"""A few vectors times a matrix whose rows stream past as they lie in memory: the frame of `gguf.py` and its neighbours.

`layout.py` puts the bytes of a weight in the order in which a warp takes them. Here that is not allowed: the bytes are
those of a file. All that is asked of them is that a row follows the other, and that pieces of a row begin at multiples
of 16 bytes. What the bytes mean is told by a `Recipe`. How they come is the same for all, and is told here; what the
warps do that bring bytes and add up sums is in `row_roles.py`.

**Tiles.** A block of threads takes every 132nd tile of 16 rows (on a GPU with 132 multiprocessors). It goes through a
tile from left to right, a stage at a time. A stage is a slice of the 16 rows, of some 2,048 columns: 16 copies of a
kilobyte or so (`cp.async.bulk`), which run by themselves. Four or more stages are in shared memory, so that 70 kB are
always on the way; that is what hides the half microsecond and more that each byte takes to come. There the rows lie an
odd multiple of 16 bytes apart, or of 64, so that the lanes of a warp, which read eight rows at once, meet 32 different
banks.

**Roles.** The warps do different things, and meet at barriers only:

    the loaders         wait until a stage is empty, ask for its next slice, 8 rows each       a lane in 2 warps
    the multipliers     wait until a stage is full, multiply, report it empty                  8 or 16 warps
    the adder           waits until all multipliers have their sums of a tile, adds them up
                        in a fixed order, writes y                                             one warp

So no multiplier ever waits for another, and the sums are the same in every run. There are two loaders because a copy
takes a lane some 15 instructions, one after the other, and a kilobyte has to come every 65 cycles.

**Multiplying.** The tensor core multiplies 16 rows of the weight by 8 columns of the input, for 16 or 32 inputs at
once. A column is a row of x, or a part of it (see below). With one row of x, seven of eight are not needed: the tensor
core is idle most of the time in any case. Each multiplier takes every 8th group of 256 columns.

**Inputs of all kinds become float16.** They lie in shared memory, in the order in which the tensor core takes them.

    float16     as they are
    bfloat16    times the power of two that brings the row's largest number between 2**14 and 2**15
    float32     the same, then as the sum of two float16: the nearest, and the nearest to what is left

bfloat16 has fewer digits than float16, so nothing is lost but what is below 2**-40 of the row's largest number: there
float16 ends. Of float32, 22 digits of 24 are kept at least. A float32 row takes two columns of the eight.

**Overlap.** With `overlap=True` a block fills its stages while the kernel before still runs, and waits for it before it
reads x. That kernel must not be the one that writes the weights.
"""

import functools
from typing import NamedTuple

from qlearn.kernels.cuda import ptx, row_roles
from qlearn.kernels.cuda.launch import OPT_IN_SHARED, Kernel, capability, multiprocessors
from qlearn.kernels.cuda.row_roles import ADDED, EACH, EMPTY, FULL, LOADERS, MAX_STAGES, ROWS, SUMMED, SUMS

from numba import cuda, float32, uint32  # isort: skip - after qlearn.kernels.cuda has chosen

CAPABILITY = (9, 0)
ENOUGH = 50_000  # bytes on the way to a multiprocessor, at least


class Recipe(NamedTuple):
    """What the bytes of a row mean, and what is to be done with them.

    name: of the kernel.  pieces: bytes of a group of columns, in each of the arrays that a row has a part in (one or
    two).  group: columns of a group.  align: a row has a multiple of so many groups, so that pieces begin at multiples
    of 16 bytes.  spread: 16 if four lanes of a warp read neighbouring words of a row; 64 if they read 16 bytes each.
    columns: of the accumulators, 1, 2, 4 or 8; if fewer than 8, the others hold more sums of the same columns.
    parts: columns that a row of x takes.  x_bytes, extra_bytes: of a group in shared memory, for each column.
    whole: the sums are int32, not float32.
    measure: device function (x, base, thread, K, tokens) that looks at x before.
    arrange: device function (x, base, x_at, x_stride, extra_at, extra_stride, thread, K, tokens) that puts x there.
    product: maker of a device function (at, beside, x_at, x_stride, extra_at, extra_stride, group, columns, lane,
    acc) that adds to four sums; the maker is given the bytes from a row to the next.
    finish: device function (first, second, base, token, scale) -> what is stored, of the sums of a row of x.
    store, y_bytes: how, and the size of what is stored.
    """

    name: str
    pieces: tuple
    group: int
    align: int
    spread: int
    columns: int
    parts: int
    x_bytes: int
    extra_bytes: int
    whole: bool
    measure: object
    arrange: object
    product: object
    finish: object
    store: object
    y_bytes: int


class Plan(NamedTuple):
    """How a product is carried out. warps: multipliers.  per_stage: groups of a stage for each.  The rest as named."""

    warps: int
    per_stage: int
    stages: int
    blocks: int
    shared_bytes: int


def threads_of(warps):
    """The multipliers, the loaders and the adder."""
    return (warps + LOADERS + 1) * 32


def row_bytes_between(recipe, warps, per_stage):
    """Bytes from a row to the next in a stage: an odd multiple of the recipe's spread."""
    used = -(-warps * per_stage * sum(recipe.pieces) // recipe.spread)
    return (used | 1) * recipe.spread


def plan_for(recipe, rows, columns, tokens, warps=None, per_stage=None, stages=None):
    """The Plan for a product, or None if not even two stages fit beside x. What is not given is chosen."""
    groups = -(-columns // recipe.group)
    warps = warps or 8
    if per_stage is None:
        per_stage = 1
        while per_stage < 4 and warps * per_stage * sum(recipe.pieces) < 1024 and warps * per_stage < groups:
            per_stage *= 2
    while warps * per_stage % recipe.align:  # slices begin at multiples of 16 bytes, too
        per_stage += 1
    stage = ROWS * row_bytes_between(recipe, warps, per_stage)
    fixed = _ring_at(recipe, warps, groups, tokens * recipe.parts)
    most = OPT_IN_SHARED.get(capability(), 99) * 1024
    fit, half = (most - fixed) // stage, (most // 2 - 512 - fixed) // stage
    if fit < 2:
        return None
    if stages is None:  # with half of the memory, the next kernel's block fits beside this one, and can begin to load
        stages = half if half * stage >= ENOUGH else 8
    stages = min(stages, fit, MAX_STAGES)
    return Plan(warps, per_stage, stages, min(multiprocessors(), -(-rows // ROWS)), fixed + stages * stage)


def _x_at(recipe, warps):
    return SUMS + 2 * warps * ROWS * recipe.columns * 4


def _ring_at(recipe, warps, groups, columns):
    x = columns * (groups * recipe.x_bytes + 64)
    extra = columns * (groups * recipe.extra_bytes + 16)
    return (_x_at(recipe, warps) + x + extra + 127) // 128 * 128


def prepare(recipe, plan, weights, beside, x, y, scale=1.0, overlap=False):
    """A function without arguments that computes y, as often as it is called.

    weights, beside: uint8 tensors, the arrays of the recipe's pieces (the same twice, if it has one).  x (tokens, K), y
    (tokens, N): contiguous.
    """
    args = weights.view(-1), beside.view(-1), x, y, float(scale), y.shape[1], x.shape[1], len(x), plan.stages
    run = kernel(recipe, plan.warps, plan.per_stage)
    return run.prepare(plan.blocks, *args, overlap=overlap, shared_bytes=plan.shared_bytes)


@functools.cache
def kernel(recipe, warps, per_stage):
    """The kernel of a recipe: (weights, beside, x, y, scale, N, K, tokens, stages) -> y."""
    first_piece, second_piece = (*recipe.pieces, 0)[:2]
    slice_groups = warps * per_stage
    between = row_bytes_between(recipe, warps, per_stage)
    stage_bytes, x_at = ROWS * between, _x_at(recipe, warps)
    group, x_bytes, extra_bytes = recipe.group, recipe.x_bytes, recipe.extra_bytes
    parts = recipe.parts
    number = uint32 if recipe.whole else float32
    measure, arrange, product = recipe.measure, recipe.arrange, recipe.product(between)
    load_slice = row_roles.load_slice(recipe, slice_groups, between)
    hand_over, add_up = row_roles.hand_over(recipe, warps), row_roles.add_up(recipe, warps)

    def rows(weights, beside, x, y, scale, N, K, tokens, stages):
        shared = cuda.shared.array(0, uint32)
        base = ptx.shared_address(shared)
        thread = uint32(cuda.threadIdx.x)
        lane, warp = uint32(thread & uint32(31)), uint32(thread >> uint32(5))
        columns = uint32(uint32(tokens) * uint32(parts))
        groups = uint32(uint32(uint32(K) + uint32(group - 1)) // uint32(group))
        slices = uint32(uint32(groups + uint32(slice_groups - 1)) // uint32(slice_groups))
        tiles = uint32(uint32(uint32(N) + uint32(15)) >> uint32(4))
        first, step = uint32(cuda.blockIdx.x), uint32(cuda.gridDim.x)
        mine = uint32(uint32(tiles - first + step - uint32(1)) // step)
        x_stride = uint32(groups * uint32(x_bytes) + uint32(64))
        extra_stride = uint32(groups * uint32(extra_bytes) + uint32(16))
        extra_at = uint32(base + uint32(x_at) + columns * x_stride)
        ring = uint32(uint32(extra_at - base + columns * extra_stride + uint32(127)) & uint32(0xFFFFFF80))
        ring = uint32(ring + base)
        if thread == uint32(0):
            for s in range(stages):
                ptx.barrier_init(uint32(base + uint32(FULL) + uint32(s) * uint32(8)), uint32(LOADERS))
                ptx.barrier_init(uint32(base + uint32(EMPTY) + uint32(s) * uint32(8)), uint32(warps))
            for s in range(2):
                ptx.barrier_init(uint32(base + uint32(SUMMED) + uint32(s) * uint32(8)), uint32(warps))
                ptx.barrier_init(uint32(base + uint32(ADDED) + uint32(s) * uint32(8)), uint32(1))
            ptx.barriers_visible()
        cuda.syncthreads()
        # the loaders fill all stages before anything else is done
        loads = warp >= uint32(warps) and warp < uint32(warps + LOADERS) and lane == uint32(0)
        from_row = uint32(uint32(warp - uint32(warps)) * uint32(EACH)) if loads else uint32(0)
        total = uint32(mine * slices)
        tile, part, stage, turn = first, uint32(0), uint32(0), uint32(0)
        filled = min(total, uint32(stages))
        if loads:
            for _ in range(filled):
                load_slice(weights, beside, base, ring, stage, tile, part, groups, N, from_row)
                stage = uint32(stage + uint32(1))
                part = uint32(part + uint32(1))
                if part == slices:
                    part, tile = uint32(0), uint32(tile + step)
            if stage == uint32(stages):
                stage = uint32(0)
        ptx.let_next_kernel_start()
        ptx.wait_for_last_kernel()
        measure(x, base, thread, K, tokens)
        cuda.syncthreads()
        arrange(x, base, uint32(base + uint32(x_at)), x_stride, extra_at, extra_stride, thread, K, tokens)
        cuda.syncthreads()
        if loads:
            for _ in range(total - filled):
                bar = uint32(base + uint32(EMPTY) + stage * uint32(8))
                while ptx.barrier_done(bar, turn) == uint32(0):
                    pass
                load_slice(weights, beside, base, ring, stage, tile, part, groups, N, from_row)
                part = uint32(part + uint32(1))
                if part == slices:
                    part, tile = uint32(0), uint32(tile + step)
                stage = uint32(stage + uint32(1))
                if stage == uint32(stages):
                    stage, turn = uint32(0), uint32(turn ^ uint32(1))
        if warp == uint32(warps + LOADERS):
            for n in range(mine):
                add_up(base, uint32(n), uint32(first + uint32(n) * step), lane, y, scale, N, tokens)
        if warp < uint32(warps):
            stage, turn = uint32(0), uint32(0)
            acc = cuda.local.array(4, number)
            row = uint32(uint32(lane >> uint32(2)) * uint32(between))
            for n in range(mine):
                for i in range(4):
                    acc[i] = number(0)
                at_group = warp
                for _ in range(slices):
                    bar = uint32(base + uint32(FULL) + stage * uint32(8))
                    while ptx.barrier_done(bar, turn) == uint32(0):
                        pass
                    at = uint32(ring + stage * uint32(stage_bytes) + row)
                    for i in range(per_stage):
                        if at_group < groups:
                            place = uint32(uint32(i * warps) + warp)
                            at_codes = uint32(at + place * uint32(first_piece))
                            at_beside = uint32(at + uint32(slice_groups * first_piece) + place * uint32(second_piece))
                            product(
                                at_codes, at_beside, uint32(base + uint32(x_at)), x_stride, extra_at, extra_stride,
                                at_group, columns, lane, acc,
                            )  # fmt: skip
                        at_group = uint32(at_group + uint32(warps))
                    ptx.sync_warp()
                    if lane == uint32(0):
                        ptx.barrier_expect(uint32(base + uint32(EMPTY) + stage * uint32(8)), uint32(0))
                    stage = uint32(stage + uint32(1))
                    if stage == uint32(stages):
                        stage, turn = uint32(0), uint32(turn ^ uint32(1))
                hand_over(base, uint32(n), warp, lane, acc)

    rows.__name__ = f"rows_{recipe.name}"
    threads, side_by_side = threads_of(warps), 2 if warps <= 8 else 1
    return Kernel(rows, threads, registers=65536 // (threads * side_by_side) // 8 * 8, needs=CAPABILITY)
