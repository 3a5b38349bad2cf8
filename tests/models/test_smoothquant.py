"""SmoothQuant: the paper's formula, an unchanged function in every family, and outliers that vanish."""

import copy

import pytest
import torch

from qlearn.models.outliers import add_outlier, outliers
from qlearn.models.smoothquant import smooth, smoothing_factors

IDS = torch.arange(96).view(4, 24)
NORMS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}


def logits(model):
    return model(input_ids=IDS).logits


def endings(factors):
    return {name.split(".", 3)[-1] for name in factors}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula(alpha):
    x_max = torch.rand(20) * 50 + 0.1
    weights = [torch.randn(7, 20), torch.randn(3, 20)]
    s = smoothing_factors(x_max, weights, alpha)
    for j in range(20):
        w_max = max(abs(w) for matrix in weights for w in matrix[:, j].tolist())
        assert s[j].item() == pytest.approx(x_max[j].item() ** alpha / w_max ** (1 - alpha), rel=1e-5)


def test_half_gives_both_sides_the_same_maximum():
    x_max, weight = torch.rand(20) * 50 + 0.1, torch.randn(7, 20)
    s = smoothing_factors(x_max, [weight], 0.5)
    torch.testing.assert_close(x_max / s, (weight * s).abs().amax(0))


def test_channels_without_inputs_or_weights_are_left_alone():
    weight = torch.ones(2, 4)
    weight[:, 2] = 0
    for alpha in (0.0, 0.5, 1.0):
        s = smoothing_factors(torch.tensor([4.0, 0.0, 4.0, 1e-30]), [weight], alpha)
        assert s[1:].tolist() == [1.0, 1.0, 1.0]


def test_what_a_model_computes_stays_the_same(make_model, family):
    model = make_model(family)
    before = logits(model)
    factors = smooth(model, 0.5, IDS, progress=False)
    assert factors and all((s != 1).any() for s in factors.values())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_which_layers_are_smoothed(make_model):
    assert endings(smooth(make_model(), 0.5, IDS, progress=False)) == NORMS | {"mlp.down_proj"}
    assert endings(smooth(make_model(), 0.5, IDS, norms_only=True, progress=False)) == NORMS


def test_layers_that_read_the_same_share_their_factors(model):
    factors = smooth(model, 0.5, IDS, progress=False)
    q, k, v = (factors[f"model.layers.1.self_attn.{n}_proj"] for n in "qkv")
    assert q is k is v


def test_the_inputs_are_as_smooth_as_the_formula_says(model):
    before, original = outliers(model, IDS, progress=False), copy.deepcopy(model)
    smooth(model, 0.5, IDS, progress=False)
    after = outliers(model, IDS, progress=False)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"):
        w_max = original.get_submodule(name).weight.abs().amax(0)
        torch.testing.assert_close(after[name].maxima, (before[name].maxima * w_max).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_a_made_outlier_vanishes_whatever_alpha_is(model, alpha):
    """x times f and w divided by f make s times f: the weights become those of the model without it."""
    with_outlier = copy.deepcopy(model)
    add_outlier(with_outlier, "model.layers.1.mlp.gate_proj", channel=3, factor=64)
    add_outlier(with_outlier, "model.layers.0.self_attn.q_proj", channel=5, factor=64)
    smooth(model, alpha, IDS, progress=False)
    smooth(with_outlier, alpha, IDS, progress=False)
    for (name, a), b in zip(model.named_parameters(), with_outlier.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_alpha_out_of_range(model, alpha):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"alpha={alpha} is out of range"):
        smooth(model, alpha, IDS, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
