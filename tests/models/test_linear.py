"""QuantLinear is F.linear with the dequantized weight, and a well-behaved module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlearn
from qlearn.models import QuantLinear
from tests.test_tensor import samples

OPTIONS = [
    {"method": "absmax", "bits": 4, "group_size": 16},
    {"method": "absmax", "bits": 3, "per": "tensor"},
    {"method": "absmax", "bits": 8, "per": "column"},
    {"method": "zero_point", "bits": 5, "group_size": 8},
    {"method": "zero_point", "bits": 2, "group_size": 32, "scale_dtype": torch.float32},
]


def weight(rows=24, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o['method']}-{o['bits']}")
def quantized(request):
    return qlearn.quantize(weight(), **request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32)])
def test_forward_is_f_linear_with_the_dequantized_weight(quantized, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, 24).to(dtype)
    w = quantized.dequantize().to(dtype)
    assert torch.equal(QuantLinear(quantized)(x), F.linear(x, w))
    assert torch.equal(QuantLinear(quantized, bias)(x), F.linear(x, w, bias))


def test_it_holds_the_packed_tensors_and_no_others(quantized):
    layer = QuantLinear(quantized)
    assert set(layer.state_dict()) == set(quantized.state_tensors())
    assert sum(t.nbytes for t in layer.state_dict().values()) == quantized.nbytes
    assert list(layer.parameters()) == []
    layer(torch.ones(32))
    assert sum(t.nbytes for t in layer.state_dict().values()) == quantized.nbytes  # nothing is kept after a pass


def test_the_weight_can_be_taken_out_again(quantized):
    out = QuantLinear(quantized).quantized
    assert (out.format, out.shape, out.block) == (quantized.format, quantized.shape, quantized.block)
    assert torch.equal(out.codes(), quantized.codes())
    assert torch.equal(out.dequantize(), quantized.dequantize())


def test_state_dict_round_trip(quantized, tmp_path):
    options = next(o for o in OPTIONS if qlearn.quantize(weight(), **o).metadata() == quantized.metadata())
    layer = QuantLinear(quantized, torch.arange(24.0))
    other = QuantLinear(qlearn.quantize(weight(seed=9), **options), torch.zeros(24))
    x = torch.randn(5, 32)
    assert not torch.equal(layer(x), other(x))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)]
)
def test_a_change_of_dtype_leaves_the_format_alone(quantized, change):
    layer = QuantLinear(quantized, torch.linspace(-1, 1, 24))
    before = {name: tensor.clone() for name, tensor in quantized.state_tensors().items()}
    change(nn.Sequential(layer))
    assert layer.bias.dtype != torch.float32
    for name, tensor in before.items():
        held = getattr(layer, name)
        assert held.dtype == tensor.dtype and torch.equal(held, tensor)
    x = torch.ones(2, 32, dtype=layer.bias.dtype)
    assert torch.equal(layer(x), F.linear(x, quantized.dequantize(x.dtype), layer.bias))


def test_it_moves_to_another_device(quantized):
    layer = QuantLinear(quantized, torch.zeros(24)).to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.quantized.device.type == "meta"


def test_gradients_reach_the_input_and_not_the_weight(quantized):
    layer = QuantLinear(quantized, torch.zeros(24))
    x = torch.ones(32, requires_grad=True)
    layer(x).sum().backward()
    same = torch.ones(32, requires_grad=True)
    F.linear(same, quantized.dequantize()).sum().backward()
    assert torch.equal(x.grad, same.grad)
    assert not any(p.requires_grad for p in layer.parameters())


def test_print_shows_sizes_format_and_true_bits():
    layer = QuantLinear(qlearn.quantize(weight(), "absmax", bits=4, group_size=16))
    assert repr(layer) == "QuantLinear(32, 24, bias=False, int4, 5 bits)"


@pytest.mark.parametrize("quantized", samples(), ids=repr)
def test_a_layer_without_values_makes_room_for_all_that_is_stored(quantized):
    layer = QuantLinear(quantized)
    empty = QuantLinear.without_values(layer.storage(), torch.empty(quantized.shape))
    assert empty.state_dict().keys() == layer.state_dict().keys()
    for name, tensor in empty.state_dict().items():
        assert tensor.dtype == layer.state_dict()[name].dtype
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.quantized.dequantize(), quantized.dequantize())
