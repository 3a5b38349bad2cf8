"""BitNet's records: that they are made as they say, and what the committed figures have to show."""

import json
import math

import pytest

from qlearn.bench import bitnet as bench
from qlearn.bench.results import read
from qlearn.models.bitlinear import PackedBitLinear
from qlearn.training import bitnet

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def rows():
    return {(row["kind"], row["name"]): row for row in read("bitnet")["rows"]}


@pytest.fixture(scope="module")
def runs():
    record = read("bitnet_training")
    return {run["name"]: record | run for run in record["runs"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of two runs of a tiny model, untrained."""
    for kind in ("b158", "bf16"):
        curve = [{"step": step, "loss": 1.0} for step in range(25, 225, 25)]
        record = {"kind": kind, "steps": 200, "curve": curve, "held_out_curve": curve[-1:], "held_out": {"loss": 2.0}}
        bitnet.write(bitnet.make_model(kind, **TINY), record, tmp_path, kind)
    load = bitnet.load
    monkeypatch.setattr(bitnet, "load", lambda path: load(path, **TINY))
    return tmp_path


def test_the_runs_become_one_record(folder):
    record = bench.training_record(folder)
    assert record["steps"] == 200 and "steps" not in record["runs"][0]
    assert [(run["name"], run["kind"]) for run in record["runs"]] == [("b158", "b158"), ("bf16", "bf16")]
    for run in record["runs"]:
        assert run["curve"] == [[100, 1.0], [200, 1.0]] and run["held_out_curve"] == [[200, 1.0]]


def test_the_reference_comes_first(folder):
    found = bench.recipes(folder, "cpu")
    assert list(found)[:2] == [("trained", "bf16"), ("trained", "b158")]
    assert type(found["trained", "b158"]().model.layers[0].mlp.up_proj) is PackedBitLinear
    layer = found["rounded", "trits, one scale"]().model.layers[0].mlp.up_proj.quantized
    assert layer.format.name == "trit" and layer.block == layer.shape


def test_measure(folder, monkeypatch):
    full = bench.recipes(folder, "cpu")
    names = [("trained", "bf16"), ("trained", "b158"), ("rounded", "signs, one scale")]
    monkeypatch.setattr(bench, "recipes", lambda folder, device: {name: full[name] for name in names})
    rows = list(bench.measure(folder, tokens=64, parse=False))
    assert [(row["kind"], row["name"]) for row in rows] == names
    assert rows[0]["kl_divergence"] == 0 < rows[1]["kl_divergence"]
    assert [row.get("held_out_loss") for row in rows] == [2.0, 2.0, None]


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no record of a run in"):
        bench.training_record(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no bf16.safetensors in .*; train it with --kind bf16"):
        bench.recipes(tmp_path, "cpu")


class TestTraining:
    """The committed curves."""

    def test_every_run_saw_the_same_tokens(self, runs):
        assert {run["tokens_seen"] for run in runs.values()} == {5827 * 196_608}
        for run in runs.values():
            assert run["curve"][-1][0] == 5800 and run["held_out_curve"][-1][0] == 5827
            assert run["held_out_curve"][-1][1] < run["held_out_curve"][0][1]

    def test_what_ships_is_the_best_of_its_kind_and_the_default(self, runs):
        for kind, name in (("b158", "b158_2e-2"), ("b1", "b1_1e-2")):
            best = min((run for run in runs.values() if run["kind"] == kind), key=lambda run: run["held_out"]["loss"])
            assert best["name"] == name and bitnet.USUAL[kind] == (best["schedule"], best["learning_rate"])

    def test_the_perplexities_that_the_recipe_tells(self, runs):
        told = {"bf16": 7.34, "b158_linear": 8.88, "b158_linear_6e-3": 8.68, "b158": 8.75, "b158_1e-2": 8.67,
                "b158_2e-2": 8.66, "b1": 9.98, "b1_1e-2": 9.87}  # fmt: skip
        assert {name: round(math.exp(run["held_out"]["loss"]), 2) for name, run in runs.items()} == told
        for perplexity in told.values():
            assert f"{perplexity:.2f}" in bitnet.__doc__

    def test_fewer_bits_cost_more(self, runs):
        loss = {name: run["held_out"]["loss"] for name, run in runs.items()}
        assert loss["bf16"] < loss["b158_2e-2"] < loss["b1_1e-2"]

    def test_it_is_small(self):
        from qlearn.bench import results

        assert (
            len(json.dumps(read("bitnet_training"))) < (results._FOLDER / "bitnet_training.json").stat().st_size < 1e5
        )


class TestTable:
    """The committed figures."""

    def test_training_under_the_rounding_is_what_makes_it_work(self, rows):
        trained, rounded = rows["trained", "b158_2e-2"], rows["rounded", "trits, groups of 64"]
        assert trained["bits_per_weight"] < rounded["bits_per_weight"]
        assert 10 * trained["perplexity"] < rounded["perplexity"]
        assert 10 * rows["trained", "b1_1e-2"]["perplexity"] < rows["rounded", "signs, one scale"]["perplexity"]

    def test_the_true_bits(self, rows):
        assert rows["trained", "b158_2e-2"]["bits_per_weight"] == pytest.approx(1.6, abs=0.001)
        assert rows["trained", "b1_1e-2"]["bits_per_weight"] == pytest.approx(1.0, abs=0.001)
        assert rows["rounded", "trits, groups of 64"]["bits_per_weight"] == pytest.approx(1.85, abs=0.001)
