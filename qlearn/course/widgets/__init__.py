"""Things to drag and click: every live widget of the course.

    LivePlot                a picture that follows its controls, for a lesson's own ideas
    BitExplorer             click the bits of a floating-point number
    number_line             a still picture of the numbers of small formats;  number_line_explorer: drag x along one
    absmax_explorer         bits, who shares a scale, errors, true bits per weight;  outlier_explorer: one weight grows
    clip_explorer           where to cut the largest weights off
    zero_point_explorer     symmetric against asymmetric grids on shifted values
    text_breaker            what a model writes with fewer and fewer bits

Each shows a line of text about its state, works from the keyboard, has a still picture for places where nothing is
live, and a `sweep()` that walks through all its states, for tests.
"""

from qlearn.course.live import LivePlot
from qlearn.course.widgets.absmax import absmax_explorer, outlier_explorer
from qlearn.course.widgets.bits import BitExplorer
from qlearn.course.widgets.clipping import clip_explorer
from qlearn.course.widgets.numberline import number_line, number_line_explorer
from qlearn.course.widgets.text import text_breaker
from qlearn.course.widgets.zeropoint import zero_point_explorer

__all__ = [
    "BitExplorer",
    "LivePlot",
    "absmax_explorer",
    "clip_explorer",
    "number_line",
    "number_line_explorer",
    "outlier_explorer",
    "text_breaker",
    "zero_point_explorer",
]
