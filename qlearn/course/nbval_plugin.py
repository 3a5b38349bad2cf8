"""The pytest plugin that runs beside nbval and writes down what happened in each cell.

It also changes how nbval judges:

- A kernel that dies is noticed, and a flood of output is cut (`nbval_kernel.py`).
- After a cell that ran out of time, the next ones count again if the kernel could be interrupted. nbval would mark them
  all as expected failures. If the kernel is lost, the rest is skipped.
- A repair cell (see `sheet.py`) runs only when a check of its task failed.
- Error output, HTML and SVG are never compared: they hold warnings and random ids.

The rows go as JSON to the file that QLEARN_ROWS names, one for each cell: {"cell", "role", "task", "status", "lost",
"message", "error", "output", "expected", "seconds"}, where status is passed, failed, timeout, flood, died or skipped,
`lost` says that the kernel was gone afterwards, and output and expected are the printed text.
"""

import json
import os

import pytest

from qlearn.course import cells, nbval_kernel

WARM_UP = (
    120  # seconds for what is given before the first answer: importing torch on a busy machine is not the learner's
)
_UNCOMPARED = ("stderr", "text/html", "image/svg+xml", "application/javascript")
_rows, _failed_tasks = [], set()


def pytest_configure():
    """Let nbval use the kernel that notices when it dies."""
    nbval_kernel.install()


def pytest_collectstart(collector):
    """Do not compare what differs from run to run."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += _UNCOMPARED


def pytest_collection_modifyitems(items):
    """Give every cell its time limit: the given one from the first answer on, more before it."""
    roles = [_about(item).get("role") for item in items]
    first = roles.index("answer") if "answer" in roles else 0
    for index, item in enumerate(items):
        item.limit = max(item.config.option.nbval_cell_timeout, WARM_UP if index < first else 0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what cannot run, or need not."""
    kernel, about = item.parent.kernel, _about(item)
    if kernel is not None and not kernel.is_alive():
        pytest.skip("the kernel is gone")
    if about.get("role") == "repair" and about["task"] not in _failed_tasks:
        pytest.skip("not needed")
    item.parent.timed_out = False
    item.config.option.nbval_cell_timeout = item.limit


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write down what happened in a cell."""
    report = yield
    if call.when == "call" or (call.when == "setup" and not report.passed):
        row = _row(item, call, report)
        _rows.append(row)
        if row["role"] == "check" and row["status"] != "passed":
            _failed_tasks.add(row["task"])
    return report


def pytest_sessionfinish():
    """Hand over the rows."""
    with open(os.environ["QLEARN_ROWS"], "w", encoding="utf-8") as file:
        json.dump(_rows, file)


def _about(item):
    return cells.about(item.cell)


def _row(item, call, report):
    outputs = item.test_outputs or []
    error = next((output for output in reversed(outputs) if output.output_type == "error"), {})
    kernel = item.parent.kernel
    return {
        "cell": item.cell.get("id"),
        "role": _about(item).get("role"),
        "task": _about(item).get("task"),
        "status": _status(item, call, report),
        "lost": kernel is None or not kernel.is_alive(),
        "message": str(call.excinfo.value) if call.excinfo else "",
        "error": {key: error[key] for key in ("ename", "evalue", "traceback")} if error else None,
        "output": _printed(outputs),
        "expected": _printed(item.cell.outputs),
        "seconds": round(call.duration, 3),
    }


def _status(item, call, report):
    if call.excinfo and call.excinfo.errisinstance(nbval_kernel.KernelDied):
        return "died"
    if item.parent.timed_out:
        return "flood" if item.parent.kernel.flooded else "timeout"
    return report.outcome


def _printed(outputs):
    kept = (output for output in outputs if output.get("name") != "stderr")
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in kept)
