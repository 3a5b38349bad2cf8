"""GPTQ's loop over the columns of a block, in one kernel.

`qlearn.methods.gptq` rounds a column, shifts the rest of its block of 128 columns by the error, and goes on to the
next; after each block one matrix product brings its errors to all later columns. The product is fast. The loop is not:
some ten small operations for each column, 40,000 for a matrix of 4096 columns, each of which waits for the last. On a
GPU that takes 0.2 s, of which next to nothing is arithmetic.

But rows do not disturb each other. So a thread takes a row, and makes the whole loop for it:

    w[i]  is the weight as it came, minus the errors of the columns before it, each times U[k, i]
    code = round(w[i] / scale) + zero, cut off          error[i] = (w[i] - value of the code) / U[i, i]

Here a column is made up to date when its turn comes, rather than all others when a column is done; they are the same
subtractions, in the same order. Eight columns at a time, a *panel*, are in registers while the errors of all columns
before them are gone through: one error and two pieces of U are read from shared memory for eight products.

**Groups.** The grid of a group is found when its first column comes, from all columns of the group as they are then. So
a group is made up to date as a whole first, and its panels afterwards by what happens within the group.

**Where things lie.** W is (columns, rows), so neighbouring threads have neighbouring weights. In shared memory are the
128 x 128 part of U, 64 KiB, which all threads read alike, and for each of 32 threads the block's weights and errors,
16 KiB each. There are about as many warps as multiprocessors, so a warp is alone on its own, and what counts is how
long it waits: 480 turns for the panels, of 45 cycles; 128 columns with two divisions and what happens within a panel,
of 300; the loads at the beginning, 10,000. That is 70,000 cycles, 40 µs, for a block of columns.

Source: GPTQ (arXiv 2210.17323), algorithm 1.
"""

import functools

import numpy as np
import torch

from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.launch import Kernel
from qlearn.kernels.cuda.rtn import grid_maker

from numba import cuda, float32, int32, types, uint32, uint64  # isort: skip

COLUMNS = 128  # of a block, at most
PANEL = 8
THREADS = 32


