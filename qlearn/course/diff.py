"""Whether two values are the same for the purpose of an exercise, and where they differ if not.

An answer and a reference are compared as people would: the same structure, the same shape, the same kind of number (a
float is not an integer, even when it is whole), and then the numbers themselves. Integers, booleans and strings have
to be equal. Floats may be off by a small fraction of the expected value, plus one rounding to float32 of the largest
value in the array, because a sum in another order is no mistake. NaN equals NaN, and infinities have to have the
right sign. With tolerance 0 floats have to be equal to the last bit, and then −0.0 and 0.0 are two different numbers.

Containers are compared item by item: tuples and lists, dicts, dataclasses, and quantized tensors, which are compared
by what they decode to, their codes and the bits they take.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from qlearn.course import show

FLOAT32_ROUNDING = 2.0**-23
KINDS = {"b": "booleans", "i": "integers", "f": "floats"}


@dataclass(frozen=True)
class Difference:
    """Where two values part: a sentence, and the part of the value that it is about ("" for the whole, "[1]",
    "['scale']")."""

    where: str
    sentence: str

    def __str__(self):
        return f"{self.where}: {self.sentence}" if self.where else self.sentence


def difference(expected, got, tolerance=0.0, any_array=False, same_dtype=False, where=""):
    """The first difference between two values, or None.

    expected, got: numbers, strings, None, arrays, tensors, quantized tensors, or tuples, lists, dicts and dataclasses
    of these. tolerance: largest relative error of a float.  any_array: accept a tensor for an array, and an array for
    a tensor.

    >>> print(difference(np.array([1, 2, 3]), np.array([1, 2, 4])))
    at [2]: expected 3, got 4 (1 of 3 values differs)
    """
    options = tolerance, any_array, same_dtype
    if is_quantized(expected) and is_quantized(got):
        return _parts(quantized_parts(expected), quantized_parts(got), options, where)
    if is_number(expected) or is_array(expected):
        return _arrays(expected, got, options, where)
    if isinstance(expected, dict):
        return _dicts(expected, got, options, where)
    if isinstance(expected, (tuple, list)):
        return _sequences(expected, got, options, where)
    if dataclasses.is_dataclass(expected) and type(expected) is type(got):
        return _parts(_fields(expected), _fields(got), options, where)
    if expected is got or (type(expected) is type(got) and expected == got):
        return None
    return Difference(where, f"expected {show.text(expected)}, got {show.text(got)}")


def is_quantized(value):
    """True for a QuantizedTensor, and for whatever else can show its codes and decode them."""
    return all(callable(getattr(type(value), method, None)) for method in ("codes", "dequantize"))


def quantized_parts(value):
    """What makes two quantized tensors the same: shape, codes, what they decode to, and what they cost."""
    return {
        "shape": tuple(value.shape),
        "codes()": value.codes(),
        "dequantize()": value.dequantize(),
        "bits_per_weight": float(value.bits_per_weight),
    }


def is_array(value):
    """True for a NumPy array or a torch tensor of any size."""
    return isinstance(value, np.ndarray) or show.is_torch(value)


def is_number(value):
    """True for what counts as one number: Python's, NumPy's, and arrays and tensors without a dimension."""
    return isinstance(value, (bool, int, float, np.number, np.bool_)) or (is_array(value) and not value.ndim)


def _fields(value):
    return {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}


def _parts(expected, got, options, where):
    """Named parts of two objects of the same kind, in order; the first that differs."""
    for name, part in expected.items():
        dot = "" if name.startswith(".") else "."
        found = difference(part, got[name], *options, where=f"{where}{dot}{name}")
        if found:
            return found
    return None


def _dicts(expected, got, options, where):
    if not isinstance(got, dict):
        return Difference(where, f"expected a dict, got {describe(got)}")
    if expected.keys() != got.keys():
        return Difference(where, f"expected the keys {sorted(map(str, expected))}, got {sorted(map(str, got))}")
    for key, value in expected.items():
        found = difference(value, got[key], *options, where=f"{where}[{key!r}]")
        if found:
            return found
    return None


def _sequences(expected, got, options, where):
    if not isinstance(got, (tuple, list)):
        return Difference(where, f"expected a {type(expected).__name__} of {len(expected)}, got {describe(got)}")
    if len(expected) != len(got):
        return Difference(where, f"expected {len(expected)} values, got {len(got)}")
    for index, (left, right) in enumerate(zip(expected, got, strict=True)):
        found = difference(left, right, *options, where=f"{where}[{index}]")
        if found:
            return found
    return None


def _arrays(expected, got, options, where):
    """Numbers and arrays: the container, the shape, the kind, and then the values."""
    tolerance, any_array, same_dtype = options
    wrong = _container(expected, got, any_array)
    if wrong:
        return Difference(where, wrong)
    left, right = show.as_numpy(expected), show.as_numpy(got)
    if left.shape != right.shape:
        return Difference(where, f"expected shape {left.shape}, got shape {right.shape}")
    kinds = kind(left), kind(right)
    whole_for_float = kinds == ("f", "i") and not left.ndim and type(got) is int
    if kinds[0] != kinds[1] and not whole_for_float:
        return Difference(
            where, f"expected {KINDS.get(kinds[0], kinds[0])}, got {KINDS.get(kinds[1], kinds[1])} ({describe(got)})"
        )
    if same_dtype and left.ndim and left.dtype != right.dtype:
        return Difference(where, f"expected {show.dtype_name(expected)}, got {show.dtype_name(got)}")
    return _values(left, right, tolerance, where)


def _container(expected, got, any_array):
    """A sentence when one value is a number and the other an array, or they come from different libraries; None when
    they fit."""
    if is_number(expected):
        return None if is_number(got) else f"expected a number, {show.text(expected)}, got {describe(got)}"
    if not is_array(got):
        return f"expected {describe(expected)}, got {describe(got)}"
    if not any_array and show.is_torch(expected) != show.is_torch(got):
        return f"expected {describe(expected)}, got {describe(got)}"
    return None


def kind(array):
    """ "b", "i" or "f": signed and unsigned integers are one kind, because their values tell them apart where it
    matters."""
    return "i" if array.dtype.kind == "u" else array.dtype.kind


def describe(value):
    """What a value is, in a few words, for a sentence about its type.

    >>> describe(np.zeros((2, 3))), describe(None), describe([1, 2]), describe(abs)
    ('a NumPy array of float64, shape (2, 3)', 'None', 'a list of 2', 'the function abs')
    """
    if is_array(value):
        library = "torch tensor" if show.is_torch(value) else "NumPy array"
        return f"a {library} of {show.dtype_name(value)}, shape {tuple(value.shape)}"
    if value is None:
        return "None"
    if is_number(value):
        return show.text(value)
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if callable(value):
        return f"the function {show.text(value)}"
    return show.text(value)


def _values(expected, got, tolerance, where):
    wrong = ~_equal(expected, got, tolerance)
    if not wrong.any():
        return None
    if not wrong.ndim:
        return Difference(where, _expected_got(expected[()], got[()]))
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    index = f"at {list(first)}"
    verb = "differs" if wrong.sum() == 1 else "differ"
    count = f"({wrong.sum()} of {wrong.size} {'value' if wrong.size == 1 else 'values'} {verb})"
    return Difference(f"{where} {index}".strip(), f"{_expected_got(expected[first], got[first])} {count}")


def _equal(expected, got, tolerance):
    """Element by element: True where `got` is accepted for `expected`."""
    if expected.dtype.kind != "f":
        return expected == got
    same = (expected == got) | (np.isnan(expected) & np.isnan(got))
    if not tolerance:
        return same & ((np.signbit(expected) == np.signbit(got)) | np.isnan(expected))
    left, right = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    largest = np.abs(left, where=finite, out=np.zeros_like(left)).max(initial=0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        close = np.abs(right - left) <= tolerance * np.abs(left) + min(tolerance, FLOAT32_ROUNDING) * largest
    return same | (finite & close)


def _expected_got(expected, got):
    """Both numbers, with as many digits as it takes to see that they differ."""
    left, right = show.number(expected), show.number(got)
    if left == right:
        left, right = repr(expected.item()), repr(got.item())
    return f"expected {left}, got {right}"
