"""y = x V^T for up to 8 rows of x and V of -1, 0, 1, at 2 bits a trit or at 1.6.

With x of 8-bit integers, as BitNet has them, the result is exact. With float16, bfloat16 and float32 the sums are
float32. `row_stream.py` brings the bytes; here is what a warp does with them. For 28,672 x 8,192 at 4.1 TB/s:

    2 bits            58.7 MB   14.3 µs         four trits in a byte, the bytes of a QuantizedTensor as they are
    1.625 bits        47.7 MB   11.6 µs         five trits in a byte, rows filled up to 320; see `pack_rows`

So little time for so many weights that each may cost about one instruction. These are the tricks.

**Two bits are a number already.** Stored are the two lowest bits of the two's complement, 00, 01, 11. At the top of a
byte they read as the int8 64 · v. At the top of 16 bits they read as a float16: 0x4000 is 2.0, 0xC000 is −2.0. So a
mask takes four trits out of a word, or two; a shift by two bits brings the next.

**Five trits without a division.** A byte is the number t0 t1 t2 t3 t4 in base 3 (t0 the highest digit, each trit plus
1), as a fraction of 256: byte = ceil(256 · number / 243), as in llama.cpp's TQ1_0. Times 3, what exceeds 8 bits is the
first digit; the rest, times 3, gives the second; and so on. For float16 that is what is done, with two bytes in a word:

    w · 3 & 0x03000300      the digits; as float16 they are digit · 2**-16        w = w · 3 & 0x00FF00FF       the rest

**Nor with a remainder.** For 8-bit integers it is too slow. Leave the digits where they are: after k multiplications
the high byte is D_k, the number that the first k digits make, at most 242. A digit is a difference,

    t_(k-1) = D_k − 3 D_(k-1)      so      Σ x_k t_k  =  Σ D_k x_(k-1)  −  3 Σ D_k x_k       (x_5 = 0)

and two sums of products with the same D_k are two columns of the same product of a tensor core. Nothing but
multiplications by 3, 9, 27, 81, 243 is left, each for two bytes; the low bytes meet zeros among the inputs. By hand:
digits 2 0 1, x = 5, 7, -1:  D = 2, 6, 19, so 2·5 + 6·7 − 19 − 3·(2·7 − 6) = 33 − 24 = 9 = 2·5 + 0·7 − 1.

Digits are one more than trits, so the sum of x is taken off at the end.

Integers are added up in 32 bits, which wrap around, so that sums in between do no harm.
"""

import functools

import numpy as np
import torch

from qlearn.formats.gguf_blocks.ternary import join_trits
from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.block_products import WARPS, check_weight, check_x, signature
from qlearn.kernels.cuda.half_columns import DTYPES, measurer, parts_of
from qlearn.kernels.cuda.pieces import KINDS, size_of, storer
from qlearn.kernels.cuda.row_roles import COLUMNS, FACTORS
from qlearn.kernels.cuda.row_stream import CAPABILITY, Recipe, kernel, plan_for, prepare, threads_of
from qlearn.kernels.cuda.ternary_columns import half_arranger, int8_arranger, int_total_of, total_of
from qlearn.kernels.cuda.ternary_product import five_trits_half, five_trits_int8, two_bits_half, two_bits_int8

from numba import float32, int32, uint32  # isort: skip - after qlearn.kernels.cuda has chosen

GROUPS = {2: 256, 1.6: 320}  # columns in 64 bytes
BYTES = 64
PER_BYTE = 5


