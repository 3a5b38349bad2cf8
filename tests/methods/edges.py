"""Matrices (4 or 1, 32) that every method which looks for the grid of a group has to bear."""

import torch


def _normal(rows=4):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))


EDGES = {
    "zeros": torch.zeros(4, 32),
    "negative zeros": -torch.zeros(4, 32),
    "a constant": torch.full((4, 32), 0.3),
    "a negative constant": torch.full((4, 32), -700.0),
    "all positive": _normal().abs() + 3,
    "all negative": -_normal().abs() - 3,
    "one outlier": 0.02 * _normal() + 5 * torch.nn.functional.one_hot(torch.tensor(7), 32),
    "narrow": 0.25 + 1e-6 * _normal(),
    "tiny": 1e-9 * _normal(),
    "large": 1e4 * _normal(),
    "one row": _normal(1),
}
