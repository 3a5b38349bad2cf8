"""Adapters: they start as nothing, learn what the formula says, and leave the model under them alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlearn import quantize, quantize_model
from qlearn.methods import ternary
from qlearn.models import QuantLinear, quantize_w8a8
from qlearn.models.bitlinear import PackedBitLinear
from qlearn.models.experts import QuantExperts
from qlearn.models.quantize import linear_layers
from qlearn.training.lora import LoraLinear, add_lora, count_parameters, lora_layers, remove_lora
from tests.models.conftest import FAMILIES
from tests.models.mixtures import MIXTURES, make_mixture

IDS = torch.arange(32).view(2, 16)
METHODS = {"float": None, "4 bit": ("zero_point", 4), "2 bit": ("absmax", 2), "trits": ("ternary", 1.6)}


def make(family="llama", method=None):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    if method is not None:
        quantize_model(model, method[0], bits=method[1], group_size=16, progress=False)
    return model


@pytest.fixture(params=METHODS)
def base(request):
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    method = METHODS[request.param]
    return layer if method is None else QuantLinear(quantize(layer.weight, *method, group_size=16), layer.bias)


def filled(model):
    """The same model with adapters that say something."""
    for layer in [model] if isinstance(model, LoraLinear) else lora_layers(model).values():
        nn.init.normal_(layer.B, std=0.05)
    return model


def weight_of(layer):
    return layer.quantized.dequantize() if isinstance(layer, QuantLinear) else layer.weight


def test_the_start_is_the_frozen_layer(base):
    x = torch.randn(3, 5, 32)
    assert torch.equal(LoraLinear(base)(x), base(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_start_is_the_frozen_model(family, method):
    model = make(family, method)
    before = model(IDS).logits
    assert torch.equal(add_lora(model, r=2)(IDS).logits, before)


def test_forward_and_gradients_are_those_of_the_formula(base):
    """In float64, where 2e-16 * (32 + 4 terms) * magnitudes below 100 stays under 1e-12."""
    layer = filled(LoraLinear(base, r=4, alpha=6)).double()
    x, direction = torch.randn(7, 32, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    A, B, z = (t.detach().clone().requires_grad_(True) for t in (layer.A, layer.B, x))
    W = weight_of(layer.base).double()
    expected = z @ W.T + layer.base.bias.double() + (6 / 4) * (z @ A.T) @ B.T
    (expected * direction).sum().backward()
    x.requires_grad_(True)
    found = layer(x)
    (found * direction).sum().backward()
    assert (found - expected).abs().max() < 1e-12
    for got, want in ((layer.A.grad, A.grad), (layer.B.grad, B.grad), (x.grad, z.grad)):
        assert want.abs().max() > 0.1 and (got - want).abs().max() < 1e-12


def test_at_the_start_only_b_has_a_gradient(base):
    layer = LoraLinear(base)
    layer(torch.randn(4, 32)).square().sum().backward()
    assert not layer.A.grad.any() and layer.B.grad.any()
    assert all(p.grad is None for p in layer.base.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_moves_the_adapters_and_nothing_else(family, method):
    model = add_lora(make(family, method), r=2).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    adapters = {f"{name}.{x}" for name in lora_layers(model) for x in "AB"}
    assert moved <= adapters and {n for n in adapters if n.endswith(".B")} <= moved
    assert len(learned) == len(adapters) and losses[-1] < losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = filled(add_lora(make(method=("zero_point", 4)), r=2)).train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, expected[name])


def test_adapters_stay_float32_beside_a_bfloat16_base():
    model = filled(add_lora(make().bfloat16(), r=2))
    layer = next(iter(lora_layers(model).values()))
    assert layer.A.dtype == layer.B.dtype == torch.float32
    assert layer(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


def test_dropout_is_for_training_only(base):
    layer = filled(LoraLinear(base, r=4, dropout=0.5))
    x = torch.randn(8, 32)
    assert not torch.equal(layer.train()(x), layer(x))
    expected = base(x) + F.linear(F.linear(x, layer.A), layer.B) * 4.0
    assert torch.equal(layer.eval()(x), expected)


def test_adapters_keep_the_mode_of_the_model():
    assert not any(m.training for m in add_lora(make(), dropout=0.1).modules())
    assert all(m.training for m in add_lora(make().train(), dropout=0.1).modules())


def test_all_linear_layers_but_the_head_get_one():
    model = make("llama with bias")
    names = list(linear_layers(model))
    assert list(lora_layers(add_lora(model))) == names and "lm_head" not in names


def test_a_model_may_be_quantized_in_part():
    model = make()
    quantize_model(model, bits=4, group_size=16, skip=("lm_head", "*mlp*"), progress=False)
    kinds = {name: type(layer.base) for name, layer in lora_layers(add_lora(model)).items()}
    assert {kind for name, kind in kinds.items() if "mlp" in name} == {nn.Linear}
    assert {kind for name, kind in kinds.items() if "attn" in name} == {QuantLinear}


@pytest.mark.parametrize(
    ("target", "skip", "count"),
    [
        (None, ("lm_head",), 14),
        ("q_proj", ("lm_head",), 2),
        (["q_proj", "v_proj"], ("lm_head",), 4),
        (["model.layers.1.*"], ("lm_head",), 7),
        ("model.layers.0.mlp.up_proj", ("lm_head",), 1),
        (None, ("lm_head", "down_proj"), 12),
        (["model.layers.1.*"], "up_proj", 6),
    ],
)
@pytest.mark.parametrize("method", [None, ("zero_point", 4)], ids=["float", "quantized"])
def test_target_and_skip(method, target, skip, count):
    assert len(lora_layers(add_lora(make(method=method), target=target, skip=skip))) == count


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("quantized", [False, True])
def test_experts_get_none_and_pass_gradients_on(name, quantized):
    model = make_mixture(name)
    if quantized:
        quantize_model(model, "absmax", bits=8, group_size=16, progress=False)
        assert any(isinstance(module, QuantExperts) for module in model.modules())
    add_lora(model, r=2)
    assert not any("expert" in n and "shared" not in n for n in lora_layers(model))
    model(IDS, labels=IDS).loss.backward()
    first = next(iter(lora_layers(model).values()))
    assert first.B.grad.abs().max() > 0


def test_counting():
    model = make(method=("zero_point", 4))
    numbers = sum(p.numel() for p in make().parameters())
    assert count_parameters(model) == (0, numbers)
    add_lora(model, r=3)
    added = sum(3 * (layer.in_features + layer.out_features) for layer in lora_layers(model).values())
    assert count_parameters(model) == (added, numbers + added)


def test_taking_them_off_gives_the_model_back():
    model = make(method=("zero_point", 4))
    before = dict(model.named_modules())
    remove_lora(filled(add_lora(model)))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("shared", ["float", "quantized"])
def test_a_layer_known_under_two_names_gets_one_adapter(shared):
    layer = nn.Linear(16, 16)
    layer = layer if shared == "float" else QuantLinear(quantize(layer.weight, bits=4))
    model = add_lora(nn.ModuleDict({"a": layer, "b": layer}))
    assert model["a"] is model["b"] and isinstance(model["a"], LoraLinear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r=0 is no rank"),
        ({"r": 2.5}, "r=2.5 is no rank"),
        ({"alpha": 0}, "alpha=0 is no factor"),
        ({"alpha": float("nan")}, "alpha=nan is no factor"),
        ({"dropout": 1.0}, "dropout=1.0 is no share"),
        ({"target": "no_proj"}, "target='no_proj' fits no linear layer of LlamaForCausalLM"),
        ({"target": "lm_head"}, "target='lm_head' fits no linear layer"),
        ({"skip": "no_proj"}, "skip='no_proj' fits no layer"),
        ({"skip": ("*_proj",)}, "no layer for an adapter"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, message):
    model = make().requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **arguments)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_twice():
    model = add_lora(make())
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model)


def test_layers_that_round_their_inputs_take_none():
    with pytest.raises(ValueError, match="no layer for an adapter"):
        add_lora(quantize_w8a8(make(), progress=False))
    with pytest.raises(ValueError, match="no layer for an adapter"):
        add_lora(nn.Sequential(PackedBitLinear(ternary(torch.randn(4, 8)))))


def test_a_copy_has_adapters_of_its_own():
    model = filled(add_lora(make(method=("zero_point", 4))))
    other = copy.deepcopy(model)
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    with torch.no_grad():
        next(iter(lora_layers(other).values())).B.add_(1)
    assert not torch.equal(model(IDS).logits, other(IDS).logits)
