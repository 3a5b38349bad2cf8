"""The number line of a format: every number it has, and where a given x goes.

`number_line(...)` is a still picture of one or several formats under each other, on a common axis.
`number_line_explorer(...)` is live: choose a format, zoom in on zero by halving the window, drag x, and see the
**rounding cell** of x, the interval of all numbers that are stored as the same value:

    nearest       from halfway below the value to halfway above it (the outermost cells are drawn half a step wide)
    zero          from the value outwards to the next one; the cell of 0 reaches to both sides
    stochastic    x lies between two values, and goes to either with a probability that makes the mean come out right

Powers of two carry a taller tick, so that in a floating-point format one sees the binades, in each of them the same
number of values.
"""

import math

import ipywidgets
import numpy as np

from qlearn import formats
from qlearn.course import plots
from qlearn.course.live import LivePlot

SMALL = ("fp4_e2m1", "int4", "nf4", "nf3", "int3", "int2", "fp6_e2m3", "fp6_e3m2", "int8", "fp8_e4m3fn", "fp8_e5m2")
MODES = ("nearest", "zero", "stochastic")


def values_of(name):
    """All finite numbers of the format of that name in rising order, 0 once: float64 array. ValueError beyond 8 bits.

    >>> values_of("fp4_e2m1").tolist()
    [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    format = formats.get(name)
    if format.bits > 8:
        raise ValueError(
            f"{name} has 2**{format.bits} codes, too many for a number line; choose a format of at most 8 bits"
        )
    decoded = np.asarray(format.decode(np.arange(format.count)), dtype=np.float64)
    return np.unique(decoded[np.isfinite(decoded)] + 0.0)


def around(values, x):
    """The neighbours of x in sorted values: the largest that is <= x, the smallest that is >= x; ends stay."""
    below = values[max(np.searchsorted(values, x, "right") - 1, 0)]
    above = values[min(np.searchsorted(values, x, "left"), len(values) - 1)]
    return float(min(below, above)), float(above)


def cell_of(values, stored, mode):
    """(low, high): the numbers that are stored as the value `stored` by "nearest" or "zero" rounding.

    >>> cell_of(np.array([-1.0, 0.0, 1.0, 2.0, 4.0]), 2.0, "nearest"), cell_of(np.array([-1.0, 0.0, 1.0]), 0.0, "zero")
    ((1.5, 3.0), (-1.0, 1.0))
    """
    i = int(np.searchsorted(values, stored))
    left = values[i] - values[i - 1] if i > 0 else values[1] - values[0]
    right = values[i + 1] - values[i] if i + 1 < len(values) else values[-1] - values[-2]
    if mode == "nearest":
        return float(stored - left / 2), float(stored + right / 2)
    return float(stored - left * (stored <= 0)), float(stored + right * (stored >= 0))


def number_line(*names, negative=True, limit=None, scaled=False):
    """A still picture of the numbers of one or several formats.

    names: of formats of at most 8 bits, by default FP4, INT4 and NF4.  negative: also show the numbers below zero.
    limit: the axis ends at this magnitude; by default at the largest number of all formats shown.
    scaled: divide the numbers of each format by their largest magnitude, as a quantizer's scale does.
    """
    names = names or ("fp4_e2m1", "int4", "nf4")
    rows = {name: values_of(name) for name in names}
    if scaled:
        rows = {name: values / np.abs(values).max() for name, values in rows.items()}
    limit = limit or max(np.abs(values).max() for values in rows.values())
    alt = f"All numbers of {', '.join(names)} as ticks on a line from {-limit * negative:g} to {limit:g}."
    picture, axes = plots.figure(8, 0.9 + 0.55 * len(names), alt=alt)
    for row, values in enumerate(rows.values()):
        _draw_ticks(axes, values[(np.abs(values) <= limit) & (negative | (values >= 0))], bottom=-row)
    axes.set(xlim=_window(limit, negative), ylim=(0.2 - len(names), 1), xlabel="value / largest" if scaled else "value")
    axes.set_yticks([0.3 - row for row in range(len(names))], names)
    _strip(axes)
    return picture


class NumberLine(LivePlot):
    """The live number line; see `number_line_explorer`."""

    def __init__(self, format, names):
        self._shown = None
        controls = {
            "format": ipywidgets.Dropdown(options=list(names), value=format),
            "mode": ipywidgets.Dropdown(options=MODES),
            "zoom": ipywidgets.IntSlider(min=0, max=0, description="zoom (halvings)"),
            "negative": ipywidgets.Checkbox(value=True),
            "x": ipywidgets.FloatSlider(min=-1, max=1, value=0.4, readout_format=".3g"),
        }
        self.controls = controls
        for name in ("format", "zoom", "negative"):  # before the drawing observers: these set the range of x
            controls[name].observe(lambda change: self._fit_ranges(), "value")
        self._fit_ranges()
        alt = "The numbers of a format as ticks on a line, with the rounding cell of x shaded."
        super().__init__(self._setup, self._update, figsize=(8, 2.2), alt=alt, name="NumberLine", **controls)

    def _fit_ranges(self):
        values = values_of(self.controls["format"].value)
        x, zoom = self.controls["x"], self.controls["zoom"]
        zoom.max = max(0, round(math.log2(values[-1] / values[values > 0][0])) - 2)
        limit = values[-1] / 2**zoom.value
        place = x.value / x.max  # x keeps its place in the window
        with x.hold_trait_notifications():
            x.min, x.max, x.step = -limit * self.controls["negative"].value, limit, limit / 100
            x.value = max(place * limit, x.min)

    def _setup(self, figure):
        self._axes = figure.subplots()
        self._axes.set(ylim=(-0.1, 1.25), xlabel="value", yticks=[])
        _strip(self._axes)
        (self._cell,) = self._axes.fill([0, 0, 0, 0], [0, 0, 1, 1], color=plots.PALETTE["sky"], alpha=0.35)
        (self._x,) = self._axes.plot([], [], "v", markersize=9, color=plots.COLORS["marker"])
        (self._goes,) = self._axes.plot([], [], color=plots.COLORS["quantized"], linewidth=3)
        return [self._cell, self._x, self._goes]

    def _update(self, format, mode, zoom, negative, x):
        values = values_of(format)
        if self._shown != (format, zoom, negative):
            self._draw_line(values, values[-1] / 2**zoom, negative)
            self._shown = format, zoom, negative
        below, above = around(values, x)
        stored = {"nearest": float(formats.get(format).round(x)), "zero": below if x >= 0 else above}.get(mode)
        low, high = (below, above) if stored is None else cell_of(values, stored, mode)
        self._cell.set_xy([(low, 0), (high, 0), (high, 1), (low, 1)])
        self._x.set_data([x], [1.15])
        ends = [below, above] if stored is None else [stored]
        self._goes.set_data(np.repeat(ends, 3), [0, 0.9, np.nan] * len(ends))
        return f"{format}: {_outcome(x, mode, stored, below, above)}, cell {low:.6g} to {high:.6g}"

    def _draw_line(self, values, limit, negative):
        for artist in [*self._axes.collections, *self._axes.texts]:
            artist.remove()
        inside = values[(np.abs(values) <= 1.02 * limit) & (negative | (values >= 0))]
        _draw_ticks(self._axes, inside, bottom=0)
        self._axes.set_xlim(*_window(limit, negative))


def number_line_explorer(format="fp4_e2m1", names=SMALL):
    """A number line to drag x along: format, rounding mode, zoom (how often the window is halved around zero), and x.

    format: the name to begin with; names: the formats to choose from, of at most 8 bits each.
    Raises ValueError when `format` is not among `names`, or one is unknown.

    >>> number_line_explorer("fp4_e2m1")
    NumberLine: fp4_e2m1: 2.4 goes to 2 (nearest), cell 1.75 to 2.5
    """
    if format not in names:
        raise ValueError(f"format {format!r} is not among those to choose from: {', '.join(names)}")
    for name in names:
        values_of(name)
    return NumberLine(format, names)


def _outcome(x, mode, stored, below, above):
    if stored is not None:
        return f"{x:.6g} goes to {stored:.6g} ({mode})"
    up = 0 if below == above else (x - below) / (above - below)
    return f"{x:.6g} goes to {below:.6g} with probability {1 - up:.2f}, to {above:.6g} with {up:.2f} (stochastic)"


def _draw_ticks(axes, values, bottom):
    """One tick a value, taller at powers of two and zero."""
    tall = (np.frexp(np.abs(values))[0] == 0.5) | (values == 0)  # frexp writes a power of two as 0.5 * 2**n
    height = np.where(tall, 0.7, 0.5)
    axes.vlines(
        values, bottom, bottom + height, color=plots.COLORS["original"], linewidth=1.6 if len(values) < 40 else 0.9
    )
    axes.hlines(bottom, *(values[[0, -1]] if len(values) else (0, 0)), color=plots.COLORS["faint"], linewidth=0.8)


def _window(limit, negative):
    return (-1.04 * limit if negative else -0.02 * limit), 1.04 * limit


def _strip(axes):
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
