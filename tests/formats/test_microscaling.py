"""Microscaling formats: scales from plain Python, elements from ml_dtypes, llama.cpp's blocks from the gguf package.

microxcaling and Quartet are not on the package index. What is tested of them is their rule for ties, written out here
from their sources. torchao is in `tests/peers`.
"""

import functools
import math

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch

from qlearn.formats import gguf_blocks
from qlearn.formats.fixed_point import MX_INT8
from qlearn.formats.microscaling import (
    BLOCK_FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
)
from tests.conformance.families import families
from tests.formats.oracles import EVERY_BF16

FAMILIES = families()
MX_FLOATS = {  # the type of ml_dtypes; bits of mantissa and the largest power of two, from the standard's tables
    MXFP8_E4M3: (ml_dtypes.float8_e4m3fn, 3, 8),
    MXFP8_E5M2: (ml_dtypes.float8_e5m2, 2, 15),
    MXFP6_E3M2: (ml_dtypes.float6_e3m2fn, 2, 4),
    MXFP6_E2M3: (ml_dtypes.float6_e2m3fn, 3, 2),
    MXFP4: (ml_dtypes.float4_e2m1fn, 1, 2),
}
MX = {**MX_FLOATS, MXINT8: (None, 6, 0)}
RULES = ("floor", "ceil", "even", "rceil", "ggml")
TIES = ("even", "away", "down", "ggml")
every_format = pytest.mark.parametrize("format", BLOCK_FORMATS.values(), ids=lambda f: f.name)
every_mx = pytest.mark.parametrize("format", MX, ids=lambda f: f.name)
every_float = pytest.mark.parametrize("format", MX_FLOATS, ids=lambda f: f.name)


