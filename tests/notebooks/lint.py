"""What makes a notebook readable and checkable, as functions that return sentences about what is wrong.

A lesson reads in small steps: short cells, little prose between them. nbval has traps that let a cell pass without
being compared (a count that is missing, an output that was never stored, a magic that does not exist), and a file
that was run carries things that nobody wants to see: errors, dead widgets, paths of somebody's machine.
"""

import re
import statistics
import sys
from pathlib import Path

from qlearn.course import cells, places

MOST_LINES, MEDIAN_LINES, MOST_WORDS = 30, 8, 120
MAGICS = {"%time", "%%time", "%timeit", "%%timeit", "%matplotlib"}
MACHINE = [str(places.PACKAGE.parent), sys.prefix, str(Path.home()), "/home/", "/Users/", "/tmp/", "C:\\"]
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)")


def short_cells(notebook):
    """No code cell above MOST_LINES lines that are not blank, and half of them at MEDIAN_LINES or fewer."""
    lengths = {cell.id: sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code(notebook)}
    found = [f"{name} has {length} lines" for name, length in lengths.items() if length > MOST_LINES]
    median = statistics.median(lengths.values()) if lengths else 0
    return found + ([f"the median cell has {median:g} lines"] if median > MEDIAN_LINES else [])


def little_prose(notebook):
    """At most MOST_WORDS words from one code cell to the next; a task's card is no prose."""
    found, words = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if words > MOST_WORDS:
                found.append(f"{words} words above {cell.id}")
            words = 0
        else:
            words += len(re.findall(r"\S*\w\S*", _own_words(cell)))
    return found


def compared_outputs(notebook):
    """A cell that nbval shall compare has a count and something printed to compare with."""
    compared = [cell for cell in code(notebook) if "nbval-check-output" in cells.tags(cell)]
    return [
        f"{cell.id} has no stored text" for cell in compared if cell.execution_count is None or not any(texts(cell))
    ]


def executed(notebook):
    """The cells were run once, in order, none of them with an error."""
    counts = [cell.execution_count for cell in code(notebook)]
    found = [] if counts == list(range(1, len(counts) + 1)) else [f"its cells were run as {counts}"]
    errors = [cell.id for cell in code(notebook) if any(output.output_type == "error" for output in cell.outputs)]
    return found + [f"{name} ended with an error" for name in errors]


def unexecuted(notebook):
    """Nothing is stored: an exercise that ships with outputs looks as if it were solved."""
    return [f"{cell.id} was run" for cell in code(notebook) if cell.outputs or cell.execution_count is not None]


def no_dead_widgets(notebook):
    """No live view, and no state of widgets."""
    kind = "application/vnd.jupyter.widget-view+json"
    found = [cell.id for cell in code(notebook) if any(kind in output.get("data", {}) for output in cell.outputs)]
    return [f"{name} has a widget's live view" for name in found] + ["it stores widgets"] * (
        "widgets" in notebook.metadata
    )


def no_machine(notebook):
    """No path of the machine that it was made on."""
    found = []
    for cell in notebook.cells:
        for text in (cell.source, *(texts(cell) if cell.cell_type == "code" else ())):
            found += [f"{cell.id} names {path}" for path in MACHINE if path in text]
    return found


def links(notebook, folder):
    """Every relative link leads to a file.  folder: where the notebook lies."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        targets = (a or b for a, b in _LINK.findall(cell.source))
        relative = (target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target))
        found += [f"{cell.id} links to {target}" for target in relative if target and not (folder / target).exists()]
    return found


def known_magics(notebook):
    """nbval passes a cell whose magic does not exist, without running the rest of it; and no shell commands."""
    found = []
    for cell in code(notebook):
        for line in cell.source.splitlines():
            word = line.strip().partition(" ")[0]
            if word.startswith(("%", "!")) and word not in MAGICS:
                found.append(f"{cell.id} uses {word}")
    return found


def code(notebook):
    return cells.code_cells(notebook)


def texts(cell):
    """Everything in the outputs of a cell that can be read as text."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield content if isinstance(content, str) else "".join(content)


def _own_words(cell):
    """The text of a markdown cell without the card that the build has put above it."""
    if "card" not in cells.about(cell):
        return cell.source
    return "\n\n".join(cell.source.split("\n\n")[2:])
