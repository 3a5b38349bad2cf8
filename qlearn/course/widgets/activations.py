"""The activation explorer: one large number, or one large channel, in what a layer reads.

Both make life hard for a grid of 8 bits, but not for the same one:

* One large number belongs to one token. A static grid, the same for all tokens, has to reach it; a grid for each
  token makes only that token pay.
* A large channel is in every token, so a grid for each token is of no help. Smoothing is: it divides the channel, and
  multiplies the column of the weight that reads it.

Every curve is the package's own W8A8 layer, `int8_linear`, on a weight of 8 bits with a scale for each row, against
the same layer in floats. The static grid is calibrated on the tokens that it is measured on, and so is the smoothing.
"""

import ipywidgets
import numpy as np
import torch
from matplotlib.ticker import NullLocator

from qlearn.course import plots
from qlearn.course.live import LivePlot
from qlearn.course.widgets import measure
from qlearn.methods import absmax
from qlearn.methods.observers import OBSERVERS, make_observer
from qlearn.models.int8 import int8_linear
from qlearn.models.smoothquant import smoothing_factors

POWERS = np.arange(17) / 2  # of two: how large the outlier is, as a multiple of the rms of the inputs
KINDS = ("one number", "a channel")
METHODS = ("static", "per token", "static, smoothed", "per token, smoothed")
ALPHA = 0.5
_STYLES = (("quantized", "-"), ("original", "-"), ("quantized", ":"), ("original", ":"))


class ActivationExplorer(LivePlot):
    """The inputs of a layer with an outlier in them, and what four ways of W8A8 make of it; see `activation_explorer`.

    A picture of the magnitudes is on the left; on the right the error of the outputs against the size of the outlier.
    """

    def __init__(self, inputs, weight):
        inputs, self._weight = measure.as_matrix(inputs), measure.as_matrix(weight)
        if inputs.shape[1] != self._weight.shape[1] or len(inputs) < 2:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} do not fit a weight of {tuple(self._weight.shape)}; pass two "
                "tokens or more, and as many channels as the weight has columns"
            )
        self._inputs = inputs / inputs.square().mean().sqrt()
        self._token, self._channel = len(inputs) // 4, inputs.shape[1] // 3
        self._known = {}
        controls = {
            "grows": ipywidgets.Dropdown(options=KINDS, description="what grows"),
            "size": ipywidgets.FloatLogSlider(
                base=2, min=0, max=POWERS[-1], step=0.5, value=1, description="to (× rms)", readout_format=".3g"
            ),
            "observer": ipywidgets.Dropdown(options=list(OBSERVERS), description="static range"),
        }
        alt = (
            "The magnitudes of a layer's inputs, tokens by channels, with one outlier; and the error of the outputs "
            "against the size of it for four ways of quantizing."
        )
        super().__init__(self._setup, self._update, figsize=(10, 3.4), alt=alt, name="ActivationExplorer", **controls)

    def _setup(self, figure):
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        self._image = left.imshow(
            np.zeros(self._inputs.shape),
            cmap="cividis",
            aspect="auto",
            interpolation="nearest",
            vmin=-3,
            vmax=POWERS[-1],
        )
        left.set(title="inputs", xlabel="channel", ylabel="token")
        left.grid(False)
        (self._ring,) = left.plot(
            [], [], "o", markersize=16, fillstyle="none", markeredgewidth=2, color=plots.PALETTE["yellow"]
        )
        bar = figure.colorbar(self._image, ax=left, label="magnitude (× rms)")
        bar.set_ticks([-3, 0, 3, 6], labels=["⅛", "1", "8", "64"])
        right.set(title="error of the outputs", xlabel="size of the outlier (× rms)", ylabel="% (mean over tokens)")
        right.set(xscale="log", yscale="log", xlim=(0.9, 290), ylim=(0.3, 150))
        right.set_xticks([1, 4, 16, 64, 256], labels=["1", "4", "16", "64", "256"], minor=False)
        right.xaxis.set_minor_locator(NullLocator())
        right.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        self._lines = [
            right.plot([], [], line, color=plots.COLORS[color], label=method)[0]
            for method, (color, line) in zip(METHODS, _STYLES, strict=True)
        ]
        (self._dots,) = right.plot([], [], "o", markersize=7, color=plots.COLORS["marker"])
        right.legend(loc="upper left", fontsize=10)
        return [self._image, self._ring, *self._lines, self._dots]

    def _with_outlier(self, grows, size):
        """Inputs and weight with an outlier of that size; a channel's growth is taken out of the weight again."""
        inputs, weight = self._inputs.clone(), self._weight.clone()
        if grows == "one number":
            inputs[self._token, self._channel] = size
        else:
            factor = size / inputs[:, self._channel].square().mean().sqrt().clamp(min=1e-6)
            inputs[:, self._channel] *= factor
            weight[:, self._channel] /= factor
        return inputs, weight

    def _errors(self, grows, size, observer):
        """The error of the outputs for each of METHODS, in %."""
        inputs, weight = self._with_outlier(grows, size)
        s = smoothing_factors(inputs.abs().amax(0), [weight], ALPHA)
        exact = inputs @ weight.T
        found = []
        for x, w in ((inputs, weight), (inputs / s, weight * s)):
            quantized = absmax(w, bits=8)
            static = torch.tensor(make_observer(observer).observe(x).scale(bits=8))
            for scale in (static, None):
                y = int8_linear(x, quantized.codes(), quantized.scales.flatten(), scale)
                found.append(100 * ((y - exact).norm(dim=1) / exact.norm(dim=1)).mean().item())
        return found

    @measure.one_thread
    def _curves(self, grows, observer):
        """(methods, sizes) errors in %, computed when they are first shown."""
        if (grows, observer) not in self._known:
            errors = [self._errors(grows, size, observer) for size in (2.0**POWERS).tolist()]
            self._known[grows, observer] = np.array(errors).T
        return self._known[grows, observer]

    def _update(self, grows, size, observer):
        curves, place = self._curves(grows, observer), round(2 * np.log2(size))
        magnitudes = self._with_outlier(grows, size)[0].abs()
        self._image.set_data(magnitudes.clamp(min=1e-6).log2().numpy())
        spot = ([self._channel], [self._token]) if grows == "one number" else ([], [])
        self._ring.set_data(*spot)
        for line, curve in zip(self._lines, curves, strict=True):
            line.set_data(2.0**POWERS, curve)
        now = curves[:, place]
        self._dots.set_data([size] * len(METHODS), now)
        errors = ", ".join(f"{error:.3g} % {method}" for error, method in zip(now, METHODS, strict=True))
        return f"{grows} at {size:.3g} × rms, static range by {observer}: outputs off by {errors}"


def activation_explorer(inputs=None, weight=None):
    """Let one number or one channel of a layer's inputs grow, and see which W8A8 layers mind.

    inputs: (tokens, channels), by default 48 x 96 normal random numbers.  weight: (out, channels), 96 x 96 by default.
    Raises ValueError for matrices that do not fit together, or hold no ordinary numbers.
    """
    random = np.random.default_rng(0)
    inputs = random.standard_normal((48, 96)) if inputs is None else inputs
    weight = random.standard_normal((96, np.shape(inputs)[-1])) if weight is None else weight
    return ActivationExplorer(inputs, weight)
