"""Execute a notebook, and keep of its outputs only what can be read and compared anywhere.

A kernel leaves more in a notebook than its results: live views of widgets, which are dead in a file; progress bars;
colour codes for a terminal; times; paths of this machine. Those go. Pictures, tables and printed text stay, and so do
the execution counts, because nbval compares nothing in a cell that has none.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from qlearn.course import cells, places
from qlearn.course.cells import NotebookError

_VIEW = "application/vnd.jupyter.widget-view+json"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+(it|B)? \[\d+:\d+")
_CELL_FILE = re.compile(r"\S*ipykernel_\d+[/\\]\d+\.py")

#: Folders of this machine, and what is written for them; inner ones before outer ones.
_FOLDERS = (
    (sys.prefix, "…"),  # first: a virtual environment may lie inside the repository
    (f"{places.PACKAGE.parent}{os.sep}", ""),
    (str(places.PACKAGE.parent), "."),
    (str(Path.home()), "~"),
)


def execute(notebook, folder, timeout=600):
    """Run all cells in order in a fresh kernel with an empty data folder, and store the cleaned outputs in the
    notebook.

    notebook: a NotebookNode, changed in place.  folder: where its kernel works.  timeout: seconds for one cell.
    Raises NotebookError, with the cell and its error, when a cell fails.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as data:
        try:
            client.execute(env={**os.environ, "QLEARN_DATA": data}, stderr=subprocess.DEVNULL)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            name = notebook.metadata.get("qlearn", {}).get("notebook", "the notebook")
            raise NotebookError(f"{name} does not run: {plain(str(error)).strip()}") from None
    clean(notebook)


def clean(notebook):
    """Remove from the outputs what belongs to this machine or this moment; in place."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in cells.code_cells(notebook):
        cell.metadata.pop("execution", None)
        outputs = _join_streams(cell.outputs)
        for output in outputs:
            _clean_output(output)
        cell.outputs = [output for output in outputs if not _is_empty(output)]


def _join_streams(outputs):
    """Printed text arrives in pieces that depend on timing: each stream becomes one output, where its first piece
    was."""
    joined, streams = [], {}
    for output in outputs:
        if output.output_type == "stream" and output.name in streams:
            streams[output.name].text += output.text
            continue
        if output.output_type == "stream":
            streams[output.name] = output
        joined.append(output)
    return joined


def _clean_output(output):
    if output.output_type == "stream":
        output.text = plain(output.text)
    for kind, content in list(output.get("data", {}).items()):
        if kind == _VIEW:
            del output.data[kind]
            output.metadata.pop(kind, None)
        elif isinstance(content, str) and kind.startswith("text/"):
            output.data[kind] = plain(content)


def plain(text):
    """Text without colour codes, progress bars and paths of this machine."""
    text = _ANSI.sub("", text)
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    text = "\n".join(line for line in lines if not _PROGRESS_BAR.search(line))
    text = _CELL_FILE.sub("<cell>", text)
    for folder, short in _FOLDERS:
        text = text.replace(folder, short)
    return text


def _is_empty(output):
    if output.output_type == "stream":
        return not output.text.strip()
    return output.output_type in ("display_data", "execute_result") and not any(output.data.values())
