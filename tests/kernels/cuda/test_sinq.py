"""SINQ in one kernel: the readable method's codes, but where a weight lies at the middle between two."""

import pytest
import torch

from qlearn.kernels.cuda import SIMULATED, sinkhorn, sinq
from qlearn.kernels.cuda.sinq import quantize_sinq
from qlearn.methods import sinkhorn as readable_sinkhorn
from qlearn.methods import sinq as readable

DEVICE = "cpu" if SIMULATED else "cuda"


def random(rows, columns, dtype=torch.bfloat16, seed=0):
    """Rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(columns, generator=generator) + 0.1
    return (weight * (torch.rand(rows, 1, generator=generator) + 0.1)).to(dtype)


def check_same(weight, bits=4, group_size=32, order=3, **options):
    got = quantize_sinq(weight.to(DEVICE), bits, group_size, order=order, **options)
    expected = readable(weight, bits, group_size, order=order, **options)
    assert repr(got) == repr(expected) and got.bits_per_weight == expected.bits_per_weight
    assert got.scales.dtype == expected.scales.dtype
    for name in ("scales", "column_scales"):  # mu1 and mu2 are good to 1e-6: they may be rounded to a neighbour
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and torch.allclose(a.cpu().float(), b.float(), rtol=2**-7.5, atol=0)
            assert (a.cpu() != b).float().mean() <= 0.02
    assert (got.zeros is None) == (expected.zeros is None)
    if got.zeros is not None:
        assert got.zeros.dtype == expected.zeros.dtype and torch.equal(got.zeros.cpu(), expected.zeros)
    differ = got.codes().cpu() != expected.codes()
    assert differ.sum() <= 1  # of some thousand weights; where one differs, it is at the middle between two
    if differ.any():
        assert (got.codes().cpu().int() - expected.codes().int()).abs().max() == 1
    return got


def test_constants_are_those_of_the_readable_method():
    from qlearn.methods.sinq import NARROW, ORDER

    for name in ("STEP", "LOG_MU", "SIGMA"):
        assert getattr(sinkhorn, name) == getattr(readable_sinkhorn, name)
    assert (sinq.NARROW, sinq.ORDER) == (NARROW, ORDER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    assert check_same(random(20, 32, dtype)).column_scales is not None


@pytest.mark.parametrize("bits, shift", [(2, True), (3, False), (8, True)])
def test_grids(bits, shift):
    check_same(random(8, 32), bits, shift=shift, order=2)


def test_wider_tiles():
    check_same(random(10, 64), group_size=64, order=2)


def test_several_tiles_and_bands():
    assert check_same(random(16, 64), tile_rows=8, order=2).column_scales.shape == (2, 64)


@pytest.mark.parametrize("rows", [40, 70], ids=["two members", "three members, of 24, 24 and 22 rows"])
@pytest.mark.usefixtures("side_by_side")
def test_members_of_a_tile_wait_for_each_other(rows):
    check_same(random(rows, 32), order=2)


def test_a_tile_stops_at_its_best_state():
    weight = torch.randn(
        6, 32, generator=torch.Generator().manual_seed(3)
    )  # balanced well enough: steps do not help long
    expected = readable_sinkhorn.sinkhorn(weight, 16)
    assert len(expected.history.imbalance) < 16
    check_same(weight, order=16)


EDGES = {
    "zeros": torch.zeros(3, 32),
    "one row": random(1, 32),
    "order 1": random(3, 32),
    "far from zero, so that zeros are off the grid": 100 + random(4, 32, torch.float32),
    "a mean a thousand times the deviation": 1000 + random(4, 32, torch.float32),
    "an outlier": random(4, 32).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(50.0).bfloat16()),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    check_same(EDGES[name], order=1 if name == "order 1" else 3)


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.zeros(4, 32, dtype=torch.float64), {}, "float64"),
        (torch.zeros(4, 32).T, {}, "one piece|32 columns|group_size"),
        (torch.zeros(4, 48), {}, "48 columns"),
        (torch.zeros(4, 32), {"bits": 6}, "bits=6"),
        (torch.zeros(4, 32), {"order": 0}, "order=0"),
        (torch.zeros(4, 32), {"tile_rows": 3}, "tile_rows=3"),
        (torch.full((4, 32), float("inf")), {}, "not finite"),
        (torch.tensor([[float("nan")] + [1.0] * 31] * 2), {}, "not finite"),
        (torch.full((1, 32), 1e9), {}, "does not fit"),
        (1e20 * torch.arange(64.0).view(2, 32), {}, "overflow"),
    ],
)
def test_what_is_refused(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_sinq(weight.to(DEVICE), **{"bits": 4, "group_size": 32, "order": 2, **options})
