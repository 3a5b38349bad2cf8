"""The zero-point explorer: what a symmetric and an asymmetric grid make of values that are shifted off zero.

The grid of absmax reaches as far below zero as above it, wherever the values are. The one of zero-point covers the
interval in use, widened to include zero. Around zero the two are as good; push the values to one side, as a ReLU
does, and absmax wastes up to half of its codes, one bit. Push them further, off zero altogether, and both waste codes
on the gap.
"""

import ipywidgets
import numpy as np

import qlearn
from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure

SHIFTS = np.arange(41) / 10
METHODS = ("absmax", "zero_point")
_BINS = 80


class ZeroPointExplorer(LivePlot):
    """The same shifted values over two grids, and the error of each against the shift; see `zero_point_explorer`."""

    def __init__(self, weights, bits):
        weights = measure.as_matrix(weights)
        self._weights = weights / max(weights.std(correction=0).item(), 1e-30)
        self._known = {}
        low, high = measure.bit_range(bits)[0], measure.bit_range(bits)[-1]
        controls = {
            "shift": ipywidgets.FloatSlider(min=0, max=4, step=0.1, value=0, description="shift (standard deviations)"),
            "bits": ipywidgets.IntSlider(min=low, max=high, value=min(max(4, low), high)),
        }
        alt = "A shifted histogram over the absmax and over the zero-point grid, and rms error against the shift."
        super().__init__(self._setup, self._update, figsize=(10, 3), alt=alt, name="ZeroPointExplorer", **controls)

    def _setup(self, figure):
        *panels, right = figure.subplots(1, 3)
        values = self._weights.numpy()
        self._counts, self._edges = np.histogram(values, _BINS)
        far = max(-values.min(), values.max() + SHIFTS[-1])
        self._histograms, self._grids = [], []
        for axes, method in zip(panels, METHODS, strict=True):
            color = plots.COLORS["quantized" if method == "absmax" else "other"]
            axes.set(title=f"{method} grid", xlabel="value (standard deviations)", yticks=[])
            axes.set(xlim=(-1.02 * far, 1.02 * far), ylim=(-0.25, 1.05))
            self._histograms.append(
                axes.stairs(np.zeros(_BINS), self._edges, fill=True, color=plots.COLORS["original"], alpha=0.5)
            )
            self._grids += axes.plot([], [], color=color, linewidth=0.9)
        right.set(title="rms error", xlabel="shift (standard deviations)", ylabel="standard deviations", yscale="log")
        right.set(xlim=(-0.1, 4.1), ylim=(0.003, 3))
        right.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        self._lines = [
            right.plot([], [], color=grid.get_color(), label=m)[0] for m, grid in zip(METHODS, self._grids, strict=True)
        ]
        (self._dots,) = right.plot([], [], "o", markersize=8, color=plots.COLORS["marker"])
        right.legend(loc="lower right", fontsize=10)
        return [*self._histograms, *self._grids, *self._lines, self._dots]

    @measure.one_thread
    def _at(self, method, shift, bits):
        """(the grid's numbers, rms error, code of zero or None) of the values at a shift."""
        values = self._weights + shift
        qt = qlearn.quantize(values, method, bits=bits, per="tensor")
        error = (qt.dequantize() - values).square().mean().sqrt().item()
        qmax, scale = 2 ** (bits - 1) - 1, qt.scales.item()
        if method == "absmax":
            return np.arange(-qmax, qmax + 1) * scale, error, None
        zero = int(qt.zero_points().item())
        return (np.arange(2**bits) - zero) * scale, error, zero

    def _results(self, method, bits):
        """What `_at` gives at each of SHIFTS, computed when a number of bits is first shown."""
        if (method, bits) not in self._known:
            self._known[method, bits] = [self._at(method, shift, bits) for shift in SHIFTS.tolist()]
        return self._known[method, bits]

    def _update(self, shift, bits):
        place = round(shift * 10)
        for method, histogram, grid, line in zip(METHODS, self._histograms, self._grids, self._lines, strict=True):
            results = self._results(method, bits)
            histogram.set_data(self._counts / self._counts.max(), self._edges + shift)
            grid.set_data(*measure.lines(results[place][0], -0.22, -0.02))
            line.set_data(SHIFTS, [error for _, error, _ in results])
        (_, symmetric, _), (_, asymmetric, zero) = (self._results(method, bits)[place] for method in METHODS)
        self._dots.set_data([shift, shift], [symmetric, asymmetric])
        return (
            f"{bits} bits, shift {shift:.1f}: rms error {symmetric:.3g} by absmax, {asymmetric:.3g} by zero-point "
            f"({symmetric / max(asymmetric, 1e-30):.2f} times less); the code of zero is {zero} of 0 to {2**bits - 1}"
        )


def zero_point_explorer(weights=None, bits=(2, 8)):
    """Drag values off zero, and compare the symmetric grid of absmax with the asymmetric one of zero-point.

    weights: a matrix or a vector, by default 4,096 normal random numbers; one scale for all.  bits: (low, high)
    within 2 to 8.
    Raises ValueError for values that cannot be quantized or bits out of range.
    """
    return ZeroPointExplorer(np.random.default_rng(0).standard_normal(4096) if weights is None else weights, bits)
