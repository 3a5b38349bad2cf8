"""What a warp does with 16 rows of 256 columns in blocks: the product of `gguf.py` and `mxfp4_matmul.py`.

**Scales.** All types are  weight = step · code − offset  for 16 or 32 columns, so with sums over those

    y  +=  step · sum(code · x)  −  offset · sum(x)           in float32

and sum(x) is known before. Take a block with d = 0.5 and codes 9 and 4 (weights 0.5 and −2) and x = 2, 1:
0.5 · (9 · 2 + 4 · 1) − 8 · 0.5 · (2 + 1) = 11 − 12 = −1.

**Eight blocks in one go.** With one row of x, seven of the eight columns of the tensor core are free. They hold the
same x, but each another block of it, with zeros in place of the rest:

    column        0   1   2  ...                         so the accumulators of column 3 get only what block 3
    inputs 0-31   x   0   0                              contributes. After 256 inputs the 8 columns are the sums of
    inputs 32-63  0   x   0                              8 blocks, and every lane weighs two of them by their scales,
    ...                                                  instead of all lanes the same one.

So the scales, which in Q4_K take more instructions than the codes, are unpacked once for 256 weights. Two rows of x
leave four columns for each, and so on; from five on, all lanes weigh the same block.
"""

import functools

import numpy as np
import torch

from qlearn.kernels.cuda import SIMULATED, device_function, ptx
from qlearn.kernels.cuda.half_columns import (
    DTYPES,
    SUM_BYTES,
    X_BYTES,
    arranger,
    finisher,
    measurer,
    parts_of,
)
from qlearn.kernels.cuda.launch import capability
from qlearn.kernels.cuda.pieces import KINDS, size_of, storer
from qlearn.kernels.cuda.row_roles import COLUMNS
from qlearn.kernels.cuda.row_stream import CAPABILITY, Recipe, kernel, plan_for, prepare, threads_of

from numba import float32, types, uint32  # isort: skip - after qlearn.kernels.cuda has chosen

MAX_ROWS = 8
WARPS = 8
GROUP = 256


def product_of(blocks, columns):
    """The `product` of a Recipe. columns: of x, rounded up to 1, 2, 4 or 8."""
    slots = COLUMNS // columns  # blocks side by side

    def maker(between):
        down = np.uint32(8 * between)
        weigh = _weigh(blocks, columns, down)
        first, second, third, fourth = (_pair(blocks, slots, pair, down, weigh) for pair in range(4))

        @device_function
        def product(at, beside, x_at, x_stride, sums_at, sums_stride, group, used, lane, acc):
            g, t = uint32(lane >> uint32(2)), uint32(lane & uint32(3))
            slot = uint32(g // uint32(columns))
            column = uint32(min(uint32(g % uint32(columns)), uint32(used - uint32(1))))
            x_at = uint32(x_at + column * x_stride + group * uint32(X_BYTES) + slot * uint32(64) + t * uint32(16))
            sums_at = uint32(sums_at + group * uint32(SUM_BYTES))
            zero, x = float32(0), (uint32(0), uint32(0), uint32(0), uint32(0))
            c = (zero, zero, zero, zero)
            x, c, e = first(at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, c, acc)
            x, c, e = second(at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc)
            x, c, e = third(at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc)
            fourth(at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc)

        return product

    return maker


def _pair(blocks, slots, pair, down, weigh):
    """A device function: the blocks 2 * pair and 2 * pair + 1. It takes and returns x and the sums of either half."""
    codes = blocks.codes(pair)
    first, second = _block(slots, 2 * pair, weigh), _block(slots, 2 * pair + 1, weigh)

    @device_function
    def two(at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc):
        t4 = uint32(t * uint32(4))
        low, high = codes(at, t4), codes(uint32(at + down), t4)
        x, c, e = first(
            (low[0], high[0], low[1], high[1]), (low[2], high[2], low[3], high[3]),
            at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc,
        )  # fmt: skip
        return second(
            (low[4], high[4], low[5], high[5]), (low[6], high[6], low[7], high[7]),
            at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc,
        )  # fmt: skip

    return two


def _block(slots, j, weigh):
    """A device function: block j of eight. It begins with new inputs and new sums, and weighs them, when it is time."""
    begins, ends = j % slots == 0, (j + 1) % slots == 0
    mine, x_offset, first_block = np.uint32(j % slots), np.uint32(64 * j), np.uint32(j - j % slots)

    @device_function
    def one(a, b, at, beside, x_at, slot, t, sums_at, sums_stride, used, x, c, e, acc):
        if begins:
            zero = float32(0)
            x, c, e = ptx.load_shared_4(uint32(x_at + x_offset)), (zero, zero, zero, zero), (zero, zero, zero, zero)
        b0, b1, b2, b3 = x
        if slots > 1:
            keep = uint32(0x3C003C00) if slot == mine else uint32(0)  # twice 1.0, or 0
            b0, b1, b2, b3 = ptx.mul_h2(b0, keep), ptx.mul_h2(b1, keep), ptx.mul_h2(b2, keep), ptx.mul_h2(b3, keep)
        c = ptx.mma_half(a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3])
        e = ptx.mma_half(b[0], b[1], b[2], b[3], b2, b3, e[0], e[1], e[2], e[3])
        if ends:
            weigh(at, beside, first_block, sums_at, sums_stride, used, t, c, e, acc)
        return x, c, e

    return one


