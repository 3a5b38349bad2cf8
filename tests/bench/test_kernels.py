"""The benchmark of the CUDA kernels: what it says without a GPU, and what its committed record shows."""

import pytest
import torch

from qlearn import cli
from qlearn.bench import decode, kernels
from qlearn.bench.results import read

RECORD = read("kernels")
PRODUCTS = {(row["N"], row["K"], row["M"]): row["us"] for row in RECORD["products"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [kernels.main, decode.main], ids=["kernels", "decode"])
def test_without_a_gpu_it_says_so(main):
    with pytest.raises(RuntimeError, match="there is no NVIDIA GPU"):
        main([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command(capsys):
    assert cli.main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err == "qlearn: there is no NVIDIA GPU that torch can use; this benchmark needs one\n"


def test_the_record_says_where_it_is_from():
    assert RECORD["gpu"] == "NVIDIA H200" and RECORD["command"] == "qlearn bench kernels"
    assert all(RECORD[name] for name in ("date", "torch", "numba", "numba-cuda", "copy_gb_per_s"))


def test_every_product_was_measured_twice():
    assert set(PRODUCTS) == {(N, K, M) for N, K in kernels.MATRICES for M in kernels.ROWS}
    for found in PRODUCTS.values():
        assert {"16 bit", "torch int4", "qlearn", "qlearn overlapped", "qlearn bfloat16 overlapped"} <= set(found)
        assert all(len(times) == kernels.REPEATS and max(times) < 1.15 * min(times) for times in found.values())


@pytest.mark.parametrize("shape", PRODUCTS, ids=lambda shape: "x".join(map(str, shape)))
def test_no_peer_is_faster(shape):
    """Of those that were installed: torch's float product, and its own kernel for 4 bits."""
    times = {name: min(found) for name, found in PRODUCTS[shape].items()}
    peers = [time for name, time in times.items() if not name.startswith("qlearn")]
    assert times["qlearn overlapped"] < min(peers)


def test_nothing_is_read_faster_than_memory_allows():
    for row in RECORD["one_row"]:
        assert row["bytes"] / min(row["us"]) * 1e-3 < 4800  # GB/s, the H200's data sheet


def test_a_layer_is_quantized_in_the_time_that_was_aimed_at():
    us = {name: min(times) for name, times in RECORD["quantizing"]["us"].items()}
    assert RECORD["quantizing"]["numbers"] == sum(rows * columns for rows, columns in kernels.LAYER)
    assert us["SINQ"] <= 10_000 and us["absmax"] <= 500 and us["zero_point"] <= 500
    assert us["absmax"] < us["absmax, torch's operations"] / 10


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rotating_and_rounding_to_mxfp4_takes_little_longer_than_a_copy(size):
    us = min(RECORD["quantizing"]["us"][f"MXFP4 of 16384 x 4096, Hadamard {size}"])
    moved = 16384 * 4096 * (2 + 17 / 32)  # bfloat16 in; half a byte, and a byte for 32, out
    assert moved / us * 1e-3 >= 0.7 * RECORD["copy_gb_per_s"]
