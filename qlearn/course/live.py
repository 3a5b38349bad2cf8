"""LivePlot: controls and a picture that follows them fast enough to be dragged.

The usual way to make a figure interactive in a notebook, `interact` around a function that plots, builds a new figure
for every step of a slider: about a third of a second each, so the picture lags behind the hand. A LivePlot draws most
of the figure once and then only what moves, the way games and plotting front ends do (**blitting**):

1. `setup(figure)` makes the axes, with everything that stays, and returns the artists that move (lines, stairs, texts).
2. Those artists are left out while the figure is drawn once; the pixels are kept as the background.
3. At each step `update(**values)` gives the artists new data and returns one line of text, the summary. The background
   is copied back, the artists are drawn on it, and the pixels go as a PNG into an Image widget: about 10 ms.

When `update` touches something that stays (limits, ticks, a title, a new artist), matplotlib marks the figure as
stale; the LivePlot sees the mark and draws everything again, which costs 60 to 100 ms. So nothing needs to be
declared: change as little as you can.

What a notebook stores of it is three things in one output: the live view (the course's build removes it from the
committed file, where it would be dead), the picture as PNG with alternative text, and the summary as a stable line of
plain text, which tests compare. The summary on screen is written after the picture, so that whoever waits for the
text can trust the picture.

Every control works from the keyboard: Tab to reach it, arrow keys to move it. Below the picture stand its alternative
text, for screen readers, and the summary.
"""

import html
import io

import ipywidgets
import numpy as np
from PIL import Image

from qlearn.course import plots

_MOST_STEPS = 120  # a float slider with more positions than this is swept in this many steps


