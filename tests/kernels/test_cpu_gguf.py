"""The compiled searches against the readable ones, and against ggml."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qlearn.formats import gguf_blocks
from qlearn.formats.gguf_blocks import BLOCK_TYPES, fits
from qlearn.kernels.cpu import gguf
from tests.formats.test_gguf_blocks import FAMILIES, GGML, IMPORTANCES

NUMBERS = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_bytes_are_those_of_ggml(block_type, family):
    for importance, imatrix in IMPORTANCES.items():
        blocks = gguf.quantize(FAMILIES[family], block_type, imatrix)
        ignored = not BLOCK_TYPES[block_type].uses_importance
        wanted = GGML[f"{block_type} | {family} | {'none' if ignored else importance}"]
        assert hashlib.sha256(blocks.tobytes()).hexdigest() == wanted, importance


def test_every_search_is_there():
    assert all(callable(getattr(gguf, name)) for name in fits.__all__)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@settings(max_examples=25, deadline=None)
@given(
    x=arrays(np.float32, (1, 256), elements=NUMBERS),
    imatrix=st.none() | arrays(np.float32, 256, elements=st.floats(0, 100, width=32)),
)
def test_any_block_is_that_of_the_readable_version(block_type, x, imatrix):
    assert np.array_equal(gguf.quantize(x, block_type, imatrix), gguf_blocks.quantize(x, block_type, imatrix))


@pytest.mark.parametrize("rows", [1, 3, 8, 9], ids=lambda rows: f"{8 * rows} sub-blocks, {gguf.LANES} at a time")
def test_lanes_beyond_the_end_change_nothing(rows):
    x = np.random.RandomState(rows).standard_normal((rows, 256))
    for block_type in ("Q3_K", "Q4_K", "Q6_K"):
        assert np.array_equal(gguf.quantize(x, block_type), gguf_blocks.quantize(x, block_type))


def test_errors_are_those_of_the_readable_version():
    with pytest.raises(ValueError, match="do not divide into blocks of 256"):
        gguf.quantize(np.zeros(100), "Q4_K")
    with pytest.raises(ValueError, match="does not fit float16"):
        gguf.quantize(np.full(256, 1e9), "Q4_0")
