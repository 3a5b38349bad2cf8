"""SINQ on a GPU: a whole matrix balanced and rounded by one kernel, which reads each weight from memory once.

The method is `qlearn.methods.sinq`, with `qlearn.methods.sinkhorn` in it: tiles of g columns (and all rows, or a band
of them), up to 16 looks at the deviations of all rows and columns of a tile, each with a step of mu1 and mu2 after it,
and at the end each row of a tile is rounded as a group.

**What it would cost to do this in memory.** 16 looks read the weights 16 times: 218 M weights of a Llama-3.1-8B layer,
2 bytes each, are 7 GB, at 4.1 TB/s 1.7 ms. With PyTorch's operations, which write as well as read, and some ten of them
to a step, it is 100 ms. Read once and written once as 4 bits it is 0.14 ms.

**On the chip.** The tile stays in shared memory as it came, 2 bytes a weight. It is never scaled there: in a look, the
balanced number w · a · b is made anew from w and the two reciprocals a = 1 / mu1, b = 1 / mu2. A tile of 4096 rows x 64
columns is too large for one block of threads, so a block takes some rows (one thread a row, 512 rows in 72 KiB), and
the blocks of a tile, its *members*, tell each other what columns are like. Each look:

    rows        a thread goes along its row, first for the mean, then for the squares of what is left
    columns     a warp goes down its 32 rows, each lane in two columns, likewise twice
    member      sums of the warps are joined, and laid down in global memory (512 bytes)
    tile        a barrier of the members; then each reads what all laid down, adds it up in the same order, and so comes
                to the same imbalance, the same decision whether to go on, and the same step

Twice means that nothing cancels: however large the mean of a row, its deviation is good to about 1e-6 of itself. Sums
of n numbers with mean m and squares M about it are joined as Chan does, n (m - mean)**2 + M.

**Instructions.** A weight costs in each look, counted in the compiled kernel: by rows 6.8 (to float32 once for each of
two walks, 1 product and sum for the mean, 2 for the squares, the rest for loads and the loop), by columns 7.2. So 16
looks are 224 and the rounding 30: for 218 M weights 1.9 ms on 132 multiprocessors at 1.75 GHz that start 4 warps a
cycle, if nothing waits. Two blocks fit on a multiprocessor, so that one has work while the other waits at its barrier.

**The barrier.** Members wait for each other, so all of them have to run at the same time. That is certain only if they
start in order: a block takes a number when it starts, not its place in the grid, and numbers that follow each other
are members of one tile. So of all tiles of a kernel at most one is incomplete; all others will finish and make room.

**Exactness.** Given mu1 and mu2, rounding is the readable method's, bit for bit (divisions as in `pieces.py`). mu1 and
mu2 agree to some 1e-6, since sums are made in another order, and exp and log differ in the last place. So a code can
differ by one where a weight lies as close as that to the middle between two: 1 in 100,000 of them. Where the imbalance
of a tile comes to rest, so that two steps differ in their last digits only, the last step can be one more or one less.

Source: SINQ, arXiv 2509.22944. Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm, 1979.
"""

import functools
import math

import numpy as np
import torch

from qlearn.formats.integers import Integers
from qlearn.kernels.cuda import SIMULATED, device_function, ptx
from qlearn.kernels.cuda.launch import Kernel
from qlearn.kernels.cuda.pieces import (
    KINDS,
    LARGEST,
    code_of,
    eight_floats,
    four_octets,
    packer,
    quotient,
    readers,
    size_of,
    storer,
)
from qlearn.kernels.cuda.rtn import check, pack_zeros
from qlearn.kernels.cuda.sinkhorn import (
    Plan,
    column_sums,
    extremes_of_warp,
    join_chunks,
    join_members,
    next_log,
    row_spread,
    target_of,
)
from qlearn.tensor import QuantizedTensor

from numba import cuda, float32, int32, types, uint32, uint64  # isort: skip

