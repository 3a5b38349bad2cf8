"""What every task of the course has to hold: its reference is right, its mistakes are caught and named, its words are
there."""

import time

import pytest

from qlearn.course import places, tasks
from qlearn.course.diff import difference
from qlearn.course.judge import judge

TASKS = list(tasks.TASKS.values())
MUTANTS = [pytest.param(task, mutant, id=f"{task.name}: {mutant.name}") for task in TASKS for mutant in task.mutants]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@every_task
def test_the_reference_is_right_and_quick(task):
    began = time.perf_counter()
    verdict = judge(task, task.reference)
    assert verdict.failure is None, verdict.failure
    assert time.perf_counter() - began < 5, "a learner waits for this after every change"


@pytest.mark.parametrize(("task", "mutant"), MUTANTS)
def test_the_mutant_is_killed_and_named(task, mutant):
    verdict = judge(task, mutant.function)
    assert verdict.failure is not None, "the cases accept this wrong answer"
    assert verdict.mutant is mutant and verdict.certain, f"taken for {verdict.mutant and verdict.mutant.name!r}"


@every_task
def test_empty_answers_are_rejected(task):
    assert judge(task, lambda *args, **kwargs: None).passed < len(task.all_cases())
    assert judge(task, ...).unsolved


@every_task
def test_cases_are_distinct_and_always_the_same(task):
    first, second = task.all_cases(), task.all_cases()
    assert len({case.name for case in first}) == len(first) >= (5 if callable(task.reference) else 1)
    for left, right in zip(first, second, strict=True):
        assert difference([left.name, left.args, left.kwargs], [right.name, right.args, right.kwargs]) is None


@every_task
def test_words(task):
    assert len(set(task.hints)) == 2
    for sentence in (*task.hints, *(mutant.explanation for mutant in task.mutants)):
        assert sentence.rstrip("`)\"'").endswith((".", "?")), sentence
    assert len({mutant.explanation for mutant in task.mutants}) == len(task.mutants)


def test_names_begin_with_the_notebook_and_are_unique():
    assert len({task.name for task in TASKS}) == len(TASKS)
    for notebook in tasks.TASKS.notebooks():
        assert all(task.name.startswith(f"{notebook}.") for task in tasks.TASKS.of(notebook))


@every_task
def test_a_notebook_asks_for_it(task):
    root = places.course_root()
    sources = [*root.glob("lessons/source/*.py"), *root.glob("solutions/source/*.py")]
    assert any(f'"{task.name}"' in path.read_text(encoding="utf-8") for path in sources)
