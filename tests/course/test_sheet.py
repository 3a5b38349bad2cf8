"""Answers find their way into the solution, whatever a notebook went through. Nothing is executed here."""

import copy

import nbformat
import pytest

from qlearn.course import cells, sheet

from .conftest import answers


def assembled(learner, solution, **options):
    """The sources of the notebook that would run, by cell, and the notes."""
    submission = sheet.take(learner, solution)
    notebook = sheet.assemble(submission, solution, **options)
    nbformat.validate(notebook)
    return {cell.id: cell.source for cell in notebook.cells}, submission.notes


def by_id(notebook, name):
    return next(cell for cell in notebook.cells if cell.get("id") == name)


def at(notebook, name):
    return notebook.cells.index(by_id(notebook, name))


@pytest.fixture
def expected(solved, solution):
    sources, notes = assembled(solved, solution)
    assert not notes and not any("NotImplementedError" in source for source in sources.values())
    return sources


def test_repairs_stand_behind_the_last_check(expected):
    assert [name for name in expected if "grid-scale" in name] == [
        "answer-grid-scale",
        "check-grid-scale",
        "check-grid-scale-2",
        "repair-check-grid-scale-2",
    ]


def test_an_untouched_exercise_keeps_its_stubs(exercise, solution):
    sources, notes = assembled(exercise, solution)
    assert not notes
    for cell in answers(exercise):
        assert sources[cell.id] == cell.source


def test_outputs_counts_ids_and_kernel_do_not_matter(solved, solution, expected):
    """What nbstripout, another environment, or an older notebook format leave of a file."""
    solved.metadata["kernelspec"] = {"name": "my-laptop-env", "display_name": "mine"}
    solved.metadata["language_info"] = {"name": "python", "version": "3.99"}
    for index, cell in enumerate(solved.cells):
        cell["id"] = str(index)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="6 of 6")], None
    assert assembled(solved, solution) == (expected, [])
    solved.nbformat_minor = 4
    for cell in solved.cells:
        del cell["id"]
    assert assembled(nbformat.from_dict(solved), solution) == (expected, [])


def test_edited_checks_are_ignored_and_said_so(solved, solution, expected):
    by_id(solved, "check-grid-scale").source = 'print("grid.scale: 5 of 5 cases passed, 3 points")'
    cells.code_cells(solved)[0].source += "\nimport math"
    sources, notes = assembled(solved, solution)
    assert sources == expected
    assert notes == [
        "the given cell that begins 'import os' was edited; the original is used",
        "the check of grid.scale was edited; the original is used",
    ]


def test_deleted_checks_come_back(solved, solution, expected):
    solved.cells = [cell for cell in solved.cells if "check" not in cells.about(cell)]
    assert assembled(solved, solution) == (expected, [])


def test_a_split_answer_is_joined(solved, solution, expected):
    """JupyterLab gives the upper half a new id; both halves keep the metadata."""
    index = at(solved, "answer-grid-scale")
    lower = solved.cells[index]
    upper = copy.deepcopy(lower)
    lines = lower.source.splitlines()
    upper.source, lower.source, upper["id"] = "\n".join(lines[:3]), "\n".join(lines[3:]), "fresh"
    solved.cells.insert(index, upper)
    assert assembled(solved, solution) == (expected, [])


def test_a_merged_answer_is_found_by_what_it_defines(solved, solution, expected):
    """Merging keeps the metadata of one cell only, and gives it a new id."""
    first, second = by_id(solved, "answer-grid-scale"), by_id(solved, "answer-grid-codes")
    first.source += "\n" + second.source
    first["id"] = "merged"
    solved.cells.remove(second)
    sources, notes = assembled(solved, solution)
    assert not notes
    assert sources["answer-grid-scale"] == sources["answer-grid-codes"] == first.source


def test_an_answer_merged_into_its_check_is_found(solved, solution):
    answer, check = by_id(solved, "answer-grid-levels"), by_id(solved, "check-grid-levels")
    check.source = answer.source + "\n" + check.source
    solved.cells.remove(answer)
    sources, notes = assembled(solved, solution)
    assert sources["answer-grid-levels"] == check.source
    assert sources["check-grid-levels"] == 'course.check("grid.levels", levels)'
    assert notes == ["the check of grid.levels was edited; the original is used"]


def test_lost_metadata(solved, solution, expected):
    """A converter dropped everything that is not standard: the answers are still found."""
    for cell in solved.cells:
        cell.metadata = nbformat.NotebookNode()
    sources, _ = assembled(solved, solution)
    assert {name: sources[name] for name in expected} == expected


def test_a_deleted_answer_becomes_a_stub(solved, solution):
    """Not nothing: a name that was imported before must not stand in for the answer."""
    solved.cells.remove(by_id(solved, "answer-grid-scale"))
    sources, notes = assembled(solved, solution)
    assert "NotImplementedError" in sources["answer-grid-scale"]
    assert notes == ["the answer cell of grid.scale is missing; qlearn reset brings it back"]


def test_a_changed_copy_of_an_answer_counts_last(solved, solution):
    index = at(solved, "answer-grid-levels")
    again = copy.deepcopy(solved.cells[index])
    again["id"], again.source = "copy", "levels = 16"
    solved.cells.insert(index + 1, again)
    assert assembled(solved, solution)[0]["answer-grid-levels"].endswith("### END SOLUTION\nlevels = 16")


def test_own_cells_are_carried_along(solved, solution):
    helper = nbformat.v4.new_code_cell("def helper(x): return x")
    solved.cells.insert(at(solved, "answer-grid-scale"), helper)
    solved.cells.insert(0, nbformat.v4.new_code_cell("%load_ext autoreload"))
    solved.cells.append(nbformat.v4.new_code_cell("   "))
    sources, _ = assembled(solved, solution)
    order = list(sources)
    assert order[0] == "extra-0-top" and order.index("answer-grid-scale") == order.index("code-fec2433d") + 2
    assert sources["extra-0-code-fec2433d"] == helper.source
    assert sum(name.startswith("extra") for name in order) == 2
    assert "extra-0-top" not in assembled(solved, solution, dropped={"extra-0-top"})[0]


def test_a_copied_given_cell_with_changes_is_an_own_cell(solved, solution):
    again = copy.deepcopy(cells.code_cells(solved)[0])
    again["id"], again.source = "copy", "import math"
    solved.cells.insert(3, again)
    sources, notes = assembled(solved, solution)
    assert "import math" in sources.values() and not notes


def test_what_only_shows_something_is_left_out(solved, solution, expected):
    given = [cell for cell in cells.code_cells(solution) if not {"answer", "check"} & cells.about(cell).keys()]
    given[-1].metadata["qlearn"]["show"] = True
    sources, notes = assembled(solved, solution)
    assert expected.keys() - sources.keys() == {given[-1].id} and not notes


def test_settled_tasks_are_not_run_again(solved, solution, expected):
    by_id(solved, "answer-grid-scale").source = "def scale(x, bits): raise SystemExit"
    sources, _ = assembled(solved, solution, settled={"grid.scale", "grid.levels"}, replaced={"grid.scale"})
    assert sources["answer-grid-scale"] == expected["answer-grid-scale"]
    gone = {
        "check-grid-scale",
        "check-grid-scale-2",
        "repair-check-grid-scale-2",
        "check-grid-levels",
        "repair-check-grid-levels",
    }
    assert expected.keys() - sources.keys() == gone
