"""The board: one picture for the whole course, true bits per weight against loss.

Each lesson adds the points it measured, `add("absmax 4 bit, groups of 64", 4.25, 2.13)`, and shows the picture,
`show()`. Bits per weight count everything that is stored, scales and zero points too; loss is the mean negative
log-likelihood in nats per token on the held-out text of the course. Down and to the left is better. The **Pareto
front** joins the points that no other point beats in both: whoever sits above it gives away bits or loss for nothing.

The vertical axis is the loss added to that of the unquantized model, which is the line at zero. Its scale is
logarithmic but for a linear piece around zero, so that 6 bits and 2 bits fit in one picture and a lucky negative
difference still has a place. The point named "unquantized" sets the zero; without one the plain loss is drawn.

Two kinds of points are drawn. Bold ones are the learner's own, kept in the data folder from lesson to lesson; adding
a name again replaces it. Faint ones are the course's own measurements, in `board_points.json` beside this file:
{"unquantized": loss or null, "points": [[name, bits per weight, loss], ...]}. The build points QLEARN_DATA at an
empty folder, so a committed picture shows what its own lesson added on top of the faint ones.
"""

import json
import math
from importlib import resources

from qlearn.course import plots, store

_FILE = "board.json"
_UNQUANTIZED = "unquantized"


def add(name, bits_per_weight, loss):
    """Put a point on the board, or replace the one of that name.

    bits_per_weight: true bits per weight, > 0.  loss: nats per token on the course's held-out text.
    The name "unquantized" sets the zero of the picture. Raises ValueError for an empty name or a number that is not
    finite.
    """
    bits_per_weight, loss = float(bits_per_weight), float(loss)
    if not str(name).strip():
        raise ValueError("a point needs a name, such as 'absmax 4 bit, groups of 64'")
    if not (math.isfinite(loss) and math.isfinite(bits_per_weight) and bits_per_weight > 0):
        raise ValueError(
            f"{name!r} has {bits_per_weight} bits per weight and loss {loss}; both must be finite, bits above zero"
        )
    store.write(_FILE, store.read(_FILE) | {str(name): [bits_per_weight, loss]})


def points():
    """The learner's own points, {name: (bits per weight, loss)}, the unquantized model among them."""
    return {name: (float(bits), float(loss)) for name, (bits, loss) in store.read(_FILE).items()}


def pareto_front(points):
    """The names on the Pareto front of {name: (bits, loss)}, from few bits to many.

    A point is on it when no other has at most its bits and at most its loss, one of them strictly less.

    >>> pareto_front({"a": (2.2, 4.0), "b": (4.2, 2.1), "c": (4.5, 2.3)})
    ['a', 'b']
    """
    front, best = [], math.inf
    for name, (_, loss) in sorted(points.items(), key=lambda item: item[1]):
        if loss < best:
            front.append(name)
            best = loss
    return front


def show():
    """The picture of the board; its alternative text and plain text list the learner's points."""
    own, reference = points(), _reference()
    zero = own.pop(_UNQUANTIZED, (None, reference["unquantized"]))[1]
    faint = {name: (bits, loss) for name, bits, loss in reference["points"] if name not in own}
    own = dict(sorted(own.items(), key=lambda item: item[1]))
    front = pareto_front(faint | own)
    picture, (axes, legend) = plots.figure(
        9, max(4, 1 + 0.25 * len(own)), alt=_sentence(own, front), columns=2, width_ratios=(2.3, 1)
    )
    with plots.style():
        _draw(axes, own, faint, front, zero)
        _list(legend, own, front)
    return picture


def _reference():
    return json.loads(resources.files("qlearn.course").joinpath("board_points.json").read_text(encoding="utf-8"))


def _sentence(own, front):
    listed = "; ".join(f"{name} at {bits:.2f} bits, loss {loss:.3g}" for name, (bits, loss) in own.items())
    count = sum(name in own for name in front)
    listed = listed or "no points yet"
    return f"the board, loss against true bits per weight: {listed} ({count} of {len(own)} on the Pareto front)."


def _draw(axes, own, faint, front, zero):
    """Points, front and the line of the unquantized model; the learner's points carry their number in the list."""
    bits = {name: b for name, (b, _) in (faint | own).items()}
    height = {name: loss - (zero or 0) for name, (_, loss) in (faint | own).items()}
    axes.set(xlabel="true bits per weight", ylabel="loss (nats per token)")
    axes.set_xlim(math.floor(min(bits.values(), default=2)) - 0.2, math.ceil(max(bits.values(), default=8)) + 0.4)
    if zero is not None:
        _scale_for_added_loss(axes, zero, height.values())
    axes.plot([bits[n] for n in front], [height[n] for n in front], color=plots.PALETTE["sky"], label="Pareto front")
    axes.scatter([bits[n] for n in faint], [height[n] for n in faint], s=25, color=plots.COLORS["faint"], alpha=0.5)
    for number, name in enumerate(own, start=1):
        spot = bits[name], height[name]
        axes.plot(*spot, "o", markersize=14, color=plots.COLORS["original"], zorder=3)
        axes.annotate(
            number, spot, color="white", fontsize=9, fontweight="bold", ha="center", va="center_baseline", zorder=4
        )
    axes.legend(loc="best")


def _scale_for_added_loss(axes, zero, heights):
    axes.set_ylabel("added loss (nats per token)")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(min(-0.005, 1.5 * min(heights, default=0)), max(0.1, 2 * max(heights, default=0)))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.axhline(0, color=plots.COLORS["marker"], linestyle="--", linewidth=1.2, label=f"unquantized, loss {zero:.3f}")


def _list(axes, own, front):
    """The learner's points by number, those on the front in black and the others in grey."""
    axes.set_axis_off()
    axes.text(0, 1, "your points (names in grey: not on the front)", fontsize=10, va="top", transform=axes.transAxes)
    for number, name in enumerate(own, start=1):
        color = plots.COLORS["marker" if name in front else "faint"]
        text = f"{number:2d}  {name}"
        axes.text(
            0, 1 - number / max(len(own) + 1, 14), text, fontsize=10, va="top", color=color, transform=axes.transAxes
        )
