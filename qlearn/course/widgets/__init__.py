"""Things to drag and click: every live widget of the course.

    LivePlot                a picture that follows its controls, for a lesson's own ideas
    BitExplorer             click the bits of a floating-point number
    number_line             a still picture of the numbers of small formats;  number_line_explorer: drag x along one
    absmax_explorer         bits, who shares a scale, errors, true bits per weight;  outlier_explorer: one weight grows
    clip_explorer           where to cut the largest weights off
    hex_view                which byte of a block, or of a file, says what
    balancing_explorer      SINQ's balancing, step by step, with something that is too large
    column_explorer         GPTQ, one column at a time, beside round-to-nearest
    settling_explorer       a weight in training that belongs between two grid points
    ternary_explorer        what counts as zero, when a weight is -1, 0 or 1 times a number
    zero_point_explorer     symmetric against asymmetric grids on shifted values
    activation_explorer     one large number, or one large channel, in the inputs of an 8-bit layer
    rotation_explorer       an outlier that grows in a group of FP4 numbers, plain and rotated
    precision_map           for which sizes and how much text training in FP4 is the best choice
    rank_explorer           how much of a change to a matrix a low rank holds, and what it costs
    text_breaker            what a model writes with fewer and fewer bits

Each shows a line of text about its state, works from the keyboard, has a still picture for places where nothing is
live, and a `sweep()` that walks through all its states, for tests.
"""

from qlearn.course.live import LivePlot
from qlearn.course.widgets.absmax import absmax_explorer, outlier_explorer
from qlearn.course.widgets.activations import activation_explorer
from qlearn.course.widgets.balancing import balancing_explorer
from qlearn.course.widgets.bits import BitExplorer
from qlearn.course.widgets.clipping import clip_explorer
from qlearn.course.widgets.column_by_column import column_explorer
from qlearn.course.widgets.hexview import hex_view
from qlearn.course.widgets.numberline import number_line, number_line_explorer
from qlearn.course.widgets.precision_map import precision_map
from qlearn.course.widgets.rank import rank_explorer
from qlearn.course.widgets.rotation import rotation_explorer
from qlearn.course.widgets.settling import settling_explorer
from qlearn.course.widgets.ternary import ternary_explorer
from qlearn.course.widgets.text import text_breaker
from qlearn.course.widgets.zeropoint import zero_point_explorer

__all__ = [
    "BitExplorer",
    "LivePlot",
    "absmax_explorer",
    "activation_explorer",
    "balancing_explorer",
    "clip_explorer",
    "column_explorer",
    "hex_view",
    "number_line",
    "number_line_explorer",
    "outlier_explorer",
    "precision_map",
    "rank_explorer",
    "rotation_explorer",
    "settling_explorer",
    "ternary_explorer",
    "text_breaker",
    "zero_point_explorer",
]
