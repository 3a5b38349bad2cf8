"""The text breaker: take bits from a language model until what it writes falls apart.

The lesson passes in `generate(bits) -> (text, number)`, which quantizes the model and lets it write. That takes
seconds, so it is called once for each number of bits, when it is first asked for, and the slider waits until it is
let go.
"""

import html
import math
import textwrap

import ipywidgets

from qlearn.course import plots
from qlearn.course.live import LiveView, make_control

_COLUMNS, _LINES = 90, 18  # of the still picture


class TextBreaker(LiveView):
    """A slider over bits with the text that is written at each; see `text_breaker`."""

    def __init__(self, generate, bits, measure):
        self._generate, self._measure, self._known = generate, measure, {}
        low, high = bits
        slider = ipywidgets.SelectionSlider(options=range(high, low - 1, -1), continuous_update=False)
        slider = make_control("bits for each weight", slider)
        self.text = ipywidgets.HTML()
        alt = f"What the model writes at a number of bits from {high} to {low}, and its {measure}."
        super().__init__("TextBreaker", alt, {"bits": slider}, [self.text])

    def show(self, bits):
        if bits not in self._known:
            self.say(f"writing with {bits} bits; this takes a few seconds …")
            text, number = self._generate(bits)
            self._known[bits] = str(text), float(number)
        self._shown, number = self._known[bits]
        style = (
            "white-space: pre-wrap; line-height: 1.35; padding: 0.6em; min-height: 12em; border-left: 4px solid #0072B2"
        )
        self.text.value = f'<pre class="qtext" style="{style}">{html.escape(self._shown)}</pre>'
        return f"{bits} bits: {self._measure} {number:.3g}"

    def png(self):
        """The text as a still picture, its first lines at least, PNG bytes."""
        lines = [
            part
            for line in self._shown.splitlines()
            for part in textwrap.wrap(line, _COLUMNS, drop_whitespace=False) or [""]
        ]
        if len(lines) > _LINES:
            lines = [*lines[: _LINES - 1], "…"]
        figure = plots.blank(8, 0.6 + 0.21 * (len(lines) + 1))
        with plots.style():
            figure.text(0.01, 0.98, self.summary, va="top", fontweight="bold", color=plots.COLORS["original"])
            top = 1 - 0.4 / figure.get_figheight()
            shown = "\n".join(lines).replace("$", r"\$")  # a lone dollar sign would begin a formula
            figure.text(0.01, top, shown, va="top", family="DejaVu Sans Mono", fontsize=10, linespacing=1.35)
        return plots.Picture(figure, self.alt).png()


def text_breaker(generate, bits=(2, 8), measure="perplexity"):
    """Drag bits away from a model, and read what it writes.

    generate(bits) -> (text, number): called once for each number of bits, when it is first shown; `measure` names the
    number.
    bits: (low, high); the slider begins at the high end. Raises ValueError for an empty range; what `generate` raises
    shows in the note.

    >>> text_breaker(lambda bits: ("def f(): return " + "x" * bits, 2 ** (10 - bits)), bits=(2, 8))
    TextBreaker: 8 bits: perplexity 4
    """
    low, high = bits
    if not (math.isfinite(low) and math.isfinite(high) and 1 <= low <= high):
        raise ValueError(f"bits={tuple(bits)} is no range; pass (low, high) such as (2, 8)")
    return TextBreaker(generate, bits, measure)
