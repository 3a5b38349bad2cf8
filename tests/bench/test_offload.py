"""Offloading as it is measured, on the CPU in the GPU's place."""

import pytest
import torch

from qlearn.bench import offload as bench
from qlearn.bench.results import read
from qlearn.models import memory

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def test_measure():
    machine, _ = bench.bandwidths("cpu", 2**20, 2**16)
    rows = bench.measure("tiny", lambda: bench.random_model(TINY, "cpu", torch.float32), machine, (0, 1, 3), 2, "cpu")
    assert [(row["left"], row["n_gpu_layers"]) for row in rows] == [(0, 4), (1, 3), (3, 1)]
    assert rows[0]["other_bytes"] == 0 < rows[1]["other_bytes"] < rows[2]["other_bytes"]
    assert rows[0]["predicted"] <= rows[1]["predicted"] <= rows[2]["predicted"]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_plan_leaves_as_many_layers_as_asked_for():
    model = bench.random_model(TINY, "cpu")
    for left in range(4):
        plan = bench.plan_with(model, left)
        assert plan.other_bytes == left * memory.pieces(model).layers[0]


@pytest.mark.parametrize("name", ["bundled", "Llama-8B shape"])
def test_the_committed_results(name):
    """What a layer left behind adds is what the bus needs for it, within a factor of two; the rest is overhead."""
    record = read("offload_h200")
    rows = [row for row in record["rows"] if row["model"] == name]
    assert rows[0]["left"] == 0 and all(row["seconds"] >= row["predicted"] for row in rows)
    if name == "Llama-8B shape":
        added = (rows[-1]["seconds"] - rows[0]["seconds"]) / rows[-1]["other_bytes"]
        assert 0.5 < added * record["bandwidths"]["bus_bandwidth"] < 2
