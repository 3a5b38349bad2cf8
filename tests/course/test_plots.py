"""The house style: colours that can be told apart, pictures that carry their alternative text."""

import base64
import io
import itertools

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from qlearn.course import plots

# Linear RGB as seen without the red and without the green cones (Viénot, Brettel and Mollon 1999).
RED_BLIND = [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]
GREEN_BLIND = [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]


def linear(color):
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    """The contrast ratio of WCAG 2, from 1 to 21."""
    light = sorted(float(np.dot([0.2126, 0.7152, 0.0722], linear(color))) for color in (first, second))
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("seen", [np.eye(3), RED_BLIND, GREEN_BLIND], ids=["all cones", "no red", "no green"])
def test_colours_that_mean_something_can_be_told_apart(seen):
    fields = [linear(plots.COLORS[name]) for name in ("sign", "exponent", "mantissa")]
    roles = [linear(plots.COLORS[name]) for name in ("original", "quantized", "other", "marker")]
    for first, second in [*itertools.combinations(fields, 2), *itertools.combinations(roles, 2)]:
        assert np.abs(np.array(seen) @ (first - second)).max() > 0.08


@pytest.mark.parametrize("name", sorted(set(plots.COLORS)))
def test_colours_stand_out_on_white(name):
    assert contrast(plots.COLORS[name], "white") >= 3  # WCAG 2.1, 1.4.11: graphical objects


def test_a_picture_shows_png_a_line_of_text_and_alternative_text():
    picture, axes = plots.figure(4, 2, alt="A line\n that rises.")
    axes.plot([1, 2])
    data, metadata = picture._repr_mimebundle_()
    assert data["text/plain"] == "Picture: A line that rises." == repr(picture)
    assert metadata == {"image/png": {"alt": "A line that rises."}}
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.size == (400, 200)
    assert image.text == {"Description": "A line that rises."}


def test_ipython_displays_the_bundle():
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    data, metadata = formatter.format(plots.figure(2, 2, alt="Empty axes.")[0])
    assert set(data) == {"image/png", "text/plain"} and metadata["image/png"]["alt"] == "Empty axes."


def test_the_same_picture_gives_the_same_bytes():
    def make():
        picture, axes = plots.figure(3, 2, alt="A line.")
        axes.plot([1, 3, 2])
        return picture.png()

    assert make() == make()


def test_nothing_is_left_behind_in_matplotlib():
    before = dict(matplotlib.rcParams)
    picture, _ = plots.figure(3, 2, alt="Empty axes.", columns=2, sharey=True)
    picture.png()
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_text_is_readable_at_half_size():
    _, axes = plots.figure(8, 3, alt="Empty axes.")
    axes.set(title="title", xlabel="bits", ylabel="error")
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert all(text.get_fontsize() * plots.DPI / 72 / 2 >= 7.5 for text in texts)  # pixels


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_picture_needs_alternative_text(alt):
    with pytest.raises(ValueError, match="alternative text"):
        plots.figure(2, 2, alt=alt)


def test_a_grid_of_axes():
    _, axes = plots.figure(6, 4, alt="Four axes.", rows=2, columns=2)
    assert axes.shape == (2, 2)
