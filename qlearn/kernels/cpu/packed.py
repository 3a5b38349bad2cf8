"""A product with packed codes: y = x W^T where the matrix W is never made.

For one token a processor does not wait for its multiplications but for the memory that the matrix comes from. At 4 bits
there is an eighth of it to be read. That gain is lost if the matrix is unpacked first, since then all of it is written
as floats, and read again. Here codes are taken out of their bytes in registers, and used at once.

    y[t, o]  =  sum over the groups g of row o:   scale[o, g] * ( sum of code[o, i] * x[t, i]  -  zero[o, g] * X[t, g] )

The scale is taken out of the inner sum, and so is the zero-point: X[t, g] is the sum of the inputs of a group, which is
the same for all rows. What is left in the inner loop is a code, made a float, times an input.

**Eight by eight.** Codes lie in a row as a stream of bits (`formats.integers`), so 8 codes of b bits take b bytes. A
*tile* is 64 of them: 8 lanes of 8 codes, the bytes of lane j being bytes j*b ... j*b + b - 1. Each lane is put into a
word of 32 bits of a vector register. Then code k of all eight lanes is one shift and one mask away,

    4 bits:    lane      0         1         2     ...            (words >> 4*k) & 15   =   codes k, 8 + k, 16 + k, ...
               word   76543210  FEDCBA98  ...                     each digit names the code that the four bits belong to

without a branch or a table, at 3 bits as at 4. (8 codes of 5 to 8 bits need more than 32 bits; they are taken from two
words, which overlap: the first four bytes of the lane, and its last four.) Signed codes are shifted up to the sign and
back, which fills in the sign. The inputs are put into the same order once, x[tile, k, t, lane], and the zero-point is
treated as a ninth code, whose input x[tile, 8] is minus the sum of the others. Several tokens, four or eight, share the
work of taking the codes out.

**How exact it is.** Codes, and their products with scales, are never rounded to fewer bits: the result differs from
`dequantize` and a float32 product only as two float32 sums in different order differ. With u = 2^-24, and n columns,

    |y - exact|  <=  gamma(n + 4) * sum over i of |scale| * (|code| + |zero|) * |x|         gamma(k) = k u / (1 - k u)

for each term takes part in fewer than n additions, and is made with at most four more roundings: the scale of its
column; the product with a code or a zero; their difference; the scale. A bias is one addition more. An input that is
infinite gives NaN where there are zeros.

**Besides.** Column scales are multiplied into x, and a Hadamard rotation is done to x: (x H)(W H)^T = x W^T.

How fast it is was measured by `qlearn.bench.cpu_kernels`. The first call for a kind of code takes a second or two, in
which the loop is compiled; it is kept in a cache beside this file.

Source: llama.cpp's products of quantized matrices (ggml/src/ggml-cpu) are the model, but they round x to 8 bits first,
to multiply integers; here x stays float32. Bounds: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3.
"""

import functools

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from qlearn.formats.codebooks import Codebook
from qlearn.formats.floats import FloatFormat
from qlearn.formats.integers import Integers, Trits
from qlearn.kernels.cpu.threads import share
from qlearn.rotation import hadamard

TILE = 64  # codes: 8 lanes of 8
TOKENS = (1, 4, 8)  # rows of x that are multiplied together
LEAST_SHARE = 2**20  # weights for a thread of its own: fewer take less time than it needs to wake up
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT32, INT64 = ir.IntType(32), ir.IntType(64)
INTS, FLOATS = ir.VectorType(INT32, 8), ir.VectorType(ir.FloatType(), 8)
NOTHING = ir.Constant(FLOATS, None)  # eight zeros
compiled = njit(cache=True, nogil=True, error_model="numpy")
_KINDS = {Codebook: "a table of numbers", Trits: "packed in base 3", FloatFormat: "a format of floats"}


