"""A matrix product without multiplications: 8-bit integers times -1, 0, 1.

    y[t, o]  =  sum of x[t, i] where V[o, i] = 1   -   sum of x[t, i] where V[o, i] = -1

`by_adding` says just that. To be fast takes another idea, since a processor multiplies as quickly as it adds: never add
the same numbers twice. Five trits lie in a byte, so five inputs meet one of 243 patterns, while a matrix of 4096 rows
asks 4096 times. So all 243 sums are computed first, each by one addition to one before,

    T[0]  =  -x0 -x1 -x2 -x3 -x4             T[c + 3**k]  =  T[c] + x_k       where digit k of c is 0 or 1

and then a row of V costs one look-up and one addition for every five weights, with the stored byte as the index:
nothing is unpacked. With two bits a weight it is the same for the four weights in a byte.

**Several tokens** share the look-ups. An entry of the table is the sums of up to 64 tokens side by side, and they are
fetched and added by vector instructions, sixteen at a time.

**Sixteen bits** are enough for a sum of five int8, at most 640, and for 48 of these. Then they are added to sums of 32
bits. So the result is exact, whatever the order.

**Tiles.** The tables of all groups of five would not fit into the fast memory beside the processor. So they are built
for 16 groups, all rows go over these, and then come the next 16. For that the bytes lie in this order: the first 16 of
each row, then the second 16 of each row (`pack_tiles`), so that memory is read from one end to the other.

The idea is known as a look-up table kernel: T-MAC (arXiv 2407.00088), and TL1 of bitnet.cpp (arXiv 2410.16144). Theirs
keep a small table in a vector register, for one token; that takes instructions which are not reached from here.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import literally, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qlearn.kernels.cpu.threads import pool

PER_BYTE = (5, 4)  # trits in a byte: base 3, or 2 bits each
MAX_IN_FEATURES = (2**31 - 1) // 128
LANES = (1, 8, 16, 32, 64)  # tokens side by side
TILE = 16  # bytes of a row, and tables that are there at once: 8 kB for one token, 512 kB for 64
TILES_AT_ONCE = 3  # 48 sums of at most 640 fit in 16 bits, and so do 48 of at most 512
CODES = 256  # places in a table
INT64 = ir.IntType(64)
ONE, EPSILON, QMAX = np.float32(1), np.float32(1e-5), np.float32(127)
compiled = njit(cache=True, nogil=True, error_model="numpy")  # as in C, dividing by zero gives infinity


def by_adding(x_codes, trits):
    """The product X V^T by additions and subtractions, one at a time: what the others compute.

    x_codes: integers (tokens, in).  trits: -1, 0, 1 (out, in).  Returns int32 (tokens, out).

    >>> by_adding([[3, -4, 5]], [[1, 0, -1], [1, 1, 1]]).tolist()
    [[-2, 4]]
    """
    x_codes, trits = np.asarray(x_codes), np.asarray(trits)
    y = np.zeros((len(x_codes), len(trits)), np.int32)
    for t, x in enumerate(x_codes.tolist()):
        for o, row in enumerate(trits.tolist()):
            for number, trit in zip(x, row, strict=True):
                if trit == 1:
                    y[t, o] += number
                elif trit == -1:
                    y[t, o] -= number
    return y


def pack_tiles(trits, per_byte=5):
    """Trits in bytes, in the order in which `ternary_matmul` reads them.

    trits: -1, 0, 1 (out, in).  per_byte: 5, or 4.
    Returns uint8 (tiles, out, 16). Byte [t, o, j] holds the trits of row o from column (16 * t + j) * per_byte onward,
    each plus 1, the first as the lowest digit: in base 3, or in base 4. Past the last column they are 0.
    Raises ValueError for other numbers than trits, and another per_byte.

    >>> pack_tiles([[1, 0, -1, -1, -1, 1]])[0, 0, :2].tolist()             # 2 + 1*3, and 2 + 1*3 + 1*9 + 1*27 + 1*81
    [5, 122]
    """
    trits = np.asarray(trits)
    _check_per_byte(per_byte)
    if trits.ndim != 2 or not np.isin(trits, (-1, 0, 1)).all():
        raise ValueError(f"{trits.dtype} {trits.shape} is no matrix of -1, 0, 1; pass the codes of a ternary weight")
    out, columns = trits.shape
    tiles = _tiles(columns, per_byte)
    digits = np.zeros((out, tiles * TILE * per_byte), np.int8)
    digits[:, :columns] = trits
    digits = (digits + 1).astype(np.uint8)
    place = (3 if per_byte == 5 else 4) ** np.arange(per_byte, dtype=np.uint8)
    packed = (digits.reshape(out, tiles, TILE, per_byte) * place).sum(-1, dtype=np.uint8)
    return np.ascontiguousarray(packed.swapaxes(0, 1))


def ternary_matmul(x_codes, tiles, per_byte=5, threads=1):
    """The product X V^T of 8-bit integers and packed trits, exactly.

    x_codes: int8 (tokens, in).  tiles: uint8 (tiles, out, 16), from `pack_tiles`.  per_byte: 5, or 4.
    threads: how many share the rows; each builds the tables for itself.
    Returns int32 (tokens, out).
    Raises ValueError for other dtypes, shapes that do not fit, and inputs so long that a sum could overflow.

    >>> x = np.array([[3, -4, 5], [127, -128, 1]], dtype=np.int8)
    >>> ternary_matmul(x, pack_tiles([[1, 0, -1], [1, 1, 1]])).tolist()
    [[-2, 4], [126, 0]]
    """
    x_codes, tiles = np.asarray(x_codes), np.ascontiguousarray(tiles)
    _check(x_codes, np.int8, tiles, per_byte)
    y = np.empty((len(x_codes), tiles.shape[1]), np.int32)
    for tokens, lanes in _turns(len(x_codes)):
        x = _places(tiles, per_byte, lanes)
        x[: x_codes.shape[1], : len(x_codes[tokens])] = x_codes[tokens].T
        y[tokens] = _sums(x, tiles, x_codes.shape[1], per_byte, threads)[:, : len(y[tokens])].T
    return y


def bit_linear(x, tiles, beta, per_byte=5, threads=1):
    """A whole layer of BitNet: each token is rounded by its largest magnitude, multiplied, and scaled back.

    x: float32 (tokens, in).  beta: the scale of the weight.  The others as for `ternary_matmul`.
    Returns float32 (tokens, out): (X V^T) * (beta / s) with s = 127 / max(max|x|, 1e-5) and X = round(x * s). A token
    with NaN or infinity gives NaN.
    Raises ValueError as `ternary_matmul` does.

    >>> bit_linear(np.array([[127, 1, 2, 3.4]], dtype=np.float32), pack_tiles([[1, 0, 0, -1]]), 0.5).tolist()
    [[62.0]]
    """
    x, tiles, beta = np.ascontiguousarray(x), np.ascontiguousarray(tiles), np.float32(beta)
    _check(x, np.float32, tiles, per_byte)
    y = np.empty((len(x), tiles.shape[1]), np.float32)
    for tokens, lanes in _turns(len(x)):
        codes, scales = _places(tiles, per_byte, lanes), np.empty(len(x[tokens]), np.float32)
        _round_tokens(x[tokens], codes, scales)
        _scale_back(_sums(codes, tiles, x.shape[1], per_byte, threads), scales, beta, y[tokens])
    return y


def _turns(count):
    """Yield (slice of the tokens, lanes): as many tokens at a time as fit side by side."""
    start = 0
    while start < count:
        lanes = next((lanes for lanes in LANES if lanes >= count - start), max(LANES))
        yield slice(start, start + lanes), lanes
        start += lanes


def _places(tiles, per_byte, lanes):
    """Room for the inputs of so many tokens, side by side: int16 (inputs, lanes), zeros past the last input."""
    return np.zeros((len(tiles) * TILE * per_byte, lanes), np.int16)


def _sums(x, tiles, columns, per_byte, threads):
    """V X.  x: int16 (inputs, lanes).  Returns int32 (out, lanes)."""
    groups, out = -(-columns // per_byte), tiles.shape[1]
    y = np.zeros((out, x.shape[1]), np.int32)
    product = _product_for(x.shape[1])
    if threads == 1:
        product(x, tiles, groups, per_byte, y, 0, out)
    else:
        share = -(-out // threads) or 1
        spans = [(start, min(out, start + share)) for start in range(0, out, share)]
        list(pool(threads).map(lambda span: product(x, tiles, groups, per_byte, y, *span), spans))
    return y


# ---- compiled loops --------------------------------------------------------------------------------------------------


@functools.cache
def _product_for(lanes):
    """A function (x, tiles, groups, per_byte, y, first, last): y += V X for the rows from `first` to before `last`.

    x: int16 (inputs, lanes).  y: int32 (out, lanes).
    There is one for each number of lanes, since the width of a vector has to be known to the compiler.
    """

    @compiled
    def product(x, tiles, groups, per_byte, y, first, last):
        out = tiles.shape[1]
        tables = np.empty((TILE * CODES, lanes), np.int16)
        sums = np.zeros((out, lanes), np.int16)
        for tile in range(tiles.shape[0]):
            count = min(TILE, groups - tile * TILE)
            for g in range(count):
                _fill_table(tables, g * CODES, x, (tile * TILE + g) * per_byte, per_byte, lanes)
            for o in range(first, last):
                _add_entries(sums, o, tables, tiles, (tile * out + o) * TILE, count, lanes)
            if (tile + 1) % TILES_AT_ONCE == 0 or tile + 1 == tiles.shape[0]:
                for o in range(first, last):
                    for lane in range(lanes):
                        y[o, lane] += sums[o, lane]
                        sums[o, lane] = 0

    return product


@compiled
def _fill_table(tables, at, x, i, per_byte, lanes):
    """tables[at + byte]: the inputs from x[i] on, times the trits that the byte holds, summed."""
    literally(lanes)  # compiled anew for each number of lanes
    for lane in range(lanes):
        tables[at, lane] = 0
        for k in range(per_byte):
            tables[at, lane] -= x[i + k, lane]
    size = 1
    for k in range(per_byte):
        _add_to_each(tables, at + size, at, size, x, i + k, lanes)
        _add_to_each(tables, at + 2 * size, at + size, size, x, i + k, lanes)
        size *= 3 if per_byte == 5 else 4


@compiled
def _round_tokens(x, codes, scales):
    """codes[i, t] = round(x[t, i] * scales[t]) with scales[t] = 127 / max|x[t]|, as the layer is trained with."""
    bits = x.view(np.int32)
    for t in range(x.shape[0]):
        largest = np.int32(0)
        for i in range(x.shape[1]):
            largest = max(
                largest, bits[t, i] & np.int32(0x7FFFFFFF)
            )  # without the sign, floats are in order of their bits
        gamma = np.int32(largest).view(np.float32)  # and NaN is above all others
        scales[t] = QMAX * (ONE / max(gamma, EPSILON))  # as torch divides a number by a tensor: two roundings
        if gamma < np.inf:
            for i in range(x.shape[1]):
                codes[i, t] = np.int16(np.rint(x[t, i] * scales[t]))
        else:
            scales[t] = np.nan


@compiled
def _scale_back(sums, scales, beta, y):
    """y[t, o] = sums[o, t] * (beta / scales[t])."""
    for t in range(y.shape[0]):
        factor = beta / scales[t]
        for o in range(y.shape[1]):
            y[t, o] = np.float32(sums[o, t]) * factor


# The compiler does not put so few neighbours into one register by itself. So these two are written in its own language,
# LLVM's, where a vector of `lanes` numbers of 16 bits is a type, whatever the processor.


@intrinsic(prefer_literal=True)
def _add_to_each(typing, tables, to, start, count, x, i, lanes):
    """tables[to + c] = tables[start + c] + x[i] for each c below count."""

    def build(context, builder, signature, arguments):
        tables, to, start, count, x, i = _operands(context, builder, signature, arguments, lanes)
        added = builder.load(builder.gep(x, [i]), align=2)
        with cgutils.for_range(builder, count) as loop:
            entry = builder.load(builder.gep(tables, [builder.add(start, loop.index)]), align=2)
            place = builder.gep(tables, [builder.add(to, loop.index)])
            builder.store(builder.add(entry, added), place, align=2)
        return context.get_dummy_value()

    return types.void(tables, to, start, count, x, i, lanes), build


@intrinsic(prefer_literal=True)
def _add_entries(typing, sums, o, tables, tiles, at, count, lanes):
    """sums[o] += tables[256 * g + the byte at tiles.flat[at + g]] for each g below count."""

    def build(context, builder, signature, arguments):
        sums, o, tables, tiles, at, count = _operands(context, builder, signature, arguments, lanes)
        sum_of_row = builder.gep(sums, [o])
        running = cgutils.alloca_once_value(builder, builder.load(sum_of_row, align=2))
        with cgutils.for_range(builder, count) as loop:
            byte = builder.load(builder.gep(tiles, [builder.add(at, loop.index)]))
            place = builder.add(builder.mul(loop.index, INT64(CODES)), builder.zext(byte, INT64))
            entry = builder.load(builder.gep(tables, [place]), align=2)
            builder.store(builder.add(builder.load(running), entry), running)
        builder.store(builder.load(running), sum_of_row, align=2)
        return context.get_dummy_value()

    return types.void(sums, o, tables, tiles, at, count, lanes), build


def _operands(context, builder, signature, arguments, lanes):
    """Each argument but the last: a number as int64, an array as the pointer to its first byte, or vector of int16."""
    vector = ir.VectorType(ir.IntType(16), lanes.literal_value)
    for kind, value in list(zip(signature.args, arguments, strict=True))[:-1]:
        if isinstance(kind, types.Array):
            first = context.make_array(kind)(context, builder, value).data
            yield first if kind.dtype == types.uint8 else builder.bitcast(first, vector.as_pointer())
        else:
            yield context.cast(builder, value, kind, types.int64)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_per_byte(per_byte):
    if per_byte not in PER_BYTE:
        raise ValueError(f"per_byte={per_byte} is not how many trits lie in a byte; choose 5 or 4")


def _check(x, dtype, tiles, per_byte):
    _check_per_byte(per_byte)
    if x.dtype != dtype or x.ndim != 2:
        raise ValueError(f"inputs are {x.dtype} {x.shape}; give a matrix (tokens, in) of {np.dtype(dtype)}")
    columns = x.shape[1]
    count = _tiles(columns, per_byte)
    if tiles.dtype != np.uint8 or tiles.ndim != 3 or tiles.shape[::2] != (count, TILE):
        raise ValueError(
            f"tiles are {tiles.dtype} {tiles.shape}; {columns} inputs need uint8 ({count}, out, {TILE}) from pack_tiles"
        )
    if columns > MAX_IN_FEATURES:
        raise ValueError(f"{columns} inputs could overflow the 32-bit sum; split them into at most {MAX_IN_FEATURES}")


def _tiles(columns, per_byte):
    """How many tiles hold that many columns."""
    return -(-columns // (per_byte * TILE))
