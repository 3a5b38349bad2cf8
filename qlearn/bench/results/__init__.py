"""Results files: JSON with the figures, and with where they come from (date, machine, versions, command)."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

_FOLDER = Path(__file__).parent


def provenance(command):
    """Where a result comes from: the command, the date, the machine, the versions that matter."""
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def write(name, record):
    """Write results/<name>.json, whole or not at all."""
    unfinished = _FOLDER / f"{name}.json.part"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, _FOLDER / f"{name}.json")


def read(name):
    """The record of that name.

    Raises ValueError, listing the names there are, for an unknown one.
    """
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.json"))) or "none yet"
        raise ValueError(f"there are no results called {name!r}; there are: {known}")
    return json.loads(path.read_text())
