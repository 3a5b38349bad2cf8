"""Build the notebooks of the course from their sources.

    lessons/source/NN_name.py    ->  lessons/NN_name.ipynb                                executed
    solutions/source/NN_name.py  ->  solutions/NN_name.ipynb, exercises/NN_name.ipynb     executed; stubs, no outputs

Solution and exercise come from one source and cannot drift apart. `stale` compares the notebooks in the repository with
what their sources would give, without executing anything: a change in one without the other is found in a second. That
the stored outputs are right is nbval's matter, which runs the notebooks.
"""

import time

from qlearn.course import cells, places
from qlearn.course.execute import execute
from qlearn.course.source import read


def sources(root, names=()):
    """The scripts to build, as (kind, path) with kind "lesson" or "solution", in order.

    root: folder with lessons/ and solutions/.  names: which, such as "02_absmax" or "02"; all when empty.
    Raises ValueError for a name that no source has.
    """
    found = [
        (kind, path) for kind in ("lesson", "solution") for path in sorted((root / f"{kind}s/source").glob("*.py"))
    ]
    for name in names:
        if not any(path.stem.startswith(name) for _, path in found):
            known = ", ".join(sorted({path.stem for _, path in found})) or "none yet"
            raise ValueError(f"there is no source called {name!r}; there are: {known}")
    return [(kind, path) for kind, path in found if not names or path.stem.startswith(tuple(names))]


def build(root=None, names=(), say=print):
    """Execute the sources and write their notebooks; a notebook is replaced only when all of it worked.

    root: of the repository, this one by default.  names: which; all when empty.  say: called with a line per notebook.
    """
    root = root or places.course_root()
    for kind, path in sources(root, names):
        began = time.perf_counter()
        notebook = read(path, kind)
        execute(notebook, path.parent.parent)
        texts = {target: cells.write_text(made) for target, made in _targets(root, notebook).items()}
        for target, text in texts.items():
            target.parent.mkdir(exist_ok=True)
            places.write_atomically(target, text)
        say(f"{', '.join(_relative(target, root) for target in texts)}  ({time.perf_counter() - began:.1f} s)")


def stale(root=None, names=()):
    """What a build would change, outputs aside.

    Returns a list of sentences, empty when every notebook in the repository is the one its source gives.
    """
    root, found, expected = root or places.course_root(), [], set()
    for kind, path in sources(root, names):
        for target, notebook in _targets(root, read(path, kind)).items():
            expected.add(target)
            found += [f"{_relative(target, root)}: {reason}" for reason in _compare(target, notebook)]
    if not names:
        there = {path for folder in ("lessons", "solutions", "exercises") for path in (root / folder).glob("*.ipynb")}
        found += [f"{_relative(path, root)}: has no source" for path in sorted(there - expected)]
    return found


def _targets(root, notebook):
    """The notebooks that one source gives, by the path they belong to."""
    known = notebook.metadata["qlearn"]
    name = f"{known['notebook']}.ipynb"
    if known["kind"] == "lesson":
        return {root / "lessons" / name: notebook}
    return {root / "solutions" / name: notebook, root / "exercises" / name: cells.to_exercise(notebook)}


def _compare(target, generated):
    if not target.exists():
        return ["is missing"]
    there = cells.read_notebook(target)
    if there.metadata != generated.metadata:
        return ["its metadata differ from the generated ones"]
    if len(there.cells) != len(generated.cells):
        return [f"has {len(there.cells)} cells, its source gives {len(generated.cells)}"]
    reasons = []
    for ours, theirs in zip(generated.cells, there.cells, strict=True):
        if any(ours.get(field) != theirs.get(field) for field in ("id", "cell_type", "source", "metadata")):
            reasons.append(f"cell {theirs.get('id')} differs from the generated {ours['id']}")
    if generated.metadata["qlearn"]["kind"] == "exercise":
        reasons += [f"cell {cell['id']} has outputs" for cell in cells.code_cells(there) if cell.outputs]
    return reasons


def _relative(path, root):
    return path.relative_to(root).as_posix()
