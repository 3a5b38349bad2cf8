"""What each instruction does on the GPU: the same as the Python beside it, bit for bit, and as the PTX manual says.

In the simulator a kernel runs that Python. So this is where it is found out whether the simulator tells the truth.
"""

import functools
import itertools
import re

import numpy as np
import pytest
import torch

from qlearn.kernels.cuda import ptx
from qlearn.kernels.cuda.launch import Kernel
from tests.gpu.bounds import UNIT

from numba import cuda, uint64  # isort: skip - after qlearn.kernels.cuda has chosen

pytestmark = pytest.mark.usefixtures("capability_8")
# What touches memory, waits, or needs the other lanes has one of these in its code; hidden has a plain mov.
ELSEWHERE = re.compile(r"\b(ld|st|cp|fence|mbarrier|griddepcontrol|shfl|bar|mma)\.")
PURE = [name for name, (_, _, code, _) in ptx.INSTRUCTIONS.items() if not ELSEWHERE.search(code)]
RANDOM = 1 << 14

# As bits: zeros, the smallest and the largest subnormal, the smallest normal, ones and their neighbours, halves (ties
# of rounding), the largest number, infinities, NaN, and for each the negative.
HALVES = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3800, 0x3C00, 0x3C01, 0x3E00, 0x6400, 0x640F, 0x7BFF, 0x7C00, 0x7E00]
BFLOATS = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F00, 0x3F80, 0x3F81, 0x3FC0, 0x4300, 0x430F, 0x7F7F, 0x7F80, 0x7FC0]
FLOATS = [
    0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x38800000, 0x387FE000, 0x3EFFFFFF,
    0x3F000000, 0x3F000001, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000,
    0x3FC00000, 0x40200000, 0x4B000000, 0x4B7FFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000,
    0x7F7FFFFF, 0x7F800000, 0x7FC00000,
]  # fmt: skip


@functools.cache
def kernel_of(name):
    """A kernel that applies an instruction: words (arguments, n) -> words (results, n), n a multiple of 32."""
    result, args, *_ = ptx.INSTRUCTIONS[name]
    words = [f"load_1(first + uint64(4) * (uint64({k}) * n + i))" for k in range(len(args))]
    given = ", ".join(f"float_of_bits({w})" if kind == "f" else w for w, kind in zip(words, args, strict=True))
    parts = [f"got[{k}]" for k in range(len(result))] if len(result) > 1 else ["got"]
    store = {"f": "store_float", "u": "store_1"}
    lines = [
        "def run(words, found):",
        "    first, to = global_address(words), global_address(found)",
        "    n = uint64(cuda.gridDim.x) * uint64(32)",
        "    i = uint64(cuda.blockIdx.x) * uint64(32) + uint64(cuda.threadIdx.x)",
        f"    got = instruction({given})",
    ]
    for k, (part, kind) in enumerate(zip(parts, result, strict=True)):
        lines.append(f"    {store[kind]}(to + uint64(4) * (uint64({k}) * n + i), {part})")
    scope = {"cuda": cuda, "uint64": uint64, "instruction": getattr(ptx, name)}
    for needed in ("load_1", "store_1", "store_float", "float_of_bits", "global_address"):
        scope[needed] = getattr(ptx, needed)
    exec("\n".join(lines), scope)
    return Kernel(scope["run"], 32)


