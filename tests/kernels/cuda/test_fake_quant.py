"""Fake quantization in one walk: values to the bit, gradients as the readable ones up to the order of a sum."""

import pytest
import torch

from qlearn.kernels.cuda import SIMULATED
from qlearn.kernels.cuda.fake_quant import signed_absmax_gradient, signed_absmax_values
from qlearn.training.fake_quant import fake_quantize

DEVICE = "cpu" if SIMULATED else "cuda"


def random(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def readable(weight, gradient, bits, group_size, **options):
    weight = weight.clone().requires_grad_()
    values = fake_quantize(weight, "signed_absmax", bits, group_size, **options)
    values.backward(gradient)
    return values.detach(), weight.grad


def check_same(weight, bits=4, group_size=32, scale_gradient=False, clip_mask=True):
    gradient = random(*weight.shape, weight.dtype, seed=1)
    options = {"scale_gradient": scale_gradient, "clip_mask": clip_mask}
    values, expected = readable(weight, gradient, bits, group_size, **options)
    got = signed_absmax_values(weight.to(DEVICE), bits, group_size).cpu()
    assert got.dtype == weight.dtype and torch.equal(got, values)
    got = signed_absmax_gradient(weight.to(DEVICE), gradient.to(DEVICE), bits, group_size, **options).cpu()
    if not scale_gradient:
        assert torch.equal(got, expected)
        return
    # a sum of n products, each at most g (half + 1), is off by n rounding errors of it at most, here and there
    largest = gradient.float().abs().max() * (2 ** (bits - 1) + 1) * group_size / 2 ** (bits - 1)
    bound = 2 * group_size * 2**-24 * largest + torch.finfo(weight.dtype).eps * expected.float().abs()
    assert ((got.float() - expected.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_gradient", [False, True])
def test_dtypes(dtype, scale_gradient):
    check_same(random(2, 64, dtype), scale_gradient=scale_gradient)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bits(bits):
    check_same(random(2, 64), bits, scale_gradient=True)


@pytest.mark.parametrize("group_size", [64, 128])
def test_groups(group_size):
    check_same(random(3, 128), group_size=group_size, scale_gradient=True)


def test_without_the_mask():
    check_same(random(2, 64), 2, clip_mask=False)


EDGES = {
    "zeros": torch.zeros(1, 32),
    "negative zeros": -torch.zeros(1, 32),
    "two as large, the negative one first": torch.tensor([[0.5, -2.0, 2.0] + [0.1] * 29]),
    "two as large, in different lanes": torch.tensor([[0.1] * 9 + [3.0] + [0.2] * 14 + [-3.0] + [0.3] * 7]),
    "the largest comes last": torch.arange(32.0).view(1, 32),
    "ties": torch.tensor([[8.0] + [k + 0.5 for k in range(-8, 8)] + [0.0] * 15]),
    "so small that the scale is not normal": random(1, 32) * 1e-38,
    "smaller than float16": random(1, 32) * 1e-9,
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    check_same(
        EDGES[name], scale_gradient=name not in ("so small that the scale is not normal", "smaller than float16")
    )


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.zeros(2, 32), {"bits": 9}, "bits=9"),
        (torch.zeros(2, 32), {"group_size": 16}, "group_size=16"),
        (torch.zeros(2, 48), {}, "groups of 32"),
        (torch.zeros(2, 32, dtype=torch.float64), {}, "float64"),
        (torch.zeros(2, 64)[:, :32], {}, "one piece"),
    ],
)
def test_what_is_refused(weight, options, message):
    with pytest.raises(ValueError, match=message):
        signed_absmax_values(weight.to(DEVICE), **options)


def test_a_gradient_that_is_not_like_the_weight():
    with pytest.raises(ValueError, match="not like the weight"):
        signed_absmax_gradient(torch.zeros(2, 32).to(DEVICE), torch.zeros(2, 64).to(DEVICE))
