"""Matrices in the microscaling formats: what is stored, byte for byte, and that it survives files and whole models."""

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlearn import quantize
from qlearn.evaluate import model_bytes
from qlearn.formats.microscaling import BLOCK_FORMATS
from qlearn.methods.microscaling import mxfp4, mxfp8, nvfp4
from qlearn.models import QuantizationConfig, QuantLinear, quantize_model
from qlearn.scales import QuantizedScales
from qlearn.tensor import QuantizedTensor

VARIANTS = {  # method and options -> the format
    "mxfp4": ("mxfp4", 4, {}),
    "mxfp6": ("mxfp6_e2m3", 6, {}),
    "mxfp6 e3m2": ("mxfp6_e3m2", 6, {"element": "e3m2"}),
    "mxfp8": ("mxfp8_e4m3", 8, {}),
    "mxfp8 e5m2": ("mxfp8_e5m2", 8, {"element": "e5m2"}),
    "mxint8": ("mxint8", 8, {}),
    "nvfp4": ("nvfp4", 4, {}),
}
METHODS = ("mxfp4", "mxfp6", "mxfp8", "mxint8", "nvfp4")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_method = pytest.mark.parametrize("method", METHODS)


def bits_of(method):
    return VARIANTS[method][1]


def quantized(weight, variant, **options):
    _, bits, more = VARIANTS[variant]
    return quantize(weight, variant.split()[0], bits=bits, **more, **options)


@pytest.fixture
def weight():
    return torch.randn(24, 320, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("ties", ["even", "away"])
@pytest.mark.parametrize("mse", [False, True], ids=["first rule", "mse"])
@every_variant
def test_it_is_what_the_format_makes_of_the_matrix(weight, variant, mse, ties):
    format = BLOCK_FORMATS[VARIANTS[variant][0]]
    options = {"scale_rule": "mse"} if mse else {}
    qt = quantized(weight, variant, ties=ties, **options)
    assert torch.equal(qt.dequantize(), format.round(weight, ties=ties, **options))
    assert qt.block == (1, format.block_size) and qt.format is format.element
    for group_size in (None, format.block_size):
        assert torch.equal(quantized(weight, variant, group_size=group_size).packed, quantized(weight, variant).packed)


@every_variant
def test_the_bytes(weight, variant):
    format = BLOCK_FORMATS[VARIANTS[variant][0]]
    qt = quantized(weight, variant)
    assert qt.packed.numel() == weight.numel() * format.element.bits // 8
    assert qt.scales.float().shape == (24, 320 // format.block_size)
    if variant == "nvfp4":
        assert isinstance(qt.scales, QuantizedScales) and qt.scales.steps.dtype == torch.float32
        assert qt.nbytes == weight.numel() // 2 + weight.numel() // 16 + 4
        assert qt.bits_per_weight == 4.5 + 32 / weight.numel()
    else:
        assert qt.scales.dtype == torch.float8_e8m0fnu
        assert qt.bits_per_weight == format.bits_per_element == format.element.bits + 0.25


def test_nvfp4_read_by_hand(weight):
    """The bytes, as someone with ml_dtypes would read them."""
    qt = nvfp4(weight)
    packed = qt.packed.numpy()
    elements = np.stack([packed & 15, packed >> 4], -1).reshape(24, 320).view(ml_dtypes.float4_e2m1fn)
    scales = qt.scales.packed.numpy().view(ml_dtypes.float8_e4m3fn).reshape(24, 20).astype(np.float32)
    steps = scales * qt.scales.steps.numpy()
    assert qt.scales.steps.item() == np.float32(weight.abs().max().item()) / np.float32(448 * 6)
    assert np.array_equal(qt.dequantize(), elements.astype(np.float32) * steps.repeat(16, 1))


def test_mxfp4_can_be_that_of_llama_cpp(weight):
    qt = mxfp4(weight, scale_rule="ggml", ties="ggml")
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.MXFP4)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(qt.dequantize(), theirs)
    assert np.array_equal(qt.scales.view(torch.uint8), blocks[:, ::17])


def test_mxint8_shows_signed_codes(weight):
    qt = quantized(weight, "mxint8")
    assert qt.codes().dtype == torch.int8 and qt.codes().min() >= -127
    scales = qt.scales.float().repeat_interleave(32, 1)
    assert torch.equal(qt.codes(), (64 * weight / scales).round().clamp(-127, 127).char())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_method
def test_other_types_of_weights(weight, method, dtype):
    weight = weight.to(dtype)
    qt = quantized(weight, method)
    assert torch.equal(qt.dequantize(), quantized(weight.float(), method).dequantize())


@every_method
def test_zeros_and_a_single_row(method):
    assert not quantized(torch.zeros(3, 64), method).dequantize().any()
    row = torch.tensor([[1.5, -3.0] * 16])
    assert torch.equal(quantized(row, method, **({"tensor_scale": 1.0} if method == "nvfp4" else {})).dequantize(), row)


def test_a_tensor_scale_that_two_matrices_share(weight):
    shared = torch.cat([weight, 3 * weight])
    together = nvfp4(shared)
    step = together.scales.steps.item()
    for part in (weight, 3 * weight):
        alone = nvfp4(part, tensor_scale=step)
        assert alone.scales.steps.item() == step
    assert torch.equal(nvfp4(weight, tensor_scale=step).dequantize(), together.dequantize()[:24])


@every_variant
def test_saved_and_loaded(weight, variant, tmp_path):
    qt = quantized(weight, variant)
    qt.save(tmp_path / "weight.safetensors")
    again = QuantizedTensor.load(tmp_path / "weight.safetensors")
    assert torch.equal(again.dequantize(), qt.dequantize()) and again.metadata() == qt.metadata()
    assert again.nbytes == qt.nbytes and again.format == qt.format
    if variant != "nvfp4":
        assert again.scales.dtype == torch.float8_e8m0fnu


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, **sizes)).eval().requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_a_whole_model_comes_back_bit_for_bit(model, method, dtype, tmp_path):
    model.save_pretrained(tmp_path / "floats")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=dtype)
    before = logits(model)
    quantize_model(model, method, bits=bits_of(method), group_size=None, progress=False)
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(again), logits(model))
    layer = again.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantLinear) and layer.quantized.block == (1, 16 if method == "nvfp4" else 32)
    stored = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "down_proj" in n}
    assert sum(t.nbytes for t in stored.values()) == layer.quantized.nbytes
    assert model_bytes(again, dtype) == model_bytes(model, dtype)


