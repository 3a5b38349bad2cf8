"""What a learner reads under an answer."""

import json

import numpy as np
import pytest

from qlearn import course
from qlearn.course import progress, tasks

pytestmark = pytest.mark.usefixtures("sample_tasks")


def check(capsys, name, answer):
    course.check(name, answer)
    return capsys.readouterr().out


def test_right(capsys):
    assert (
        check(capsys, "grid.codes", tasks.get("grid.codes").reference) == "grid.codes: 4 of 4 cases passed, 2 points\n"
    )
    assert check(capsys, "grid.levels", 15) == "grid.levels: 1 of 1 case passed, 1 point\n"


def test_wrong_with_a_known_mistake(capsys):
    text = check(capsys, "grid.codes", tasks.get("grid.codes").mutants[0].function)
    assert text.splitlines() == [
        "grid.codes: 0 of 4 cases passed, no points yet",
        "  case      by hand",
        "  input     x = [0.9, -0.31, 0.14, -0.02, 0.6]  (float64, shape 5)",
        "  input     bits = 3",
        "  expected  [3, -1, 0, 0, 2]  (int8, shape 5)",
        "  got       [3, -2, 0, -1, 2]  (int64, shape 5)",
        "  differ    at [1]: expected -1, got -2 (2 of 5 values differ)",
        "This is floor instead of round.",
    ]


def test_wrong_in_part(capsys):
    floor, codes = tasks.get("grid.codes").mutants[0].function, tasks.get("grid.codes").reference
    text = check(capsys, "grid.codes", lambda x, bits: codes(x, bits) + 1 if bits == 3 else floor(x, bits))
    assert "0 of 4 cases passed" in text
    assert text.endswith("In 3 of the 4 cases that failed: This is floor instead of round.\n")


def test_one_case_in_common_is_no_diagnosis(capsys):
    """Two different mistakes often agree on one case; naming the wrong one misleads."""
    floor, codes = tasks.get("grid.codes").mutants[0].function, tasks.get("grid.codes").reference
    text = check(capsys, "grid.codes", lambda x, bits: floor(x, bits) if bits == 8 else codes(x, bits) + (bits == 3))
    assert "2 of 4 cases passed" in text
    assert "floor" not in text


def test_an_error_names_the_line(capsys):
    def answer(x, bits):
        print("so far so good")
        return x / np.zeros(7)

    lines = check(capsys, "grid.codes", answer).splitlines()
    line = answer.__code__.co_firstlineno + 2
    assert lines[-3].startswith("  got       ValueError: operands could not be broadcast")
    assert lines[-2] == f"  raised    in line {line}: return x / np.zeros(7)"
    assert lines[-1] == "  printed   so far so good"


def test_unsolved(capsys, data_folder):
    expected = 'grid.scale: not solved yet (3 points). course.hint("grid.scale") helps.\n'
    assert check(capsys, "grid.scale", ...) == expected

    def needs_another(x, bits):
        raise NotImplementedError("grid.scale: not solved yet")

    expected = "grid.codes: needs your answer to grid.scale, which is not solved yet\n"
    assert check(capsys, "grid.codes", needs_another) == expected
    assert progress.read() == {}


def test_an_unknown_task():
    with pytest.raises(ValueError, match=r"there are grid\.scale, grid\.codes"):
        course.check("grid.code", abs)


@pytest.mark.parametrize("answer", [None, 3, "x", np.zeros(3), type, object(), lambda *a, **k: a, {}.__getitem__])
def test_check_never_raises(capsys, answer):
    assert check(capsys, "grid.codes", answer).startswith("grid.codes: 0 of 4 cases passed")
    assert check(capsys, "grid.scale", answer).startswith("grid.scale: ")


def test_progress_is_kept(capsys, data_folder):
    check(capsys, "grid.levels", 16)
    assert progress.read()["grid.levels"] == {"attempts": 1, "hints": 0, "solved": None}
    check(capsys, "grid.levels", 15)
    solved = progress.read()["grid.levels"]["solved"]
    check(capsys, "grid.levels", 16)
    assert progress.read()["grid.levels"] == {"attempts": 3, "hints": 0, "solved": solved}
    assert solved and json.loads((data_folder / "progress.json").read_text())["tasks"].keys() == {"grid.levels"}


def test_a_data_folder_that_cannot_be_written_costs_nothing(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLEARN_DATA", str(tmp_path / "file"))
    assert check(capsys, "grid.levels", 15) == "grid.levels: 1 of 1 case passed, 1 point\n"


def test_hints_come_one_at_a_time(course, capsys):
    from qlearn.course import hint

    first, second = tasks.get("grid.scale").hints
    for expected in (first, second):
        hint("grid.scale")
        assert expected in capsys.readouterr().out
    for _ in range(2):
        hint("grid.scale")
        assert "Its solution is in solutions/01_grid.ipynb" in capsys.readouterr().out
    hint("grid.scale", 1)
    assert first in capsys.readouterr().out
    assert progress.read()["grid.scale"]["hints"] == 4
    with pytest.raises(ValueError, match="hint 3 does not exist"):
        hint("grid.scale", 3)


def test_the_names_of_the_course():
    assert {"check", "hint", "predict", "reveal", "table", "board", "plots", "tasks", "widgets"} <= set(dir(course))
    for name in course.__all__:
        getattr(course, name)
        assert getattr(course, name) is getattr(course, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        course.nothing  # noqa: B018
