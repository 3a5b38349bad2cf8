"""Imports go down the floors of the house only, wherever in a file they stand.

A module may import from its own folder and from folders on lower floors. Imports inside functions count too, and so
do modules that are named in a call of `import_module`. The top of the package, `qlearn/__init__.py`, loads everything
lazily and belongs to no floor.
"""

import ast
from pathlib import Path

import pytest

import qlearn

PACKAGE = Path(qlearn.__file__).parent
FLOORS = (
    {"formats"},
    {"scales", "rotation"},
    {"tensor"},
    {"kernels"},
    {"methods", "evaluate"},
    {"models"},
    {"training", "export"},
    {"course", "bench"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS, 1) for name in names}
EXPORTS = {name: home.partition(".")[2].partition(".")[0] for name, home in qlearn._HOME.items()}


def imported(tree, module):
    """Dotted names of everything that a module imports, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            parent = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{parent}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            target = node.args[0]
            parts = target.values if isinstance(target, ast.JoinedStr) else [target]
            if isinstance(parts[0], ast.Constant) and isinstance(parts[0].value, str):
                yield parts[0].value


def folder_of(name):
    """The folder (or module) of the package that a dotted name belongs to: "qlearn.methods.affine" -> "methods"."""
    parts = name.split(".")
    if parts[0] != "qlearn":
        return None
    return EXPORTS.get(parts[1], parts[1]) if len(parts) > 1 else "everything"


def upward(source, module):
    """Sentences about the imports of a module that do not go down."""
    own = folder_of(module)
    for name in imported(ast.parse(source), module):
        other = folder_of(name)
        if other is None or other == own or name == "qlearn.__version__":
            continue
        if other == "everything" and FLOOR[own] >= FLOOR["course"]:
            continue
        if FLOOR.get(other, len(FLOORS) + 1) >= FLOOR[own]:
            yield f"{module} (floor {FLOOR[own]}) imports {name} (floor {FLOOR.get(other, 'none')})"


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def dotted(path):
    parts = ["qlearn", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts)


def test_every_folder_has_a_floor():
    assert {folder_of(dotted(path)) for path in modules()} <= FLOOR.keys()


def test_imports_go_down_the_floors():
    found = [line for path in modules() for line in upward(path.read_text(encoding="utf-8"), dotted(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qlearn.formats.floats", "from qlearn.tensor import QuantizedTensor"),
        ("qlearn.formats.floats", "def f():\n    import qlearn.methods"),
        ("qlearn.formats.floats", "from ..methods import affine"),
        ("qlearn.formats.floats", "import qlearn"),
        ("qlearn.tensor", "from qlearn import quantize"),
        ("qlearn.methods.affine", "from qlearn.evaluate import perplexity"),
        ("qlearn.models.load", "importlib.import_module('qlearn.course.board')"),
        ("qlearn.models.load", "importlib.import_module(f'qlearn.course.{name}')"),
        ("qlearn.course.check", "from qlearn.bench import peers"),
        ("qlearn.models.load", "from qlearn.nowhere import x"),
    ],
)
def test_an_import_that_goes_up_is_found(module, source):
    assert len(list(upward(source, module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qlearn.methods.affine", "from qlearn.formats.integers import pack\nfrom . import blocking\nimport torch"),
        ("qlearn.formats.floats", "from .arrays import x\nfrom qlearn.formats import integers"),
        ("qlearn.course.tasks.absmax", "from qlearn import methods, quantize\nimport qlearn"),
        ("qlearn.training.pretrain", "from qlearn import __version__"),
    ],
)
def test_an_import_that_goes_down_is_not(module, source):
    assert not list(upward(source, module))
