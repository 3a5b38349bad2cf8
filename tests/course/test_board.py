"""The board: kept between lessons, deterministic, and right about who is on the front."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlearn import course
from qlearn.course import board


@pytest.fixture(autouse=True)
def no_reference_points(monkeypatch):
    monkeypatch.setattr(board, "_reference", lambda: {"unquantized": None, "points": []})


def test_points_are_kept(data_folder):
    course.board.add("absmax 4 bit", 4.25, 2.13)
    course.board.add("absmax 4 bit", 4.25, np.float64(2.12))  # again: replaces
    course.board.add("absmax 3 bit", 3.25, 2.4)
    assert json.loads((data_folder / "board.json").read_text())["absmax 4 bit"] == [4.25, 2.12]
    assert board.points() == {"absmax 3 bit": (3.25, 2.4), "absmax 4 bit": (4.25, 2.12)}


def test_the_text_lists_the_points_and_the_front():
    for name, bits, loss in (("a", 2.25, 4.0), ("b", 4.25, 2.1), ("worse than b", 4.5, 2.2)):
        board.add(name, bits, loss)
    assert repr(board.show()) == (
        "Picture: the board, loss against true bits per weight: a at 2.25 bits, loss 4; b at 4.25 bits, loss 2.1; "
        "worse than b at 4.50 bits, loss 2.2 (2 of 3 on the Pareto front)."
    )


def test_the_unquantized_model_is_the_zero_and_no_point():
    board.add("unquantized", 16, 2.0)
    board.add("a", 4, 2.5)
    picture = board.show()
    axes = picture.figure.axes[0]
    assert "unquantized" not in repr(picture) and axes.get_ylabel() == "added loss (nats per token)"
    assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"] == [0.5]
    low, high = axes.get_ylim()
    assert low < 0 < 0.5 < high
    assert "unquantized, loss 2.000" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_point_is_inside_the_picture_even_a_lucky_one():
    board.add("unquantized", 16, 2.0)
    for name, loss in (("lucky", 1.9), ("two bits", 7.0)):
        board.add(name, 4, loss)
    low, high = board.show().figure.axes[0].get_ylim()
    assert low < -0.1 and high > 5


def test_the_course_s_points_are_faint_and_shape_the_front(monkeypatch):
    reference = {"unquantized": 2.0, "points": [["best", 4.0, 2.05], ["mine", 9.0, 9.0]]}
    monkeypatch.setattr(board, "_reference", lambda: reference)
    board.add("mine", 4.5, 2.2)
    assert "(0 of 1 on the Pareto front)" in repr(board.show())  # beaten by "best"; the learner's own "mine" counts


def test_an_empty_board_can_be_shown():
    assert "no points yet (0 of 0" in repr(board.show()) and board.show().png()


def test_thirty_points_can_be_shown():
    for number in range(30):
        board.add(f"method number {number}", 2 + number / 5, 2 + 1 / (1 + number))
    picture = board.show()
    figure_box = picture.figure.bbox
    renderer = picture.figure.canvas.get_renderer()
    picture.figure.canvas.draw()
    for text in picture.figure.axes[1].texts:
        box = text.get_window_extent(renderer)
        assert box.y0 >= 0 and box.y1 <= figure_box.height and box.x1 <= figure_box.width


def test_the_same_points_give_the_same_picture():
    board.add("a", 4, 2.5)
    assert board.show().png() == board.show().png()


def test_a_broken_file_is_moved_aside(data_folder):
    data_folder.mkdir(exist_ok=True)
    (data_folder / "board.json").write_text("{")
    with pytest.warns(UserWarning, match="broken"):
        assert board.points() == {}
    board.add("a", 4, 2)
    assert board.points() == {"a": (4, 2)}


def test_the_file_that_ships_is_well_formed(monkeypatch):
    monkeypatch.undo()
    reference = board._reference()
    assert set(reference) == {"unquantized", "points"}
    assert reference["unquantized"] is None or reference["unquantized"] > 0
    for name, bits, loss in reference["points"]:
        assert name and 1 <= bits <= 32 and 0 < loss < 20


@pytest.mark.parametrize(
    ("name", "bits", "loss"),
    [("", 4, 2), (" ", 4, 2), ("a", 0, 2), ("a", -1, 2), ("a", 4, float("nan")), ("a", float("inf"), 2)],
)
def test_bad_points_are_refused(name, bits, loss, data_folder):
    with pytest.raises(ValueError):
        board.add(name, bits, loss)
    assert not (data_folder / "board.json").exists()


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=8))
def test_the_front_is_what_nobody_beats(points):
    def beaten(name):
        bits, loss = points[name]
        return any(b <= bits and l <= loss and (b, l) != (bits, loss) for b, l in points.values())

    front = board.pareto_front(points)
    assert {points[name] for name in front} == {points[name] for name in points if not beaten(name)}
    assert [points[name][0] for name in front] == sorted({points[name][0] for name in front})
