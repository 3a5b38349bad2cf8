"""quantize_model: every linear layer, in any architecture, or a clear refusal."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import qlearn
from qlearn.models import QuantLinear, quantize_model
from qlearn.models.quantize import linear_layers

INPUT = torch.arange(24).view(2, 12)
FIRST, LAST = r"layer model\.layers\.0\.self_attn\.q_proj", r"layer model\.layers\.1\.mlp\.down_proj"


def quantize_quietly(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_model(model, *args, progress=False, **options)


def logits(model):
    return model(input_ids=INPUT).logits


@pytest.mark.parametrize("method", ["absmax", "zero_point"])
def test_each_family_computes_with_the_dequantized_weights(make_model, family, method):
    model = make_model(family)
    original = copy.deepcopy(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    experts = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert len(experts) == (2 if family == "deepseek v3" else 0)
    assert quantize_quietly(model, method, bits=4, group_size=16) is model
    assert [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and ".experts." not in n] == linear
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} == {"lm_head"}
    assert not any(p.dim() == 3 for p in model.parameters())
    for name in linear:
        weight = original.get_submodule(name).weight
        weight.copy_(qlearn.quantize(weight, method, bits=4, group_size=16).dequantize())
    for name in experts:
        for weight in original.get_parameter(name):
            weight.copy_(qlearn.quantize(weight, method, bits=4, group_size=16).dequantize())
    assert torch.equal(logits(model), logits(original))


def test_experts_can_be_skipped(make_model):
    model = make_model("deepseek v3")
    experts = model.model.layers[1].mlp.experts
    quantize_model(model, group_size=16, skip=("lm_head", "*.experts.down_proj"), progress=False)
    assert isinstance(experts._parameters["down_proj"], nn.Parameter)
    assert "gate_up_proj" not in experts._parameters
    assert isinstance(model.model.layers[1].mlp.shared_experts.down_proj, QuantLinear)


def test_experts_alone_are_enough(make_model):
    model = make_model("deepseek v3")
    skip = ("lm_head", "*.self_attn.*", "model.layers.0.*", "*.shared_experts.*")
    quantize_model(model, group_size=16, skip=skip, progress=False)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 8


def test_biases_are_kept(make_model):
    model = make_model("llama with bias")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.uniform_(-1, 1)
    bias = model.model.layers[0].mlp.up_proj.bias.clone()
    quantize_model(model, group_size=16, progress=False)
    assert torch.equal(model.model.layers[0].mlp.up_proj.bias, bias)


def test_the_head_is_skipped_unless_asked_for(make_model):
    model = quantize_model(make_model("qwen3"), group_size=16, progress=False)
    assert type(model.lm_head) is nn.Linear
    model = quantize_model(make_model("qwen3"), group_size=16, skip=(), progress=False)
    assert isinstance(model.lm_head, QuantLinear)


def test_a_head_tied_to_the_embedding_is_never_quantized(make_model):
    for family in ("llama", "gemma3"):
        model = quantize_model(make_model(family), group_size=16, skip=(), progress=False)
        assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "skip, left",
    [
        ("down_proj", {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        (["lm_head", "model.layers.1.mlp.down_proj"], {"model.layers.1.mlp.down_proj"}),
        (("model.layers.0.mlp.*",), {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        (("mlp.up_proj", "o_proj"), {f"model.layers.{i}.{n}_proj" for i in (0, 1) for n in ("mlp.up", "self_attn.o")}),
    ],
)
def test_skip_by_name_ending_or_pattern(model, skip, left):
    quantize_model(model, group_size=16, skip=skip, progress=False)
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} == left | {"lm_head"}


def test_a_layer_with_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = nn.Sequential(self.a, self.a)

    model = quantize_model(Twice(), group_size=16, progress=False)
    assert isinstance(model.a, QuantLinear)
    assert model.a is model.b[0] is model.b[1]


def test_layers_in_half_precision(model):
    quantize_model(model.to(torch.bfloat16), group_size=16, progress=False)
    assert logits(model).dtype == torch.bfloat16


def test_quantizing_twice_finds_nothing_left(model):
    quantize_model(model, group_size=16, progress=False)
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        quantize_model(model, group_size=16, progress=False)


def break_weight(model):
    model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan


@pytest.mark.parametrize(
    "arguments, prepare, message",
    [
        ({"method": "absmaxx"}, None, "method 'absmaxx' is unknown; choose from absmax, "),
        ({"group_size": 48}, None, rf"{FIRST} \(32 x 32\): group_size=48 does not divide the 32 columns"),
        (
            {"group_size": 64, "skip": "*attn.*"},
            None,
            r"layer model\.layers\.0\.mlp\.gate_proj \(64 x 32\): group_size=64",
        ),
        ({"group_size": 16}, break_weight, rf"{LAST} \(32 x 64\): .*nan at row 3, column 5"),
        ({"bits": 9, "group_size": 16}, None, f"{FIRST} .*bits=9"),
        ({"group_size": 16, "skip": ["lm_haed"]}, None, "skip='lm_haed' fits no layer of LlamaForCausalLM"),
        ({"group_size": 16, "skip": ["model.*"]}, None, "no linear layer to quantize"),
        ({"group_size": 16, "clip": "never"}, None, "clip='never' is unknown"),
    ],
)
def test_a_refusal_says_why_and_leaves_the_model_as_it_was(model, arguments, prepare, message):
    if prepare:
        prepare(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        quantize_model(model, progress=False, **arguments)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_bare_layer_is_no_model():
    with pytest.raises(ValueError, match="Linear has no linear layer to quantize"):
        quantize_model(nn.Linear(16, 16), group_size=16, progress=False)


def test_a_model_without_an_embedding_can_be_quantized():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    assert list(linear_layers(model)) == ["0", "2"]
    quantize_model(model, "zero_point", bits=8, group_size=16, progress=False)
    assert model(torch.ones(3, 16)).shape == (3, 8)


def test_the_progress_bar_can_be_silenced(make_model, capsys):
    quantize_model(make_model(), group_size=16, progress=False)
    assert capsys.readouterr() == ("", "")
    quantize_model(make_model(), group_size=16)
    assert "absmax, 4 bits: 100%" in capsys.readouterr().err
