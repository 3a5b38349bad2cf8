"""Fake quantization: forward the method itself, backward what torch's own fake quantization does."""

import pytest
import torch

from qlearn import formats, methods, quantize
from qlearn.formats import gguf_blocks
from qlearn.methods.signed_absmax import signed_absmax_values
from qlearn.training.fake_quant import fake_quantize, fake_round

UNCALIBRATED = sorted(set(methods.METHODS) - methods.CALIBRATED)
# Of the others: 2, 3, 4, 8 bits, and groups of 32.
BITS = {"ternary": (1.6, 2), "binary": (1,), "mxfp4": (4,), "mxfp6": (6,), "mxfp8": (8,), "mxint8": (8,), "nvfp4": (4,)}
BITS |= {"nf4": (4,), "nf3": (3,)}
GROUP = {"nvfp4": 16}


@pytest.fixture
def weight():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) ** 3
    return weight.requires_grad_()


def gradient_of(values, weight):
    """What arrives at weight when (1, 2, 3, ...) arrives at values."""
    incoming = torch.arange(1.0, values.numel() + 1).view(values.shape)
    (gradient,) = torch.autograd.grad(values, weight, incoming)
    return gradient, incoming


@pytest.mark.parametrize("method, bits", [(m, bits) for m in UNCALIBRATED for bits in BITS.get(m, (2, 3, 4, 8))])
def test_forward_is_what_is_stored(weight, method, bits):
    group_size = GROUP.get(method, 32)
    stored = quantize(weight, method, bits=bits, group_size=group_size).dequantize()
    assert torch.equal(fake_quantize(weight, method, bits, group_size), stored)


def test_mask_of_block_floats(weight):
    """MXFP4 under "floor": its grid ends at 6, and what is more than half a step beyond, at 7, gets nothing."""
    gradient, incoming = gradient_of(fake_quantize(weight, "mxfp4", 4, 32), weight)
    scales = quantize(weight, "mxfp4", bits=4).scales.float().repeat_interleave(32, 1)
    inside = weight.detach().abs() / scales <= 7
    assert torch.equal(gradient, incoming * inside) and not inside.all()


def test_mask_of_mxint8_is_symmetric():
    weight = torch.tensor([[127.4, -127.4, 127.6, -127.6] + [1.0] * 28], requires_grad=True)
    gradient, _ = gradient_of(fake_quantize(weight, "mxint8", 8, 32), weight)
    assert (gradient == 0)[0, :5].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("scale_gradient", [False, True])
def test_forward_is_q4_0_to_the_bit(weight, scale_gradient):
    exported = gguf_blocks.dequantize(gguf_blocks.quantize(weight.detach()))
    assert torch.equal(fake_quantize(weight, bits=4, group_size=32, scale_gradient=scale_gradient), exported)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_absmax_gradient_is_torchs(weight, clip):
    ours = fake_quantize(weight, "absmax", 4, None, clip=clip)
    scales = quantize(weight, "absmax", bits=4, clip=clip).scales[:, 0].float()
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(8, dtype=torch.int32), 0, -7, 7)
    assert torch.equal(ours, theirs)
    gradient, _ = gradient_of(ours, weight)
    assert torch.equal(gradient, gradient_of(theirs, weight)[0])
    assert (gradient == 0).any() == (clip == "mse")


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_zero_point_gradient_is_torchs(weight, clip):
    ours = fake_quantize(weight, "zero_point", 3, None, clip=clip)
    qt = quantize(weight, "zero_point", bits=3, clip=clip)
    theirs = torch.fake_quantize_per_channel_affine(
        weight, qt.scales[:, 0].float(), qt.zero_points()[:, 0].int(), 0, 0, 7
    )
    assert torch.equal(gradient_of(ours, weight)[0], gradient_of(theirs, weight)[0])


def test_without_the_mask_every_weight_gets_its_gradient(weight):
    gradient, incoming = gradient_of(fake_quantize(weight, bits=2, clip_mask=False), weight)
    assert torch.equal(gradient, incoming)


def test_mask_of_the_signed_grid(weight):
    """Exactly the weights that lie more than half a step beyond the shorter end get nothing."""
    gradient, incoming = gradient_of(fake_quantize(weight, bits=3), weight)
    groups = weight.detach().view(8, 2, 32)
    d = signed_absmax_values(weight.detach(), 3)[1].float()
    inside = (groups / d <= 3.5).view(8, 64)
    assert torch.equal(gradient, incoming * inside) and not inside.all()


def test_gradient_of_the_scale(weight):
    """Against autograd through the same formula, written with a differentiable scale and a detached rounding."""
    gradient, incoming = gradient_of(fake_quantize(weight, bits=3, scale_gradient=True), weight)
    groups = weight.view(8, 2, 32)
    d = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -4
    d = d + (d.half().float() - d).detach()
    u = groups / d
    codes = (u + 0.5).floor().clamp(-4, 3).detach()
    q = torch.where((u >= -4.5) & (u <= 3.5), u + (codes - u).detach(), codes)
    expected, _ = gradient_of((q * d).view(8, 64), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-3 * incoming.max().item() * 2**-11)


def test_a_group_of_zeros_has_finite_gradients():
    weight = torch.zeros(1, 32, requires_grad=True)
    gradient, _ = gradient_of(fake_quantize(weight, bits=4, scale_gradient=True), weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["int4", "uint3", "fp8_e4m3fn", "fp4_e2m1", "fp6_e2m3", "nf4"])
def test_fake_round_for_every_kind_of_format(name):
    format = formats.get(name)
    x = torch.linspace(-20, 20, 401).requires_grad_()
    y = fake_round(x, format, scale=0.5)
    grid = format.decode(torch.arange(2**format.bits))
    grid = grid[grid.isfinite()]
    low, high = 0.5 * grid.min(), 0.5 * grid.max()
    assert torch.equal(y, format.round((x.detach() / 0.5).clamp(grid.min(), grid.max())) * 0.5)
    gradient, incoming = gradient_of(y, x)
    within = (x >= low) & (x <= high)
    assert torch.equal(gradient[within], incoming[within])
    far = (x < low - (high - low) / 4) | (x > high + (high - low) / 4)
    assert (gradient[far] == 0).all()


def test_fake_round_gradient_is_torchs():
    x = torch.linspace(-3, 3, 1001).requires_grad_()
    ours = fake_round(x, formats.Integers(4), scale=0.25)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -8, 7)
    assert torch.equal(ours, theirs)
    assert torch.equal(gradient_of(ours, x)[0], gradient_of(theirs, x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nope"}, "'nope' is unknown"),
        ({"method": "absmax", "bits": 1}, "bits=1"),
        ({"bits": 12}, "bits=12"),
        ({"group_size": 7}, "group_size=7"),
        ({"method": "absmax", "scale_gradient": True}, "scale_gradient"),
    ],
)
def test_bad_input(weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        fake_quantize(weight, **arguments)
