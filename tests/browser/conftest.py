"""JupyterLab and a headless Chromium, once for all tests of a process; a page of its own for each module.

The system's Chromium is used, found on the PATH or named by the environment variable CHROMIUM; nothing is downloaded.
Everything that JupyterLab would read from or write to the user's home lies in a temporary folder, the learner's data
too.

A page is driven through `window.jupyterapp`, JupyterLab's own application object, where that is possible: commands that
return a promise say when they are done, menus do not. The mouse and the keyboard are real.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from qlearn.course.lab import environment

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
SERVER = (
    "--allow-root --no-browser --ip=127.0.0.1 --ServerApp.port_retries=0 --IdentityProvider.token= "
    "--ServerApp.password= --ServerApp.disable_check_xsrf=True --LabApp.expose_app_in_browser=True"
)
# Cells that are off screen stay in the page, so that the tests can find what is in them.
SETTINGS = {"@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"}}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def chromium():
    """A running headless Chromium, or a reason why there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install qlearn[test])")
    if CHROMIUM is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on the PATH, and CHROMIUM is not set")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder that JupyterLab shows: the lessons, and room for notebooks of the tests."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(REPOSITORY / "lessons", root / "lessons", ignore=shutil.ignore_patterns("source"))
    return root


@pytest.fixture(scope="session")
def server(chromium, root, tmp_path_factory):
    """The address of a running JupyterLab that knows nothing of the user's settings."""
    home = tmp_path_factory.mktemp("home")
    for plugin, settings in SETTINGS.items():
        file = home / "settings" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "QLEARN_DATA": "learner",
    }
    variables = environment() | {name: str(home / folder) for name, folder in places.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", *SERVER.split(), f"--port={port}", f"--ServerApp.root_dir={root}"]
    with open(home / "lab.log", "w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status", process, home / "lab.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def wait_for(url, process, log, seconds=60):
    """Return when the server answers; fail with its log when it ends or takes too long."""
    for _ in range(10 * seconds):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


class Lab:
    """A JupyterLab page with one open notebook."""

    def __init__(self, page, url, root):
        self.page, self.root, self.errors = page, root, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{url}/lab?reset", wait_until="domcontentloaded")
        ready = "() => window.jupyterapp && window.jupyterapp.restored.then(() => true)"
        page.wait_for_function(ready, timeout=120_000)

    def open(self, path):
        """Open the notebook at `path`, relative to the root, and wait for its kernel."""
        self.page.evaluate(
            """async path => {
                const panel = await window.jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook'});
                await panel.context.ready; await panel.sessionContext.ready; await panel.revealed;
                window.notebookPanel = panel;
            }""",
            path,
        )
        self.notebook = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        return self

    def write(self, name, *sources):
        """Write a notebook of code cells into the root, and open it."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / name)
        return self.open(name)

    def run_all(self):
        """Run all cells; returns when the last one is done."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
        return self

    def cells(self):
        """The notebook's cells with their outputs, as nbformat has them."""
        return self.page.evaluate("() => window.notebookPanel.content.model.toJSON().cells")

    def failures(self):
        """[(source, error)] of the cells that failed."""
        outputs = [(cell["source"], output) for cell in self.cells() for output in cell.get("outputs", [])]
        return [(src, f"{out['ename']}: {out['evalue']}") for src, out in outputs if out["output_type"] == "error"]

    def output(self, number):
        """The output area of code cell `number`."""
        return self.notebook.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea")

    def broken_widgets(self):
        """Where JupyterLab shows an error in the place of a widget."""
        return self.notebook.locator(".jupyter-widgets-error-widget, :text('Error displaying widget')")

    def drag(self, target, to, steps=10):
        """Drag the handle of a slider (its .noUi-target) to a place from 0 to 1 along its track."""
        target.scroll_into_view_if_needed()
        handle, track = target.locator(".noUi-handle").first.bounding_box(), target.bounding_box()
        y = handle["y"] + handle["height"] / 2
        mouse = self.page.mouse
        mouse.move(handle["x"] + handle["width"] / 2, y)
        mouse.down()
        mouse.move(track["x"] + to * track["width"], y, steps=steps)
        mouse.up()

    def close(self):
        """Shut the kernel down without asking, so that the next notebook has the machine to itself."""
        self.page.evaluate("() => window.notebookPanel.sessionContext.shutdown()")


@pytest.fixture
def lab(chromium, server, root):
    """A fresh page; its kernel ends with it."""
    yield from _page(chromium, server, root)


@pytest.fixture(scope="module")
def shared_lab(chromium, server, root):
    """One page for a whole module."""
    yield from _page(chromium, server, root)


def _page(chromium, server, root):
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    lab = Lab(context.new_page(), server, root)
    yield lab
    if hasattr(lab, "notebook"):
        lab.close()
    context.close()
