"""The column explorer: GPTQ, one column at a time, beside round-to-nearest.

Both round the columns of a small matrix one after another, on the same grids. Round-to-nearest leaves all other columns
alone. GPTQ shifts those that are not rounded yet, so that the output of the layer changes as little as possible; the
shifts are the package's own, from `gptq_steps`. What is drawn after each column is the matrix as it is by then, and how
far its output W x is off, over the inputs that the Hessian was made from.

In the made-up matrix the channels of the input are mixtures of a few causes and some noise, as those in a network are,
so an error in one column can be taken back by others. The last two channels are three times as large as the rest: what
is left over for them is paid dearly, and "largest input first" begins with them instead.
"""

import ipywidgets
import numpy as np
import torch

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.methods.affine import zero_point
from qlearn.methods.gptq import gptq_steps
from qlearn.methods.statistics import InputStatistics

METHODS = {"round to nearest": None, "GPTQ": False, "GPTQ, largest input first": "static"}  # name -> act_order
_MOST_COLUMNS = 32  # more cannot be told apart in the picture


class ColumnExplorer(LivePlot):
    """A matrix as its columns are rounded one after another, and the output error; see `column_explorer`."""

    def __init__(self, weights, inputs, bits):
        self._weights = measure.as_matrix(weights)
        columns = self._weights.shape[1]
        if not 2 <= columns <= _MOST_COLUMNS:
            raise ValueError(f"{columns} columns cannot be shown one by one; pass a matrix of 2 to {_MOST_COLUMNS}")
        self._hessian = InputStatistics.from_inputs(torch.as_tensor(inputs).float(), sample=0).hessian
        if len(self._hessian) != columns:
            raise ValueError(f"inputs of {len(self._hessian)} channels do not fit {columns} columns; pass their own")
        self._power = self._error_of(self._weights)
        if not self._power:
            raise ValueError("all outputs are 0, so no error can be a share of them; pass inputs that the weights see")
        self._known = {}
        low, high = measure.bit_range(bits)[0], measure.bit_range(bits)[-1]
        controls = {
            "rounded": ipywidgets.IntSlider(min=0, max=columns, value=columns // 2, description="columns rounded"),
            "method": ipywidgets.Dropdown(options=list(METHODS), value="GPTQ"),
            "bits": ipywidgets.IntSlider(min=low, max=high, value=min(max(3, low), high)),
        }
        alt = (
            "A row of weights over its grid, the shifts of all weights of the matrix so far, and the output error "
            "against the number of columns rounded, for three ways to round."
        )
        super().__init__(self._setup, self._update, figsize=(11, 3.4), alt=alt, name="ColumnExplorer", **controls)

    def output_errors(self, method, bits):
        """The output error after 0, 1 ... columns, in % of the mean square output, by one of the `METHODS`: a list."""
        return list(self._states(method, bits)[2])

    def _setup(self, figure):
        left, middle, right = figure.subplots(1, 3)
        columns = self._weights.shape[1]
        moving = [*self._setup_row(left, columns), *self._setup_shifts(figure, middle, columns)]
        return [*moving, *self._setup_errors(right, columns)]

    def _setup_row(self, axes, columns):
        first, reach = self._weights[0].numpy(), 1.35 * self._weights[0].abs().max().item()
        axes.set(title="the first row", xlabel="column", ylabel="weight", xlim=(-0.8, columns - 0.2))
        axes.set_ylim(-reach, reach)
        axes.grid(False)
        open_circles = {"markersize": 9, "markerfacecolor": "none", "color": plots.COLORS["faint"]}
        axes.plot(np.arange(columns), first, "o", label="original", **open_circles)
        (self._grid,) = axes.plot([], [], color=plots.PALETTE["orange"], linewidth=0.7, zorder=1)
        (self._now,) = axes.plot([], [], "o", markersize=5, color=plots.COLORS["original"], label="now")
        (self._rounded,) = axes.plot(
            [], [], "x", markersize=8, markeredgewidth=2, color=plots.COLORS["quantized"], label="rounded"
        )
        axes.legend(loc="upper center", ncols=3, fontsize=9, handletextpad=0, columnspacing=0.8)
        return [self._grid, self._now, self._rounded]

    def _setup_shifts(self, figure, axes, columns):
        rows = len(self._weights)
        axes.set(title="shifts so far, in steps of the grid", xlabel="column (a dot: rounded)", ylabel="row")
        axes.grid(False)
        self._shifts = axes.imshow(np.zeros((rows, columns)), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
        axes.set(ylim=(rows - 0.5, -1.3), yticks=range(rows))
        figure.colorbar(self._shifts, ax=axes, ticks=(-1, -0.5, 0, 0.5, 1))
        (self._done,) = axes.plot([], [], "o", color=plots.COLORS["quantized"], markersize=6)
        return [self._shifts, self._done]

    def _setup_errors(self, axes, columns):
        self._axes = axes
        axes.set(title="output error", xlabel="columns rounded", ylabel="% of the mean square output")
        axes.set_xlim(-0.03 * columns, 1.03 * columns)
        styles = zip(METHODS, ("faint", "quantized", "other"), ("--", "-", ":"), strict=True)
        self._lines = [
            axes.plot([], [], line, color=plots.COLORS[color], label=name)[0] for name, color, line in styles
        ]
        (self._dot,) = axes.plot([], [], "o", markersize=9, color=plots.COLORS["marker"])
        axes.legend(loc="upper left", fontsize=9)
        return [*self._lines, self._dot]

    def _error_of(self, shift):
        """tr (Δ H Δᵀ), twice the mean square of Δ x over the inputs."""
        return (shift @ self._hessian * shift).sum().item()

    @measure.one_thread
    def _states(self, method, bits):
        """(order of the columns, the matrix after 0, 1 ... of them, output error in %); computed when first shown."""
        if (method, bits) not in self._known:
            order, states = self._rtn(bits) if METHODS[method] is None else self._gptq(bits, METHODS[method])
            errors = [100 * self._error_of(state - self._weights) / self._power for state in states]
            self._known[method, bits] = order, states, errors
        return self._known[method, bits]

    def _rtn(self, bits):
        rounded = zero_point(self._weights, bits).dequantize()
        order = range(rounded.shape[1])
        return list(order), [torch.hstack([rounded[:, :i], self._weights[:, i:]]) for i in (*order, len(order))]

    def _gptq(self, bits, act_order):
        steps = list(gptq_steps(self._weights, self._hessian, bits, act_order=act_order))
        return [step.column for step in steps], [self._weights, *(step.weight for step in steps)]

    @measure.one_thread
    def _grids(self, bits):
        """The step of each row's grid, (rows, 1), and all numbers of the first row's; computed when first shown."""
        if bits not in self._known:
            fitted = zero_point(self._weights, bits)
            steps, zero = fitted.scales.float().numpy(), int(fitted.zero_points()[0])
            self._known[bits] = steps, (np.arange(2**bits) - zero) * steps[0, 0]
        return self._known[bits]

    def _update(self, rounded, method, bits):
        order, states, errors = self._states(method, bits)
        steps, grid = self._grids(bits)
        done, columns = np.zeros(len(order), bool), np.arange(len(order))
        done[order[:rounded]] = True
        first, shifts = states[rounded][0].numpy(), (states[rounded] - self._weights).numpy() / steps
        heights, ends = measure.lines(grid, -0.6, len(order) - 0.4)  # lines() is about vertical lines; these are not
        self._grid.set_data(ends, heights)
        self._now.set_data(columns[~done], first[~done])
        self._rounded.set_data(columns[done], first[done])
        self._shifts.set_data(shifts)
        self._done.set_data(columns[done], np.full(done.sum(), -0.95))
        self._draw_errors(rounded, errors, bits)
        moved = np.abs(shifts[:, ~done]).max(initial=0)
        others = "" if done.all() else f"; the others were shifted by up to {moved:.2f} steps"
        return f"{bits} bits, {method}, {rounded} of {len(order)} columns: output error {errors[rounded]:.3g} %{others}"

    def _draw_errors(self, rounded, errors, bits):
        curves = [self._states(method, bits)[2] for method in METHODS]
        for line, curve in zip(self._lines, curves, strict=True):
            line.set_data(range(len(curve)), curve)
        self._dot.set_data([rounded], [errors[rounded]])
        top = 1.6 * max(map(max, curves))  # room for the legend
        if self._axes.get_ylim() != (0, top):
            self._axes.set_ylim(0, top)


def column_explorer(weights=None, inputs=None, bits=(2, 4)):
    """Round a matrix column by column, and see GPTQ shift the columns that are left.

    weights: a matrix of 2 to 32 columns; by default 8 rows of 16, made up.  inputs: (tokens, columns), what the layer
    reads; given together with the weights.  bits: (low, high) within 2 to 8; one grid for each row.
    Raises ValueError for a matrix that cannot be quantized or shown, inputs that do not fit, or bits out of range.
    """
    if (weights is None) != (inputs is None):
        raise ValueError("a matrix needs the inputs it reads; pass weights and inputs, or neither")
    if weights is None:
        weights, inputs = _made_up()
    return ColumnExplorer(weights, inputs, bits)


def _made_up(rows=8, columns=16, tokens=512):
    """A random matrix, and inputs that are mixtures of a quarter as many causes and noise; the last two are large."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(tokens, columns // 4, generator=generator)
    inputs = causes @ torch.randn(columns // 4, columns, generator=generator)
    inputs += 0.5 * torch.randn(tokens, columns, generator=generator)
    inputs[:, -2:] *= 3
    return torch.randn(rows, columns, generator=generator), inputs
