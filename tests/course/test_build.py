"""From source to notebooks: ids, metadata, cards, stubs, cleaned outputs, and the check that nothing drifted."""

import shutil

import nbformat
import pytest

from qlearn.course import build, cells, execute, source

from .conftest import answers


def write(folder, text, kind="solution", name="01_x"):
    path = folder / f"{kind}s/source/{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_solution_keeps_its_answers_and_hidden_checks(solution):
    roles = [set(cells.about(cell)) - {"cell", "points"} for cell in cells.code_cells(solution)]
    assert roles == [
        set(),
        {"answer"},
        {"check"},
        {"check", "hidden"},
        {"answer"},
        {"check"},
        set(),
        {"answer"},
        {"check"},
    ]
    assert cells.points(solution) == {"grid.scale": 3, "grid.codes": 2, "grid.levels": 1}
    assert "### BEGIN SOLUTION" in answers(solution)[0].source
    for cell in cells.code_cells(solution):
        assert ("nbval-check-output" in cells.tags(cell)) == ("check" in cells.about(cell))
        assert not cells.tags(cell) or cell.outputs


def test_an_exercise_has_stubs_and_no_outputs(exercise):
    assert not any(cell.outputs or cell.execution_count for cell in cells.code_cells(exercise))
    assert not any("hidden" in cells.about(cell) for cell in exercise.cells)
    assert not any("SOLUTION" in cell.source for cell in exercise.cells)
    for cell in cells.code_cells(exercise):
        assert cell.metadata["deletable"] is False
        assert ("editable" in cell.metadata) != ("answer" in cells.about(cell))
    for cell in answers(exercise):
        task = cells.about(cell)["answer"]
        with pytest.raises(NotImplementedError, match=f"{task}: not solved yet"):
            exec(cell.source + "\nscale(1, 2)\n" * ("scale" in task) + "\ncodes(1, 2)\n" * ("codes" in task), {})


def test_the_card_stands_above_the_text(exercise):
    card = next(cell for cell in exercise.cells if cells.about(cell).get("card") == "grid.scale")
    assert card.source == (
        "## The distance between two rulings\n\n"
        "> Difficulty ●●○○○ · Importance ●●●●● · about 5 minutes · 3 points · `grid.scale`\n\n"
        "Write `scale(x, bits)`."
    )


def test_building_twice_gives_the_same_cells(course):
    path = course / "solutions/source/01_grid.py"
    first, second = source.read(path, "solution"), source.read(path, "solution")
    assert first == second
    ids = [cell["id"] for cell in first.cells]
    assert len(set(ids)) == len(ids)
    assert ids[3] == "answer-grid-scale" and ids[5] == "check-grid-scale-2"


def test_committed_notebooks_are_compared_with_their_sources(course):
    assert build.stale(course) == []
    exercise_path = course / "exercises/01_grid.ipynb"
    exercise = cells.read_notebook(exercise_path)
    exercise.cells[4].source += "\n# a change"
    exercise_path.write_text(cells.write_text(exercise))
    (course / "lessons/00_sample.ipynb").unlink()
    shutil.copy(course / "solutions/01_grid.ipynb", course / "solutions/09_old.ipynb")
    assert build.stale(course) == [
        "lessons/00_sample.ipynb: is missing",
        f"exercises/01_grid.ipynb: cell {exercise.cells[4].id} differs from the generated {exercise.cells[4].id}",
        "solutions/09_old.ipynb: has no source",
    ]
    assert build.stale(course, ["01"])[-1].startswith("exercises/01_grid.ipynb")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda nb: nb.cells.pop(), "has 14 cells, its source gives 15"),
        (lambda nb: nb.metadata.pop("qlearn"), "its metadata differ from the generated ones"),
        (lambda nb: nb.cells[1].update(outputs=[nbformat.v4.new_output("stream", text="x")]), "has outputs"),
        (lambda nb: nb.cells[1].metadata.pop("editable"), "differs from the generated"),
    ],
)
def test_what_counts_as_drift(course, change, reason):
    path = course / "exercises/01_grid.ipynb"
    notebook = cells.read_notebook(path)
    change(notebook)
    path.write_text(cells.write_text(notebook))
    assert len(build.stale(course)) == 1
    assert (
        reason.replace("14", str(len(notebook.cells))).replace("15", str(len(notebook.cells) + 1))
        in build.stale(course)[0]
    )


