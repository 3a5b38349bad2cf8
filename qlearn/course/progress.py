"""What the learner has done so far, kept in `progress.json` of their data folder.

For each task: how often it was checked, how many hints were taken, and when it was solved. Solving is remembered for
good: a later attempt that fails takes nothing back.
"""

import contextlib
from datetime import UTC, datetime

from qlearn.course import store
from qlearn.course.catalogue import catalogue

_FILE = "progress.json"
_NEW = {"attempts": 0, "hints": 0, "solved": None}


def read():
    """The record of each task that was ever tried: {name: {"attempts", "hints", "solved"}}, `solved` a time or None.

    A file that cannot be read is set aside with a warning, and the record starts again empty.
    """
    tasks = store.read(_FILE).get("tasks")
    tasks = tasks if isinstance(tasks, dict) else {}
    return {name: _NEW | record for name, record in tasks.items() if isinstance(record, dict)}


def note_attempt(name, solved):
    """Record that an answer to the task was checked, and whether it was right."""
    record = _record(name)
    first = record["solved"] or (datetime.now(UTC).isoformat(timespec="seconds") if solved else None)
    _keep(name, record | {"attempts": record["attempts"] + 1, "solved": first})


def next_hint(name):
    """Record that one more hint was asked for; returns how many that makes."""
    record = _record(name)
    _keep(name, record | {"hints": record["hints"] + 1})
    return record["hints"] + 1


def summary():
    """One row for each notebook that has tasks, in order, as plain data.

    Returns a list of {"notebook", "points", "maximum", "tasks": [{"task", "points", "solved", "attempts", "hints"}]}.
    """
    done, rows = read(), []
    for notebook, points in catalogue().items():
        tasks = [{"task": name, "points": worth, **done.get(name, _NEW)} for name, worth in points.items()]
        earned = sum(task["points"] for task in tasks if task["solved"])
        rows.append({"notebook": notebook, "points": earned, "maximum": sum(points.values()), "tasks": tasks})
    return rows


def _record(name):
    with contextlib.suppress(OSError):
        return read().get(name, _NEW)
    return _NEW


def _keep(name, record):
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the record, not the check; see doctor
        store.write(_FILE, {"tasks": read() | {name: record}})
