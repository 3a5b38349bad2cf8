"""Values in one line of text: what a failed check prints as input, expected and got.

Arrays are abbreviated to the numbers that fit, with their shape and dtype behind them; floats are rounded to six
digits, so that the line is the same on every machine. Nothing here decides anything; `diff.py` does.
"""

import dataclasses
import re

import numpy as np

WIDTH = 100


def text(value):
    """A value as one line of at most about WIDTH characters.

    >>> text(np.array([[0.5, -1.0], [2.25, 1 / 3]], dtype=np.float32))
    '[[0.5, -1.0], [2.25, 0.333333]]  (float32, shape 2×2)'
    """
    if is_torch(value) or isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, dict):
        return _shorten("{" + ", ".join(f"{key!r}: {text(item)}" for key, item in value.items()) + "}")
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return _shorten(left + ", ".join(text(item) for item in value) + right)
    return _shorten(_scalar(value))


def number(value):
    """One element of an array, or a plain number: floats with six digits.

    >>> number(np.float32(0.1)), number(-0.0), number(3), number(float("nan"))
    ('0.1', '-0.0', '3', 'nan')
    """
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    rounded = f"{float(value):.6g}"
    return rounded if re.search(r"[.en]", rounded) else f"{rounded}.0"


def is_torch(value):
    """True for a torch tensor, without importing torch: what has not been imported cannot have made one."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def as_numpy(value):
    """A number, array or tensor as an array. What NumPy lacks (bfloat16, 8-bit floats, int4) is widened, its values
    unchanged."""
    if is_torch(value):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind != "V":
        return array
    return array.astype(np.int32 if "int" in array.dtype.name else np.float32)


def dtype_name(array):
    """ "float32", "int8", "bfloat16" ... of an array or a tensor."""
    return str(array.dtype).removeprefix("torch.")


def _array(value):
    array = as_numpy(value)
    shape = "×".join(map(str, array.shape)) or "scalar"
    kind = "tensor " if is_torch(value) else ""
    return f"{_numbers(array)}  ({kind}{dtype_name(value)}, {'shape ' if array.shape else ''}{shape})"


def _numbers(array):
    if not array.ndim:
        return _scalar(array.item())
    for edge in (8, 4, 3, 2, 1):
        line = _abbreviated(array, edge)
        if len(line) <= WIDTH:
            break
    return line


def _abbreviated(array, edge):
    """All of a short axis, or its first and last `edge` entries."""
    if not array.ndim:
        return _scalar(array[()])
    whole = len(array) <= 2 * edge
    parts = [_abbreviated(row, edge) for row in (array if whole else array[:edge])]
    if not whole:
        parts += ["…", *(_abbreviated(row, edge) for row in array[-edge:])]
    return "[" + ", ".join(parts) + "]"


def _scalar(value):
    if isinstance(value, (bool, int, float, np.generic)) and np.asarray(value).dtype.kind in "biuf":
        return number(value)
    if isinstance(value, type) or callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if value is None or isinstance(value, (str, bytes, complex)) or dataclasses.is_dataclass(value):
        return repr(value)
    return f"a {type(value).__name__}"


def _shorten(line):
    return line if len(line) <= 2 * WIDTH else line[: 2 * WIDTH - 1] + "…"
