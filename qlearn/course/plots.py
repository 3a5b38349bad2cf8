"""One house style for every picture of the course, and the class that carries a picture into a notebook.

A picture here is a matplotlib Figure made without pyplot: nothing is registered globally, so nothing is shown twice
and no figure leaks. `figure` returns a `Picture` and its axes; draw on the axes, then leave the picture as the last
line of the cell:

    picture, axes = figure(6, 3, alt="The error halves with every bit.")
    axes.plot(bits, error)
    picture

A notebook stores three things about it: the PNG, the sentence of alternative text in the image's metadata, and one
stable line of plain text. Readers who cannot see the picture get the sentence, and a test that re-runs the notebook
compares the line, never the pixels, which differ between versions of matplotlib and of its fonts.

Colours are those of Okabe and Ito (2008), which people with any of the common kinds of colour blindness can tell
apart. Text is set at 12 points on 100 dots per inch, so that it can still be read when the picture is shown at half
its size.
"""

import base64
import io

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 100

PALETTE = {
    "black": "#000000",
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "yellow": "#F0E442",
    "grey": "#767676",
}

#: What a colour means, the same in every picture of the course.
COLORS = {
    "original": PALETTE["blue"],
    "quantized": PALETTE["vermillion"],
    "error": PALETTE["vermillion"],
    "other": PALETTE["green"],
    "marker": PALETTE["black"],
    "faint": PALETTE["grey"],
    "sign": PALETTE["vermillion"],
    "exponent": PALETTE["blue"],
    "mantissa": PALETTE["green"],
}

_CYCLE = [PALETTE[name] for name in ("blue", "vermillion", "green", "orange", "purple", "sky", "black")]

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.prop_cycle": matplotlib.cycler(color=_CYCLE),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "axes.formatter.use_mathtext": True,
}


def style():
    """The house style as a context manager: inside it, what matplotlib creates looks like the rest of the course."""
    return matplotlib.rc_context(STYLE)


class Picture:
    """A matplotlib figure with the sentence that stands in for it.

    figure: a matplotlib Figure.  alt: one sentence that says what the picture shows.
    Shown in a notebook it gives image/png (with the sentence as the image's `alt` metadata) and one line of text/plain.
    """

    def __init__(self, figure, alt):
        if not str(alt).strip():
            raise ValueError("a picture needs alternative text; pass alt='one sentence that says what can be seen'")
        self.figure, self.alt = figure, " ".join(str(alt).split())

    def png(self):
        """The picture as PNG bytes; the same figure gives the same bytes, as neither date nor version is written."""
        buffer = io.BytesIO()
        with style():
            self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None, "Description": self.alt})
        return buffer.getvalue()

    def __repr__(self):
        return f"Picture: {self.alt}"

    def _repr_mimebundle_(self, include=None, exclude=None):
        return mimebundle(self.png(), repr(self), self.alt)


def mimebundle(png, text, alt):
    """The (data, metadata) pair that IPython displays: a PNG with alternative text, and a line of plain text."""
    data = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": text}
    return data, {"image/png": {"alt": alt}}


def blank(width, height):
    """An empty matplotlib Figure of width x height inches with its own canvas, unknown to pyplot."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure(width=8, height=3, *, alt, rows=1, columns=1, **subplots):
    """A picture in the house style and its axes.

    width, height: inches (100 pixels each).  alt: one sentence of alternative text.  rows, columns: of the grid of
    axes.
    subplots: passed to Figure.subplots (sharex, width_ratios ...).
    Returns (Picture, axes), axes being one Axes or, for a grid, an array of them. Raises ValueError without
    alternative text.

    >>> picture, axes = figure(4, 2, alt="Three points on a line.")
    >>> lines = axes.plot([1, 2, 3])
    >>> picture
    Picture: Three points on a line.
    """
    picture = Picture(blank(width, height), alt)
    with style():
        axes = picture.figure.subplots(rows, columns, **subplots)
    return picture, axes
