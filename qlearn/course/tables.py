"""Small tables side by side, coloured by value: the way a lesson shows quantization by hand.

    table(original=w, codes=codes, reconstructed=codes * scale)

Vectors become the rows of one table, so that a number, its code and what comes back stand above each other; matrices
stand side by side. Colour runs from vermillion (the most negative entry of that array) through white (zero) to blue
(the most positive), so equal patterns look equal whatever the units are. Arrays of whole numbers are printed as
integers, all others with the same number of decimals, in HTML and in plain text alike; the plain text is the same on
every machine.
"""

import html

import numpy as np

_MOST = 400  # numbers in one array
_BLUE, _VERMILLION = np.array([0x00, 0x72, 0xB2]), np.array([0xD5, 0x5E, 0x00])


class Table:
    """Named small arrays, shown as coloured HTML and as aligned plain text; made by `table`."""

    def __init__(self, arrays, decimals):
        self.arrays = arrays
        self.cells = {name: _format(array, decimals) for name, array in arrays.items()}

    def __repr__(self):
        if next(iter(self.arrays.values())).ndim == 1:
            return _plain_rows(self.cells)
        return _plain_blocks(self.cells)

    def _repr_html_(self):
        if next(iter(self.arrays.values())).ndim == 1:
            return _html_rows(self.arrays, self.cells)
        return _html_blocks(self.arrays, self.cells)


def table(*, decimals=2, **arrays):
    """Show small arrays of the same shape together.

    arrays: name=array, each 1-D (up to 400 numbers) or 2-D; NumPy arrays, torch tensors or lists. decimals: for
    arrays that are not whole.
    Raises ValueError when there is none, when shapes differ, when an array is neither 1-D nor 2-D, or is empty or too
    large to read.

    >>> table(original=[0.9, -0.31], codes=[3, -1], reconstructed=[0.9, -0.3])
    original       0.90  -0.31
    codes             3     -1
    reconstructed  0.90  -0.30
    """
    if not arrays:
        raise ValueError("nothing to show: pass arrays by name, such as table(original=w)")
    arrays = {name: _as_array(name, value) for name, value in arrays.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"arrays shown together need one shape, got {listed}")
    return Table(arrays, decimals)


def _as_array(name, value):
    if hasattr(value, "detach"):
        value = value.detach().cpu().float()
    array = np.asarray(value, dtype=np.float64)
    if array.ndim not in (1, 2) or not 0 < array.size <= _MOST:
        raise ValueError(
            f"{name} has shape {array.shape}; show 1 to {_MOST} numbers of a vector or a matrix, a slice for instance"
        )
    return array


def _format(array, decimals):
    """Array of strings: integers where all finite entries are whole, else fixed decimals; -0.0 is printed as 0."""
    finite = array[np.isfinite(array)]
    places = 0 if np.all(finite == np.round(finite)) else decimals
    return np.vectorize(lambda x: f"{x + 0.0:.{places}f}", otypes=[object])(array)


def _plain_rows(cells):
    label = max(map(len, cells))
    width = [max(len(row[i]) for row in cells.values()) for i in range(len(next(iter(cells.values()))))]
    return "\n".join(
        name.ljust(label) + "".join("  " + cell.rjust(w) for cell, w in zip(row, width, strict=True))
        for name, row in cells.items()
    )


def _plain_blocks(cells):
    blocks = []
    for name, block in cells.items():
        width = max(len(cell) for cell in block.flat)
        lines = [" ".join(cell.rjust(width) for cell in row) for row in block]
        full = max(len(name), len(lines[0]))
        blocks.append([name.ljust(full), *(line.rjust(full) for line in lines)])
    return "\n".join("   ".join(parts).rstrip() for parts in zip(*blocks, strict=True))


def _html_rows(arrays, cells):
    rows = []
    for name, array in arrays.items():
        most = _largest(array)
        tds = "".join(_td(cell, x, most) for cell, x in zip(cells[name], array, strict=True))
        rows.append(f'<tr><th scope="row" style="text-align: left">{html.escape(name)}</th>{tds}</tr>')
    return f"<table>{''.join(rows)}</table>"


def _html_blocks(arrays, cells):
    gap = '<td style="border: none; width: 1.5em"></td>'
    height, width = next(iter(arrays.values())).shape
    head = gap.join(
        f'<th colspan="{width}" scope="colgroup" style="text-align: center">{html.escape(name)}</th>' for name in arrays
    )
    rows = []
    for i in range(height):
        parts = ("".join(map(_td, cells[name][i], a[i], [_largest(a)] * width)) for name, a in arrays.items())
        rows.append(f"<tr>{gap.join(parts)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _largest(array):
    return np.max(np.abs(array), initial=0, where=np.isfinite(array))


def _td(cell, value, most):
    """One table cell: the text, on a background whose strength is the value's share of the largest magnitude."""
    share = min(abs(value) / most, 1) if most > 0 and np.isfinite(value) else 0
    strong = _BLUE if value > 0 else _VERMILLION
    color = "#" + "".join(f"{round(255 + 0.6 * share * (c - 255)):02x}" for c in strong)
    style = f"background: {color}; color: black; text-align: right; font-family: monospace; padding: 0.3em 0.6em"
    return f'<td style="{style}">{html.escape(cell)}</td>'
