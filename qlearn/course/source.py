"""From a percent script to the cells of a notebook.

Lessons and solutions are written as plain Python files in which `# %%` begins a code cell and `# %% [markdown]` a cell
of text, with metadata behind it:

    # %% [markdown] qlearn={"card": "absmax.scale"}
    # Write `scale(x, bits)`: the distance between two neighbouring values of the grid.

    # %% qlearn={"answer": "absmax.scale"}
    def scale(x, bits):
        ### BEGIN SOLUTION
        return np.abs(x).max() / (2 ** (bits - 1) - 1)
        ### END SOLUTION

    # %% qlearn={"check": "absmax.scale"}
    course.check("absmax.scale", scale)

A check is best a call of `course.check`, which catches what the answer itself prints; in any other check a forgotten
`print` of the learner counts as a different output. Given code that only shows something is marked {"show": true}, and
the grader does not spend time on it.

That is what people edit and review; jupytext parses it. Two things are added here. Cells get ids that depend only on
what they say, so that building twice gives the same file and a changed cell is a small diff. And what belongs to a
task, its points and its card, comes from the registry of tasks, where it is written down once.
"""

import hashlib
import re

from qlearn.course import cells, tasks
from qlearn.course.cells import about

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path, kind):
    """The notebook that a percent script describes, not executed.

    path: of the script.  kind: "lesson" or "solution".  Returns a NotebookNode. Raises ValueError when a cell names
    an unknown task, or an answer lacks its solution or its check; ImportError, which says what to install, without
    jupytext.
    """
    notebook = _jupytext().read(path, fmt="py:percent")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = {**METADATA, "qlearn": {"kind": kind, "notebook": path.stem}}
    seen = {}
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)
        try:
            _complete(cell)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        _identify(cell, seen)
    _pair_up(notebook, path)
    return notebook


def _jupytext():
    try:
        import jupytext
    except ImportError:
        raise ImportError("building notebooks needs jupytext: pip install 'qlearn[test]'") from None
    return jupytext


def _complete(cell):
    """Add what the registry knows: the card above a task's text, the points of a check, the tag that nbval compares."""
    known = about(cell)
    if "card" in known:
        cell.source = f"{tasks.get(known['card']).card()}\n\n{cell.source}".rstrip()
    if "answer" in known:
        cells.stub(cell.source, tasks.get(known["answer"]).name)  # raises where the markers are wrong
    if "check" in known:
        cell.metadata["qlearn"] = {**known, "points": tasks.get(known["check"]).points}
        cell.metadata["tags"] = sorted({*cells.tags(cell), "nbval-check-output"})


def _identify(cell, seen):
    """Give a cell its id: what it is and for which task, or a hash of its text; a number tells equal ones apart."""
    role = next((role for role in ("card", "answer", "check") if role in about(cell)), cell.cell_type)
    name = about(cell).get(role) or hashlib.sha256(cell.source.encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{role}-{name}")[:48]
    seen[slug] = seen.get(slug, 0) + 1
    cell["id"] = slug if seen[slug] == 1 else f"{slug}-{seen[slug]}"
    if cell.cell_type == "code":
        cell.metadata["qlearn"] = {**about(cell), "cell": cell["id"]}


def _pair_up(notebook, path):
    """Every answer is checked after it is given, once at least; every task has one answer cell."""
    open_answers, given = set(), set()
    for known in map(about, cells.code_cells(notebook)):
        task = known.get("answer")
        if task in given:
            raise ValueError(f"{path.name}: the task {task} has two answer cells; join them")
        if task:
            given.add(task)
            open_answers.add(task)
        open_answers.discard(known.get("check"))
    if open_answers:
        raise ValueError(f"{path.name}: no cell below the answer checks {', '.join(sorted(open_answers))}")
