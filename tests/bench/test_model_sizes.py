"""The sizes of published models: their numbers of parameters, and the figures of the paper."""

import pytest

from qlearn.bench.model_sizes import PUBLISHED, SCHEMES, SHAPES, quantized_bytes, sizes


@pytest.fixture(scope="module")
def rows():
    return {(row["model"], row["scheme"]): row for row in sizes()}


def test_every_model_in_every_scheme(rows):
    assert set(rows) == {(model, scheme) for model in SHAPES for scheme in ("bf16", *SCHEMES)}


@pytest.mark.parametrize(("model", "billions"), [("Qwen3-1.7B", 1.72), ("Qwen3-14B", 14.77), ("Qwen3-32B", 32.76)])
def test_the_models_have_their_published_numbers_of_parameters(rows, model, billions):
    assert round(rows[model, "bf16"]["parameters"] / 1e9, 2) == billions


@pytest.mark.parametrize("key", PUBLISHED, ids=str)
def test_the_papers_gigabytes_come_out(rows, key):
    assert rows[key]["published_gb"] == PUBLISHED[key]
    assert rows[key]["bytes"] / 1e9 == pytest.approx(PUBLISHED[key], abs=0.0055)  # half a hundredth


def test_what_is_saved_at_4_bits(rows):
    """60 to 70 %: less in a small model, where the embedding is a large part."""
    saved = [rows[model, "SINQ, 4 bit, as published"]["saved"] for model in SHAPES]
    assert saved == sorted(saved) and [round(s, 2) for s in saved] == [0.59, 0.64, 0.68]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("SINQ, 4 bit", {"bits": 4}),
        ("SINQ, 3 bit", {"bits": 3}),
        ("SINQ with 8-bit scales, 4 bit", {"bits": 4, "small_scales": True}),
        ("SINQ with 8-bit scales, 3 bit", {"bits": 3, "small_scales": True}),
    ],
)
def test_a_matrix_takes_what_the_formula_says(scheme, options):
    import torch

    from qlearn.methods import sinq

    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    assert sinq(weight, group_size=64, **options).nbytes == quantized_bytes((128, 256), scheme)