def test_names_choose_what_is_built(course):
    assert [path.stem for _, path in build.sources(course, ["00"])] == ["00_sample"]
    with pytest.raises(ValueError, match="no source called '7'; there are: 00_sample, 01_grid"):
        build.sources(course, ["7"])


ANSWER = '# %% qlearn={"answer": "grid.levels"}\n'
SOLVED = ANSWER + "### BEGIN SOLUTION\nlevels = 15\n### END SOLUTION\n"
CHECK = '\n# %% qlearn={"check": "grid.levels"}\nprint(levels)\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('# %% qlearn={"check": "grid.lvls"}\n1\n', "01_x.py: there is no task called 'grid.lvls'"),
        ('# %% [markdown] qlearn={"card": "nothing.x"}\n# x\n', "there is no task called 'nothing.x'"),
        (ANSWER + "levels = 15\n" + CHECK, "'grid.levels' needs '### BEGIN SOLUTION' and"),
        (ANSWER + "### BEGIN SOLUTION\nlevels = 15\n" + CHECK, "'grid.levels' needs '### BEGIN SOLUTION' and"),
        (ANSWER + "### END SOLUTION\nlevels = 15\n### BEGIN SOLUTION\n" + CHECK, "'grid.levels' needs"),
        (SOLVED, "no cell below the answer checks grid.levels"),
        (CHECK + SOLVED, "no cell below the answer checks grid.levels"),
        (SOLVED + "\n" + SOLVED + CHECK, "two answer cells"),
    ],
)
def test_mistakes_of_an_author_are_named(tmp_path, sample_tasks, text, message):
    with pytest.raises(ValueError, match=message):
        source.read(write(tmp_path, text), "solution")


def test_a_notebook_that_fails_is_not_written(tmp_path):
    write(tmp_path, "# %%\nprint('fine')\n\n# %%\n1 / 0\n", "lesson")
    with pytest.raises(cells.NotebookError, match=r"01_x does not run: [\s\S]*1 / 0[\s\S]*ZeroDivisionError"):
        build.build(tmp_path, say=lambda line: None)
    assert not list(tmp_path.glob("lessons/*.ipynb"))


def test_outputs_are_cleaned(course):
    """No colours, progress bars, live views or paths of this machine; counts and one output for each stream stay."""
    lesson = cells.read_notebook(course / "lessons/00_sample.ipynb")
    printed, shown = cells.code_cells(lesson)[1:]
    assert [(output.name, output.text) for output in printed.outputs] == [
        ("stdout", "red 128\nagain …\n"),
        ("stderr", "to stderr\n"),
    ]
    assert [dict(output.data) for output in shown.outputs] == [{"text/plain": "IntSlider(value=4, description='bits')"}]
    assert [cell.execution_count for cell in cells.code_cells(lesson)] == [1, 2, 3]
    assert "widgets" not in lesson.metadata and "execution" not in str(lesson.metadata)


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("a\r\nb", "a\nb"),
        ("10%\r100% done", "100% done"),
        ("\x1b[1;31mError\x1b[0m", "Error"),
        (" 50%|#####     | 1/2 [00:00<00:00, 9.1it/s]\nkept", "kept"),
        ("5it [00:00, 120it/s]", ""),
        (f"{execute.places.PACKAGE}/tensor.py:3", "qlearn/tensor.py:3"),
        ("/tmp/ipykernel_4711/1234567.py:2: UserWarning: x", "<cell>:2: UserWarning: x"),
        ("accuracy 50% | loss 3", "accuracy 50% | loss 3"),
    ],
)
def test_text_is_cleaned(raw, kept):
    assert execute.plain(raw) == kept


def test_a_broken_file_is_one_sentence(tmp_path):
    path = tmp_path / "x.ipynb"
    for text in (
        "",
        "{",
        "[]",
        "null",
        '{"cells": 3}',
        '{"nbformat": 4, "nbformat_minor": 5, "cells": [{}], "metadata": {}}',
    ):
        path.write_text(text)
        with pytest.raises(cells.NotebookError, match=r"x.ipynb is not a notebook that can be read \(.*qlearn reset"):
            cells.read_notebook(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(cells.NotebookError):
        cells.read_notebook(path)
    with pytest.raises(FileNotFoundError):
        cells.read_notebook(tmp_path / "nothing.ipynb")