def grid(format):
    """Every number of the elements by code, float64, NaN where there is none; from ml_dtypes, or from the standard."""
    dtype = MX[format][0] if format is not NVFP4 else ml_dtypes.float4_e2m1fn
    if dtype is None:
        return np.arange(256, dtype=np.uint8).view(np.int8) / 64
    numbers = np.arange(2**format.element.bits, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


@functools.cache
def largest(format):
    return -np.nanmin(grid(format)) if format is not MXINT8 else 127 / 64


def exponent(amax, format, rule):
    """The exponent of the scale of one block, before it is limited. Python's floats are exact in all of this."""
    _, mantissa_bits, emax = MX[format]
    if not amax:
        return -1000
    floor = math.frexp(amax)[1] - 1
    if rule == "floor":
        return floor - emax
    if rule == "ceil":
        return next(k for k in (floor, floor + 1) if math.ldexp(1, k) >= amax) - emax
    if rule == "even":
        units = math.ldexp(amax, mantissa_bits - floor)
        return floor + (math.floor(units + 0.5) == 2 ** (mantissa_bits + 1)) - emax
    if rule == "rceil":
        return next(k for k in range(floor - emax - 1, floor + 2) if math.ldexp(largest(format), k) >= amax)
    return math.floor(np.float32(math.log2(amax))) - emax


def expected_scales(x, format, rule):
    """Codes of the scales of x (..., n), in plain Python."""
    emax = MX[format][2]
    amax = abs(x).reshape(-1, 32).max(-1).tolist()
    limited = [min(max(exponent(a, format, rule), -127), 127 - emax) for a in amax]
    return np.array([e + 127 for e in limited], np.uint8).reshape(*x.shape[:-1], -1)


def nearest(x, format, ties):
    """Codes by looking at every number of the grid; x float64, already divided by its scale."""
    numbers = grid(format)
    allowed = abs(numbers) <= largest(format)
    distance = np.where(allowed, abs(x[..., None] - numbers), np.inf)
    tied = distance == distance.min(-1, keepdims=True)
    if format is not MXINT8:
        if ties == "ggml":
            return tied.argmax(-1).astype(np.uint8)  # of equals the first, +0 rather than -0
        tied &= np.signbit(numbers) == np.signbit(x[..., None])
    order = {"even": np.arange(len(numbers)) & 1, "away": -abs(numbers), "down": abs(numbers), "ggml": abs(numbers)}
    return np.where(tied, order[ties], np.inf).argmin(-1).astype(np.uint8)


def scaled(x, scales, block_size=32):
    return np.ldexp(x.astype(np.float64), 127 - scales.astype(int).repeat(block_size, -1))


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@every_mx
def test_scales_are_those_of_exact_arithmetic(format, rule):
    for family, x in FAMILIES.items():
        _, scales = format.quantize(x, rule)
        assert np.array_equal(scales, expected_scales(x, format, rule)), family


@pytest.mark.parametrize("rule", RULES)
@every_mx
def test_scales_of_every_magnitude_and_its_neighbours(format, rule):
    """Around each power of two, each largest element and each threshold, from the smallest float32 to the largest."""
    powers = np.ldexp(1.0, np.arange(-149, 128))
    _, mantissa_bits, emax = MX[format]
    marks = np.outer([1, 1.5, largest(format) / 2**emax, 2 - 0.5 ** (mantissa_bits + 1)], powers)
    marks = marks.ravel().astype(np.float32)
    amax = np.concatenate([marks, np.nextafter(marks, np.float32(np.inf)), np.nextafter(marks, np.float32(0))])
    amax = amax[np.isfinite(amax)]
    x = np.zeros((len(amax), 32), np.float32)
    x[np.arange(len(amax)), np.arange(len(amax)) % 32] = amax * np.where(np.arange(len(amax)) % 2, 1, -1)
    _, scales = format.quantize(x, rule)
    assert np.array_equal(scales, expected_scales(x, format, rule))


def test_the_table_of_the_rules():
    amax = np.zeros((5, 32))
    amax[:, 3] = 4, 5, 6.5, 7, 8
    table = {rule: (2.0 ** (MXFP4.quantize(amax, rule)[1][:, 0] - 127.0)).tolist() for rule in RULES[:4]}
    assert table == {
        "floor": [1, 1, 1, 1, 2],
        "ceil": [1, 2, 2, 2, 2],
        "even": [1, 1, 1, 2, 2],
        "rceil": [1, 1, 2, 2, 2],
    }


@every_mx
def test_rceil_is_the_smallest_scale_that_cuts_nothing_off(format):
    x = FAMILIES["mixed magnitudes"]
    amax = abs(x).reshape(-1, 32).max(-1)
    reach = largest(format) * 2.0 ** (format.quantize(x, "rceil")[1].ravel() - 127.0)
    assert (reach >= amax).all() and (reach / 2 < amax).all()


@every_float
def test_mse_is_the_best_of_three(format):
    x = np.concatenate([FAMILIES["normal"], FAMILIES["heavy tails"], FAMILIES["halves of a grid"]])
    # 31 numbers that are on the grid for half of the scale only; two of the formats then cut the large one off
    x[0, :32] = np.where(np.arange(32) == 5, 2 ** MX[format][2], grid(format)[1] / 2)
    codes, scales = format.quantize(x, "mse")
    floor = expected_scales(x, format, "floor").astype(int)
    errors = []
    for step in (-1, 0, 1):
        tried = floor + step
        steps = np.ldexp(1.0, tried.repeat(32, -1) - 127)
        numbers = np.clip(scaled(x, tried), -largest(format), largest(format)).astype(MX[format][0]).astype(np.float64)
        errors.append(((numbers * steps - x) ** 2).reshape(*floor.shape, 32).sum(-1))
    found = ((format.dequantize(codes, scales).astype(np.float64) - x) ** 2).reshape(*floor.shape, 32).sum(-1)
    assert np.array_equal(found, np.min(errors, 0))
    assert set((scales - floor).ravel()) == ({-1, 0, 1} if format in (MXFP4, MXFP6_E2M3) else {0, 1})
    for rule in RULES:
        others = ((format.round(x, rule).astype(np.float64) - x) ** 2).reshape(*floor.shape, 32).sum(-1)
        assert (found <= others).all()


# ---- elements --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-100, 0, 57])
@every_float
def test_every_bfloat16_that_fits_is_cast_as_by_ml_dtypes(format, power):
    """31 of them to a block, beside a number that fixes the scale at 2**power."""
    dtype, _, emax = MX[format]
    x = EVERY_BF16.astype(np.float32)
    x = x[abs(x) < 2.0 ** (power + emax + 1)]  # false for NaN
    assert len(x) > 2000
    blocks = np.full((-(-len(x) // 31), 32), 2.0 ** (power + emax), np.float32)
    blocks[:, :31].flat[: len(x)] = x
    codes, scales = format.quantize(blocks)
    assert (scales == power + 127).all()
    inside = np.clip(x * 2.0**-power, -largest(format), largest(format)).astype(np.float32)
    assert np.array_equal(codes[:, :31].ravel()[: len(x)], inside.astype(dtype).view(np.uint8))
    values = format.dequantize(codes, scales)[:, :31].ravel()[: len(x)]
    assert np.array_equal(values, inside.astype(dtype).astype(np.float32) * np.float32(2.0**power))


@pytest.mark.parametrize("ties", TIES)
@every_mx
def test_elements_are_the_nearest_numbers(format, ties):
    numbers = np.unique(grid(format)[abs(grid(format)) <= largest(format)])
    between = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, between, np.nextafter(between, 9**9), np.nextafter(between, -(9**9)), [0.0, -0.0]])
    x = np.append(x, np.random.default_rng(0).normal(0, largest(format) / 2, 3000)).clip(-1.99 * 2 ** MX[format][2])
    x = x[x < 2 ** (MX[format][2] + 1)]
    blocks = np.full((-(-len(x) // 31), 32), 2.0 ** MX[format][2])
    blocks[:, :31].flat[: len(x)] = x
    codes, scales = format.quantize(blocks, ties=ties)
    assert (scales == 127).all()
    assert np.array_equal(codes, nearest(blocks, format, ties))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_elements_of_every_family(family, ties):
    x = FAMILIES[family][[0, -1]]
    for format in (MXFP4, MXFP6_E2M3, MXINT8):
        codes, scales = format.quantize(x, "rceil", ties)
        assert np.array_equal(codes, nearest(scaled(x, scales), format, ties)), format.name


def microxcaling(x, mantissa_bits, smallest_power, largest):
    """`round_mantissa` "nearest" of microxcaling's elemwise_ops, in the notation of this file."""
    power = np.floor(np.log2(np.where(x == 0, 1, abs(x)))).clip(smallest_power)
    unit = 2.0 ** (power - mantissa_bits)
    return np.clip(np.sign(x) * np.floor(abs(x / unit) + 0.5) * unit, -largest, largest)


@pytest.mark.parametrize(
    "format, smallest_power",
    [(MXFP8_E4M3, -6), (MXFP8_E5M2, -14), (MXFP6_E3M2, -2), (MXFP6_E2M3, 0), (MXFP4, 0), (MXINT8, 0)],
    ids=lambda v: getattr(v, "name", None),
)
def test_away_is_the_rule_of_microxcaling(format, smallest_power):
    x = np.concatenate([FAMILIES["halves of a grid"], FAMILIES["normal"], FAMILIES["ternary"]]) / 4
    scales = expected_scales(x, format, "floor")
    steps = np.ldexp(1.0, scales.astype(int).repeat(32, -1) - 127)
    expected = microxcaling(x / steps, MX[format][1], smallest_power, largest(format)) * steps
    assert np.array_equal(format.round(x, ties="away"), expected)


def test_down_is_the_rule_of_quartet():
    """Its thresholds, each of which has to be exceeded."""
    x = np.arange(-8192, 8192).reshape(-1, 32) / 1024
    x[:, 0] = 6
    expected = sum(
        step * (abs(x) > threshold)
        for threshold, step in [(0.25, 0.5), (0.75, 0.5), (1.25, 0.5), (1.75, 0.5), (2.5, 1), (3.5, 1), (5, 2)]
    )
    assert np.array_equal(MXFP4.round(x, ties="down"), np.sign(x) * expected)


def test_the_rules_for_ties_differ_where_they_should():
    x = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25] + [0.0] * 23 + [4.0]
    rounded = {ties: MXFP4.round(x, ties=ties)[:8].tolist() for ties in TIES}
    assert rounded["even"] == [0, 1, 1, 2, 2, 4, 4, 0]
    assert rounded["away"] == [0.5, 1, 1.5, 2, 3, 4, 6, -0.5]
    assert rounded["down"] == rounded["ggml"] == [0, 0.5, 1, 1.5, 2, 3, 4, 0]
    signs = {ties: math.copysign(1, rounded[ties][7]) for ties in TIES}
    assert signs == {"even": -1, "away": -1, "down": -1, "ggml": 1}


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def fields_of(blocks):
    """What lies in llama.cpp's bytes: codes (..., n) and scales (..., n / 32). Its layout, read by hand."""
    blocks = blocks.reshape(*blocks.shape[:-1], -1, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], -1)
    return codes.reshape(*codes.shape[:-2], -1), blocks[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_llama_cpp(family):
    codes, scales = MXFP4.quantize(FAMILIES[family], "ggml", "ggml")
    for their_codes, their_scales in (
        fields_of(gguf_blocks.quantize(FAMILIES[family], "MXFP4")),  # compared with ggml itself by hashes
        fields_of(gguf.quants.quantize(FAMILIES[family], gguf.GGMLQuantizationType.MXFP4)),
    ):
        assert np.array_equal(scales, their_scales)
        assert np.array_equal(codes, their_codes)


def test_any_blocks_of_llama_cpp_are_decoded_as_by_gguf():
    blocks = np.random.RandomState(0).randint(0, 256, (64, 6 * 17)).astype(np.uint8)
    blocks[:, ::17] %= 253  # beyond, the largest numbers exceed float32
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(MXFP4.dequantize(*fields_of(blocks)), expected)


# ---- MXINT8 and NVFP4 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_mxint8_is_an_integer_over_64(family):
    x = FAMILIES[family]
    codes, scales = MXINT8.quantize(x)
    integers = np.rint(64 * scaled(x, scales)).clip(-127, 127)
    assert np.array_equal(codes.view(np.int8), integers)
    assert np.array_equal(MXINT8.dequantize(codes, scales), integers / 64 * 2.0 ** (scales.repeat(32, -1) - 127.0))


def test_mxint8_leaves_its_lowest_code_unused_but_reads_it():
    codes, _ = MXINT8.quantize(-np.nextafter(np.float32(2), np.float32(0)) * np.ones(32, np.float32))
    assert codes.tolist() == [129] * 32
    assert MXINT8.dequantize(np.full(32, 128, np.uint8), np.uint8([127])).tolist() == [-2.0] * 32
    assert MX_INT8.encode([-2.0, -np.inf, np.inf]).tolist() == [128, 128, 127]


def nvfp4(x):
    """NVFP4 in single float32 operations: codes, scales, tensor scale."""
    f = np.float32
    tensor_scale = f(abs(x).max()) / f(2688)
    codes, scales = [], []
    for block in x.reshape(-1, 16):
        scale = (abs(block).max() / f(6) / tensor_scale).clip(f(2.0**-9), f(448)).astype(ml_dtypes.float8_e4m3fn)
        factor = (f(1) / tensor_scale) / scale.astype(f)
        codes.append((block * factor).clip(f(-6), f(6)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
        scales.append(scale.view(np.uint8))
    return np.reshape(codes, x.shape), np.reshape(scales, (*x.shape[:-1], -1)), tensor_scale


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].any()])
def test_nvfp4(family):
    codes, scales, tensor_scale = NVFP4.quantize(FAMILIES[family])
    their_codes, their_scales, their_tensor_scale = nvfp4(FAMILIES[family])
    assert tensor_scale == their_tensor_scale and tensor_scale.dtype == np.float32
    assert np.array_equal(scales, their_scales) and np.array_equal(codes, their_codes)
    steps = their_scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * their_tensor_scale
    values = their_codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * steps.repeat(16, -1)
    assert np.array_equal(NVFP4.dequantize(codes, scales, tensor_scale), values)


@pytest.mark.parametrize("family", ["normal", "heavy tails", "mixed magnitudes", "sub-blocks of zeros"])
def test_nvfp4_mse_is_the_best_of_eight(family):
    x = FAMILIES[family]
    codes, scales, tensor_scale = NVFP4.quantize(x, "mse")
    first = NVFP4.quantize(x)[1]
    errors = []
    for step in range(-2, 6):
        tried = (first.astype(int) + step).clip(1, 126).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        tried = tried.astype(np.float32).repeat(16, -1)
        elements = (x * (1 / tensor_scale / tried)).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
        errors.append(((elements * tried * float(tensor_scale) - x) ** 2).reshape(*first.shape, 16).sum(-1))
    best = np.min(errors, 0)
    decoded = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64).repeat(16, -1) * float(tensor_scale)
    found = (
        ((codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * decoded - x) ** 2).reshape(*first.shape, 16).sum(-1)
    )
    assert np.allclose(found, best, rtol=2**-40, atol=0)  # the same sums of 16, in another order
    assert (best < errors[2]).any() or family == "sub-blocks of zeros"


def test_a_given_tensor_scale_is_used():
    x = FAMILIES["normal"]
    codes, scales, tensor_scale = NVFP4.quantize(x, tensor_scale=2.0**-8)
    assert tensor_scale == 2.0**-8
    amax = abs(x).reshape(5, -1, 16).max(-1)
    assert np.array_equal(
        scales, (amax / np.float32(6) * 2**8).clip(0, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    assert np.array_equal(NVFP4.round(x, tensor_scale=2.0**-8), NVFP4.dequantize(codes, scales, 2.0**-8))
    assert np.array_equal(NVFP4.quantize(x, tensor_scale=torch.tensor(2.0**-8))[0], codes)


# ---- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", (*RULES, "mse"))
@every_mx
def test_zeros(format, rule):
    codes, scales = format.quantize(np.zeros(32), rule)
    assert codes.tolist() == [0] * 32 and scales.tolist() == [0]
    assert format.round(np.zeros((2, 64)), rule).tolist() == np.zeros((2, 64)).tolist()


def test_zeros_in_nvfp4():
    codes, scales, tensor_scale = NVFP4.quantize(np.zeros((2, 32)))
    assert not codes.any() and (scales == 1).all() and tensor_scale == 1
    x = np.zeros((2, 32))
    x[1, 0] = 12
    assert NVFP4.round(x).tolist() == x.tolist()


@pytest.mark.parametrize("ties", TIES)
@every_format
def test_the_sign_of_zero(format, ties):
    x = np.where(np.arange(32) % 2, -0.0, 1.0)
    kept = format is not MXINT8 and ties != "ggml"
    assert np.array_equal(np.signbit(format.round(x, ties=ties)), (x == 0) & kept)


@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-127, 2.0**-126, 1.1 * 2.0**-126, 2.0**-120, 2.0**-112], ids=str)
@every_float
def test_blocks_at_the_lower_end_are_rounded_at_the_smallest_scale(format, amax):
    x = np.float32(np.append(np.linspace(-1, 1, 31), 1) * amax)
    codes, scales = format.quantize(x)
    assert scales == max(math.frexp(np.float32(amax))[1] - 1 - MX[format][2] + 127, 0)
    inside = (
        scaled(x, scales).clip(-largest(format), largest(format)).astype(np.float32)
    )  # exact: at least 2**-149 * 2**127
    assert np.array_equal(codes, inside.astype(MX[format][0]).view(np.uint8))


@pytest.mark.parametrize("rule", (*RULES, "mse"))
@every_mx
def test_the_largest_float32_comes_back_finite_under_every_rule(format, rule):
    x = np.full(32, np.finfo(np.float32).max) * np.where(np.arange(32) % 2, 1, -1)
    codes, scales = format.quantize(x, rule)
    assert scales == 254 - MX[format][2]
    assert np.array_equal(
        format.dequantize(codes, scales), np.sign(x) * np.float32(largest(format) * 2.0 ** (scales - 127.0))
    )


@every_mx
def test_numbers_beyond_float32_become_the_largest(format):
    x = np.append(np.full(31, 1e300), -1.0)
    top = largest(format) * 2.0 ** (127 - MX[format][2])
    assert format.round(x).tolist() == [np.float32(top)] * 31 + [0.0]


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 2688 * 2.0**-126, 2688 * 2.0**-118, 3e38], ids=str)
def test_nvfp4_of_very_small_and_very_large_tensors(amax):
    x = np.float32(np.append(np.linspace(-1, 1, 31), 1) * amax)
    codes, scales, tensor_scale = NVFP4.quantize(x)
    assert tensor_scale == max(np.float32(amax) / np.float32(2688), 2.0**-118)
    rounded = NVFP4.dequantize(codes, scales, tensor_scale)
    # an element errs by half of its widest step, 1, times the scale, which is right to 1/16 or is the smallest
    scale = max(amax / 6 * (1 + 2**-4), 2.0**-118 * 2.0**-9)
    assert np.isfinite(rounded).all() and abs(rounded.astype(np.float64) - x).max() <= scale