def packed_matmul(x, quantized, bias=None):
    """The product x W^T + b, from the packed codes of W.

    x: float32, float16 or bfloat16 (..., in) on the CPU; it is computed in float32.  quantized: QuantizedTensor (out,
    in) of integers, in blocks of one row.  bias: (out,) in the dtype of x, or None.
    Returns (..., out) in the dtype of x.
    Raises ValueError with the sentence of `why_not`, and for an x or a bias that does not fit.

    >>> import qlearn
    >>> weight = qlearn.quantize(torch.tensor([[1.0, -2, 3, -4, 5, -6, 7, 0]]), "absmax", bits=4)
    >>> packed_matmul(torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2, 0]]), weight)
    tensor([[ 4.],
            [14.]])
    """
    reason = why_not(x, quantized)
    if reason:
        raise ValueError(f"no product with the packed codes: {reason}")
    _check_sizes(x, quantized, bias)
    rows = x.detach().float().reshape(-1, quantized.shape[1])
    if quantized.hadamard is not None:
        rows = hadamard(rows, quantized.hadamard)
    y = torch.from_numpy(_product(rows.contiguous().numpy(), quantized))
    if bias is not None:
        y += bias.detach().float()
    return y.to(x.dtype).reshape(*x.shape[:-1], quantized.shape[0])


def why_not(x, quantized):
    """None where `packed_matmul` can do it, else a sentence.

    >>> import qlearn
    >>> why_not(torch.ones(8), qlearn.quantize(torch.eye(8), "nf4", group_size=8))
    'nf4 is a table of numbers, and this kernel takes integers'
    """
    format, (block_rows, group), columns = quantized.format, quantized.block, quantized.shape[1]
    if x.dtype not in DTYPES:
        return f"x is {str(x.dtype).removeprefix('torch.')}, and this kernel sums in float32"
    if {x.device.type, quantized.device.type} != {"cpu"}:
        return f"x is on {x.device}, the weight on {quantized.device}, and this kernel runs on the cpu"
    if not isinstance(format, Integers):
        return f"{format.name} is {_KINDS.get(type(format), 'no format of integers')}, and this kernel takes integers"
    if block_rows != 1:
        return f"blocks of {block_rows} rows share a scale, and this kernel goes row by row"
    if columns % 8 or group % 8:
        return f"groups of {group} in rows of {columns} do not all begin with a byte; multiples of 8 do"
    if x.requires_grad and torch.is_grad_enabled():
        return "x wants a gradient, and this kernel gives none"
    return None


