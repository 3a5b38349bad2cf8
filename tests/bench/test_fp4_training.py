"""The comparison of FP4 trainings: rows that a stopped run keeps, and one file of all of them."""

import argparse
import json

import numpy as np
import pytest

from qlearn.bench import fp4_training, results
from qlearn.bench.fp4_training import merge, read_rows, run, run_and_write, run_file


@pytest.fixture
def tokens(tmp_path):
    stream = (np.arange(5000) % 16).astype(np.uint16)
    np.savez(tmp_path / "t.npz", stream=stream, held_out=stream[:1100], about=np.array(json.dumps({"tokens": 5000})))
    return tmp_path / "t.npz"


def test_a_run_gives_a_row_for_each_number_of_tokens(tokens):
    rows = list(run(128, "quartet_sr", tokens, (1024, 2048), batch=1, device="cpu", compile=False, layers=1))
    assert [row["tokens"] for row in rows] == [1024, 2048]
    assert {row["params"] for row in rows} == {128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384}  # q o, k v, the MLP
    assert rows[1]["loss"] < rows[0]["loss"] < 8.4  # nothing learned yet: log 4096 = 8.3
    assert rows[0]["learning_rate"] == 6e-3


def test_rows_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    made = []

    def one(width, scheme, tokens, budgets, seed):
        for n in budgets:
            made.append(n)
            steps = fp4_training.steps_for(n)
            yield {"scheme": scheme, "width": width, "steps": steps, "tokens": n, "seed": seed, "curve": []}

    monkeypatch.setattr(fp4_training, "run", one)
    options = argparse.Namespace(runs=tmp_path, seed=0, tokens="t.npz", budgets=[16384])
    run_and_write(256, "luq", options)
    options.budgets = [16384, 32768]
    run_and_write(256, "luq", options)
    run_and_write(256, "bf16", options)
    assert made == [16384, 32768, 16384, 32768]
    assert [row["steps"] for row in read_rows(run_file(tmp_path, 256, "luq"))] == [1, 2]
    rows = merge(tmp_path)["rows"]
    assert [(r["scheme"], r["steps"]) for r in rows] == [("bf16", 1), ("luq", 1), ("bf16", 2), ("luq", 2)]
    assert merge(tmp_path)["command"].startswith("python -m qlearn.bench.fp4_training")


def test_what_is_missing_is_told(tmp_path, capsys):
    with pytest.raises(ValueError, match="there are no runs in"):
        merge(tmp_path)
    with pytest.raises(SystemExit):
        fp4_training.main(["--tokens", "none.npz"])
    assert "there is no file none.npz; python -m qlearn.training.tokens" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained():
    """The committed losses: dict (width, scheme) -> array (seeds 0 and 1; 8, 20 and 50 million tokens)."""
    record = results.read("fp4_training")
    assert record["gpu"] and record["date"] and record["torch"]
    found = {}
    for row in record["rows"]:
        n = [fp4_training.steps_for(tokens) for tokens in fp4_training.TOKENS].index(row["steps"])
        if row["seed"] < 2:
            losses = found.setdefault((row["width"], row["scheme"]), np.full((2, 3), np.nan))
            assert np.isnan(losses[row["seed"], n])  # no training is there twice
            losses[row["seed"], n] = row["loss"]
    return found


def test_every_width_and_scheme_was_trained_twice_and_more_text_helps(trained):
    assert set(trained) == {(width, scheme) for width in fp4_training.WIDTHS for scheme in fp4_training.COMPARED}
    for losses in trained.values():
        assert (np.diff(losses, axis=1) < 0).all()  # also false for a training that is missing


@pytest.mark.parametrize("width", fp4_training.WIDTHS)
def test_quartet_is_between_bfloat16_and_plain_rounding(trained, width):
    bf16, rtn, sr, naive, luq = (
        trained[width, scheme].mean(0) for scheme in ("bf16", "quartet_rtn", "quartet_sr", "naive_fp4", "luq")
    )
    assert (bf16 < np.minimum(rtn, sr)).all() and (np.maximum(rtn, sr) < naive).all() and (naive < luq).all()


def test_fp8_products_are_faster_but_rounding_costs_much_of_it():
    record = results.read("fp8_speed")
    assert record["gpu"] and record["tokens"] == 8192 and len(record["layers"]) == 4
    for layer in record["layers"].values():
        for row in layer["products"]:
            assert row["ms"]["fp8"] < row["ms"]["bf16"] and row["ms"]["fp8"] < row["ms"]["fp8_all"]
            assert 0.02 < row["relative_error"] < 0.08
