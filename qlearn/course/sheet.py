"""The answer sheet: the pristine solution with the learner's answers in the place of the course's own.

A learner's notebook is never run as it is. It may have lost its checks, or have them edited; its stored outputs are
those of the learner. So only the source of its answers is taken, and put where the solution has its own; checks,
reference outputs and everything that was given come from the solution.

Answers are found by the metadata of their cells. A cell that was split has its task twice: the parts are joined. A cell
that was merged with another, or pasted without its metadata, is found by what it defines. The learner's own cells are
carried over to where they stand, since an answer may use them; what they print or raise does not count.

Behind the last check of a task stands a **repair** cell, which gives the names of that task the course's own meaning.
It runs only if the check failed (the runner sees to that), so that one wrong answer does not cost the tasks built on
it.
"""

import ast
from dataclasses import dataclass, field

import nbformat

from qlearn.course import cells
from qlearn.course.cells import about, code_cells


@dataclass
class Submission:
    """What is taken from a learner's notebook.

    answers: source by task.  extras: the learner's own cells, as lists of sources, by the cell or task they stand
    behind. notes: what the learner should know, such as that an edited check was ignored.
    """

    answers: dict = field(default_factory=dict)
    extras: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)


def take(learner, solution):
    """Read a learner's notebook against the solution of the same exercise.  Returns a Submission."""
    exercise = cells.to_exercise(solution)
    given = {about(cell)["cell"]: cell for cell in code_cells(exercise)}
    submission, seen, anchor = Submission(), set(), None
    for cell in code_cells(learner):
        task, name = about(cell).get("answer"), about(cell).get("cell")
        if task:
            before = submission.answers.get(task)
            submission.answers[task] = cell.source if before is None else f"{before}\n{cell.source}"
            anchor = task
        elif name in given and name not in seen:
            seen.add(name)
            anchor = name
            if cell.source.rstrip() != given[name].source.rstrip():
                submission.notes.append(_edited(given[name]))
        elif cell.source.strip():
            submission.extras.setdefault(anchor, []).append(cell.source)
    _find_missing(submission, learner, exercise, solution)
    return submission


def assemble(submission, solution, settled=(), replaced=(), dropped=()):
    """The notebook to run.

    settled: tasks that need no check any more.  replaced: tasks for which the course's own answer is used.  dropped:
    ids of the learner's own cells to leave out.  Returns a NotebookNode of code cells only, each with its role and
    task under "qlearn": given, answer, check, repair or extra.
    """
    own = {about(cell)["answer"]: cell.source for cell in code_cells(solution) if "answer" in about(cell)}
    last_check = {about(cell)["check"]: about(cell)["cell"] for cell in code_cells(solution) if "check" in about(cell)}
    made = _extras(submission, None, "top")
    for cell in code_cells(solution):
        known, name = about(cell), about(cell)["cell"]
        if "answer" in known:
            task = known["answer"]
            made.append(_cell(own[task] if task in replaced else submission.answers[task], name, "answer", task))
        elif "check" not in known:
            made += [] if known.get("show") else [_cell(cell.source, name, "given")]
        elif known["check"] not in settled:
            task = known["check"]
            made.append(_check(cell, name, task))
            if name == last_check[task] and task in own:
                made.append(_cell(own[task], f"repair-{name}", "repair", task))
        made += _extras(submission, known.get("answer", name), name)
    made = [cell for cell in made if cell.id not in dropped]
    return nbformat.v4.new_notebook(cells=made, metadata=solution.metadata)


def _extras(submission, anchor, name):
    """The learner's own cells that stand behind one of the course's."""
    own = enumerate(submission.extras.get(anchor, []))
    return [_cell(source, f"extra-{index}-{name}", "extra") for index, source in own]


def _cell(source, name, role, task=None):
    tags = ["raises-exception"] if role == "extra" else []
    metadata = {"tags": tags, "qlearn": {"cell": name, "role": role, "task": task}}
    return nbformat.v4.new_code_cell(source, id=name, metadata=metadata)


def _check(cell, name, task):
    """A check with its reference output, which nbval compares with what the learner's answer makes it print."""
    made = _cell(cell.source, name, "check", task)
    made.metadata["tags"] = cells.tags(cell)
    made.outputs, made.execution_count = cell.outputs, cell.execution_count
    return made


def _edited(cell):
    task = about(cell).get("check")
    what = f"the check of {task}" if task else f"the given cell that begins {cell.source.splitlines()[0]!r}"
    return f"{what} was edited; the original is used"


def _find_missing(submission, learner, exercise, solution):
    """Look for answers whose cells are gone by the names they define; a stub stands for those that are nowhere."""
    stubs = {about(cell)["answer"]: cell.source for cell in code_cells(exercise) if "answer" in about(cell)}
    for cell in code_cells(solution):
        task = about(cell).get("answer")
        if not task or task in submission.answers:
            continue
        names = defined(cell.source)
        places = [other.source for other in code_cells(learner) if names and names <= defined(other.source)]
        submission.answers[task] = places[-1] if places else stubs[task]
        if not places:
            submission.notes.append(f"the answer cell of {task} is missing; qlearn reset brings it back")


def defined(source):
    """The names that a cell defines at its top level; none when it cannot be parsed.

    >>> sorted(defined("a, b = 1, 2\\ndef f(): c = 3"))
    ['a', 'b', 'f']
    """
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError):
        return set()
    names = {
        item.name for item in statements if isinstance(item, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
    }
    assigned = [item for item in statements if isinstance(item, (ast.Assign, ast.AnnAssign))]
    names |= {
        node.id
        for item in assigned
        for node in ast.walk(item)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return names
