"""The course's own tools: everything a lesson or an exercise calls that is not about quantization itself.

A notebook starts with `from qlearn import course` and then says `course.check(...)`, `course.table(...)`,
`course.widgets...`. Each name is imported when it is first used, so that an exercise does not wait for the widgets,
nor the grader for anything.

What happens between a source file and a grade, one module a step:

    source.py    a percent script -> the cells of a notebook, with ids and metadata that are the same every time
    cells.py     what a cell is (answer, check, given), and how a solution becomes an exercise
    build.py     executes lessons and solutions, writes lessons/, solutions/ and exercises/
    tasks/       what each exercise asks: reference, cases, hints, and the mistakes it knows
    judge.py     runs an answer on the cases;  diff.py compares two values;  checking.py prints the result in a notebook
    sheet.py     puts the learner's answers into the pristine solution
    runner.py    runs that under nbval, with nbval_plugin.py inside;  grade.py turns the rows into points
"""

import importlib

_FUNCTIONS = {
    "check": "checking",
    "hint": "hints",
    "predict": "predictions",
    "reveal": "predictions",
    "source_of": "sources",
    "table": "tables",
}
_MODULES = ("board", "doctor", "plots", "tasks", "widgets")

__all__ = [*_FUNCTIONS, *_MODULES]


def __getattr__(name):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"qlearn.course.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"qlearn.course.{name}")
    raise AttributeError(f"module 'qlearn.course' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
