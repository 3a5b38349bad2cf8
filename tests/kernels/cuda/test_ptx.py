"""What each instruction means: against rational arithmetic, torch's rounding, bytes in a list, and products in int64.

The Python beside an instruction is what the simulator runs, so it is held here against statements of other kinds. Those
of memory and of warps are run in small kernels.
"""

import math
import struct
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from qlearn.kernels.cuda import SIMULATED, ptx, simulator
from qlearn.kernels.cuda.launch import Kernel

from numba import cuda, float32, uint32, uint64  # isort: skip - after qlearn.kernels.cuda has chosen

pytestmark = pytest.mark.skipif(not SIMULATED, reason="this is about the simulator, and here kernels run on a GPU")
MEANING = {name: meaning for name, (_, _, _, meaning) in ptx.INSTRUCTIONS.items()}


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(simulator, "PATIENCE", 5)


def run(function, *args, threads=1, shared_bytes=0):
    """Run a kernel once, in one block; args: numpy arrays, which it may write."""
    Kernel(function, threads, shared_bytes).launch(1, *(torch.from_numpy(array) for array in args))


# --- numbers of half precision ---

SPECIAL_HALVES = {
    "zero": 0x0000, "minus zero": 0x8000, "smallest subnormal": 0x0001, "largest subnormal": 0x03FF,
    "smallest normal": 0x0400, "minus smallest": 0x8001, "one": 0x3C00, "after one": 0x3C01, "minus one": 0xBC00,
    "1024": 0x6400, "minus 1024 and a code": 0xE40F, "largest": 0x7BFF, "minus largest": 0xFBFF, "infinity": 0x7C00,
    "minus infinity": 0xFC00, "NaN": 0x7E00,
}  # fmt: skip
SPECIAL_BFLOATS = {
    "zero": 0x0000, "minus zero": 0x8000, "smallest subnormal": 0x0001, "largest subnormal": 0x007F,
    "smallest normal": 0x0080, "minus smallest": 0x8001, "one": 0x3F80, "after one": 0x3F81, "minus one": 0xBF80,
    "128": 0x4300, "minus 128 and a code": 0xC30F, "largest": 0x7F7F, "minus largest": 0xFF7F, "infinity": 0x7F80,
    "minus infinity": 0xFF80, "NaN": 0x7FC0,
}  # fmt: skip
HALF, BFLOAT, SINGLE = (11, -14, 15), (8, -126, 127), (24, -126, 127)  # digits, exponents: of normals, of the largest


def value_of(bits, kind):
    """A 16-bit number as a Python float, from its sign, exponent and mantissa."""
    digits, lowest, highest = kind
    mantissa_bits = digits - 1
    sign, exponent = -1.0 if bits >> 15 else 1.0, bits >> mantissa_bits & (1 << 15 - mantissa_bits) - 1
    mantissa = bits & (1 << mantissa_bits) - 1
    if exponent > highest - lowest + 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, lowest - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - 1 + lowest - mantissa_bits)


def rounded(exact, kind):
    """A Fraction to the nearest number with so many digits, ties to even; subnormals and overflow as IEEE has them."""
    digits, lowest, highest = kind
    if exact == 0:
        return 0.0
    magnitude, exponent = abs(exact), lowest
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - digits + 1)
    units = magnitude / step
    whole = units.numerator // units.denominator
    rest = units - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    result = whole * step
    if result >= Fraction(2) ** (highest + 1):
        return math.copysign(math.inf, exact)
    return math.copysign(float(result), exact)


def multiply_add(a, b, c, kind):
    """a b + c rounded once; by rules where one is not finite, or where the result is a zero with a sign."""
    if not all(map(math.isfinite, (a, b, c))):
        with np.errstate(invalid="ignore"):
            return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:  # the sum of two zeros has a minus only if both have; that of opposite numbers has none
        zeros = a * b == 0 and c == 0
        return -0.0 if zeros and math.copysign(1, a) * math.copysign(1, b) < 0 and math.copysign(1, c) < 0 else 0.0
    return rounded(exact, kind)


def same(got, expected):
    """Equal, zeros with their signs; any NaN is as good as another."""
    if math.isnan(expected):
        return math.isnan(got)
    return got == expected and math.copysign(1, got) == math.copysign(1, expected)


