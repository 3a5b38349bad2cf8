"""The round-to-nearest table: it can be measured again, and the committed one is what the method must give."""

import pytest

from qlearn.bench import results, rtn
from qlearn.evaluate.provenance import provenance


def test_a_small_measurement_has_the_rows_it_promises():
    rows = rtn.measure(methods=("absmax",), bits=(8, 3), tokens=600, parse=False)
    assert [row.name for row in rows] == ["unquantized", "absmax 8 bit", "absmax 3 bit"]
    assert [row.bits_per_weight for row in rows] == [16, 8.25, 3.25]
    assert rows[0].kl_divergence == 0 < rows[1].kl_divergence < rows[2].kl_divergence


def test_the_committed_table_has_its_provenance_and_falls_bit_by_bit():
    record = results.read("rtn")
    assert {"command", "date", "machine", "python", "torch", "transformers"} <= record.keys()
    divergence = {row["name"]: row["kl_divergence"] for row in record["rows"]}
    for method in ("absmax", "zero_point"):
        falling = [divergence[f"{method} {bits} bit"] for bits in rtn.BITS]
        assert falling == sorted(falling)
    sizes = {row["name"]: row["bits_per_weight"] for row in record["rows"]}
    for bits in rtn.BITS:
        assert sizes[f"absmax {bits} bit"] == bits + 16 / rtn.GROUP_SIZE
        assert sizes[f"zero_point {bits} bit"] == bits + (16 + bits) / rtn.GROUP_SIZE


def test_unknown_results_are_named():
    with pytest.raises(ValueError, match=r"no results called 'nothing'; there are: .*rtn"):
        results.read("nothing")


def test_writing_replaces_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_FOLDER", tmp_path)
    results.write("x", provenance("a command") | {"value": 1})
    assert results.read("x")["command"] == "a command"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
