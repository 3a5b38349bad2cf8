"""Round to nearest on a GPU: scales, codes and zeros of `absmax` and `zero_point`, in one walk over the weights.

The readable methods (`qlearn.methods.affine`) make each step an operation of its own, which reads all weights and
writes all results: blocks, magnitudes, quotients, rounded quotients, codes, shifted codes, packed codes. Here a thread
loads eight weights, and what leaves it is their codes. Counted for a weight in bfloat16, 4 bits, groups of 64:

    read 2 bytes, write 0.5 for its code and 2/64 for the scale      2.53 bytes: 218 M weights in 0.14 ms at 4.1 TB/s
    instructions   1 to float32, 1 for the largest, 1 that tells whether it is finite, 5 to divide, 1 to round,
                   1.5 to pack; 60 for what is done once in eight weights     18: 0.13 ms on 132 multiprocessors

so memory decides, as long as enough loads are under way: each thread has four of 16 bytes.

**Groups.** 32, 64 or 128 weights of a row are 4, 8 or 16 neighbouring lanes of a warp, which find their largest weight
by shuffles, 2 to 4 of them. Where a whole row shares a scale, a block of threads walks along it twice, the second time
through what the first has left in the caches.

**Packing.** An octet's codes are 16, 24, 32 or 64 bits. 16 are joined with those of the next lane, 24 with those of the
next three, so that words are written in all cases, side by side.

Zeros of 4 or 8 bits are packed in the same way; others, and those of rows, wait in float32 for a second kernel, which
has 1/32 of the bytes to move or less.

**The same bits.** Division, rounding of ties, rounding up of scales are those of the readable method on a CPU, and so
are the results, bit for bit. (On a GPU, PyTorch divides a tensor by a number by multiplying it with the reciprocal. So
there the readable method's own scale can be a unit in the last place off, and when it is rounded up, one step.)
"""

import functools

import numpy as np
import torch

from qlearn.formats.integers import Integers
from qlearn.kernels.cuda import SIMULATED, device_function, ptx
from qlearn.kernels.cuda.launch import Kernel
from qlearn.kernels.cuda.pieces import (
    BITS,
    KINDS,
    LARGEST,
    SHIFT,
    code_of,
    divides_exactly,
    packer,
    quotient,
    readers,
    size_of,
    storer,
)
from qlearn.tensor import QuantizedTensor

from numba import cuda, float32, int32, types, uint32, uint64  # isort: skip

GROUPS = (32, 64, 128, None)  # None: a row
THREADS = 256
EACH = 4  # octets of a thread
FLAGS = 2
BROKEN, UNFIT = range(FLAGS)  # a weight that is not finite, a scale that is too large


def quantize_absmax(weight, bits=8, group_size=None, *, scale_dtype=torch.float16):
    """As `qlearn.quantize(weight, "absmax", ...)`, to the bit.

    weight: (rows, columns), float16, bfloat16 or float32, contiguous, on the GPU; columns a multiple of 32.
    bits: 2, 3, 4 or 8.  group_size: 32, 64, 128, or None for a row.
    Returns a QuantizedTensor.  Raises ValueError for other arguments, for weights that are not finite, and for a scale
    that does not fit.
    """
    return _quantize(weight, bits, group_size, scale_dtype, True)


def quantize_zero_point(weight, bits=8, group_size=None, *, scale_dtype=torch.float16):
    """As `qlearn.quantize(weight, "zero_point", ...)`, to the bit; arguments and errors as above."""
    return _quantize(weight, bits, group_size, scale_dtype, False)


def _quantize(weight, bits, group_size, scale_dtype, symmetric):
    check(weight, bits, group_size, scale_dtype, GROUPS)
    packed, scales, zeros, flags = launch(weight, bits, group_size, scale_dtype, symmetric)
    broken, unfit = flags.tolist()
    if broken:
        raise ValueError("some weights are not finite; mend them first")
    if unfit:
        raise ValueError(f"a scale does not fit {scale_dtype}; pass scale_dtype=torch.float32")
    block = 1, group_size or weight.shape[1]
    return QuantizedTensor(packed, scales, Integers(bits, signed=symmetric), tuple(weight.shape), block, zeros)


