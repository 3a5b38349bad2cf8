r"""A task that the bundled model cannot do: to write the line of Python that a sentence asks for.

The bundled model continues Python files. It has seen many comments, but few that say exactly what the next line does.
So to a sentence it answers with some plausible line, and of a hundred answers none is right. This module makes
sentences and lines to fine-tune it with:

    # the squares of all prices above 3, in descending order
    sorted([price ** 2 for price in prices if price > 3], reverse=True)

Every pair is put together from parts: a variable, a condition, what becomes of each element, and what becomes of the
whole. A part can be said in several ways, and is written in one, so that there is a single right answer, and an answer
can be compared character by character.

**Held out** are combinations: a tenth of all (condition, element, whole) never occur in training. So right answers to
held-out sentences are put together, not remembered. Names, numbers and letters are drawn anew for every pair.

Nothing is downloaded, all is made from the tables below, and the same seed gives the same pairs.
"""

import hashlib
import random
from dataclasses import dataclass

HELD_OUT_SHARE = 10  # one combination in so many
# Variables, plural and singular, by what is in them.
NAMES = {
    "numbers": "prices scores ages weights counts totals rates heights costs marks sizes points values numbers",
    "texts": "words names lines titles labels tags keys colors texts paths parts tokens codes notes",
    "records": "users orders books cars rooms games files teams rows events items pages jobs tasks",
}
FIELDS = "name price age size year width level score date owner status title"
LETTERS = "abcdefghmnprstwx"

# Each part: how it can be said, and how it is written. {x} is the element, {xs} the variable, {n}, {m}, {f} and {h} are
# numbers, {s} letters, {i}, {j} and {k} fields. Elements also say of what kind the result is, wholes what they take.
CONDITIONS = {
    "numbers": {
        "": ([""], None),
        "above": (["above {n}", "greater than {n}", "over {n}"], "{x} > {n}"),
        "below": (["below {n}", "less than {n}", "under {n}"], "{x} < {n}"),
        "least": (["of at least {n}", "not below {n}"], "{x} >= {n}"),
        "most": (["of at most {n}", "not above {n}"], "{x} <= {n}"),
        "not": (["other than {n}", "except {n}"], "{x} != {n}"),
        "between": (["between {n} and {m}"], "{n} < {x} < {m}"),
        "even": (["that are even", "divisible by 2"], "{x} % 2 == 0"),
        "divisible": (["divisible by {n}"], "{x} % {n} == 0"),
    },
    "texts": {
        "": ([""], None),
        "starts": (['that start with "{s}"', 'with "{s}" at the start'], '{x}.startswith("{s}")'),
        "ends": (['that end with "{s}"', 'with "{s}" at the end'], '{x}.endswith("{s}")'),
        "contains": (['that contain "{s}"', 'with "{s}" in them'], '"{s}" in {x}'),
        "lacks": (['without "{s}"', 'that do not contain "{s}"'], '"{s}" not in {x}'),
        "longer": (["longer than {n}", "of more than {n} characters"], "len({x}) > {n}"),
        "shorter": (["shorter than {n}", "of fewer than {n} characters"], "len({x}) < {n}"),
        "upper": (["in upper case"], "{x}.isupper()"),
        "digits": (["made of digits"], "{x}.isdigit()"),
    },
    "records": {
        "": ([""], None),
        "above": (["with {k} above {n}", "whose {k} is greater than {n}"], '{x}["{k}"] > {n}'),
        "below": (["with {k} below {n}", "whose {k} is less than {n}"], '{x}["{k}"] < {n}'),
        "is": (['with "{s}" as {k}', 'whose {k} is "{s}"'], '{x}["{k}"] == "{s}"'),
        "has": (["that have {k}", "with any {k}"], '"{k}" in {x}'),
        "lacks": (["that have no {k}", "without {k}"], '"{k}" not in {x}'),
    },
}
ELEMENTS = {
    "numbers": {
        "": (["all {xs}"], "{x}", "numbers"),
        "square": (["the squares of all {xs}", "all {xs}, each squared"], "{x} ** 2", "numbers"),
        "half": (["half of all {xs}", "all {xs}, each divided by 2"], "{x} / 2", "numbers"),
        "times": (["{f} times all {xs}", "all {xs}, each multiplied by {f}"], "{x} * {f}", "numbers"),
        "plus": (["{f} more than all {xs}", "all {xs}, each increased by {f}"], "{x} + {f}", "numbers"),
        "abs": (["the absolute values of all {xs}", "all {xs}, without their signs"], "abs({x})", "numbers"),
        "round": (["all {xs}, each rounded", "the rounded values of all {xs}"], "round({x})", "numbers"),
        "str": (["the strings of all {xs}", "all {xs}, as strings"], "str({x})", "texts"),
    },
    "texts": {
        "": (["all {xs}"], "{x}", "texts"),
        "len": (["the lengths of all {xs}", "the number of characters of all {xs}"], "len({x})", "numbers"),
        "upper": (["the capitals of all {xs}", "all {xs}, written in capitals"], "{x}.upper()", "texts"),
        "lower": (["the small letters of all {xs}", "all {xs}, written in small letters"], "{x}.lower()", "texts"),
        "strip": (["all {xs}, each stripped", "the stripped form of all {xs}"], "{x}.strip()", "texts"),
        "first": (["the first letters of all {xs}", "the beginnings of all {xs}"], "{x}[0]", "texts"),
        "last": (["the last letters of all {xs}", "the ends of all {xs}"], "{x}[-1]", "texts"),
        "int": (["the integers of all {xs}", "all {xs}, as integers"], "int({x})", "numbers"),
    },
    "records": {
        "": (["all {xs}"], "{x}", "records"),
        "field": (["the {j} of all {xs}", "all {xs}, the {j} of each"], '{x}["{j}"]', "values"),
        "pair": (
            ["the {j} and {i} of all {xs}", "all {xs}, {j} and {i} of each"],
            '({x}["{j}"], {x}["{i}"])',
            "values",
        ),
    },
}
WHOLES = {
    "list": ([""], "[{each}]", ("numbers", "texts", "records", "values")),
    "sorted": ([", in order", ", sorted"], "sorted([{each}])", ("numbers", "texts", "values")),
    "down": ([", in descending order", ", largest first"], "sorted([{each}], reverse=True)", ("numbers", "values")),
    "set": ([", each once", ", without duplicates"], "set({each})", ("numbers", "texts", "values")),
    "sum": ([", added up", ", in total"], "sum({each})", ("numbers",)),
    "max": ([", only the largest"], "max({each})", ("numbers",)),
    "min": ([", only the smallest"], "min({each})", ("numbers",)),
    "count": ([", counted", ", how many there are"], "len([{each}])", ("numbers", "texts", "records", "values")),
    "join": ([", joined by commas"], '", ".join({each})', ("texts",)),
    "longest": ([", the longest one"], "max([{each}], key=len)", ("texts",)),
    "head": ([", the first {h}", ", only the first {h}"], "[{each}][:{h}]", ("numbers", "texts", "records", "values")),
    "tail": ([", the last {h}", ", only the last {h}"], "[{each}][-{h}:]", ("numbers", "texts", "records", "values")),
}


