"""The precision map: for which sizes of model, and how much text, FP4 is the best choice.

Each place on the map is a training in FP8: so many parameters, so many tokens for each. All others get the time that it
takes. The colour says who reaches the least loss in that time, by the package's `optimal_precision`: FP8, FP4, or, if
asked, FP4 in one of the passes alone. The deeper the colour, the more the next best would lose: five shades, parted at
1, 3, 10 and 30 thousandths of a nat. Beside it, the loss of each less that of FP8, for one billion parameters.

The efficiencies of the sliders are those of each pass: FP4 has both, and a precision with FP4 in one pass has that
pass's. They begin where the fit of the published runs with both passes in FP4 put them (0.66 and 0.82), and the speeds
where Quartet's authors measured them, relative to FP8. Dots are the runs that the law was fitted to; all else is
extrapolated.
"""

import ipywidgets
import numpy as np
from matplotlib.patches import Patch

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.training.precision import Speed, optimal_precision, worth
from qlearn.training.scaling_law import Efficiency, fit, published

SPENDS = {
    "a larger model, as fast to run": "size",
    "more tokens for the same model": "tokens",
    "what is best: size and tokens free": "both",
}
COLORS = {
    "FP8": plots.PALETTE["blue"],
    "FP4": plots.PALETTE["vermillion"],
    "FP4 forward": plots.PALETTE["green"],
    "FP4 backward": plots.PALETTE["purple"],
}
SIZES, RATIOS = np.geomspace(1e7, 1e12, 101), np.geomspace(5, 5000, 91)  # parameters, tokens for each
SIZE = 1e9  # of the picture at the right
GAINS = (0.001, 0.003, 0.01, 0.03)  # nats at which a colour gets deeper: few shades, as they make small pictures
_SHADES = np.array([0.35, 0.5, 0.65, 0.8, 1.0])
_LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


