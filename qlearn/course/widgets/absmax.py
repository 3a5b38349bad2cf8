"""Explorers for lesson 02: what a symmetric grid does to weights, and what one outlier does to the grid.

Everything is measured through the package's own `qlearn.quantize`, once for each setting, when the explorer is made;
dragging only looks it up and draws.
"""

import ipywidgets
import numpy as np

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.formats.integers import integer_range


class AbsmaxExplorer(LivePlot):
    """Weights on their grid, the histogram of the errors, and error against bits; see `absmax_explorer`."""

    def __init__(self, weights, bits, group_size):
        self._weights = measure.as_matrix(weights)
        self._bits = measure.bit_range(bits)
        low, high = self._bits[0], self._bits[-1]
        self._sharers = measure.sharers(self._weights, group_size)
        self._errors = {
            (b, share): measure.measure(self._weights, measure.quantize(self._weights, "absmax", b, share))
            for _, share in self._sharers
            for b in self._bits
        }
        limit = (
            self._errors[min(max(3, low), high), measure.TENSOR].scale / 2
        )  # at 2 bits the tails go beyond the picture
        self._edges = np.linspace(-limit, limit, 121)
        self._counts = {
            key: _peak_one(np.histogram(error.values, self._edges)[0]) for key, error in self._errors.items()
        }
        controls = {
            "bits": ipywidgets.IntSlider(min=low, max=high, value=min(max(4, low), high)),
            "shared": ipywidgets.Dropdown(options=self._sharers, description="a scale for each"),
        }
        alt = "A histogram of weights over the grid of the first block, one of the errors, and rms error against bits."
        super().__init__(self._setup, self._update, figsize=(10, 3), alt=alt, name="AbsmaxExplorer", **controls)

    def _setup(self, figure):
        left, middle, right = figure.subplots(1, 3)
        limit = self._weights.abs().max().item()
        counts, edges = np.histogram(self._weights.numpy(), 100, (-limit, limit))
        left.stairs(_peak_one(counts), edges, fill=True, color=plots.COLORS["original"], alpha=0.5)
        left.set(
            title="weights, over the grid",
            xlabel="weight",
            xlim=(-1.03 * limit, 1.03 * limit),
            ylim=(-0.25, 1.05),
            yticks=[],
        )
        left.locator_params(axis="x", nbins=5)
        middle.set(title="errors", xlabel="read back − weight", xlim=self._edges[[0, -1]], ylim=(0, 1.05), yticks=[])
        right.set(title="rms error", xlabel="bits of a code", ylabel="% of rms weight", yscale="log")
        for _, share in self._sharers:
            right.plot(self._bits, self._curve(share), color=plots.COLORS["faint"], alpha=0.4, linewidth=1)
        right.set_xticks(self._bits)
        right.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        (self._grid,) = left.plot([], [], color=plots.COLORS["quantized"], linewidth=0.8)
        self._histogram = middle.stairs(np.zeros(120), self._edges, fill=True, color=plots.COLORS["error"])
        (self._line,) = right.plot([], [], color=plots.COLORS["error"])
        (self._dot,) = right.plot([], [], "o", markersize=9, color=plots.COLORS["marker"])
        return [self._grid, self._histogram, self._line, self._dot]

    def _curve(self, share):
        return [100 * self._errors[b, share].relative for b in self._bits]

    def _update(self, bits, shared):
        error = self._errors[bits, shared]
        low, high = integer_range(bits, symmetric=True)
        self._grid.set_data(*measure.lines(np.arange(low, high + 1) * error.scale, -0.22, -0.02))
        self._histogram.set_data(self._counts[bits, shared])
        self._line.set_data(self._bits, self._curve(shared))
        self._dot.set_data([bits], [100 * error.relative])
        return (
            f"{bits} bits, {dict(map(reversed, self._sharers))[shared]}: {error.bits_per_weight:.3f} bits per weight; "
            f"rms error {100 * error.relative:.3g} % of the rms weight, SQNR {error.sqnr:.1f} dB; "
            f"largest error {error.worst:.2f} × scale/2"
        )


def absmax_explorer(weights, bits=(2, 8), group_size=None):
    """Drag the bits, choose who shares a scale, and see grid, errors, and true bits per weight.

    weights: a matrix (or a vector); 65,536 entries take half a second to measure at all settings.
    bits: (low, high) within 2 to 8.  group_size: those to choose from beside the whole tensor, None standing for the
    row.
    Raises ValueError for weights that cannot be quantized, bits out of range, or groups that do not divide the columns.

    >>> absmax_explorer([[0.9, -0.31, 0.14, -0.02, 0.6]], bits=(3, 3), group_size=[None])
    AbsmaxExplorer: 3 bits, whole tensor: 6.400 bits per weight; rms error 12.5 % of the rms weight, SQNR 18.1 dB; ...
    """
    return AbsmaxExplorer(weights, bits, group_size)