@dataclass(frozen=True)
class Pair:
    """A sentence and the line it asks for; `combination` names the parts it is made of."""

    sentence: str
    code: str
    combination: tuple[str, str, str, str]

    @property
    def prompt(self):
        """What the model is given: a comment, without a newline at its end."""
        return f"# {self.sentence}"

    @property
    def answer(self):
        """What the model should continue with."""
        return f"\n{self.code}"


def pairs(count, held_out=False, seed=0):
    """Pairs of a sentence and its line, all different.

    count: how many.  held_out: of the combinations that training never sees, or of all others.
    Returns a list of Pair. Raises ValueError for a count below 1.

    >>> for pair in pairs(2):
    ...     print(pair.prompt + pair.answer)
    # the last letters of all codes that end with "xp", only the first 6
    [code[-1] for code in codes if code.endswith("xp")][:6]
    # all values not above 5, each squared, only the smallest
    min(value ** 2 for value in values if value <= 5)
    """
    if count < 1:
        raise ValueError(f"count={count} asks for no pairs; give at least 1")
    choices = [c for c in combinations() if is_held_out(c) is held_out]
    generator, found = random.Random(2 * seed + held_out), {}
    while len(found) < count:
        pair = _compose(generator.choice(choices), generator)
        found.setdefault(pair.sentence, pair)
    return list(found.values())


def combinations():
    """All (kind of variable, condition, element, whole) that make sense and say more than the variable's name."""
    return [
        (kind, condition, element, whole)
        for kind in NAMES
        for condition in CONDITIONS[kind]
        for element, (_, _, result) in ELEMENTS[kind].items()
        for whole, (_, _, takes) in WHOLES.items()
        if result in takes and (condition or element)
    ]


def is_held_out(combination):
    """Whether training never sees a combination; decided by its name, so that it is the same everywhere.

    >>> sum(map(is_held_out, combinations())), len(combinations())
    (141, 1400)
    """
    digest = hashlib.sha256("/".join(combination).encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def _compose(combination, generator):
    """A pair of the given parts, with a variable, numbers and letters at random."""
    kind, condition, element, whole = combination
    draw = generator.choice
    xs = draw(NAMES[kind].split())
    n = draw(range(2, 30))
    j, i, k = generator.sample(FIELDS.split(), 3)
    values = {
        "xs": xs, "x": xs.removesuffix("s"), "n": n, "m": n + draw(range(2, 30)), "f": draw(range(2, 20)),
        "h": draw(range(2, 10)), "s": draw(LETTERS) + draw(["", *LETTERS]), "k": k, "j": j, "i": i,
    }  # fmt: skip
    said, test = CONDITIONS[kind][condition]
    element_said, each, _ = ELEMENTS[kind][element]
    whole_said, written, _ = WHOLES[whole]
    condition_said = draw(said)
    element_said = draw(element_said).replace("{xs}", f"{{xs}} {condition_said}" if test else "{xs}")
    loop = each + " for {x} in {xs}" + (f" if {test}" if test else "")
    sentence = (element_said + draw(whole_said)).format(**values)
    return Pair(sentence, written.replace("{each}", loop).format(**values), combination)
