"""AWQ in whole models: which module judges, what is folded, and what the bundled model gains by it."""

import copy

import pytest
import torch
from torch import nn

import qlearn
from qlearn import evaluate
from qlearn.methods import zero_point
from qlearn.models import QuantLinear, quantize_model
from qlearn.models.awq import _module_around, scale_block
from qlearn.models.calibration import calibration_ids
from qlearn.models.recording import hidden_states
from tests.models.test_folding import blocks, liven, off

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
KEPT = {"self_attn.o_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"}  # nowhere to fold


def salient(model):
    """A random model some of whose channels are much larger than the others wherever a layer reads them."""
    for name, parameter in liven(model).named_parameters():
        if name.endswith(("norm.weight", "v_proj.weight", "up_proj.weight")):
            parameter[::7] *= 8
    return model


def test_every_family(make_model, family):
    """The block computes what it did; explicit scales leave the weights alone, folded ones are in the weights."""
    folded, explicit = set(), set()
    for block, groups in blocks(salient(make_model(family))):
        before, outputs = copy.deepcopy(block.module.state_dict()), block.run()
        scales = scale_block(block, groups, bits=2, group_size=16, n_grid=5)
        assert off(block, outputs) < 1e-5
        assert set(scales) == {name for group in groups for name in group}
        for group in groups:
            assert all(scales[name] is scales[group[0]] for name in group)
            scale = scales[group[0]]
            for name in group:
                layer, old = block.module.get_submodule(name), before[f"{name}.weight"]
                if isinstance(scale, torch.Tensor):
                    explicit.add(name)
                    assert scale.shape == (layer.in_features,)
                    assert (scale > 0).all()
                    ratio = layer.weight / old  # the rows may have been divided for the next layer
                    assert torch.allclose(ratio, ratio[:, :1], rtol=1e-5)
                else:
                    assert scale == 1
                    ratio = layer.weight[0] / old[0]
                    folded |= {name} if not torch.allclose(ratio, ratio[:1], rtol=1e-5) else set()
    assert explicit <= KEPT
    assert "self_attn.o_proj" in explicit
    assert len(folded) >= 5
    assert not folded & explicit


@pytest.mark.parametrize("group", [QKV, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]], ids=str)
def test_the_module_around_the_group_judges(make_model, group):
    """With the scales that were found, the attention's or the MLP's output is nearer than with plain rounding."""
    block, groups = next(blocks(salient(make_model())))
    assert group in groups
    around = block.module.get_submodule(group[0].split(".")[0] if len(group) > 1 else group[0])
    calls, original = [], copy.deepcopy(block.module.state_dict())
    with torch.no_grad():
        handle = around.register_forward_pre_hook(lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True)
        block.run()
        handle.remove()
        expected = [hidden_states(around(*args, **kwargs)) for args, kwargs in calls]
        scale_block(block, [group], bits=3, group_size=16)
    new = {n: block.module.get_submodule(n).weight / original[f"{n}.weight"] for n in group}
    scale = new[group[0]][0]
    block.module.load_state_dict(original)

    def error(scale):
        for name in group:
            layer, weight = block.module.get_submodule(name), original[f"{name}.weight"]
            layer.weight.copy_(zero_point(weight * scale, 3, 16).dequantize() / scale)
        outputs = [hidden_states(around(*args, **kwargs)) for args, kwargs in calls]
        return sum((a - b).square().sum() for a, b in zip(outputs, expected, strict=True)).item()

    assert not torch.allclose(scale, scale[:1])
    assert error(scale) < 0.9 * error(torch.ones_like(scale))


def test_the_module_around():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(2, 2), "qq": nn.Linear(2, 2)}), "up": nn.Linear(2, 2)})
    block = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ModuleList([nn.Sequential(nn.Linear(2, 2))] * 2)
    )
    assert _module_around(block, ["0.0"]) == "0.0"
    assert _module_around(block, ["0.0", "0.1"]) == "0"
    assert _module_around(block, ["0.0", "1.0.0"]) == ""
    assert _module_around(block, ["1.0.0", "1.1.0"]) == ""  # a ModuleList cannot be called
    assert _module_around(nn.Sequential(model), ["0.up", "0.attn.q"]) == ""


def test_a_given_scale_is_passed_on(make_model):
    block, groups = next(blocks(make_model()))
    before = copy.deepcopy(block.module.state_dict())
    assert scale_block(block, groups, scale=1) == {name: 1 for group in groups for name in group}
    assert all(torch.equal(x, before[name]) for name, x in block.module.state_dict().items())


def test_a_layer_that_is_never_run_needs_no_scale(make_model):
    block, groups = next(blocks(make_model()))
    block.module.spare = nn.Linear(32, 32)
    scales = scale_block(block, [*groups, ["spare"]], bits=3, group_size=16, n_grid=2)
    assert scales["spare"] == 1


def test_uniform_channels_are_left_unscaled(make_model):
    """Nothing to gain, nothing stored: an o_proj without outliers needs no column scales."""
    block, _ = next(blocks(make_model()))
    scales = scale_block(block, [["self_attn.o_proj"]], bits=4, group_size=16, n_grid=1)
    assert scales == {"self_attn.o_proj": 1}


def test_the_bundled_model_loses_less_than_by_rounding_to_nearest():
    """A short calibration and a short text keep this quick; only o_proj, under shared heads, stores its scales."""
    results = {}
    for method, options in (("zero_point", {}), ("awq", {"n_grid": 4})):
        model, tokenizer = qlearn.load_model()
        ids = calibration_ids(tokenizer, tokens=512, window=256)
        quantize_model(model, method, bits=3, group_size=64, progress=False, calibration=ids, **options)
        results[method] = evaluate.perplexity(model, tokenizer, tokens=1024), evaluate.model_bytes(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    scaled = [n for n, m in layers.items() if m.quantized.column_scales is not None]
    assert {name.rpartition(".")[2] for name in scaled} == {"o_proj"}
    assert results["awq"][0] < results["zero_point"][0] - 0.5
    assert results["awq"][1] == results["zero_point"][1] + 2 * sum(layers[name].in_features for name in scaled)