@every_method
def test_quantized_while_loading(model, method, tmp_path):
    model.save_pretrained(tmp_path)
    config = QuantizationConfig(method, bits=bits_of(method), group_size=None)
    while_loading = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    in_place = quantize_model(model, method, bits=bits_of(method), group_size=None, progress=False)
    assert torch.equal(logits(while_loading), logits(in_place))


@every_method
def test_a_change_of_dtype_leaves_scales_alone(weight, method):
    layer = QuantLinear(quantized(weight, method))
    before = layer.quantized.dequantize()
    assert torch.equal(layer.half().quantized.dequantize(), before)
    assert torch.equal(layer.to(torch.bfloat16).quantized.dequantize(), before)


def test_a_layer_that_does_not_divide_is_named_and_the_model_is_left_as_it_was(model):
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 64)
    with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.down_proj \(64 x 40\): the blocks of 32 weights"):
        quantize_model(model, "mxfp4", bits=4, group_size=32, progress=False)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("mxfp4", {"bits": 3}, "bits=3 is not what mxfp4 stores; pass bits=4"),
        ("mxfp8", {"bits": 4}, "bits=4 is not what mxfp8 stores; pass bits=8"),
        ("mxfp4", {"group_size": 64}, "group_size=64 is not the block of mxfp4; pass group_size=32, or None"),
        ("nvfp4", {"group_size": 32}, "group_size=32 is not the block of nvfp4; pass group_size=16, or None"),
        ("mxfp6", {"element": "e4m3"}, "element='e4m3' is unknown for mxfp6; choose from e2m3, e3m2"),
        ("mxint8", {"scale_rule": "up"}, "scale_rule 'up' is unknown for mxint8: choose from floor, ceil"),
        ("mxfp4", {"ties": "odd"}, "ties 'odd' is unknown"),
        ("nvfp4", {"tensor_scale": -1.0}, "tensor_scale -1.0 is out of range"),
    ],
)
def test_arguments_that_are_refused(weight, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, method, **{"bits": bits_of(method), **arguments})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 48), "the blocks of 32 weights of mxfp8 do not divide 48 columns; leave this matrix out"),
        (torch.full((2, 32), torch.nan), "64 of 64 weights are not finite"),
        (torch.full((2, 32), -torch.inf), "64 of 64 weights are not finite"),
        (torch.ones(32), "is no matrix"),
        (torch.ones(2, 32, dtype=torch.int32), "is not floating point"),
    ],
)
def test_matrices_that_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        mxfp8(weight)
