"""The bundled model is what its card says: the record of a run, in transformers' own format, small enough to ship."""

import json

import pytest
import torch
from safetensors import safe_open

from qlearn.training import corpus
from qlearn.training.card import FOLDER, render


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text())


def test_the_card_is_the_record(record):
    assert (FOLDER / "MODEL_CARD.md").read_text() == render(record)


def test_it_fits_in_sixteen_megabytes():
    weights_and_tokenizer = [FOLDER / name for name in ("model.safetensors", "tokenizer.json")]
    assert sum(path.stat().st_size for path in weights_and_tokenizer) <= 16_000_000


def test_the_weights_are_bf16_and_as_many_as_the_card_says(record):
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no dict
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert sum(t.numel() for t in tensors) == record["parameters"]
    assert all(torch.isfinite(t).all() for t in tensors)


def test_the_curves_cover_the_run_and_fall(record):
    assert [row["step"] for row in record["curve"]] == list(range(25, record["steps"] + 1, 25))
    assert record["curve"][-1]["loss"] < 0.5 * record["curve"][0]["loss"]
    assert record["held_out_curve"][-1]["step"] == record["steps"]


def test_every_source_is_permissive(record):
    sources = record["corpus"]["sources"]
    assert all(corpus.is_permissive(source["licence"]) for source in sources)
    assert sum(source["files"] for source in sources) == record["corpus"]["files"] + len(corpus.HELD_OUT_MODULES)


def test_the_tokenizer_splits_as_gpt2_does():
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text())
    assert tokenizer["pre_tokenizer"] == {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
