"""GGUF blocks against ggml (by hashes of what it wrote), against the gguf package, and against what they promise."""

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qlearn.formats.gguf_blocks import BLOCK_TYPES, dequantize, quantize, signed_max, signed_max_values, unpack
from tests.conformance.families import families, importances

GGML = json.loads((Path(__file__).parents[1] / "conformance" / "gguf_blocks.json").read_text())["sha256"]
FAMILIES, IMPORTANCES = families(), importances()
ENCODED_BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5}
BITS |= {"Q5_K": 5.5, "Q6_K": 6.5625, "TQ1_0": 1.6875, "TQ2_0": 2.0625, "MXFP4": 4.25}


def their(block_type):
    return gguf.GGMLQuantizationType[block_type]


def random_blocks(block_type, count=64):
    """Bytes that no encoder might write, but that every decoder must read; their float16 numbers are finite."""
    kind = BLOCK_TYPES[block_type]
    blocks = np.random.RandomState(0).randint(0, 256, (count, kind.nbytes)).astype(np.uint8)
    stop = 0
    for field in kind.layout:
        stop += field.size
        if field.name in ("d", "dmin", "m"):
            blocks[:, stop - 1] &= 0b10111111
        if field.name == "e":
            blocks[:, stop - 1] %= 255
    return blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_bytes_are_those_of_ggml(block_type, family):
    for importance, imatrix in IMPORTANCES.items():
        blocks = quantize(FAMILIES[family], block_type, imatrix)
        ignored = not BLOCK_TYPES[block_type].uses_importance
        wanted = GGML[f"{block_type} | {family} | {'none' if ignored else importance}"]
        assert hashlib.sha256(blocks.tobytes()).hexdigest() == wanted, importance


