"""The table of all methods: that it is made as it says, and what its committed figures have to show."""

import pytest
import torch

from qlearn.bench import ptq
from qlearn.bench.results import read
from qlearn.training import qat


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in read("ptq")["rows"]}


def test_every_recipe_has_its_row(rows):
    assert list(rows) == ["unquantized", *ptq.recipes()]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_and_awq_beat_rounding_at_equal_bits(rows, bits):
    plain, gptq, awq = (rows[f"{method}, {bits} bit"] for method in ("RTN", "GPTQ", "AWQ"))
    assert gptq["bits_per_weight"] == plain["bits_per_weight"]
    assert awq["bits_per_weight"] < plain["bits_per_weight"] + 0.01
    assert max(gptq["perplexity"], awq["perplexity"]) < plain["perplexity"]
    assert max(gptq["kl_divergence"], awq["kl_divergence"]) < plain["kl_divergence"]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_beats_rounding_with_the_same_clipping(rows, bits):
    plain, gptq = (rows[f"{method}, {bits} bit"] for method in ("RTN with clipping", "GPTQ with order and clipping"))
    assert gptq["perplexity"] < plain["perplexity"] and gptq["bits_per_weight"] == plain["bits_per_weight"]


@pytest.mark.parametrize("bits", qat.CHECKPOINTS)
def test_training_beats_everything_on_its_grid(rows, bits):
    trained, plain = rows[f"QAT, {bits} bit"], rows[f"Q4_0's rule, {bits} bit"]
    assert trained["bits_per_weight"] == plain["bits_per_weight"] == bits + 0.5
    assert trained["kl_divergence"] < min(row["kl_divergence"] for n, row in rows.items() if n.endswith(f"{bits} bit")
                                          and n != trained["name"])  # fmt: skip


def test_eight_bits_are_almost_free_and_two_are_not(rows):
    free = rows["unquantized"]["perplexity"]
    assert rows["RTN, 8 bit"]["perplexity"] < 1.001 * free and rows["RTN, 2 bit"]["perplexity"] > 10 * free


def test_smoothing_helps_static_activations(rows):
    assert rows["SmoothQuant W8A8, static"]["kl_divergence"] < rows["W8A8, static"]["kl_divergence"]


def test_measure(monkeypatch):
    """Each recipe is run on the device it is given and measured against the unquantized model."""
    seen = []

    def recipe(device):
        seen.append(device)
        return ptq.in_place("absmax", 8)(device)

    monkeypatch.setattr(ptq, "recipes", lambda bits: {f"absmax {bits}": recipe})
    base, row = ptq.measure(bits=(8,), tokens=64, parse=False)
    assert seen == ["cpu"] and base["name"] == "unquantized" and row["name"] == "absmax (8,)"
    assert base["kl_divergence"] == 0 < row["kl_divergence"] and row["seconds_to_quantize"] > 0
    assert row["peak_bytes"] is None and base["bits_per_weight"] == 16


def test_recipes_make_what_their_names_say():
    recipes = ptq.recipes()
    layer = recipes["RTN, 4 bit"]("cpu").model.layers[0].mlp.down_proj.quantized
    assert (layer.format.bits, layer.block, layer.zeros.dtype) == (4, (1, 64), torch.uint8)
    layer = recipes["QAT, 2 bit"]("cpu").model.layers[0].mlp.down_proj.quantized
    assert (layer.format.bits, layer.block, layer.zeros) == (2, (1, 32), None)
    with pytest.raises(KeyError):
        recipes["QAT, 3 bit"]
