"""The product that keeps only packed weights for the backward pass: same numbers, no float matrix in between."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from qlearn import quantize
from qlearn.models import QuantLinear
from qlearn.models.product import product

OUT, IN = 24, 32


@pytest.fixture(params=["zero_point", "absmax", "ternary"])
def quantized(request):
    torch.manual_seed(0)
    bits = {"ternary": 1.6}.get(request.param, 3)
    return quantize(torch.randn(OUT, IN), request.param, bits=bits, group_size=16)


def run(function, x, weight, bias):
    """(output, gradient of x, gradient of the bias or None)."""
    x = x.clone().requires_grad_(True)
    bias = None if bias is None else bias.clone().requires_grad_(True)
    y = function(x, weight, bias)
    (y.float() * torch.arange(y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad, None if bias is None else bias.grad


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN)], ids=["a vector", "tokens", "texts", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_the_numbers_are_those_of_the_plain_formula(quantized, shape, dtype, with_bias):
    x, bias = torch.randn(shape).to(dtype), torch.randn(OUT).to(dtype) if with_bias else None
    found = run(product, x, quantized, bias)
    expected = run(F.linear, x, quantized.dequantize(dtype), bias)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_under_autocast(quantized):
    x = torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(product, x, quantized, None)
        expected = run(F.linear, x, quantized.dequantize(), None)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def saved(function):
    """Numbers of elements of the tensors that autograd keeps from a forward pass."""
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        function()
    return kept


def test_no_float_matrix_is_kept(quantized):
    x = torch.randn(2, IN, requires_grad=True)
    layer = QuantLinear(quantized)
    assert OUT * IN in saved(lambda: F.linear(x, quantized.dequantize()))
    assert saved(lambda: layer(x)) == []


def test_without_gradients_there_is_no_graph(quantized):
    x = torch.randn(2, IN)
    assert product(x, quantized).grad_fn is None
    with torch.no_grad():
        assert product(x.requires_grad_(True), quantized).grad_fn is None


def test_a_second_derivative_is_refused(quantized):
    x = torch.randn(2, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(product(x, quantized).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