def gptq_block(W, U, which, scales, zeros, codes, errors, *, bits=4, sym=False, late=True, group_size=128):
    """Round the columns of a block, one after the other.

    W: float32 (n, rows), n columns of a weight matrix as they are when the block begins; n at most 128, in eights.
    U: float32 (n, n), the block's part of the upper factor of the inverse Hessian.
    which: int32 (n,), the group of each column.  scales, zeros: float32 (groups, rows).
    late: find the grid of each group when it begins, and write it to scales (rounded up to float16) and zeros; a group
    is then `group_size` consecutive columns, a multiple of eight that divides n. Else they are given.
    codes: int8 (sym) or uint8 (n, rows), errors: float32 (n, rows); these are written.
    All contiguous, on the GPU.  Raises ValueError for shapes and dtypes that do not fit.
    """
    n, rows = W.shape
    shapes = {"U": (n, n), "which": (n,), "codes": (n, rows), "errors": (n, rows), "zeros": tuple(scales.shape)}
    for name, tensor in {"U": U, "which": which, "codes": codes, "errors": errors, "zeros": zeros}.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where {shapes[name]} is needed for {n} columns")
    if n > COLUMNS or n % PANEL or scales.shape[-1] != rows or bits not in range(2, 9):
        raise ValueError(
            f"a block of {n} columns, {rows} rows, {bits} bits with scales of {tuple(scales.shape)} is not made here; "
            f"give at most {COLUMNS} columns, in eights, 2 to 8 bits, and scales of (groups, rows)"
        )
    if codes.dtype != (torch.int8 if sym else torch.uint8) or which.dtype != torch.int32:
        raise ValueError(f"codes are int8 if sym, else uint8, and which is int32; not {codes.dtype}, {which.dtype}")
    group = group_size if late else n
    if group % PANEL or n % group:
        raise ValueError(f"group_size={group_size} is no multiple of {PANEL} that divides {n} columns; use qlearn.gptq")
    gptq_kernel(bits, sym, late).launch(-(-rows // THREADS), W, U, which, scales, zeros, codes, errors, group)


@functools.cache
def gptq_kernel(bits, sym, late):
    """The Kernel for a grid; late: it is found on the way."""
    grid = grid_maker(bits, sym, "half")
    low_code = np.float32(1 - 2 ** (bits - 1) if sym else 0)
    high_code = np.float32(2 ** (bits - 1) - 1 if sym else 2**bits - 1)
    SHARED_U, SHARED_W = 0, 4 * COLUMNS * COLUMNS
    SHARED_E = SHARED_W + 4 * COLUMNS * THREADS
    U_ROW, COLUMN = 4 * COLUMNS, 4 * THREADS

    @device_function
    def up_to_date(mine, u_at, first, end, x):
        """A panel minus the errors of columns first ... end - 1. u_at: U[0, first column of the panel]."""
        x0, x1, x2, x3, x4, x5, x6, x7 = x
        e_at, u_at = mine + uint32(SHARED_E) + uint32(first) * uint32(COLUMN), u_at + uint32(first) * uint32(U_ROW)
        last = mine + uint32(SHARED_E) + uint32(end) * uint32(COLUMN)
        while e_at != last:  # two columns a turn: their loads are under way together
            e, f = -ptx.load_shared_float(e_at), -ptx.load_shared_float(e_at + uint32(COLUMN))
            u0, u1, u2, u3 = four(u_at)
            u4, u5, u6, u7 = four(u_at + uint32(16))
            v0, v1, v2, v3 = four(u_at + uint32(U_ROW))
            v4, v5, v6, v7 = four(u_at + uint32(U_ROW + 16))
            x0, x1, x2, x3 = ptx.fma(u0, e, x0), ptx.fma(u1, e, x1), ptx.fma(u2, e, x2), ptx.fma(u3, e, x3)
            x4, x5, x6, x7 = ptx.fma(u4, e, x4), ptx.fma(u5, e, x5), ptx.fma(u6, e, x6), ptx.fma(u7, e, x7)
            x0, x1, x2, x3 = ptx.fma(v0, f, x0), ptx.fma(v1, f, x1), ptx.fma(v2, f, x2), ptx.fma(v3, f, x3)
            x4, x5, x6, x7 = ptx.fma(v4, f, x4), ptx.fma(v5, f, x5), ptx.fma(v6, f, x6), ptx.fma(v7, f, x7)
            e_at, u_at = uint32(e_at + uint32(2 * COLUMN)), uint32(u_at + uint32(2 * U_ROW))
        return x0, x1, x2, x3, x4, x5, x6, x7

    @device_function
    def bring(U, W, base, mine, thread, n, rows, row):
        """Copy U and this row of W to shared memory, eight columns at a time, so that eight loads are under way."""
        u_from, w_from = (
            ptx.global_address(U) + uint64(thread) * uint64(16),
            ptx.global_address(W) + uint64(row) * uint64(4),
        )
        u_to, w_to = base + uint32(SHARED_U) + thread * uint32(16), mine + uint32(SHARED_W)
        u_row, w_column, takes = uint64(n) * uint64(4), uint64(rows) * uint64(4), thread < n // uint32(4)
        for _ in range(n // uint32(PANEL)):
            w0, w1 = ptx.load_1(w_from), ptx.load_1(w_from + w_column)
            w2, w3 = ptx.load_1(w_from + uint64(2) * w_column), ptx.load_1(w_from + uint64(3) * w_column)
            w4, w5 = ptx.load_1(w_from + uint64(4) * w_column), ptx.load_1(w_from + uint64(5) * w_column)
            w6, w7 = ptx.load_1(w_from + uint64(6) * w_column), ptx.load_1(w_from + uint64(7) * w_column)
            if takes:
                for k in range(PANEL):
                    a, b, c, d = ptx.load_4(u_from + uint64(k) * u_row)
                    ptx.store_shared_4(u_to + uint32(k) * uint32(U_ROW), a, b, c, d)
            ptx.store_shared_1(w_to, w0)
            ptx.store_shared_1(w_to + uint32(COLUMN), w1)
            ptx.store_shared_1(w_to + uint32(2 * COLUMN), w2)
            ptx.store_shared_1(w_to + uint32(3 * COLUMN), w3)
            ptx.store_shared_1(w_to + uint32(4 * COLUMN), w4)
            ptx.store_shared_1(w_to + uint32(5 * COLUMN), w5)
            ptx.store_shared_1(w_to + uint32(6 * COLUMN), w6)
            ptx.store_shared_1(w_to + uint32(7 * COLUMN), w7)
            u_from, w_from = u_from + uint64(PANEL) * u_row, w_from + uint64(PANEL) * w_column
            u_to, w_to = uint32(u_to + uint32(PANEL * U_ROW)), uint32(w_to + uint32(PANEL * COLUMN))

    @device_function
    def load_panel(mine, column):
        at = mine + uint32(SHARED_W) + uint32(column) * uint32(COLUMN)
        return (
            ptx.load_shared_float(at), ptx.load_shared_float(at + uint32(COLUMN)),
            ptx.load_shared_float(at + uint32(2 * COLUMN)), ptx.load_shared_float(at + uint32(3 * COLUMN)),
            ptx.load_shared_float(at + uint32(4 * COLUMN)), ptx.load_shared_float(at + uint32(5 * COLUMN)),
            ptx.load_shared_float(at + uint32(6 * COLUMN)), ptx.load_shared_float(at + uint32(7 * COLUMN)),
        )  # fmt: skip

    @device_function
    def store_panel(mine, column, x):
        x0, x1, x2, x3, x4, x5, x6, x7 = x
        at = mine + uint32(SHARED_W) + uint32(column) * uint32(COLUMN)
        ptx.store_shared_float(at, x0)
        ptx.store_shared_float(at + uint32(COLUMN), x1)
        ptx.store_shared_float(at + uint32(2 * COLUMN), x2)
        ptx.store_shared_float(at + uint32(3 * COLUMN), x3)
        ptx.store_shared_float(at + uint32(4 * COLUMN), x4)
        ptx.store_shared_float(at + uint32(5 * COLUMN), x5)
        ptx.store_shared_float(at + uint32(6 * COLUMN), x6)
        ptx.store_shared_float(at + uint32(7 * COLUMN), x7)

    @device_function
    def ends(x, low, high):
        x0, x1, x2, x3, x4, x5, x6, x7 = x
        low = ptx.min_float(ptx.min_float(ptx.min_float(x0, x1), ptx.min_float(x2, x3)), low)
        low = ptx.min_float(ptx.min_float(ptx.min_float(x4, x5), ptx.min_float(x6, x7)), low)
        high = ptx.max_float(ptx.max_float(ptx.max_float(x0, x1), ptx.max_float(x2, x3)), high)
        return low, ptx.max_float(ptx.max_float(ptx.max_float(x4, x5), ptx.max_float(x6, x7)), high)

    def gptq(W, U, Which, Scales, Zeros, Codes, Errors, group):
        base = ptx.shared_address(cuda.shared.array(0, uint32))
        n, rows = int32(W.shape[0]), int32(W.shape[1])
        thread = int32(cuda.threadIdx.x)
        row = int32(cuda.blockIdx.x) * int32(THREADS) + thread
        inside, row = row < rows, min(row, rows - int32(1))
        mine = base + uint32(thread) * uint32(4)
        bring(U, W, base, mine, uint32(thread), uint32(n), uint32(rows), uint32(row))
        cuda.syncthreads()
        for start in range(int32(0), n, int32(group)):
            scale, zero = float32(1), float32(0)
            if late:
                low = high = float32(0)
                for column in range(start, start + group, PANEL):
                    u_at = base + uint32(SHARED_U) + uint32(column) * uint32(4)
                    x = up_to_date(mine, u_at, int32(0), start, load_panel(mine, column))
                    store_panel(mine, column, x)
                    low, high = ends(x, low, high)
                if sym:
                    low, high = float32(0), ptx.max_float(high, -low)
                _, scale, zero = grid(low, high)
                if inside:
                    Scales[Which[start], row], Zeros[Which[start], row] = scale, zero
            for column in range(start, start + group, PANEL):
                u_at = base + uint32(SHARED_U) + uint32(column) * uint32(4)
                store_panel(
                    mine, column, up_to_date(mine, u_at, start if late else int32(0), column, load_panel(mine, column))
                )
                for i in range(column, column + PANEL):
                    at = mine + uint32(i) * uint32(COLUMN)
                    w = ptx.load_shared_float(at + uint32(SHARED_W))
                    for k in range(column, i):  # what happened within the panel
                        u = ptx.load_shared_float(
                            base + uint32(SHARED_U) + uint32(k) * uint32(U_ROW) + uint32(i) * uint32(4)
                        )
                        w = ptx.fma(u, -ptx.load_shared_float(mine + uint32(SHARED_E) + uint32(k) * uint32(COLUMN)), w)
                    if not late:
                        scale, zero = Scales[Which[i], row], Zeros[Which[i], row]
                    code = ptx.round_even(w / scale) + zero
                    code = ptx.min_float(ptx.max_float(code, low_code), high_code)
                    diagonal = ptx.load_shared_float(base + uint32(SHARED_U) + uint32(i) * uint32(U_ROW + 4))
                    error = (w - ptx.mul(code - zero, scale)) / diagonal
                    ptx.store_shared_float(at + uint32(SHARED_E), error)
                    if inside:
                        Codes[i, row], Errors[i, row] = int32(code), error

    return Kernel(gptq, THREADS, SHARED_E + 4 * COLUMNS * THREADS, needs=(8, 0))


@device_function
def four(at):
    """Four float32 of shared memory."""
    a, b, c, d = ptx.load_shared_4(at)
    return ptx.float_of_bits(a), ptx.float_of_bits(b), ptx.float_of_bits(c), ptx.float_of_bits(d)


def _signature(sym):
    floats = types.Array(types.float32, 2, "C")
    codes = types.Array(types.int8 if sym else types.uint8, 2, "C")
    return floats, floats, types.Array(types.int32, 1, "C"), floats, floats, codes, floats, types.int32


COMPILED = [
    (f"gptq {bits} {sym} {late}", gptq_kernel(bits, sym, late), _signature(sym), (8, 0))
    for bits, sym, late in ((4, False, True), (4, True, True), (3, False, False))
]