def ternary_matmul(x, packed, bits=2, scale=1.0, *, overlap=False):
    """x V^T for trits, times a scale if x is floating point.

    x: (tokens, K) int8, float16, bfloat16 or float32 on a GPU, 1 to 8 tokens.
    packed: uint8 (N, bytes of a row) on the same GPU. bits=2: two's complement, four to a byte, the first in the lowest
    bits, as in the `packed` of a QuantizedTensor of two bits, viewed as (N, K / 4).  bits=1.6: from `pack_rows`.
    overlap: begin while the kernel before still runs; it must not be the one that writes `packed`.
    Returns int32 (tokens, N), exactly, for int8; else (tokens, N) in the dtype of x, with sums in float32.
    Raises ValueError for other dtypes and shapes, for K that is no multiple of 256 at 2 bits or of 8 at 1.6, and for a
    GPU below compute capability 9.0.

    The same, readable: `kernels.cpu.ternary.by_adding(x, trits)`.
    """
    whole = x.dtype == torch.int8
    y = torch.empty(len(x), len(packed), dtype=torch.int32 if whole else x.dtype, device=x.device)
    for run in prepared(x, packed, y, bits, scale, overlap=overlap):
        run()
    return y


def bit_linear(x, packed, beta, bits=2, *, overlap=False):
    """A layer of BitNet: each token is rounded to 8 bits by its largest magnitude, multiplied, and scaled back.

    x: (tokens, K) float16, bfloat16 or float32.  beta: the scale of the weight.  The others as for `ternary_matmul`.
    Returns (tokens, N) in the dtype of x: (X V^T) * (beta / s) with s = 127 / max(max|x|, 1e-5), X = round(x * s). For
    float32 that is what `kernels.cpu.ternary.bit_linear` returns, bit for bit. A token with NaN or infinity gives NaN.
    Raises ValueError as `ternary_matmul` does.
    """
    y = torch.empty(len(x), len(packed), dtype=x.dtype, device=x.device)
    for run in prepared(x, packed, y, bits, beta, rounds=True, overlap=overlap):
        run()
    return y


