"""Values as one short line that is the same everywhere."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qlearn.course import show


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (1 / 3, "0.333333"),
        (2.0, "2.0"),
        (1e-9, "1e-09"),
        (float("-inf"), "-inf"),
        (True, "True"),
        (np.float32(0.1), "0.1"),
        ("nf4", "'nf4'"),
        (None, "None"),
        (abs, "abs"),
        (np.array([0.9, -0.31]), "[0.9, -0.31]  (float64, shape 2)"),
        (np.array(2.5), "2.5  (float64, scalar)"),
        (torch.tensor([[1, 2]]), "[[1, 2]]  (tensor int64, shape 1×2)"),
        (torch.tensor([1.5], dtype=torch.bfloat16), "[1.5]  (tensor bfloat16, shape 1)"),
        (np.array([1.5], ml_dtypes.float8_e4m3fn), "[1.5]  (float8_e4m3fn, shape 1)"),
        (np.arange(100), "[0, 1, 2, 3, 4, 5, 6, 7, …, 92, 93, 94, 95, 96, 97, 98, 99]  (int64, shape 100)"),
        ((np.array([1]), 0.5), "([1]  (int64, shape 1), 0.5)"),
        ({"bits": 4}, "{'bits': 4}"),
        (object(), "a object"),
    ],
)
def test_text(value, line):
    assert show.text(value) == line


def test_large_arrays_stay_short():
    assert len(show.text(np.random.default_rng(0).standard_normal((64, 64, 64)))) < 200
    assert len(show.text("x" * 10_000)) <= 2 * show.WIDTH
