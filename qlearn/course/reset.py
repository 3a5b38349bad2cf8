"""`qlearn reset`: an exercise as it was in the beginning. What the learner wrote is kept beside it, never lost."""

import shutil
from datetime import datetime
from pathlib import Path

from qlearn.course import cells, places
from qlearn.course.catalogue import exercise_name


def reset(path):
    """Put the pristine exercise at this path; a file that was there is moved into the folder backups beside it.

    path: such as exercises/02_absmax.ipynb.  Returns the path of the backup, or None when there was no file.
    Raises ValueError when the course has no such exercise; then nothing is changed.
    """
    path = Path(path)
    name = exercise_name(path, _metadata(path))
    exercise = cells.to_exercise(cells.read_notebook(places.course_root() / "solutions" / f"{name}.ipynb"))
    path.parent.mkdir(parents=True, exist_ok=True)
    backup = _back_up(path) if path.exists() else None
    places.write_atomically(path, cells.write_text(exercise))
    return backup


def _metadata(path):
    """The metadata of the learner's notebook, None when it is gone or broken: a reset has to work then too."""
    try:
        return cells.read_notebook(path).metadata
    except (FileNotFoundError, cells.NotebookError):
        return None


def _back_up(path):
    folder = path.parent / "backups"
    folder.mkdir(exist_ok=True)
    stem = f"{path.stem}.{datetime.now():%Y-%m-%d-%H%M%S}"
    number, backup = 1, folder / f"{stem}.ipynb"
    while backup.exists():
        number += 1
        backup = folder / f"{stem}-{number}.ipynb"
    return Path(shutil.copy2(path, backup))
