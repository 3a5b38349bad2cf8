"""The product with packed codes: exact where nothing has to be rounded, else within the bound that is derived."""

import os
from dataclasses import replace

import pytest
import torch

import qlearn
from qlearn.formats.integers import Integers
from qlearn.kernels.cpu import packed
from qlearn.kernels.cpu.packed import packed_matmul, why_not
from qlearn.rotation import hadamard, hadamard_matrix
from qlearn.tensor import QuantizedTensor
from tests.test_tensor import in_tables, with_quantized_scales

CODES = [(bits, signed) for bits in range(1, 9) for signed in (False, True)]
U = 2.0**-24


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(bits, signed, out, columns, group, zeros=None, scale_dtype=torch.float16, seed=0):
    """Random codes and powers of two as scales, so that a product with small integers is exact in float32."""
    format, shape = Integers(bits, signed), (out, columns // group)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (out, columns), generator=seeded(seed))
    codes.view(-1)[:2] = torch.tensor([low, high - 1])
    scales = torch.exp2(torch.randint(-3, 4, shape, generator=seeded(seed + 1))).to(scale_dtype)
    if zeros is not None:
        zeros = torch.randint(0, 2**bits, shape, generator=seeded(seed + 2)).to(zeros)
    return QuantizedTensor.from_codes(codes, scales, format, (1, group), zeros=zeros)


def integers(tokens, columns, seed=3):
    return torch.randint(-8, 9, (tokens, columns), generator=seeded(seed)).float()


def exact(x, quantized):
    return x.double() @ quantized.dequantize(torch.float64).T


def bound(x, quantized):
    """gamma(n + 4) times the sum of |scale| (|code| + |zero|) |column scale| |x|, all in float64."""
    parts = replace(quantized, zeros=None, column_scales=None, hadamard=None, scales=quantized.scales.float().abs())
    sizes = parts.dequantize(torch.float64).abs()
    if quantized.zeros is not None:
        group = quantized.block[1]
        sizes += (quantized.zero_points().abs() * quantized.scales.float().abs()).repeat_interleave(group, 1)
    if quantized.column_scales is not None:
        sizes *= quantized.column_factors().abs()
    n = quantized.shape[1] + 4
    x = x.double().abs()
    if quantized.hadamard is not None:  # each rotated input is a sum of that many, in a tree, and a product
        steps = quantized.hadamard.bit_length()
        x = (
            x
            @ torch.block_diag(*[hadamard_matrix(quantized.hadamard)] * (x.shape[1] // quantized.hadamard))
            .abs()
            .double()
        )
        n += steps
    return n * U / (1 - n * U) * (x @ sizes.T)


@pytest.mark.parametrize(("bits", "signed"), CODES, ids=[f"{'' if s else 'u'}int{b}" for b, s in CODES])
def test_every_code_in_every_place(bits, signed):
    """16 different rows of three tiles, so that every code stands in most places."""
    quantized = random(bits, signed, 16, 192, 64, zeros=None if signed else torch.uint8)
    x = integers(1, 192)
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))


@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 8, 9, 17])
def test_tokens(tokens):
    quantized, x = random(4, True, 5, 128, 64), integers(tokens, 128)
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))


GROUPS = [(8, 8), (16, 16), (40, 8), (64, 8), (64, 16), (64, 32), (72, 24), (96, 32), (96, 96), (192, 96), (200, 40)]
WHOLE_TILES = [(128, 128), (192, 192), (384, 128)]


@pytest.mark.parametrize(("columns", "group"), GROUPS + WHOLE_TILES)
@pytest.mark.parametrize("bits", [3, 4])
def test_groups(columns, group, bits):
    """Groups of less than a tile, of whole tiles, of neither; rows that end within a tile."""
    quantized, x = random(bits, False, 7, columns, group, zeros=torch.uint8), integers(1, columns)
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))


@pytest.mark.parametrize("out", [0, 1, 3])
def test_few_rows(out):
    quantized, x = random(4, True, out or 1, 64, 64), integers(1, 64)
    if not out:
        quantized = replace(quantized, packed=quantized.packed[:0], scales=quantized.scales[:0], shape=(0, 64))
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))


STORED = [
    (torch.float16, None),
    (torch.float16, torch.uint8),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, None),
    (torch.float32, torch.uint8),
]


@pytest.mark.parametrize(("scale_dtype", "zeros"), STORED, ids=str)
def test_how_scales_and_zeros_are_stored(scale_dtype, zeros):
    quantized, x = random(4, False, 6, 128, 64, zeros=zeros, scale_dtype=scale_dtype), integers(1, 128)
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))


def test_all_halves():
    """Every finite float16 as a scale is the number that torch says it is, subnormal or not."""
    scales = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    quantized = QuantizedTensor.from_codes(
        torch.eye(8)[:1].long().repeat(2**16, 1), scales[:, None], Integers(2), (1, 8)
    )
    y = packed_matmul(torch.ones(8), quantized)
    assert torch.equal(y.nan_to_num(nan=1.5), scales.float().nan_to_num(nan=1.5))


def test_scales_that_are_quantized_themselves():
    quantized, x = with_quantized_scales(), torch.randn(1, 32, generator=seeded())
    assert ((packed_matmul(x, quantized) - exact(x, quantized)).abs() <= bound(x, quantized)).all()


