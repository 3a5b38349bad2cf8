"""The speed of ternary products: all variants compute the same, on cold weights, and the record says what was found."""

import json

import numpy as np
import pytest
import torch

from qlearn.bench import ternary_cpu as bench
from qlearn.bench.results import read


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(bench, "MORE_THAN_CACHES", 2**16)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_variant_computes_the_same():
    calls = bench.variants(bench.make_weights(48, 10), 48, tokens=3, threads=2)
    answers = {name: [np.asarray(call()) for call in found] for name, found in calls.items()}
    assert set(answers) == {"float32", "1.6 bits", "2 bits"}
    for found in answers.values():
        assert len(found) >= 2 and all(np.array_equal(answer, answers["float32"][0]) for answer in found)


def test_weights_are_copied_until_no_cache_holds_them():
    for weights in bench.make_weights(48, 10).values():
        assert sum(w.nbytes for w in weights) >= 2**16
        assert len({np.asarray(w).__array_interface__["data"][0] for w in weights}) == len(weights) >= 2


def test_measure(capsys):
    rows = bench.measure(((32, 16),), tokens=(1, 4), threads=(1, 2), seconds=0.001)
    assert [(r["tokens"], r["threads"]) for r in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert all(0 < seconds < 1 for row in rows for seconds in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_models():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 128}
    rows = bench.measure_models((1,), seconds=0.001, **sizes)
    assert [(row["tokens"], row["behind"]) for row in rows] == [(1, 64), (64, 0)]
    assert all(list(row["seconds"]) == ["float32", "packed"] for row in rows)


def test_results_are_written_where_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measure", lambda threads: [{"threads": threads}])
    monkeypatch.setattr(bench, "measure_models", lambda threads: [])
    bench.main(["--threads", "3", "--out", str(tmp_path / "mine.json")])
    record = json.loads((tmp_path / "mine.json").read_text())
    assert record["command"].endswith("--threads 3") and record["rows"] == [{"threads": [3]}]


def test_the_record_covers_what_is_measured():
    record = read("ternary_cpu")
    expected = {(columns, out, n, t) for columns, out in bench.SHAPES for n in bench.TOKENS for t in bench.THREADS}
    assert {(r["in"], r["out"], r["tokens"], r["threads"]) for r in record["rows"]} == expected


@pytest.mark.parametrize("tokens", bench.TOKENS)
def test_large_layers_gain(tokens):
    """The committed figures show what the kernel is for: at the size of Llama's layers, twice the speed of floats, with
    one thread; with two, tables are built twice, and the figures vary with what else runs."""
    for row in read("ternary_cpu")["rows"]:
        if row["threads"] == 1 and row["in"] == 4096 and row["tokens"] == tokens:
            assert row["seconds"]["float32"] > 2 * row["seconds"]["1.6 bits"], row
