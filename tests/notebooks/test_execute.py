"""Every notebook of the course runs from top to bottom under nbval, prints what is stored, and is graded as it should
be.

A lesson's cells that are tagged `nbval-check-output` are compared with the stored output; all others have to run. One
test is one or two processes with a kernel each: run them with `-m notebooks`.
"""

import pytest

from qlearn.course import places, runner
from qlearn.course.grade import grade

ROOT = places.course_root()
CELL_LIMIT = 90  # seconds


def notebooks(*folders):
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.ipynb"))]
    return pytest.mark.parametrize("path", paths, ids=lambda path: f"{path.parent.name}/{path.stem}")


pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(900)]


@notebooks("lessons", "solutions")
def test_it_runs_and_prints_what_is_stored(path):
    rows = runner.run(path, CELL_LIMIT)
    wrong = [f"{row['cell']}: {row['status']}: {row['message']}" for row in rows if row["status"] != "passed"]
    assert rows and not wrong, "\n".join(wrong)


@notebooks("solutions")
def test_a_solution_gets_full_points(path):
    found = grade(path)
    assert found.points == found.maximum > 0, str(found)
    assert not found.notes


@notebooks("exercises")
def test_an_untouched_exercise_gets_none(path):
    found = grade(path)
    assert found.points == 0 < found.maximum
    assert all(result.reason for result in found.results)
