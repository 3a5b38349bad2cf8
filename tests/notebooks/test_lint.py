"""The notebooks of the course are readable and checkable; and each rule of lint.py finds what it is there for."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from qlearn.course import build, cells, places

from . import lint

ROOT = places.course_root()
PATHS = [path for folder in ("lessons", "solutions", "exercises") for path in sorted((ROOT / folder).glob("*.ipynb"))]
READABLE = (lint.short_cells, lint.little_prose, lint.no_dead_widgets, lint.no_machine, lint.known_magics)
CARRIED_OUT = (lint.executed, lint.compared_outputs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_notebook(path):
    notebook = cells.read_notebook(path)
    rules = (*READABLE, *((lint.unexecuted,) if path.parent.name == "exercises" else CARRIED_OUT))
    found = [sentence for rule in rules for sentence in rule(notebook)] + lint.links(notebook, path.parent)
    assert not found, "\n".join(found)


def test_the_committed_notebooks_are_the_generated_ones():
    assert build.stale() == []


def notebook(*made):
    for number, cell in enumerate(made):
        cell["id"] = f"c{number}"
    return new_notebook(cells=list(made))


def ran(source="1", outputs=(), count=1, tags=()):
    return new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)})


def text(words):
    return new_markdown_cell("word " * words)


PRINTED = new_output("stream", text="1\n")
ERROR = new_output("error", ename="ValueError", evalue="x", traceback=[])
VIEW = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "x"})
PICTURE = new_output("display_data", {"image/png": "aGk="})
CARD = new_markdown_cell("## T\n\n> " + "dot " * 200 + "\n\nshort", metadata={"qlearn": {"card": "a.b"}})


@pytest.mark.parametrize(
    ("rule", "good", "bad", "sentence"),
    [
        (lint.short_cells, notebook(ran("1\n\n" * 8)), notebook(ran("1\n" * 31), ran(), ran()), "c0 has 31 lines"),
        (
            lint.short_cells,
            notebook(ran("1\n" * 30), ran(), ran()),
            notebook(ran("1\n" * 9), ran("1\n" * 9)),
            "the median cell has 9 lines",
        ),
        (
            lint.little_prose,
            notebook(text(120), ran(), text(200)),
            notebook(text(60), text(61), ran()),
            "121 words above c2",
        ),
        (lint.little_prose, notebook(CARD, ran()), notebook(text(121), ran()), "121 words above c1"),
        (
            lint.compared_outputs,
            notebook(ran(outputs=[PRINTED], tags=["nbval-check-output"]), ran()),
            notebook(ran(outputs=[PICTURE], tags=["nbval-check-output"])),
            "c0 has no stored text",
        ),
        (
            lint.compared_outputs,
            notebook(),
            notebook(ran(outputs=[PRINTED], count=None, tags=["nbval-check-output"])),
            "c0 has no stored text",
        ),
        (lint.executed, notebook(ran(), ran(count=2)), notebook(ran(), ran(count=3)), "its cells were run as [1, 3]"),
        (lint.executed, notebook(), notebook(ran(outputs=[ERROR])), "c0 ended with an error"),
        (lint.unexecuted, notebook(ran(count=None)), notebook(ran(count=None, outputs=[PRINTED])), "c0 was run"),
        (lint.unexecuted, notebook(), notebook(ran()), "c0 was run"),
        (
            lint.no_dead_widgets,
            notebook(ran(outputs=[PICTURE])),
            notebook(ran(outputs=[VIEW])),
            "c0 has a widget's live view",
        ),
        (
            lint.no_machine,
            notebook(ran(outputs=[PICTURE])),
            notebook(ran(outputs=[new_output("stream", text="/home/me/x\n")])),
            "c0 names /home/",
        ),
        (lint.no_machine, notebook(text(3)), notebook(new_markdown_cell("see /Users/me")), "c0 names /Users/"),
        (
            lint.known_magics,
            notebook(ran("%timeit 1"), ran("a = 3 % 2")),
            notebook(ran("1\n%tiemit 2")),
            "c0 uses %tiemit",
        ),
        (lint.known_magics, notebook(), notebook(ran("!pip install x")), "c0 uses !pip"),
    ],
)
def test_rule(rule, good, bad, sentence):
    assert rule(good) == [] and rule(bad) == [sentence]


def test_stored_widgets_are_found():
    made = notebook(ran())
    made.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    assert lint.no_dead_widgets(made) == ["it stores widgets"]


def test_links(tmp_path):
    (tmp_path / "there.ipynb").write_text("")
    source = (
        "[a](there.ipynb#part) [b](https://x.org/y) [c](#top) ![d](gone.png) <img src='also-gone.png'> `f(x)[0](1)`"
    )
    made = notebook(new_markdown_cell(source), nbformat.v4.new_raw_cell("[e](gone.txt)"))
    assert lint.links(made, tmp_path) == ["c0 links to gone.png", "c0 links to also-gone.png", "c0 links to 1"]
