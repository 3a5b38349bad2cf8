"""`qlearn doctor`: is everything here that the course needs, and if not, what to do.

Each check is a function that returns what it found, or raises a Problem with the remedy. All of them together take
about two seconds: versions are read from the installed packages' metadata, and nothing as large as torch is imported.
"""

import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from qlearn.course import places


class Problem(Exception):
    """Something is missing or broken: what (the first argument), and the remedy (the second)."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    remedy: str = ""

    def __str__(self):
        line = f"{'OK  ' if self.ok else 'FAIL'}  {self.name}: {self.found}"
        return line if self.ok else f"{line}. {self.remedy}"


def python():
    """The interpreter is new enough, as pyproject.toml says."""
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("qlearn")["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    if version not in SpecifierSet(wanted):
        raise Problem(f"{version}, but the course needs {wanted}", "Install a newer Python and make a new environment")
    return version


def packages():
    """Every dependency of pyproject.toml is installed, in a version that it allows."""
    from packaging.requirements import Requirement

    wanted = map(Requirement, importlib.metadata.requires("qlearn") or [])
    needed = [one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    wrong = [f"{one.name}{one.specifier}" for one in needed if not _satisfied(one)]
    if wrong:
        raise Problem(f"missing or too old: {', '.join(wrong)}", f"pip install -U {' '.join(map(repr, wrong))}")
    return f"all {len(needed)} are here"


def _satisfied(requirement):
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def kernel():
    """Jupyter has a Python kernel, and it is this Python, where the packages are."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    remedy = "python -m ipykernel install --sys-prefix"
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        raise Problem("there is no kernel called python3", remedy) from None
    same = os.path.isabs(command) and Path(command).parent == Path(sys.executable).parent
    if not (same or command in ("python", "python3")):
        raise Problem(f"python3 starts {command}, not {sys.executable}", remedy)
    return "python3"


def widgets():
    """Sliders appear only if their front end lies in the environment that JupyterLab runs from."""
    manager = "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager/package.json"
    path = Path(sys.prefix) / manager
    if not path.is_file():
        raise Problem(
            "JupyterLab's front end for widgets is missing", "pip install --force-reinstall jupyterlab_widgets"
        )
    return f"front end {json.loads(path.read_text(encoding='utf-8'))['version']}"


def model(folder=None):
    """The bundled model's files are here, and the weights are as long as their header says."""
    folder = folder or places.PACKAGE / "models" / "bundled"
    remedy = "The installation is damaged: install qlearn again"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise Problem(f"{name} is missing", remedy)
    path = folder / "model.safetensors"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        promised = 8 + length + max(entry["data_offsets"][1] for entry in tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{path.name} has no header that can be read", remedy) from error
    if path.stat().st_size != promised:
        raise Problem(f"{path.name} has {path.stat().st_size:,} bytes instead of {promised:,}", remedy)
    return f"{len(tensors)} tensors, {promised / 1e6:.1f} MB"


def notebooks():
    """Lessons and solutions came with the package."""
    try:
        root = places.course_root()
    except FileNotFoundError as error:
        raise Problem("the notebooks are missing", "Install qlearn again") from error
    return ", ".join(f"{len(list((root / name).glob('*.ipynb')))} {name}" for name in ("lessons", "solutions"))


def data():
    """The learner's folder, which keeps progress and predictions, can be written."""
    try:
        folder = places.data_folder()
        places.write_atomically(folder / "doctor.txt", "qlearn doctor could write here\n")
        (folder / "doctor.txt").unlink()
    except OSError as error:
        raise Problem(
            f"your progress cannot be kept ({error})", "Set QLEARN_DATA to a folder that you can write"
        ) from error
    return "can be written"


def numba():
    """Numba compiles a function."""
    try:
        from numba import njit

        if njit(lambda x: x + 1)(1) != 2:
            raise Problem("a compiled function gave a wrong result", "pip install -U --force-reinstall numba llvmlite")
    except (ImportError, OSError) as error:
        raise Problem(f"it cannot be imported ({error})", "pip install -U --force-reinstall numba llvmlite") from error
    return f"{importlib.metadata.version('numba')} compiles"


def gpu():
    """Which device CUDA kernels run on; without one they are simulated, which is no problem."""
    from qlearn.kernels.cuda import SIMULATED  # it decides, so it comes first

    try:
        if not SIMULATED:
            from numba import cuda

            name = cuda.get_current_device().name
            return name.decode() if isinstance(name, bytes) else str(name)
    except Exception as error:  # the driver's errors have no common base
        raise Problem(f"a GPU is here but does not answer ({error})", "Check the driver with nvidia-smi") from error
    return "none; CUDA kernels run in Numba's simulator"


CHECKS = {
    "Python": python,
    "packages": packages,
    "Jupyter kernel": kernel,
    "widgets": widgets,
    "model": model,
    "notebooks": notebooks,
    "data folder": data,
    "Numba": numba,
    "GPU": gpu,
}


class Findings(list):
    """The results of all checks; shown as one line each."""

    @property
    def ok(self):
        return all(one.ok for one in self)

    def __repr__(self):
        return "\n".join(map(str, self))


def examine(checks=None):
    """Run the checks, one Finding each, in order.  A check that breaks in an unforeseen way is a finding too.

    checks: functions by name; all of the course's by default.  Returns Findings, which a notebook shows as lines.
    """
    findings = Findings()
    for name, check in (checks or CHECKS).items():
        try:
            findings.append(Finding(name, True, check()))
        except Problem as problem:
            findings.append(Finding(name, False, *problem.args))
        except Exception as error:
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}", "Install qlearn again"))
    return findings
