"""Predictions: say it before you look.

A lesson asks a question, the learner commits to a number, and only then comes the measurement. `predict` shows the
question with a slider and a button, and keeps the first guess that is committed in the learner's data folder, so that
it is still there after a restart; `reveal` prints the measured answer beside it.

    predict("average error at 4 bits, in % of the average weight", low=0, high=100, key="absmax-4bit")
    ...
    reveal("absmax-4bit", 100 * error, unit="%")

In a notebook that is executed by a program nobody guesses. Then the widget's plain text is the question, which never
depends on a guess, and `reveal` prints the measurement alone: the committed notebook reads the same wherever it was
built, as long as the build points QLEARN_DATA at an empty folder.
"""

import html
import math

import ipywidgets

from qlearn.course import store

_FILE = "predictions.json"


class Prediction(ipywidgets.VBox):
    """The question, a slider with a number field, and a button that commits the guess; see `predict`."""

    def __init__(self, question, low, high, key):
        self.question, self.low, self.high, self.key = question, low, high, key
        integer = isinstance(low, int) and isinstance(high, int) and high - low >= 10
        step = 1 if integer else (high - low) / 100
        middle = low + ((high - low) // 2 if integer else (high - low) / 2)
        range_ = {"min": low, "max": high, "step": step, "value": middle}
        self.slider = ipywidgets.FloatSlider(**range_, readout=False)
        self.number = ipywidgets.BoundedFloatText(**range_, layout=ipywidgets.Layout(width="8em"))
        self.button = ipywidgets.Button(description="commit", tooltip="keep this guess; it cannot be changed later")
        self.note = ipywidgets.HTML()
        self.slider.tooltip = self.number.tooltip = question
        ipywidgets.link((self.slider, "value"), (self.number, "value"))
        self.button.on_click(lambda button: self.commit())
        title = ipywidgets.HTML(f"<b>Your prediction:</b> {html.escape(question)}")
        super().__init__([title, ipywidgets.HBox([self.slider, self.number, self.button]), self.note])
        self._show(guess_of(key))

    def commit(self):
        """Keep the number in the field as the guess, unless one was kept before."""
        if guess_of(self.key) is None:
            store.write(_FILE, store.read(_FILE) | {self.key: self.number.value})
        self._show(guess_of(self.key))

    def _show(self, guess):
        text = "move the slider, then commit; the answer comes further down"
        if guess is not None:
            self.slider.value = guess
            text = f"your guess is {guess:.4g}; it will be shown beside the answer"
        for control in (self.slider, self.number, self.button):
            control.disabled = guess is not None
        self.note.value = f'<div class="qpredict-note" role="status">{text}</div>'

    def __repr__(self):
        return f"Prediction {self.key}: {self.question} ({self.low:g} to {self.high:g})"

    def _repr_mimebundle_(self, **kwargs):
        return {**super()._repr_mimebundle_(**kwargs), "text/plain": repr(self)}


def predict(question, low, high, key):
    """Ask for a number between low and high; returns the widget, which keeps the first guess committed under `key`.

    Raises ValueError when the range is empty or not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"a prediction needs finite low < high, got {low} and {high}")
    return Prediction(question, low, high, key)


def guess_of(key):
    """The guess committed under `key`, a float, or None."""
    guess = store.read(_FILE).get(key)
    return float(guess) if isinstance(guess, (int, float)) else None


def reveal(key, answer, unit=""):
    """Print the measured answer (a number) beside the guess kept under `key`; `unit` follows both numbers.

    Raises ValueError when the answer is not finite.
    """
    answer = float(answer)
    if not math.isfinite(answer):
        raise ValueError(f"the answer to {key!r} is {answer}; reveal needs a finite number")
    measured = f"measured: {answer:.4g} {unit}".rstrip()
    guess = guess_of(key)
    if guess is None:
        print(f"no guess yet for {key!r}; {measured}")
    else:
        print(f"your guess: {guess:.4g} {unit}".rstrip() + f"; {measured}; {_verdict(guess, answer)}")


def _verdict(guess, answer):
    """How far off, in words: as a ratio where both have the same sign, else as a difference."""
    if guess * answer <= 0:
        return f"off by {abs(guess - answer):.4g}"
    ratio = guess / answer
    if 1 / 1.05 < ratio < 1.05:
        return "within 5 %"
    return f"{ratio:.3g} times too much" if ratio > 1 else f"{1 / ratio:.3g} times too little"
