"""Parse rate, on models whose every word is known."""

import ast
from types import SimpleNamespace

import pytest
import torch

from qlearn.evaluate import complete, evaluation_text, function_headers, parse_rate, parses
from qlearn.evaluate.parse import kept_body


class Scripted(torch.nn.Module):
    """A causal language model that continues each prompt with a fixed text and then ends."""

    def __init__(self, tokenizer, script):
        super().__init__()
        self.tokenizer, self.script = tokenizer, script
        self.register_parameter("somewhere", torch.nn.Parameter(torch.zeros(1)))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=1000))

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **greedy):
        assert greedy == {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert (ids[mask == 0] == pad_token_id).all()
            prompt = self.tokenizer.decode(ids[mask == 1])
            rows.append([*self.tokenizer(self.script[prompt])["input_ids"][:max_new_tokens], 0])
        longest = max(map(len, rows))
        rows = [row + [pad_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


HEADER = 'def double(x):\n    """Twice x."""'


@pytest.mark.parametrize(
    "completion, valid",
    [
        ("    return 2 * x\n", True),
        ("    return 2 * x\n\n\ndef broken(:\n", True),  # the function was over before
        ("    return 2 * x\n    y = (", True),  # cut off by the limit in its last line
        ("    if x:\n        return 0\n\n    # so far so good\n    return 2 * x\n", True),
        ("    y = 2 * x\n    return max(\n        y,\n", True),  # cut off in its last statement
        ("    if x:\n        return 0\n    elif y:\n", True),
        ("    y = 2\n    try:\n        y = x\n", True),
        ('    y = 2\n    z = """\n', True),
        ("    return (2 * x\n\n\n", False),  # nothing but an unfinished statement
        (
            "    y = 2\n    return max(\n        y,\ndef g():\n",
            False,
        ),  # the bracket was still open when the function was over
        ("    y = 2\n    return x)\n", False),
        ("    y = 2\n    return max(x]\n", False),
        ("    y = 2\n  return y\n", False),
        ("    y = = 2\n    return max(\n", False),  # a mistake before the cut
        ("    y = '\\d'\n", True),  # Python warns of the escape and accepts it
        ("    if x:\nreturn 0\n", False),  # `if` without a block
        ("    return 2 * x", False),  # the only line was not finished, so nothing is left
        ("", False),
        ("\n\n\n", False),
        ("    # later\n", False),  # parses, but holds no code
        ("class Next:\n    pass\n", False),  # the body is empty
        ("   return 2 * x\n", False),  # indented unlike the docstring
        ("    return 2 * x\x00\n", False),
    ],
)
def test_what_counts_as_valid(completion, valid):
    assert parses(HEADER, "\n" + completion) is valid


def test_a_header_without_docstring_needs_a_body_of_its_own():
    assert parses("def f(x):", "\n    return x\n")
    assert parses("def f(x):", " return x\n")  # what stands on the header's own line belongs to it
    assert not parses("def f(x):", "\n\nprint(1)\n")
    assert not parses("def f(x):", "")


def test_a_valid_body_stays_valid_whatever_follows_the_function():
    body = "    return 2 * x\n"
    assert kept_body("\n" + body + "\n\nimport os\n") == (["\n", body, "\n", "\n"], True)
    assert kept_body("\n" + body + "\n\nx") == (["\n", body, "\n", "\n"], True)


def test_parse_rate_counts(tokenizer):
    script = {
        "def a():": "\n    return 1\n",
        "def bcd():": "\n    return (]\n",
        "def ef(x, y):": "\n    return x\nx = ((\n",
        "def g():": "",
    }
    assert parse_rate(Scripted(tokenizer, script), tokenizer, list(script)) == 2 / 4


def test_parse_rate_cuts_at_the_limit(tokenizer):
    script = {"def a():": "\n    x = 1\n    y = (]\n"}
    assert parse_rate(Scripted(tokenizer, script), tokenizer, list(script), max_new_tokens=15) == 1.0
    assert parse_rate(Scripted(tokenizer, script), tokenizer, list(script), max_new_tokens=40) == 0.0


def test_completions_of_a_batch_are_those_of_each_prompt_alone(model, tokenizer):
    prompts = ["a", "def f(x):", "import "]
    together = complete(model, tokenizer, prompts, max_new_tokens=12)
    assert together == [complete(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]


def test_completions_are_greedy(model, tokenizer):
    ids = tokenizer("def f(x):")["input_ids"]
    for _ in range(8):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    expected = tokenizer.decode(ids[9:]).split("<|endoftext|>")[0]
    assert complete(model, tokenizer, ["def f(x):"], max_new_tokens=8) == [expected]


def test_headers_come_from_the_text_evenly_spaced():
    source = "".join(f'def f{i}(x):\n    """Number {i}."""\n    return {i}\n\n\n' for i in range(10))
    assert function_headers(source, count=3) == [f'def f{i}(x):\n    """Number {i}."""' for i in (0, 3, 6)]
    assert len(function_headers(source)) == 10


def test_headers_are_top_level_documented_and_not_too_long():
    source = (
        'class A:\n    def method(self):\n        """No."""\n        return 1\n'
        "def bare(x):\n    return x\n"
        'def long(x):\n    """' + "x" * 500 + '"""\n    return x\n'
        'def inline(x): "No."\n'
        '@decorated\ndef good(\n    x,\n):\n    """Yes.\n\n    Really.\n    """\n    return x\n'
    )
    assert function_headers(source) == ['def good(\n    x,\n):\n    """Yes.\n\n    Really.\n    """']


def test_headers_that_ship_are_many_and_each_needs_only_a_body():
    headers = function_headers()
    assert 40 <= len(headers) == len(set(headers))
    for header in headers:
        assert header in evaluation_text()
        (function,) = ast.parse(header).body
        assert len(function.body) == 1 and ast.get_docstring(function)
        assert parses(header, "\n    return None\n")


def test_bad_prompts_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="no prompt"):
        parse_rate(model, tokenizer, [])
    with pytest.raises(ValueError, match="has no tokens"):
        complete(model, tokenizer, ["a", ""], max_new_tokens=5)
    with pytest.raises(ValueError, match="a prompt of 20 tokens and max_new_tokens=13 exceed the 32 tokens"):
        complete(model, tokenizer, ["a" * 20], max_new_tokens=13)
    with pytest.raises(ValueError, match="no top-level function"):
        function_headers("x = 1\n")