def on_gpu(name, words):
    """The words (results, n) of an instruction for words (arguments, n), uint32."""
    words = np.ascontiguousarray(words, np.uint32)
    n = words.shape[1]
    assert n % 32 == 0
    found = torch.full((len(ptx.INSTRUCTIONS[name][0]), n), -1, dtype=torch.int32, device="cuda")
    kernel_of(name).launch(n // 32, torch.from_numpy(words.view(np.int32)).to("cuda"), found)
    return found.cpu().numpy().view(np.uint32)


def in_python(name, words):
    """The same by the meaning."""
    result, args, _, meaning = ptx.INSTRUCTIONS[name]
    rows = [row.view(np.float32) if kind == "f" else row for row, kind in zip(words, args, strict=True)]
    found = np.empty((words.shape[1], len(result)), np.uint32)
    with np.errstate(all="ignore"):
        for i, given in enumerate(zip(*rows, strict=True)):
            got = meaning(*given)
            for k, part in enumerate(got if len(result) > 1 else (got,)):
                found[i, k] = np.float32(part).view(np.uint32) if result[k] == "f" else part
    return np.ascontiguousarray(found.T)


def bits_and_nan(name, words):
    """Results as bits, and which of them are NaN: in float32 or by the halves of a word."""
    result = ptx.INSTRUCTIONS[name][0]
    if result[0] == "f":
        return words, np.isnan(words.view(np.float32))
    shorts = words.view(np.uint16)
    if re.search(r"_h2$|^h2_", name):
        return shorts, np.isnan(shorts.view(np.float16))
    if re.search(r"_b2$|^b2_", name):
        return shorts, (shorts & 0x7FFF) > 0x7F80
    return words, np.zeros(words.shape, bool)


def argument_words(name, rng):
    """Words (arguments, n): all pairs or triples of special numbers, and random bits; of one word all 2**16."""
    args = ptx.INSTRUCTIONS[name][1]
    special = np.array(FLOATS, np.uint32)
    if args[0] == "f":
        special = np.concatenate([special, special | 0x80000000])
    else:
        shorts = np.array(BFLOATS if "b2" in name else HALVES, np.uint32)
        special = np.concatenate([shorts, shorts | 0x8000])
    if len(args) == 3:
        special = special[rng.permutation(len(special))[:26]]  # 26**3 triples are enough
    chosen = np.array(list(itertools.product(special, repeat=len(args))), np.uint32).T
    if args[0] == "u":  # beside them, in the upper half, another combination
        chosen = chosen | chosen[:, rng.permutation(chosen.shape[1])] << 16
    parts = [chosen, rng.integers(0, 1 << 32, (len(args), RANDOM), np.uint32)]
    if args == "u":
        low = np.arange(1 << 16, dtype=np.uint32)
        parts.append((low | rng.permutation(low) << 16)[None])
    if args[0] == "f":  # numbers of usual size, and of ones with a fraction
        numbers = rng.standard_normal((len(args), RANDOM)) * 2.0 ** rng.integers(-20, 20, (len(args), RANDOM))
        parts.append(numbers.astype(np.float32).view(np.uint32))
    words = np.concatenate(parts, 1)
    return np.concatenate([words, words[:, : -words.shape[1] % 32]], 1)


def test_all_instructions_are_looked_at():
    """A new one that is none of these has to be put somewhere."""
    others = set(ptx.INSTRUCTIONS) - set(PURE)
    memory = {name for name in others if re.match(r"load|store|copy", name)}
    waiting = {name for name in others if re.match(r"barrier|wait_for|let_next", name)}
    warps = {"shuffle_xor", "shuffle_xor_float", "shuffle", "sync_warp"} | set(PRODUCTS) | set(WHOLE)
    assert others == memory | waiting | warps and len(PURE) >= 20


@pytest.mark.parametrize("name", PURE)
def test_an_instruction_is_its_meaning(name, rng):
    words = argument_words(name, rng)
    (got, got_nan), (meant, meant_nan) = (bits_and_nan(name, f(name, words)) for f in (on_gpu, in_python))
    wrong = ~((got == meant) | (got_nan & meant_nan))
    if wrong.any():
        row, at = (int(k[0]) for k in wrong.nonzero())
        column = at * words.shape[1] // wrong.shape[1]
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} results differ, the first for "
            f"{[hex(w) for w in words[:, column]]}: {int(got[row, at]):#x}, where {int(meant[row, at]):#x} is meant"
        )


# --- what a warp does as one ---


@pytest.mark.parametrize("name", ["shuffle_xor", "shuffle_xor_float"])
@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_lanes_exchange_with_the_one_whose_number_differs_by_the_mask(name, mask, rng):
    values = rng.integers(0, 0x7F000000, 32, np.uint32)  # no NaN
    got = on_gpu(name, np.stack([values, np.full(32, mask, np.uint32)]))
    assert np.array_equal(got[0], values[np.arange(32) ^ mask])


