"""Where a figure comes from: what has to be written down beside a measurement for it to mean something later."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

# What decides how fast small integers are multiplied: by the names that Linux gives them, x86 first, then ARM.
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def provenance(command):
    """The command, the date, the machine, and the versions that matter: a dict for JSON.

    >>> provenance("python -m qlearn.bench.rtn")["command"]
    'python -m qlearn.bench.rtn'
    """
    name, instructions = processor()
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "processor": name,
        "instructions": instructions,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def processor(cpuinfo=Path("/proc/cpuinfo")):
    """The processor's name, and those of the `INSTRUCTIONS` that it has; without that file, None for them.

    >>> processor(Path("there is no such file"))[1] is None
    True
    """
    if not cpuinfo.is_file():
        return platform.processor() or None, None
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return fields.get("model name"), [name for name in INSTRUCTIONS if name in flags]
