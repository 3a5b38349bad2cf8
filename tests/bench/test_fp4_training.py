"""The comparison of FP4 trainings: rows that a stopped run keeps, and one file of all of them."""

import argparse
import json

import numpy as np
import pytest

from qlearn.bench import fp4_training
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
            yield {"scheme": scheme, "width": width, "steps": n // 32768, "tokens": n, "seed": seed, "curve": []}

    monkeypatch.setattr(fp4_training, "run", one)
    options = argparse.Namespace(runs=tmp_path, seed=0, tokens="t.npz", budgets=[32768])
    run_and_write(256, "luq", options)
    options.budgets = [32768, 65536]
    run_and_write(256, "luq", options)
    run_and_write(256, "bf16", options)
    assert made == [32768, 65536, 32768, 65536]
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
