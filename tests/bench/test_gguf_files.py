"""The committed figures of GGUF files: llama.cpp agrees with them, and they say what they have to."""

import pytest

from qlearn.bench import gguf_files
from qlearn.bench.llamacpp import LlamaCpp
from qlearn.bench.results import read


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in read("gguf_files")["rows"]}


def test_every_scheme_is_there(rows):
    assert list(rows) == [
        *gguf_files.WITHOUT, *(f"{scheme}, imatrix" for scheme in gguf_files.WITH_IMATRIX), "Q4_0, QAT",
    ]  # fmt: skip


def test_llama_quantize_makes_the_same_bytes(rows):
    assert all(row["same_bytes"] for name, row in rows.items() if name != "Q4_0, QAT")


def test_both_programs_find_the_same_perplexity(rows):
    assert all(0.99 < row["ratio"] < 1.01 for row in rows.values())
    assert rows["F32"]["ratio"] == pytest.approx(1, abs=2e-5)  # four decimals are printed
    assert all(row["ratio"] == pytest.approx(row["llama_perplexity"] / row["perplexity"]) for row in rows.values())


def test_both_programs_write_the_same_text(rows):
    """But for decisions that are close, where llama.cpp rounds its inputs to 8 bits."""
    for name in ("F32", "F16"):
        assert rows[name]["same_texts"] == rows[name]["prompts"] and rows[name]["gaps"] == []
    assert rows["Q8_0"]["same_texts"] + len(rows["Q8_0"]["gaps"]) == rows["Q8_0"]["prompts"]
    assert max(rows["Q8_0"]["gaps"]) < 0.1


def test_sizes_follow_from_the_types(rows):
    assert rows["F32"]["bits_per_weight"] == 32 and 8.5 < rows["Q8_0"]["bits_per_weight"] < 8.52
    assert rows["Q4_K_S"]["bits_per_weight"] < rows["Q4_K_M"]["bits_per_weight"] < rows["Q5_K_S"]["bits_per_weight"]
    for row in rows.values():
        assert 0 < row["bytes"] - row["bits_per_weight"] / 8 * 7_344_384 < 150_000  # the metadata


def test_fewer_bits_cost_more(rows):
    order = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "TQ2_0")
    perplexities = [rows[name]["perplexity"] for name in order]
    assert perplexities == sorted(perplexities) and perplexities[-1] > 1e3  # no ternary model by rounding


@pytest.mark.parametrize("scheme", ["Q4_K_M", "Q4_K_S", "Q3_K_M", "Q3_K_S", "Q2_K"])
def test_an_imatrix_helps_where_bits_are_few(rows, scheme):
    assert rows[f"{scheme}, imatrix"]["perplexity"] < rows[scheme]["perplexity"]


def test_training_for_the_blocks_is_better_than_any_search(rows):
    others = [row["perplexity"] for name, row in rows.items() if row["scheme"] == "Q4_0" and name != "Q4_0, QAT"]
    assert rows["Q4_0, QAT"]["perplexity"] < min(others)


def test_measure(monkeypatch, tmp_path):
    """One scheme with and without imatrix, with a stand-in for llama.cpp that copies and repeats."""

    class Echo:
        def perplexity(self, model, text, chunks):
            assert chunks == 1
            return 8.0

        def quantize(self, source, target, scheme, imatrix=None):
            target.write_bytes((tmp_path / "model.gguf").read_bytes() if imatrix is None else source.read_bytes())

        def complete(self, model, prompt, tokens):
            return " np" if prompt == gguf_files.PROMPTS[0] else "?"

    monkeypatch.setattr(gguf_files, "NEW_TOKENS", 1)
    monkeypatch.setattr(gguf_files, "PROMPTS", gguf_files.PROMPTS[:2])
    monkeypatch.setattr(gguf_files, "imatrix", lambda *model: gguf_files_imatrix(*model, tokens=512))
    found = list(gguf_files.measure(Echo(), tmp_path, 1, ["Q8_0"], ["Q4_0"]))
    assert [row["name"] for row in found] == ["Q8_0", "Q4_0, imatrix", "Q4_0, QAT"]
    assert [row["same_bytes"] for row in found[:2]] == [True, False]
    assert found[0]["same_texts"] == 1 and len(found[0]["gaps"]) == 1 and found[0]["gaps"][0] > 0
    assert all(row["ratio"] == 8.0 / row["perplexity"] for row in found)


gguf_files_imatrix = gguf_files.imatrix


def test_tools_that_are_not_there_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACPP_BIN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no llama-quantize in"):
        LlamaCpp()
