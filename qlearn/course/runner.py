"""Run a notebook under nbval in a process of its own, and get one row for each cell.

nbval is a pytest plugin: every code cell is a test, all cells share one kernel, and a cell whose tags ask for it passes
only when its output equals the stored one. Ours runs beside it (`nbval_plugin.py`) and writes down what happened.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qlearn.course import cells


def run(path, limit):
    """Run a notebook in its own folder, and compare the outputs of its tagged cells with the stored ones.

    path: of the notebook.  limit: seconds for a cell; where there are answers, for each cell from the first one on.
    Returns a list of rows, dicts as `nbval_plugin` describes.  Raises RuntimeError when nothing could be run.
    """
    cell_count = len(cells.code_cells(cells.read_notebook(path)))
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.json"
        patience = 180 + (limit + 15) * cell_count
        try:
            done = subprocess.run(
                _command(path, limit),
                env=_environment(scratch, rows),
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{path.name} was still running after {patience:.0f} s") from None
        if not rows.exists():
            raise RuntimeError(f"nbval did not run:\n{done.stdout}{done.stderr}".rstrip())
        return json.loads(rows.read_text(encoding="utf-8"))


def _command(path, limit):
    plugins = ("-p", "qlearn.course.nbval_plugin", "-p", "nbval.plugin", "-p", "no:cacheprovider")
    nbval = ("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", str(limit))
    config = ("-c", os.devnull, "--rootdir", str(path.parent), "--color=no", "-q")
    return [sys.executable, "-m", "pytest", *plugins, *nbval, *config, str(path)]


def _environment(scratch, rows):
    """The environment of the run: no other pytest plugins, no trace of a pytest around us, and an empty data folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "QLEARN_DATA": str(Path(scratch) / "data"),
        "QLEARN_ROWS": str(rows),
    }
