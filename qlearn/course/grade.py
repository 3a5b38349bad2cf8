"""`qlearn grade`: points for an exercise notebook.

1. The learner's answers are put into the pristine solution (`sheet.py`); running their own file would compare it
   with itself.
2. That notebook runs under nbval (`runner.py`). A task has its points when all its checks ran and printed what they
   print for the course's own answer.
3. When an answer takes the kernel down, its task is settled with no points, the course's own answer takes its place,
   and the rest is run again. So a crash in one answer costs that task only.

This is robust against mistakes and against edited checks. It is no defence against someone who sets out to cheat: the
answers run in the same process as their checks.
"""

import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from qlearn.course import cells, execute, places, progress, runner, sheet
from qlearn.course.catalogue import exercise_name
from qlearn.course.tasks import count

LIMIT = 20.0  # seconds for one cell
_NOTHING_RAN = ("SyntaxError", "IndentationError", "TabError", "NotImplementedError")


@dataclass(frozen=True)
class Result:
    """The points of one task, and if they are not all of them, why."""

    task: str
    points: int
    maximum: int
    reason: str = ""


@dataclass(frozen=True)
class Grade:
    """The result for one notebook; `str` of it is what `qlearn grade` prints."""

    notebook: str
    results: list
    notes: list
    seconds: float

    @property
    def points(self):
        return sum(result.points for result in self.results)

    @property
    def maximum(self):
        return sum(result.maximum for result in self.results)

    def as_dict(self):
        """The grade as plain data, for JSON."""
        return {
            "notebook": self.notebook,
            "points": self.points,
            "maximum": self.maximum,
            "tasks": [vars(result) for result in self.results],
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
        }

    def __str__(self):
        lines = [f"{self.notebook}: {self.points} of {count(self.maximum, 'point')}"]
        lines += [f"  note: {note}" for note in self.notes]
        for result in self.results:
            lines.append(f"  {result.points}/{result.maximum}  {result.task}")
            lines += [f"       {line}" for line in result.reason.splitlines()]
        return "\n".join(lines)


@dataclass
class _State:
    """What has been found out so far: the reason for each settled task ("" when it was solved), and what was taken
    out."""

    reasons: dict = field(default_factory=dict)
    replaced: set = field(default_factory=set)
    dropped: set = field(default_factory=set)
    notes: list = field(default_factory=list)

    def fail(self, task, reason):
        self.reasons.setdefault(task, reason)
        self.replaced.add(task)


def grade(path, limit=LIMIT):
    """Grade a learner's exercise notebook.

    path: of the notebook.  limit: seconds that one cell may take.  Returns a Grade; solved tasks enter the progress.
    Raises FileNotFoundError and ValueError when the file is not a notebook of this course, RuntimeError when the
    course's own cells do not run here.
    """
    began = time.perf_counter()
    learner = cells.read_notebook(Path(path))
    name = exercise_name(Path(path), learner.metadata)
    solution = cells.read_notebook(places.course_root() / "solutions" / f"{name}.ipynb")
    submission = sheet.take(learner, solution)
    state = _State(notes=list(submission.notes))
    while _run(submission, solution, state, limit):
        pass
    results = []
    for task, points in cells.points(solution).items():
        solved = not state.reasons[task]
        if solved:
            progress.note_attempt(task, solved)
        results.append(Result(task, points if solved else 0, points, state.reasons[task]))
    return Grade(name, results, state.notes, time.perf_counter() - began)


def _run(submission, solution, state, limit):
    """Run what is not settled yet, and settle what that run decides.  True when something is left to run again."""
    notebook = sheet.assemble(submission, solution, state.reasons, state.replaced, state.dropped)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "notebook.ipynb"
        path.write_text(cells.write_text(notebook), encoding="utf-8")
        rows = runner.run(path, limit)
    fatal = next((index for index, row in enumerate(rows) if row["lost"]), len(rows))
    _settle(rows[:fatal], cells.points(solution), state, limit, complete=fatal == len(rows))
    if fatal < len(rows):
        _take_out(rows[: fatal + 1], state, limit)
    return fatal < len(rows)


def _settle(rows, tasks, state, limit, complete):
    """Decide the tasks whose checks have all run.

    rows: those before the kernel was lost.  complete: whether that is all of them.
    """
    answers = {row["task"]: row for row in rows if row["role"] == "answer"}
    judged = {row["task"] for row in rows if row["role"] == "repair"}  # it stands behind the last check of its task
    for task in tasks:
        if task in state.reasons or not (complete or task in judged):
            continue
        checks = [row for row in rows if row["role"] == "check" and row["task"] == task]
        reason = _reason(answers.get(task), checks, limit)
        if reason:
            state.fail(task, reason)
        else:
            state.reasons[task] = ""


def _reason(answer, checks, limit):
    """Why a task gets no points; "" when it does."""
    if answer and _error_name(answer) in _NOTHING_RAN:
        return explain(answer, limit)
    failed = next((row for row in checks if row["status"] != "passed"), None)
    if failed is None:
        return "" if checks else "its checks did not run"
    if answer and answer["status"] != "passed" and _error_name(failed) == "NameError":
        return explain(answer, limit)
    return explain(failed, limit)


def _take_out(rows, state, limit):
    """The last row lost the kernel: take out whoever did it, so that the rest can be run again."""
    culprit = rows[-1]
    if culprit["role"] == "extra":
        state.dropped.add(culprit["cell"])
        state.notes.append(f"a cell of your own was left out: {explain(culprit, limit)}")
        return
    answered = [row["task"] for row in rows if row["role"] == "answer"]
    suspects = [culprit["task"]] if culprit["task"] else [task for task in answered if task not in state.reasons]
    for task in suspects:
        state.fail(task, explain(culprit, limit))
    if not suspects:
        if not set(answered) - state.replaced:
            raise RuntimeError(f"the course's own cells do not run here: {explain(culprit, limit)}")
        state.replaced.update(answered)


def explain(row, limit):
    """What went wrong in one cell, in words for the learner."""
    if row["status"] == "died":
        return "the code ended the kernel: os._exit, a crash, or not enough memory"
    if row["status"] == "timeout":
        return f"stopped after {limit:g} s: an endless loop?"
    if row["status"] == "flood":
        return "stopped because it printed without end: an endless loop?"
    if row["error"]:
        return _explain_error(row)
    if row["message"].startswith("Cell outputs differ"):
        return _explain_output(row)
    return row["message"] or "not run"


def _error_name(row):
    return row["error"]["ename"] if row["error"] else ""


def _explain_error(row):
    name, value = row["error"]["ename"], row["error"]["evalue"]
    if name == "NotImplementedError":
        return value.removeprefix(f"{row['task']}: ") or "not solved yet"
    value = re.sub(r"[(]\d+[.]py, (line \d+)[)]", r"(\1)", value)  # IPython's made-up file name
    frames = re.findall(r"Cell In\[\d+\], line (\d+)", execute.plain("\n".join(row["error"]["traceback"])))
    place = f" (line {frames[-1]} of the cell)" if frames and "line" not in value else ""
    return f"{name}: {value}{place}"


def _explain_output(row):
    """`check` explains itself; of other checks, what was printed and what should have been."""
    if row["task"] and row["output"].startswith(f"{row['task']}: "):
        return row["output"].rstrip().partition(": ")[2]
    return f"expected {row['expected'].strip()!r}\ngot      {row['output'].strip()!r}"
