"""The two fixed texts of the course: Python source the bundled model never saw.

`evaluation.txt` is what every perplexity, divergence and flip rate of the course is measured on; `calibration.txt` is
what methods that look at activations may look at. They are the package's own source, frozen once, with no file in
both: each file is preceded by a comment with its name. Measuring on the text that a method was calibrated on would
flatter it, so the two never mix.
"""

from pathlib import Path

_TEXTS = Path(__file__).parent / "texts"


def evaluation_text():
    """The text that the course measures on, as one string.

    >>> evaluation_text().startswith("# ")
    True
    """
    return (_TEXTS / "evaluation.txt").read_text(encoding="utf-8")


def calibration_text():
    """The text that calibrated methods may learn from: of the same kind, and no part of `evaluation_text()`."""
    return (_TEXTS / "calibration.txt").read_text(encoding="utf-8")
