"""The compiled deviations: the same bits as torch's, and so the same balanced matrices."""

import numpy as np
import pytest
import torch

from qlearn.kernels.cpu import sinkhorn as kernel
from qlearn.kernels.cpu.sinkhorn import LANES, scaled_deviations
from qlearn.kernels.dispatch import use
from qlearn.methods import sinkhorn as method
from qlearn.methods.sinkhorn import deviations, sinkhorn
from tests.methods.test_sinkhorn import EDGES, lopsided

SHAPES = [
    (2, 2),
    (2, 9),
    (9, 2),
    (LANES, 64),
    (LANES + 1, 5),
    (24, 16),
    (256, 64),
    (3, 24, 16),
    (2, 1, 24, 16),
]


def scales(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    *tiles, rows, columns = shape
    return torch.rand(*tiles, 1, columns, generator=generator) + 0.5, torch.rand(
        *tiles, rows, 1, generator=generator
    ) + 0.5


def agree(tile, mu1, mu2):
    found, expected = scaled_deviations(tile, mu1, mu2), deviations(tile / mu1 / mu2)
    return all(
        a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_bits_are_those_of_torch(shape, size):
    for seed in range(5):
        tile = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert agree(tile, *scales(shape, seed))


@pytest.mark.parametrize("offset", [1.0, 1e6], ids=str)
def test_numbers_far_from_zero(offset):
    """Where a sum of squares minus the square of a sum would lose everything."""
    tile = lopsided() + offset
    assert agree(tile, *scales(tile.shape))
    columns, _ = scaled_deviations(tile, torch.ones(1, 16), torch.ones(24, 1))
    np.testing.assert_allclose(columns[0], tile.double().numpy().std(0, ddof=1), rtol=2e-7)


@pytest.mark.parametrize("tile", EDGES.values(), ids=EDGES)
def test_edges(tile, monkeypatch):
    assert agree(tile.float(), *scales(tile.shape))
    same(tile, monkeypatch)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row_and_column(bad):
    tile = lopsided()
    tile[5, 3] = bad
    assert agree(tile, *scales(tile.shape))


def same(tile, monkeypatch, **options):
    monkeypatch.setattr(method, "COMPILED_FROM", 1)
    with use("reference"):
        expected = sinkhorn(tile, **options)
    found = sinkhorn(tile, **options)
    for a, b in zip((*found[:3], found.history.imbalance), (*expected[:3], expected.history.imbalance), strict=True):
        assert torch.equal(a, b)
    return found, expected


@pytest.mark.parametrize("order", [1, 2, 16, 40])
def test_balancing_is_the_same(order, monkeypatch):
    same(torch.stack([lopsided(seed=s) for s in range(20)]), monkeypatch, order=order)


def test_the_states_are_the_same(monkeypatch):
    found, expected = same(lopsided(), monkeypatch, matrices=True)
    pairs = zip(found.history.matrices, expected.history.matrices, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_tiles_of_a_matrix_that_lie_apart_in_memory(monkeypatch):
    tiles = lopsided(48, 64).unflatten(0, (2, 24)).unflatten(2, (4, 16)).transpose(1, 2)
    assert not tiles.is_contiguous()
    same(tiles, monkeypatch)


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_threads_share_the_tiles(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tiles = torch.stack([lopsided(seed=s) for s in range(5)])
    assert agree(tiles, *scales(tiles.shape))


def test_where_it_is_used(monkeypatch):
    calls = []
    monkeypatch.setattr(kernel, "scaled_deviations", lambda *of: calls.append(of[0].shape) or deviations(of[0]))
    large, small = torch.randn(2, 256, 64), torch.randn(8, 8)
    sinkhorn(small, order=1)
    sinkhorn(large.requires_grad_(True), order=1)
    with use("reference"):
        sinkhorn(large.detach(), order=1)
    assert not calls
    sinkhorn(large.detach(), order=1)
    assert calls == [(2, 256, 64)]
