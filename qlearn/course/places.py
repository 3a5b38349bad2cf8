"""Where things lie on this computer: the notebooks of the course, and the learner's own data.

The notebooks come with the package: in a wheel as `qlearn/course/notebooks/`, in a clone of the repository as
`lessons/`, `exercises/` and `solutions/` beside the package. The learner's data (progress, predictions, the board)
lie in the folder that the operating system keeps for such things; the environment variable QLEARN_DATA names another
one.
"""

import os
import tempfile
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "course" / "notebooks"


def course_root():
    """The folder that holds lessons/, exercises/ and solutions/.

    Returns a Path.  Raises FileNotFoundError when the package came without its notebooks.
    """
    for root in (SHIPPED, PACKAGE.parent):
        if (root / "solutions").is_dir():
            return root
    raise FileNotFoundError("the notebooks of the course are missing from this installation: install qlearn again")


def is_repository():
    """True in a clone of the repository, where the learner works on the course's own files; False in an installed
    copy."""
    return not SHIPPED.is_dir()


def data_folder():
    """The learner's own folder, made when it is missing. QLEARN_DATA overrides the operating system's choice."""
    chosen = os.environ.get("QLEARN_DATA")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("qlearn", appauthor=False))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path, content):
    """Write text to a file so that a reader sees the old content or the new, never a half.

    path: where to write; its folder must exist.  content: str, stored as UTF-8 with plain newlines.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