def pairs(numbers):
    """Words of two numbers each; so that both places are tried, the second is another."""
    return [np.uint32(low | high << 16) for low, high in zip(numbers, numbers[1:] + numbers[:1], strict=True)]


@pytest.mark.parametrize("bits", SPECIAL_HALVES.values(), ids=SPECIAL_HALVES)
def test_a_word_holds_two_halves_the_first_below(bits):
    low, high = MEANING["floats_of_h2"](np.uint32(bits | 0x3E00 << 16))
    assert same(float(low), value_of(bits, HALF)) and high == 1.5
    low, high = MEANING["floats_of_h2"](np.uint32(0x3E00 | bits << 16))
    assert same(float(high), value_of(bits, HALF)) and low == 1.5


@pytest.mark.parametrize("bits", SPECIAL_BFLOATS.values(), ids=SPECIAL_BFLOATS)
def test_a_word_holds_two_bfloats_the_first_below(bits):
    low, high = MEANING["floats_of_b2"](np.uint32(bits | 0x3FC0 << 16))
    assert same(float(low), value_of(bits, BFLOAT)) and high == 1.5
    low, high = MEANING["floats_of_b2"](np.uint32(0x3FC0 | bits << 16))
    assert same(float(high), value_of(bits, BFLOAT)) and low == 1.5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_products_of_halves_against_numpy():
    """Every special value with every other, and some hundred at random."""
    several = [a | b << 16 for a, b in product(SPECIAL_HALVES.values(), repeat=2)]
    random = np.random.RandomState(0).randint(0, 2**32, (2, 500), dtype=np.uint64).astype(np.uint32)
    words = [*product(np.uint32(several[::7]), np.uint32(several[3::7])), *random.T]
    for a, b in words:
        x, y = np.array([a, b]).view(np.float16).reshape(2, 2)
        with np.errstate(all="ignore"):
            expected = x * y
        got = np.array([MEANING["mul_h2"](a, b)], np.uint32).view(np.float16)
        assert all(map(same, got.astype(float), expected.astype(float))), (hex(a), hex(b))


TIES = {
    "the sum decides upwards": (HALF, 0x3C01, 0x3C00, 0x1001),
    "a b is at the middle and c is tiny": (HALF, 0x3C00, 0x3C01, 0x0001),
    "smallest times smallest, and one": (HALF, 0x0001, 0x0001, 0x3C00),
    "becomes subnormal": (HALF, 0x0401, 0x3801, 0x8000),
    "overflows by rounding": (HALF, 0x7BFF, 0x3C00, 0x4C00),
    "just does not overflow": (HALF, 0x7BFF, 0x3C00, 0x4BFF),
    "opposite numbers": (HALF, 0x3C01, 0x3C01, 0xBC02),
    "bfloat16: 9 * 29 is at the middle": (BFLOAT, 0x4110, 0x41E8, 0x0000),
    "bfloat16: c is less than float32 holds beside it": (BFLOAT, 0x4110, 0x41E8, 0x3080),
    "bfloat16: c is less than float64 holds beside it": (BFLOAT, 0x4110, 0x41E8, 0x2000),
    "bfloat16: c pulls 7 * 37 down": (BFLOAT, 0x40E0, 0x4214, 0xB080),
    "bfloat16: the smallest c pulls 7 * 37 down": (BFLOAT, 0x40E0, 0x4214, 0x8001),
    "bfloat16: the largest": (BFLOAT, 0x7F7F, 0x3F80, 0x7B00),
    "bfloat16: beyond float64's float32": (BFLOAT, 0x7F7F, 0x7F7F, 0xFF7F),
    "bfloat16: subnormal": (BFLOAT, 0x0081, 0x3F01, 0x0001),
}


@pytest.mark.parametrize("kind, a, b, c", TIES.values(), ids=TIES)
def test_multiply_add_rounds_once(kind, a, b, c):
    got = MEANING["fma_h2" if kind == HALF else "fma_b2"](*(np.uint32(bits | bits << 16) for bits in (a, b, c)))
    expected = multiply_add(*(value_of(bits, kind) for bits in (a, b, c)), kind)
    assert [value_of(int(got) >> shift & 0xFFFF, kind) for shift in (0, 16)] == [expected] * 2