def test_every_hash_is_of_another_type():
    """A golden file of equal lines would prove nothing: of the normal numbers, no two types write the same bytes."""
    normal = [sha for name, sha in GGML.items() if " | normal | none" in name]
    assert len(set(normal)) == len(normal) == len(BLOCK_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_type", ENCODED_BY_GGUF)
def test_bytes_are_those_of_gguf(block_type, family):
    if family in ("zeros of both signs", "only negative zeros"):
        pytest.skip("the gguf package and ggml differ in the sign of a zero")
    assert np.array_equal(
        quantize(FAMILIES[family], block_type), gguf.quants.quantize(FAMILIES[family], their(block_type))
    )


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_any_bytes_are_decoded_as_by_gguf(block_type):
    blocks = random_blocks(block_type)
    ours, theirs = dequantize(blocks, block_type), gguf.quants.dequantize(blocks, their(block_type))
    assert ours.dtype == np.float32 and np.array_equal(ours, theirs)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_layouts_lose_nothing(block_type):
    kind = BLOCK_TYPES[block_type]
    blocks = random_blocks(block_type)
    if block_type == "TQ1_0":  # not every byte is made of trits
        blocks = quantize(FAMILIES["ternary"], block_type).reshape(-1, kind.nbytes)
    assert np.array_equal(kind.pack(kind.unpack(blocks)), blocks)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_size_is_that_of_gguf(block_type):
    kind = BLOCK_TYPES[block_type]
    assert (kind.weights, kind.nbytes) == gguf.GGML_QUANT_SIZES[their(block_type)]
    assert kind.bits_per_weight == BITS[block_type]


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_codes_lie_in_the_order_of_the_weights(block_type):
    """Rising weights have codes that rise, within each sub-block: no weight was stored in another one's place."""
    kind = BLOCK_TYPES[block_type]
    fields = unpack(quantize(np.linspace(-1, 1, kind.weights), block_type), block_type)
    if block_type in ("Q4_0", "Q5_0"):  # the largest weight is the first, -1, so that d is positive
        assert fields["d"][0] > 0
    values = dequantize(quantize(np.linspace(-1, 1, kind.weights), block_type), block_type)
    assert np.all(np.diff(values) >= -0.1) and values[0] == values.min() and values[-1] == values.max()


@pytest.mark.parametrize(
    ("block_type", "limit"),
    [("Q4_0", 1 / 8), ("Q5_0", 1 / 16), ("Q8_0", 1 / 254), ("Q4_1", 1 / 15), ("Q5_1", 1 / 31), ("MXFP4", 1 / 3)],
)
def test_error_bound(block_type, limit):
    """Largest error by the largest weight of a block: a step on the short side of Q4_0 and Q5_0; half a step in Q8_0;
    half a step of a range of twice the largest weight in Q4_1 and Q5_1; and of MXFP4, 8 is cut off to 6 at worst, a
    quarter, which float16 has no part in. The scale itself is rounded to 11 bits."""
    x = FAMILIES["heavy tails"].reshape(-1, 32)
    error = abs(dequantize(quantize(x, block_type), block_type) - x).max(-1)
    assert np.all(error <= abs(x).max(-1) * (limit + 2**-10)) and np.all(error > 0)


@pytest.mark.parametrize("block_type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_an_importance_matrix_lowers_the_error_that_it_asks_about(block_type):
    x, imatrix = FAMILIES["normal"], IMPORTANCES["spread"]
    plain, searched = (dequantize(quantize(x, block_type, i), block_type) for i in (None, imatrix))
    assert (imatrix * (searched - x) ** 2).sum() < (imatrix * (plain - x) ** 2).sum()


@pytest.mark.parametrize("block_type", ["TQ1_0", "TQ2_0"])
def test_ternary_numbers_are_kept(block_type):
    x = FAMILIES["ternary"]
    scale = np.float32(np.float16(abs(x).max()))
    assert np.array_equal(dequantize(quantize(x, block_type), block_type), np.sign(x) * scale)


@given(arrays(np.float32, (1, 32), elements=st.floats(-1e5, 1e5, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)))
def test_any_block_is_that_of_gguf(x):
    x = x + np.float32(0)  # of negative zeros the gguf package and ggml make zeros of different signs
    assert np.array_equal(quantize(x), gguf.quants.quantize(x, their("Q4_0")))


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_the_smallest_numbers_become_zero(block_type):
    """Where 1 / d overflows float32, llama.cpp's result is undefined; here the block decodes to zeros."""
    x = np.full((1, 256), 1e-42, np.float32)
    assert np.all(abs(dequantize(quantize(x, block_type), block_type)) <= 2.0**-125)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_tensor_in_tensor_out(block_type):
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    blocks = quantize(x, block_type)
    kind = BLOCK_TYPES[block_type]
    assert blocks.shape == (3, 512 // kind.weights * kind.nbytes)
    assert np.array_equal(blocks.numpy(), quantize(x.float().numpy(), block_type))
    assert torch.equal(dequantize(blocks, block_type), torch.from_numpy(dequantize(blocks.numpy(), block_type)))


def test_leading_dimensions_are_kept():
    assert quantize(np.zeros((2, 3, 64))).shape == (2, 3, 36) and dequantize(quantize(np.zeros(32))).shape == (32,)
    assert quantize(np.zeros((2, 3, 256)), "Q4_K", np.ones(256)).shape == (2, 3, 144)
    assert quantize(np.zeros((0, 64))).shape == (0, 36)


@pytest.mark.parametrize("imatrix", [None, np.ones(256)], ids=["plain", "imatrix"])
def test_long_inputs_are_worked_on_piece_by_piece(imatrix, monkeypatch):
    x = np.random.RandomState(0).standard_normal((7, 256))
    whole = quantize(x, "Q4_K", imatrix), dequantize(quantize(x, "Q4_K", imatrix), "Q4_K")
    monkeypatch.setattr("qlearn.formats.gguf_blocks.AT_A_TIME", 600)
    pieces = quantize(x, "Q4_K", imatrix), dequantize(quantize(x, "Q4_K", imatrix), "Q4_K")
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_encoding_again_changes_nothing():
    """The largest weight comes back as -8 d exactly, so the second encoding finds the same d and the same codes."""
    blocks = quantize(FAMILIES["heavy tails"])
    assert np.array_equal(quantize(dequantize(blocks)), blocks)


@pytest.mark.parametrize("bits", range(2, 9))
def test_arrays_and_tensors_agree_at_every_width(bits):
    x = FAMILIES["heavy tails"].reshape(-1, 32)
    codes, d = signed_max(x, bits)
    codes_t, d_t = signed_max(torch.from_numpy(x), bits)
    assert np.array_equal(codes, codes_t.numpy()) and np.array_equal(d, d_t.numpy())
    values, values_t = signed_max_values(codes, d, bits), signed_max_values(codes_t, d_t, bits)
    assert np.array_equal(values, values_t.numpy()) and codes.max() <= 2**bits - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(np.zeros((2, 33))), r"\(2, 33\) do not divide into blocks of 32"),
        (lambda: quantize(np.zeros((2, 128)), "Q4_K"), r"\(2, 128\) do not divide into blocks of 256"),
        (lambda: quantize(np.zeros((2, 0))), "do not divide"),
        (lambda: quantize(1.0), "do not divide"),
        (lambda: quantize(np.full(32, np.nan)), "32 of the numbers are not finite"),
        (lambda: quantize(np.full(32, np.inf)), "not finite"),
        (lambda: quantize(np.full(32, 1e39)), "not finite"),
        (lambda: quantize(np.full(32, 1e6)), "does not fit float16"),
        (lambda: quantize(np.full(256, -1e9), "Q4_K"), "does not fit float16"),
        (lambda: quantize(np.zeros(32), "Q9_9"), "'Q9_9' is unknown; choose from Q4_0, Q4_1"),
        (lambda: quantize(np.zeros(64), "Q4_0", np.ones(32)), r"imatrix of shape \(32,\) does not fit rows of 64"),
        (lambda: quantize(np.zeros(32), "Q4_0", -np.ones(32)), "negative or not finite"),
        (lambda: quantize(np.zeros(32), "Q4_0", np.full(32, np.nan)), "negative or not finite"),
        (lambda: dequantize(np.zeros(17, np.uint8)), "no whole Q4_0 blocks"),
        (lambda: dequantize(np.zeros(18, np.float32)), "no whole Q4_0 blocks"),
        (lambda: unpack(np.zeros(143, np.uint8), "Q4_K"), "no whole Q4_K blocks"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
