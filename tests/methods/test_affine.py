"""Absmax and zero-point: the error bound with a scale computed here, torch's quantizers, and every known edge."""

import numpy as np
import pytest
import torch

from qlearn.methods import absmax, quantize, zero_point
from qlearn.methods.affine import FRACTIONS, store_scale

METHODS = ("absmax", "zero_point")
BITS = range(2, 9)
LAYOUTS = [{"per": "tensor"}, {"per": "row"}, {"per": "column"}, {"group_size": 16}]


def normal(rows=24, columns=48, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def float16_not_below(x):
    """Round float64 up to float16 by NumPy's own nextafter: independent of the package's bit trick."""
    half = x.astype(np.float16)
    return np.where(half.astype(np.float64) < x, np.nextafter(half, np.float16(np.inf)), half).astype(np.float64)


def spans(weight, layout):
    """(low, high) of each weight's block, as full matrices, in float64."""
    w = weight.double().numpy()
    if "group_size" in layout:
        g = layout["group_size"]
        grouped = w.reshape(len(w), -1, g)
        return np.repeat(grouped.min(-1), g, 1), np.repeat(grouped.max(-1), g, 1)
    axis = {"tensor": None, "row": 1, "column": 0}[layout["per"]]
    low, high = w.min(axis=axis, keepdims=True), w.max(axis=axis, keepdims=True)
    return np.broadcast_to(low, w.shape), np.broadcast_to(high, w.shape)


def half_step(weight, bits, layout, method):
    """The largest error allowed: half of the float16 scale, and a few float32 roundings of the span."""
    low, high = spans(weight, layout)
    if method == "absmax":
        span = np.maximum(-low, high)
        scale = span / (2 ** (bits - 1) - 1)
    else:
        span = np.maximum(high, 0) - np.minimum(low, 0)
        scale = span / (2**bits - 1)
    return float16_not_below(scale * (1 + 2**-22)) / 2 + span * 2**-22


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_no_error_exceeds_half_a_step(method, layout, bits):
    for weight in (
        normal(),
        normal(seed=1) * 1e-3,
        normal(seed=2).abs(),
        -normal(seed=3).abs() - 5,
        normal(seed=4) ** 5,
    ):
        error = (quantize(weight, method, bits=bits, **layout).dequantize() - weight).abs().double().numpy()
        assert (error <= half_step(weight, bits, layout, method)).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_bound_is_reached(bits):
    """A bound that is never nearly reached would hide a grid that is too fine: more bits than were asked for."""
    weight = normal(64, 4096)
    for method in METHODS:
        error = (quantize(weight, method, bits=bits).dequantize() - weight).abs().double().numpy()
        assert error.max() > 0.98 * half_step(weight, bits, {"per": "row"}, method).min()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_use_the_range_they_own_and_no_more(method, bits):
    codes = quantize(normal(8, 4096), method, bits=bits).codes()
    qmax = 2 ** (bits - 1) - 1 if method == "absmax" else 2**bits - 1
    assert codes.max() == qmax
    assert codes.min() >= (-qmax if method == "absmax" else 0)
    if method == "zero_point":
        assert codes.min() == 0


def agrees(qt, weight, theirs):
    """torch multiplies by 1/scale where we divide, so a quotient within a hair of a tie may fall to the other side."""
    quotient = (weight / qt.scales.float()).double()
    tie = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    return torch.equal(qt.dequantize()[~tie], theirs[~tie]) and tie.float().mean() < 0.01


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_absmax_agrees_with_torch(layout, bits):
    weight, qmax = normal(32, 64), 2 ** (bits - 1) - 1
    qt = absmax(weight, bits=bits, scale_dtype=torch.float32, **layout)
    if layout["per"] == "tensor":
        theirs = torch.fake_quantize_per_tensor_affine(weight, qt.scales.item(), 0, -qmax, qmax)
    else:
        axis, scales = {"row": 0, "column": 1}[layout["per"]], qt.scales.flatten()
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(weight, scales, zeros, axis, -qmax, qmax)
    assert agrees(qt, weight, theirs)


@pytest.mark.parametrize("bits", BITS)
def test_zero_point_agrees_with_torch(bits):
    weight = normal(32, 64) + 0.7
    qt = zero_point(weight, bits=bits, scale_dtype=torch.float32)
    zeros = qt.zero_points().flatten().int()
    theirs = torch.fake_quantize_per_channel_affine(weight, qt.scales.flatten(), zeros, 0, 0, 2**bits - 1)
    assert agrees(qt, weight, theirs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
class TestEdges:
    def test_zeros_stay_zeros(self, method, bits):
        qt = quantize(torch.zeros(4, 32), method, bits=bits, group_size=16)
        assert torch.equal(qt.dequantize(), torch.zeros(4, 32))
        assert torch.isfinite(qt.scales).all()

    @pytest.mark.parametrize("value", [2.0, -3.0, 1e-3, 40_000.0])
    def test_a_constant_comes_back(self, method, bits, value):
        weight = torch.full((2, 16), value)
        back = quantize(weight, method, bits=bits, scale_dtype=torch.float32).dequantize()
        torch.testing.assert_close(back, weight, rtol=2**-22, atol=0)

    def test_zero_is_exact_beside_anything(self, method, bits):
        for other in (1.0, -1.0, 3.3):
            weight = torch.tensor([[0.0, other, 0.3 * other, -0.2, 0.7]])
            assert quantize(weight, method, bits=bits).dequantize()[0, 0] == 0.0

    def test_all_positive_and_all_negative_mirror_each_other(self, method, bits):
        weight = normal(4, 64).abs() + 0.5
        up = quantize(weight, method, bits=bits).dequantize()
        down = quantize(-weight, method, bits=bits).dequantize()
        assert (up > 0).all() or bits < 4
        if method == "absmax":
            assert torch.equal(up, -down)

    def test_a_zero_group_beside_others(self, method, bits):
        weight = normal(2, 32)
        weight[:, :16] = 0
        qt = quantize(weight, method, bits=bits, group_size=16)
        assert torch.equal(qt.dequantize()[:, :16], torch.zeros(2, 16))

    def test_tiny_weights_keep_the_bound(self, method, bits):
        """Below 6e-5 a float16 scale loses precision; rounded down to 0 it would turn every code into inf."""
        weight = normal(4, 64) * 1e-6
        error = (quantize(weight, method, bits=bits).dequantize() - weight).abs().double().numpy()
        assert (error <= half_step(weight, bits, {"per": "row"}, method)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_clip_is_the_best_of_its_candidates(method, bits):
    """Brute force over the same fractions, block by block, in plain Python."""
    weight = normal(3, 32) ** 3
    qt = quantize(weight, method, bits=bits, clip="mse", scale_dtype=torch.float32)
    ours = (qt.dequantize() - weight).square().sum(1)
    for row, error in zip(weight, ours, strict=True):
        best = min(squared_error(row, method, bits, fraction) for fraction in FRACTIONS.tolist())
        assert error.item() == pytest.approx(best, rel=1e-4)


def squared_error(row, method, bits, fraction):
    row = row.double()
    if method == "absmax":
        qmax = 2 ** (bits - 1) - 1
        scale = fraction * row.abs().max() / qmax
        return ((row / scale).round().clamp(-qmax, qmax) * scale - row).square().sum().item()
    qmax = 2**bits - 1
    low, high = fraction * row.min().clamp(max=0), fraction * row.max().clamp(min=0)
    scale = (high - low) / qmax
    zero = (-low / scale).round()
    return (
        ((row / scale).round() + zero).clamp(0, qmax) - zero - row / scale
    ).square().sum().item() * scale.item() ** 2


@pytest.mark.parametrize("method", METHODS)
def test_mse_clip_never_loses_to_the_full_interval(method):
    weight = normal(16, 64)
    weight[3, 7] = 50
    full = (quantize(weight, method, bits=3).dequantize() - weight).square().sum(1)
    clipped = (quantize(weight, method, bits=3, clip="mse").dequantize() - weight).square().sum(1)
    assert (clipped <= full).all() and (clipped < full).any()


def test_percentile_cuts_the_share_it_says():
    weight = torch.arange(1.0, 101.0)[None]
    qt = absmax(weight, bits=8, clip="percentile", percentile=90, scale_dtype=torch.float32)
    assert qt.scales.item() == pytest.approx(90 / 127)
    lopsided = torch.cat([weight, -weight], 1)
    qt = zero_point(lopsided, bits=8, clip="percentile", percentile=90, scale_dtype=torch.float32)
    assert qt.scales.item() == pytest.approx(180 / 255)
    assert qt.dequantize().abs().max() <= 90 * (1 + 1 / 255)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_that_is_stored_is_counted(bits):
    rows, columns, group = 16, 128, 32
    groups = rows * columns // group
    sym = absmax(torch.randn(rows, columns), bits=bits, group_size=group)
    assert sym.nbytes == rows * columns * bits // 8 + 2 * groups
    asym = zero_point(torch.randn(rows, columns), bits=bits, group_size=group)
    assert asym.nbytes == rows * columns * bits // 8 + 2 * groups + groups * bits // 8
    assert asym.bits_per_weight == bits + (16 + bits) / group


def test_stored_scales_never_round_down():
    values = torch.cat([torch.rand(10_000) * 10.0**e for e in range(-8, 5)]).clamp(max=65504)
    stored = store_scale(values)
    assert (stored.float() >= values).all()
    expected = float16_not_below(values.double().numpy())
    assert np.array_equal(stored.double().numpy(), np.where(values == 0, 1.0, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_accepted(dtype):
    weight = normal().to(dtype)
    assert torch.equal(absmax(weight).codes(), absmax(weight.float()).codes())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 1}, "bits=1 is out of range"),
        ({"bits": 9}, "bits=9 is out of range"),
        ({"bits": 4.5}, "bits=4.5 is out of range"),
        ({"group_size": 7}, "group_size=7 does not divide the 48 columns"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 16, "per": "column"}, "cannot be joined"),
        ({"per": "channel"}, "per='channel' is unknown"),
        ({"clip": "best"}, "clip='best' is unknown"),
        ({"clip": "percentile", "percentile": 0}, "percentile=0"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_arguments_are_named(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(normal(), method, **arguments)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.zeros(0, 4), "is no matrix"),
        (torch.zeros(4), "is no matrix"),
        (torch.tensor([[1.0, float("nan")]]), "nan at row 0, column 1"),
        (torch.tensor([[float("inf")] * 3]), "3 of 3 weights are not finite"),
        (torch.ones(2, 2, dtype=torch.int32), "torch.int32 is not floating point"),
        (torch.full((1, 4), 1e9), "does not fit torch.float16; pass scale_dtype=torch.float32"),
    ],
)
def test_bad_weights_are_named(weight, message):
    with pytest.raises(ValueError, match=message):
        absmax(weight, bits=4)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="'gptq9' is unknown; choose from absmax"):
        quantize(normal(), "gptq9")
