"""The speed of the processor's kernels: all variants compute the same, on cold weights, and the record is complete."""

import json

import pytest
import torch

from qlearn.bench import cpu_kernels as bench
from qlearn.bench.results import read


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(bench, "MORE_THAN_CACHES", 2**16)


@pytest.mark.parametrize("rows", [1, 4])
def test_variants_compute_what_they_say(rows):
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1))
    exact = bench.variants(16, 128, 32)["float32"]
    for bits in (16, 4, 8):
        for name, (weights, call, bits_per_weight) in bench.variants(16, 128, bits).items():
            float_matrix = weights[0].float() if bits == 16 else weights[0].dequantize()
            assert (float_matrix - exact[0][0]).abs().max() < 2.0 ** (1 - min(bits, 8)) * 4, name
            expected = x.double() @ float_matrix.double().T
            error = 2.0**-8 if bits == 16 else 2.0**-24  # of each product, and of each of 128 sums
            bound = 135 * error * x.double().abs() @ (float_matrix.double().abs() + (2**bits if bits < 16 else 0)).T
            assert ((call(x, weights[0]).double() - expected).abs() <= bound).all(), name
            assert bits <= bits_per_weight <= bits + 0.5


def test_weights_are_copied_until_no_cache_holds_them():
    for bits in (32, 16, 3):
        for name, (weights, _, _) in bench.variants(16, 128, bits).items():
            if name != "reference":
                assert sum(w.nbytes for w in weights) >= 2**16
                first = [getattr(w, "packed", w).data_ptr() for w in weights]
                assert len(set(first)) == len(weights) >= 2


def test_measure_products(capsys):
    found = bench.measure_products(((16, 128),), bits=(4,), rows=(1, 4), threads=(1,), repeats=3)
    assert [(row["variant"], row["rows"]) for row in found] == [
        (variant, rows)
        for variant in ("float32", "bfloat16", "packed", "packed, zeros", "reference")
        for rows in (1, 4)
    ]
    for row in found:
        nbytes = row["bits_per_weight"] * 16 * 128 / 8
        assert row["gigabytes_per_second"] == pytest.approx(nbytes / row["seconds"] / 1e9)
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_measure_methods(monkeypatch):
    layers = bench.layers_and_inputs(tokens=64)[:2]
    assert len(layers) == 2 and all(statistics.count == 64 for _, statistics in layers)
    monkeypatch.setattr(bench, "layers_and_inputs", lambda: layers)
    found = bench.measure_methods(repeats=1)
    assert list(found) == ["sinq", "gptq"]
    assert all(one["same"] and one["reference"] > 0 and one["cpu"] > 0 for one in found.values())


def test_results_are_written_where_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measure_products", lambda threads: [{"threads": threads}])
    monkeypatch.setattr(bench, "measure_methods", lambda: {})
    bench.main(["--threads", "3", "--out", str(tmp_path / "mine.json")])
    record = json.loads((tmp_path / "mine.json").read_text())
    assert record["command"].endswith("--threads 3") and record["rows"] == [{"threads": [3]}]


def rows_of(variant):
    return {
        (r["out"], r["in"], r["bits"], r["rows"], r["threads"]): r
        for r in read("cpu_kernels")["rows"]
        if r["variant"] == variant
    }


def test_the_record_covers_what_is_measured():
    expected = {
        (*shape, bits, rows, threads)
        for shape in bench.SHAPES
        for bits in bench.BITS
        for rows in bench.ROWS
        for threads in bench.THREADS
    }
    for variant in ("packed", "packed, zeros", "reference"):
        assert set(rows_of(variant)) == expected
    assert len(rows_of("float32")) == len(rows_of("bfloat16")) == len(expected) / len(bench.BITS)


def test_the_rule_of_the_dispatcher_stands_on_these():
    """At every size, number of bits and number of rows, the kernel was faster than making the float matrix."""
    for variant in ("packed", "packed, zeros"):
        for place, row in rows_of(variant).items():
            assert row["seconds"] < rows_of("reference")[place]["seconds"], place


@pytest.mark.parametrize("out, columns", bench.SHAPES)
def test_one_token_at_four_bits_gains(out, columns):
    """Against torch's own product with the float matrix, which takes eight times the memory."""
    floats = rows_of("float32")[out, columns, 32, 1, 1]["seconds"]
    assert rows_of("packed")[out, columns, 4, 1, 1]["seconds"] < floats


def test_compiled_methods_gain_and_are_the_same():
    for one in read("cpu_kernels")["methods"].values():
        assert one["same"] and one["cpu"] < one["reference"]
