"""The settling explorer: a weight under the straight-through estimator whose best value lies between two grid points.

The grid is 0, 1; the loss is half the squared distance between the rounded weight and a target t in between. Rounded to
0 the weight is told to grow, with gradient -t; rounded to 1 it is told to shrink, with gradient 1 - t. So it walks to
the threshold at 0.5 and stays there, a little below, a little above. The smaller the learning rate, the closer it
stays. What the model computes with, the rounded weight, jumps by a whole step all the same, as often as before, and is
the target on average.

Every step is a forward and a backward pass of `fake_round`. All learning rates of the slider take it together, as the
entries of one tensor, and the walks of one target are kept.
"""

import ipywidgets
import numpy as np
import torch

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.formats.integers import Integers
from qlearn.training.fake_quant import fake_round

RATES = 10.0 ** np.linspace(-1.75, 0, 8)
STEPS, WINDOW = 200, 60  # of the walk, and its end, over which swing, jumps and average are taken
_GRID = Integers(4)


class SettlingExplorer(LivePlot):
    """A latent weight, its rounded value and the target against the steps; see `settling_explorer`."""

    def __init__(self):
        self._known = {}
        controls = {
            "target": ipywidgets.FloatSlider(min=0.2, max=0.8, step=0.05, value=0.3, description="target (steps)"),
            "rate": ipywidgets.FloatLogSlider(
                min=-1.75, max=0, step=0.25, value=RATES[4], description="learning rate", readout_format=".3f"
            ),
            "falling": ipywidgets.Checkbox(value=False, description="learning rate falls to 0 along a cosine"),
        }
        alt = (
            "A latent weight walks to the threshold between two grid points and its rounded value jumps to and fro; "
            "beside it, swing and jumps against the learning rate."
        )
        super().__init__(self._setup, self._update, figsize=(10, 3.4), alt=alt, name="SettlingExplorer", **controls)

    def _setup(self, figure):
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        left.set(title="one weight", xlabel="step", ylabel="value (steps of the grid)")
        left.set(xlim=(0, STEPS), ylim=(-0.15, 1.4), yticks=[0, 0.5, 1])
        left.axhline(0.5, color=plots.COLORS["faint"], linestyle=":", linewidth=1.2)
        (self._rounded,) = left.step([], [], where="post", color=plots.COLORS["quantized"], label="rounded")
        (self._latent,) = left.plot([], [], color=plots.COLORS["original"], label="latent")
        (self._target,) = left.plot([], [], "--", color=plots.COLORS["marker"], linewidth=1.2, label="target")
        self._rounded.set_linewidth(0.9)
        left.legend(loc="upper center", ncols=3)
        right.set(title=f"the last {WINDOW} steps", xlabel="learning rate", xscale="log", yscale="log")
        right.set(xlim=(0.015, 1.2), ylim=(0.0005, 2))
        right.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        right.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        (self._jumps,) = right.plot([], [], color=plots.COLORS["quantized"], label="jumps of the rounded, per step")
        (self._swing,) = right.plot([], [], color=plots.COLORS["original"], label="swing of the latent")
        (self._dots,) = right.plot([], [], "o", markersize=7, color=plots.COLORS["marker"])
        right.legend(loc="lower right", fontsize=10)
        return [self._rounded, self._latent, self._target, self._jumps, self._swing, self._dots]

    def _walks(self, target, falling):
        """(latent, rounded), each (STEPS, rates), computed when a target is first shown."""
        if (target, falling) not in self._known:
            self._known[target, falling] = walk(target, RATES, STEPS, falling)
        return self._known[target, falling]

    def _update(self, target, rate, falling):
        latent, rounded = self._walks(round(target, 2), falling)
        place = int(np.abs(np.log(RATES / rate)).argmin())
        swing, jumps = np.ptp(latent[-WINDOW:], axis=0), np.abs(np.diff(rounded[-WINDOW:], axis=0)).mean(0)
        self._rounded.set_data(np.arange(STEPS), rounded[:, place])
        self._latent.set_data(np.arange(STEPS), latent[:, place])
        self._target.set_data([0, STEPS], [target, target])
        self._jumps.set_data(RATES, jumps)
        self._swing.set_data(RATES, swing)
        self._dots.set_data([RATES[place]] * 2, [jumps[place], swing[place]])
        crossed = np.flatnonzero(np.diff(rounded[:, place]))
        return (
            f"target {target:.2f}, learning rate {'falling from ' if falling else ''}{RATES[place]:.3f}: "
            f"at the threshold after {crossed[0] + 1} steps; in the last {WINDOW} the latent weight swings by "
            f"{swing[place]:.3f}, the rounded one jumps {round(jumps[place] * (WINDOW - 1))} times, "
            f"is {rounded[-WINDOW:, place].mean():.2f} on average and {rounded[-1, place]:.0f} at the end"
        )


@measure.one_thread
def walk(target, rates, steps, falling=False):
    """Gradient descent on a rounded weight that starts at its best value.

    target: between 0 and 1, in steps of the grid.  rates: learning rates, (n,), one walk each.  falling: along half a
    cosine to 0.
    Returns (latent, rounded): float32 arrays (steps, n), each row before the update of that step.
    """
    weight = torch.full((len(rates),), float(target), requires_grad=True)
    rates, history = torch.as_tensor(rates, dtype=torch.float32), []
    for step in range(steps):
        rounded = fake_round(weight, _GRID)
        history.append(torch.stack([weight.detach(), rounded.detach()]))
        (gradient,) = torch.autograd.grad((rounded - target).square().sum() / 2, weight)
        share = (1 + np.cos(np.pi * step / steps)) / 2 if falling else 1.0
        weight = (weight - share * rates * gradient).detach().requires_grad_(True)
    latent, rounded = torch.stack(history, 1).numpy()
    return latent, rounded


def settling_explorer():
    """Drag the learning rate, and see a weight that belongs between two grid points oscillate about the threshold."""
    return SettlingExplorer()
