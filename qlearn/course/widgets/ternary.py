"""The ternary explorer: which weights become 0, and what the others come back as.

A ternary weight is -a, 0 or a. Two numbers are to be chosen: the **threshold** below which a weight counts as 0, and
the **value** a. BitNet has one number for both: it divides by a scale and rounds, so all below half the scale becomes
0, and all others come back as the scale. Its scale is the mean magnitude. The largest magnitude, as in `absmax`, would
be the same rule with a threshold far out.

Free of that, the best value for the weights that are not 0 is their mean magnitude, whatever the threshold. Then a
threshold of 0 is the binary rule, all signs and the mean magnitude.

Thresholds are counted in units of the mean magnitude of all weights, so the same position means the same in every
matrix. Sums over the sorted magnitudes give all thresholds at once.
"""

import ipywidgets
import numpy as np

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure

SCALE, BEST = "the scale: twice the threshold", "the mean of what is not 0"
VALUES = (SCALE, BEST)
ABSMEAN = 50  # % of the mean magnitude
_MOST, _STEP = 300, 5


class TernaryExplorer(LivePlot):
    """Weights over -a, 0, a, the shares of the three, and the error against the threshold; see `ternary_explorer`."""

    def __init__(self, weights):
        self._weights = measure.as_matrix(weights).flatten().double().numpy()
        self._mean = np.abs(self._weights).mean()
        self._power = np.square(self._weights).mean()
        self._percents = np.arange(0, _MOST + 1, _STEP)
        self._curves = {
            value: [self.error_at(percent, value) for percent in self._percents.tolist()] for value in VALUES
        }
        largest = np.abs(self._weights).max() / self._mean
        self._absmax = 50 * largest  # the threshold that absmax sets, in % of the mean
        controls = {
            "threshold": ipywidgets.IntSlider(
                min=0, max=_MOST, step=_STEP, value=100, description="0 below (% of the mean magnitude)"
            ),
            "value": ipywidgets.Dropdown(options=list(VALUES), value=SCALE, description="the others come back as"),
        }
        alt = (
            "A histogram of weights with the three values they come back as, the share of each, and the error against "
            "the threshold, with absmean and absmax marked."
        )
        super().__init__(self._setup, self._update, figsize=(11, 3.4), alt=alt, name="TernaryExplorer", **controls)

    def state(self, percent, value):
        """(a, share of -1, 0, 1) for a threshold in % of the mean magnitude and one of `VALUES`.

        A weight that lies on the threshold becomes 0, as `round` takes one half to the even neighbour; at a threshold
        of 0 none does that is not 0 already.
        """
        threshold = percent / 100 * self._mean
        kept = np.abs(self._weights) > threshold
        below, above = kept & (self._weights < 0), kept & (self._weights > 0)
        a = 2 * threshold if value == SCALE else np.abs(self._weights[kept]).mean() if kept.any() else 0.0
        return a, (below.mean(), 1 - kept.mean(), above.mean())

    def error_at(self, percent, value):
        """The mean squared error, in % of the mean square weight."""
        a, _ = self.state(percent, value)
        kept = np.abs(self._weights) > percent / 100 * self._mean
        back = np.where(kept, np.sign(self._weights) * a, 0)
        return 100 * np.square(back - self._weights).mean() / self._power

    def least(self, value):
        """(threshold in % of the mean magnitude, error in %) of the best position of the slider."""
        place = int(np.argmin(self._curves[value]))
        return int(self._percents[place]), self._curves[value][place]

    def _setup(self, figure):
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 0.8, 1.5))
        return [*self._setup_weights(left), *self._setup_shares(middle), *self._setup_errors(right)]

    def _setup_weights(self, axes):
        reach = min(np.abs(self._weights).max(), 6.5 * self._mean)
        counts, edges = np.histogram(self._weights, 80, (-reach, reach))
        axes.stairs(counts, edges, fill=True, color=plots.COLORS["original"], alpha=0.4)
        axes.set(title="weights, and what comes back", xlabel="weight", ylabel="count", xlim=(-reach, reach))
        axes.set_ylim(-0.07 * counts.max(), 1.32 * counts.max())
        axes.locator_params(axis="x", nbins=5)
        self._top = 1.02 * counts.max()
        (self._edges,) = axes.plot([], [], color=plots.COLORS["marker"], linestyle=":", label="thresholds")
        (self._back,) = axes.plot([], [], "o", color=plots.COLORS["quantized"], markersize=9, label="−a, 0, a")
        axes.legend(loc="upper center", ncols=2, fontsize=10, handletextpad=0.4)
        return [self._edges, self._back]

    def _setup_shares(self, axes):
        axes.set(title="share of each", ylabel="%", ylim=(0, 100), xticks=(-1, 0, 1))
        axes.grid(axis="x", visible=False)
        self._bars = axes.bar((-1, 0, 1), (0, 0, 0), width=0.7, color=plots.COLORS["quantized"])
        return list(self._bars)

    def _setup_errors(self, axes):
        axes.set(title="mean squared error", xlabel="threshold (% of the mean magnitude)")
        axes.set(ylabel="% of mean square weight", xlim=(-6, _MOST + 6), ylim=(0, 105))
        styles = {SCALE: ("quantized", "-", "a = scale"), BEST: ("other", "--", "a = mean of the rest")}
        for value, (color, line, label) in styles.items():
            axes.plot(self._percents, self._curves[value], line, color=plots.COLORS[color], label=label)
        axes.axvline(ABSMEAN, color=plots.COLORS["faint"], linewidth=1, linestyle=":")
        axes.text(ABSMEAN + 3, 97, "absmean", fontsize=10, color=plots.COLORS["faint"])
        if self._absmax <= _MOST:
            axes.axvline(self._absmax, color=plots.COLORS["faint"], linewidth=1, linestyle=":")
            axes.text(self._absmax - 3, 97, "absmax", fontsize=10, ha="right", color=plots.COLORS["faint"])
        (self._dot,) = axes.plot([], [], "o", markersize=9, color=plots.COLORS["marker"])
        axes.legend(loc="lower right", fontsize=10)
        return [self._dot]

    def _update(self, threshold, value):
        a, shares = self.state(threshold, value)
        error, (best, least) = self.error_at(threshold, value), self.least(value)
        limit = threshold / 100 * self._mean
        self._edges.set_data(*measure.lines(np.array([-limit, limit]), 0, self._top))
        self._back.set_data([-a, 0, a], [0, 0, 0])
        for bar, share in zip(self._bars, shares, strict=True):
            bar.set_height(100 * share)
        self._dot.set_data([threshold], [error])
        name = " (absmean)" if threshold == ABSMEAN and value == SCALE else ""
        below, zero, above = (100 * share for share in shares)
        return (
            f"0 below {threshold} % of the mean magnitude{name}: {below:.0f} % are -1, {zero:.0f} % are 0, "
            f"{above:.0f} % are 1; a is {a / self._mean:.2f} times the mean magnitude, error {error:.1f} %; "
            f"the least, {least:.1f} %, at {best} %"
        )


def ternary_explorer(weights=None):
    """Drag what counts as zero, and see the shares of -1, 0 and 1, what they come back as, and the error.

    weights: a matrix or a vector, by default 16,384 normal random numbers; one scale for all.
    Raises ValueError for weights that cannot be quantized.
    """
    return TernaryExplorer(np.random.default_rng(0).standard_normal(16384) if weights is None else weights)
