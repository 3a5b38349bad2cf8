"""Single instructions that Numba has no word for, as functions to be called in a kernel.

PTX is the assembly language of NVIDIA's GPUs. `op` makes a device function out of one line of it, with a Python
function beside it that means the same. On a GPU the line is compiled into the kernel; in the simulator the Python
function is called; and a test on a GPU holds the two together. So each instruction here can be read, and checked.

**Values.** Everything is a 32-bit word (u), a 64-bit address (l) or a float32 (f). Two numbers of half precision lie in
one word, the first in its lower half; h2 in a name says so, b2 is the same with bfloat16. Addresses count bytes. Those
of shared memory (names with `shared`) have 32 bits.

The instructions: PTX ISA 9.0, chapter 9.7. https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

import math
import struct
import time

import numpy as np
from numba import types

from qlearn.kernels.cuda import SIMULATED, simulator

_TYPES = {"u": types.uint32, "l": types.uint64, "f": types.float32}
_CONSTRAINTS = {"u": "r", "l": "l", "f": "f"}
INSTRUCTIONS = {}  # name -> (result, args, code, meaning): what the test on a GPU goes through


def op(name, result, args, code, meaning, effect=False):
    """A device function of one PTX instruction.

    result, args: a letter u, l or f for each value.  code: the instruction, with $0, $1, ... for the results and then
    the arguments.  meaning: what it computes, on numpy numbers.  effect: it does more than to compute its result
    (reads or writes memory, waits), so it must not be moved or left out.
    """
    INSTRUCTIONS[name] = result, args, code, meaning
    return meaning if SIMULATED else _compiled(name, result, args, code, effect)


def _compiled(name, result, args, code, effect):
    """The instruction as an intrinsic of Numba: an inline-assembly call in LLVM's language."""
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    ll = {"u": ir.IntType(32), "l": ir.IntType(64), "f": ir.FloatType()}
    if len(result) > 1:
        returned, ll_returned = (
            types.UniTuple(_TYPES[result[0]], len(result)),
            ir.LiteralStructType([ll[r] for r in result]),
        )
    else:
        returned, ll_returned = (_TYPES[result], ll[result]) if result else (types.void, ir.VoidType())
    wanted = [ll[a] for a in args]
    outs, ins = ["=" + _CONSTRAINTS[r] for r in result], [_CONSTRAINTS[a] for a in args]
    constraints = ",".join(outs + ins + ["~{memory}"] * effect)

    def codegen(context, builder, signature, values):
        fitted = [_fit(builder, value, kind) for value, kind in zip(values, wanted, strict=True)]
        call = ir.InlineAsm(ir.FunctionType(ll_returned, wanted), code, constraints, side_effect=effect)
        got = builder.call(call, fitted)
        if len(result) > 1:
            return context.make_tuple(builder, returned, [builder.extract_value(got, k) for k in range(len(result))])
        return got if result else context.get_dummy_value()

    signature = returned(*(_TYPES[a] for a in args))
    names = "".join(f", a{k}" for k in range(len(args)))  # an intrinsic must have named arguments
    scope = {"signature": signature, "codegen": codegen}
    exec(f"def {name}(typingctx{names}):\n    return signature, codegen", scope)
    return intrinsic(scope[name])


def _fit(builder, value, kind):
    """An integer as wide as the instruction wants it."""
    if value.type == kind:
        return value
    return builder.zext(value, kind) if value.type.width < kind.width else builder.trunc(value, kind)


