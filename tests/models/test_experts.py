"""The experts of a mixture, quantized: the module computes as before, with the dequantized matrices."""

import copy

import pytest
import torch
from torch import nn

import qlearn
from qlearn.evaluate import bits_per_weight, model_bytes
from qlearn.models import QuantLinear
from qlearn.models.experts import QuantExperts, expert_matrices, expert_parameters, is_transposed, replace_experts
from tests.models.mixtures import MIXTURES, make_mixture

IDS = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return make_mixture(request.param)


def quantize_experts(model, method="zero_point", **options):
    """Quantize all experts in place; returns a float model with the dequantized values."""
    same = copy.deepcopy(model)
    for name, (module, attribute) in expert_parameters(model).items():
        options = {"bits": 4, "group_size": 16, **options}
        matrices = [qlearn.quantize(matrix, method, **options) for matrix in expert_matrices(module, attribute)]
        values = torch.stack([matrix.dequantize() for matrix in matrices])
        same.get_parameter(name).copy_(values.mT if is_transposed(module) else values)
        replace_experts(module, attribute, [QuantLinear(matrix) for matrix in matrices])
    return same


def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("options", [{}, {"group_size": None, "per": "tensor"}, {"bits": 3}])
def test_a_mixture_computes_with_the_dequantized_matrices(mixture, options):
    before = logits(mixture)
    same = quantize_experts(mixture, **options)
    assert not any(p.dim() == 3 for p in mixture.parameters())
    assert torch.equal(logits(mixture), logits(same))
    assert not torch.allclose(logits(mixture), before)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["deepseek v3", "gpt-oss"])
def test_each_way_that_transformers_computes_experts(family, way):
    model = make_mixture(family)
    model.set_experts_implementation(way)
    same = quantize_experts(model)
    assert torch.equal(logits(model), logits(same))


def test_a_loop_over_experts_dequantizes_each_once(monkeypatch):
    model = make_mixture("deepseek v3")
    quantize_experts(model)
    made = []
    original = QuantExperts.matrix
    monkeypatch.setattr(QuantExperts, "matrix", lambda self, i: made.append(int(i)) or original(self, i))
    model.set_experts_implementation("eager")
    logits(model)
    assert sorted(made) == sorted([*range(4)] * 2)  # two parameters, each expert once


def test_what_is_read_is_a_tensor():
    model = make_mixture("gpt-oss")
    experts = model.model.layers[0].mlp.experts
    expected = quantize_experts(model).model.layers[0].mlp.experts.down_proj
    found = experts.down_proj
    assert isinstance(found, torch.Tensor)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    some = torch.tensor([[3, 0], [3, 3]])
    for index in (1, -1, torch.tensor(2), some, [3, 0], slice(1, 3), (2, slice(None), 3), expected[:, 0, 0] > 0):
        assert torch.equal(found[index], expected[index])
        assert type(found[index]) is torch.Tensor
    assert torch.equal(found + 0, expected) and torch.equal(torch.einsum("eio->oi", found), expected.sum(0).T)
    assert "not dequantized yet" in repr(found)


def test_copies_and_state_dicts():
    model = make_mixture("deepseek v3")
    fresh = copy.deepcopy(model)
    quantize_experts(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    for _, (module, attribute) in expert_parameters(fresh).items():
        zeros = [qlearn.quantize(0 * m, "zero_point", 4, 16) for m in expert_matrices(module, attribute)]
        replace_experts(module, attribute, [QuantLinear(matrix) for matrix in zeros])
    assert not torch.equal(logits(fresh), logits(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert "model.layers.1.mlp.experts.quantized_down_proj.3.packed" in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_leaves_the_stored_tensors_alone(dtype):
    model = make_mixture("deepseek v3")
    same = quantize_experts(model).to(dtype)
    experts = model.to(dtype).model.layers[1].mlp.experts
    assert experts.down_proj.dtype == experts.quantized_down_proj.dtype == dtype
    assert {t.dtype for t in experts.buffers()} == {torch.uint8, torch.float16}
    assert torch.equal(logits(model), logits(same))


def test_another_device():
    model = make_mixture("deepseek v3")
    quantize_experts(model)
    experts = model.to("meta").model.layers[1].mlp.experts
    assert experts.down_proj.device.type == "meta"
    assert {t.device.type for t in experts.buffers()} == {"meta"}


@pytest.mark.parametrize("bits", [3, 8])
def test_what_is_stored_is_counted(mixture, bits):
    weights = sum(p.numel() for p in mixture.parameters() if p.dim() == 3)
    before = model_bytes(mixture)
    quantize_experts(mixture, bits=bits)
    each = bits + (16 + bits) / 16  # a code; of 16 weights, a float16 scale and a zero
    assert bits_per_weight(mixture) == each
    assert before - model_bytes(mixture) == weights * (16 - each) / 8


def test_which_parameters_hold_experts(mixture):
    names = {f"model.layers.{i}.{place}" for i in (0, 1) for place in ("mlp", "feed_forward")}
    found = expert_parameters(mixture)
    assert {name for name, p in mixture.named_parameters() if p.dim() == 3} == found.keys()
    assert {name.partition(".experts.")[0] for name in found} <= names
    assert {name.partition(".experts.")[2] for name in found} == {"gate_up_proj", "down_proj"}


def test_other_parameters_of_three_dimensions_do_not():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 8, 4))

    class ParallelExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 8, 4))
            self.codes = nn.Parameter(torch.zeros(2, 8, 4, dtype=torch.uint8), requires_grad=False)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts, self.w1 = 2, nn.Parameter(torch.zeros(2, 8, 4))

    model = nn.ModuleDict({"p": Positions(), "conv": nn.Conv1d(4, 8, 3), "a": ParallelExperts(), "b": Named()})
    assert expert_parameters(model).keys() == {"a.weight", "b.w1"}
    assert expert_parameters(model["b"]).keys() == {"w1"}


@pytest.mark.parametrize(
    "shapes, flag, expected",
    [
        ([(64, 16), (16, 32)], None, False),  # gate and up (2 x 32, 16), down (16, 32)
        ([(16, 32), (64, 16)], None, False),
        ([(16, 64), (32, 16)], None, True),  # gate and up (16, 2 x 32), down (32, 16)
        ([(32, 16), (16, 64)], None, True),
        ([(32, 16), (16, 32)], None, False),  # without a gate: nothing tells
        ([(16, 16), (16, 16)], None, False),
        ([(64, 16)], None, False),
        ([(64, 16), (16, 32)], True, True),
        ([(16, 64), (32, 16)], False, False),
    ],
)
def test_which_way_round(shapes, flag, expected):
    module = nn.Module()
    if flag is not None:
        module.is_transposed = flag
    for i, shape in enumerate(shapes):
        setattr(module, f"experts_{i}", nn.Parameter(torch.randn(3, *shape)))
    assert is_transposed(module) is expected
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for name, value in values.items():  # the answer stays the same when only one of them is left
        layers = [QuantLinear(qlearn.quantize(matrix, bits=8)) for matrix in expert_matrices(module, name)]
        replace_experts(module, name, layers)
        assert is_transposed(module) is expected
        assert getattr(module, name).shape == value.shape
        assert ((getattr(module, name) + 0) - value).abs().max() < 0.02 * value.abs().max()
