"""Showing the package's own code in a lesson, so that a reader sees that nothing is hidden."""

import inspect
import textwrap
from pathlib import Path


class source_of:
    """The source of a function or class, without its docstring, as a notebook shows it.

    >>> from qlearn.methods.affine import _round
    >>> print(source_of(_round))
    # qlearn/methods/affine.py
    def _round(blocks, scale):
        return (blocks / scale.float()[..., None]).round()
    """

    def __init__(self, function):
        function = inspect.unwrap(function)
        package = Path(__file__).parents[2]
        self.file = Path(inspect.getsourcefile(function)).relative_to(package).as_posix()
        self.source = _without_docstring(textwrap.dedent(inspect.getsource(function)), inspect.getdoc(function))

    def __repr__(self):
        return f"# {self.file}\n{self.source}"

    def _repr_markdown_(self):
        return f"```python\n{self}\n```"


def _without_docstring(source, docstring):
    """The lesson's prose says what the function does; what remains is how."""
    if not docstring:
        return source.rstrip()
    start = source.index('"""')
    end = source.index('"""', start + 3) + 3
    return source[:start].rstrip() + "\n" + source[end:].lstrip("\n").rstrip()
