"""An answer is run on the cases of its task, and its mistake is named. The sample tasks stand for the course's."""

import numpy as np
import pytest

from qlearn.course import tasks
from qlearn.course.judge import MOST_PRINTED, judge, run
from qlearn.course.tasks import Case, Mutant, Task

pytestmark = pytest.mark.usefixtures("sample_tasks")


@pytest.fixture
def scale():
    return tasks.get("grid.scale")


@pytest.fixture
def codes():
    return tasks.get("grid.codes")


def test_the_reference_passes(scale):
    verdict = judge(scale, scale.reference)
    assert (verdict.passed, verdict.total, verdict.failure, verdict.mutant) == (5, 5, None, None)


def test_every_mutant_is_rejected_and_named(scale, codes):
    for task in (scale, codes, tasks.get("grid.levels")):
        for mutant in task.mutants:
            verdict = judge(task, mutant.function)
            assert verdict.failure is not None
            assert verdict.mutant is mutant and verdict.certain


def test_a_mistake_on_top_of_another_is_still_recognised(codes):
    """floor instead of round, and the first case special-cased: the other failures still point to floor."""
    floor = codes.mutants[0].function
    verdict = judge(codes, lambda x, bits: np.zeros(5, int) if bits == 3 else floor(x, bits))
    assert verdict.mutant is codes.mutants[0]
    assert not verdict.certain and verdict.matched == verdict.total - verdict.passed - 1


def test_an_unknown_mistake_gets_no_name(codes):
    verdict = judge(codes, lambda x, bits: np.full(x.shape, 99))
    assert verdict.passed == 0 and verdict.mutant is None


def test_inputs_are_neither_shared_nor_changed(scale):
    seen = []

    def answer(x, bits):
        seen.append(x)
        result = scale.reference(x, bits)
        x[:] = 0
        return result

    verdict = judge(scale, answer)
    assert verdict.failure.difference.sentence == "the answer changed its input `x`: work on a copy"
    assert all(case.args[0].any() for case in scale.all_cases())
    assert not any(np.shares_memory(seen[0], other) for other in seen[1:])


def test_a_result_that_is_overwritten_later_counts_as_it_was(codes):
    """An answer may reuse a buffer; what it returned for one case must not turn into the result for the next."""
    buffer = np.zeros(9, np.int8)

    def answer(x, bits):
        buffer[: len(x)] = codes.reference(x, bits)
        return buffer[: len(x)]

    assert judge(codes, answer).failure is None


@pytest.mark.parametrize("unsolved", [..., None], ids=["dots", "stub"])
def test_a_stub_is_unsolved_and_not_wrong(scale, unsolved):
    def stub(x, bits):
        raise NotImplementedError("grid.scale: not solved yet")

    verdict = judge(scale, unsolved or stub)
    assert verdict.unsolved and verdict.mutant is None


def test_errors_that_are_asked_for(scale):
    """One case wants a ValueError: another error, or none, is wrong."""

    def wrong_error(x, bits):
        if bits < 2:
            raise TypeError("no")
        return scale.reference(x, bits)

    verdict = judge(scale, wrong_error)
    assert (verdict.passed, verdict.failure.case.name) == (4, "one bit")
    verdict = judge(scale, scale.mutants[-1].function)
    assert verdict.failure.difference.sentence == "expected ValueError to be raised (1 bits are too few), got 1.0"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), SystemExit(3), RecursionError("deep")], ids=lambda e: type(e).__name__
)
def test_errors_that_are_not(codes, error):
    def answer(x, bits):
        raise error

    verdict = judge(codes, answer)
    assert verdict.passed == 0 and verdict.failure.got.error is error


def test_an_interrupt_is_not_caught(codes):
    """The stop button of JupyterLab, and nbval's time limit, have to get through."""

    def answer(x, bits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(codes, answer)


def test_prints_and_warnings_are_caught(codes, capfd, recwarn):
    def answer(x, bits):
        print("looking at", bits)
        np.array([1.0]) / 0
        return codes.reference(x, bits)

    assert judge(codes, answer).failure is None
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_an_endless_print_is_cut(codes):
    outcome = run(codes, lambda: [print("x" * 99) for _ in range(1000)], Case("loud"))
    assert len(outcome.printed) == MOST_PRINTED


@pytest.mark.parametrize("answer", [3, None, "text", np.ones(3), [1], lambda: 1, lambda x, bits: None])
def test_answers_of_the_wrong_kind_are_wrong(codes, answer):
    assert judge(codes, answer).passed == 0


def test_a_value(scale):
    levels = tasks.get("grid.levels")
    assert judge(levels, 15).failure is None
    assert judge(levels, np.int64(15)).failure is None
    for wrong in (15.0, "15", True, [15], lambda: 15):
        assert judge(levels, wrong).passed == 0, wrong


def test_what_cannot_be_copied_is_kept(codes):
    outcome = run(codes, lambda: (number for number in range(3)), Case("a generator"))
    assert list(outcome.value) == [0, 1, 2]


def _task(**changes):
    good = {
        "name": "a.b", "title": "t", "points": 1, "minutes": 1, "difficulty": 1, "importance": 1, "reference": 1,
        "hints": ("one", "two"), "mutants": tuple(Mutant(str(n), n, "no") for n in range(2, 7)),
    }  # fmt: skip
    return Task(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"name": "plain"}, "a name of the form notebook.task"),
        ({"points": 0}, "at least one point"),
        ({"difficulty": 6}, "from 1 to 5"),
        ({"hints": ("one",)}, "two hints"),
        ({"mutants": ()}, "five mutants"),
        ({"mutants": (Mutant("same", 2, "no"),) * 5}, "different names"),
        ({"reference": abs}, "needs cases"),
        ({"cases": list}, "none if it is a value"),
    ],
)
def test_a_task_that_is_incomplete_says_so(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        _task(**changes)


def test_the_registry(scale):
    assert tasks.TASKS["grid.scale"] is scale
    assert [task.name for task in tasks.TASKS.of("grid")] == ["grid.scale", "grid.codes", "grid.levels"]
    assert "grid.nothing" not in tasks.TASKS and "nothing.scale" not in tasks.TASKS
    with pytest.raises(
        ValueError, match=r"no task called 'grid.scales': there are grid.scale, grid.codes, grid.levels"
    ):
        tasks.get("grid.scales")
    with pytest.raises(ValueError, match=r"no task called 3: its name begins with one of .*grid"):
        tasks.get(3)
