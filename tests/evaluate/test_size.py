"""Bits and bytes, counted by hand and against a file."""

import struct

import pytest
import torch

import qlearn
from qlearn.evaluate import bits_per_weight, model_bytes, quantized_layers
from qlearn.models.loading import BUNDLED

LINEAR_WEIGHTS = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64)  # two layers of q, k and v, o, and the MLP
OTHER_PARAMETERS = 257 * 32 + 5 * 32  # tied embedding, norms


def test_an_unquantized_model_has_16_bits_a_weight_whatever_it_is_computed_in(model):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert model_bytes(model.to(dtype)) == 2 * (LINEAR_WEIGHTS + OTHER_PARAMETERS)
        assert bits_per_weight(model) == bits_per_weight(model, whole=True) == 16
    assert model_bytes(model.float(), dtype=torch.float32) == 4 * (LINEAR_WEIGHTS + OTHER_PARAMETERS)


def test_an_untied_head_is_counted(make_model):
    assert model_bytes(make_model(tied=False)) == 2 * (LINEAR_WEIGHTS + OTHER_PARAMETERS + 257 * 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("scale_dtype, scale_bytes", [(torch.float16, 2), (torch.float32, 4)])
def test_everything_stored_is_counted(model, bits, scale_dtype, scale_bytes):
    qlearn.quantize_model(model, "absmax", bits=bits, group_size=16, progress=False, scale_dtype=scale_dtype)
    quantized = LINEAR_WEIGHTS * bits // 8 + LINEAR_WEIGHTS // 16 * scale_bytes
    assert len(quantized_layers(model)) == 14
    assert bits_per_weight(model) == 8 * quantized / LINEAR_WEIGHTS
    assert model_bytes(model) == quantized + 2 * OTHER_PARAMETERS
    assert bits_per_weight(model, whole=True) == 8 * model_bytes(model) / (LINEAR_WEIGHTS + OTHER_PARAMETERS)


def test_zeros_are_counted(model):
    qlearn.quantize_model(model, "zero_point", bits=4, group_size=16, progress=False)
    assert bits_per_weight(model) == 4 + 16 / 16 + 4 / 16


def test_the_bundled_model_weighs_what_its_file_does():
    model, _ = qlearn.load_model()
    path = BUNDLED / "model.safetensors"
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))  # safetensors: the length of the header, the header, the tensors
    assert model_bytes(model) == path.stat().st_size - 8 - header