METHODS = [
    ("absmax", {"bits": 4, "group_size": 64}),
    ("absmax", {"bits": 8}),
    ("zero_point", {"bits": 4, "group_size": 64}),
    ("zero_point", {"bits": 3, "group_size": 32}),
    ("hqq", {"bits": 4, "group_size": 64}),
    ("sinq", {"bits": 4, "group_size": 64}),
    ("sinq", {"bits": 4, "group_size": 64, "tile_rows": 16}),
    ("sinq", {"bits": 4, "group_size": 64, "small_scales": True}),
    ("hadamard", {"bits": 4, "group_size": 64}),
]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_methods_within_the_bound(method, options):
    weight = torch.randn(48, 256, generator=seeded()) * torch.linspace(0.01, 3, 256)
    quantized, x = qlearn.quantize(weight, method, **options), torch.randn(1, 256, generator=seeded(1))
    found = (packed_matmul(x, quantized) - exact(x, quantized)).abs()
    assert (found <= bound(x, quantized)).all()


def test_the_rotation_is_that_of_the_weight():
    quantized, x = replace(random(4, True, 4, 128, 64), hadamard=32), integers(1, 128)
    unrotated = replace(quantized, hadamard=None)
    assert torch.equal(packed_matmul(x, quantized), packed_matmul(hadamard(x, 32), unrotated))
    assert ((packed_matmul(x, quantized) - exact(x, quantized)).abs() <= bound(x, quantized)).all()


def test_bands_have_column_scales_of_their_own():
    quantized, x = random(4, True, 6, 64, 64), integers(2, 64)
    factors = torch.exp2(torch.randint(-2, 3, (3, 64), generator=seeded()))
    for column_scales in (factors, factors[0], factors[:1]):
        banded = replace(quantized, column_scales=column_scales.half())
        assert packed_matmul(x, banded).double().equal(exact(x, banded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_dtypes_and_bias(dtype, with_bias):
    """Computed in float32 and rounded once."""
    quantized, x = random(4, True, 6, 64, 64), torch.randn(2, 64, generator=seeded()).to(dtype)
    bias = torch.linspace(-1, 1, 6).to(dtype) if with_bias else None
    y = packed_matmul(x, quantized, bias)
    expected = packed_matmul(x.float(), quantized) + (0 if bias is None else bias.float())
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 1, 64), (2, 0, 64)], ids=str)
def test_shapes(shape):
    quantized, x = random(4, True, 6, 64, 64), integers(6, 64)
    x = x.flatten()[: torch.Size(shape).numel()].view(shape)
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))
    assert packed_matmul(x, quantized).shape == (*shape[:-1], 6)


def test_inputs_that_are_not_contiguous():
    quantized, x = random(4, True, 6, 64, 64), integers(64, 4).T
    assert packed_matmul(x, quantized).double().equal(exact(x, quantized))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows(threads, monkeypatch):
    monkeypatch.setattr(packed, "LEAST_SHARE", 1)
    before = torch.get_num_threads()
    quantized, x = random(4, True, 5, 128, 64), torch.randn(3, 128, generator=seeded())
    expected = packed_matmul(x, quantized)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(packed_matmul(x, quantized), expected)  # a row is always summed by one thread
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(packed, "LEAST_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    quantized, x = random(4, True, 4, 64, 64), integers(1, 64)
    packed_matmul(x, quantized)
    child = os.fork()
    if child == 0:
        os._exit(0 if packed._product(x.numpy(), quantized).shape == (1, 4) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_no_number_leaves_the_others_alone(bad):
    quantized, x = random(4, False, 6, 64, 64, zeros=torch.uint8), integers(3, 64)
    expected = packed_matmul(x, quantized)
    x[1, 9] = bad
    y = packed_matmul(x, quantized)
    assert not torch.isfinite(y[1]).any() and torch.equal(y[[0, 2]], expected[[0, 2]])


def refused():
    good, x = random(4, True, 4, 64, 64), torch.ones(2, 64)
    table, trits, blocks = in_tables()
    yield "float64", x.double(), good, "x is float64, and this kernel sums in float32"
    yield "a device", x.to("meta"), good, "x is on meta, the weight on cpu"
    yield "a table", torch.ones(2, 32), table, "nf4 is a table of numbers"
    yield "trits", torch.ones(2, 32), trits, "trit is packed in base 3"
    yield "floats", torch.ones(2, 32), blocks, "fp4_e2m1 is a format of floats"
    yield "a block of rows", x, qlearn.quantize(torch.ones(4, 64), "absmax", per="tensor"), "blocks of 4 rows share"
    yield "a column", x, qlearn.quantize(torch.ones(4, 64), "absmax", per="column"), "blocks of 4 rows share"
    yield "12 columns", torch.ones(12), random(4, True, 4, 12, 12), "groups of 12 in rows of 12 do not all begin"
    yield "groups of 4", x, random(4, True, 4, 64, 4), "groups of 4 in rows of 64 do not all begin"
    yield "a gradient", torch.ones(64, requires_grad=True), good, "x wants a gradient"
    yield "too short", torch.ones(2, 32), good, r"x has shape \(2, 32\); a weight of 4 x 64 needs \(..., 64\)"
    yield "no axis", torch.ones(()), good, r"x has shape \(\)"


CASES = list(refused())


@pytest.mark.parametrize(("x", "quantized", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_is_refused(x, quantized, message):
    with pytest.raises(ValueError, match=message):
        packed_matmul(x, quantized)


@pytest.mark.parametrize("bias", [torch.ones(3), torch.ones(4, 1), torch.ones(4).half()], ids=["3", "4 x 1", "half"])
def test_a_bias_that_does_not_fit(bias):
    with pytest.raises(ValueError, match=r"a bias of .* does not fit; here it has to be torch.float32"):
        packed_matmul(torch.ones(64), random(4, True, 4, 64, 64), bias)


def test_a_gradient_that_is_not_wanted_is_no_reason():
    x, quantized = torch.ones(64, requires_grad=True), random(4, True, 4, 64, 64)
    with torch.no_grad():
        assert why_not(x, quantized) is None and not packed_matmul(x, quantized).requires_grad
