"""BitLinear: the published layer forward and backward, exact integers, and no difference once it is compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.bitnet import ActQuant

from qlearn.models.layers import linear_layers
from qlearn.training.bitlinear import BitLinear, to_bitlinear
from tests.models.conftest import FAMILIES


def published(x, w, kind):
    """`activation_quant`, `weight_quant` and `BitLinear.forward` of the Training Tips, Code and FAQ; for b1 the first
    paper's weights. In float64, so that only the roundings themselves are left."""
    x, w = x.double(), w.double()
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    x_quant = x + ((x * scale).round().clamp_(-128, 127) / scale - x).detach()
    if kind == "b158":
        scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
        rounded = (w * scale).round().clamp_(-1, 1) / scale
    else:
        rounded = torch.where(w > w.mean(), 1.0, -1.0) * w.abs().mean()
    return F.linear(x_quant, w + (rounded - w).detach())


@pytest.fixture(params=["b158", "b1"])
def layer(request):
    torch.manual_seed(0)
    return BitLinear(96, 40, kind=request.param)


def both_ways(function, x, w):
    """The output, and the gradients of x and w for an incoming gradient of fixed random numbers."""
    x, w = x.clone().requires_grad_(), w.detach().clone().requires_grad_()
    y = function(x, w)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, w), incoming)


def test_it_is_the_published_layer(layer):
    x = torch.randn(3, 5, 96) * 2

    def ours(x, w):
        return torch.func.functional_call(layer, {"weight": w}, (x,))

    for found, expected in zip(
        both_ways(ours, x, layer.weight),
        both_ways(lambda x, w: published(x, w, layer.kind), x, layer.weight),
        strict=True,
    ):
        # float32: a few roundings of 2**-24 in each of at most 96 terms of the sums
        assert (found - expected).abs().max() <= 96 * 2**-23 * expected.abs().max()


def test_transformers_rounds_the_inputs_alike():
    x = torch.randn(7, 64)
    layer = BitLinear(64, 64)
    layer.weight.data = torch.eye(64) * 64  # V is the identity, beta is 1
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(layer(x), ActQuant.apply(x), rtol=2**-22, atol=0)


def test_bfloat16_holds_the_integers(layer):
    """Under autocast two numbers are rounded to 8 bits: the sum of integers, and that times the scales."""
    x = torch.randn(16, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = layer(x)
    assert ((y.float() - exact).abs() <= 2.01 * 2**-8 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_that_comes_in_goes_out(layer, dtype):
    assert layer.to(dtype)(torch.randn(2, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("x", [torch.zeros(2, 96), torch.full((2, 96), 1e-30), torch.full((2, 96), 3e38)])
def test_extreme_inputs_give_finite_outputs(layer, x):
    layer.weight.data.mul_(1e-3)
    assert torch.isfinite(layer(x)).all()
    assert layer(torch.zeros(1, 96)).abs().max() == 0


def test_a_bias_is_added():
    layer = BitLinear(4, 2, bias=True)
    assert torch.equal(layer(torch.zeros(1, 4))[0], layer.bias)


def test_compiled_it_computes_the_same(layer):
    x = torch.randn(8, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_its_weights_and_its_head(family):
    model = FAMILIES[family]()
    layers = linear_layers(model)
    before = {name: layer.weight for name, layer in layers.items()}
    assert to_bitlinear(model, "b1") is model
    for name, weight in before.items():
        layer = model.get_submodule(name)
        assert type(layer) is BitLinear and layer.weight is weight and layer.kind == "b1"
        assert layer.bias is layers[name].bias and layer.training
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not linear_layers(model)


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind='b2' is unknown; choose from b158, b1"):
        BitLinear(2, 2, kind="b2")
    with pytest.raises(ValueError, match="Embedding has no linear layer to train"):
        to_bitlinear(nn.Embedding(2, 2))
