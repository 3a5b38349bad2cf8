"""Parse rate: does the model still write Python that Python accepts?

Perplexity is an average over single tokens. Code is less forgiving: one wrong bracket and nothing runs. So the model
is given the header of a function, its signature and docstring, completes it greedily, and the parser of the standard
library has the last word.

What exactly is parsed: the prompt, followed by the lines of the completion
    up to, and without, the first line that starts in column 0 (the function is over there);
    if there is none, the length limit cut the function off, and the last line, when no newline ends it, is dropped;
    if what remains is the beginning of valid Python but ends inside a statement (`codeop` of the standard library
    tells "incomplete" from "wrong"), that statement is dropped as well.
A completion counts when `ast.parse` accepts that, and when what was kept holds at least one line of code: neither
blank nor a comment. A mistake is never dropped: a bracket that closes nothing, or an indent that fits no block, is
wrong, not incomplete.

A prompt ends with the last character of the header, without the newline. Tokenizers join white space with what
follows it: to a model that knows "newline and three spaces" as one token, a newline alone says that the next line is
not indented.

The prompts are the top-level functions with a docstring in the evaluation text, evenly spaced, so the rate is a
multiple of one part in their number, and a difference of a few per cent between two models is a matter of one or two
functions.
"""

import ast
import codeop
import warnings

from qlearn.evaluate.completions import complete
from qlearn.evaluate.texts import evaluation_text


def parse_rate(model, tokenizer, prompts=None, max_new_tokens=96):
    """Share of function headers, 0 to 1, whose greedy completion is valid Python.

    prompts: list of str, each a header without a newline at its end; None takes `function_headers()`.
    max_new_tokens: length limit of a completion.  Raises ValueError for an empty list, and as `complete` does.
    """
    prompts = function_headers() if prompts is None else prompts
    completions = complete(model, tokenizer, prompts, max_new_tokens)
    return sum(map(parses, prompts, completions)) / len(prompts)


def parses(prompt, completion):
    r"""Whether a header and its completion, cut as described above, are valid Python.

    >>> parses("def f(x):", "\n    return (x))\n"), parses("def f(x):", "\n    return x\ny = ((")
    (False, True)
    """
    body, over = kept_body(completion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dubious escape in a string is valid Python
        if not over and _is_unfinished(prompt + "".join(body)):
            while body and not _is_valid(prompt + "".join(body)):
                body.pop()
        code = any(line.strip() and not line.strip().startswith("#") for line in body)
        return code and _is_valid(prompt + "".join(body))


def kept_body(completion):
    r"""The whole lines of a completion that belong to the function, and whether it is over there.

    The first line is the rest of the header's own.

    >>> kept_body("\n    a = 1\n\ndef g():\n"), kept_body("\n    a = 1\n    b =")
    ((['\n', '    a = 1\n', '\n'], True), (['\n', '    a = 1\n'], False))
    """
    lines = completion.split("\n")
    for number, line in enumerate(lines):
        if number and line and not line[0].isspace():
            return [line + "\n" for line in lines[:number]], True
    return [line + "\n" for line in lines[:-1]], False


def _is_valid(source):
    """Whether the parser accepts a text."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of which ast.parse is documented to raise
        return False
    return True


def _is_unfinished(source):
    """Whether a text could become valid Python if it went on."""
    try:
        return codeop.compile_command(source, symbol="exec") is None
    except (SyntaxError, ValueError, OverflowError):
        return False


def function_headers(source=None, count=48, longest=400):
    r"""Signature and docstring of top-level functions, evenly spaced over a Python text.

    source: str; None takes the evaluation text.  count: at most so many.
    longest: leave out headers of more characters.
    Returns a list of str in the order of the text.  Raises ValueError when the text holds none.

    >>> function_headers('def f(x):\n    "Twice x."\n    return 2 * x\n')
    ['def f(x):\n    "Twice x."']
    """
    source = evaluation_text() if source is None else source
    lines = source.split("\n")
    headers = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.body[0].lineno > node.lineno:
            header = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
            if len(header) <= longest:
                headers.append(header)
    if not headers:
        raise ValueError("the text defines no top-level function with a docstring; pass prompts= instead")
    count = min(count, len(headers))
    return [headers[i * len(headers) // count] for i in range(count)]
