"""What an exercise asks for, and the registry that finds every task of the course.

A **task** is one function (or one value) for the learner to write. It carries the right answer, the package's own
function, and the **cases** on which an answer is compared with it: random ones, and the edges where mistakes live
(zeros, a constant, one outlier, −0.0, odd sizes). It also carries its **mutants**: wrong answers that people really
write, each with the sentence that explains it. A mutant does two jobs. In the tests it proves that the cases are
sharp, because every mutant has to be rejected. In a notebook it recognises the learner's mistake, because an answer
that gives the same wrong numbers was wrong in the same way.

One module per exercise notebook, named like the notebook without its number: `exercises/02_absmax.ipynb` has
`tasks/absmax.py`. The module defines `TASKS`, a tuple of Task in the notebook's order, whose names begin with the
module's: "absmax.quantize". Nothing else needs to be registered. A module is imported when one of its tasks is asked
for.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call on which an answer and the reference must agree.

    name: what is special about it, in a few words ("one outlier").  args, kwargs: what the function is called with;
    both the reference and the answer get copies of their own.
    """

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Mutant:
    """A plausible wrong answer.

    name: a few words ("floor for round").  function: the wrong function, or the wrong value.  explanation: a whole
    sentence that tells the learner which mistake this is, such as "This is what you get when the scale divides by
    2**bits: ...".
    """

    name: str
    function: Any
    explanation: str


@dataclass(frozen=True, eq=False)
class Task:
    """One answer that an exercise asks for.

    name: "notebook.task".  title: a few words.  points, minutes: whole numbers.  difficulty, importance: 1 to 5.
    reference: the right function, or the right value. cases: a function without arguments that returns the cases (a
    reference that is a value has none). hints: two sentences, the second more direct.  mutants: five at least.
    tolerance: how far a float may be from the reference's, as a fraction of it, plus the rounding of the array's
    largest value to float32; 0 asks for the same bits, signed zeros included.  any_array: accept NumPy for torch, and
    torch for NumPy.  same_dtype: an array has to have the reference's dtype.
    Raises ValueError when a field does not fit this description.
    """

    name: str
    title: str
    points: int
    minutes: int
    difficulty: int
    importance: int
    reference: Any
    hints: tuple[str, str]
    mutants: tuple[Mutant, ...]
    cases: Callable[[], list[Case]] | None = None
    tolerance: float = 1e-6
    any_array: bool = False
    same_dtype: bool = False

    def __post_init__(self):
        for wrong, remedy in (
            (self.name.count(".") != 1, "a name of the form notebook.task"),
            (self.points < 1 or self.minutes < 1, "at least one point and one minute"),
            (
                not 1 <= self.difficulty <= 5 or not 1 <= self.importance <= 5,
                "a difficulty and an importance from 1 to 5",
            ),
            (len(self.hints) != 2, "two hints"),
            (len({mutant.name for mutant in self.mutants}) < 5, "five mutants with different names"),
            (
                callable(self.reference) != callable(self.cases),
                "cases if its reference is a function, and none if it is a value",
            ),
        ):
            if wrong:
                raise ValueError(f"task {self.name!r} needs {remedy}")

    def all_cases(self):
        """The cases as a list; a task whose answer is a value has one, without arguments."""
        return list(self.cases()) if self.cases else [Case("the value")]

    def card(self):
        """What the learner sees before starting, as markdown: title, difficulty, importance, time and points."""
        return (
            f"## {self.title}\n\n> Difficulty {_dots(self.difficulty)} · Importance {_dots(self.importance)} · "
            f"about {count(self.minutes, 'minute')} · {count(self.points, 'point')} · `{self.name}`"
        )


def _dots(level):
    return "●" * level + "○" * (5 - level)


def count(number, noun):
    """A number with its noun: count(1, "point") is "1 point", count(3, "point") is "3 points"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Registry(Mapping):
    """Tasks by name, found in the modules of this folder and imported one notebook at a time.

    >>> "nobody.knows" in TASKS
    False
    """

    def notebooks(self):
        """The names of the modules, sorted: one per exercise notebook."""
        return sorted(module.name for module in pkgutil.iter_modules(__path__))

    def of(self, notebook):
        """The tasks of one notebook, in its order.  Raises KeyError when there is no module of that name."""
        if notebook not in self.notebooks():
            raise KeyError(notebook)
        return importlib.import_module(f"{__name__}.{notebook}").TASKS

    def __getitem__(self, name):
        for task in self.of(str(name).partition(".")[0]):
            if task.name == name:
                return task
        raise KeyError(name)

    def __iter__(self):
        return (task.name for notebook in self.notebooks() for task in self.of(notebook))

    def __len__(self):
        return sum(1 for _ in self)


TASKS = Registry()


def get(name):
    """The task of that name.

    Raises ValueError, with the names there are, when there is none.
    """
    if name in TASKS:
        return TASKS[name]
    notebook = str(name).partition(".")[0]
    if notebook in TASKS.notebooks():
        raise ValueError(
            f"there is no task called {name!r}: there are {', '.join(task.name for task in TASKS.of(notebook))}"
        )
    raise ValueError(f"there is no task called {name!r}: its name begins with one of {', '.join(TASKS.notebooks())}")
