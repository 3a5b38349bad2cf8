"""Encoding speeds: the comparison with ggml finds what differs, and its results say what the lessons quote."""

import numpy as np
import pytest

from qlearn.bench import gguf_blocks as bench
from qlearn.bench.results import read
from qlearn.formats import gguf_blocks


class OneBitOff:
    """Stands in for ggml: the right blocks, but for a bit of the last one."""

    def quantize(self, x, block_type, imatrix=None):
        blocks = gguf_blocks.quantize(x, block_type, imatrix)
        blocks[-1, -1] ^= 1
        return blocks


def test_differing_blocks_are_counted():
    rows = bench.measure(OneBitOff(), np.random.RandomState(0).standard_normal((32, 256)).astype(np.float32), repeats=1)
    assert {row["type"] for row in rows} == set(gguf_blocks.BLOCK_TYPES)
    assert len(rows) == 13 + 9  # nine types know of an importance matrix
    assert all(row["differing"] == {"compiled": 1, "readable": 1} for row in rows)


def test_weights_are_the_models():
    x = bench.weights(1 << 16)
    assert x.shape == (256, 256) and x.dtype == np.float32 and 0.01 < x.std() < 0.5


@pytest.mark.parametrize("row", read("gguf_blocks")["rows"], ids=lambda row: f"{row['type']} {row['imatrix']}")
def test_the_committed_results(row):
    assert row["differing"] == {"compiled": 0, "readable": 0}
    speeds = row["megabytes_per_second"]
    if row["type"] in ("Q4_K", "Q6_K"):
        assert speeds["compiled"] >= speeds["ggml"]
    if row["type"] in ("Q4_0", "Q8_0") and not row["imatrix"]:
        assert speeds["compiled"] >= 500