NARROW = 1e-4  # as in qlearn.methods.sinq
ORDER = 16
GROUPS = (32, 64, 128)
THREADS = {"half": 512, "bfloat": 512, "float": 256}  # of a block, and rows; fewer where a tile is wider than 64
FLAGS = 4  # with these the kernel's state begins; then come the numbers drawn, and the arrivals at each tile's barrier
BROKEN, OUTSIDE, UNFIT, MOVED = range(FLAGS)  # a weight not finite, a zero off the grid, a scale too large, mu1 not 1


def quantize_sinq(weight, bits=4, group_size=64, *, order=ORDER, tile_rows=None, shift=True, scale_dtype=torch.float16):
    """Balance a matrix and quantize it, as `qlearn.quantize(weight, "sinq", ...)` does.

    weight: (rows, columns), float16, bfloat16 or float32, contiguous, on the GPU.  bits: 2, 3, 4 or 8.
    group_size: columns of a tile, 32, 64 or 128.  order, tile_rows, shift, scale_dtype: as there.
    Returns a QuantizedTensor.  Raises ValueError for other arguments, for weights that are not finite or beyond 1e17,
    and for a scale that does not fit.
    """
    check(weight, bits, group_size, scale_dtype, GROUPS)
    if order < 1:
        raise ValueError(f"order={order} looks at no state of the matrix; choose at least 1, usually {ORDER}")
    if tile_rows is not None and (not isinstance(tile_rows, int) or tile_rows < 1 or len(weight) % tile_rows):
        raise ValueError(f"tile_rows={tile_rows} does not divide the {len(weight)} rows; choose a positive divisor")
    parts = launch(weight, bits, group_size, order, tile_rows, shift, scale_dtype)
    return finish(weight.shape, parts, bits, group_size, shift)