@pytest.mark.parametrize(
    "name, kind, special, dtype",
    [("fma_h2", HALF, SPECIAL_HALVES, torch.float16), ("fma_b2", BFLOAT, SPECIAL_BFLOATS, torch.bfloat16)],
    ids=["float16", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_multiply_add_against_fractions(name, kind, special, dtype):
    """Special values among each other; then whole numbers whose products are at the middle between two, or near it."""
    random, most = np.random.RandomState(1), 1 << kind[0]
    factors = torch.from_numpy(np.exp2(random.uniform(0, kind[0], (2, 4000))).astype(int))
    products = factors[0] * factors[1]
    middle = (products % 2 == 1) & (products > most) & (products < 2 * most)
    assert middle.sum() >= 20
    factors = torch.cat([factors[:, middle], factors[:, :200]], 1)
    c = torch.from_numpy(np.ldexp(random.randint(-3, 4, factors.shape[1]), random.randint(-24, 5, factors.shape[1])))
    cases = torch.cat([factors, c[None]]).to(dtype).view(torch.int16).numpy().view(np.uint16).T
    words = [pairs([int(bits) for bits in case]) for case in cases]
    words += [pairs(list(row)) for row in [*product(special.values(), repeat=3)][::5]]
    for triple in words:
        got = int(MEANING[name](*triple))
        for shift in (0, 16):
            numbers = [value_of(int(word) >> shift & 0xFFFF, kind) for word in triple]
            assert same(value_of(got >> shift & 0xFFFF, kind), multiply_add(*numbers, kind)), numbers


FLOATS = {
    "zero": 0.0, "minus zero": -0.0, "one": 1.0, "infinity": math.inf, "minus infinity": -math.inf, "NaN": math.nan,
    "a tie, to even below": 1 + 2.0**-8, "a tie, to even above": 1 + 3 * 2.0**-8,
    "above a tie": 1 + 2.0**-8 + 2.0**-23, "below a tie": 1 + 2.0**-8 - 2.0**-24,
    "a tie of float16, to even below": 1 + 2.0**-11, "a tie of float16, to even above": 1 + 3 * 2.0**-11,
    "largest float16": 65504.0, "float16 overflows": 65520.0, "just does not overflow": 65519.99609375,
    "smallest of float16": 2.0**-24, "a half of it": 2.0**-25, "a little more than half": 2.0**-25 + 2.0**-40,
    "largest": float(np.finfo(np.float32).max), "smallest": 2.0**-149, "bfloat16's smallest": 2.0**-133,
}  # fmt: skip


@pytest.mark.parametrize("x", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("name, dtype", [("b2_of_floats", torch.bfloat16), ("h2_of_floats", torch.float16)])
def test_rounding_is_torch_s(name, dtype, x):
    word = MEANING[name](np.float32(x), np.float32(-1.5))
    got = torch.tensor([int(word)], dtype=torch.int64).to(torch.int32).view(dtype)
    assert same(got[0].item(), torch.tensor(x, dtype=torch.float32).to(dtype).item()) and got[1] == -1.5


@pytest.mark.parametrize("name, dtype", [("b2_of_floats", torch.bfloat16), ("h2_of_floats", torch.float16)])
def test_rounding_of_random_floats_is_torch_s(name, dtype):
    numbers = np.random.RandomState(2).randint(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    numbers = np.where(np.arange(len(numbers)) % 2, numbers, np.ldexp(np.frexp(numbers)[0], 3))  # else most overflow
    numbers = numbers[: len(numbers) // 2 * 2].reshape(-1, 2).astype(np.float32)
    words = np.array([MEANING[name](a, b) for a, b in numbers], np.uint32)
    expected = torch.from_numpy(numbers).to(dtype)
    assert torch.equal(torch.from_numpy(words.view(np.int32)).view(dtype), expected.flatten())


# --- words, and single floats ---

WORDS = [0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x12345678, 0x807F01FF]


def test_and_or_bit_by_bit():
    """Eight bits of a, b and c have every combination."""
    a, b, c = (np.uint32(bits) for bits in (0b11110000, 0b11001100, 0b10101010))
    assert MEANING["and_or"](a, b, c) == 0b11101010  # ... and so are those of the instruction's table
    assert "0xea" in ptx.INSTRUCTIONS["and_or"][2]


@pytest.mark.parametrize(
    "selector",
    [0x3210, 0x7654, 0x0000, 0x7777, 0x5410, 0x7632, 0x0040, 0x6420, 0x1357, 0xFFFF3210, 0xBA98, 0xF8B0],
    ids=hex,
)
def test_permute_bytes(selector):
    """A digit of the selector is the number of a byte; with 8 added, that byte's sign, eight times."""
    a, b = 0x83828180, 0x07060504
    eight = list(struct.pack("<II", a, b))
    chosen = [eight[selector >> 4 * k & 7] for k in range(4)]
    signs = [selector >> 4 * k & 8 for k in range(4)]
    expected = bytes((255 if byte >= 128 else 0) if sign else byte for byte, sign in zip(chosen, signs, strict=True))
    assert struct.pack("<I", MEANING["permute_bytes"](np.uint32(a), np.uint32(b), np.uint32(selector))) == expected


def test_dot_4():
    for a, b, c in product(WORDS, repeat=3):
        signed = zip(struct.unpack("4b", struct.pack("<I", a)), struct.unpack("4b", struct.pack("<I", b)), strict=True)
        expected = (sum(x * y for x, y in signed) + c) % 2**32
        assert MEANING["dot_4"](np.uint32(a), np.uint32(b), np.uint32(c)) == expected


@pytest.mark.parametrize("x", [*FLOATS.values(), 0.5, 1.5, 2.5, -0.5, -2.5, 2.0**23 + 1, -3.2], ids=str)
def test_rounding_to_whole_numbers(x):
    x = np.float32(x)
    finite = math.isfinite(x)
    up = math.copysign(float(round(Fraction(float(x)))), x) if finite else float(x)
    down = (math.copysign(0.0, x) if x == 0 else float(math.floor(x))) if finite else float(x)
    assert same(float(MEANING["round_even"](x)), up) and same(float(MEANING["floor"](x)), down)


def test_bits_of_floats():
    for word in WORDS:
        number = MEANING["float_of_bits"](np.uint32(word))
        assert struct.pack("<f", number) == struct.pack("<I", word)
        assert MEANING["bits_of_float"](number) == word and MEANING["hidden"](np.uint32(word)) == word


@pytest.mark.parametrize("name, choose, zero", [("max_float", max, 0.0), ("min_float", min, -0.0)])
def test_extremes(name, choose, zero):
    meaning = MEANING[name]
    for a, b in product([x for x in FLOATS.values() if not math.isnan(x) and x != 0], repeat=2):
        assert meaning(np.float32(a), np.float32(b)) == np.float32(choose(a, b))
    assert same(float(meaning(np.float32(0.0), np.float32(-0.0))), zero)  # the zeros are ordered
    assert same(float(meaning(np.float32(-0.0), np.float32(0.0))), zero)
    assert meaning(np.float32(math.nan), np.float32(3)) == meaning(np.float32(3), np.float32(math.nan)) == 3
    assert math.isnan(meaning(np.float32(math.nan), np.float32(math.nan)))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_single_products_and_multiply_adds():
    """Near the middle between two float32, where the product alone would be rounded to even, and c decides."""
    random = np.random.RandomState(3)
    bits = 0x3F800000 + random.randint(0, 1 << 23, (3, 400)) + (random.randint(-20, 20, (3, 400)) << 23)
    bits[2, ::2] -= 30 << 23
    a, b, c = bits.astype(np.uint32).view(np.float32) * random.choice([-1, 1], (3, 400)).astype(np.float32)
    edges = [0.0, -0.0, 1.0, 1 + 2.0**-12, -1.0, 2.0**-24, 2.0**-149, 2.0**-75, 2.0**-100, 2.0**127, -(2.0**-60)]
    cases = [*zip(a, b, c, strict=True), *product(map(np.float32, edges), repeat=3)]
    for x, y, z in cases:
        expected = multiply_add(float(x), float(y), float(z), SINGLE)
        assert same(float(MEANING["fma"](x, y, z)), expected), (x, y, z)
        alone = MEANING["mul"](x, y)
        assert alone == rounded(Fraction(float(x)) * Fraction(float(y)), SINGLE)


# --- memory ---

LOADS = {
    "load_1": (np.uint32, 1), "load_2": (np.uint32, 2), "load_4": (np.uint32, 4), "load_floats": (np.float32, 4),
    "load_acquire": (np.uint32, 1),
    "load_fresh": (np.float32, 1),
}  # fmt: skip
SHARED_LOADS = {
    "load_shared_1": (np.uint32, 1), "load_shared_2": (np.uint32, 2), "load_shared_4": (np.uint32, 4),
    "load_shared_float": (np.float32, 1), "load_shared_floats": (np.float32, 4), "load_shared_half": (np.float16, 1),
    "load_shared_byte": (np.uint8, 1), "load_shared_short": (np.uint16, 1),
}  # fmt: skip
STORES = {  # name: what is stored, and as what
    "store_1": ([0x80000001], np.uint32), "store_2": ([1, 0xFFFFFFFF], np.uint32), "store_4": ([1, 2, 3, 4], np.uint32),
    "store_float": ([0.1], np.float32), "store_floats": ([0.1, -2, 3, math.inf], np.float32),
    "store_half": ([0.1], np.float16), "store_bfloat": ([1 + 3 * 2.0**-8], "bfloat16"),
}  # fmt: skip
SHARED_STORES = {
    "store_shared_1": ([7], np.uint32), "store_shared_2": ([7, 8], np.uint32),
    "store_shared_4": ([1, 2, 3, 4], np.uint32), "store_shared_float": ([0.1], np.float32),
}  # fmt: skip


def test_every_load_and_store_is_tried():
    """So that one that is added later is added here, too."""
    tried = {*LOADS, *SHARED_LOADS, *STORES, *SHARED_STORES}
    assert {name for name in MEANING if name.startswith(("load_", "store_"))} == tried


@pytest.mark.parametrize("name", [*LOADS, *SHARED_LOADS])
def test_loads(name):
    """From the second of what an array holds; half a number further on, or at the end, it must not go well."""
    dtype, count = {**LOADS, **SHARED_LOADS}[name]
    size, shared = np.dtype(dtype).itemsize * count, name in SHARED_LOADS
    memory = np.arange(3, 3 + 2 * size, dtype=np.uint8)
    expected = memory[size:].view(dtype)
    got, errors = [], []

    def kernel(Memory):
        at = (ptx.shared_address if shared else ptx.global_address)(Memory)
        at, whole = (uint32(at), uint32(size)) if shared else (at, uint64(size))
        got.append(MEANING[name](at + whole))
        for wrong in (size + size // 2, 2 * size, -size) if size > 1 else (2 * size, -size):
            with pytest.raises(IndexError) as error:
                MEANING[name](type(at)(int(at) + wrong))
            errors.append(str(error.value))

    run(kernel, memory)
    assert np.array_equal(np.array(got[0]).reshape(-1), expected.astype(np.array(got[0]).dtype))
    assert errors[-1].startswith(f"{size} bytes at address 0x") and errors[-1].endswith(
        f"lie in no array (sizes in bytes: {2 * size})"
    )
    if size > 1:  # half of it would lie behind the end
        assert "lie in no array" in errors[0]


@pytest.mark.parametrize("name", [*STORES, *SHARED_STORES])
def test_stores(name):
    values, dtype = {**STORES, **SHARED_STORES}[name]
    expected = np.frombuffer(bfloat_bytes(values) if dtype == "bfloat16" else np.array(values, dtype), np.uint8)
    size, shared, memory = len(expected), name in SHARED_STORES, np.full(3 * len(expected), 0xAA, np.uint8)

    def kernel(Memory):
        at = (ptx.shared_address if shared else ptx.global_address)(Memory)
        MEANING[name](type(at)(int(at) + size), *values)
        with pytest.raises(IndexError, match="lie in no array"):
            MEANING[name](type(at)(int(at) + 3 * size), *values)

    run(kernel, memory)
    assert np.array_equal(memory[size : 2 * size], expected)
    assert (memory[:size] == 0xAA).all() and (memory[2 * size :] == 0xAA).all()


@pytest.mark.parametrize(
    "name", ["load_4", "load_2", "load_1", "load_shared_half", "load_shared_4", "load_shared_short"]
)
def test_what_is_not_aligned_is_refused(name):
    dtype, count = {**LOADS, **SHARED_LOADS}[name]
    size = np.dtype(dtype).itemsize * count

    def kernel(Memory):
        at = (ptx.shared_address if name in SHARED_LOADS else ptx.global_address)(Memory)
        MEANING[name](type(at)(int(at) + size // 2))

    with pytest.raises(IndexError, match=f"{size} bytes at offset {size // 2}, which is no multiple of {size}"):
        run(kernel, np.zeros(64, np.uint8))


def test_arrays_do_not_touch():
    """Each has its own addresses, always the same, and behind its end nothing begins."""
    seen = []

    def kernel(A, B):
        shared = cuda.shared.array(0, uint32)
        a, b, s = ptx.global_address(A), ptx.global_address(B), ptx.shared_address(shared)
        ptx.store_1(a + uint64(4), uint32(1))
        ptx.store_1(b + uint64(4), uint32(2))
        ptx.store_shared_1(s + uint32(4), uint32(3))
        seen.append((a, b, s, ptx.global_address(A), ptx.load_shared_1(s + uint32(4))))

    one, two = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    run(kernel, one.view(np.int32), two.view(np.int32), shared_bytes=16)
    a, b, s, again, loaded = seen[0]
    assert one.tolist() == [0, 1, 0, 0] and two.tolist() == [0, 2, 0, 0] and loaded == 3
    assert a == again and len({int(a), int(b), int(s)}) == 3 and abs(int(a) - int(b)) >= 2**26
    assert a.dtype == np.uint64 and s.dtype == np.uint32 and int(a) % 16 == int(s) % 16 == 0


# --- what a warp does as one ---


def test_shuffles():
    lanes = np.zeros((4, 64), np.float32)

    def kernel(Out):
        thread = uint32(cuda.threadIdx.x)
        Out[0, thread] = ptx.shuffle_xor(thread, uint32(5))
        Out[1, thread] = ptx.shuffle(thread, uint32(2) * thread)  # the number of the lane is taken modulo 32
        Out[2, thread] = ptx.shuffle_xor_float(float32(0.5) + float32(thread), uint32(16))
        total = uint32(1)
        for mask in (1, 2, 4, 8, 16):
            total += ptx.shuffle_xor(total, uint32(mask))
        ptx.sync_warp()
        Out[3, thread] = total

    run(kernel, lanes, threads=64)
    warps, lane = np.arange(64) // 32 * 32, np.arange(64) % 32
    assert np.array_equal(lanes[0], warps + (lane ^ 5)) and np.array_equal(lanes[1], warps + 2 * lane % 32)
    assert np.array_equal(lanes[2], 0.5 + warps + (lane ^ 16)) and (lanes[3] == 32).all()


def lay_out(A, B, C, of_word):
    """The registers of the 32 lanes as the PTX manual has them: groupID g = lane / 4, threadID_in_group t = lane % 4.

    of_word: how many numbers are in a word, 2 or 4. Register i of A: row g, or g + 8 for odd i; columns from n t, and
    half of all columns further on for i >= 2. Register i of B: the same as rows, column g. Returns a (10, 32) list.
    """
    depth = A.shape[1]
    registers = [[None] * 32 for _ in range(10)]
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(4):
            row, column = g + 8 * (i % 2), of_word * t + depth // 2 * (i // 2)
            registers[i][lane] = A[row, column : column + of_word]
            registers[6 + i][lane] = C[g + 8 * (i // 2), 2 * t + i % 2]
        for i in range(2):
            row = of_word * t + depth // 2 * i
            registers[4 + i][lane] = B[row : row + of_word, g]
    return registers


def run_mma(name, A, B, C, raw, dtype):
    """D (16, 8), from a kernel of one warp. raw: a function from some numbers to their bytes."""
    registers = lay_out(A, B, C, 4 if "int8" in name else 2)
    words = np.array([[np.frombuffer(raw(part), np.uint32)[0] for part in row] for row in registers[:6]])
    sums, out = np.array(registers[6:], dtype), np.zeros((4, 32), dtype)

    def kernel(Words, Sums, Out):
        n = cuda.threadIdx.x
        got = MEANING[name](*Words[:, n], *Sums[:, n])
        for i in range(4):
            Out[i, n] = got[i]

    run_raw(kernel, words, sums, out)
    D = np.zeros((16, 8), dtype)
    for lane in range(32):
        for i in range(4):
            D[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out[i, lane]
    return D


def run_raw(function, *arrays):
    """A kernel of one warp on arrays of any dtype: Kernel.launch takes what torch has arithmetic for."""
    cuda.jit(function)[1, 32](*arrays)


def bfloat_bytes(numbers):
    return torch.tensor(np.array(numbers)).bfloat16().view(torch.uint16).numpy().tobytes()


@pytest.mark.parametrize(
    "name, raw, values",
    [
        ("mma_half", lambda part: np.float16(part).tobytes(), 2048),
        ("mma_bfloat", bfloat_bytes, 256),
    ],
)
def test_products_of_halves(name, raw, values):
    """Whole numbers: every product and every sum is exact, so each place is checked."""
    random = np.random.RandomState(4)
    A, B = random.randint(-values, values, (16, 16)), random.randint(-3, 4, (16, 8))
    C = random.randint(-1000, 1000, (16, 8))
    D = run_mma(name, A.astype(np.float32), B.astype(np.float32), C.astype(np.float32), raw, np.float32)
    assert np.array_equal(D, A @ B + C)


def test_products_of_halves_are_rounded_no_worse_than_float32():
    random = np.random.RandomState(5)
    A, B, C = (random.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8), (16, 8)))
    D = run_mma("mma_half", A, B, C.astype(np.float32), lambda part: part.tobytes(), np.float32)
    exact = A.astype(float) @ B.astype(float) + C
    assert (abs(D - exact) <= 2.0**-24 * (1 + 1e-6) * abs(exact)).all()


@pytest.mark.parametrize("name, dtype", [("mma_int8", np.int8), ("mma_uint8", np.uint8)])
def test_products_of_bytes_and_sums_that_wrap_around(name, dtype):
    random, info = np.random.RandomState(6), np.iinfo(dtype)
    A, B = random.randint(info.min, info.max + 1, (16, 32)).astype(dtype), random.randint(-128, 128, (32, 8))
    A[0], B[:, 0] = info.min or info.max, -128  # the largest of all products
    C = random.randint(0, 2**32, (16, 8), dtype=np.uint64).astype(np.uint32)
    C[0], C[1] = 0x7FFFFFFF, 0x80000000
    D = run_mma(name, A, B.astype(np.int8), C, lambda part: part.tobytes(), np.uint32)
    assert np.array_equal(D, (A.astype(np.int64) @ B + C.astype(np.int64)) % 2**32)


@pytest.mark.parametrize("name", ["shuffle_xor", "sync_warp", "mma_half"])
def test_a_warp_instruction_that_not_all_lanes_reach(name, monkeypatch):
    monkeypatch.setattr(simulator, "PATIENCE", 0.2)
    args = [np.uint32(1)] * len(ptx.INSTRUCTIONS[name][1])

    def kernel(Out):
        if cuda.threadIdx.x != 7:
            MEANING[name](*args)

    with pytest.raises(RuntimeError, match="not all 32 lanes of warp 0 came to a warp instruction; let every lane"):
        run(kernel, np.zeros(1, np.int32), threads=32)


def test_warps_do_not_wait_for_each_other():
    """The second warp never comes to the instruction that the first executes."""
    out = np.zeros(64, np.int32)

    def kernel(Out):
        if cuda.threadIdx.x < 32:
            Out[cuda.threadIdx.x] = ptx.shuffle_xor(uint32(cuda.threadIdx.x), uint32(1))

    run(kernel, out, threads=64)
    assert out[:32].tolist() == [n ^ 1 for n in range(32)] and not out[32:].any()


# --- copies and barriers ---


def test_a_kernel_that_does_not_wait_reads_what_was_there_before():
    """The same kernel; one thread asks whether the copy is done before it reads, and in the first run it does not."""
    source = np.arange(8, dtype=np.uint32)
    outs = {False: np.zeros(4, np.uint32), True: np.zeros(4, np.uint32)}

    for waits, out in outs.items():

        def kernel(Source, Out, waits=waits):
            shared = cuda.shared.array(0, uint32)
            base = ptx.shared_address(shared)
            ptx.store_shared_4(base, uint32(77), uint32(77), uint32(77), uint32(77))
            bar = base + uint32(64)
            ptx.barrier_init(bar, uint32(1))
            ptx.barriers_visible()
            ptx.barrier_expect(bar, uint32(16))
            ptx.copy_bulk(base, ptx.global_address(Source) + uint64(16), uint32(16), bar)
            if waits:
                while ptx.barrier_done(bar, uint32(0)) == uint32(0):
                    pass
            words = ptx.load_shared_4(base)
            for k in range(4):
                Out[k] = words[k]

        run(kernel, source.view(np.int32), out.view(np.int32), shared_bytes=128)
    assert outs[False].tolist() == [77] * 4 and outs[True].tolist() == [4, 5, 6, 7]


def test_a_barrier_turns_over_when_neither_arrivals_nor_bytes_are_missing():
    seen = []

    def kernel(Source):
        shared = cuda.shared.array(0, uint32)
        base = ptx.shared_address(shared)
        ptx.barrier_init(base, uint32(2))
        phases = [(ptx.barrier_done(base, uint32(0)), ptx.barrier_done(base, uint32(1)))]  # before the first: odd
        ptx.barrier_arrive(base)
        phases.append((ptx.barrier_done(base, uint32(0)),))
        ptx.barrier_expect(base, uint32(32))  # the second arrival; now bytes are missing
        phases.append((ptx.barrier_done(base, uint32(0)),))
        ptx.copy_bulk(base + uint32(16), ptx.global_address(Source), uint32(16), base)
        phases.append((ptx.barrier_done(base, uint32(0)),))  # half of them
        ptx.copy_bulk(base + uint32(32), ptx.global_address(Source), uint32(16), base)
        phases.append((ptx.barrier_done(base, uint32(0)), ptx.barrier_done(base, uint32(1))))
        ptx.barrier_arrive(base)
        ptx.barrier_arrive(base)
        phases.append((ptx.barrier_done(base, uint32(0)), ptx.barrier_done(base, uint32(1))))  # the second phase
        seen.extend(phases)

    run(kernel, np.zeros(4, np.int32), shared_bytes=64)
    assert seen == [(0, 1), (0,), (0,), (0,), (1, 0), (0, 1)]


def test_a_barrier_holds_threads_until_the_last_has_arrived():
    """Each of 32 threads writes a number, arrives, waits and reads its neighbour's."""
    out = np.zeros(32, np.int32)

    def kernel(Out):
        shared = cuda.shared.array(0, uint32)
        base, n = ptx.shared_address(shared), uint32(cuda.threadIdx.x)
        bar = base + uint32(128)
        if n == 0:
            ptx.barrier_init(bar, uint32(32))
        cuda.syncthreads()
        ptx.store_shared_1(base + uint32(4) * n, n + uint32(100))
        ptx.barrier_arrive(bar)
        while ptx.barrier_done(bar, uint32(0)) == uint32(0):
            pass
        Out[n] = ptx.load_shared_1(base + uint32(4) * ((n + uint32(1)) % uint32(32)))

    run(kernel, out, threads=32, shared_bytes=144)
    assert out.tolist() == [100 + (n + 1) % 32 for n in range(32)]


@pytest.mark.parametrize(
    "to, source, count, message",
    [
        (8, 0, 16, "multiples of 16"),
        (0, 4, 16, "multiples of 16"),
        (0, 0, 12, "multiples of 16"),
        (0, 32, 16, "16 bytes at address .* lie in no array"),
        (128, 0, 16, "16 bytes at address .* lie in no array"),
        (0, 16, 32, "32 bytes at address .* lie in no array"),
    ],
    ids=["target not aligned", "source not aligned", "size", "behind the source", "behind the target", "half of it"],
)
def test_bulk_copies_that_are_refused(to, source, count, message):
    def kernel(Source):
        shared = cuda.shared.array(0, uint32)
        base = ptx.shared_address(shared)
        bar = base + uint32(64)
        ptx.barrier_init(bar, uint32(1))
        ptx.barrier_expect(bar, uint32(count))
        ptx.copy_bulk(base + uint32(to), ptx.global_address(Source) + uint64(source), uint32(count), bar)
        ptx.barrier_done(bar, uint32(0))

    with pytest.raises(IndexError, match=message):
        run(kernel, np.zeros(8, np.int32), shared_bytes=128)
