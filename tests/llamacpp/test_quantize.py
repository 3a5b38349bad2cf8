"""llama-quantize and write_gguf write the same bytes, for every scheme and every tiny model."""

import json

import numpy as np
import pytest

from qlearn.bench.llamacpp import FLOAT32
from qlearn.evaluate import evaluation_text
from qlearn.export import GGUFFile, Imatrix, imatrix, write_gguf
from qlearn.export.recipes import SCHEMES
from tests.export import tiny
from tests.export.types import table
from tests.llamacpp import make_types

pytestmark = pytest.mark.llamacpp

K_QUANTS = ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q2_K_S", "Q6_K")
WITH_IMATRIX = (*K_QUANTS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4")


def assert_same(ours, theirs):
    ours, theirs = GGUFFile(ours), GGUFFile(theirs)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        assert ours.tensor(name).type == theirs.tensor(name).type, name
        assert np.array_equal(ours.data(name), theirs.data(name)), name
    for key in ours.metadata.keys() | theirs.metadata.keys():
        if not key.startswith("quantize.imatrix."):  # theirs has the path of the file
            assert np.array_equal(ours.metadata[key], theirs.metadata[key]), key


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "Q2_K_S"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_same_bytes(llama, unquantized, tmp_path, name, scheme):
    llama.quantize(unquantized(name), tmp_path / "theirs.gguf", scheme)
    ours = write_gguf(tiny.model(name), tiny.tokenizer(), tmp_path / "ours.gguf", scheme, progress=False)
    assert_same(ours, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("scheme", WITH_IMATRIX)
@pytest.mark.parametrize("name", ["bundled", "qwen3", "deep", "odd"])
def test_the_same_bytes_with_an_imatrix(llama, unquantized, importance, tmp_path, name, scheme):
    found, path = importance(name)
    llama.quantize(unquantized(name), tmp_path / "theirs.gguf", scheme, imatrix=path)
    ours = write_gguf(tiny.model(name), tiny.tokenizer(), tmp_path / "ours.gguf", scheme, found, progress=False)
    assert_same(ours, tmp_path / "theirs.gguf")


def test_the_committed_table_is_what_llama_quantize_chooses_today(llama, monkeypatch, tmp_path):
    monkeypatch.setattr(make_types, "TABLE", tmp_path / "types.json")
    make_types.main()
    assert json.loads((tmp_path / "types.json").read_text()) == table()


def test_llama_imatrix_finds_what_ours_finds(llama, unquantized, text, tmp_path):
    """Theirs adds up 2,048 squares in float32 one by one, which may cost 2048 * 2**-24; attention is not rounded."""
    llama.imatrix(unquantized("bundled"), text, tmp_path / "theirs.gguf", chunks=4, options=FLOAT32)
    theirs = Imatrix.load(tmp_path / "theirs.gguf")
    ours = imatrix(tiny.model("bundled"), tiny.tokenizer(), evaluation_text(), tokens=2048)
    assert theirs.counts == ours.counts and theirs.chunk_size == ours.chunk_size
    for name in ours:
        assert np.allclose(theirs[name], ours[name], rtol=2048 * 2**-24, atol=0), name


def test_their_imatrix_gives_the_same_bytes(llama, unquantized, text, tmp_path):
    llama.imatrix(unquantized("bundled"), text, tmp_path / "imatrix.gguf", chunks=4)
    llama.quantize(unquantized("bundled"), tmp_path / "theirs.gguf", "Q4_K_M", imatrix=tmp_path / "imatrix.gguf")
    ours = write_gguf(
        tiny.model("bundled"), tiny.tokenizer(), tmp_path / "ours.gguf", "Q4_K_M",
        imatrix=Imatrix.load(tmp_path / "imatrix.gguf"), progress=False,
    )  # fmt: skip
    assert_same(ours, tmp_path / "theirs.gguf")