def _address(array_bits):
    """A device function that gives the address of an array."""
    if SIMULATED:
        return lambda array: simulator.address_of(array, array_bits)
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    wide, narrow = ir.IntType(64), ir.IntType(32)

    @intrinsic
    def address(typingctx, array):
        def codegen(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            place = builder.ptrtoint(data, wide)
            if array_bits == 64:
                return place
            cast = ir.InlineAsm(ir.FunctionType(wide, [wide]), "cvta.to.shared.u64 $0, $1;", "=l,l")
            return builder.trunc(builder.call(cast, [place]), narrow)

        return (types.uint32 if array_bits == 32 else types.uint64)(array), codegen

    return address


shared_address = _address(32)
global_address = _address(64)

# --- numbers of half precision, in pairs ---


def halves(word):
    """The two float16 in a word."""
    return np.array([word], np.uint32).view(np.float16)


def bfloats(word):
    """The two bfloat16 in a word, as float32."""
    word = np.uint32(word)
    return np.array([word << np.uint32(16), word & np.uint32(0xFFFF0000)], np.uint32).view(np.float32)


def word_of_halves(pair):
    """Two numbers, rounded to float16, in a word."""
    with np.errstate(over="ignore"):
        return np.asarray(pair).astype(np.float16).view(np.uint32)[0]


def word_of_bfloats(pair):
    """Two numbers, rounded to bfloat16 (ties to even), in a word."""
    bits = np.asarray(pair, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(np.asarray(pair, np.float32)), 0x7FFF, rounded)
    return np.uint32(rounded[0] | rounded[1] << 16)


def _wide(word, of=halves):
    return of(word).astype(np.float64)


def _permute(a, b, selector):
    """Four of eight bytes; where 8 is added to the number of a byte, it is replaced by its sign, eight times."""
    eight = np.array([a, b], np.uint32).view(np.uint8)
    four = eight[[int(selector) >> 4 * k & 7 for k in range(4)]]
    if int(selector) & 0x8888:
        signs = (four.view(np.int8) >> 7).view(np.uint8)
        four = np.where([int(selector) >> 4 * k & 8 for k in range(4)], signs, four)
    return four.view(np.uint32)[0]


def _sum(a, b, c):
    """a b + c, whose product float64 holds exactly; the sum is rounded to odd, so that it can be rounded once more.

    Rounded to odd: what is not exact ends in a one, and so is never at the middle between two shorter numbers.
    """
    product = a * b
    total = product + c
    if math.isfinite(total):
        part = total - product
        lost = (product - (total - part)) + (c - part)
        if lost and not struct.pack("<d", total)[0] & 1:
            total = math.nextafter(total, math.inf if lost > 0 else -math.inf)
    return total


def _bfloat_of(number):
    """The bits of the bfloat16 nearest to a float64. On the way it is rounded to odd, as a float32."""
    if math.isnan(number):
        return 0x7FFF
    try:
        single = struct.pack("<f", number)
    except OverflowError:
        return 0xFF80 if number < 0 else 0x7F80
    (bits,), (nearest,) = struct.unpack("<I", single), struct.unpack("<f", single)
    if nearest != number:
        bits = bits - (abs(nearest) > abs(number)) | 1
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def _fma_b2(*words):
    low, high = zip(*(bfloats(word).tolist() for word in words), strict=True)
    return np.uint32(_bfloat_of(_sum(*low)) | _bfloat_of(_sum(*high)) << 16)


and_or = op("and_or", "u", "uuu", "lop3.b32 $0, $1, $2, $3, 0xea;", lambda a, b, c: (a & b) | c)
permute_bytes = op("permute_bytes", "u", "uuu", "prmt.b32 $0, $1, $2, $3;", _permute)
mul_h2 = op("mul_h2", "u", "uu", "mul.f16x2 $0, $1, $2;", lambda a, b: word_of_halves(_wide(a) * _wide(b)))
fma_h2 = op(
    "fma_h2", "u", "uuu", "fma.rn.f16x2 $0, $1, $2, $3;", lambda a, b, c: word_of_halves(_wide(a) * _wide(b) + _wide(c))
)
fma_b2 = op("fma_b2", "u", "uuu", "fma.rn.bf16x2 $0, $1, $2, $3;", _fma_b2)
floats_of_h2 = op(
    "floats_of_h2", "ff", "u",
    "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }",
    lambda a: tuple(halves(a).astype(np.float32)),
)  # fmt: skip
floats_of_b2 = op(
    "floats_of_b2", "ff", "u", "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", lambda a: tuple(bfloats(a))
)
h2_of_floats = op("h2_of_floats", "u", "ff", "cvt.rn.f16x2.f32 $0, $2, $1;", lambda a, b: word_of_halves([a, b]))
b2_of_floats = op("b2_of_floats", "u", "ff", "cvt.rn.bf16x2.f32 $0, $2, $1;", lambda a, b: word_of_bfloats([a, b]))
bits_of_float = op("bits_of_float", "u", "f", "mov.b32 $0, $1;", lambda a: np.float32(a).view(np.uint32))
float_of_bits = op("float_of_bits", "f", "u", "mov.b32 $0, $1;", lambda a: np.uint32(a).view(np.float32))
hidden = op("hidden", "u", "u", "mov.b32 $0, $1;", lambda a: np.uint32(a), True)  # the compiler knows nothing of it


def _fma(a, b, c):
    """a b + c in float32, rounded once."""
    with np.errstate(over="ignore"):
        return np.float32(_sum(float(a), float(b), float(c)))


def _extreme(choose, of_zeros):
    """max or min: a NaN gives way to a number, and -0 is less than 0."""

    def meaning(a, b):
        a, b = np.float32(a), np.float32(b)
        if np.isnan(a) and np.isnan(b):
            return np.uint32(0x7FFFFFFF).view(np.float32)
        if a == 0 and b == 0:
            return np.copysign(np.float32(0), np.float32(of_zeros(np.copysign(1, a), np.copysign(1, b))))
        return np.float32(choose(a, b))

    return meaning


fma = op("fma", "f", "fff", "fma.rn.f32 $0, $1, $2, $3;", _fma)
mul = op("mul", "f", "ff", "mul.rn.f32 $0, $1, $2;", lambda a, b: np.float32(np.float32(a) * np.float32(b)))
max_float = op("max_float", "f", "ff", "max.f32 $0, $1, $2;", _extreme(np.fmax, max))
min_float = op("min_float", "f", "ff", "min.f32 $0, $1, $2;", _extreme(np.fmin, min))
floor = op("floor", "f", "f", "cvt.rmi.f32.f32 $0, $1;", lambda a: np.floor(np.float32(a)))
round_even = op("round_even", "f", "f", "cvt.rni.f32.f32 $0, $1;", lambda a: np.rint(np.float32(a)))


def _signed_bytes(word):
    return np.array([word], np.uint32).view(np.int8).astype(np.int64)


def _wrapped(total):
    """An integer as 32 bits hold it, two's complement."""
    return np.uint32(int(total) & 0xFFFFFFFF)


dot_4 = op(
    "dot_4", "u", "uuu", "dp4a.s32.s32 $0, $1, $2, $3;",
    lambda a, b, c: _wrapped(_signed_bytes(a) @ _signed_bytes(b) + int(c)),
)  # fmt: skip

# --- memory ---


def _loads(dtype, count):
    def meaning(address):
        got = simulator.load(address, dtype, count)
        return tuple(got) if count > 1 else got[0]

    return meaning


def _half(address):
    return simulator.load(address, np.float16)[0].astype(np.float32)


def _store_half(address, value):
    simulator.store(address, halves(word_of_halves([value, 0]))[0])


def _store_bfloat(address, value):
    simulator.store(address, np.uint16(word_of_bfloats([value, 0]) & np.uint32(0xFFFF)))


load_4 = op("load_4", "uuuu", "l", "ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", _loads(np.uint32, 4))
load_2 = op("load_2", "uu", "l", "ld.global.nc.v2.u32 {$0,$1}, [$2];", _loads(np.uint32, 2))
load_1 = op("load_1", "u", "l", "ld.global.nc.u32 $0, [$1];", _loads(np.uint32, 1))
store_half = op(
    "store_half", "", "lf", "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }", _store_half, True
)
store_bfloat = op(
    "store_bfloat", "", "lf", "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }", _store_bfloat, True
)
store_float = op(
    "store_float", "", "lf", "st.global.f32 [$0], $1;", lambda a, v: simulator.store(a, np.float32(v)), True
)
store_1 = op(
    "store_1", "", "lu", "st.global.u32 [$0], $1;", lambda a, v: simulator.store(a, np.uint32(v)), True
)  # fmt: skip
store_2 = op(
    "store_2", "", "luu", "st.global.v2.u32 [$0], {$1,$2};",
    lambda a, *words: simulator.store(a, *map(np.uint32, words)), True,
)  # fmt: skip
store_4 = op(
    "store_4", "", "luuuu", "st.global.v4.u32 [$0], {$1,$2,$3,$4};",
    lambda a, *words: simulator.store(a, *map(np.uint32, words)), True,
)  # fmt: skip
load_floats = op(  # not through the cache for what never changes
    "load_floats", "ffff", "l", "ld.global.v4.f32 {$0,$1,$2,$3}, [$4];", _loads(np.float32, 4), True
)
store_floats = op(
    "store_floats", "", "lffff", "st.global.v4.f32 [$0], {$1,$2,$3,$4};",
    lambda a, *numbers: simulator.store(a, *map(np.float32, numbers)), True,
)  # fmt: skip
load_shared_4 = op("load_shared_4", "uuuu", "u", "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", _loads(np.uint32, 4), True)
load_shared_2 = op("load_shared_2", "uu", "u", "ld.shared.v2.u32 {$0,$1}, [$2];", _loads(np.uint32, 2), True)
load_shared_1 = op("load_shared_1", "u", "u", "ld.shared.u32 $0, [$1];", _loads(np.uint32, 1), True)
load_shared_float = op("load_shared_float", "f", "u", "ld.shared.f32 $0, [$1];", _loads(np.float32, 1), True)
load_shared_floats = op(
    "load_shared_floats", "ffff", "u", "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", _loads(np.float32, 4), True
)
load_shared_half = op(
    "load_shared_half", "f", "u", "{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.f32.f16 $0, h; }", _half, True
)
store_shared_4 = op(
    "store_shared_4", "", "uuuuu", "st.shared.v4.u32 [$0], {$1,$2,$3,$4};",
    lambda a, *words: simulator.store(a, *map(np.uint32, words)), True,
)  # fmt: skip
store_shared_1 = op(
    "store_shared_1", "", "uu", "st.shared.u32 [$0], $1;", lambda a, v: simulator.store(a, np.uint32(v)), True
)
store_shared_float = op(
    "store_shared_float", "", "uf", "st.shared.f32 [$0], $1;", lambda a, v: simulator.store(a, np.float32(v)), True
)
store_shared_2 = op(
    "store_shared_2", "", "uuu", "st.shared.v2.u32 [$0], {$1,$2};",
    lambda a, *words: simulator.store(a, *map(np.uint32, words)), True,
)  # fmt: skip
load_shared_byte = op(
    "load_shared_byte", "u", "u", "{ .reg .b16 h; ld.shared.u8 h, [$1]; cvt.u32.u16 $0, h; }",
    lambda a: np.uint32(simulator.load(a, np.uint8)[0]), True,
)  # fmt: skip
load_shared_short = op(
    "load_shared_short", "u", "u", "{ .reg .b16 h; ld.shared.u16 h, [$1]; cvt.u32.u16 $0, h; }",
    lambda a: np.uint32(simulator.load(a, np.uint16)[0]), True,
)  # fmt: skip


def _fresh(dtype):
    """Other blocks run in between; in the simulator they are given the time for it."""

    def meaning(address):
        time.sleep(1e-5)
        return simulator.load(address, dtype)[0]

    return meaning


# What another block wrote a moment ago: the first waits for everything that it wrote before, too.
load_acquire = op("load_acquire", "u", "l", "ld.acquire.gpu.global.u32 $0, [$1];", _fresh(np.uint32), True)
load_fresh = op("load_fresh", "f", "l", "ld.relaxed.gpu.global.f32 $0, [$1];", _loads(np.float32, 1), True)

# --- what a warp does as one ---


def _shuffle_xor(value, mask):
    return simulator.exchange(value)[simulator.lane() ^ int(mask)]


shuffle_xor = op("shuffle_xor", "u", "uu", "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", _shuffle_xor, True)
shuffle_xor_float = op(
    "shuffle_xor_float", "f", "fu", "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", _shuffle_xor, True
)
shuffle = op(
    "shuffle", "u", "uu", "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
    lambda value, source: simulator.exchange(value)[int(source) % 32], True,
)  # fmt: skip
sync_warp = op("sync_warp", "", "", "bar.warp.sync 0xffffffff;", lambda: simulator.exchange(None) and None, True)


def _mma(pairs):
    """D = A B + C for A (16, 16), B (16, 8), C (16, 8), each lane holding the parts that the PTX manual gives it.

    Lane 4g + t holds of A: rows g and g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9; of B: those rows, column g; of C:
    rows g and g + 8, columns 2t and 2t + 1.
    """

    def meaning(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        lanes = simulator.exchange((a0, a1, a2, a3, b0, b1))
        g, t = divmod(simulator.lane(), 4)
        rows = [
            np.concatenate([_wide(lanes[4 * g + k][r], pairs) for r in (i, i + 2) for k in range(4)]) for i in (0, 1)
        ]
        columns = [
            np.concatenate([_wide(lanes[4 * n + k][r], pairs) for r in (4, 5) for k in range(4)])
            for n in (2 * t, 2 * t + 1)
        ]
        sums = [row @ column for row in rows for column in columns]
        return tuple(np.float32(s + c) for s, c in zip(sums, (c0, c1, c2, c3), strict=True))

    return meaning


_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
)
mma_half = op("mma_half", "ffff", "uuuuuuffff", _MMA.format("f16"), _mma(halves))
mma_bfloat = op("mma_bfloat", "ffff", "uuuuuuffff", _MMA.format("bf16"), _mma(bfloats))


def _mma_bytes(dtype):
    """D = A B + C of integers for A (16, 32), B (32, 8), C (16, 8); the sums have 32 bits and wrap around.

    Lane 4g + t holds of A: rows g and g + 8, columns 4t to 4t + 3, and those 16 further on; of B: the same rows, column
    g; of C what it holds of it above.
    """

    def meaning(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        lanes = simulator.exchange((a0, a1, a2, a3, b0, b1))
        g, t = divmod(simulator.lane(), 4)

        def numbers(lane, registers, dtype):
            words = [lanes[4 * lane + k][r] for r in registers for k in range(4)]
            return np.array(words, np.uint32).view(dtype).astype(np.int64)

        rows = [numbers(g, (i, i + 2), dtype) for i in (0, 1)]
        columns = [numbers(n, (4, 5), np.int8) for n in (2 * t, 2 * t + 1)]
        sums = [row @ column for row in rows for column in columns]
        return tuple(_wrapped(s + int(c)) for s, c in zip(sums, (c0, c1, c2, c3), strict=True))

    return meaning


_MMA_BYTES = (
    "mma.sync.aligned.m16n8k32.row.col.s32.{0}.s8.s32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
)
mma_int8 = op("mma_int8", "uuuu", "uuuuuuuuuu", _MMA_BYTES.format("s8"), _mma_bytes(np.int8))
mma_uint8 = op("mma_uint8", "uuuu", "uuuuuuuuuu", _MMA_BYTES.format("u8"), _mma_bytes(np.uint8))

# --- copies that run by themselves, and the barriers at which one waits for them (compute capability 9.0) ---

barrier_init = op("barrier_init", "", "uu", "mbarrier.init.shared::cta.b64 [$0], $1;", simulator.barrier_init, True)
barrier_expect = op(
    "barrier_expect", "", "uu", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", simulator.barrier_arrive, True
)
barrier_arrive = op(
    "barrier_arrive", "", "u", "mbarrier.arrive.shared::cta.b64 _, [$0];", simulator.barrier_arrive, True
)
barrier_done = op(
    "barrier_done", "u", "uu",
    "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }",
    simulator.barrier_done, True,
)  # fmt: skip
barriers_visible = op(
    "barriers_visible", "", "", "fence.mbarrier_init.release.cluster;", lambda: None, True
)  # to the unit that copies
copy_bulk = op(
    "copy_bulk", "", "uluu",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    simulator.copy_later, True,
)  # fmt: skip
wait_for_last_kernel = op("wait_for_last_kernel", "", "", "griddepcontrol.wait;", lambda: None, True)
let_next_kernel_start = op("let_next_kernel_start", "", "", "griddepcontrol.launch_dependents;", lambda: None, True)
