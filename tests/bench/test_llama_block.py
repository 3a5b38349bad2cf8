"""The cost of a Llama block: the sizes are the true ones, and every method is measured on the same block."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlearn.bench import llama_block
from qlearn.bench.llama_block import HELD_OUT, LLAMA_8B, TINY, build, hidden_states, measure, measure_all
from qlearn.models.calibration import walk


def test_the_block_has_the_sizes_of_llama_8b():
    """As published: q and o 4096 x 4096, k and v 1024 x 4096, three matrices of 14336 x 4096."""
    with torch.device("meta"):
        block = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, num_hidden_layers=1, vocab_size=8)).model.layers[0]
    shapes = {n.rpartition(".")[2]: (m.out_features, m.in_features) for n, m in block.named_modules() if "proj" in n}
    wide, narrow = {"q_proj", "o_proj"}, {"k_proj", "v_proj"}
    assert {shapes.pop(name) for name in wide} == {(4096, 4096)} and {shapes.pop(n) for n in narrow} == {(1024, 4096)}
    assert shapes == {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}


def test_hidden_states_are_correlated_and_have_outliers():
    torch.manual_seed(0)
    states = hidden_states(1024, 256)
    sizes = states.std(0)
    outliers = sizes > 5 * sizes.median()
    assert outliers.sum() == 8
    ordinary = torch.linalg.svdvals(states[:, ~outliers])
    assert ordinary[:16].square().sum() > 0.7 * ordinary.square().sum()


def test_what_the_error_is_measured_on_was_not_calibrated_on():
    """Every token is its own, and the last window is kept apart."""
    model, ids = build(1024 + HELD_OUT, "cpu", TINY)
    assert ids.shape == (3, 512) and ids.unique().numel() == 1536
    calls = next(walk(model, ids)).calls
    assert sum(args[0].shape[0] if args else len(kwargs["hidden_states"]) for args, kwargs in calls) == 3
    assert torch.equal(
        build(1024 + HELD_OUT, "cpu", TINY)[0].model.embed_tokens.weight, model.model.embed_tokens.weight
    )


def test_every_method_is_measured():
    rows = {method: measure(method, tokens=1024, shape=TINY) for method in llama_block.METHODS}
    assert rows["absmax"]["bits_per_weight"] == 4 + 16 / 128
    assert rows["zero_point"]["bits_per_weight"] == rows["gptq"]["bits_per_weight"] == 4 + (16 + 4) / 128
    for row in rows.values():
        assert row.keys() == {"method", "bits_per_weight", "seconds", "peak_bytes", "output_error"}
        assert row["seconds"] > 0 and row["peak_bytes"] >= 0 and 0 < row["output_error"] < 0.5
    assert rows["gptq"]["output_error"] < rows["zero_point"]["output_error"]
    assert rows["awq"]["output_error"] < rows["zero_point"]["output_error"]


def test_a_process_of_its_own_gives_the_same_error(capsys):
    [row] = measure_all(tokens=512, shape=TINY, methods=("absmax",))
    assert row["output_error"] == pytest.approx(measure("absmax", tokens=512, shape=TINY)["output_error"], rel=1e-4)
    assert "absmax" in capsys.readouterr().out


def test_a_wrong_number_of_tokens_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["llama_block", "--tokens", "700"])
    with pytest.raises(SystemExit):
        llama_block.main()
    assert "--tokens 700 is no multiple of 512" in capsys.readouterr().err
