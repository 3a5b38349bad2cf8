"""SINQ without overhead: every family computes what it did, with better balanced columns, and any format takes it."""

import copy

import pytest
import torch

from qlearn.export import GGUFFile, write_gguf
from qlearn.formats import gguf_blocks
from qlearn.methods.sinkhorn import sinkhorn
from qlearn.models.layers import linear_layers
from qlearn.models.presinq import column_factors, presinq
from tests.export import tiny
from tests.models.test_folding import liven

IDS = torch.arange(96).view(4, 24)
FOLDED = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


def lopsided(model):
    """A random model with columns of very different sizes."""
    for name, parameter in liven(model).named_parameters():
        if name.endswith("proj.weight"):
            parameter[:, ::5] *= 6
    return model


def logits(model):
    return model(input_ids=IDS).logits


def spread(weight, width):
    """The largest deviation of a column over the smallest, the mean of all tiles: what rows do is another matter."""
    columns = weight.unflatten(1, (-1, width)).std(0)
    return (columns.amax(-1) / columns.amin(-1)).mean().item()


def test_factors_are_those_of_all_rows_together():
    weights = [torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)) for rows in (24, 8)]
    weights[0][:, 3] *= 9
    mu1 = torch.cat([sinkhorn(torch.cat(weights)[:, i : i + 16], 4).mu1 for i in (0, 16)])
    assert torch.equal(column_factors(weights, 16), mu1 / mu1.median())
    assert column_factors(weights, 16).median() == 1


@pytest.mark.parametrize("repeats", [1, 3])
def test_what_a_model_computes_stays_the_same(make_model, family, repeats):
    model = lopsided(make_model(family))
    before = logits(model)
    factors = presinq(model, 16, repeats=repeats, progress=False)
    assert factors and all((mu1 != 1).any() for mu1 in factors.values())
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max() * len(factors)


def test_which_layers_and_by_how_much(make_model):
    model = lopsided(make_model())
    old = copy.deepcopy(model)
    factors = presinq(model, 16, progress=False)
    assert {name.split(".")[-1] for name in factors} == FOLDED  # two heads of q share one of v, so o stays
    for name in factors:
        ratio = model.get_submodule(name).weight * factors[name] / old.get_submodule(name).weight
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=0)  # rows may have changed
        if "up_proj" not in name:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-5, atol=0)


def test_norms_only(make_model):
    factors = presinq(lopsided(make_model()), 16, norms_only=True, progress=False)
    assert {name.split(".")[-1] for name in factors} == FOLDED - {"down_proj"}


def test_columns_are_better_balanced(make_model):
    model = lopsided(make_model())
    old = copy.deepcopy(model)
    for name in presinq(model, 16, order=16, progress=False):
        before, after = (spread(m.get_submodule(name).weight, 16) for m in (old, model))
        assert after < 0.5 * before, name


def test_skipped_layers_are_left_alone(make_model):
    model = lopsided(make_model())
    old = copy.deepcopy(model)
    factors = presinq(model, 16, skip=["lm_head", "*.mlp.*"], progress=False)
    assert factors and not any("mlp" in name for name in factors)
    for name, layer in linear_layers(model).items():
        if "mlp" in name:
            assert torch.equal(layer.weight, old.get_submodule(name).weight)


def test_the_result_is_a_plain_model_that_a_gguf_file_takes(tmp_path):
    model = tiny.build(tiny.config("qwen3"))
    before = logits(model)
    presinq(model, 32, progress=False)
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    path = write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "Q4_0", progress=False)
    ours = gguf_blocks.quantize(model.model.layers[1].mlp.down_proj.weight.numpy(), "Q4_0")
    assert (GGUFFile(path).data("blk.1.ffn_down.weight").reshape(ours.shape) == ours).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 24}, "layer model.layers.0.self_attn.q_proj: group_size=24 does not divide the 32 columns"),
        ({"order": 0}, "order=0 and repeats=1 must be at least 1"),
        ({"repeats": 0}, "order=4 and repeats=0 must be at least 1"),
        ({"skip": ["nothing"]}, "nothing"),
    ],
    ids=str,
)
def test_bad_input_leaves_the_model_unchanged(model, options, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        presinq(model, **{"group_size": 16, "progress": False} | options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
