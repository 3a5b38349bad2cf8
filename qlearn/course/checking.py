"""`course.check`: what a learner runs under an answer.

It prints one line when the answer is right. When it is not, it prints the first case that failed: what went in, what
was expected, what came out, and where the two differ; then, if the answer does what a known mistake does, which one
it is. Whatever the answer does, `check` itself never raises: an error in the learner's code is reported with the line
it is on.

The text is the same on every machine, because the grader compares the line that a right answer prints.
"""

from qlearn.course import judge, progress, show, tasks
from qlearn.course.tasks import count


def check(name, answer):
    """Judge an answer to a task, print what was found, and keep the result in the learner's progress.

    name: of the task, such as "absmax.quantize".  answer: the function, or the value, that the learner wrote.
    Raises ValueError for the name of a task that does not exist; never for an answer.
    """
    verdict = judge.judge(tasks.get(name), answer)
    if not verdict.unsolved:
        progress.note_attempt(name, verdict.failure is None)
    print(report(verdict, answer))


def report(verdict, answer):
    """The text that `check` prints."""
    task, failure = verdict.task, verdict.failure
    if failure is None:
        return f"{task.name}: {verdict.total} of {count(verdict.total, 'case')} passed, {count(task.points, 'point')}"
    if verdict.unsolved:
        return _unsolved(task, failure.got.error)
    head = f"{task.name}: {verdict.passed} of {count(verdict.total, 'case')} passed, no points yet"
    lines = [("case", failure.case.name)]
    lines += [("input", line) for line in _inputs(task, failure.case)]
    lines += [("expected", _outcome(failure.expected)), ("got", _outcome(failure.got)), *_where(failure, answer)]
    if failure.got.printed.strip():
        lines.append(("printed", failure.got.printed.strip().replace("\n", " | ")))
    return "\n".join([head, *(f"  {label:9} {line}" for label, line in lines), *_diagnosis(verdict)])


def _unsolved(task, error):
    """Not solved yet, or waiting for another answer that is not: a stub's message begins with the name of its task."""
    other = str(error).partition(":")[0]
    if other in tasks.TASKS and other != task.name:
        return f"{task.name}: needs your answer to {other}, which is not solved yet"
    return f'{task.name}: not solved yet ({count(task.points, "point")}). course.hint("{task.name}") helps.'


def _inputs(task, case):
    if not callable(task.reference):
        return []
    return [f"{name} = {show.text(value)}" for name, value in judge.named_inputs(task.reference, case).items()]


def _outcome(outcome):
    if outcome.error is None:
        return show.text(outcome.value)
    return f"{type(outcome.error).__name__}: {outcome.error}".rstrip(": ")


def _where(failure, answer):
    """Where the values differ, or on which line of the learner's code the error was raised."""
    if failure.got.error is None:
        return [("differ", str(failure.difference))]
    place = judge.where_raised(failure.got.error, answer)
    return [("raised", f"in line {place[0]}: {place[1]}")] if place else []


def _diagnosis(verdict):
    if verdict.mutant is None:
        return []
    failed = verdict.total - verdict.passed
    if verdict.certain:
        return [verdict.mutant.explanation]
    return [f"In {verdict.matched} of the {count(failed, 'case')} that failed: {verdict.mutant.explanation}"]
