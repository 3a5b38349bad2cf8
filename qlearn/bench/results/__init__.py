"""Results files: JSON with the figures, and with where they come from (`evaluate.provenance`)."""

import json
import os
from pathlib import Path

_FOLDER = Path(__file__).parent


def write(name, record, folder=None):
    """Write <name>.json, whole or not at all: among the results of the package, or in another folder that exists."""
    path = Path(folder or _FOLDER) / f"{name}.json"
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, path)


def read(name):
    """The record of that name.

    Raises ValueError, listing the names there are, for an unknown one.
    """
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.json"))) or "none yet"
        raise ValueError(f"there are no results called {name!r}; there are: {known}")
    return json.loads(path.read_text())
