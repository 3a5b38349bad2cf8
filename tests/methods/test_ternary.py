"""Ternary and binary rounding: BitNet's own code bit for bit, the bytes that are stored, and what is refused."""

import pytest
import torch
from transformers.integrations.bitnet import WeightQuant

from qlearn import quantize
from qlearn.methods.ternary import EPSILON, binary, signs, ternary


@pytest.fixture
def weight():
    return torch.randn(24, 320, generator=torch.Generator().manual_seed(0)) * 0.02


def published(w):
    """`weight_quant` of the Training Tips, Code and FAQ."""
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


def test_it_is_the_published_rounding(weight):
    qt = ternary(weight, scale_dtype=torch.float32)
    theirs = published(weight)
    assert torch.equal(qt.codes(), theirs.sign().to(torch.int8))
    # theirs divides by 1 / beta, ours multiplies by beta: two roundings, each by half a unit in the last place
    assert torch.allclose(qt.dequantize(), theirs, rtol=2**-23, atol=0)
    assert torch.equal(qt.scales, weight.abs().mean().view(1, 1))


def test_transformers_rounds_alike(weight):
    with torch.compiler.set_stance("force_eager"):
        theirs = WeightQuant.apply(weight)
    assert torch.equal(ternary(weight).codes(), theirs.sign().to(torch.int8))


@pytest.mark.parametrize("bits, bytes_of_codes", [(1.6, 24 * 320 // 5), (2, 24 * 320 // 4)])
@pytest.mark.parametrize("group_size, scales", [(None, 1), (64, 24 * 5), (320, 24)])
def test_the_bytes(weight, bits, bytes_of_codes, group_size, scales):
    qt = ternary(weight, bits, group_size)
    assert qt.packed.numel() == bytes_of_codes and qt.scales.numel() == scales
    assert qt.nbytes == bytes_of_codes + 2 * scales
    assert torch.equal(qt.codes(), ternary(weight, 1.6, group_size).codes())


def test_five_to_a_byte_where_five_does_not_divide_the_matrix():
    qt = ternary(torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.1, 1.0]]))
    assert qt.packed.numel() == 2
    assert qt.codes().tolist() == [[1, 0, -1], [-1, 0, 1]]


def test_groups_are_rounded_each_by_its_own_mean(weight):
    qt = ternary(weight, group_size=64, scale_dtype=torch.float32)
    for row, group in [(0, 0), (7, 3), (23, 4)]:
        alone = ternary(weight[row : row + 1, 64 * group : 64 * group + 64], scale_dtype=torch.float32)
        assert torch.equal(qt.codes()[row, 64 * group : 64 * group + 64], alone.codes()[0])
        assert qt.scales[row, group] == alone.scales[0, 0]


def test_a_weight_between_the_values_is_off_by_half_a_step(weight):
    qt = ternary(weight, scale_dtype=torch.float32)
    beta = qt.scales.item()
    inside = weight.abs() <= 1.5 * beta
    assert inside.any() and not inside.all()
    error = (qt.dequantize() - weight).abs()
    assert error[inside].max() <= beta / 2 * (1 + 2**-20)
    assert torch.allclose(error[~inside], weight[~inside].abs() - beta)


def test_the_largest_magnitude_makes_nearly_all_zero(weight):
    share = {
        scale: (ternary(weight, scale=scale).codes() == 0).float().mean().item() for scale in ("absmean", "absmax")
    }
    assert 0.29 < share["absmean"] < 0.33 and share["absmax"] > 0.9
    assert ternary(weight, scale="absmax").scales.item() == pytest.approx(weight.abs().max().item(), rel=2**-11)


def test_the_largest_magnitude_is_right_for_what_is_ternary_already(weight):
    done = ternary(weight, scale_dtype=torch.float32).dequantize()
    assert torch.equal(ternary(done, scale="absmax", scale_dtype=torch.float32).dequantize(), done)


def test_binary_takes_the_sign_about_the_mean(weight):
    weight = weight + 0.01
    qt = binary(weight, scale_dtype=torch.float32)
    assert qt.packed.numel() == weight.numel() // 8
    expected = torch.where(weight > weight.mean(), 1, -1)
    assert torch.equal(qt.dequantize(), expected * weight.abs().mean())


def test_zero_counts_as_negative():
    assert signs(torch.zeros(4))[0].tolist() == [-1, -1, -1, -1]  # the paper's Sign is -1 at 0


@pytest.mark.parametrize("method, bits", [("ternary", 1.6), ("ternary", 2), ("binary", 1)])
def test_zeros_and_a_single_weight(method, bits):
    zeros = quantize(torch.zeros(2, 5), method, bits=bits, scale_dtype=torch.float32)
    assert zeros.dequantize().abs().max() == (0 if method == "ternary" else torch.tensor(EPSILON))
    one = quantize(torch.tensor([[-3.0]]), method, bits=bits)
    assert one.dequantize().tolist() == [[-3.0]]


@pytest.mark.parametrize(
    ("method", "weight", "arguments", "message"),
    [
        ("ternary", torch.ones(2, 8), {"bits": 4}, r"bits=4 is not what trits are stored in; pass 1.6 .* or 2"),
        ("ternary", torch.ones(2, 8), {"bits": 1.58}, "bits=1.58 is not what trits are stored in"),
        ("binary", torch.ones(2, 8), {"bits": 2}, "bits=2 is not what signs are stored in; pass bits=1"),
        ("ternary", torch.ones(2, 8), {"scale": "max"}, "scale='max' is unknown; choose from absmean, absmax"),
        ("ternary", torch.ones(2, 8), {"group_size": 3}, "group_size=3 does not divide the 8 columns"),
        ("ternary", torch.ones(2, 8), {"group_size": 0}, "group_size=0 does not divide the 8 columns"),
        ("ternary", torch.full((2, 8), 1e6), {}, "a scale of 1e[+]06 does not fit torch.float16"),
        ("binary", torch.full((2, 8), float("nan")), {}, "16 of 16 weights are not finite"),
        ("binary", torch.ones(8), {}, "is no matrix"),
    ],
)
def test_what_is_refused(method, weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, method, **{"bits": 1.6 if method == "ternary" else 1, **arguments})