def _weigh(blocks, columns, down):
    """A device function: sums of code times x for some blocks, c, times their steps, less offsets, added to acc."""
    steps, has_offset = blocks.steps, blocks.offset

    @device_function
    def add(acc, at, c, e, step, sums):
        total = acc[at] + step[0] * c + step[2] * e
        if has_offset:
            total = total - step[1] * sums[0] - step[3] * sums[1]
        acc[at] = total

    @device_function
    def sums_of(at):
        if has_offset:
            first, second = ptx.load_shared_2(at)
            return ptx.float_of_bits(first), ptx.float_of_bits(second)
        return float32(0), float32(0)

    if columns == 1:  # the accumulators 2t and 2t + 1 are two blocks

        @device_function
        def weigh(at, beside, block, sums_at, sums_stride, used, t, c, e, acc):
            j = uint32(t * uint32(2))
            k = uint32(j + uint32(1))
            j_sums, k_sums = sums_of(uint32(sums_at + j * uint32(8))), sums_of(uint32(sums_at + k * uint32(8)))
            below, below_beside = uint32(at + down), uint32(beside + down)
            add(acc, 0, c[0], e[0], steps(at, beside, j), j_sums)
            add(acc, 0, c[1], e[1], steps(at, beside, k), k_sums)
            add(acc, 2, c[2], e[2], steps(below, below_beside, j), j_sums)
            add(acc, 2, c[3], e[3], steps(below, below_beside, k), k_sums)

    else:  # they are two columns

        @device_function
        def weigh(at, beside, block, sums_at, sums_stride, used, t, c, e, acc):
            j = uint32(block + uint32(t * uint32(2)) // uint32(columns))
            column = uint32(uint32(t * uint32(2)) % uint32(columns))
            first = uint32(min(column, uint32(used - uint32(1))))
            second = uint32(min(uint32(column + uint32(1)), uint32(used - uint32(1))))
            sums_at = uint32(sums_at + j * uint32(8))
            first_sums = sums_of(uint32(sums_at + first * sums_stride))
            second_sums = sums_of(uint32(sums_at + second * sums_stride))
            low = steps(at, beside, j)
            high = steps(uint32(at + down), uint32(beside + down), j)
            add(acc, 0, c[0], e[0], low, first_sums)
            add(acc, 1, c[1], e[1], low, second_sums)
            add(acc, 2, c[2], e[2], high, first_sums)
            add(acc, 3, c[3], e[3], high, second_sums)

    return weigh


def recipe_of(name, blocks, dtype, tokens, warps=WARPS):
    """The Recipe for rows of such blocks. name: to be told apart.  tokens: rows of x, in a dtype of torch."""
    columns = 1
    while columns < tokens * parts_of(dtype):
        columns *= 2
    return _recipe(name, blocks, dtype, columns, warps)


@functools.cache
def _recipe(name, blocks, dtype, columns, warps):
    return Recipe(
        name=f"{name}_{KINDS[dtype]}_{columns}", pieces=blocks.pieces, group=GROUP, align=blocks.align, spread=16,
        columns=columns, parts=parts_of(dtype), x_bytes=X_BYTES, extra_bytes=SUM_BYTES, whole=False,
        measure=measurer(dtype, threads_of(warps)), arrange=arranger(dtype, threads_of(warps), blocks.order),
        product=product_of(blocks, columns),
        finish=finisher(dtype), store=storer(KINDS[dtype]), y_bytes=size_of(KINDS[dtype]),
    )  # fmt: skip


def launches(name, what, x, codes, beside, y, overlap=False, warps=WARPS, per_stage=None, stages=None):
    """The launches for rows of Blocks, as many as are needed. codes, beside: uint8 (N, bytes)."""
    check_weight(x, codes, GROUP * what.align)
    check_weight(x, beside, GROUP * what.align)
    if len(codes) == 0:
        return []
    tokens = min(len(x), COLUMNS // parts_of(x.dtype))
    while True:
        recipe = recipe_of(name, what, x.dtype, tokens, warps)
        plan = plan_for(recipe, len(codes), x.shape[1], tokens, warps, per_stage, stages)
        if plan is not None:
            break
        if tokens == 1:
            raise ValueError(f"a row of {x.shape[1]} inputs does not fit into shared memory; split the matrix")
        tokens = (tokens + 1) // 2
    made = []
    for start in range(0, len(x), tokens):
        part = x[start : start + tokens]
        recipe = recipe_of(name, what, x.dtype, len(part), warps)
        plan = plan_for(recipe, len(codes), x.shape[1], len(part), warps, per_stage, stages)
        made.append(prepare(recipe, plan, codes, beside, part, y[start : start + tokens], overlap=overlap))
    return made


def check_x(x, dtypes=DTYPES):
    """Raise ValueError unless x can be multiplied."""
    if x.dim() != 2 or x.dtype not in dtypes or not 1 <= len(x) <= MAX_ROWS or not x.is_contiguous():
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, strides {x.stride()}; pass 1 to {MAX_ROWS} contiguous rows of {names}"
        )


def check_weight(x, weight, multiple):
    """Raise ValueError unless the bytes lie where the kernel can take them."""
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}; move one of them")
    if not SIMULATED and (x.device.type != "cuda" or capability(x.device.index or 0) < CAPABILITY):
        raise ValueError(
            f"this kernel needs a GPU of compute capability 9.0, and x is on {x.device}; dequantize instead"
        )
    if x.shape[1] % multiple:
        raise ValueError(f"{x.shape[1]} inputs are no multiple of {multiple}, so rows lie askew; dequantize instead")
    if not weight.is_contiguous() or weight.data_ptr() % 16 or x.data_ptr() % 16:
        raise ValueError("the weight and x must be contiguous, at addresses that are multiples of 16; clone them")


def compiled(name, what):
    """Entries of `COMPILED`: what is compiled for one type of blocks."""
    for dtype, tokens in ((torch.float16, 1), (torch.bfloat16, 2), (torch.float32, 2), (torch.float16, 8)):
        recipe = recipe_of(name, what, dtype, tokens)
        yield recipe.name, kernel(recipe, WARPS, 1), signature(dtype, dtype), CAPABILITY


def signature(x_dtype, y_dtype):
    """The types of a kernel's arguments."""
    numba = {
        torch.float16: types.float16, torch.bfloat16: types.uint16, torch.float32: types.float32,
        torch.int8: types.int8, torch.int32: types.int32,
    }  # fmt: skip
    flat = types.Array(types.uint8, 1, "C")
    x, y = types.Array(numba[x_dtype], 2, "C"), types.Array(numba[y_dtype], 2, "C")
    return (flat, flat, x, y, types.float32, *[types.int32] * 4)
