"""Q4_0 against the gguf package, which writes the same bytes as llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qlearn.formats.gguf_blocks import dequantize, quantize, signed_max, signed_max_values

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def families():
    """Matrices (8, 96) of every kind that blocks meet."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((8, 96)).astype(np.float32)
    with_zeros = normal.copy()
    with_zeros[:, :32] = 0
    tied = np.where(rng.random((8, 96)) < 0.5, 1, -1).astype(np.float32)  # the first of equal magnitudes decides
    return {
        "normal": normal,
        "zeros": np.zeros((8, 96), np.float32),
        "a block of zeros": with_zeros,
        "a constant": np.full((8, 96), 0.3, np.float32),
        "all positive": np.abs(normal),
        "all negative": -np.abs(normal),
        "ties in magnitude": tied,
        "an outlier": normal + 100 * (rng.random((8, 96)) < 0.01),
        "1e-8": normal * 1e-8,
        "1e4": normal * 1e4,
        "heavy tails": rng.standard_t(2, (8, 96)).astype(np.float32),
        "ternary": rng.integers(-1, 2, (8, 96)).astype(np.float32),
        "halves of the grid": (rng.integers(-16, 17, (8, 96)) / 2).astype(np.float32),
        "negative zeros": np.where(normal > 0, normal, -0.0).astype(np.float32),
        "bfloat16 numbers": torch.from_numpy(normal).bfloat16().float().numpy(),
    }


@pytest.mark.parametrize("name", families())
def test_bytes_are_those_of_gguf(name):
    x = families()[name].astype(np.float32)
    ours = quantize(x)
    theirs = gguf.quants.quantize(x, Q4_0)
    assert ours.dtype == np.uint8 and np.array_equal(ours, theirs)
    assert np.array_equal(dequantize(ours).view(np.uint32), gguf.quants.dequantize(theirs, Q4_0).view(np.uint32))


@given(arrays(np.float32, (1, 32), elements=st.floats(-1e5, 1e5, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)))
def test_any_block_is_that_of_gguf(x):
    assert np.array_equal(quantize(x), gguf.quants.quantize(x, Q4_0))


def test_the_smallest_numbers_become_zero():
    """Where 1 / d overflows float32, llama.cpp's result is undefined; here the block decodes to zeros."""
    assert np.all(dequantize(quantize(np.full((1, 32), 1e-42, np.float32))) == 0)


def test_tensor_in_tensor_out():
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    blocks = quantize(x)
    assert blocks.shape == (3, 36) and np.array_equal(blocks.numpy(), quantize(x.float().numpy()))
    assert torch.equal(dequantize(blocks), torch.from_numpy(dequantize(blocks.numpy())))


def test_leading_dimensions_are_kept():
    assert quantize(np.zeros((2, 3, 64))).shape == (2, 3, 36) and dequantize(quantize(np.zeros(32))).shape == (32,)


def test_encoding_again_changes_nothing():
    """The largest weight comes back as -8 d exactly, so the second encoding finds the same d and the same codes."""
    blocks = quantize(families()["heavy tails"])
    assert np.array_equal(quantize(dequantize(blocks)), blocks)


def test_error_bound():
    """Half a step, but for weights that lie beyond the seventh step on the short side, which lose up to a step."""
    x = families()["normal"]
    error = np.abs(dequantize(quantize(x)) - x).reshape(8, 3, 32)
    step = np.abs(x.reshape(8, 3, 32)).max(-1, keepdims=True) / 8
    assert np.all(error <= step * (1 + 8 * 2**-11))  # d itself is rounded to 11 bits, and multiplied by up to 8
    assert np.all(error.max(-1) > 0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_arrays_and_tensors_agree_at_every_width(bits):
    x = families()["heavy tails"].reshape(-1, 32)
    codes, d = signed_max(x, bits)
    codes_t, d_t = signed_max(torch.from_numpy(x), bits)
    assert np.array_equal(codes, codes_t.numpy()) and np.array_equal(d, d_t.numpy())
    values, values_t = signed_max_values(codes, d, bits), signed_max_values(codes_t, d_t, bits)
    assert np.array_equal(values, values_t.numpy()) and codes.max() <= 2**bits - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(np.zeros((2, 33))), r"\(2, 33\) do not divide into blocks of 32"),
        (lambda: quantize(np.zeros((2, 0))), "do not divide"),
        (lambda: quantize(1.0), "do not divide"),
        (lambda: quantize(np.full(32, np.nan)), "32 of the numbers are not finite"),
        (lambda: quantize(np.full(32, np.inf)), "not finite"),
        (lambda: quantize(np.full(32, 1e6)), "does not fit float16"),
        (lambda: quantize(np.zeros(32), "Q9_9"), "'Q9_9' is unknown"),
        (lambda: dequantize(np.zeros(17, np.uint8)), "no whole Q4_0 blocks"),
        (lambda: dequantize(np.zeros(18, np.float32)), "no whole Q4_0 blocks"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
