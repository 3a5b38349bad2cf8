"""HQQ's own package: the same codes, scales and zeros, with both of its solvers and along both axes.

Both compute in float32 on a CPU. A mean of 64 numbers may be added up in another order, so zeros are equal to within a
few units of their last place (1e-6 of a weight's size was the most that was seen), and not one code differs.
"""

from functools import partial

import pytest
import torch

from qlearn.methods import hqq
from tests.peers.weights import difference, rounding, weights

optimize = pytest.importorskip("hqq.core.optimize", reason="make test-peers installs it")
from hqq.core.quantize import Quantizer  # noqa: E402 - after the check that it is there

pytestmark = pytest.mark.peers
WEIGHTS = weights()
BITS = (8, 4, 3, 2, 1)
SOLVERS = {None: optimize.optimize_weights_proximal_legacy, 1.01: partial(optimize.optimize_weights_proximal_v2)}
EXACT = {"scale_dtype": torch.float32, "zero_dtype": torch.float32}


@pytest.fixture
def theirs(monkeypatch):
    """(weight, bits, kappa, axis) -> (what is read back, codes)."""

    def run(weight, bits, kappa=None, axis=1):
        monkeypatch.setattr(Quantizer, "optimize_weights", SOLVERS[kappa])
        options = {"group_size": 64, "axis": axis, "round_zero": bits == 4, "device": "cpu", "bitpack": False}
        codes, meta = Quantizer.quantize(weight, nbits=bits, compute_dtype=torch.float32, **options)
        return Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32}), codes

    return run


@pytest.mark.parametrize("kappa", SOLVERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_equal_and_so_are_weights_but_for_the_last_place(theirs, name, bits, kappa):
    weight = WEIGHTS[name]
    back, codes = theirs(weight, bits, kappa)
    qt = hqq(weight, bits, 64, kappa=kappa, **EXACT)
    assert torch.equal(qt.codes().flatten().float(), codes.flatten())
    assert difference(qt.dequantize(), back) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_float16_scales_and_zeros_add_their_rounding_and_no_more(theirs, bits):
    for name, weight in WEIGHTS.items():
        qt, (back, _) = hqq(weight, bits, 64), theirs(weight, bits)
        assert ((qt.dequantize() - back).abs() <= rounding(qt)).all()
        assert difference(qt.dequantize(), back) < 1e-3 or "." not in name


@pytest.mark.parametrize("bits", BITS)
def test_along_columns(theirs, bits):
    """Their groups are rows i, i + n, i + 2n ... of a column, n = rows / 64; ours are consecutive rows. So the rows are
    put in that order first, and back afterwards."""
    weight = WEIGHTS["self_attn.q_proj"]
    rows, columns = weight.shape
    ordered = weight.view(64, rows // 64, columns).transpose(0, 1).reshape(rows, columns)
    qt = hqq(ordered, bits, 64, axis=0, **EXACT)
    ours = qt.dequantize().view(rows // 64, 64, columns).transpose(0, 1).reshape(rows, columns)
    back, _ = theirs(weight, bits, axis=0)
    assert difference(ours, back) < 1e-6
