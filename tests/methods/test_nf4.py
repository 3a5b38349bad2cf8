"""NF4: the nearest value by brute force, double quantization written out, true sizes, and every known edge."""

import numpy as np
import pytest
import torch

from qlearn import QuantizedTensor, quantize
from qlearn.formats.codebooks import DYNAMIC8, NF3, NF4
from qlearn.methods import absmax, nf3, nf4, zero_point
from qlearn.methods.nf4 import double_quantized

METHODS = [(nf4, NF4), (nf3, NF3)]


def normal(rows=32, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("method", "codebook"), METHODS, ids=["nf4", "nf3"])
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_each_weight_has_the_nearest_value(method, codebook, group_size):
    weight = normal()
    qt = method(weight, group_size=group_size)
    groups = weight.view(32, -1, group_size).double().numpy()
    largest = np.abs(groups).max(-1, keepdims=True)
    values = np.array(codebook.values)
    nearest = np.abs((groups / largest)[..., None] - values).argmin(-1)
    assert (qt.codes().view(groups.shape).numpy() != nearest).mean() < 1e-4  # float32 beside a midpoint
    np.testing.assert_allclose(qt.dequantize().view(groups.shape), values[qt.codes().view(groups.shape)] * largest,
                               rtol=2**-23)  # fmt: skip


def test_largest_and_zero_come_back_exactly():
    weight = normal()
    weight[:, ::7] = 0
    back = nf4(weight).dequantize()
    at = weight.view(-1, 64).abs().argmax(-1, keepdim=True)
    assert torch.equal(back.view(-1, 64).gather(1, at), weight.view(-1, 64).gather(1, at))
    assert (back[:, ::7] == 0).all()


@pytest.mark.parametrize("shape", [(32, 256), (256, 256), (3, 64), (1, 64), (257, 64)], ids=str)
def test_double_quantization_is_the_nearest_of_the_map(shape):
    """256 scales, one row after another, share a step; the last ones may be fewer."""
    weight = normal(*shape)
    plain, double = nf4(weight), nf4(weight, double_quant=True)
    assert torch.equal(plain.codes(), double.codes())
    flat = plain.scales.flatten().numpy()
    mean = plain.scales.mean().numpy()
    back = np.empty_like(flat)
    values = np.array(DYNAMIC8.values)
    for start in range(0, len(flat), 256):
        part = flat[start : start + 256] - mean
        step = np.abs(part).max() or np.float32(1)
        codes = np.abs(part[:, None].astype(np.float64) / step - values).argmin(1)
        back[start : start + 256] = values[codes].astype(np.float32) * step + mean
    np.testing.assert_allclose(double.scales.float().flatten(), back, rtol=2**-22)


def test_true_sizes():
    weight = normal(256, 256)  # 1024 scales, 4 steps, 1 mean
    assert nf4(weight).bits_per_weight == 4.5 and nf3(weight).bits_per_weight == 3.5
    assert nf4(weight, scale_dtype=torch.float16).bits_per_weight == 4.25
    assert nf4(weight, double_quant=True).nbytes == 65536 // 2 + 1024 + 4 * 4 + 4
    assert nf4(weight, double_quant=True).bits_per_weight == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_errors_on_normal_weights(double_quant):
    """As the file says: less than absmax at equal bits, about as much as zero_point."""
    weight = normal(512, 512)
    error = {m: (m(weight, 4, 64).dequantize() - weight).norm() / weight.norm() for m in (absmax, zero_point)}
    ours = (nf4(weight, double_quant=double_quant).dequantize() - weight).norm() / weight.norm()
    assert ours < 0.87 * error[absmax] and 1 < ours / error[zero_point] < 1.02
    assert [round(float(e), 3) for e in (ours, error[absmax], error[zero_point])] == [0.092, 0.108, 0.091]


EDGES = {
    "zeros": torch.zeros(4, 64),
    "negative zeros": -torch.zeros(4, 64),
    "a constant": torch.full((4, 64), 0.3),
    "one outlier": normal(4, 64) + 100 * torch.nn.functional.one_hot(torch.tensor(7), 64),
    "subnormal": normal(4, 64) * 1e-40,
    "tiny": normal(4, 64) * 1e-30,
    "large": normal(4, 64) * 1e30,
    "float16": normal(4, 64).half(),
    "one row": normal(1, 64),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("weight", EDGES.values(), ids=EDGES)
def test_edges_keep_the_bound(weight, double_quant):
    """Half of the widest gap between two values, 0.152 of the scale; the map errs by up to 0.7 % of its step more."""
    qt = nf4(weight, double_quant=double_quant)
    bound = 0.1520 * weight.float().abs().view(-1, 64).amax(-1)
    if double_quant:
        bound = bound + 0.0071 * qt.scales.steps.max()
    error = (qt.dequantize() - weight.float()).abs().view(-1, 64).amax(-1)
    assert (error <= bound + 1e-39).all() and torch.isfinite(qt.dequantize()).all()


def test_equal_scales_have_a_step_of_zero():
    scales = double_quantized(torch.full((3, 4), 0.75))
    assert (scales.steps == 0).all() and torch.equal(scales.float(), torch.full((3, 4), 0.75))


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"scale_dtype": torch.float16}], ids=str)
def test_save_and_load(tmp_path, options):
    qt = quantize(normal(), "nf4", **options)
    qt.save(tmp_path / "q.safetensors")
    back = QuantizedTensor.load(tmp_path / "q.safetensors")
    assert torch.equal(back.dequantize(), qt.dequantize()) and back.nbytes == qt.nbytes and qt.block == (1, 64)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (nf4, {"bits": 3}, "bits=3 is not what nf4 stores; pass bits=4"),
        (nf3, {"bits": 4}, "bits=4 is not what nf3 stores; pass bits=3"),
        (nf4, {"weight": normal(4, 96)}, "group_size=64 does not divide the 96 columns"),
        (nf4, {"weight": normal() * 1e9, "scale_dtype": torch.float16}, "does not fit torch.float16"),
        (nf4, {"weight": torch.full((1, 64), torch.nan)}, "64 of 64 weights are not finite"),
    ],
)
def test_bad_input(method, change, message):
    with pytest.raises(ValueError, match=message):
        method(**{"weight": normal()} | change)