def launch(weight, bits, group_size, order, tile_rows, shift, scale_dtype, threads=None, registers=None):
    """Start the kernels; nothing is waited for. Returns packed, scales, zeros, packed zeros, mu1, state."""
    rows, columns = weight.shape
    band_rows, tiles_across = tile_rows or rows, columns // group_size
    tiles = rows // band_rows * tiles_across
    kernel, plan = sinq_kernel(KINDS[weight.dtype], group_size, bits, shift, KINDS[scale_dtype], threads, registers)
    members = -(-band_rows // plan.threads)
    per_block = -(-band_rows // members)
    new = functools.partial(torch.empty, device=weight.device)
    packed = new(rows * columns * bits // 8, dtype=torch.uint8)
    scales = new(rows, tiles_across, dtype=scale_dtype)
    zeros = new(scales.numel() if shift else 1, dtype=torch.float32)
    mu1 = new(rows // band_rows, columns, dtype=scale_dtype)
    records = new(tiles * 2 * members * plan.record, dtype=torch.float32)
    state = torch.zeros(FLAGS + 1 + tiles, dtype=torch.int32, device=weight.device)
    looks = order if order > 1 and band_rows > 1 else 0  # one look alone changes nothing
    kernel.launch(
        tiles * members, weight, packed, scales, zeros, mu1, records, state,
        columns, band_rows, members, per_block, looks, group_size // 8,
    )  # fmt: skip
    if not shift:
        return packed, scales, None, None, mu1, state
    return packed, scales, zeros.view(scales.shape), pack_zeros(zeros, bits), mu1, state


def finish(shape, parts, bits, group_size, shift):
    """The QuantizedTensor of what `launch` returned; waits for the GPU, to see whether all went well."""
    packed, scales, zeros, packed_zeros, mu1, state = parts
    broken, outside, unfit, moved = state[:FLAGS].tolist()
    if broken:
        raise ValueError("some weights are not finite, or their squares overflow; mend them, or scale the matrix first")
    if unfit:
        raise ValueError(f"a scale does not fit {scales.dtype}; pass scale_dtype=torch.float32")
    zeros = whole_zeros(zeros) if shift and outside else packed_zeros
    mu1 = None if not moved else mu1 if len(mu1) > 1 else mu1[0]
    return QuantizedTensor(packed, scales, Integers(bits, not shift), tuple(shape), (1, group_size), zeros, mu1)


def whole_zeros(zeros):
    """Whole numbers, some of them off the grid of codes: float16, or float32 if that is not exact."""
    half = zeros.half()
    return half if (half.float() == zeros).all() else zeros


@functools.cache
def sinq_kernel(kind, group, bits, shift, scale_kind, threads=None, registers=None):
    """(Kernel, Plan) for a dtype of weights ("half", "bfloat", "float"), tile width, bits, grid and dtype of scales."""
    threads = threads or (32 if SIMULATED else THREADS[kind] * 64 // max(group, 64))
    registers = registers or (64 if threads > 256 else 80)  # 64 let two blocks of 512 threads run side by side
    plan = Plan(kind, group, max(threads, group))
    kernel = Kernel(
        _make(kind, group, bits, shift, scale_kind, plan), plan.threads, plan.bytes, registers, needs=(8, 0)
    )
    return kernel, plan


def _make(kind, group, bits, shift, scale_kind, plan):
    spread, lay_down, join_own, join_all = row_spread(plan), column_sums(plan), join_chunks(plan), join_members(plan)
    bring, round_row = _bring(plan), _round_row(plan, bits, shift, scale_kind)
    store, scale_size = storer(scale_kind), size_of(scale_kind)
    A, MU1, B, EXTREMES, TICKET = plan.a, plan.mu1, plan.b, plan.extremes, plan.ticket
    stride, warps, group_warps, record = plan.stride, plan.warps, group // 32, 4 * plan.record
    INF = np.float32(np.inf)

    def sinq(W, Packed, Scales, Zeros, Mu1, Records, State, columns, band_rows, members, per_block, order, octets):
        base = block_base = ptx.shared_address(cuda.shared.array(0, uint32))
        thread = block_thread = uint32(cuda.threadIdx.x)
        in_column = base + thread * uint32(4)  # for what there is one of for each column, or row

        # which rows of which tile this block takes
        if thread == 0:
            ptx.store_shared_1(base + uint32(TICKET), uint32(cuda.atomic.add(State, FLAGS, 1)))
        cuda.syncthreads()
        ticket = int32(ptx.load_shared_1(base + uint32(TICKET)))
        tile, member = int32(ticket // members), int32(ticket % members)
        tiles_across = int32(columns // int32(group))
        band, tile_column = int32(tile // tiles_across), int32(tile % tiles_across)
        here = int32(min(per_block, int32(band_rows - member * per_block)))
        first_row = int32(band * band_rows + member * per_block)
        active = int32(thread) < here
        bring(W, base, thread, first_row, here, tile_column, columns)
        if thread < uint32(group):
            ptx.store_shared_float(in_column + uint32(A), float32(1))
        ptx.store_shared_float(in_column + uint32(B), float32(1))
        cuda.syncthreads()

        of_tile = ptx.global_address(Records) + uint64(tile) * uint64(uint32(members) * uint32(2 * record))
        arrivals = ptx.global_address(State) + uint64(uint32(FLAGS + 1) + uint32(tile)) * uint64(4)
        u1 = u2 = float32(0)
        e1 = e2 = float32(1)  # exp(u1), exp(u2), of the state that is looked at
        mu1 = mu2 = float32(1)  # of the best state
        best, target = INF, float32(0)
        for step in range(order):
            # Addresses are made anew in each step: the compiler would keep a hundred of them in registers.
            base, thread = ptx.hidden(block_base), ptx.hidden(block_thread)
            lane, warp, in_column = thread & uint32(31), thread >> uint32(5), base + thread * uint32(4)
            # how far rows and columns spread, as far as this block sees
            sigma_row, largest, smallest = float32(0), float32(0), INF
            if active:
                sigma_row = spread(base + thread * uint32(stride), base + uint32(A), octets) / e2
                largest = smallest = sigma_row
            largest, smallest = extremes_of_warp(largest, smallest)
            if lane == 0:
                ptx.store_shared_float(base + uint32(EXTREMES) + warp * uint32(8), largest)
                ptx.store_shared_float(base + uint32(EXTREMES + 4) + warp * uint32(8), smallest)
            lay_down(base, warp, lane, here)
            cuda.syncthreads()
            # say so to the other members; records of two steps alternate
            records = of_tile + uint64(uint32(int32(step) & int32(1)) * uint32(members)) * uint64(record)
            mine = records + uint64(member) * uint64(record)
            if thread < uint32(group):
                total, squares = join_own(base, thread, here)
                ptx.store_float(mine + uint64(thread * uint32(4)), total)
                ptx.store_float(mine + uint64((thread + uint32(group)) * uint32(4)), squares)
            if warp == uint32(0):
                largest, smallest = float32(0), INF
                if lane < uint32(warps):
                    largest = ptx.load_shared_float(base + uint32(EXTREMES) + lane * uint32(8))
                    smallest = ptx.load_shared_float(base + uint32(EXTREMES + 4) + lane * uint32(8))
                largest, smallest = extremes_of_warp(largest, smallest)
                if lane == 0:
                    ptx.store_float(mine + uint64(8 * group), largest)
                    ptx.store_float(mine + uint64(8 * group + 4), smallest)
            cuda.syncthreads()
            if thread == 0:
                cuda.threadfence()
                cuda.atomic.add(State, int32(FLAGS + 1) + tile, 1)
                while ptx.load_acquire(arrivals) < uint32(members) * uint32(int32(step) + int32(1)):
                    pass
            cuda.syncthreads()
            # what all of them say
            sigma_column, largest, smallest = float32(0), float32(0), INF
            if thread < uint32(group):
                sigma_column = join_all(records + uint64(thread * uint32(4)), members, per_block, band_rows) / e1
                largest = smallest = sigma_column
                for m in range(int32(thread), members, int32(group)):
                    of_rows = records + uint64(uint32(m) * uint32(record)) + uint64(8 * group)
                    largest = ptx.max_float(largest, ptx.load_fresh(of_rows))
                    smallest = ptx.min_float(smallest, ptx.load_fresh(of_rows + uint64(4)))
            if warp < uint32(group_warps):
                largest, smallest = extremes_of_warp(largest, smallest)
                if lane == 0:
                    ptx.store_shared_float(base + uint32(EXTREMES) + warp * uint32(8), largest)
                    ptx.store_shared_float(base + uint32(EXTREMES + 4) + warp * uint32(8), smallest)
            cuda.syncthreads()
            largest, smallest = float32(0), INF
            for w in range(group_warps):
                of_warp = base + uint32(EXTREMES) + uint32(w) * uint32(8)
                largest = ptx.max_float(largest, ptx.load_shared_float(of_warp))
                smallest = ptx.min_float(smallest, ptx.load_shared_float(of_warp + uint32(4)))
            # whether to go on, and the step
            imbalance = largest / ptx.max_float(smallest, float32(1e-12))
            if int32(step) == int32(0):
                target = target_of(smallest)
                if not imbalance < INF:
                    State[BROKEN] = 1
            if not imbalance <= best:
                break
            best, mu1, mu2 = imbalance, e1, e2
            if thread < uint32(group):
                u1 = next_log(u1, sigma_column, target)
                e1 = float32(math.exp(u1))
                ptx.store_shared_float(in_column + uint32(A), float32(1) / e1)
            u2 = next_log(u2, sigma_row, target)
            e2 = float32(math.exp(u2))
            ptx.store_shared_float(in_column + uint32(B), float32(1) / e2)
            cuda.syncthreads()

        base, thread = ptx.hidden(block_base), ptx.hidden(block_thread)
        in_column = base + thread * uint32(4)
        if thread < uint32(group):
            ptx.store_shared_float(in_column + uint32(A), float32(1) / mu1)
            ptx.store_shared_float(in_column + uint32(MU1), mu1)
            if member == int32(0):
                column = uint32(band * columns + tile_column * int32(group)) + thread
                store(ptx.global_address(Mu1) + uint64(column) * uint64(scale_size), mu1)
                if mu1 != float32(1):
                    State[MOVED] = 1
        cuda.syncthreads()
        if active:
            row = uint32(first_row) + thread
            my_row = base + thread * uint32(stride)
            round_row(Packed, Scales, Zeros, State, base, my_row, row, tile_column, tiles_across, mu2, octets)

    return sinq


def _bring(plan):
    """A device function that copies this block's rows of its tile into shared memory."""
    group, stride, threads, row_size = plan.group, plan.stride, plan.threads, plan.group * size_of(plan.kind)
    pieces = row_size // 16

    @device_function
    def bring(W, base, thread, first_row, here, tile_column, columns):
        source = ptx.global_address(W) + uint64(tile_column) * uint64(row_size)
        matrix_row = uint64(columns) * uint64(row_size // group)
        source += uint64(first_row) * matrix_row
        for i in range(int32(thread), here * int32(pieces), int32(threads)):
            row, piece = uint32(i) // uint32(pieces), uint32(i) % uint32(pieces) * uint32(16)
            a, b, c, d = ptx.load_4(source + uint64(row) * matrix_row + uint64(piece))
            ptx.store_shared_4(base + row * uint32(stride) + piece, a, b, c, d)

    return bring


def _round_row(plan, bits, shift, scale_kind):
    """A device function that rounds one row of a tile, and writes its codes, scale and zero."""
    _, eight, _ = readers(plan.kind)
    store, scale_size, pack, put = storer(scale_kind), size_of(scale_kind), packer(bits), four_octets(bits)
    group, octet, A, MU1 = plan.group, 8 * size_of(plan.kind), plan.a, plan.mu1
    high_code = np.float32(2**bits - 1 if shift else 2 ** (bits - 1) - 1)
    low_code = np.float32(0 if shift else -high_code)
    largest_scale, narrow, INF = np.float32(LARGEST[scale_kind]), np.float32(NARROW), np.float32(np.inf)

    @device_function
    def without_mu1(row, base, k):
        """Eight weights of a row, divided by mu1."""
        x0, x1, x2, x3, x4, x5, x6, x7 = eight(row + uint32(k) * uint32(octet))
        a0, a1, a2, a3, a4, a5, a6, a7 = eight_floats(base + uint32(A) + uint32(k) * uint32(32))
        m0, m1, m2, m3, m4, m5, m6, m7 = eight_floats(base + uint32(MU1) + uint32(k) * uint32(32))
        x0, x1, x2, x3 = quotient(x0, m0, a0), quotient(x1, m1, a1), quotient(x2, m2, a2), quotient(x3, m3, a3)
        x4, x5, x6, x7 = quotient(x4, m4, a4), quotient(x5, m5, a5), quotient(x6, m6, a6), quotient(x7, m7, a7)
        return x0, x1, x2, x3, x4, x5, x6, x7

    @device_function
    def code(x, mu2, by_mu2, scale, by_scale, zero):
        x = quotient(quotient(x, mu2, by_mu2), scale, by_scale)
        return code_of(x + zero, low_code, high_code)

    @device_function
    def codes(row, base, k, mu2, by_mu2, scale, by_scale, zero):
        """The codes of eight weights, packed."""
        x0, x1, x2, x3, x4, x5, x6, x7 = without_mu1(row, base, k)
        return pack(
            code(x0, mu2, by_mu2, scale, by_scale, zero), code(x1, mu2, by_mu2, scale, by_scale, zero),
            code(x2, mu2, by_mu2, scale, by_scale, zero), code(x3, mu2, by_mu2, scale, by_scale, zero),
            code(x4, mu2, by_mu2, scale, by_scale, zero), code(x5, mu2, by_mu2, scale, by_scale, zero),
            code(x6, mu2, by_mu2, scale, by_scale, zero), code(x7, mu2, by_mu2, scale, by_scale, zero),
        )  # fmt: skip

    @device_function
    def ends(row, base, octets, mu2, by_mu2):
        """The smallest and the largest number of the row when it is balanced; NaN for a weight that is not finite."""
        low, high, broken = INF, -INF, float32(0)
        for k in range(octets):
            x0, x1, x2, x3, x4, x5, x6, x7 = without_mu1(row, base, k)
            low = ptx.min_float(ptx.min_float(ptx.min_float(x0, x1), ptx.min_float(x2, x3)), low)
            low = ptx.min_float(ptx.min_float(ptx.min_float(x4, x5), ptx.min_float(x6, x7)), low)
            high = ptx.max_float(ptx.max_float(ptx.max_float(x0, x1), ptx.max_float(x2, x3)), high)
            high = ptx.max_float(ptx.max_float(ptx.max_float(x4, x5), ptx.max_float(x6, x7)), high)
            broken = ptx.fma(x0, float32(0), ptx.fma(x1, float32(0), ptx.fma(x2, float32(0), broken)))
            broken = ptx.fma(x3, float32(0), ptx.fma(x4, float32(0), ptx.fma(x5, float32(0), broken)))
            broken = ptx.fma(x6, float32(0), ptx.fma(x7, float32(0), broken))
        # mu2 is positive, so it does not change which weight is the smallest
        return quotient(low, mu2, by_mu2), quotient(high, mu2, by_mu2), broken

    @device_function
    def round_row(Packed, Scales, Zeros, State, base, row_at, row, tile_column, tiles_across, mu2, octets):
        by_mu2 = float32(1) / mu2
        low, high, broken = ends(row_at, base, octets, mu2, by_mu2)
        if shift:
            if high - low < narrow:
                low, high = ptx.min_float(low, float32(0)), ptx.max_float(high, float32(0))
            scale = ptx.max_float(high - low, narrow) / high_code
            zero = float32(-ptx.round_even(low / scale))
        else:
            scale = ptx.max_float(ptx.max_float(high, -low), narrow) / high_code
            zero = float32(0)
        by_scale = float32(1) / scale
        number = uint64(row) * uint64(tiles_across) + uint64(tile_column)  # of this group in the matrix
        to = ptx.global_address(Packed) + number * uint64(group * bits // 8)
        for quad in range(octets // int32(4)):
            k = uint32(quad) * uint32(4)
            a, a_high = codes(row_at, base, k, mu2, by_mu2, scale, by_scale, zero)
            b, b_high = codes(row_at, base, k + uint32(1), mu2, by_mu2, scale, by_scale, zero)
            c, c_high = codes(row_at, base, k + uint32(2), mu2, by_mu2, scale, by_scale, zero)
            d, d_high = codes(row_at, base, k + uint32(3), mu2, by_mu2, scale, by_scale, zero)
            put(to + uint64(quad) * uint64(4 * bits), a, a_high, b, b_high, c, c_high, d, d_high)
        stored = scale * mu2
        store(ptx.global_address(Scales) + number * uint64(scale_size), stored)
        if not stored <= largest_scale:
            State[UNFIT] = 1
        if broken != float32(0):
            State[BROKEN] = 1
        if shift:
            ptx.store_float(ptx.global_address(Zeros) + number * uint64(4), zero)
            if zero < float32(0) or zero > high_code:
                State[OUTSIDE] = 1

    return round_row


def _signature(kind, scale_kind):
    dtypes = {"half": types.float16, "bfloat": types.uint16, "float": types.float32}
    codes, floats, state = (types.Array(dtype, 1, "C") for dtype in (types.uint8, types.float32, types.int32))
    scales = types.Array(dtypes[scale_kind], 2, "C")
    return types.Array(dtypes[kind], 2, "C"), codes, scales, floats, scales, floats, state, *[types.int32] * 6


SPILLS = 56  # bytes of a thread at most, compiled for 8.0; for 9.0, 16: so two blocks of threads run side by side
COMPILED = [
    (f"sinq {case}", sinq_kernel(*case, "half", THREADS[case[0]] * 64 // max(case[1], 64))[0],
     _signature(case[0], "half"), (8, 0))
    for case in (
        ("bfloat", 64, 4, True), ("half", 64, 4, True), ("float", 64, 4, True), ("bfloat", 64, 4, False),
        ("bfloat", 32, 3, True), ("half", 128, 2, True), ("float", 128, 8, False),
    )
]  # fmt: skip
