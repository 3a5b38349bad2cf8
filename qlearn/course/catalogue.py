"""Which tasks the course has, read off its notebooks: a second's work, where importing the tasks would import torch."""

from qlearn.course import cells, places


def catalogue():
    """The tasks of each notebook that checks any, in order: {"02_absmax": {"absmax.quantize": points, ...}, ...}.

    Exercises are read from their solutions, which the learner does not edit; a lesson may have a task of its own.
    """
    found = {}
    for folder in ("lessons", "solutions"):
        for path in sorted((places.course_root() / folder).glob("[0-9]*.ipynb")):
            points = cells.points(cells.read_notebook(path))
            if points:
                found.setdefault(path.stem, {}).update(points)
    return dict(sorted(found.items()))


def exercise_name(path, metadata=None):
    """The exercise that a learner's file belongs to: what its metadata say, else its file name.

    path: of the file.  metadata: of the notebook, when it could be read.  Returns a name such as "02_absmax".
    Raises ValueError when the course has no such exercise.
    """
    known = sorted(file.stem for file in (places.course_root() / "solutions").glob("*.ipynb"))
    about = (metadata or {}).get("qlearn")
    claimed = about.get("notebook") if isinstance(about, dict) else None
    for name in (claimed, path.name.partition(".")[0]):
        if name in known:
            return name
    raise ValueError(f"{path} is no exercise of this course: there are {', '.join(known) or 'none yet'}")
