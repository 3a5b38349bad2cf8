"""SINQ's own package, read from its wheel: equal to the last bit in float32, in every variant that both have.

The wheel is never installed: it brings a `sitecustomize` that changes transformers in every Python that starts.
`make test-peers` downloads it into build/peers; SINQ_WHEEL can name another place.

Where the two are meant to differ:

- Integer zeros. Theirs are rounded to 8 bits together with the scales, which moves the weights by up to half a percent;
  ours are kept. With zeros rounded in their way, ours are equal again.
- Without shift, theirs spreads 4-bit weights over the codes -6 ... 6, ours over -7 ... 7.
"""

import os
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qlearn.methods import sinq
from qlearn.methods.asinq import search_input_scale
from qlearn.methods.sinkhorn import sinkhorn
from qlearn.methods.storing import eight_bit_zeros
from tests.peers.weights import difference, rounding, weights

BUILD = Path(__file__).parents[2] / "build" / "peers"
WHEEL = os.environ.get("SINQ_WHEEL") or next(map(str, BUILD.glob("sinq-*.whl")), None)

pytestmark = [pytest.mark.peers, pytest.mark.skipif(WHEEL is None, reason="make test-peers downloads it")]
WEIGHTS = weights()
EXACT = {"scale_dtype": torch.float32}


