"""A-SINQ: the search written out, its bound against plain SINQ, what is stored, and bad input."""

import pytest
import torch

from qlearn import QuantizedTensor, quantize
from qlearn.methods import asinq, sinq
from qlearn.methods.asinq import search_input_scale
from qlearn.methods.statistics import InputStatistics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lopsided_inputs(tokens=96, columns=64):
    """Every seventh channel is thirty times as large."""
    x = normal(tokens, columns, seed=1)
    x[:, ::7] *= 30
    return x


def output_error(weight, x, qt):
    return (x @ (qt.dequantize() - weight).T).abs().mean().item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_the_formula(bits):
    weight, x = normal(48, 64), lopsided_inputs()
    found = search_input_scale(weight, bits, 16, inputs=x)
    losses, scales = {}, {}
    for i in range(20):
        alpha = i / 20
        s = x.abs().mean(0) ** alpha
        s = torch.clamp(s / (weight.abs().mean(0) ** (1 - alpha) + 1e-4), min=1e-4)
        scales[alpha] = s / (s.max() * s.min()) ** 0.5
        losses[alpha] = output_error(
            weight, x, sinq(weight, bits, 16, input_scale=scales[alpha], scale_dtype=torch.float32)
        )
    best = min(losses, key=losses.get)
    assert found.ratio == best > 0
    torch.testing.assert_close(found.scale, scales[best])
    assert {k: v for k, v in found.losses.items() if k is not None} == pytest.approx(losses, rel=1e-4)
    qt = asinq(weight, bits, 16, inputs=x)
    assert torch.equal(qt.dequantize(), sinq(weight, bits, 16, input_scale=found.scale).dequantize())


@pytest.mark.parametrize("options", [{}, {"normal_float": True}, {"shift": False}, {"small_scales": True}], ids=str)
def test_outputs_err_less_where_inputs_are_lopsided(options):
    weight, x = normal(48, 64), lopsided_inputs()
    ours, plain = asinq(weight, 4, 16, inputs=x, **options), sinq(weight, 4, 16, **options)
    assert output_error(weight, x, ours) < 0.75 * output_error(weight, x, plain)
    assert ours.nbytes <= plain.nbytes + 4 * 48  # the same, but for zeros where a group is all positive now


def test_plain_sinq_where_nothing_is_better():
    weight, x = torch.zeros(4, 16), torch.ones(3, 16)
    found = search_input_scale(weight, 4, 16, inputs=x)
    assert found.ratio is None and found.scale is None and len(found.losses) == 21
    assert torch.equal(asinq(weight, 4, 16, inputs=x).dequantize(), weight)


@pytest.mark.parametrize("seed", range(5))
def test_the_search_never_chooses_what_is_worse(seed):
    weight, x = normal(24, 32, seed=seed), normal(40, 32, seed=seed + 100)
    found = search_input_scale(weight, 3, 16, inputs=x)
    assert found.losses[found.ratio] == min(found.losses.values()) <= found.losses[None]


def test_statistics_do_as_well_as_inputs():
    weight, x = normal(48, 64), lopsided_inputs()
    statistics = InputStatistics.from_inputs(x, hessian=False)
    assert torch.equal(
        asinq(weight, 4, 16, inputs=statistics).dequantize(), asinq(weight, 4, 16, inputs=x).dequantize()
    )


def test_a_channel_that_is_always_0(tmp_path):
    weight, x = normal(48, 64), lopsided_inputs()
    x[:, 3] = 0
    qt = quantize(weight, "asinq", bits=4, group_size=16, inputs=x)
    assert torch.isfinite(qt.dequantize()).all()
    qt.save(tmp_path / "q.safetensors")
    assert torch.equal(QuantizedTensor.load(tmp_path / "q.safetensors").dequantize(), qt.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.ones(3, 63)}, "inputs of 63 channels do not fit a weight of 64 columns"),
        ({"inputs": InputStatistics(64)}, "there are no inputs to learn from"),
        ({"inputs": torch.full((3, 64), torch.nan)}, "inputs are NaN or infinite"),
        ({"n_grid": 0}, "n_grid=0 is no number of candidates"),
        ({"bits": 1}, "bits=1 is out of range"),
        ({"group_size": 5}, "group_size=5 does not divide"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        asinq(**{"weight": normal(48, 64), "bits": 4, "group_size": 16, "inputs": lopsided_inputs()} | change)