class LiveView(ipywidgets.VBox):
    """Controls, something that follows them, and a line of text about it: what all live widgets of the course share.

    A subclass sets up what it shows, calls `super().__init__(name, alt, controls, view)`, and defines
    `show(**values)`, which brings the view up to date and returns the summary, and `png()`, the static picture of the
    present state.
    """

    def __init__(self, name, alt, controls, view):
        self.name, self.alt = name, alt
        self.controls, self.summary, self.error = controls, "", None
        self.note = ipywidgets.HTML()
        row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__([row, *view, self.note])
        self.draw()
        if self.error:
            raise self.error
        for control in controls.values():
            control.observe(lambda change: self.draw(), "value")

    def show(self, **values):
        raise NotImplementedError

    def png(self):
        raise NotImplementedError

    def values(self):
        """The present value of each control, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def draw(self):
        """Bring view and note up to date. An exception is kept in `error` and shown in the note; the old view stays."""
        try:
            self.summary, self.error = self.show(**self.values()) or "", None
            self.say(self.summary)
        except Exception as error:
            error.add_note(f"{self.name} at {self.values()}")
            self.error = error
            self.say(f"{type(error).__name__}: {error}")

    def say(self, text):
        """Put a line into the note, and the alternative text unseen beside it: an Image has no place for one."""
        unseen = "position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)"
        shown = "font-family: monospace; white-space: pre-wrap; line-height: 1.5"
        self.note.value = (
            f'<span class="qlive-alt" style="{unseen}">{html.escape(self.alt)}</span>'
            f'<div class="qlive-note" role="status" style="{shown}">{html.escape(text)}</div>'
        )

    def sweep(self):
        """Move every control over its whole range, one at a time, and return the summaries; for tests.

        Raises what `show` raised, with a note of the values at which it did. The controls end where they began.
        """
        summaries = []
        for control in self.controls.values():
            trait, positions = positions_of(control)
            start = getattr(control, trait)
            for position in [*positions, start]:
                setattr(control, trait, position)
                if self.error:
                    raise self.error
                summaries.append(self.summary)
        return summaries

    def __repr__(self):
        return f"{self.name}: {self.summary}"

    def _repr_mimebundle_(self, **kwargs):
        data, metadata = plots.mimebundle(self.png(), repr(self), self.alt)
        return {**super()._repr_mimebundle_(**kwargs), **data}, metadata


class LivePlot(LiveView):
    """Controls and a matplotlib picture that follows them at about 10 ms a step.

    setup(figure) -> list of the artists that move; axes with fixed limits, labels and titles are made here, in the
    house style.
    update(**values) -> one line of text; gives the artists new data, `values` being the controls' values by name.
    controls: ipywidgets, or their short forms: (2, 8) a slider, [None, 64] a menu, True a checkbox.
    figsize: inches.  alt: a sentence that says what the picture shows.  name: begins the line of plain text.
    Raises ValueError for a control of unknown form, and at the start whatever `setup` and `update` raise; later
    errors show in the note.

    >>> def setup(figure):
    ...     axes = figure.subplots()
    ...     axes.set(xlim=(0, 8), ylim=(0, 256), xlabel="bits", ylabel="levels")
    ...     return axes.plot([], [], "o")
    >>> def update(bits):
    ...     return f"{bits} bits give {2**bits} levels"
    >>> LivePlot(setup, update, alt="One dot.", bits=(2, 8))
    LivePlot: 5 bits give 32 levels
    """

    def __init__(self, setup, update, *, figsize=(8, 3), alt="", name="LivePlot", **controls):
        self._update = update
        self.figure = plots.blank(*figsize)
        with plots.style():
            self._moving = sorted(setup(self.figure), key=lambda artist: artist.zorder)
        for artist in self._moving:
            artist.set_animated(True)
        self._background = None
        self.image = ipywidgets.Image(format="png")
        controls = {key: make_control(key, value) for key, value in controls.items()}
        super().__init__(name, alt, controls, [self.image])

    def show(self, **values):
        summary = self._update(**values)
        if self._background is None or self.figure.stale:
            self._draw_background()
        canvas = self.figure.canvas
        canvas.restore_region(self._background)
        for artist in self._moving:
            self.figure.draw_artist(artist)
        self.image.value = _encode(canvas.buffer_rgba())
        return summary

    def _draw_background(self):
        with plots.style():
            self.figure.canvas.draw()
        self._background = self.figure.canvas.copy_from_bbox(self.figure.bbox)
        self.figure.stale = False  # from here on it means: something that stays was touched

    def png(self):
        """The picture as it stands, PNG bytes."""
        return bytes(self.image.value)


def make_control(name, value):
    """A control from a widget, or from one of the short forms that ipywidgets' interact knows; labelled with `name`."""
    control = ipywidgets.interactive.widget_from_abbrev(value)
    if control is None:
        raise ValueError(f"cannot make a control from {name}={value!r}; pass a widget, (low, high), a list, or a bool")
    control.description = control.description or name.replace("_", " ")
    control.style.description_width = "initial"
    if hasattr(control, "readout"):  # a slider: leave it a track that can be dragged beside a long label
        control.layout.width = "30em"
    return control


def positions_of(control):
    """(trait, values): all that a control can be set to, as values of one of its traits ('value' or 'index')."""
    if hasattr(control, "index") and hasattr(control, "options"):
        return "index", range(len(control.options))
    if isinstance(control.value, bool):
        return "value", (False, True)
    if not hasattr(control, "max"):
        raise ValueError(f"no known range for {type(control).__name__} {control.description!r}; sweep it by hand")
    steps = round((control.max - control.min) / control.step)
    grid = np.linspace(control.min, control.max, min(steps, _MOST_STEPS) + 1)
    if hasattr(control, "base"):  # FloatLogSlider: min and max are exponents
        grid = control.base**grid
    grid = [round(float(x)) if isinstance(control.min, int) else float(x) for x in grid]
    if isinstance(control.value, tuple):
        return "value", [(low, grid[-1]) for low in grid] + [(grid[0], high) for high in grid]
    return "value", grid


def _encode(rgba):
    """PNG bytes of an RGBA buffer; compression level 1, as time matters here and size hardly does."""
    height, width = rgba.shape[:2]
    buffer = io.BytesIO()
    image = Image.frombuffer("RGBA", (width, height), rgba, "raw", "RGBA", 0, 1)
    image.convert("RGB").save(buffer, "png", compress_level=1)
    return buffer.getvalue()
