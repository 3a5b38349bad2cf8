"""Outliers: maxima as plain hooks see them, and made ones that change nothing but the channel they are in."""

import copy

import pytest
import torch

import qlearn
from qlearn.models.outliers import ChannelMaxima, add_outlier, outliers
from qlearn.models.recording import forward, watching

IDS = torch.arange(96).view(4, 24)


def logits(model):
    return model(input_ids=IDS).logits


def seen_by_hooks(model, names):
    maxima = {}

    def see(name, x):
        found = x.reshape(-1, x.shape[-1]).abs().amax(0)
        maxima[name] = torch.maximum(maxima.get(name, found), found)

    with watching({name: model.get_submodule(name) for name in names}, see):
        forward(model, IDS)
    return maxima


def test_maxima_are_what_hooks_see(make_model, family):
    model = make_model(family)
    found = outliers(model, IDS, progress=False)
    assert len(found) >= 14
    for name, maxima in seen_by_hooks(model, found).items():
        torch.testing.assert_close(found[name].maxima, maxima)


def test_figures_of_a_layer():
    maxima = ChannelMaxima(torch.tensor([1.0, 2.0, 30.0, 2.0, 3.0]))
    assert (maxima.largest, maxima.channel, maxima.ratio) == (30.0, 2, 15.0)
    assert repr(maxima) == "channel 2 of 5 reaches 30, 15.0 x the median"
    assert ChannelMaxima(torch.tensor([0.0, 0.0, 1.0])).ratio == float("inf")


@pytest.mark.parametrize("layer", ["self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("factor", [64, 0.5])
def test_a_power_of_two_changes_no_bit_of_the_logits_and_one_channel(make_model, layer, factor):
    model = make_model("llama with bias")
    name = f"model.layers.1.{layer}"
    before, maxima = logits(model), outliers(model, IDS, progress=False)
    changed = add_outlier(model, name, channel=3, factor=factor)
    assert name in changed
    assert torch.equal(logits(model), before)
    for other, now in outliers(model, IDS, progress=False).items():
        expected = maxima[other].maxima.clone()
        expected[3] *= factor if other in changed else 1
        assert torch.equal(now.maxima, expected)


def test_any_other_factor_changes_rounding_only(make_model, family):
    model = make_model(family)
    before = logits(model)
    add_outlier(model, "model.layers.1.mlp.shared_experts.down_proj" if family == "deepseek v3" else
                "model.layers.1.mlp.gate_proj", channel=0, factor=37.0)  # fmt: skip
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_on_the_bundled_model():
    model, _ = qlearn.load_model()
    ids = torch.arange(128).view(2, 64)
    before, ratio = model(input_ids=ids).logits, 0.0
    for i in range(8):
        add_outlier(model, f"model.layers.{i}.self_attn.q_proj", channel=7, factor=64)
    assert torch.equal(model(input_ids=ids).logits, before)
    found = outliers(model, ids, progress=False)
    for i in range(8):
        ratio = found[f"model.layers.{i}.self_attn.q_proj"].ratio
        assert ratio > 10 and found[f"model.layers.{i}.self_attn.q_proj"].channel == 7


@pytest.mark.parametrize(
    "layer, channel, factor, message",
    [
        ("mlp.up_proj", 0, 64, "there is no linear layer 'mlp.up_proj'; take a full name, such as model.layers.0"),
        ("model.layers.0.mlp.up_proj", 32, 64, "channel=32 is out of range; .* reads channels 0 to 31"),
        ("model.layers.0.mlp.up_proj", 0, 0, "factor=0 is no factor"),
        ("model.layers.0.mlp.up_proj", 0, float("nan"), "factor=nan is no factor"),
        ("model.layers.0.mlp.up_proj", 0, float("inf"), "factor=inf is no factor"),
        ("model.layers.0.self_attn.o_proj", 0, 64, "nothing in front of model.layers.0.self_attn.o_proj"),
        ("lm_head", 0, 64, "lm_head is in none of the model's blocks"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_changes(make_model, layer, channel, factor, message):
    model = make_model("qwen3")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_outlier(model, layer, channel, factor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
