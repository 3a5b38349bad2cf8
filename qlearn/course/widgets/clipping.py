"""The clip explorer: cutting the largest weights off, so that all others get a finer ruler.

A grid that ends at c has the step c / qmax. Lowering c shrinks the rounding error of every weight inside and adds an
error for each weight outside, which comes back as c. One falls, the other rises, and their sum has a minimum; where
it lies depends on the bits.

Clamping the weights to -c ... c and quantizing the result by absmax gives exactly the grid that ends at c, so every
point of the curves is the package's own `qlearn.quantize`. The optimum that is marked is the one that `clip="mse"`
chooses.
"""

import ipywidgets
import numpy as np

import qlearn
from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.formats.integers import integer_range

FRACTIONS = np.arange(5, 101) / 100


class ClipExplorer(LivePlot):
    """Weights between two clip limits, and the two errors against where the limits are; see `clip_explorer`."""

    def __init__(self, weights, bits):
        self._weights = measure.as_matrix(weights)
        self._largest = self._weights.abs().max().item()
        self._power = self._weights.square().mean().item()
        self._known = {}
        low, high = measure.bit_range(bits)[0], measure.bit_range(bits)[-1]
        controls = {
            "clip": ipywidgets.IntSlider(min=5, max=100, value=100, description="clip at (% of the largest)"),
            "bits": ipywidgets.IntSlider(min=low, max=high, value=min(max(4, low), high)),
        }
        alt = (
            "A histogram of weights between two clip limits, and rounding, clipping and total error against the limit."
        )
        super().__init__(self._setup, self._update, figsize=(9, 3.2), alt=alt, name="ClipExplorer", **controls)

    def _setup(self, figure):
        left, right = figure.subplots(1, 2)
        counts, edges = np.histogram(self._weights.numpy(), 100, (-self._largest, self._largest))
        left.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=plots.COLORS["original"], alpha=0.5)
        left.set(
            title="weights, over the grid", xlabel="weight", ylabel="count", yscale="log", xlim=1.03 * edges[[0, -1]]
        )
        left.set_ylim(0.1, 2 * counts.max())
        left.locator_params(axis="x", nbins=5)
        right.set(title="mean squared error", xlabel="clip at (% of the largest)", ylabel="% of mean square weight")
        right.set(yscale="log", xlim=(0, 104), ylim=(0.002, 200))
        right.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        (self._limits,) = left.plot([], [], color=plots.COLORS["marker"], linewidth=1.5)
        (self._grid,) = left.plot([], [], color=plots.COLORS["quantized"], linewidth=0.8)
        styles = {
            "rounding": (plots.PALETTE["sky"], "--"),
            "clipping": (plots.PALETTE["orange"], ":"),
            "total": (plots.COLORS["error"], "-"),
        }
        self._lines = [
            right.plot([], [], color=color, linestyle=line, label=name)[0] for name, (color, line) in styles.items()
        ]
        (self._best,) = right.plot([], [], "*", markersize=15, color=plots.COLORS["other"], label='clip="mse"')
        (self._dot,) = right.plot([], [], "o", markersize=8, color=plots.COLORS["marker"])
        right.legend(loc="lower left", fontsize=10, ncols=2)
        return [self._limits, self._grid, *self._lines, self._best, self._dot]

    @measure.one_thread
    def _errors_at(self, bits, fraction):
        """(step, rounding error, clipping error): mean squares, in % of the mean square weight."""
        limit = fraction * self._largest
        clamped = self._weights.clamp(-limit, limit)
        qt = qlearn.quantize(clamped, "absmax", bits=bits, per="tensor")
        square = (qt.dequantize() - self._weights).square()
        outside = self._weights.abs() > limit
        parts = square[~outside].sum().item(), square[outside].sum().item()
        return qt.scales.item(), *(100 * part / square.numel() / self._power for part in parts)

    def _curves(self, bits):
        """(steps, rounding, clipping) over FRACTIONS, and (limit in %, total error) of the package's own choice."""
        if bits not in self._known:
            curves = np.array([self._errors_at(bits, fraction) for fraction in FRACTIONS.tolist()]).T
            qt = qlearn.quantize(self._weights, "absmax", bits=bits, per="tensor", clip="mse")
            qmax = integer_range(bits, symmetric=True)[1]
            limit = 100 * qt.scales.item() * qmax / self._largest
            self._known[bits] = curves, (limit, 100 * measure.measure(self._weights, qt).relative ** 2)
        return self._known[bits]

    def _update(self, clip, bits):
        (steps, *parts), best = self._curves(bits)
        place, limit = clip - round(100 * FRACTIONS[0]), clip / 100 * self._largest
        rounding, clipping = parts[0][place], parts[1][place]
        low, high = integer_range(bits, symmetric=True)
        self._limits.set_data(*measure.lines(np.array([-limit, limit]), 0.1, 1e9))
        self._grid.set_data(*measure.lines(np.arange(low, high + 1) * steps[place], 0.12, 0.4))
        for line, curve in zip(self._lines, (*parts, sum(parts)), strict=True):
            line.set_data(100 * FRACTIONS, np.where(curve > 0, curve, np.nan))
        self._best.set_data([best[0]], [best[1]])
        self._dot.set_data([clip], [rounding + clipping])
        return (
            f"{bits} bits, clipped at ±{limit:.3g}, {clip} % of the largest: rounding {rounding:.3g} % + "
            f"clipping {clipping:.3g} % = {rounding + clipping:.3g} % of the mean square weight; "
            f"the least, {best[1]:.3g} %, at {best[0]:.0f} %"
        )


def clip_explorer(weights=None, bits=(2, 8)):
    """Drag the clip limit, and see rounding error fall, clipping error rise, and their sum go through a minimum.

    weights: a matrix or a vector, by default 16,384 normal random numbers; quantized by absmax with one scale for all.
    bits: (low, high) within 2 to 8.
    Raises ValueError for weights that cannot be quantized or bits out of range.
    """
    return ClipExplorer(np.random.default_rng(0).standard_normal(16384) if weights is None else weights, bits)