class PrecisionMap(LivePlot):
    """The best precision over size and tokens, and the losses at one size; see `precision_map`."""

    def __init__(self, law=None):
        self._points = published("bf16") if law is None else []
        self.law = law or fit(self._points)
        speed = ipywidgets.FloatSlider
        controls = {
            "spend": ipywidgets.Dropdown(options=list(SPENDS), description="time saved goes into"),
            "halves": ipywidgets.Checkbox(value=False, description="also FP4 in one pass alone"),
            "forward": speed(min=1, max=3, step=0.05, value=2.0, description="forward pass, times FP8"),
            "backward": speed(min=1, max=3, step=0.05, value=1.45, description="backward pass, times FP8"),
            "eff_N": speed(min=0.4, max=1, step=0.01, value=0.66, description="eff_N (forward)"),
            "eff_D": speed(min=0.4, max=1, step=0.01, value=0.82, description="eff_D (backward)"),
        }
        alt = (
            "A map of the best precision over model size and tokens per parameter, and the losses of FP4 and its "
            "halves less that of FP8 at one billion parameters."
        )
        super().__init__(self._setup, self._update, figsize=(11, 4), alt=alt, name="PrecisionMap", **controls)

    def best(self, spend, halves, forward, backward, eff_N, eff_D, sizes=SIZES[:, None], ratios=RATIOS):
        """(array of names, {name: losses}), as `optimal_precision` gives it for the values of the controls."""
        speeds = {
            "FP8": Speed(),
            "FP4": Speed(forward, backward),
            "FP4 forward": Speed(forward, 1),
            "FP4 backward": Speed(1, backward),
        }
        efficiencies = {
            "FP8": Efficiency(),
            "FP4": Efficiency(eff_N, eff_D),
            "FP4 forward": Efficiency(eff_N, 1),
            "FP4 backward": Efficiency(1, eff_D),
        }
        if not halves:
            efficiencies = {name: efficiencies[name] for name in ("FP8", "FP4")}
        return optimal_precision(self.law, efficiencies, speeds, sizes, sizes * ratios, SPENDS[spend])

    def _setup(self, figure):
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        return [*self._setup_map(left), *self._setup_losses(right)]

    def _setup_map(self, axes):
        corners = np.log10([SIZES[0], SIZES[-1], RATIOS[0], RATIOS[-1]])
        blank = np.full((len(RATIOS), len(SIZES), 4), 255, np.uint8)
        self._map = axes.imshow(blank, extent=corners, origin="lower", aspect="auto", interpolation="nearest")
        axes.set(title="who has the least loss (the deeper, the larger the lead)", xlabel="parameters")
        axes.set_ylabel("tokens for each parameter")
        axes.set_xticks(range(7, 13), [_short(10.0**i) for i in range(7, 13)])
        axes.set_yticks([1, 2, 3], ["10", "100", "1,000"])
        axes.grid(False)
        (line,) = axes.plot(np.log10([SIZE, SIZE]), corners[2:], ":", color=plots.COLORS["marker"], linewidth=1.2)
        dots = np.log10([(row["params"], row["tokens"] / row["params"]) for row in self._points] or np.empty((0, 2)))
        (runs,) = axes.plot(*dots.T, "o", markersize=3, color=plots.COLORS["marker"])
        axes.legend(
            handles=[Patch(color=color, label=name) for name, color in COLORS.items()], ncols=4, fontsize=10,
            loc="upper center", bbox_to_anchor=(0.5, -0.17), handlelength=1, columnspacing=1,
        )  # fmt: skip
        return [self._map, line, runs]

    def _setup_losses(self, axes):
        axes.set(title=f"at {_short(SIZE)} parameters", xlabel="tokens for each parameter")
        axes.set_ylabel("loss less FP8's (nats)")
        axes.set(xscale="log", xlim=(RATIOS[0], RATIOS[-1]), ylim=(-0.1, 0.1))
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
        axes.axhline(0, color=COLORS["FP8"])
        styles = {"FP4": "-", "FP4 forward": "--", "FP4 backward": "-."}
        self._lines = {name: axes.plot([], [], style, color=COLORS[name])[0] for name, style in styles.items()}
        return list(self._lines.values())

    def _update(self, spend, halves, forward, backward, eff_N, eff_D):
        values = {"spend": spend, "halves": halves, "forward": forward, "backward": backward}
        values |= {"eff_N": round(eff_N, 2), "eff_D": round(eff_D, 2)}
        best, losses = self.best(**values)
        self._map.set_data(_colours(best, losses).swapaxes(0, 1))
        column, at_size = self.best(**values, sizes=SIZE)
        for name, line in self._lines.items():
            line.set_data(RATIOS, at_size[name] - at_size["FP8"]) if name in at_size else line.set_data([], [])
        shares = ", ".join(f"{name} {(best == name).mean():.0%}" for name in losses if (best == name).any())
        speed = Speed(forward, backward)
        value = worth(Efficiency(values["eff_N"], values["eff_D"]), speed)
        return (
            f"training in FP4 is {speed.training:.2f} times as fast; with size and tokens free, an hour of it is worth "
            f"{value:.2f} of FP8; best on the map: {shares}; at {_short(SIZE)} parameters: {_stretches(column)}"
        )


def _colours(best, losses):
    """uint8 RGBA of each place: the winner's colour, paler where it gains little on the next best."""
    least, second = np.partition(np.stack(list(losses.values())), 1, axis=0)[:2]
    paleness = 1 - _SHADES[np.searchsorted(GAINS, second - least)]
    image = np.full((*best.shape, 4), 255, np.uint8)
    for name in losses:
        color = np.array([int(COLORS[name][i : i + 2], 16) for i in (1, 3, 5)])
        chosen = best == name
        image[chosen, :3] = np.round(color + paleness[chosen, None] * (255 - color))
    return image


def _stretches(column):
    """Who wins from which number of tokens a parameter on: "FP8, from 160 tokens a parameter on FP4"."""
    starts = [0, *(np.flatnonzero(column[1:] != column[:-1]) + 1)]
    later = [f"from {RATIOS[i]:.0f} tokens a parameter on {column[i]}" for i in starts[1:]]
    return ", ".join([str(column[0]), *later])


def _short(number):
    """1e9 -> "1 B"."""
    size, letter = next((size, letter) for size, letter in _LETTERS if number >= size)
    return f"{number / size:.0f} {letter}"


def precision_map(law=None):
    """Drag the speeds and efficiencies of FP4, and see where it beats FP8.

    law: a Law; None for the fit of the published runs.
    """
    return PrecisionMap(law)
