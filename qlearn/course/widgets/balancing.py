"""The balancing explorer: Sinkhorn's steps on a small matrix, with an outlier that can be made larger.

Drawn are the magnitudes of the weights after some steps, the standard deviation of each row and each column, and the
**imbalance**, the largest deviation over the smallest, against the steps. The states are the package's own, from
`sinkhorn`; it stops after the first step that makes the imbalance larger, and returns the best state before that.

Rounded to 3 bits with one scale for each row, a small weight beside a large one becomes 0. How many do is counted, and
marked in the picture: a large column costs nearly all weights, and balancing gives them back. A single large weight
spoils its own row, and balancing gives little of that back.
"""

import ipywidgets
import numpy as np
import torch

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.methods.affine import absmax
from qlearn.methods.sinkhorn import deviations, sinkhorn

WEIGHT, ROW, COLUMN, BOTH = OUTLIERS = ("one weight", "a row", "a column", "a row and a column")
ORDER = 16  # states that balancing looks at
_MOST = 32  # rows or columns; more cannot be told apart in the picture
_LARGEST = 40  # times
_DECADES = -2, 1.7  # of the heat map's colours, in units of the median row's deviation


class BalancingExplorer(LivePlot):
    """A matrix as it is balanced step by step, its deviations and its imbalance; see `balancing_explorer`."""

    def __init__(self, weights):
        self._weights = measure.as_matrix(weights)
        if not all(2 <= side <= _MOST for side in self._weights.shape):
            shape = tuple(self._weights.shape)
            raise ValueError(f"a matrix of {shape} cannot be shown entry by entry; pass 2 to {_MOST} rows and columns")
        if not all((deviation > 0).all() for deviation in deviations(self._weights)):
            raise ValueError("a row or a column holds the same number everywhere; pass weights that all vary")
        self._place = tuple(side // 3 for side in self._weights.shape)
        self._known = {}
        controls = {
            "step": ipywidgets.IntSlider(min=0, max=ORDER - 1, value=0, description="steps"),
            "times": ipywidgets.IntSlider(min=1, max=_LARGEST, value=20, description="times as large"),
            "outlier": ipywidgets.Dropdown(options=list(OUTLIERS), value=BOTH, description="what is large"),
        }
        alt = (
            "A heat map of the magnitudes of weights, with marks on those that would be rounded to 0, the deviations "
            "of rows and columns, and the imbalance against the steps."
        )
        super().__init__(self._setup, self._update, figsize=(11, 3.5), alt=alt, name="BalancingExplorer", **controls)

    def with_outlier(self, times, outlier):
        """The matrix with one of `OUTLIERS` so many times as large, float32."""
        row, column = self._place
        weights = self._weights.clone()
        if outlier == WEIGHT:
            weights[row, column] = times * weights.square().mean().sqrt()
        if outlier in (ROW, BOTH):
            weights[row] *= times
        if outlier in (COLUMN, BOTH):
            weights[:, column] *= times
        return weights

    @measure.one_thread
    def states(self, times, outlier):
        """(matrices, imbalances) of all steps that are made: a list of tensors, a list of floats."""
        if (times, outlier) not in self._known:
            history = sinkhorn(self.with_outlier(times, outlier), ORDER, matrices=True).history
            self._known[times, outlier] = history.matrices, history.imbalance.tolist()
        return self._known[times, outlier]

    def _setup(self, figure):
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        return [*self._setup_map(figure, left), *self._setup_deviations(middle), *self._setup_imbalance(right)]

    def _setup_map(self, figure, axes):
        rows, columns = self._weights.shape
        axes.set(title="magnitudes (dots: rounded to 0)", xlabel="column", ylabel="row")
        axes.grid(False)
        low, high = _DECADES
        self._map = axes.imshow(np.zeros((rows, columns)), cmap="viridis", vmin=low, vmax=high, aspect="auto")
        bar = figure.colorbar(self._map, ax=axes, ticks=(-2, -1, 0, 1))
        bar.ax.set_yticklabels(["0.01", "0.1", "1", "10"])
        (self._zeros,) = axes.plot([], [], ".", color="white", markersize=4)
        return [self._map, self._zeros]

    def _setup_deviations(self, axes):
        axes.set(title="standard deviations", xlabel="row or column", ylabel="deviation", yscale="log")
        axes.set(xlim=(-1, max(self._weights.shape)), ylim=(0.1, 300))
        (self._rows,) = axes.plot([], [], "o", markersize=5, color=plots.COLORS["original"], label="rows")
        (self._columns,) = axes.plot(
            [], [], "x", markersize=6, markeredgewidth=2, color=plots.COLORS["quantized"], label="columns"
        )
        axes.legend(loc="upper center", ncols=2, fontsize=10, handletextpad=0.2)
        return [self._rows, self._columns]

    def _setup_imbalance(self, axes):
        axes.set(title="imbalance", xlabel="steps", ylabel="largest / smallest", yscale="log")
        axes.set(xlim=(-0.5, ORDER - 0.5), ylim=(0.9, 300))
        axes.set_yticks([1, 3, 10, 30, 100], labels=["1", "3", "10", "30", "100"])
        (self._curve,) = axes.plot([], [], "o-", markersize=4, color=plots.COLORS["original"])
        (self._dot,) = axes.plot([], [], "o", markersize=9, color=plots.COLORS["marker"])
        return [self._curve, self._dot]

    @measure.one_thread
    def _update(self, step, times, outlier):
        matrices, imbalances = self.states(times, outlier)
        shown, best = min(step, len(matrices) - 1), int(np.argmin(imbalances))
        state = matrices[shown]
        columns, rows = (deviation.flatten().numpy() for deviation in deviations(state))
        zeros = absmax(state, 3).codes() == 0
        self._map.set_data(np.log10(np.abs(state.numpy()).clip(1e-9) / np.sqrt(np.median(np.square(rows)))))
        y, x = np.nonzero(zeros.numpy())
        self._zeros.set_data(x, y)
        self._rows.set_data(range(len(rows)), rows)
        self._columns.set_data(range(len(columns)), columns)
        self._curve.set_data(range(len(imbalances)), imbalances)
        self._dot.set_data([shown], [imbalances[shown]])
        stopped = f"; no more steps were made, the best is {best}" if step > shown else ""
        return (
            f"{outlier}, {times} times as large, step {shown}: imbalance {imbalances[shown]:.2f}, and at 3 bits, one "
            f"scale a row, {zeros.float().mean():.0%} of the weights become 0{stopped}"
        )


def balancing_explorer(weights=None):
    """Balance a small matrix step by step, with a weight, a row or a column that can be made larger.

    weights: a matrix of 2 to 32 rows and columns, by default 16 by 16 normal random numbers.
    Raises ValueError for a matrix that cannot be shown or balanced.
    """
    if weights is None:
        weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    return BalancingExplorer(weights)
