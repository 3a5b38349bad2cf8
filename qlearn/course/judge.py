"""Judging an answer: run it on the cases of its task, compare with the reference, and name the mistake.

Every call gets its own deep copy of the case's inputs, so that nothing the answer does can reach the reference,
another case, or the learner's own variables; afterwards the copy is compared with the original, because an answer
that changes its input is wrong even when its result is right. What the answer prints is caught: it is shown for a
case that failed and dropped for one that passed, so a forgotten `print` costs nothing.

Where the reference raises an error (a bad argument), the answer has to raise the same kind of error.

To name a mistake, the mutants of the task are run on the same cases. The one whose results equal the answer's in the
most of the cases that failed is the diagnosis, if that is at least half of them, and it is certain when it agrees
with the answer everywhere.
"""

import contextlib
import copy
import functools
import inspect
import io
import linecache
import os
import warnings
from dataclasses import dataclass
from typing import Any

from qlearn.course import show
from qlearn.course.diff import Difference, difference, is_array
from qlearn.course.tasks import Case, Mutant, Task

MOST_PRINTED = 400


@dataclass(frozen=True)
class Outcome:
    """What one call did: its value or the error it raised, what it printed, and the name of an input it changed."""

    value: Any = None
    error: BaseException | None = None
    printed: str = ""
    changed: str = ""


@dataclass(frozen=True)
class Failure:
    """The first case on which the answer and the reference disagree."""

    case: Case
    expected: Outcome
    got: Outcome
    difference: Difference


@dataclass(frozen=True)
class Verdict:
    """The result of judging one answer.

    passed, total: cases.  failure: the first one that failed.  mutant: the mistake that was recognised, which
    explains `matched` of the cases that failed; `certain` when it agrees with the answer on every case.
    """

    task: Task
    passed: int
    total: int
    failure: Failure | None = None
    mutant: Mutant | None = None
    matched: int = 0
    certain: bool = False

    @property
    def unsolved(self):
        """True when the answer is still the stub that the exercise came with."""
        return self.failure is not None and isinstance(self.failure.got.error, NotImplementedError)


def judge(task, answer):
    """Run an answer on all cases of a task.

    answer: a function, or a value where the task asks for one; `...` stands for an answer not given yet.  Returns a
    Verdict.
    """
    cases = _cases(task)
    expected = [_known(task, None, index) for index in range(len(cases))]
    got = [run(task, answer, case) for case in cases]
    wrong = [_disagreement(task, *pair) for pair in zip(expected, got, strict=True)]
    failed = [index for index, found in enumerate(wrong) if found]
    if not failed:
        return Verdict(task, len(cases), len(cases))
    first = failed[0]
    failure = Failure(cases[first], expected[first], got[first], wrong[first])
    return Verdict(task, len(cases) - len(failed), len(cases), failure, *_diagnose(task, len(cases), got, failed))


@functools.lru_cache(maxsize=16)
def _cases(task):
    return task.all_cases()


@functools.lru_cache(maxsize=4096)
def _known(task, mutant, index):
    """What a mutant (None: the reference) does on a case. It never changes, so it is computed once."""
    return run(task, task.reference if mutant is None else task.mutants[mutant].function, _cases(task)[index])


def run(task, function, case):
    """Call a function on copies of a case's inputs, and record what happens; where the task asks for a value, take
    it."""
    if function is ...:
        return Outcome(error=NotImplementedError())
    if not callable(function) or not callable(task.reference):
        return Outcome(_snapshot(function))
    args, kwargs = copy.deepcopy((case.args, case.kwargs))
    printed = _Tail()
    value = error = None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = function(*args, **kwargs)
        except (Exception, SystemExit) as raised:
            error = raised
    changed = _changed(function, case, args, kwargs)
    return Outcome(_snapshot(value), error, printed.getvalue(), changed)


def named_inputs(function, case):
    """The inputs of a case by the names of the function's parameters, as far as it has them."""
    try:
        return dict(inspect.signature(function).bind(*case.args, **case.kwargs).arguments)
    except (TypeError, ValueError):
        return {**{f"argument {index}": value for index, value in enumerate(case.args, 1)}, **case.kwargs}


def where_raised(error, answer):
    """The line of the learner's own code that raised: (line number, source line), or None.

    That is the last frame in the file of the answer, or in a notebook cell, which is a file that does not exist on
    disk.
    """
    own = getattr(getattr(answer, "__code__", None), "co_filename", None)
    found, trace = None, error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name == own or (linecache.getline(name, 1) and not os.path.exists(name)):
            found = trace.tb_lineno, linecache.getline(name, trace.tb_lineno).strip()
        trace = trace.tb_next
    return found


class _Tail(io.StringIO):
    """Keeps the first MOST_PRINTED characters written to it: an endless loop that prints must not fill the memory."""

    def write(self, words):
        room = MOST_PRINTED - self.tell()
        super().write(words[: max(room, 0)])
        return len(words)


def _snapshot(value):
    """A copy that a later call cannot change; what cannot be copied (a generator, a live graph) is kept as it is."""
    with contextlib.suppress(Exception):
        return copy.deepcopy(value)
    return value


def _changed(function, case, args, kwargs):
    """The name of an array (or list, or dict) among the inputs that is no longer what it was; "" when there is none."""
    before = named_inputs(function, case)
    after = named_inputs(function, Case(case.name, args, kwargs))
    for name, value in before.items():
        if (is_array(value) or isinstance(value, (list, dict, tuple))) and difference(value, after[name]):
            return name
    return ""


def _disagreement(task, expected, got):
    """The Difference between what the reference did and what the answer did, or None."""
    if got.error is not None and not isinstance(got.error, type(expected.error)):
        return Difference("", f"raised {type(got.error).__name__}")
    if expected.error is not None:
        wanted = f"expected {type(expected.error).__name__} to be raised ({expected.error})"
        return None if got.error else Difference("", f"{wanted}, got {show.text(got.value)}")
    if got.changed:
        return Difference("", f"the answer changed its input `{got.changed}`: work on a copy")
    return difference(expected.value, got.value, task.tolerance, task.any_array, task.same_dtype)


def _diagnose(task, total, got, failed):
    """The mutant that behaves most like the answer: (mutant or None, failed cases it explains, whether it agrees on
    all).

    A mutant that can no longer explain half of the failed cases is not run on the others.
    """
    best = None, 0, False
    passed = [index for index in range(total) if index not in failed]
    for number, mutant in enumerate(task.mutants):

        def agrees(index, number=number):
            return _disagreement(task, _known(task, number, index), got[index]) is None

        matched, tolerated = 0, len(failed) // 2
        for index in failed:
            same = agrees(index)
            matched, tolerated = matched + same, tolerated - (not same)
            if tolerated < 0:
                break
        else:
            certain = matched == len(failed) and all(map(agrees, passed))
            if (certain or matched > 1) and (certain, matched) > (best[2], best[1]):
                best = mutant, matched, certain
    return best
