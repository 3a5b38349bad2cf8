"""y = x W^T for up to 8 rows of x and W in MXFP4: E2M1 codes and a power of two for 32 of them, in two arrays.

That is how checkpoints hold MXFP4, and `formats/microscaling.py` makes it: the codes packed two to a byte, the first in
the low half, and a byte for each scale, E8M0. (GGUF's blocks have the scale in front of its codes: `gguf.py`.) So a row
comes in two copies, and from there on both are the same: 4.25 bits a weight, 125 MB for 28,672 x 8,192, 30.4 µs at 4.1
TB/s; and 16 instructions to make eight float16 out of a word of codes.

A scale code of 255 is NaN, and so is what it touches.
"""

import torch

from qlearn.kernels.cuda import device_function, ptx
from qlearn.kernels.cuda.block_codes import TO_14, Blocks, e2m1, power_of_two, word_at
from qlearn.kernels.cuda.block_products import WARPS, check_x, compiled, launches

from numba import float32, uint32  # isort: skip - after qlearn.kernels.cuda has chosen


def _codes(pair):
    first, second = word_at(pair * 32), word_at(pair * 32 + 16)

    @device_function
    def codes(at, t4):
        at = uint32(at + t4)
        a0, a1, a2, a3 = e2m1(first(at))
        b0, b1, b2, b3 = e2m1(second(at))
        return a0, a2, a1, a3, b0, b2, b1, b3

    return codes


@device_function
def _steps(at, beside, j):
    e = ptx.load_shared_byte(uint32(beside + j))
    step = power_of_two(e) * float32(TO_14)
    if e == uint32(255):
        step = ptx.float_of_bits(uint32(0x7FC00000))
    return step, float32(0), step, float32(0)


PLANAR = Blocks((128, 8), 2, False, _codes, _steps, "consecutive")


def mxfp4_matmul(x, codes, scales, *, overlap=False):
    """x W^T.

    x: (tokens, K) float16, bfloat16 or float32 on a GPU, 1 to 8 tokens; K a multiple of 512.
    codes: uint8 (N, K / 2) on the same GPU, two E2M1 to a byte.  scales: uint8 (N, K / 32), E8M0.
    overlap: begin while the kernel before still runs; it must not be the one that writes the weight.
    Returns (tokens, N) in the dtype of x; sums are float32.
    Raises ValueError for other dtypes and shapes, and for a GPU below compute capability 9.0.

    The same, readable: x @ MXFP4.dequantize(codes, scales).T, of `formats.microscaling`, with unpacked codes.
    """
    y = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
    for run in prepared(x, codes, scales, y, overlap=overlap):
        run()
    return y


def prepared(x, codes, scales, y, *, overlap=False, warps=WARPS, per_stage=None, stages=None):
    """The launches that `mxfp4_matmul` makes, as functions without arguments.

    warps, per_stage, stages: as in `row_stream.Plan`; what is not given is chosen.
    """
    check_x(x)
    K = x.shape[1]
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8 or codes.dim() != 2 or 2 * codes.shape[1] != K:
        raise ValueError(
            f"codes {codes.dtype} {tuple(codes.shape)} and scales {scales.dtype} do not belong to {K} inputs; pass "
            "uint8, two codes to a byte"
        )
    if K % 32 or scales.shape != (len(codes), K // 32):
        raise ValueError(f"scales {tuple(scales.shape)} for {len(codes)} rows of {K} inputs; pass one for 32 of them")
    return launches("mxfp4_planar", PLANAR, x, codes, scales, y, overlap, warps, per_stage, stages)


COMPILED = list(compiled("mxfp4_planar", PLANAR))
