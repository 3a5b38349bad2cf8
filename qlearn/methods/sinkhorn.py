"""Balancing a matrix: two scale vectors that bring the spreads of all its rows and columns near to one another.

In the 1960s Sinkhorn took a positive matrix and divided each row by its sum, each column by its sum, each row ... until
all sums were 1. SINQ does the same with standard deviations instead of sums, in order to find, for a tile of a weight
matrix, a vector mu1 with a number for each column and mu2 with a number for each row, such that

    balanced[i, j]  =  tile[i, j] / (mu1[j] · mu2[i])

has rows and columns that all vary about equally. How far it is from that is its

    imbalance  =  largest standard deviation of a row or column / smallest one

A large weight sits in a row and in a column, and either can give way: what made one row coarse is shared out between
the two. 256 rows of 64 normal random numbers have an imbalance of 1.7, by chance; tiles of that size in the bundled
model have 2 to 10 before, and mostly less than 1.3 after.

**The steps.** Dividing by the full deviations each time would overshoot, since a row and a column share weights. So the
logarithms are moved, a little at a time, all rows and all columns at once, as they were before the step:

    u1 += log clamp(σ of columns / τ, 0.7, 2)        mu1 = exp(u1),  u1 kept within −0.3 ... 10
    u2 += log clamp(σ of rows    / τ, 0.7, 2)        mu2 = exp(u2)   likewise

τ, the target, is the smallest deviation in the tile as it was at first. So nothing is asked to grow; everything else
comes down to the quietest row or column. All deviations are clamped to 0.001 ... 1000 in these formulas: a row of zeros
is not quieter than that. (And a matrix whose weights are all much smaller than 0.001 is not balanced at all.)

This is no algorithm with a proof. It is stopped as soon as a step makes the imbalance larger, and what is returned is
the best that was met, the tile itself if no step helped.

Source: SINQ (arXiv 2509.22944), section 2 and algorithm 1, and the authors' `sinkhorn.py`, which the constants are
from. Sinkhorn, A Relationship Between Arbitrary Positive Matrices and Doubly Stochastic Matrices, 1964.
"""

from typing import NamedTuple

import torch

from qlearn.kernels import dispatch

STEP = 0.7, 2.0  # no factor of a step is smaller or larger
LOG_MU = -0.3, 10.0  # nor is the logarithm of a scale
SIGMA = 1e-3, 1e3  # where a deviation is compared with the target
COMPILED_FROM = 2**15  # numbers: with fewer, torch is done before Numba would be imported


class History(NamedTuple):
    """imbalance: float32 (steps, ...), before each step; matrices: the tiles then, a list of tensors, or None."""

    imbalance: torch.Tensor
    matrices: list | None


class Balanced(NamedTuple):
    """balanced: float32 (..., rows, columns); mu1: (..., columns); mu2: (..., rows); history: a History."""

    balanced: torch.Tensor
    mu1: torch.Tensor
    mu2: torch.Tensor
    history: History


def sinkhorn(tile, order=16, matrices=False):
    """Find scales for the columns and the rows of a tile, or of many, each on its own.

    tile: floating point (..., rows, columns).
    order: how many states are looked at, the tile itself being the first; fewer once no tile gets better any more.
    matrices: whether to keep each of these states in the history.
    Returns a Balanced.  A tile of one row or one column has no deviations to compare, and stays as it is.
    Raises ValueError for something else than matrices, and for an order below 1.

    The second row is four times the first, the second column twice the first:

    >>> balanced, mu1, mu2, history = sinkhorn(torch.tensor([[1.0, -2.0], [-4.0, 8.0]]))
    >>> balanced, mu1, mu2
    (tensor([[ 1.4955, -1.4955],
            [-1.5001,  1.5001]]), tensor([0.9026, 1.8053]), tensor([0.7408, 2.9542]))
    >>> history.imbalance[:6]
    tensor([4.0000, 2.0000, 1.3890, 1.1967, 1.1945, 1.0984])
    """
    if tile.dim() < 2 or not tile.is_floating_point() or 0 in tile.shape or order < 1:
        raise ValueError(
            f"a tile of shape {tuple(tile.shape)} and {tile.dtype} cannot be balanced in {order} steps; give floating "
            "point (..., rows, columns), and an order of at least 1"
        )
    tile = tile.float()
    mu1, mu2 = (torch.ones_like(tile.select(axis, 0)).unsqueeze(axis) for axis in (-2, -1))
    u1, u2 = torch.zeros_like(mu1), torch.zeros_like(mu2)
    best = torch.full_like(mu1[..., :1], torch.inf)  # (..., 1, 1), as all that there is one of for each tile
    going, target, imbalances, kept = torch.ones_like(best, dtype=torch.bool), None, [], []
    for _ in range(order if min(tile.shape[-2:]) > 1 else 0):
        columns, rows = scaled_deviations(tile, u1.exp(), u2.exp())
        found = imbalance(columns, rows)
        imbalances.append(found[..., 0, 0])
        if matrices:
            kept.append(tile / u1.exp() / u2.exp())
        better = found <= best
        mu1, mu2, best = torch.where(better, u1.exp(), mu1), torch.where(better, u2.exp(), mu2), found.minimum(best)
        going &= better
        if not going.any():
            break
        target = _smallest(columns.clamp(*SIGMA), rows.clamp(*SIGMA)) + 1e-6 if target is None else target
        u1 = torch.where(going, _step(u1, columns, target), u1)
        u2 = torch.where(going, _step(u2, rows, target), u2)
    history = History(torch.stack(imbalances) if imbalances else torch.ones(0), kept if matrices else None)
    return Balanced(tile / mu1 / mu2, mu1.squeeze(-2), mu2.squeeze(-1), history)


def scaled_deviations(tile, mu1, mu2):
    """The deviations of tile / mu1 / mu2; for many numbers by a compiled loop, which gives the very same.

    mu1: (..., 1, columns).  mu2: (..., rows, 1).  Returns what `deviations` returns.
    """
    on_cpu = tile.device.type == "cpu" and dispatch.asked_for() in (None, "cpu") and not tile.requires_grad
    if on_cpu and tile.numel() >= COMPILED_FROM:
        from qlearn.kernels.cpu import sinkhorn as compiled  # here: it brings Numba

        return compiled.scaled_deviations(tile, mu1, mu2)
    return deviations(tile / mu1 / mu2)


def deviations(tile):
    """The standard deviations (n - 1 in the denominator) of the columns, (..., 1, columns), and rows, (..., rows, 1).

    >>> deviations(torch.tensor([[1.0, 3.0], [2.0, 7.0]]))
    (tensor([[0.7071, 2.8284]]), tensor([[1.4142],
            [3.5355]]))
    """
    return tile.std(-2, keepdim=True), tile.std(-1, keepdim=True)


def imbalance(columns, rows):
    """The largest deviation over the smallest, (..., 1, 1); deviations as above."""
    largest = torch.maximum(columns.amax((-2, -1), keepdim=True), rows.amax((-2, -1), keepdim=True))
    return largest / _smallest(columns, rows).clamp(min=1e-12)


def _smallest(columns, rows):
    return torch.minimum(columns.amin((-2, -1), keepdim=True), rows.amin((-2, -1), keepdim=True))


def _step(u, deviation, target):
    return (u + (deviation.clamp(*SIGMA) / target).clamp(*STEP).log()).clamp(*LOG_MU)
