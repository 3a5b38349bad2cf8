"""The rotation explorer: one number of a group grows, with a Hadamard rotation and without.

A group of 32 shares a scale, and its largest number sets it. Plain, the outlier takes most of the numbers of FP4
for itself: the others share what is left, at last all of them are 0. Rotated, each number that is rounded is a mixture
of all, so the outlier is spread evenly over the group, and so is the error that comes back.

What is drawn: the numbers over the scale of their group, with the lines of FP4's grid, plain above and rotated below,
and at the right the squared error after the way back, for the 31 others and for the whole group, each as a share of
its own squares. Errors are means over many groups, since that of a single one is a matter of luck; the group that is
drawn is the first of them, and a number beyond the picture stands at its edge.
"""

import ipywidgets
import numpy as np
import torch

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.formats.floats import FP4_E2M1
from qlearn.methods.e2m1 import mx_scale, power_of_two
from qlearn.rotation import hadamard
from qlearn.training.low_precision import GAUSSIAN_CLIP, MXFP4, QuEST

QUANTIZERS = {"MXFP4: the largest number sets it": MXFP4(), "QuEST: by the standard deviation": QuEST()}
GRID = np.unique(FP4_E2M1.decode(np.arange(16)))  # 0 and -0 are one line
SIZE, PLACE = 32, 7
_GROUPS, _MOST = 256, 64
_LEGEND = 10  # the legend of the errors reaches to this size of the outlier
_REACH = 8.6  # in units of the scale; MXFP4 leaves the largest number below 8
_QUEST_SHARE = GAUSSIAN_CLIP["fp4"] / 6


class RotationExplorer(LivePlot):
    """A group with an outlier, plain and rotated, and the errors; see `rotation_explorer`."""

    def __init__(self, seed):
        self._base = torch.randn(_GROUPS, SIZE, generator=torch.Generator().manual_seed(seed))
        self._sizes, self._known = np.unique(np.geomspace(1, _MOST, 49).round()).astype(int), {}
        controls = {
            "outlier": ipywidgets.IntSlider(min=1, max=_MOST, value=8, description="size of the outlier"),
            "scale": ipywidgets.Dropdown(options=list(QUANTIZERS), description="scale"),
        }
        alt = (
            "A group of 32 numbers over the grid of FP4, plain above and rotated below, and the squared errors of both "
            "against the size of the outlier."
        )
        super().__init__(self._setup, self._update, figsize=(11, 4.4), alt=alt, name="RotationExplorer", **controls)

    def groups(self, outlier):
        """All groups with the outlier in its place, (groups, 32)."""
        groups = self._base.clone()
        groups[:, PLACE] = outlier
        return groups

    @measure.one_thread
    def errors(self, outlier, scale):
        """Squared errors in %: {"plain" and "rotated": (of the 31 others, of the whole group)}."""
        if (outlier, scale) not in self._known:
            x, quantizer = self.groups(outlier), QUANTIZERS[scale]
            back = {"plain": quantizer(x).values, "rotated": hadamard(quantizer(hadamard(x, SIZE)).values, SIZE)}
            self._known[outlier, scale] = {name: _shares(x, there) for name, there in back.items()}
        return self._known[outlier, scale]

    def _setup(self, figure):
        grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
        above, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
        self._dots = [
            *self._setup_group(above, "plain: numbers over their scale", ""),
            *self._setup_group(below, "rotated", "position in the group"),
        ]
        return [*self._dots, *self._setup_errors(figure.add_subplot(grid[:, 1]))]

    def _setup_group(self, axes, title, xlabel):
        axes.set(title=title, xlabel=xlabel, ylabel="in scales", xlim=(-0.8, SIZE - 0.2), ylim=(-_REACH, _REACH))
        axes.grid(False)
        axes.hlines(GRID, -0.8, SIZE - 0.2, color=plots.PALETTE["orange"], linewidth=0.7)
        axes.set_yticks([-6, -3, 0, 3, 6])
        (now,) = axes.plot([], [], "o", markersize=5, color=plots.COLORS["original"], label="number")
        style = {"markersize": 7, "markeredgewidth": 1.8, "color": plots.COLORS["quantized"]}
        (code,) = axes.plot([], [], "x", label="rounded", **style)
        if not xlabel:
            axes.legend(loc="lower right", ncols=2, fontsize=9, handletextpad=0, columnspacing=0.8)
        return [now, code]

    def _setup_errors(self, axes):
        axes.set(title="squared error", xlabel="size of the outlier", ylabel="% of the squares")
        axes.set(xscale="log", yscale="log")
        axes.set(xlim=(0.9, 1.1 * _MOST), ylim=(0.3, 300))
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
        axes.set_yticks([1, 10, 100], [1, 10, 100])
        axes.minorticks_off()
        styles = (("plain", "quantized"), ("rotated", "other"))
        self._lines = {}
        for name, color in styles:
            for which, line in (("the others", "-"), ("the whole group", ":")):
                (drawn,) = axes.plot([], [], line, color=plots.COLORS[color], label=f"{name}, {which}")
                self._lines[name, which] = drawn
        (self._cursor,) = axes.plot([], [], color=plots.COLORS["marker"], linewidth=1)
        axes.legend(loc="upper left", fontsize=9)
        return [*self._lines.values(), self._cursor]

    def _update(self, outlier, scale):
        first = self.groups(outlier)[:1]
        for k, numbers in enumerate((first, hadamard(first, SIZE))):
            in_scales, rounded = _over_scale(numbers, scale)
            self._dots[2 * k].set_data(np.arange(SIZE), np.clip(in_scales, -_REACH, _REACH))
            self._dots[2 * k + 1].set_data(np.arange(SIZE), rounded)
        curves = [self.errors(int(size), scale) for size in self._sizes]
        for (name, which), line in self._lines.items():
            line.set_data(self._sizes, [curve[name][which == "the whole group"] for curve in curves])
        self._cursor.set_data([outlier, outlier], [0.3, 300 if outlier > _LEGEND else 15])  # below the legend
        found = self.errors(outlier, scale)
        zeros = int((_over_scale(first, scale)[1] == 0).sum())
        return (
            f"outlier {outlier}, {scale.partition(':')[0]}: {zeros} of {SIZE} become 0; squared error of the others "
            f"{found['plain'][0]:.1f} % plain, {found['rotated'][0]:.1f} % rotated; "
            f"of the whole group {found['plain'][1]:.1f} % and {found['rotated'][1]:.1f} %"
        )


def _over_scale(numbers, scale):
    """(numbers, rounded numbers) of one group, over its scale, as arrays."""
    quantizer = QUANTIZERS[scale]
    if isinstance(quantizer, MXFP4):
        step = mx_scale(numbers.abs().amax())
    else:
        step = power_of_two(numbers.std(correction=0) * _QUEST_SHARE, quantizer.exponent)
    return (numbers / step)[0].numpy(), (quantizer(numbers).values / step)[0].numpy()


def _shares(x, there):
    """Squared error in % of the squares, of the 31 others and of all."""
    square, off = x.square(), (there - x).square()
    others = torch.arange(SIZE) != PLACE
    return tuple(100 * (off[:, m].sum() / square[:, m].sum()).item() for m in (others, torch.ones(SIZE, dtype=bool)))


def rotation_explorer(seed=0):
    """Let one number of a group of 32 grow, and see what is left for the others, with a rotation and without.

    seed: of the ordinary numbers.
    """
    return RotationExplorer(seed)