def test_lanes_take_the_value_of_any_lane(rng):
    values, sources = rng.integers(0, 1 << 32, 32, np.uint32), rng.integers(0, 32, 32).astype(np.uint32)
    assert np.array_equal(on_gpu("shuffle", np.stack([values, sources]))[0], values[sources])


# --- tensor cores. Lane 4g + t holds parts of A (16, k), B (k, 8) and C (16, 8), as the PTX manual has it ---

PRODUCTS = {"mma_half": torch.float16, "mma_bfloat": torch.bfloat16}
WHOLE = {"mma_int8": torch.int8, "mma_uint8": torch.uint8}
WARPS = 64
G, T = np.divmod(np.arange(32), 4)


def words_of(matrix, row, column, count):
    """For each lane the word that begins at its row and column, of `count` numbers side by side."""
    pieces = [matrix[:, row, column + k] for k in range(count)]
    return torch.stack(pieces, -1).contiguous().view(torch.int32).flatten().numpy().view(np.uint32)


def multiply(name, A, B, C):
    """(warps, 16, k) @ (warps, k, 8) + (warps, 16, 8) by the instruction. C and the result: words as uint32."""
    per_word = A.shape[2] // 8
    left, right, B = T * per_word, T * per_word + A.shape[2] // 2, B.mT
    words = [words_of(A, row, column, per_word) for column in (left, right) for row in (G, G + 8)]
    words += [words_of(B, G, column, per_word) for column in (left, right)]
    words += [C[:, row, 2 * T + k].flatten() for row in (G, G + 8) for k in (0, 1)]
    got, D = on_gpu(name, np.stack(words)).reshape(4, -1, 32), np.zeros(C.shape, np.uint32)
    for part, (row, k) in zip(got, itertools.product((G, G + 8), (0, 1)), strict=True):
        D[:, row, 2 * T + k] = part
    return D


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_exact_and_sums_are_float32(name):
    A, B = (torch.randn(WARPS, *shape).to(PRODUCTS[name]) for shape in ((16, 16), (16, 8)))
    C = torch.randn(WARPS, 16, 8)
    got = torch.from_numpy(multiply(name, A, B, C.numpy().view(np.uint32)).view(np.float32)).double()
    exact = A.double() @ B.double() + C.double()
    magnitude = A.double().abs() @ B.double().abs() + C.double().abs()
    assert ((got - exact).abs() <= 17 * UNIT * magnitude).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_sums_of_small_whole_numbers_are_exact(name):
    """This leaves no room for a wrong place."""
    A, B = (torch.randint(-128, 129, (WARPS, *shape)).to(PRODUCTS[name]) for shape in ((16, 16), (16, 8)))
    C = torch.randint(-1000, 1000, (WARPS, 16, 8)).float()
    got = multiply(name, A, B, C.numpy().view(np.uint32)).view(np.float32)
    assert np.array_equal(got, (A.double() @ B.double() + C.double()).numpy())


@pytest.mark.parametrize("name", PRODUCTS)
def test_subnormal_numbers_count(name):
    tiny = torch.finfo(PRODUCTS[name]).smallest_normal / 4
    A, B = torch.full((1, 16, 16), tiny).to(PRODUCTS[name]), torch.ones(1, 16, 8).to(PRODUCTS[name])
    got = multiply(name, A, B, np.zeros((1, 16, 8), np.uint32)).view(np.float32)
    assert (got == 16 * tiny).all()


@pytest.mark.parametrize("name", WHOLE)
def test_products_of_bytes_are_exact_and_wrap_around(name):
    low, high = (0, 256) if name == "mma_uint8" else (-128, 128)
    A, B = torch.randint(low, high, (WARPS, 16, 32)), torch.randint(-128, 128, (WARPS, 32, 8))
    A[0], B[0] = low if low else 255, -128
    C = torch.randint(-(2**31), 2**31, (WARPS, 16, 8))
    C[0] = 2**31 - 1  # the sums go beyond 32 bits
    got = multiply(name, A.to(WHOLE[name]), B.to(torch.int8), C.numpy().astype(np.uint32))
    assert np.array_equal(got, (A @ B + C).numpy().astype(np.uint32))
