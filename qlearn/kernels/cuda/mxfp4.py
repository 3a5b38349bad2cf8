"""Activations to MXFP4 on a GPU, rotated on the way: one walk over the numbers.

A product in MXFP4 wants its inputs in the format each time it is made, so what it takes to put them there counts.
Two steps are joined: the Hadamard rotation of 32, 64 or 128 numbers (`qlearn.rotation`), which spreads an outlier over
all of them, and rounding to E2M1 with a power of two for each 32 (`qlearn.formats.microscaling`, by its rule "floor"
and ties to even). Read are 2 bytes a number, in half precision, written 4.25 bits; nothing in between touches memory.

**A thread has 32 numbers**, 64 bytes, a whole block of the format. So five of the rounds of the transform, at distances
1 to 16, are additions of registers, and so is the search for the largest number. Rounds at 32 and 64 take a shuffle
between neighbouring lanes for each number. The codes of a thread are 16 bytes, stored at once.

**Instructions** for a number, counted in the compiled kernel: 18 with a rotation of 32 (to float32 1, rounds 5, the
largest 1, scale 1, code 7, packing 3), and 2 more for each further round. A multiprocessor starts 4 · 32 of them a
cycle, so 132 at 1.75 GHz do 1.6 numbers a picosecond, of 2.53 bytes each: 4.1 TB/s. Memory and arithmetic take about
as long.

**The code of a magnitude a ≤ 6.** Distances in E2M1 are 1/2 below 2, 1 from there to 4, then 2. Let 2**e be the power
of two at or below a, and e = 0 if a < 1. Adding 1.5 · 2**(22 + e) rounds a to a multiple of 2**(e - 1), ties to even,
and leaves in the sum's low bits how many of them a is: n = 0 ... 4, or 2 ... 4. The code is n + 2e, and 2e may as well
be part of what is added, being even:

    a = 2.6:  e = 1, rounded to 3 = 3 steps of 1,  code 3 + 2 = 5, which is 3.0 in E2M1

1.5 · 2**(22 + e), with 2e in its last bits, is made from the exponent field of a by an addition and a shift.

**What is not finite.** Nothing is looked at, and no error raised: a block that holds infinity or NaN, or is rotated
together with one that does, gets the scale 255, which is NaN in E8M0.

Source: OCP Microscaling Formats 1.0; Ashkboos et al., QuaRot, arXiv 2404.00456; Castro et al., Quartet, arXiv
2505.14669.
"""

import functools
import math

import numpy as np
import torch

from qlearn.kernels.cuda import SIMULATED, device_function, ptx
from qlearn.kernels.cuda.launch import Kernel
from qlearn.kernels.cuda.pieces import KINDS, readers, size_of

from numba import cuda, float32, int32, types, uint32, uint64  # isort: skip

SIZES = (None, 32, 64, 128)  # of the rotation
THREADS = 256
BLOCK = 32
EXPONENT = np.uint32(0x7F800000)
TO_MAGIC = np.uint32((22 << 23) + 0x400000 - 2 * 127)  # from the exponent field, twice the exponent added
SIGNS = np.uint32(0x00080008)


