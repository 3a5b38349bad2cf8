"""Two values are the same, or the first difference is named with its place."""

from collections import namedtuple
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch

from qlearn.course.diff import difference

NAN, INF = float("nan"), float("inf")
TINY = 2.0**-30


@dataclass
class Pair:
    scale: float
    codes: np.ndarray


class Quantized:
    """Stands for a QuantizedTensor: shows its codes and decodes them."""

    def __init__(self, codes, scale, bits=4.0):
        self._codes, self._scale, self.bits_per_weight = torch.tensor(codes), scale, bits
        self.shape = self._codes.shape

    def codes(self):
        return self._codes

    def dequantize(self):
        return self._codes * self._scale


Named = namedtuple("Named", "codes scale")

SAME = [
    (3, 3, 0),
    (3, np.int8(3), 0),
    (0.5, np.float32(0.5), 0),
    (0.5, torch.tensor(0.5), 0),
    (5.0, 5, 0),
    (True, np.bool_(True), 0),
    ("e4m3", "e4m3", 0),
    (None, None, 0),
    (NAN, NAN, 0),
    (-INF, -INF, 1e-6),
    (0.0, -0.0, 1e-6),
    (1.0, 1.0 + 5e-7, 1e-6),
    (np.array([1, 2], np.int8), np.array([1, 2], np.int64), 0),
    (np.array([1, 2], np.uint8), np.array([1, 2]), 0),
    (np.array([1e3, 0.0]), np.array([1e3, 1e-5]), 1e-6),  # one float32 rounding of the largest value
    (np.array([NAN, INF, -INF, 1.0]), np.array([NAN, INF, -INF, 1.0]), 0),
    (torch.tensor([1.5, NAN]), torch.tensor([1.5, NAN]), 0),
    (torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.5]), 0),
    (np.array([1.5], ml_dtypes.bfloat16), np.array([1.5], np.float32), 0),
    (np.array([-3, 7], ml_dtypes.int4), np.array([-3, 7]), 0),
    (np.zeros((0, 4)), np.zeros((0, 4)), 1e-6),
    ((np.array([1]), 0.5), [np.array([1]), 0.5], 0),
    (Named(1, 2.0), (1, 2.0), 0),
    ({"a": [1, (2.0,)]}, {"a": [1, (2.0,)]}, 0),
    (Pair(0.5, np.array([1, 2])), Pair(0.5, np.array([1, 2])), 0),
    (Quantized([[1, -2]], 0.5), Quantized([[1, -2]], 0.5), 0),
]

DIFFERENT = [
    (3, 4, 0, "expected 3, got 4"),
    (3, 3.0, 0, "expected integers, got floats (3.0)"),
    (3, True, 0, "expected integers, got booleans (True)"),
    (5.0, True, 0, "expected floats, got booleans (True)"),
    (0.0, -0.0, 0, "expected 0.0, got -0.0"),
    (1.0, 1.0 + 2e-6, 1e-6, "expected 1.0, got 1.000002"),
    (1.0, 1.0 + TINY, 0, "expected 1.0, got 1.0000000009313226"),
    (NAN, 0.0, 1e-6, "expected nan, got 0.0"),
    (1.0, NAN, 1e-6, "expected 1.0, got nan"),
    (INF, -INF, 1e-6, "expected inf, got -inf"),
    (1.0, INF, 1e-6, "expected 1.0, got inf"),
    (None, 1, 0, "expected None, got 1"),
    (1, None, 0, "expected a number, 1, got None"),
    ("a", "b", 0, "expected 'a', got 'b'"),
    (3, np.array([3]), 0, "expected a number, 3, got a NumPy array of int64, shape (1,)"),
    (3, lambda: 3, 0, "expected a number, 3, got the function <lambda>"),
    (np.array([1, 2]), np.array([1, 3]), 0, "at [1]: expected 2, got 3 (1 of 2 values differs)"),
    (np.array([[1, 2]]), np.array([[0, 0]]), 0, "at [0, 0]: expected 1, got 0 (2 of 2 values differ)"),
    (np.array([1, 2]), np.array([1.0, 2.0]), 0, "expected integers, got floats (a NumPy array of float64, shape (2,))"),
    (np.array([1, 2]), np.array([[1, 2]]), 0, "expected shape (2,), got shape (1, 2)"),
    (np.array([1, 2]), [1, 2], 0, "expected a NumPy array of int64, shape (2,), got a list of 2"),
    (
        np.array([1.0]),
        torch.ones(1),
        0,
        "expected a NumPy array of float64, shape (1,), got a torch tensor of float32, shape (1,)",
    ),
    (np.array([0.0, 1.0]), np.array([-0.0, 1.0]), 0, "at [0]: expected 0.0, got -0.0 (1 of 2 values differs)"),
    (np.array([1e3, 0.0]), np.array([1e3, 1e-3]), 1e-6, "at [1]: expected 0.0, got 0.001 (1 of 2 values differs)"),
    ((1, 2), 1, 0, "expected a tuple of 2, got 1"),
    ((1, 2), (1, 2, 3), 0, "expected 2 values, got 3"),
    ((1, (2, 3)), (1, (2, 4)), 0, "[1][1]: expected 3, got 4"),
    ({"a": 1}, {"b": 1}, 0, "expected the keys ['a'], got ['b']"),
    ({"a": 1}, {"a": 2}, 0, "['a']: expected 1, got 2"),
    ({"a": 1}, [1], 0, "expected a dict, got a list of 1"),
    (Pair(0.5, np.array([1])), Pair(0.5, np.array([2])), 0, ".codes at [0]: expected 1, got 2 (1 of 1 value differs)"),
    (Quantized([[1]], 0.5), Quantized([[2]], 0.25), 0, ".codes() at [0, 0]: expected 1, got 2 (1 of 1 value differs)"),
    (Quantized([[0]], 0.5), Quantized([[0]], 0.5, 8.0), 0, ".bits_per_weight: expected 4.0, got 8.0"),
    (Quantized([[1, 2]], 0.5), Quantized([[1], [2]], 0.5), 0, ".shape[0]: expected 1, got 2"),
]


@pytest.mark.parametrize(("expected", "got", "tolerance"), SAME)
def test_same(expected, got, tolerance):
    assert difference(expected, got, tolerance) is None


@pytest.mark.parametrize(("expected", "got", "tolerance", "sentence"), DIFFERENT)
def test_different(expected, got, tolerance, sentence):
    assert str(difference(expected, got, tolerance)) == sentence


def test_a_tensor_for_an_array_only_where_the_task_says_so():
    assert difference(np.array([1.5]), torch.tensor([1.5]), any_array=True) is None
    assert difference(torch.tensor([1]), np.array([1]), any_array=True) is None
    assert difference(torch.tensor([1]), np.array([1])) is not None


def test_wrapped_codes_are_not_taken_for_the_negative_ones():
    assert difference(np.array([-1], np.int8), np.array([255], np.uint8)) is not None


def test_zeros_among_large_values_have_to_be_close_to_zero():
    """The allowance is one float32 rounding of the largest value: 2**-23 of it, not a millionth."""
    expected = np.array([1.0, 0.0])
    assert difference(expected, np.array([1.0, 2.0**-23]), 1e-6) is None
    assert difference(expected, np.array([1.0, 2.0**-22]), 1e-6) is not None
