"""Hints: two for each task, one at a time, and after them the way to the solution.

How many were asked for is kept with the learner's progress, so that the second call gives the second hint, tomorrow
too.
"""

from qlearn.course import progress, tasks
from qlearn.course.catalogue import catalogue


def hint(name, number=None):
    """Print the next hint for a task: the first, then the second, then where its solution is.

    name: of the task, such as "absmax.quantize".  number: 1 or 2 shows that hint again.
    Raises ValueError for an unknown task or another number.
    """
    print(text(name, number))


def text(name, number=None):
    """What `hint` prints."""
    task = tasks.get(name)
    if number not in (None, 1, 2):
        raise ValueError(f"hint {number} does not exist: {name} has hints 1 and 2")
    number = number or progress.next_hint(name)
    if number <= 2:
        return f"Hint {number} of 2 for {name}: {task.hints[number - 1]}"
    where = next((notebook for notebook, points in catalogue().items() if name in points), None)
    place = f"solutions/{where}.ipynb, below the heading of the task" if where else "the text of its lesson"
    return f"There are no more hints for {name}. Its solution is in {place}."
