"""Three tiny tasks for the tests of the course's machinery: a function, a function built on it, and a value."""

import numpy as np

from qlearn.course.tasks import Case, Mutant, Task


def scale(x, bits):
    if bits < 2:
        raise ValueError(f"{bits} bits are too few")
    return np.abs(x).max() / (2 ** (bits - 1) - 1)


def codes(x, bits):
    return np.round(x / scale(x, bits)).astype(np.int8)


def _cases():
    random = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    return [
        Case("by hand", (np.array([0.9, -0.31, 0.14, -0.02, 0.6]), 3)),
        Case("random", (random, 8)),
        Case("all negative", (-np.abs(random), 4)),
        Case("ties", (np.array([0.5, 1.5, 2.5, 7.0]), 4)),
    ]


def _scale_cases():
    return [*_cases(), Case("one bit", (np.ones(3), 1))]


def _unchecked(divisor):
    return lambda x, bits: np.abs(x).max() / divisor(bits)


TASKS = (
    Task(
        name="grid.scale",
        title="The distance between two rulings",
        points=3,
        minutes=5,
        difficulty=2,
        importance=5,
        reference=scale,
        cases=_scale_cases,
        hints=("Which code should the largest magnitude get?", "Divide the largest magnitude by 2**(bits - 1) - 1."),
        mutants=(
            Mutant("all codes", _unchecked(lambda bits: 2**bits - 1), "This is what you get with 2**bits - 1."),
            Mutant(
                "one too many", _unchecked(lambda bits: 2 ** (bits - 1)), "This is what you get with 2**(bits - 1)."
            ),
            Mutant(
                "no magnitude", lambda x, bits: x.max() / (2 ** (bits - 1) - 1), "This is x.max() for abs(x).max()."
            ),
            Mutant("zero", lambda x, bits: 0.0, "This is zero whatever the input."),
            Mutant("one bit accepted", _unchecked(lambda bits: max(2 ** (bits - 1) - 1, 1)), "One bit has no ruling."),
        ),
    ),
    Task(
        name="grid.codes",
        title="The nearest ruling",
        points=2,
        minutes=5,
        difficulty=1,
        importance=4,
        reference=codes,
        cases=_cases,
        hints=("Which integer is nearest?", "Round x / scale."),
        mutants=(
            Mutant(
                "floor", lambda x, bits: np.floor(x / scale(x, bits)).astype(int), "This is floor instead of round."
            ),
            Mutant("ceil", lambda x, bits: np.ceil(x / scale(x, bits)).astype(int), "This is ceil instead of round."),
            Mutant(
                "trunc", lambda x, bits: np.trunc(x / scale(x, bits)).astype(int), "This is a cast without rounding."
            ),
            Mutant("zeros", lambda x, bits: np.zeros(x.shape, int), "These are zeros."),
            Mutant("half up", lambda x, bits: np.floor(x / scale(x, bits) + 0.5).astype(int), "Ties go up here."),
        ),
    ),
    Task(
        name="grid.levels",
        title="How many rulings",
        points=1,
        minutes=1,
        difficulty=1,
        importance=2,
        reference=15,
        hints=("Count from -7 to 7.", "Zero counts too."),
        mutants=tuple(
            Mutant(str(wrong), wrong, f"{wrong} is wrong: {why}.")
            for wrong, why in ((16, "one code is unused"), (14, "zero counts"), (7, "negative"), (8, "no"), (4, "bits"))
        ),
    ),
)
