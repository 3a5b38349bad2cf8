"""Where a figure comes from: what has to be written down beside a measurement for it to mean something later."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch


def provenance(command):
    """The command, the date, the machine, and the versions that matter: a dict for JSON.

    >>> provenance("python -m qlearn.bench.rtn")["command"]
    'python -m qlearn.bench.rtn'
    """
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }
