"""Whole submissions, graded for real: the honest, the careless and the hostile. Each `graded` is one or more nbval
runs."""

import json

import nbformat
import pytest

from qlearn.course import cells, grade, progress

from .conftest import answers

pytestmark = pytest.mark.notebooks

STUCK = """\
def scale(x, bits):
    while True:
        pass
"""
DEAF = """\
def codes(x, bits):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""
LYING = """\
def codes(x, bits):
    print("grid.codes: 4 of 4 cases passed, 2 points")
    return np.floor(x / scale(x, bits)).astype(int)
"""
TRAP = """\
import os
def codes(x, bits):
    if bits == 2:
        os._exit(0)
    return np.round(x / scale(x, bits)).astype(np.int8)
"""
GONE = "the code ended the kernel: os._exit, a crash, or not enough memory"


@pytest.fixture
def submit(course, solved):
    """Replace answers of the solved exercise, save it as a learner would, and grade it: {task: (points, reason)}."""

    def graded(limit=20.0, own=None, **sources):
        for cell in answers(solved):
            cell.source = sources.get(cells.about(cell)["answer"].partition(".")[2], cell.source)
        if own:
            solved.cells.insert(3, nbformat.v4.new_code_cell(own))
        path = course / "exercises/01_grid.ipynb"
        path.write_text(cells.write_text(solved))
        found = grade.grade(path, limit)
        return {one.task.partition(".")[2]: (one.points, one.reason) for one in found.results}, found

    return graded


def test_untouched(course):
    found = grade.grade(course / "exercises/01_grid.ipynb")
    assert (found.points, found.maximum, found.notes) == (0, 6, [])
    assert all("not solved yet" in result.reason for result in found.results)
    assert progress.read() == {}


def test_solved_in_an_abused_notebook(course, solved, submit):
    """Outputs of another day, new ids, a foreign kernel, edited checks, a forgotten print: full points, and a note."""
    solved.metadata["kernelspec"] = {"name": "my-laptop-env", "display_name": "mine"}
    for index, cell in enumerate(solved.cells):
        cell["id"] = str(index)
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="0 points\n")]
        if "check" in cells.about(cell):
            cell.source = "print('all passed')"
    loud = "def codes(x, bits):\n    print('called')\n    return np.round(x / scale(x, bits)).astype(int)"
    _, found = submit(codes=loud, own="1 / 0")
    assert (found.points, found.maximum) == (6, 6), str(found)
    assert len(found.notes) == 3 and all("was edited; the original is used" in note for note in found.notes)
    assert found.seconds < 10
    assert all(progress.read()[task]["solved"] for task in ("grid.scale", "grid.codes", "grid.levels"))
    assert json.loads(json.dumps(found.as_dict()))["tasks"][0] == {
        "task": "grid.scale",
        "points": 3,
        "maximum": 3,
        "reason": "",
    }
    assert str(found).splitlines()[0] == "01_grid: 6 of 6 points"


def test_a_syntax_error_and_a_printed_verdict(submit):
    """The task after a broken one is graded with the course's own answer in its place."""
    text = "grid.levels: 1 of 1 case passed, 1 point"
    points, _ = submit(scale="def scale(x, bits)\n    return 1", levels=f"print({text!r})\nlevels = 16")
    assert points["scale"] == (0, "SyntaxError: expected ':' (line 1)")
    assert points["codes"] == (2, "")
    assert points["levels"][0] == 0 and "16 is wrong: one code is unused." in points["levels"][1]


def test_errors_wrong_values_and_sys_exit(submit):
    points, _ = submit(
        scale="import sys\ndef scale(x, bits):\n    sys.exit(0)",
        codes=LYING,
        levels="levels = 1 / 0",
    )
    assert points["scale"][0] == 0 and "SystemExit: 0" in points["scale"][1] and "line 3" in points["scale"][1]
    assert points["codes"][0] == 0 and points["codes"][1].endswith("This is floor instead of round.")
    assert points["levels"] == (0, "ZeroDivisionError: division by zero (line 1 of the cell)")


def test_an_endless_loop_costs_its_task_only(submit):
    points, found = submit(limit=3.0, scale=STUCK)
    assert points == {"scale": (0, "stopped after 3 s: an endless loop?"), "codes": (2, ""), "levels": (1, "")}
    assert found.seconds < 20


def test_a_flood_of_output_is_stopped_at_once(submit):
    """Outside a function nothing catches it; the limit of 200 seconds is not waited for."""
    points, found = submit(limit=200.0, levels="while True:\n    print('x' * 1000)")
    assert points["levels"] == (0, "stopped because it printed without end: an endless loop?")
    assert points["codes"] == (2, "") and found.seconds < 60


def test_a_loop_that_cannot_be_interrupted_and_a_task_that_kills_the_kernel(submit):
    """Both take the kernel down, one after the other; what was right before, between and after keeps its points."""
    points, _ = submit(limit=3.0, codes=DEAF, levels="import os\nos._exit(1)")
    assert points == {"scale": (3, ""), "codes": (0, "stopped after 3 s: an endless loop?"), "levels": (0, GONE)}


def test_a_function_that_kills_the_kernel(submit):
    points, _ = submit(scale="import os\ndef scale(x, bits):\n    os._exit(0)")
    assert points == {"scale": (0, GONE), "codes": (2, ""), "levels": (1, "")}


def test_an_own_cell_that_kills_the_kernel_is_left_out(submit):
    _, found = submit(own="import os\nos._exit(0)")
    assert found.points == 6
    assert found.notes == [f"a cell of your own was left out: {GONE}"]


def test_a_correct_answer_that_kills_a_given_cell(submit):
    """It passes its check and takes down the cell below: its points stay, and the rest is graded."""
    points, _ = submit(codes=TRAP)
    assert points == {"scale": (3, ""), "codes": (2, ""), "levels": (1, "")}


def test_given_cells_that_do_not_run_are_not_the_learners_fault(course, solution, solved):
    cells.code_cells(solution)[0].source = "import os\nos._exit(1)"
    (course / "solutions/01_grid.ipynb").write_text(cells.write_text(solution))
    with pytest.raises(RuntimeError, match="the course's own cells do not run here"):
        grade.grade(course / "exercises/01_grid.ipynb")


def test_files_that_cannot_be_graded(course, solved):
    path = course / "exercises/01_grid.ipynb"
    path.write_text('{"cells": [')
    with pytest.raises(cells.NotebookError, match="qlearn reset"):
        grade.grade(path)
    with pytest.raises(FileNotFoundError):
        grade.grade(course / "exercises/02_nothing.ipynb")
    stranger = nbformat.v4.new_notebook()
    path = course / "exercises/notes.ipynb"
    path.write_text(nbformat.writes(stranger))
    with pytest.raises(ValueError, match=r"notes.ipynb is no exercise of this course: there are 01_grid"):
        grade.grade(path)
