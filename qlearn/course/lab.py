"""`qlearn lab`: JupyterLab on lesson 0.

In a clone of the repository it opens the repository itself. Installed from a wheel, the notebooks lie inside the
package, where nobody should edit them: they are copied into ./qlearn-course first, and what is there already is left as
it is, because it is the learner's.

The questions that JupyterLab asks on its first start, about news and updates, are answered with no, and long lines of
code are wrapped, so that none ends behind the page's edge: by a folder of default settings that is put on Jupyter's
path for this one process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from qlearn.course import places

FOLDERS = ("lessons", "exercises", "solutions")


def lab(options=()):
    """Open JupyterLab and wait until it is closed.

    options: more arguments for JupyterLab, such as --no-browser.  Returns its exit status.
    """
    root = working_copy()
    first = next(iter(sorted((root / "lessons").glob("[0-9]*.ipynb"))), None)
    opened = [] if first is None else [f"--LabApp.default_url=/lab/tree/{first.relative_to(root).as_posix()}"]
    quiet = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    # In a container one is often root, which JupyterLab refuses; it still listens on this machine only, with a token.
    root_too = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}", *opened, *quiet, *root_too, *options]
    return subprocess.run(command, env=environment()).returncode


def environment():
    """This process's environment, with the course's default settings for JupyterLab on its path."""
    paths = [str(places.PACKAGE / "course" / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    return os.environ | {"JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}


def working_copy(folder="qlearn-course"):
    """Where the learner works: the repository, or a copy of the shipped notebooks, made or completed when needed."""
    if places.is_repository():
        return places.course_root()
    target = Path(folder).resolve()
    for name in FOLDERS:
        for file in sorted((places.course_root() / name).glob("*.ipynb")):
            copy = target / name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copy2(file, copy)
    return target
