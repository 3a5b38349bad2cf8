"""The task: deterministic, valid Python, one right answer to a sentence, and nothing held out is seen in training."""

import ast
import hashlib
import random

import pytest

from qlearn import load_model
from qlearn.training import adapters_task
from qlearn.training.adapters_task import combinations, is_held_out, pairs

SAMPLES = {
    "numbers": [5, -3, 12, 3, 3, 28.5],
    "texts": ["12", "7", "340"],
    "records": [dict.fromkeys(adapters_task.FIELDS.split(), value) for value in (3, 30, 7)],
}


def test_the_same_everywhere():
    """The hash of some pairs: whoever trains on `pairs(1000)` trains on these."""
    text = "".join(p.prompt + p.answer for held_out in (False, True) for p in pairs(1000, held_out))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f82cc96fcf648ec5"


def test_seeds_and_counts():
    assert pairs(20) == pairs(30)[:20] and len({p.sentence for p in pairs(2000)}) == 2000
    assert pairs(20) != pairs(20, seed=1) and pairs(20) != pairs(20, held_out=True)
    with pytest.raises(ValueError, match="count=0 asks for no pairs"):
        pairs(0)


def test_held_out_combinations_are_not_trained():
    trained, held_out = (pairs(4000, side) for side in (False, True))
    assert not {p.combination for p in trained} & {p.combination for p in held_out}
    assert not {p.sentence for p in trained} & {p.sentence for p in held_out}
    assert not {p.code for p in trained} & {p.code for p in held_out}
    assert {c for c in combinations() if is_held_out(c)} == {p.combination for p in held_out}


def test_every_part_of_the_held_out_ones_is_trained():
    """Otherwise the answers could not be known."""
    parts = lambda side: {(c[0], i, c[i]) for c in combinations() if is_held_out(c) is side for i in (1, 2, 3)}  # noqa: E731
    assert parts(True) <= parts(False)
    assert {c[0] for c in combinations() if is_held_out(c)} == set(adapters_task.NAMES)


@pytest.mark.parametrize("kind", SAMPLES)
def test_each_line_is_python_that_runs(kind):
    """On a list of its kind, with one variable that is not Python's own."""
    generator, names = random.Random(0), adapters_task.NAMES[kind].split()
    for combination in [c for c in combinations() if c[0] == kind]:
        pair = adapters_task._compose(combination, generator)
        used = {node.id for node in ast.walk(ast.parse(pair.code, mode="eval")) if isinstance(node, ast.Name)}
        (name,) = used.intersection(names)
        assert f"all {name}" in pair.sentence and not set("{}\n").intersection(pair.sentence)
        try:
            eval(compile(pair.code, "<line>", "eval"), {name: SAMPLES[kind]})
        except ValueError as error:
            assert "empty" in str(error)  # the largest of nothing


def test_no_sentence_has_two_answers():
    generator, answers = random.Random(1), {}
    every = combinations()
    for _ in range(30_000):
        pair = adapters_task._compose(generator.choice(every), generator)
        assert answers.setdefault(pair.sentence, pair.code) == pair.code


def test_the_tokenizer_gives_the_text_back():
    _, tokenizer = load_model()
    for pair in pairs(200):
        ids = [i for part in (pair.prompt, pair.answer) for i in tokenizer(part, verbose=False)["input_ids"]]
        assert tokenizer.decode(ids) == pair.prompt + pair.answer
        assert ids == tokenizer(pair.prompt + pair.answer, verbose=False)["input_ids"]