def test_the_scale_255_is_nan():
    values = MXFP8_E4M3.dequantize(np.full((2, 32), 56, np.uint8), np.uint8([[255], [127]]))
    assert np.isnan(values[0]).all() and (values[1] == 1).all()


@every_mx
def test_what_is_on_the_grid_stays(format):
    once = format.round(FAMILIES["mixed magnitudes"])
    assert np.array_equal(format.round(once), once)


# ---- kinds, sizes, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@every_format
def test_tensors_come_back_as_tensors(format, dtype):
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = format.quantize(x)
    expected = format.quantize(x.double().numpy())
    assert found[0].shape == (2, 3, 64) and found[1].shape == (2, 3, 64 // format.block_size)
    assert found[0].dtype == found[1].dtype == torch.uint8 and len(found) == 2 + (format is NVFP4)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, torch.Tensor) and np.array_equal(ours.numpy(), theirs)
    rounded = format.round(x)
    assert rounded.dtype == torch.float32 and np.array_equal(rounded.numpy(), format.round(x.double().numpy()))


@every_format
def test_lists_views_and_nothing_at_all(format):
    x = np.arange(192.0).reshape(64, 3)
    assert np.array_equal(format.round(x.T), format.round(np.ascontiguousarray(x.T)))
    assert np.array_equal(format.round(x.T.tolist()), format.round(x.T))
    assert torch.equal(format.round(torch.from_numpy(x).T), torch.from_numpy(format.round(x.T)))
    assert format.round(np.zeros((0, 32))).shape == (0, 32)
    assert [part.shape for part in format.quantize(np.zeros((4, 0)))[:2]] == [(4, 0), (4, 0)]