@pytest.fixture(scope="module")
def package():
    """The package's modules by name. Its calibration data come from `datasets`, which is of no use here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=None))
        patch.syspath_prepend(WHEEL)
        from sinq import awq, optimize, quantizer, sinkhorn

        yield types.SimpleNamespace(awq=awq, optimize=optimize, quantizer=quantizer, sinkhorn=sinkhorn)


@pytest.fixture
def theirs(package, monkeypatch):
    """(weight, bits, method, gate, tiling) -> (what is read back, meta)."""
    Quantizer = package.quantizer.Quantizer

    def run(weight, bits, method, gate=None, **options):
        parameters = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": 20, "kurtosis_threshold": gate}
        solver = partial(package.optimize.optimize_weights_proximal_legacy, opt_params=parameters)
        monkeypatch.setattr(Quantizer, "optimize_weights", solver)
        options = {"group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32} | options
        codes, meta = Quantizer.quantize(weight, None, nbits=bits, method=method, **options)
        return Quantizer.dequantize(codes, meta).float(), meta

    return run


@pytest.mark.parametrize("order", [8, 16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_balancing_is_equal_to_the_last_bit(package, name, order):
    tiles = WEIGHTS[name].unflatten(1, (-1, 64)).transpose(0, 1).contiguous()
    ours = sinkhorn(tiles, order)
    balanced, mu1, mu2 = torch.vmap(lambda tile: package.sinkhorn.sinkhorn_log(tile, order))(tiles)
    assert torch.equal(ours.balanced, balanced)
    assert torch.equal(ours.mu1, mu1) and torch.equal(ours.mu2, mu2[..., 0])


VARIANTS = {  # their name -> our options
    "sinq": {},
    "sinq_hqq": {"hqq": True},
    "sinq_hqq_quantAux": {"hqq": True, "small_scales": True},
    "sinq_nf4": {"normal_float": True},
    "sinq_nf3": {"normal_float": True},
    "sinq_nf4_quantAux": {"normal_float": True, "small_scales": True},
}
CASES = [(v, b) for v in VARIANTS for b in (8, 4, 3, 2) if "nf" not in v or f"nf{b}" in v]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("variant", "bits"), CASES, ids=lambda x: str(x))
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_equal(theirs, name, variant, bits):
    weight = WEIGHTS[name]
    qt = sinq(weight, bits, 64, **VARIANTS[variant], **EXACT)
    back, _ = theirs(weight, bits, variant)
    assert difference(qt.dequantize(), back) < 1e-7
    stored = sinq(weight, bits, 64, **VARIANTS[variant])  # in float16
    assert ((stored.dequantize() - back).abs() <= rounding(stored)).all()
    assert difference(stored.dequantize(), back) < 1e-3 or "." not in name


@pytest.mark.parametrize("name", WEIGHTS)
def test_square_tiles(theirs, name):
    weight = WEIGHTS[name]
    qt = sinq(weight, 4, 64, tile_rows=64, **EXACT)
    assert qt.column_scales.shape == (len(weight) // 64, weight.shape[1])
    assert difference(qt.dequantize(), theirs(weight, 4, "sinq", tiling_mode="2D")[0]) < 1e-7


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros_in_8_bits(theirs, name, bits):
    """What their default does, and why it is not done here: it loses something, and takes more room."""
    weight = WEIGHTS[name]
    qt = sinq(weight, bits, 64, small_scales=True, **EXACT)
    back, _ = theirs(weight, bits, "sinq_quantAux")
    rounded = replace(qt, zeros=eight_bit_zeros(qt.zero_points()))
    assert difference(rounded.dequantize(), back) < 1e-6
    assert (qt.dequantize() - weight).norm() <= (back - weight).norm() * 1.0005 and qt.nbytes <= rounded.nbytes


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj", "outliers"])
def test_the_gate(theirs, name):
    """The first and the last are beyond it. Theirs balances them all the same and multiplies the scales back before it
    rounds, which moves weights that lie on a tie; ours is equal when it is given those."""
    weight = WEIGHTS[name]
    back, _ = theirs(weight, 4, "sinq", gate=5.0)
    qt = sinq(weight, 4, 64, kurtosis=5.0, **EXACT)
    gated = qt.column_scales is None
    assert gated == (name != "mlp.up_proj") and difference(qt.dequantize(), back) < 0.01
    if gated:
        balanced, mu1, mu2, _ = sinkhorn(weight.unflatten(1, (-1, 64)).transpose(0, 1))
        weight = (balanced * mu1[:, None] * mu2[..., None]).transpose(0, 1).reshape(weight.shape)
        qt = sinq(weight, 4, 64, order=1, **EXACT)
    assert difference(qt.dequantize(), back) < 1e-7


@pytest.mark.parametrize(("bits", "largest"), [(8, 126), (4, 6), (3, 2)])
def test_without_shift_theirs_leaves_codes_unused(theirs, bits, largest):
    """Theirs is absmax with this largest code; with our own, the error is smaller."""
    weight = WEIGHTS["mlp.up_proj"]
    back, _ = theirs(weight, bits, "sinq_noz")
    balanced, mu1, mu2, _ = sinkhorn(weight.unflatten(1, (-1, 64)).transpose(0, 1))
    scale = balanced.abs().amax(-1, keepdim=True) / largest
    plain = ((balanced / scale).round() * (scale * mu2[..., None]) * mu1[:, None]).transpose(0, 1).reshape(weight.shape)
    assert difference(plain, back) < 1e-6
    ours = sinq(weight, bits, 64, shift=False, **EXACT).dequantize()
    assert (ours - weight).norm() < (back - weight).norm()


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj", "normal"])
def test_the_scale_of_asinq(package, name, bits):
    """Theirs does not try to do without: where that is best, we look at the best of the rest."""
    weight = WEIGHTS[name]
    x = torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(1))
    x[:, ::7] *= 30
    limits = [0, 2**bits - 1]
    theirs = package.awq.compute_awq_scale(weight, x[None], limits, tile=64, method="sinq_awq_l1")
    found = search_input_scale(weight, bits, 64, inputs=x)
    losses = {ratio: loss for ratio, loss in found.losses.items() if ratio is not None}
    best = min(losses, key=losses.get)
    s = x.abs().mean(0) ** best / (weight.abs().mean(0) ** (1 - best) + 1e-4)
    torch.testing.assert_close(theirs, s / (s.max() * s.min()).sqrt(), rtol=1e-5, atol=0)
    assert found.ratio in (best, None)
