"""The tables of weight-only methods: that they are made as they say, and what the committed figures have to show."""

import pytest
import torch

from qlearn.bench import weights_only
from qlearn.bench.results import read
from qlearn.models import load_model


@pytest.fixture(scope="module")
def record():
    return read("weights_only")


@pytest.fixture(scope="module")
def rows(record):
    return {row["name"]: row for row in record["rows"]}


@pytest.mark.parametrize(
    ("table", "recipes"),
    [
        ("rows", weights_only.recipes()),
        ("equal_bits", weights_only.equal_bits()),
        ("without_overhead", weights_only.without_overhead()),
    ],
    ids=["rows", "equal_bits", "without_overhead"],
)
def test_every_recipe_has_its_row(record, table, recipes):
    assert [row["name"] for row in record[table]] == list(recipes)


def test_measure():
    """A recipe is handed a fresh model, and measured against the unquantized one."""
    seen = []

    def leave(model):
        seen.append(model)
        return model

    recipes = {"as it is": leave, "Q4_K": weights_only.k_quant("Q4_K"), "SINQ": weights_only.in_place("sinq", 3)}
    same, block, ours = weights_only.measure(recipes, tokens=64)
    assert same["kl_divergence"] == 0 == same["weight_error"] and same["bits_per_weight"] == 16
    assert block["bits_per_weight"] == 4.5 and 0.05 < block["weight_error"] < 0.09 < ours["weight_error"] < 0.25
    assert block["bytes"] > ours["bytes"] > 0


def test_a_k_quant_takes_what_its_blocks_take():
    from qlearn.formats import gguf_blocks

    for kind, bits in weights_only.K_QUANTS.items():
        assert 8 * gguf_blocks.quantize(torch.zeros(2, 512), kind).shape[1] / 512 == bits


def test_the_step_before():
    model, _ = load_model()
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    called = []
    recipe = weights_only.in_place("absmax", 8, before=lambda m: called.append(m))
    assert recipe(model) is model and called == [model]
    assert (model.model.layers[0].mlp.down_proj.quantized.dequantize() - before).abs().max() < 0.01