@every_format
def test_a_tensor_is_not_cut_by_the_pieces_it_is_worked_on_in(format):
    x = np.random.RandomState(1).standard_normal((3, 2**15)).astype(np.float32)
    whole = format.quantize(x)
    parts = [format.quantize(row, **({"tensor_scale": whole[2]} if format is NVFP4 else {})) for row in x]
    assert np.array_equal(whole[0], [part[0] for part in parts])
    assert np.array_equal(whole[1], [part[1] for part in parts])


def test_bits_per_element():
    bits = {name: format.bits_per_element for name, format in BLOCK_FORMATS.items()}
    assert bits == {
        "mxfp8_e4m3": 8.25, "mxfp8_e5m2": 8.25, "mxfp6_e3m2": 6.25, "mxfp6_e2m3": 6.25, "mxfp4": 4.25, "mxint8": 8.25,
        "nvfp4": 4.5,
    }  # fmt: skip
    for format in BLOCK_FORMATS.values():
        codes, scales = format.quantize(np.ones((8, 64)))[:2]
        assert 8 * (format.element.pack(codes).nbytes + scales.nbytes) == format.bits_per_element * codes.size


@pytest.mark.parametrize(
    ("format", "x", "arguments", "message"),
    [
        (MXFP4, np.ones((2, 33)), {}, r"shape \(2, 33\) do not divide into blocks of 32 along the last axis: pad them"),
        (NVFP4, np.ones(8), {}, r"shape \(8,\) do not divide into blocks of 16"),
        (MXFP4, 1.0, {}, r"shape \(\) do not divide"),
        (MXFP8_E5M2, [0.0] * 30 + [np.inf, np.nan], {}, r"2 of 32 numbers are not finite, first inf at \(30,\)"),
        (MXINT8, [[np.nan] + [0.0] * 31], {}, r"1 of 32 numbers are not finite, first nan at \(0, 0\): mxint8 has no"),
        (NVFP4, [1e300] + [0.0] * 15, {}, "1 of 16 numbers are not finite, first inf"),
        (MXFP4, np.ones(32), {"scale_rule": "nearest"}, "'nearest' is unknown for mxfp4: choose from floor, c"),
        (NVFP4, np.ones(32), {"scale_rule": "floor"}, "'floor' is unknown for nvfp4: choose from nearest, mse"),
        (MXFP4, np.ones(32), {"ties": "up"}, "ties 'up' is unknown: choose from even, away, down, ggml"),
        (MXFP4, np.ones(32), {"tensor_scale": 1.0}, "mxfp4 has no tensor_scale: leave it out"),
        (NVFP4, np.ones(32), {"tensor_scale": 0.0}, "tensor_scale 0.0 is out of range: give a number from"),
        (NVFP4, np.ones(32), {"tensor_scale": np.nan}, "tensor_scale nan is out of range"),
        (NVFP4, np.ones(32), {"tensor_scale": [1.0]}, r"tensor_scale \[1.0\] is out of range"),
        (MXFP4, np.ones(32) * 1j, {}, "cannot encode values of dtype complex128"),
    ],
)  # fmt: skip
def test_what_is_not_quantized(format, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        format.quantize(x, **arguments)


@pytest.mark.parametrize(
    ("format", "arguments", "message"),
    [
        (
            MXFP4,
            ([0] * 32, [127, 127]),
            r"shape \(32,\) and scales of shape \(2,\) do not belong together: mxfp4 has a",
        ),
        (MXFP4, ([0] * 16, [127]), "do not belong together"),
        (MXFP4, ([16] * 32, [127]), "code 16 is out of range"),
        (MXFP4, ([0] * 32, [127], 1.0), "mxfp4 has no tensor_scale"),
        (NVFP4, ([0] * 16, [127]), "nvfp4 needs the tensor_scale that quantize returned"),
    ],
)
def test_what_is_not_dequantized(format, arguments, message):
    with pytest.raises(ValueError, match=message):
        format.dequantize(*arguments)
