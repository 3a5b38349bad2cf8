"""Which matrices are quantized, and what is said of the others."""

import warnings

import pytest
import torch
from torch import nn

import qlearn
from qlearn.models.layers import (
    check_skip,
    expert_stacks,
    kinds,
    linear_layers,
    matches,
    replace_layers,
    warn_of_others,
)
from tests.models.mixtures import make_mixture


def test_an_ending_is_whole_names():
    assert not matches("model.layers.3.mlp.down_proj", ["proj"])
    assert not matches("model.layers.13", ["3"])


def test_only_what_computes_as_a_linear_layer_does():
    class Plain(nn.Linear):
        pass

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Plain(4, 4), "router": Router(4, 4), "c": nn.Bilinear(2, 2, 2)})
    assert linear_layers(model).keys() == {"a", "b"}
    with pytest.warns(UserWarning, match=r"^2 matrices with 34\.3% of .* unquantized: c\.weight, router\.weight; name"):
        warn_of_others(model, ())


def test_experts_can_be_skipped():
    model = make_mixture("deepseek v3")
    names = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert list(expert_stacks(model)) == names
    assert list(expert_stacks(model, ("down_proj",))) == names[:1]
    assert list(expert_stacks(model, ("*.experts.*",))) == []


def test_numbers_become_stars_once():
    names = ["a.0.b", "a.10.b", "a.1.c.2", "2.d1", "w2.3"]
    assert kinds(names) == ["*.d1", "a.*.b", "a.*.c.*", "w2.*"]


def silent(model, skip=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_others(model, skip)
    return not caught


def test_no_family_has_anything_to_warn_of(make_model, family):
    model = make_model(family)
    assert silent(model)
    assert silent(qlearn.quantize_model(model, group_size=16, progress=False))


def test_a_warning_from_a_hundredth_of_the_parameters_on():
    class Table(nn.Module):
        def __init__(self, numbers):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, numbers // 2))
            self.layer = nn.Linear(100, 99, bias=False)

    assert silent(Table(100))
    assert not silent(Table(102))
    assert silent(Table(102), skip=("table",))


def test_a_skip_that_fits_nothing(model):
    assert check_skip(model, "down_proj") == ("down_proj",)
    assert check_skip(model, ["model.layers.0.*", "norm.weight"]) == ("model.layers.0.*", "norm.weight")
    with pytest.raises(ValueError, match=r"skip='layers\.7' fits no layer of LlamaForCausalLM"):
        check_skip(model, ("lm_head", "layers.7"))
    assert check_skip(nn.Linear(2, 2), ("lm_head",)) == ("lm_head",)


def test_a_layer_with_two_names_is_replaced_under_both():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, other)})
    replace_layers(model, {layer: other})
    assert model["a"] is model["b"][0] is model["b"][1] is other
