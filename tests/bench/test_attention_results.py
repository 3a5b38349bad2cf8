"""The table of quantized attention: that it is made as it says, and what its committed figures have to show."""

import pytest
import torch

import qlearn
from qlearn.bench import attention as bench
from qlearn.bench.results import read
from qlearn.methods.attention import Scheme, attention


@pytest.fixture(scope="module")
def record():
    return read("attention")


@pytest.fixture(scope="module")
def rows(record):
    return {row["name"]: row for row in record["rows"]}


@pytest.fixture(scope="module")
def outputs(record):
    return {row["name"]: row for row in record["outputs"]}


# ---- the committed figures -------------------------------------------------------------------------------------------


def test_every_variant_has_its_rows(record, rows, outputs):
    assert list(rows) == ["unquantized", *bench.variants()]
    assert list(outputs) == list(bench.variants())
    assert {name: Scheme(**scheme) for name, scheme in record["schemes"].items()} == bench.variants()


def test_the_same_algorithm_without_rounding_is_attention(rows, outputs):
    assert rows["float"]["kl_divergence"] < 1e-6 and outputs["float"]["as_it_is"]["relative_error"] == 0


QK = ("int8 qk, block", "int8 qk, token", "int4 qk, token", "mxfp4 qk", "nvfp4 qk")


@pytest.mark.parametrize("name", QK)
def test_smoothing_k_helps(rows, outputs, name):
    plain, smooth = f"{name}, not smoothed", f"{name}, K smoothed"
    assert rows[smooth]["kl_divergence"] < rows[plain]["kl_divergence"]
    assert outputs[smooth]["as_it_is"]["relative_error"] < outputs[plain]["as_it_is"]["relative_error"]


@pytest.mark.parametrize("name", QK)
def test_an_outlier_ruins_it_without_smoothing_only(outputs, name):
    plain, smooth = outputs[f"{name}, not smoothed"], outputs[f"{name}, K smoothed"]
    assert plain["with_outlier"]["relative_error"] > 2 * plain["as_it_is"]["relative_error"]
    assert smooth["with_outlier"]["relative_error"] == pytest.approx(smooth["as_it_is"]["relative_error"], rel=1e-3)


@pytest.mark.parametrize("name", QK[2:])
def test_smoothing_q_helps_at_four_bits(rows, name):
    assert rows[f"{name}, Q and K smoothed"]["kl_divergence"] < rows[f"{name}, K smoothed"]["kl_divergence"]


def test_int8_is_nearly_free_and_fp4_is_not(rows):
    free = rows["unquantized"]["perplexity"]
    assert rows["SageAttention: int8"]["perplexity"] < 1.001 * free
    assert rows["SageAttention: int8_fp8"]["perplexity"] < 1.001 * free
    assert rows["SageAttention: nvfp4"]["perplexity"] > 1.01 * free
    assert rows["SageAttention: nvfp4"]["kl_divergence"] < rows["SageAttention: mxfp4"]["kl_divergence"]


def test_two_levels_save_what_a_sink_leaves(record, rows):
    """Little on this model, which has no such sink; all of it where there is one."""
    assert rows["nvfp4 pv, two levels"]["kl_divergence"] < rows["nvfp4 pv, one level"]["kl_divergence"]
    errors = {(row["name"], row["score"]): row["relative_error"] for row in record["sinks"]}
    assert errors["nvfp4 pv, one level", 10] > 0.5 > 5 * errors["nvfp4 pv, two levels", 10]


# ---- how they are made -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return qlearn.load_model()


def test_measure_operands(bundled):
    schemes = {"int8": Scheme("int8"), "smooth": Scheme("int8", smooth_k=True)}
    layers, (plain, smooth) = bench.measure_operands(*bundled, schemes, tokens=64)
    assert len(layers) == 8 and all(0 < layer["mean_share"] < 1 <= layer["outlier_ratio"] for layer in layers)
    assert plain["as_it_is"]["relative_error"] <= plain["as_it_is"]["worst_relative_error"]
    assert plain["with_outlier"]["relative_error"] > 3 * smooth["with_outlier"]["relative_error"]


def test_measure_model(bundled):
    base, row = bench.measure_model(*bundled, {"int4": Scheme("int4")}, tokens=64)
    assert (base["name"], row["name"]) == ("unquantized", "int4") and base["kl_divergence"] == 0 < row["kl_divergence"]
    assert bundled[0].config._attn_implementation == "sdpa"


def test_an_outlier_changes_nothing(bundled):
    model, tokenizer = bundled
    layer = bench.operands(model, tokenizer("import os\nimport sys\n", return_tensors="pt").input_ids)[3]
    outlier = bench.outlying(layer)
    torch.testing.assert_close(attention(**outlier, scheme="float"), attention(**layer, scheme="float"))
    moved = (outlier["k"] - layer["k"]).mean((0, 1, 2))
    wanted = torch.zeros(64)
    wanted[bench.OUTLIER_CHANNEL] = bench.OUTLIER * layer["k"].square().mean().sqrt()
    torch.testing.assert_close(moved, wanted)


def test_a_sink_scores_what_it_says():
    layer = bench.sinking(6)
    scores = layer["q"] @ layer["k"].mT / 8
    torch.testing.assert_close(scores[..., 0], torch.full((1, 1, 128), 6.0))
    assert not layer["v"][:, :, 0].any() and scores[..., 1:].mean().abs() < 0.01


def test_sinks_are_measured_where_only_p_and_v_are_rounded():
    schemes = {"pv": Scheme(pv="fp16"), "qk": Scheme("int8"), "both": Scheme("int8", "fp16"), "float": Scheme()}
    found = bench.measure_sinks(schemes, scores=(0, 5))
    assert [(row["name"], row["score"]) for row in found] == [("pv", 0), ("pv", 5)]
