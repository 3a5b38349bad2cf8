"""The speed of W8A8: every variant computes the same layer, and is timed on cold weights."""

import json

import pytest
import torch

from qlearn.bench import int8 as bench
from qlearn.models import int8

SMALL = {"columns": 32, "outputs": 16, "tokens": 5}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(bench, "MORE_THAN_CACHES", 2**16)


def test_every_variant_computes_the_layer():
    results = {name: [call() for call in calls] for name, calls in bench.variants(**SMALL, device="cpu").items()}
    expected = results["float32"][0]
    assert results["product"][0].dtype == torch.int32
    for name in ("dynamic", "static"):
        error = (results[name][0] - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.02  # quantized, and not by much
    for answers in results.values():
        assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_weights_are_copied_until_no_cache_holds_them():
    for name, calls in bench.variants(**SMALL, device="cpu").items():
        weights = [next(a for a in call.args if a.shape == (16, 32)) for call in calls]
        assert len({w.data_ptr() for w in weights}) == len(weights) >= 2
        assert sum(w.nbytes for w in weights) >= 2**16, name


def test_measure(capsys):
    rows = bench.measure(shapes=((32, 16), (64, 8)), tokens=(1, 4), seconds=0.001)
    assert [(r["in"], r["out"], r["tokens"]) for r in rows] == [(32, 16, 1), (32, 16, 4), (64, 8, 1), (64, 8, 4)]
    for row in rows:
        assert list(row["seconds"]) == ["float32", "product", "dynamic", "static"]
        assert all(0 < seconds < 1 for seconds in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_row_as_a_line():
    row = {"in": 4, "out": 8, "tokens": 2, "seconds": {"float32": 4e-6, "product": 1e-6}}
    assert bench.describe(row) == "4 x 8, 2 tokens:  float32 4 us (1.00 x)  product 1 us (4.00 x)"


@pytest.mark.parametrize("static", [False, True])
def test_the_layer_compiles_in_one_piece(monkeypatch, static):
    """As on a GPU, with the padded product; what is compiled is traced here, but not turned into kernels."""
    monkeypatch.setattr(int8, "int8_matmul", int8._padded_int_mm)
    compiled = torch.compile(int8.int8_linear, fullgraph=True, dynamic=False, backend="eager")
    for call in bench.variants(**SMALL, device="cpu")["static" if static else "dynamic"][:2]:
        assert torch.equal(compiled(*call.args), int8.int8_linear(*call.args))


def test_results_are_written_where_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure", lambda device, seconds: [{"device": device}])
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: print(f"{count} threads"))
    monkeypatch.setattr("sys.argv", ["int8", "--threads", "3", "--out", str(tmp_path / "mine.json")])
    bench.main()
    record = json.loads((tmp_path / "mine.json").read_text())
    assert record["command"].endswith("--device cpu --threads 3")
    assert record["claim"] == [2, 4] and record["integers"] is int8.integers_serve_on_this_cpu()
    assert capsys.readouterr().out == "3 threads\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
