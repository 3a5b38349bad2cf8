"""The table of types is ggml's; plain numbers are encoded as torch and the package gguf do it."""

import gguf
import numpy as np
import pytest
import torch

from qlearn.export.tensor_types import TENSOR_TYPES, decode, encode
from qlearn.formats.gguf_blocks import BLOCK_TYPES

RNG = np.random.default_rng(0)
NUMBERS = np.float32(
    [[0.0, -0.0, 1.0, -2.5, 1e-3, 65504.0, 2.0**-24, 2.0**-25 * 1.5, 1 / 3, 1.00390625, 1.01171875, -1e-7]]
)
NOT_IN_GGUF = {"Q2_0"}  # newer than the package
OUTDATED = {"Q8_1"}  # two float16 in ggml-common.h, two float32 in the package; no file holds it


@pytest.mark.parametrize("type", [type for name, type in TENSOR_TYPES.items() if name not in NOT_IN_GGUF | OUTDATED])
def test_numbers_and_sizes_are_ggmls(type):
    theirs = gguf.GGMLQuantizationType[type.name]
    assert type.id == theirs and (type.weights, type.nbytes) == gguf.GGML_QUANT_SIZES[theirs]


def test_no_type_of_the_package_gguf_is_missing():
    assert {type.name for type in gguf.GGMLQuantizationType} | NOT_IN_GGUF == TENSOR_TYPES.keys()


def test_sizes_are_those_of_the_codecs():
    for name, block in BLOCK_TYPES.items():
        assert (TENSOR_TYPES[name].weights, TENSOR_TYPES[name].nbytes) == (block.weights, block.nbytes)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_numbers(name):
    type = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    expected = torch.from_numpy(NUMBERS).to(type)
    assert np.array_equal(encode(NUMBERS, name), expected.view(torch.uint8).numpy())
    theirs = gguf.quants.quantize(NUMBERS, gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(NUMBERS, name), theirs.view(np.uint8))
    assert np.array_equal(decode(encode(NUMBERS, name), name), expected.float().numpy())


@pytest.mark.parametrize(
    ("name", "dtype"), [("F64", "<f8"), ("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")]
)
def test_plain_numbers_that_are_only_read(name, dtype):
    numbers = np.array([[1, -2, 100]], dtype)
    assert decode(numbers.view(np.uint8), name).tolist() == [[1, -2, 100]]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_decoded_as_the_package_gguf_does(name):
    blocks = encode(RNG.standard_normal((3, 512)).astype(np.float32), name)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert decode(blocks, name).shape == (3, 512) and np.array_equal(decode(blocks, name), theirs)


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M"])
def test_other_blocks_are_left_to_the_package_gguf(name):
    blocks = RNG.integers(0, 256, (2, TENSOR_TYPES[name].nbytes), np.uint8)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(decode(blocks, name), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        ([[1.0, np.nan]], "F32", "1 of the numbers are not finite"),
        ([[np.inf, -np.inf]], "Q4_0", "2 of the numbers are not finite"),
        ([[1e5, -7e4]], "F16", "100000 is beyond the range of F16; use F32"),
        ([[3.4e38]], "BF16", "3.4e\\+38 is beyond the range of BF16"),
        ([[1.0] * 33], "Q4_0", "do not divide into blocks of 32"),
        ([[1.0]], "IQ4_NL", "type 'IQ4_NL' cannot be written; choose from F32, F16, BF16, Q4_0"),
        ([[1.0]], "F64", "type 'F64' cannot be written"),
    ],
    ids=["NaN", "infinity", "F16 overflow", "BF16 overflow", "half a block", "read only", "F64"],
)
def test_what_cannot_be_held_is_told(x, name, message):
    with pytest.raises(ValueError, match=message):
        encode(np.float32(x), name)


def test_what_cannot_be_decoded_is_told():
    with pytest.raises(ValueError, match="type Q8_K is not decoded here"):
        decode(np.zeros((1, 292), np.uint8), "Q8_K")
