"""What the learner has, and never loses."""

import warnings

import pytest

from qlearn.course import cells, progress, reset


def test_progress_counts_the_points_of_every_notebook(course):
    progress.note_attempt("grid.codes", True)
    (row,) = progress.summary()
    assert (row["notebook"], row["points"], row["maximum"]) == ("01_grid", 2, 6)
    assert [bool(task["solved"]) for task in row["tasks"]] == [False, True, False]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\x01", '{"tasks": {"grid.codes": ', "NaN"])
def test_a_broken_progress_file_is_set_aside(data_folder, content):
    data_folder.mkdir()
    (data_folder / "progress.json").write_text(content)
    with pytest.warns(UserWarning, match="could not be read"):
        assert progress.read() == {}
    assert [path.read_text() for path in data_folder.glob("*.broken*")] == [content]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress.note_attempt("grid.codes", True)
        assert progress.read()["grid.codes"]["solved"]


@pytest.mark.parametrize(
    "content", ['{"tasks": 3}', '{"tasks": {"grid.codes": 3}}', "{}", '{"tasks": {"grid.codes": {}}}']
)
def test_a_progress_file_of_another_shape_is_read_as_far_as_it_goes(data_folder, content):
    data_folder.mkdir()
    (data_folder / "progress.json").write_text(content)
    progress.note_attempt("grid.codes", False)
    assert progress.read()["grid.codes"] == {"attempts": 1, "hints": 0, "solved": None}


def test_nothing_half_written_stays_behind(data_folder, monkeypatch):
    progress.note_attempt("grid.codes", True)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    progress.note_attempt("grid.scale", True)
    monkeypatch.undo()
    monkeypatch.setenv("QLEARN_DATA", str(data_folder))
    assert progress.read().keys() == {"grid.codes"}
    assert [path.name for path in data_folder.iterdir()] == ["progress.json"]


def test_reset_keeps_what_was_there(course, exercise):
    path = course / "exercises/01_grid.ipynb"
    pristine = path.read_text()
    for content in ("mine", "mine again", '{"cells": ['):
        path.write_text(content)
        assert reset.reset(path).read_text() == content
        assert path.read_text() == pristine
    assert len(list((course / "exercises/backups").iterdir())) == 3


def test_reset_brings_back_a_deleted_exercise(course):
    path = course / "exercises/01_grid.ipynb"
    pristine = path.read_text()
    path.unlink()
    assert reset.reset(path) is None
    assert path.read_text() == pristine


def test_reset_of_a_renamed_copy(course, solved):
    path = course / "exercises/01_grid-Copy1.ipynb"
    path.write_text(cells.write_text(solved))
    backup = reset.reset(path)
    assert "NotImplementedError" in path.read_text() and "NotImplementedError" not in backup.read_text()


def test_reset_of_something_else_changes_nothing(course):
    path = course / "exercises/notes.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match="is no exercise of this course"):
        reset.reset(path)
    assert path.read_text() == "mine" and not (course / "exercises/backups").exists()
