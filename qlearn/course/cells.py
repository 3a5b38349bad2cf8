"""What a cell of a course notebook is, and how a solution becomes an exercise.

A cell says what it is in its metadata, under "qlearn":

    {"card": task}               text; the build puts the task's card (title, difficulty, minutes, points) above it
    {"answer": task}             code that the learner writes
    {"check": task, "points": n} code that judges it; with "hidden": true only the grader has it, the exercise not
    {"show": true}               given code that only shows something (a widget, a picture): the grader leaves it out
    {"cell": name}               every code cell has one: its identity, from which its id was made

Metadata and not ids or positions, because JupyterLab gives new ids to cells that are split and merged, and other tools
number them anew; metadata survives both.

The source of an answer holds its solution between two comments. An exercise has a stub in its place.
"""

import copy
import re
import sys
import warnings

# jsonschema, which nbformat imports, would compile the grammar of international web addresses when this package is
# there: two seconds in every process, for a check that no notebook needs.
sys.modules.setdefault("rfc3987_syntax", None)

import nbformat  # noqa: E402

_BLOCK = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.MULTILINE | re.DOTALL)


class NotebookError(ValueError):
    """A notebook that cannot be used; the message says which, and what to do."""


def read_notebook(path):
    """Read a notebook of any version as version 4.

    path: of the file.  Returns a NotebookNode.  Raises FileNotFoundError, and NotebookError when the file is no
    notebook.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing ids, which the course does not use
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
        return notebook
    except FileNotFoundError:
        raise
    except Exception as error:  # nbformat raises whatever a broken file leads it to
        reason = str(error).splitlines()[0][:100]
        raise NotebookError(
            f"{path} is not a notebook that can be read ({reason}): save it again in JupyterLab, "
            f"or start over with: qlearn reset {path}"
        ) from None


def write_text(notebook):
    """A notebook as the text of its file, the way JupyterLab writes it."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def about(cell):
    """The course's metadata of a cell; {} when it has none."""
    found = cell.metadata.get("qlearn")
    return found if isinstance(found, dict) else {}


def tags(cell):
    """The tags of a cell, which nbval reads too."""
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    """The code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def points(notebook):
    """The points of each task that a solution checks, in the order of the checks: {task: points}."""
    found = (about(cell) for cell in code_cells(notebook))
    return {cell["check"]: cell["points"] for cell in found if "check" in cell}


def stub(source, task):
    """An answer's source with its solution replaced by a line that raises NotImplementedError.

    Raises ValueError when the source has no solution, or its markers do not pair up.

    >>> print(stub('def half(x):\\n    ### BEGIN SOLUTION\\n    return x / 2\\n    ### END SOLUTION', "warm_up.half"))
    def half(x):
        # Your code here.
        raise NotImplementedError("warm_up.half: not solved yet")
    """
    lines = ("# Your code here.", f'raise NotImplementedError("{task}: not solved yet")')
    replaced, blocks = _BLOCK.subn(lambda found: "\n".join(found[1] + line for line in lines), source)
    if not blocks or source.count("SOLUTION") != 2 * blocks:
        raise ValueError(f"the answer {task!r} needs '### BEGIN SOLUTION' and '### END SOLUTION' around its solution")
    return replaced


def to_exercise(solution):
    """The exercise that belongs to a solution: stubs for answers, no outputs, no hidden checks, given cells locked.

    An answer cell cannot be deleted; other code cells cannot be edited either.  The solution is left as it is.
    """
    exercise = copy.deepcopy(solution)
    exercise.cells = [cell for cell in exercise.cells if not about(cell).get("hidden")]
    exercise.metadata["qlearn"] = {**exercise.metadata.get("qlearn", {}), "kind": "exercise"}
    for cell in code_cells(exercise):
        cell.outputs, cell.execution_count = [], None
        cell.metadata["deletable"] = False
        task = about(cell).get("answer")
        if task:
            cell.source = stub(cell.source, task)
        else:
            cell.metadata["editable"] = False
    return exercise
