"""Quantized layers in blocks: the very same weights, or None."""

import gguf
import numpy as np
import pytest
import torch

import qlearn
from qlearn.export.exact import exact
from qlearn.formats.gguf_blocks import dequantize
from qlearn.formats.integers import Integers
from qlearn.models import load_model
from qlearn.tensor import QuantizedTensor
from qlearn.training import qat

torch.manual_seed(0)
WEIGHT = torch.randn(6, 512)


def from_codes(codes, scale_shape=(1, 2), block=(6, 256), bits=2, scale=0.37, dtype=torch.float16):
    scales = torch.full(scale_shape, scale, dtype=dtype)
    return QuantizedTensor.from_codes(codes, scales, Integers(bits), block)


TRITS = from_codes(torch.randint(-1, 2, (6, 512)))
HELD = {
    "signed_absmax 4, 32": (qlearn.quantize(WEIGHT, "signed_absmax", bits=4, group_size=32), "Q4_0"),
    "signed_absmax 2, 32": (qlearn.quantize(WEIGHT, "signed_absmax", bits=2, group_size=32), "Q4_0"),
    "signed_absmax 4, 256": (qlearn.quantize(WEIGHT, "signed_absmax", bits=4, group_size=256), "Q4_0"),
    "signed_absmax 4, row": (qlearn.quantize(WEIGHT, "signed_absmax", bits=4, group_size=None), "Q4_0"),
    "absmax 3, 64": (qlearn.quantize(WEIGHT, "absmax", bits=3, group_size=64), "Q4_0"),
    "absmax 8, 32": (qlearn.quantize(WEIGHT, "absmax", bits=8, group_size=32), "Q8_0"),
    "absmax 8, row": (qlearn.quantize(WEIGHT, "absmax", bits=8, group_size=None), "Q8_0"),
    "absmax 4 in Q8_0": (qlearn.quantize(WEIGHT, "absmax", bits=4, group_size=32), "Q8_0"),
    "rows that share a scale": (from_codes(torch.randint(-8, 8, (6, 512)), (3, 4), (2, 128), bits=4), "Q4_0"),
    "negative scales": (from_codes(torch.randint(-8, 8, (6, 512)), (6, 16), (1, 32), bits=4, scale=-0.2), "Q4_0"),
    "float32 scales that are float16 numbers": (from_codes(TRITS.codes(), scale=0.375, dtype=torch.float32), "TQ2_0"),
    "ternary TQ1_0": (TRITS, "TQ1_0"),
    "ternary TQ2_0": (TRITS, "TQ2_0"),
    "ternary in Q4_0": (TRITS, "Q4_0"),
    "signs": (qlearn.quantize(WEIGHT, "binary", bits=1), "TQ1_0"),
    "trits five to a byte": (qlearn.quantize(WEIGHT, "ternary", bits=1.6), "TQ1_0"),
    "trits in groups": (qlearn.quantize(WEIGHT, "ternary", bits=2, group_size=256), "TQ2_0"),
    "all zero": (from_codes(torch.zeros(6, 512, dtype=torch.int8)), "TQ1_0"),
}


@pytest.mark.parametrize(("quantized", "name"), HELD.values(), ids=HELD)
def test_the_blocks_mean_the_same_weights(quantized, name):
    blocks = exact(quantized, name)
    assert np.array_equal(dequantize(blocks, name), quantized.dequantize().numpy())
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs, quantized.dequantize().numpy())


NOT_HELD = {
    "a zero point": (qlearn.quantize(WEIGHT, "zero_point", bits=4, group_size=32), "Q4_0"),
    "groups of 16": (qlearn.quantize(WEIGHT, "absmax", bits=4, group_size=16), "Q4_0"),
    "groups of 128 for 256": (qlearn.quantize(WEIGHT.sign(), "absmax", bits=2, group_size=128), "TQ1_0"),
    "five bits": (qlearn.quantize(WEIGHT, "absmax", bits=5, group_size=32), "Q4_0"),
    "a code of -2": (from_codes(TRITS.codes() * 2 - (TRITS.codes() > 0) * 2), "TQ2_0"),
    "scales that float16 rounds": (from_codes(TRITS.codes(), dtype=torch.float32), "TQ2_0"),
    "scales beyond float16": (from_codes(TRITS.codes(), dtype=torch.float32, scale=1e6), "TQ2_0"),
    "another grid": (qlearn.quantize(WEIGHT, "absmax", bits=4, group_size=32), "Q4_K"),
    "unsigned codes": (
        QuantizedTensor.from_codes(
            torch.randint(0, 200, (6, 512), dtype=torch.uint8), torch.ones(6, 16).half(), Integers(8, False), (1, 32)
        ),
        "Q8_0",
    ),
    "column scales": (
        QuantizedTensor.from_codes(
            TRITS.codes(), torch.ones(6, 2).half(), Integers(2), (1, 256), column_scales=torch.ones(512)
        ),
        "TQ1_0",
    ),
}


@pytest.mark.parametrize(("quantized", "name"), NOT_HELD.values(), ids=NOT_HELD)
def test_what_a_type_cannot_hold_is_told_by_none(quantized, name):
    assert exact(quantized, name) is None


def test_codebooks_are_not_taken_for_integers():
    from qlearn import formats

    nf4 = formats.get("nf4")
    codes = torch.from_numpy(nf4.encode(WEIGHT.numpy().clip(-1, 1)))
    assert exact(QuantizedTensor.from_codes(codes, torch.ones(6, 16).half(), nf4, (1, 32)), "Q4_0") is None


def test_q4_0_is_signed_absmax_byte_for_byte():
    quantized = qlearn.quantize(WEIGHT, "signed_absmax", bits=4, group_size=32)
    assert np.array_equal(
        exact(quantized, "Q4_0"), gguf.quants.quantize(WEIGHT.numpy(), gguf.GGMLQuantizationType.Q4_0)
    )


@pytest.mark.parametrize("bits", qat.CHECKPOINTS)
def test_the_trained_checkpoints_fit_exactly(bits):
    model, _ = load_model(qat.checkpoint(bits), progress=False)
    layer = model.model.layers[0].mlp.down_proj.quantized
    assert np.array_equal(dequantize(exact(layer, "Q4_0"), "Q4_0"), layer.dequantize().numpy())