def quantize_mxfp4(x, hadamard=None):
    """Rotate, and round to MXFP4.

    x: (..., n), float16, bfloat16 or float32, contiguous, on the GPU; n a multiple of 32 and of the rotation's size.
    hadamard: 32, 64 or 128, the size of the rotation; None for none.
    Returns (packed, scales): uint8 (..., n / 2), two codes a byte, the first in the low half; torch.float8_e8m0fnu
    (..., n / 32). They are what MXFP4.quantize makes of the rotated numbers, computed in float32.
    Raises ValueError for other arguments.
    """
    size = hadamard
    if size not in SIZES:
        raise ValueError(f"hadamard={size!r} is no size of this kernel's; choose from {SIZES}")
    if x.dtype not in KINDS or x.dim() == 0 or x.shape[-1] % (size or BLOCK) or x.shape[-1] % BLOCK:
        raise ValueError(
            f"numbers of shape {tuple(x.shape)} and {x.dtype} do not divide into runs of {max(size or 0, BLOCK)} of a "
            f"dtype out of {', '.join(str(dtype) for dtype in KINDS)}; pad or convert them"
        )
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError("the numbers do not lie in one piece that begins at a multiple of 16 bytes; pass a .clone()")
    packed = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // BLOCK, dtype=torch.uint8, device=x.device)
    if x.numel():
        kernel, blocks = mxfp4_kernel(KINDS[x.dtype], size), x.numel() // BLOCK
        kernel.launch(-(-blocks // kernel.threads), x.view(-1), packed.view(-1), scales.view(-1), blocks)
    return packed, scales.view(torch.float8_e8m0fnu)


@functools.cache
def mxfp4_kernel(kind, size, threads=None):
    """The Kernel for a dtype ("half", "bfloat", "float") and a size of the rotation."""
    threads = threads or (32 if SIMULATED else THREADS)
    eight, _, _ = readers(kind)
    number_bytes, lanes = size_of(kind), (size or BLOCK) // BLOCK
    norm = np.float32(1 / math.sqrt(size)) if size else np.float32(1)

    @device_function
    def over_lanes(x, lane):
        """The rounds between numbers that lie 32 and 64 apart."""
        distance = uint32(1)
        while distance < uint32(lanes):
            x = round_over_lanes(x, lane, distance)
            distance = uint32(distance + distance)
        return x

    def mxfp4(X, Packed, Scales, blocks):
        lane = uint32(cuda.threadIdx.x) & uint32(31)
        mine = uint32(cuda.blockIdx.x) * uint32(threads) + uint32(cuda.threadIdx.x)
        at = ptx.global_address(X) + uint64(min(mine, uint32(blocks - 1))) * uint64(BLOCK * number_bytes)
        a, b = eight(at), eight(at + uint64(8 * number_bytes))
        c, d = eight(at + uint64(16 * number_bytes)), eight(at + uint64(24 * number_bytes))
        if size is None:
            whole = times_zero(a) + times_zero(b) + times_zero(c) + times_zero(d)
        else:
            a, b, c, d = rounds_of_eight(a), rounds_of_eight(b), rounds_of_eight(c), rounds_of_eight(d)
            a, b, c, d = plus(a, b), minus(a, b), plus(c, d), minus(c, d)
            a, b, c, d = plus(a, c), plus(b, d), minus(a, c), minus(b, d)
            a, b, c, d = over_lanes(a, lane), over_lanes(b, lane), over_lanes(c, lane), over_lanes(d, lane)
            whole = a[0] * float32(0)  # each result has all numbers in it, so one of them will do
        largest = ptx.max_float(
            ptx.max_float(largest_of(a), largest_of(b)), ptx.max_float(largest_of(c), largest_of(d))
        )
        code = max(int32(ptx.bits_of_float(largest * norm) >> uint32(23)) - int32(2), int32(0))
        factor = ptx.float_of_bits(uint32(int32(254) - code) << uint32(23))  # 2**(127 - code)
        if code > int32(32) and code < int32(220):
            factor = factor * norm
        else:  # where norm in the factor would round otherwise, among numbers too small to be normal
            a, b, c, d = scaled(a, norm), scaled(b, norm), scaled(c, norm), scaled(d, norm)
        wa, wb = word_of(scaled(a, factor)), word_of(scaled(b, factor))
        wc, wd = word_of(scaled(c, factor)), word_of(scaled(d, factor))
        if mine < uint32(blocks):
            ptx.store_4(ptx.global_address(Packed) + uint64(mine) * uint64(16), wa, wb, wc, wd)
            Scales[mine] = code if whole == float32(0) else int32(255)

    return Kernel(mxfp4, threads)


@device_function
def plus(x, y):
    """Sums of two octets."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    y0, y1, y2, y3, y4, y5, y6, y7 = y
    return x0 + y0, x1 + y1, x2 + y2, x3 + y3, x4 + y4, x5 + y5, x6 + y6, x7 + y7


@device_function
def minus(x, y):
    """Differences of two octets."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    y0, y1, y2, y3, y4, y5, y6, y7 = y
    return x0 - y0, x1 - y1, x2 - y2, x3 - y3, x4 - y4, x5 - y5, x6 - y6, x7 - y7


@device_function
def scaled(x, factor):
    """An octet times a number."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    return x0 * factor, x1 * factor, x2 * factor, x3 * factor, x4 * factor, x5 * factor, x6 * factor, x7 * factor


@device_function
def times_zero(x):
    """0, or NaN if a number of the octet is not finite."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    zero = float32(0)
    z = ptx.fma(x0, zero, ptx.fma(x1, zero, ptx.fma(x2, zero, x3 * zero)))
    return ptx.fma(x4, zero, ptx.fma(x5, zero, ptx.fma(x6, zero, ptx.fma(x7, zero, z))))


@device_function
def largest_of(x):
    """The largest magnitude of an octet."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    left = ptx.max_float(ptx.max_float(abs(x0), abs(x1)), ptx.max_float(abs(x2), abs(x3)))
    return ptx.max_float(left, ptx.max_float(ptx.max_float(abs(x4), abs(x5)), ptx.max_float(abs(x6), abs(x7))))


@device_function
def rounds_of_eight(x):
    """The rounds of the Hadamard transform at distances 1, 2 and 4."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 + x1, x0 - x1, x2 + x3, x2 - x3, x4 + x5, x4 - x5, x6 + x7, x6 - x7
    x0, x2, x1, x3, x4, x6, x5, x7 = x0 + x2, x0 - x2, x1 + x3, x1 - x3, x4 + x6, x4 - x6, x5 + x7, x5 - x7
    return x0 + x4, x1 + x5, x2 + x6, x3 + x7, x0 - x4, x1 - x5, x2 - x6, x3 - x7


@device_function
def round_over_lanes(x, lane, distance):
    """A round between an octet and that of the lane at a distance: the lower one gets sums, the upper differences."""
    sign = float32(-1) if lane & distance else float32(1)
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    return (
        ptx.fma(sign, x0, ptx.shuffle_xor_float(x0, distance)), ptx.fma(sign, x1, ptx.shuffle_xor_float(x1, distance)),
        ptx.fma(sign, x2, ptx.shuffle_xor_float(x2, distance)), ptx.fma(sign, x3, ptx.shuffle_xor_float(x3, distance)),
        ptx.fma(sign, x4, ptx.shuffle_xor_float(x4, distance)), ptx.fma(sign, x5, ptx.shuffle_xor_float(x5, distance)),
        ptx.fma(sign, x6, ptx.shuffle_xor_float(x6, distance)), ptx.fma(sign, x7, ptx.shuffle_xor_float(x7, distance)),
    )  # fmt: skip


@device_function
def magnitude_code(x):
    """A word whose low half is the code of |x|, 0 ... 7."""
    a = ptx.min_float(abs(x), float32(6))
    exponent = ptx.bits_of_float(ptx.max_float(a, float32(1))) & EXPONENT
    return ptx.bits_of_float(a + ptx.float_of_bits(uint32(exponent + (exponent >> uint32(22)) + TO_MAGIC)))


@device_function
def pair_of(x, y):
    """The codes of two numbers, signs included, in the two halves of a word."""
    codes = ptx.permute_bytes(magnitude_code(x), magnitude_code(y), uint32(0x5410))
    signs = ptx.permute_bytes(ptx.bits_of_float(x), ptx.bits_of_float(y), uint32(0x7632))
    return ptx.and_or(signs >> uint32(12), SIGNS, codes)


@device_function
def word_of(x):
    """The codes of an octet. Numbers 0 and 4 are a pair, 1 and 5 ...: so three shifts bring all to their places."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    low = uint32(pair_of(x0, x4) | pair_of(x1, x5) << uint32(4))
    return uint32(low | pair_of(x2, x6) << uint32(8) | pair_of(x3, x7) << uint32(12))


def _signature(kind):
    dtypes = {"half": types.float16, "bfloat": types.uint16, "float": types.float32}
    numbers, out = types.Array(dtypes[kind], 1, "C"), types.Array(types.uint8, 1, "C")
    return numbers, out, out, types.int32


COMPILED = [
    (f"mxfp4 {kind} {size}", mxfp4_kernel(kind, size, THREADS), _signature(kind), (7, 5))
    for kind, size in (("bfloat", None), ("bfloat", 32), ("half", 64), ("bfloat", 128), ("float", 32))
]
