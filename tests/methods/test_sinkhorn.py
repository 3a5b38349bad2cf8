"""Balancing: the algorithm written out in NumPy, what it must leave alone, and every known edge."""

import numpy as np
import pytest
import torch

from qlearn.methods.sinkhorn import deviations, imbalance, sinkhorn


def normal(rows=24, columns=16, seed=0, scale=0.05):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def lopsided(rows=24, columns=16, seed=0):
    """Normal numbers whose rows and columns have been given sizes of their own."""
    sizes = (2 * torch.rand(n, generator=torch.Generator().manual_seed(seed + n)) for n in (rows, columns))
    return normal(rows, columns, seed) * next(sizes).exp()[:, None] * next(sizes).exp()


def written_out(tile, order):
    """(mu1, mu2, imbalances) in float64, from the algorithm as it is published."""
    m = tile.double().numpy()
    u1, u2, best, risen, seen = np.zeros(m.shape[1]), np.zeros(m.shape[0]), np.inf, False, []
    target = min(np.clip(m.std(a, ddof=1), 1e-3, 1e3).min() for a in (0, 1)) + 1e-6
    for _ in range(order):
        state = m / np.exp(u1)[None] / np.exp(u2)[:, None]
        columns, rows = state.std(0, ddof=1), state.std(1, ddof=1)
        seen.append(max(columns.max(), rows.max()) / max(min(columns.min(), rows.min()), 1e-12))
        if seen[-1] <= best:
            mu1, mu2, best = np.exp(u1), np.exp(u2), seen[-1]
        else:
            risen = True
        if not risen:
            u1 = np.clip(u1 + np.log(np.clip(np.clip(columns, 1e-3, 1e3) / target, 0.7, 2)), -0.3, 10)
            u2 = np.clip(u2 + np.log(np.clip(np.clip(rows, 1e-3, 1e3) / target, 0.7, 2)), -0.3, 10)
    return mu1, mu2, seen


@pytest.mark.parametrize("order", [1, 2, 8, 16, 40])
@pytest.mark.parametrize("make", [normal, lopsided])
def test_it_is_the_algorithm(make, order):
    for seed in range(4):
        tile = make(seed=seed)
        mu1, mu2, seen = written_out(tile, order)
        found = sinkhorn(tile, order)
        np.testing.assert_allclose(found.mu1, mu1, rtol=1e-5)
        np.testing.assert_allclose(found.mu2, mu2, rtol=1e-5)
        np.testing.assert_allclose(found.history.imbalance, seen[: len(found.history.imbalance)], rtol=1e-5)


def test_scales_give_the_tile_back_and_lie_in_their_range():
    tile = lopsided()
    found = sinkhorn(tile)
    back = found.balanced * found.mu1 * found.mu2[:, None]
    torch.testing.assert_close(back, tile, rtol=2**-22, atol=0)  # two divisions, two products: four roundings at most
    for mu in (found.mu1, found.mu2):
        assert (mu >= np.exp(-0.3) * (1 - 1e-6)).all() and (mu <= np.exp(10.0)).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_best_state_is_returned(seed):
    found = sinkhorn(lopsided(seed=seed), matrices=True)
    assert imbalance(*deviations(found.balanced)).item() == found.history.imbalance.min()
    assert found.history.imbalance.min() < found.history.imbalance[0] / 3
    assert torch.equal(found.history.matrices[0], lopsided(seed=seed))
    assert len(found.history.matrices) == len(found.history.imbalance)
    for matrix, value in zip(found.history.matrices, found.history.imbalance, strict=True):
        columns, rows = np.std(matrix.numpy(), 0, ddof=1), np.std(matrix.numpy(), 1, ddof=1)
        assert value.item() == pytest.approx(max(columns.max(), rows.max()) / min(columns.min(), rows.min()), rel=1e-5)
    assert sinkhorn(lopsided(seed=seed)).history.matrices is None


def test_rows_and_columns_are_treated_alike():
    found, turned = sinkhorn(lopsided()), sinkhorn(lopsided().T.contiguous())
    torch.testing.assert_close(found.mu1, turned.mu2, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mu2, turned.mu1, rtol=1e-5, atol=0)


def test_each_tile_is_balanced_on_its_own():
    tiles = torch.stack([lopsided(seed=s) if s % 2 else normal(seed=s) for s in range(6)]).view(2, 3, 24, 16)
    together = sinkhorn(tiles)
    assert together.mu1.shape == (2, 3, 16) and together.mu2.shape == (2, 3, 24)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(tiles[i, j])
            torch.testing.assert_close(together.mu1[i, j], alone.mu1, rtol=1e-6, atol=0)
            torch.testing.assert_close(together.mu2[i, j], alone.mu2, rtol=1e-6, atol=0)
            steps = len(alone.history.imbalance)
            torch.testing.assert_close(together.history.imbalance[:steps, i, j], alone.history.imbalance)


def test_it_stops_where_the_imbalance_rises():
    """Of a hundred tiles, some get worse at some step, and then stay at what they had."""
    tiles = torch.stack([lopsided(6, 5, seed=s) for s in range(100)])
    seen = sinkhorn(tiles, 16).history.imbalance
    rising = seen.diff(dim=0) > 0
    assert rising.any()
    step, tile = rising.nonzero()[0].tolist()
    assert (seen[step + 1 :, tile] == seen[step + 1, tile]).all()


def row_of_zeros():
    tile = lopsided()
    tile[3] = 0
    return tile


EDGES = {
    "zeros": torch.zeros(8, 6),
    "a constant": torch.full((8, 6), 0.5),
    "a row of zeros": row_of_zeros(),
    "a column of zeros": row_of_zeros().T.contiguous(),
    "equal columns": normal(8, 1).expand(8, 6).contiguous(),
    "tiny": normal(scale=1e-7),
    "large": normal(scale=1e6),
    "one outlier": normal() + torch.nn.functional.one_hot(torch.tensor([3] + [0] * 23), 16) * torch.eye(24)[:, :1],
    "two by two": normal(2, 2),
    "float16": lopsided().half(),
    "float64": lopsided().double(),
}


@pytest.mark.parametrize("tile", EDGES.values(), ids=EDGES)
def test_edges(tile):
    found = sinkhorn(tile)
    assert all(torch.isfinite(x).all() and x.dtype == torch.float32 for x in found[:3])
    torch.testing.assert_close(found.balanced * found.mu1 * found.mu2[:, None], tile.float(), rtol=2**-22, atol=1e-45)
    assert imbalance(*deviations(found.balanced)) <= imbalance(*deviations(tile.float()))


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (1, 1), (3, 1, 16)], ids=str)
def test_nothing_to_compare(shape):
    found = sinkhorn(torch.ones(shape))
    assert torch.equal(found.balanced, torch.ones(shape)) and (found.mu1 == 1).all() and (found.mu2 == 1).all()


def test_one_state_is_the_tile_itself():
    found = sinkhorn(lopsided(), order=1)
    assert torch.equal(found.balanced, lopsided()) and (found.mu1 == 1).all() and len(found.history.imbalance) == 1


@pytest.mark.parametrize(
    ("tile", "order"),
    [
        (torch.ones(4), 16),
        (torch.ones(4, 4, dtype=torch.int32), 16),
        (torch.ones(0, 4), 16),
        (torch.ones(4, 4), 0),
    ],
    ids=["a vector", "integers", "no rows", "no order"],
)
def test_bad_input(tile, order):
    with pytest.raises(ValueError, match="cannot be balanced"):
        sinkhorn(tile, order)