def _product(x, quantized):
    """y, float32 (tokens, out), of x, float32 (tokens, in) that is already rotated."""
    (out, columns), group, format = quantized.shape, quantized.block[1], quantized.format
    scales, zeros = _readable(quantized.scales), _readable(quantized.zeros)
    even = group % TILE == 0
    bands = [None] if quantized.column_scales is None else quantized.column_scales.float().view(-1, columns).numpy()
    threads = max(1, min(torch.get_num_threads(), out * columns // LEAST_SHARE))
    packed, y = quantized.packed.numpy(), np.empty((len(x), out), np.float32)
    for band, factors in enumerate(bands):
        scaled = x if factors is None else x * factors
        for start in range(0, len(x), TOKENS[-1]):
            turn = slice(start, start + TOKENS[-1])
            tokens = next(n for n in TOKENS if n >= len(x[turn]))
            tiles = _in_tiles(scaled[turn], tokens, zeros is not None)
            product = _product_for(format.bits, format.signed, tokens, even, zeros is not None)
            arguments = packed, columns, group, tiles, scales, zeros, y[turn]
            first, last = band * out // len(bands), (band + 1) * out // len(bands)
            share(functools.partial(product, *arguments), first, last, threads)
    return y


def _in_tiles(x, tokens, with_sums):
    """The inputs in the order of the loop, float32 (tiles, 8 or 9, tokens, 8); zeros where there are none.

    tiles[tile, k, t, lane] = x[t, 64 * tile + 8 * lane + k], and tiles[tile, 8] is minus the sum over k.
    """
    count, columns = x.shape
    tiles = np.zeros((-(-columns // TILE), 8 + with_sums, tokens, 8), np.float32)
    if columns % TILE:
        x = np.pad(x, ((0, 0), (0, TILE - columns % TILE)))
    tiles[:, :8, :count] = x.reshape(count, -1, 8, 8).transpose(1, 3, 0, 2)
    if with_sums:
        tiles[:, 8] = -tiles[:, :8].sum(1)
    return tiles


def _readable(numbers):
    """Scales or zeros as an array of one axis: float32, float16 as uint16, or packed codes; None for none."""
    if numbers is None:
        return None
    as_stored = isinstance(numbers, torch.Tensor) and numbers.dtype in (torch.float16, torch.uint8)
    array = (numbers if as_stored else numbers.float()).contiguous().numpy().reshape(-1)
    return array.view(np.uint16) if array.dtype == np.float16 else array


# ---- compiled loops --------------------------------------------------------------------------------------------------


@functools.cache
def _product_for(bits, signed, tokens, even, has_zeros):
    """A function (packed, columns, group, x, scales, zeros, y, first, last): these rows of y = x W^T.

    packed: uint8 (bytes,).  x: float32 (tiles, 8 or 9, tokens, 8).  scales, zeros: from `_readable`.
    y: float32 (at most tokens, out).
    There is one for each kind of code, since shifts are cheap where the compiler knows them.  even: groups are whole
    tiles. Else each lane has a scale and a zero of its own, and the last tile may not be full.
    """

    @compiled
    def of_even_groups(packed, columns, group, x, scales, zeros, y, first, last):
        groups = columns // group
        sums, s, z = np.empty((tokens, 8), np.float32), np.empty(groups, np.float32), np.empty(groups, np.float32)
        for o in range(first, last):
            _read(scales, o * groups, bits, s)
            _read(zeros, o * groups, bits, z)
            at, run = o * columns // 8 * bits, group // TILE
            _add_runs(packed, at, x, 0, groups, run, s, z, sums, bits, signed, tokens, even, has_zeros)
            for t in range(len(y)):
                y[t, o] = _sum_of_eight(sums, t)

    @compiled
    def of_any_groups(packed, columns, group, x, scales, zeros, y, first, last):
        groups = columns // group
        sums, sums_of_rest = np.empty((tokens, 8), np.float32), np.zeros((tokens, 8), np.float32)
        s, z = np.empty(groups, np.float32), np.empty(groups, np.float32)
        lane_s, lane_z = np.zeros(8 * len(x), np.float32), np.zeros(8 * len(x), np.float32)
        whole, lanes, rest = columns // TILE, columns // 8 % 8, np.zeros(8 * bits, np.uint8)
        for o in range(first, last):
            at = o * columns // 8 * bits
            _read(scales, o * groups, bits, s)
            _read(zeros, o * groups, bits, z)
            _spread(s, group // 8, lane_s)
            if has_zeros:
                _spread(z, group // 8, lane_z)
            _add_runs(packed, at, x, 0, whole, 1, lane_s, lane_z, sums, bits, signed, tokens, even, has_zeros)
            if lanes:  # from a copy, to read nothing behind the last byte
                for byte in range(lanes * bits):
                    rest[byte] = packed[at + whole * 8 * bits + byte]
                rest_s, rest_z = lane_s[whole * 8 :], lane_z[whole * 8 :]
                _add_runs(rest, 0, x, whole, 1, 1, rest_s, rest_z, sums_of_rest, bits, signed, tokens, even, has_zeros)
            for t in range(len(y)):
                y[t, o] = _sum_of_eight(sums, t) + _sum_of_eight(sums_of_rest, t)

    return of_even_groups if even else of_any_groups


@compiled
def _sum_of_eight(sums, t):
    total = np.float32(0)
    for lane in range(8):
        total += sums[t, lane]
    return total


@compiled
def _spread(numbers, times, lanes):
    """Each number so many times, one behind the other."""
    if times == 4:
        _spread_by(numbers, 4, lanes)
    elif times == 2:
        _spread_by(numbers, 2, lanes)
    else:
        _spread_by(numbers, times, lanes)


@njit(cache=True, inline="always")
def _spread_by(numbers, times, lanes):
    for i in range(len(numbers)):
        for j in range(times):
            lanes[i * times + j] = numbers[i]


def _read(numbers, first, bits, row):
    """row[i] = number first + i of scales or zeros, as they are stored: one of the functions below."""


@overload(_read)
def _reader(numbers, first, bits, row):
    readers = {types.uint8: _read_codes, types.uint16: _read_halves, types.float32: _read_floats}
    return readers.get(getattr(numbers, "dtype", None), _read_nothing)


def _read_codes(numbers, first, bits, row):
    """Codes that are packed as a stream, in uint8."""
    mask, last = (1 << bits) - 1, len(numbers) - 1
    for i in range(len(row)):
        bit = (first + i) * bits
        two = numbers[bit >> 3] | numbers[min((bit >> 3) + 1, last)] << 8
        row[i] = np.float32((two >> (bit & 7)) & mask)


def _read_halves(numbers, first, bits, row):
    """float16, given as uint16: exponent and fraction are moved into place, and the bias of the exponent corrected."""
    for i in range(len(row)):
        half = np.uint32(numbers[first + i])
        moved = (half & np.uint32(0x7FFF)) << np.uint32(13)
        number = np.uint32(moved).view(np.float32) * np.float32(2.0**112)
        large = (half & np.uint32(0x7C00)) == np.uint32(0x7C00)  # infinite, or no number
        size = (moved | np.uint32(0x7F800000)) if large else np.float32(number).view(np.uint32)
        row[i] = np.uint32(size | (half & np.uint32(0x8000)) << np.uint32(16)).view(np.float32)


def _read_floats(numbers, first, bits, row):
    for i in range(len(row)):
        row[i] = numbers[first + i]


def _read_nothing(numbers, first, bits, row):
    pass


# ---- the innermost loop ----------------------------------------------------------------------------------------------

# It is written in LLVM's own language, where a vector of eight numbers is a type, whatever the processor.


@intrinsic(prefer_literal=True)
def _add_runs(typing, packed, at, x, tile, runs, run, scales, zeros, sums, bits, signed, tokens, even, has_zeros):
    """sums[t] = the sum over tiles of scale * (the sum over k of codes[k] * x[k, t]  +  zero * x[8, t]).

    From that byte and that tile on there are `runs` times `run` tiles. The tiles of a run share a scale and a zero, or
    eight of them, one for each lane. x[8] is minus the sum of the inputs.
    """
    kinds = packed, types.int64, x, types.int64, types.int64, types.int64, scales, zeros, sums
    constants = bits, signed, tokens, even, has_zeros
    bits, signed, tokens, even, has_zeros = (constant.literal_value for constant in constants)
    steps = 8 + has_zeros

    def build(context, builder, signature, arguments):
        packed, at, x, tile, runs, run, scales, zeros, sums = (
            _first_byte(context, builder, kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(kinds, arguments, strict=False)
        )
        packed = builder.gep(packed, [at])
        x = builder.gep(_vectors(builder, x), [builder.mul(tile, INT64(steps * tokens))])
        totals = [cgutils.alloca_once_value(builder, NOTHING) for _ in range(tokens)]
        with cgutils.for_range(builder, runs) as outer:
            scale, zero = (_of_run(builder, numbers, outer.index, even) for numbers in (scales, zeros))
            first = builder.mul(outer.index, run)
            with cgutils.for_range(builder, run) as inner:
                index = builder.add(first, inner.index)
                codes = builder.gep(packed, [builder.mul(index, INT64(8 * bits))])
                inputs = builder.gep(x, [builder.mul(index, INT64(steps * tokens))])
                numbers = [*_eight_vectors(builder, codes, bits, signed), zero][:steps]
                for t, total in enumerate(totals):
                    of_tile = _dot(builder, numbers, inputs, t, tokens)
                    builder.store(_multiply_add(builder, scale, of_tile, builder.load(total)), total)
        for t, total in enumerate(totals):
            builder.store(builder.load(total), builder.gep(_vectors(builder, sums), [INT64(t)]), align=4)
        return context.get_dummy_value()

    return types.void(*kinds, *constants), build


def _dot(builder, numbers, inputs, t, tokens):
    """The sum over k of numbers[k] * inputs[k, t], for each lane; even and odd k do not wait for one another."""
    sums = [None, None]
    for k, number in enumerate(numbers):
        x = builder.load(builder.gep(inputs, [INT64(k * tokens + t)]), align=4)
        sums[k % 2] = _multiply_add(builder, number, x, sums[k % 2]) if sums[k % 2] else builder.fmul(number, x)
    return builder.fadd(*sums)


def _eight_vectors(builder, codes, bits, signed):
    """Yield code 0 of the eight lanes of a tile as floats, then code 1 ...  codes: pointer to its 8 * bits bytes."""
    as_bytes = ir.VectorType(ir.IntType(8), 8 * bits)
    tile = builder.load(builder.bitcast(codes, as_bytes.as_pointer()), align=1)
    low = _words(builder, tile, bits, 0)
    high = _words(builder, tile, bits, bits - 4) if bits > 4 else low
    for k in range(8):
        in_low = (k + 1) * bits <= 32
        word, bit = (low, k * bits) if in_low else (high, k * bits - 8 * (bits - 4))
        if signed:
            upward = builder.shl(word, _splat(32 - bits - bit))
            number = builder.ashr(upward, _splat(32 - bits))
        else:
            number = builder.and_(builder.lshr(word, _splat(bit)), _splat(2**bits - 1))
        yield builder.sitofp(number, FLOATS)


def _words(builder, tile, bits, offset):
    """Eight words of 32 bits: the bytes of each lane from `offset` on, at most four; zeros above them."""
    zero = 8 * bits  # the first byte of the second operand
    places = [lane * bits + offset + byte if byte < bits else zero for lane in range(8) for byte in range(4)]
    mask = ir.Constant(ir.VectorType(INT32, 32), [INT32(place) for place in places])
    return builder.bitcast(builder.shuffle_vector(tile, ir.Constant(tile.type, None), mask), INTS)


def _of_run(builder, numbers, index, even):
    """The scales (or zeros) of a run as a vector: one number eight times, or eight."""
    if not even:
        return builder.load(builder.gep(_vectors(builder, numbers), [index]), align=4)
    one = builder.insert_element(NOTHING, builder.load(builder.gep(numbers, [index])), INT32(0))
    return builder.shuffle_vector(one, NOTHING, ir.Constant(INTS, None))


def _multiply_add(builder, a, b, c):
    """a * b + c, in one instruction where there is one."""
    kind = ir.FunctionType(FLOATS, [FLOATS, FLOATS, FLOATS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32"), [a, b, c])


def _splat(number):
    return ir.Constant(INTS, [INT32(number)] * 8)


def _first_byte(context, builder, kind, array):
    """Where the numbers of a contiguous array begin."""
    return context.make_array(kind)(context, builder, array).data


def _vectors(builder, pointer):
    return builder.bitcast(pointer, FLOATS.as_pointer())


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_sizes(x, quantized, bias):
    out, columns = quantized.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {tuple(x.shape)}; a weight of {out} x {columns} needs (..., {columns})")
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != x.dtype):
        raise ValueError(
            f"a bias of {bias.dtype} {tuple(bias.shape)} does not fit; here it has to be {x.dtype} ({out},)"
        )