class OutlierExplorer(LivePlot):
    """One weight grows, and with it the step that all others have to use; see `outlier_explorer`."""

    SIZES = np.arange(1.0, 40.5, 0.5)  # of the outlier, in rms of the others

    def __init__(self, weights, bits):
        weights = measure.as_matrix(weights).flatten()[:64]
        if len(weights) % 16 or not weights[1:].any():
            raise ValueError(f"an outlier needs company: pass at least 64 weights, or 16, 32 or 48, not {len(weights)}")
        self._weights = weights / weights[1:].square().mean().sqrt()
        self._curves = {}
        low, high = measure.bit_range(bits)[0], measure.bit_range(bits)[-1]
        controls = {
            "outlier": ipywidgets.FloatSlider(min=1, max=40, step=0.5, value=3, description="size of weight 0 (× rms)"),
            "bits": ipywidgets.IntSlider(min=low, max=high, value=min(max(4, low), high)),
            "groups_of_16": ipywidgets.Checkbox(value=False),
        }
        alt = "Weights on the grid that they share with an outlier, and the error of the others against its size."
        super().__init__(self._setup, self._update, figsize=(9, 3), alt=alt, name="OutlierExplorer", **controls)

    def _setup(self, figure):
        left, right = figure.subplots(1, 2)
        count = len(self._weights)
        left.set(title="weights (dots), as read back (crosses)", xlabel="place in the row", ylabel="value / rms")
        left.set(xlim=(-2, count + 1), ylim=(-4.2, 4.2))
        left.grid(False)
        right.set(title="rms error of the others", xlabel="size of weight 0 (× rms)", ylabel="% of their rms")
        right.set(xlim=(0, 41), ylim=(0, 110))
        (self._grid,) = left.plot([], [], color=plots.PALETTE["orange"], linewidth=0.7, zorder=1)
        (self._dots,) = left.plot([], [], "o", markersize=4.5, color=plots.COLORS["original"])
        (self._crosses,) = left.plot([], [], "x", markersize=6, color=plots.COLORS["quantized"])
        (self._line,) = right.plot([], [], color=plots.COLORS["error"])
        (self._dot,) = right.plot([], [], "o", markersize=9, color=plots.COLORS["marker"])
        return [self._grid, self._dots, self._crosses, self._line, self._dot]

    def _at(self, size, bits, share):
        """(weights with the outlier, their QuantizedTensor, rms error of the others)."""
        weights = self._weights.clone()[None]
        weights[0, 0] = size
        qt = measure.quantize(weights, "absmax", bits, share)
        return weights, qt, (qt.dequantize() - weights)[0, 1:].square().mean().sqrt().item()

    def _curve(self, bits, share):
        if (bits, share) not in self._curves:
            self._curves[bits, share] = [100 * self._at(size, bits, share)[2] for size in self.SIZES.tolist()]
        return self._curves[bits, share]

    def _update(self, outlier, bits, groups_of_16):
        share = 16 if groups_of_16 else measure.ROW
        weights, qt, error = self._at(outlier, bits, share)
        low, high = integer_range(bits, symmetric=True)
        step, last = qt.scales[0, 0].item(), qt.block[1] - 0.5
        heights, ends = measure.lines(np.arange(low, high + 1) * step, -0.5, last)
        self._grid.set_data(ends, heights)  # lines() is about vertical lines; these are horizontal
        place = np.arange(weights.shape[1])
        self._dots.set_data(place, weights[0].numpy())
        self._crosses.set_data(place, qt.dequantize()[0].numpy())
        self._line.set_data(self.SIZES, self._curve(bits, share))
        self._dot.set_data([outlier], [100 * error])
        zeros, others = int((qt.codes()[0, 1:] == 0).sum()), len(place) - 1
        return f"step {step:.3g} × rms; the others: rms error {100 * error:.3g} %, {zeros} of {others} are stored as 0"


def outlier_explorer(weights=None, bits=(2, 8)):
    """Drag the size of one weight, and see the error of all the others grow with the step.

    weights: at least 64, of which the first 64 are taken (or 16, 32 or 48); by default 64 normal random numbers.
    bits: (low, high) within 2 to 8. Raises ValueError for too few weights or bits out of range.
    """
    weights = np.random.default_rng(0).standard_normal(64) if weights is None else weights
    return OutlierExplorer(weights, bits)


def _peak_one(counts):
    return counts / max(counts.max(), 1)