def pack_rows(trits):
    """Trits at 1.6 bits, in the order of these kernels.

    trits: -1, 0, 1 (N, K), NumPy array or torch tensor.
    Returns uint8 (N, 64 * ceil(K / 320)), a tensor on the device of the trits.
    Raises ValueError for other numbers.

    >>> pack_rows(np.array([[1, -1, -1, -1, 0]]))[0, :2].tolist()       # 2 0 0 0 1 is 163; 256 * 163 / 243, rounded up
    [172, 0]
    """
    trits = torch.as_tensor(trits)
    if trits.dim() != 2 or not ((trits >= -1) & (trits <= 1)).all() or (trits != trits.round()).any():
        raise ValueError(
            f"{trits.dtype} {tuple(trits.shape)} is no matrix of -1, 0, 1; pass the codes of a ternary weight"
        )
    N, K = trits.shape
    digits = np.zeros((N, -(-K // GROUPS[1.6]) * BYTES, PER_BYTE), np.uint8)
    digits.reshape(N, -1)[:, :K] = (trits + 1).byte().cpu().numpy()
    return torch.from_numpy(join_trits(np.moveaxis(digits, -1, -2))).to(trits.device)


def prepared(x, packed, y, bits=2, scale=1.0, *, rounds=False, overlap=False, warps=WARPS, per_stage=None, stages=None):
    """The launches of `ternary_matmul`, or with `rounds` of `bit_linear`, as functions without arguments.

    warps, per_stage, stages: as in `row_stream.Plan`; what is not given is chosen.
    """
    if bits not in GROUPS:
        raise ValueError(f"bits={bits} is not what trits are stored in; choose 2 or 1.6")
    check_x(x, DTYPES if rounds else (torch.int8, *DTYPES))
    K, group = x.shape[1], GROUPS[bits]
    row = -(-K // group) * BYTES
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row:
        raise ValueError(f"{packed.dtype} {tuple(packed.shape)} is no matrix of {K} trits a row; pass uint8 (N, {row})")
    check_weight(x, packed, group if bits == 2 else 8)
    if len(packed) == 0:
        return []
    tokens = min(len(x), COLUMNS // _parts(bits, x.dtype, rounds))
    while plan_for(recipe_of(bits, x.dtype, rounds, warps), len(packed), K, tokens, warps, per_stage, stages) is None:
        if tokens == 1:
            raise ValueError(f"a row of {K} inputs does not fit into shared memory; split the matrix")
        tokens = (tokens + 1) // 2
    made, recipe = [], recipe_of(bits, x.dtype, rounds, warps)
    for start in range(0, len(x), tokens):
        part = x[start : start + tokens]
        plan = plan_for(recipe, len(packed), K, len(part), warps, per_stage, stages)
        made.append(prepare(recipe, plan, packed, packed, part, y[start : start + tokens], scale, overlap))
    return made


@functools.cache
def recipe_of(bits, dtype, rounds=False, warps=WARPS):
    """The Recipe for trits. dtype: of x.  rounds: whether x is rounded to 8 bits first."""
    threads, whole, parts = threads_of(warps), dtype == torch.int8 or rounds, _parts(bits, dtype, rounds)
    if whole:
        product, x_bytes = (two_bits_int8, 256) if bits == 2 else (five_trits_int8, 640)
        arrange = int8_arranger(dtype, threads, bits)
    else:
        product, x_bytes = (two_bits_half, 512) if bits == 2 else (five_trits_half, 640)
        arrange = half_arranger(dtype, threads, bits)
    kind = "int8" if dtype == torch.int8 else KINDS[dtype] + ("_rounded" if rounds else "")
    return Recipe(
        name=f"trits_{'2' if bits == 2 else '1_6'}_{kind}", pieces=(BYTES,), group=GROUPS[bits], align=1, spread=64,
        columns=COLUMNS, parts=parts, x_bytes=x_bytes, extra_bytes=0, whole=whole,
        measure=_nothing if dtype == torch.int8 else measurer(dtype, threads, scaled=rounds or dtype != torch.float16),
        arrange=arrange, product=product,
        finish=_finish_int8(bits, rounds, threads) if whole else _finish_half(bits, dtype, threads),
        store=ptx.store_1 if dtype == torch.int8 else storer(KINDS[dtype]),
        y_bytes=4 if dtype == torch.int8 else size_of(KINDS[dtype]),
    )  # fmt: skip


def _parts(bits, dtype, rounds):
    """Columns that a row of x takes."""
    if dtype == torch.int8 or rounds:
        return 1 if bits == 2 else 2
    return parts_of(dtype)


@device_function
def _nothing(x, base, thread, K, tokens):
    pass


def _finish_int8(bits, rounds, threads):
    total_of_row, two_bits = int_total_of(threads), bits == 2

    @device_function
    def finish(first, second, base, token, scale):
        value = int32(first >> int32(6)) if two_bits else int32(first - int32(3) * second - total_of_row(base, token))
        if rounds:
            return float32(value) * (scale / ptx.load_shared_float(uint32(base + uint32(FACTORS) + token * uint32(4))))
        return uint32(value)

    return finish


def _finish_half(bits, dtype, threads):
    total_of_row, two_bits, two = total_of(threads), bits == 2, parts_of(dtype) == 2
    scaled = dtype != torch.float16

    @device_function
    def finish(first, second, base, token, scale):
        value = first
        if two:
            value = first + second
        value = value * float32(0.5) if two_bits else value * float32(2.0**16) - total_of_row(base, token)
        if scaled:
            value = value * ptx.load_shared_float(uint32(base + uint32(FACTORS) + token * uint32(4)))
        return value * scale

    return finish


def _compiled():
    for bits in GROUPS:
        for dtype, rounds in (
            (torch.int8, False),
            (torch.float16, False),
            (torch.float32, False),
            (torch.bfloat16, True),
        ):
            recipe = recipe_of(bits, dtype, rounds)
            y_dtype = torch.int32 if dtype == torch.int8 else dtype
            yield recipe.name, kernel(recipe, WARPS, 2), signature(dtype, y_dtype), CAPABILITY


COMPILED = list(_compiled())