def check(weight, bits, group_size, scale_dtype, groups):
    """ValueError for what these kernels cannot take."""
    if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in KINDS or scale_dtype not in KINDS:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} and {weight.dtype} with scales of {scale_dtype} is none for this "
            f"kernel; give a matrix, not empty, and dtypes out of {', '.join(str(dtype) for dtype in KINDS)}"
        )
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        raise ValueError("the weight does not lie in one piece that begins at a multiple of 16 bytes; pass a .clone()")
    if weight.numel() >= 2**31:
        raise ValueError(f"a weight of {weight.numel()} numbers is too large for this kernel; pass it in parts")
    if bits not in BITS:
        raise ValueError(f"bits={bits} is not packed by this kernel; choose from {BITS}, or use qlearn.quantize")
    if group_size not in groups or weight.shape[1] % (group_size or 32):
        raise ValueError(
            f"group_size={group_size} with {weight.shape[1]} columns is not what this kernel does; choose from "
            f"{groups} what divides the columns (for None, 32 has to), or use qlearn.quantize"
        )


def launch(weight, bits, group_size, scale_dtype, symmetric):
    """Start the kernels; nothing is waited for. Returns packed, scales, packed zeros (or None), flags."""
    rows, columns = weight.shape
    new = functools.partial(torch.empty, device=weight.device)
    packed = new(rows * columns * bits // 8, dtype=torch.uint8)
    scales = new(rows, columns // (group_size or columns), dtype=scale_dtype)
    direct = _packs_zeros(bits, group_size)
    zeros = 1 if symmetric else scales.numel()
    zeros = new(-(-zeros * bits // 8), dtype=torch.uint8) if direct else new(zeros, dtype=torch.float32)
    flags = torch.zeros(FLAGS, dtype=torch.int32, device=weight.device)
    kernel = rtn_kernel(KINDS[weight.dtype], group_size, bits, symmetric, KINDS[scale_dtype])
    blocks = rows if group_size is None else -(-weight.numel() // (8 * EACH * kernel.threads))
    kernel.launch(
        blocks, weight, packed, scales, zeros, flags, columns // 8 if group_size is None else len(packed) // bits
    )
    return packed, scales, None if symmetric else zeros if direct else pack_zeros(zeros, bits), flags


def _packs_zeros(bits, group):
    """Whether the first kernel packs the zeros: where those of neighbouring lanes fill a byte."""
    return bits == 8 or (bits == 4 and group is not None)


def pack_zeros(zeros, bits):
    """Zeros as whole numbers in float32, 1-D, packed like codes: uint8. What is off the grid is cut off somehow."""
    octets = -(-len(zeros) // 8)
    packed = torch.empty(octets * bits, dtype=torch.uint8, device=zeros.device)
    kernel = zeros_kernel(bits)
    kernel.launch(-(-octets // kernel.threads), zeros, packed, len(zeros))
    return packed[: -(-len(zeros) * bits // 8)]


@functools.cache
def rtn_kernel(kind, group, bits, symmetric, scale_kind, threads=None):
    """The Kernel for a dtype of weights ("half", "bfloat", "float"), group (None: row), bits, grid, dtype of scales."""
    threads = threads or (32 if SIMULATED else THREADS)
    make = _make_for_rows if group is None else functools.partial(_make_for_groups, group)
    return Kernel(make(kind, bits, symmetric, scale_kind, threads), threads, needs=(8, 0))


def _make_for_groups(group, kind, bits, symmetric, scale_kind, threads):
    eight, _, _ = readers(kind)
    ends_of, scale_of, put = _ends(symmetric), _scale(bits, symmetric, scale_kind), _put(bits, symmetric)
    octet, lanes = 8 * size_of(kind), group // 8
    put_zero = _put_zero(bits, lanes)

    @device_function
    def whole_group(x0, x1, x2, x3, x4, x5, x6, x7, at, number, octets, Scales, Zeros, Flags):
        low, high, broken = ends_of(x0, x1, x2, x3, x4, x5, x6, x7, float32(0), float32(0), float32(0))
        low, high = over_lanes(low, high, lanes, symmetric)
        inside = number < octets
        first = inside and number % uint32(lanes) == uint32(0)
        scale, zero = scale_of(low, high, broken, first, inside, number // uint32(lanes), Scales, Flags)
        if not symmetric:
            put_zero(zero, number, octets, first, Zeros)
        put(x0, x1, x2, x3, x4, x5, x6, x7, scale, zero, at, number, inside)

    def rtn(W, Packed, Scales, Zeros, Flags, octets):
        source, to = ptx.global_address(W), ptx.global_address(Packed)
        count, last = uint32(octets), uint32(octets - 1)
        a = uint32(cuda.blockIdx.x) * uint32(EACH * threads) + uint32(cuda.threadIdx.x)
        b, c, d = a + uint32(threads), a + uint32(2 * threads), a + uint32(3 * threads)
        a0, a1, a2, a3, a4, a5, a6, a7 = eight(source + uint64(min(a, last)) * uint64(octet))
        b0, b1, b2, b3, b4, b5, b6, b7 = eight(source + uint64(min(b, last)) * uint64(octet))
        c0, c1, c2, c3, c4, c5, c6, c7 = eight(source + uint64(min(c, last)) * uint64(octet))
        d0, d1, d2, d3, d4, d5, d6, d7 = eight(source + uint64(min(d, last)) * uint64(octet))
        whole_group(a0, a1, a2, a3, a4, a5, a6, a7, to, a, count, Scales, Zeros, Flags)
        whole_group(b0, b1, b2, b3, b4, b5, b6, b7, to, b, count, Scales, Zeros, Flags)
        whole_group(c0, c1, c2, c3, c4, c5, c6, c7, to, c, count, Scales, Zeros, Flags)
        whole_group(d0, d1, d2, d3, d4, d5, d6, d7, to, d, count, Scales, Zeros, Flags)

    return rtn


def _make_for_rows(kind, bits, symmetric, scale_kind, threads):
    eight, _, _ = readers(kind)
    ends_of, scale_of, put = _ends(symmetric), _scale(bits, symmetric, scale_kind), _put(bits, symmetric)
    octet, warps, places = 8 * size_of(kind), threads // 32, threads // 16
    put_zero = _put_zero(bits, None)

    def rtn(W, Packed, Scales, Zeros, Flags, octets):
        extremes = cuda.shared.array(places, float32)
        thread, row = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        count = uint32(octets)
        source = ptx.global_address(W) + uint64(row) * uint64(octets) * uint64(octet)
        to = ptx.global_address(Packed) + uint64(row) * uint64(octets) * uint64(bits)
        low = high = broken = float32(0)
        for i in range(int32(thread), octets, int32(threads)):
            x0, x1, x2, x3, x4, x5, x6, x7 = eight(source + uint64(i) * uint64(octet))
            low, high, broken = ends_of(x0, x1, x2, x3, x4, x5, x6, x7, low, high, broken)
        low, high = over_lanes(low, high, 32, symmetric)
        if thread % uint32(32) == uint32(0):
            extremes[thread // uint32(32)], extremes[uint32(warps) + thread // uint32(32)] = low, high
        cuda.syncthreads()
        for w in range(warps):
            low, high = ptx.min_float(low, extremes[w]), ptx.max_float(high, extremes[warps + w])
        scale, zero = scale_of(low, high, broken, thread == uint32(0), True, row, Scales, Flags)
        if not symmetric:
            put_zero(zero, row, uint32(0), thread == uint32(0), Zeros)
        for i in range(uint32(0), count, uint32(threads)):  # every lane makes as many turns
            number = uint32(i) + thread
            x0, x1, x2, x3, x4, x5, x6, x7 = eight(source + uint64(min(number, count - uint32(1))) * uint64(octet))
            put(x0, x1, x2, x3, x4, x5, x6, x7, scale, zero, to, number, number < count)

    return rtn


@device_function
def over_lanes(low, high, lanes, only_high):
    """The smallest (if asked for) and the largest over `lanes` neighbouring lanes, a power of two of them."""
    distance = uint32(1)
    while distance < uint32(lanes):
        if not only_high:
            low = ptx.min_float(low, ptx.shuffle_xor_float(low, distance))
        high = ptx.max_float(high, ptx.shuffle_xor_float(high, distance))
        distance = uint32(distance + distance)
    return low, high


def _ends(symmetric):
    """A device function: eight weights and the ends so far -> the smallest and the largest, and 0, or NaN for a weight
    that is not finite. A symmetric grid has -largest and largest."""

    @device_function
    def ends(x0, x1, x2, x3, x4, x5, x6, x7, low, high, broken):
        broken = ptx.fma(x0, float32(0), ptx.fma(x1, float32(0), ptx.fma(x2, float32(0), broken)))
        broken = ptx.fma(x3, float32(0), ptx.fma(x4, float32(0), ptx.fma(x5, float32(0), broken)))
        broken = ptx.fma(x6, float32(0), ptx.fma(x7, float32(0), broken))
        if symmetric:
            x0, x1, x2, x3, x4, x5, x6, x7 = abs(x0), abs(x1), abs(x2), abs(x3), abs(x4), abs(x5), abs(x6), abs(x7)
        else:
            low = ptx.min_float(ptx.min_float(ptx.min_float(x0, x1), ptx.min_float(x2, x3)), low)
            low = ptx.min_float(ptx.min_float(ptx.min_float(x4, x5), ptx.min_float(x6, x7)), low)
        high = ptx.max_float(ptx.max_float(ptx.max_float(x0, x1), ptx.max_float(x2, x3)), high)
        high = ptx.max_float(ptx.max_float(ptx.max_float(x4, x5), ptx.max_float(x6, x7)), high)
        return low, high, broken

    return ends


def grid_maker(bits, symmetric, scale_kind):
    """A device function (smallest, largest weight of a group) -> (scale before it is rounded, scale, zero)."""
    up = rounder_up(scale_kind)
    qmax = np.float32(2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)

    @device_function
    def grid(low, high):
        exact = (high - low) / qmax
        scale = up(float32(1) if exact == float32(0) else exact)
        zero = float32(0)
        if not symmetric:
            zero = ptx.min_float(ptx.round_even(-low / scale), qmax)
        return exact, scale, zero

    return grid


def _scale(bits, symmetric, scale_kind):
    """A device function that finds scale and zero of a group, and has the first of its threads write the scale."""
    grid, store, scale_size = grid_maker(bits, symmetric, scale_kind), storer(scale_kind), size_of(scale_kind)
    largest = np.float32(LARGEST[scale_kind])

    @device_function
    def scale_of(low, high, broken, writes, inside, group, Scales, Flags):
        exact, scale, zero = grid(low, high)
        if inside and not broken + exact <= largest:  # so seldom that one question does for both
            Flags[BROKEN if broken != float32(0) else UNFIT] = 1
        if writes:
            store(ptx.global_address(Scales) + uint64(group) * uint64(scale_size), scale)
        return scale, zero

    return scale_of


def _put_zero(bits, lanes):
    """A device function (zero, number, numbers, whether to write, Zeros) that writes the zero of a group.

    number: of the octet, of which there are `numbers`, where a group has some `lanes`; else of the group itself.
    """
    step = lanes or 1
    if lanes is not None and bits == 4:

        @device_function
        def put(zero, number, numbers, writes, Zeros):
            beside = ptx.shuffle_xor_float(zero, uint32(lanes))  # the other zero of the byte
            if writes and number & uint32(lanes) == uint32(0):
                high = uint32(beside) if number + uint32(lanes) < numbers else uint32(0)
                Zeros[number // uint32(2 * lanes)] = uint32(zero) | high << uint32(4)

    elif bits == 8:

        @device_function
        def put(zero, number, numbers, writes, Zeros):
            if writes:
                Zeros[number // uint32(step)] = uint32(zero)

    else:

        @device_function
        def put(zero, number, numbers, writes, Zeros):
            if writes:
                at = ptx.global_address(Zeros) + uint64(number // uint32(step)) * uint64(4)
                ptx.store_float(at, zero)

    return put


def rounder_up(kind):
    """A device function: a positive float32 -> the nearest number of a dtype that is not smaller."""
    if kind == "float":

        @device_function
        def up(x):
            return x

        return up
    narrow, wide = {
        "half": (ptx.h2_of_floats, ptx.floats_of_h2),
        "bfloat": (ptx.b2_of_floats, ptx.floats_of_b2),
    }[kind]

    @device_function
    def up(x):
        word = narrow(x, float32(0))
        near, _ = wide(word)
        above, _ = wide(word + uint32(1))  # the bits of positive floats, read as integers, count upwards
        return above if near < x else near

    return up


def _put(bits, symmetric):
    """A device function that rounds an octet and writes its codes; every lane of the warp has to come to it."""
    pack, write = packer(bits), writer(bits)
    qmax = np.float32(2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)

    @device_function
    def near(x, scale, by_scale, zero):
        """The code of a weight. The scale was made so that only the upper end of an asymmetric grid can be exceeded."""
        x = quotient(x, scale, by_scale)
        if symmetric:
            return ptx.bits_of_float(x + SHIFT)
        return ptx.bits_of_float(ptx.min_float(x, qmax - zero) + SHIFT) + uint32(zero)

    @device_function
    def far(x, scale, zero):
        """The same where the scale is so small or so large that `quotient` fails."""
        if symmetric:
            return code_of(x / scale, -qmax, qmax)
        return code_of(x / scale, -zero, qmax - zero) + uint32(zero)

    @device_function
    def put(x0, x1, x2, x3, x4, x5, x6, x7, scale, zero, at, number, inside):
        if divides_exactly(scale):
            by = float32(1) / scale
            c0, c1, c2, c3 = (
                near(x0, scale, by, zero),
                near(x1, scale, by, zero),
                near(x2, scale, by, zero),
                near(x3, scale, by, zero),
            )
            c4, c5, c6, c7 = (
                near(x4, scale, by, zero),
                near(x5, scale, by, zero),
                near(x6, scale, by, zero),
                near(x7, scale, by, zero),
            )
        else:
            c0, c1, c2, c3 = far(x0, scale, zero), far(x1, scale, zero), far(x2, scale, zero), far(x3, scale, zero)
            c4, c5, c6, c7 = far(x4, scale, zero), far(x5, scale, zero), far(x6, scale, zero), far(x7, scale, zero)
        low, high = pack(c0, c1, c2, c3, c4, c5, c6, c7)
        write(at, number, low, high, inside)

    return put


def writer(bits):
    """A device function that writes the packed octets of a warp, number after number, as words."""
    if bits == 8:

        @device_function
        def write(at, number, low, high, inside):
            if inside:
                ptx.store_2(at + uint64(number) * uint64(8), low, high)

    elif bits == 4:

        @device_function
        def write(at, number, low, high, inside):
            if inside:
                ptx.store_1(at + uint64(number) * uint64(4), low)

    elif bits == 3:

        @device_function
        def write(at, number, low, high, inside):
            place = number & uint32(3)  # among the four octets of three words; three lanes write one each
            follows = ptx.shuffle(low, number + uint32(1) & uint32(31))
            if inside and place < uint32(3):
                word = low >> (place * uint32(8)) | follows << (uint32(24) - place * uint32(8))
                ptx.store_1(at + uint64((number >> uint32(2)) * uint32(12) + place * uint32(4)), word)

    else:

        @device_function
        def write(at, number, low, high, inside):
            follows = ptx.shuffle_xor(low, uint32(1))
            if inside and number & uint32(1) == uint32(0):
                ptx.store_1(at + uint64(number) * uint64(2), low | follows << uint32(16))

    return write


@functools.cache
def zeros_kernel(bits):
    """The Kernel behind `pack_zeros`: eight zeros a thread."""
    pack = packer(bits)

    def zeros(Zeros, Packed, count):
        octet = uint32(cuda.blockIdx.x) * uint32(cuda.blockDim.x) + uint32(cuda.threadIdx.x)
        first, n = octet * uint32(8), uint32(count)
        if first < n:
            codes = cuda.local.array(8, uint32)
            for k in range(8):
                at = first + uint32(k)
                codes[k] = uint32(int32(Zeros[min(at, n - uint32(1))])) if at < n else uint32(0)
            low, high = pack(codes[0], codes[1], codes[2], codes[3], codes[4], codes[5], codes[6], codes[7])
            for k in range(bits):
                word, shift = (low, uint32(8 * k)) if k < 4 else (high, uint32(8 * (k - 4)))
                Packed[octet * uint32(bits) + uint32(k)] = word >> shift & uint32(255)

    return Kernel(zeros, 32 if SIMULATED else 256)


def _signature(kind, group, bits, scale_kind="half"):
    dtypes = {"half": types.float16, "bfloat": types.uint16, "float": types.float32}
    weight, scales = types.Array(dtypes[kind], 2, "C"), types.Array(dtypes[scale_kind], 2, "C")
    zeros = _BYTES if _packs_zeros(bits, group) else _FLOATS
    return weight, _BYTES, scales, zeros, types.Array(types.int32, 1, "C"), types.int32


_BYTES, _FLOATS = types.Array(types.uint8, 1, "C"), types.Array(types.float32, 1, "C")
COMPILED = [
    (f"rtn {case}", rtn_kernel(*case, "half", THREADS), _signature(*case[:3]), (8, 0))
    for case in (
        ("bfloat", 64, 4, True),
        ("bfloat", 64, 4, False),
        ("half", 32, 3, False),
        ("half", 128, 2, True),
        ("float", 64, 8, False),
        ("bfloat", None, 8, True),
        ("float", None, 3, False),
    )
]
COMPILED += [("zeros", zeros_kernel(4), (_FLOATS, _BYTES, types.int32), (7, 5))]
