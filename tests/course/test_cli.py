"""The command line: what it says, where, and with which exit status. Grading itself is tested in test_grade.py."""

import json
import subprocess
import sys

import pytest

from qlearn import cli
from qlearn.course import grade as grading
from qlearn.course import lab, places, progress


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_help_names_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("doctor", "lab", "grade", "progress", "hint", "reset", "inspect", "build"):
        assert f"    {command} " in out and run(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["grade"], "the following arguments are required: FILE; see qlearn grade --help"),
        (["doctor", "--loud"], "unrecognized arguments: --loud"),
        (["grade", "exercises/99_nothing.ipynb"], "No such file or directory: 'exercises/99_nothing.ipynb'"),
        (["hint", "grid.nothing"], "there is no task called 'grid.nothing': there are grid.scale, grid.codes"),
        (["reset", "notes.txt"], "notes.txt is no exercise of this course: there are 01_grid"),
        (["build", "77"], "there is no source called '77'"),
        (["grade", "--limit", "fast", "x.ipynb"], "invalid float value: 'fast'"),
    ],
)
def test_wrong_input_is_one_sentence_on_stderr(course, capsys, arguments, sentence):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and sentence in err
    assert err.startswith("qlearn: ") and err.count("\n") == 1


def test_grade(course, capsys, monkeypatch):
    results = [grading.Result("grid.scale", 3, 3), grading.Result("grid.codes", 0, 2, "not solved yet")]
    monkeypatch.setattr(grading, "grade", lambda path, limit: grading.Grade(path.stem, results, ["a note"], 1.23))
    status, out, _ = run(capsys, "grade", "01_grid.ipynb")
    assert status == 1
    assert out.splitlines() == [
        "01_grid: 3 of 5 points",
        "  note: a note",
        "  3/3  grid.scale",
        "  0/2  grid.codes",
        "       not solved yet",
    ]
    (found,) = json.loads(run(capsys, "grade", "01_grid.ipynb", "--json")[1])
    assert (found["points"], found["maximum"], found["seconds"]) == (3, 5, 1.2)
    results.pop()
    assert run(capsys, "grade", "01_grid.ipynb")[0] == 0


def test_progress(course, capsys):
    progress.note_attempt("grid.codes", True)
    status, out, _ = run(capsys, "progress")
    assert status == 0
    assert out.splitlines() == [
        "01_grid: 2 of 6 points, 1 of 3 tasks",
        "        grid.scale (3)",
        "  done  grid.codes (2)",
        "        grid.levels (1)",
    ]
    assert json.loads(run(capsys, "progress", "--json")[1])[0]["points"] == 2


def test_hint_and_reset(course, capsys):
    assert "Hint 1 of 2 for grid.codes" in run(capsys, "hint", "grid.codes")[1]
    path = course / "exercises/01_grid.ipynb"
    path.write_text("mine")
    status, out, _ = run(capsys, "reset", str(path))
    assert status == 0 and "yours is kept as" in out
    path.unlink()
    assert run(capsys, "reset", str(path))[1] == f"{path} is as it was in the beginning\n"


def test_build_check(course, capsys):
    assert run(capsys, "build", "--check") == (0, "every notebook is the one its source gives\n", "")
    (course / "exercises/01_grid.ipynb").unlink()
    assert run(capsys, "build", "--check") == (1, "exercises/01_grid.ipynb: is missing\n", "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "qlearn", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("qlearn: ") and not done.stdout


def test_lab_opens_lesson_0_without_questions(course, monkeypatch):
    called = {}

    def record(command, env):
        called.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(lab.subprocess, "run", record)
    assert cli.main(["lab", "--no-browser", "--port=9000"]) == 0
    assert f"--ServerApp.root_dir={course}" in called["command"]
    assert "--LabApp.default_url=/lab/tree/lessons/00_sample.ipynb" in called["command"]
    assert called["command"][-2:] == ["--no-browser", "--port=9000"]
    (folder,) = called["env"]["JUPYTER_CONFIG_PATH"].split(lab.os.pathsep)[:1]
    overrides = json.loads((places.Path(folder) / "labconfig/default_setting_overrides.json").read_text())
    assert overrides["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false", "checkForUpdates": False}


def test_jupyterlab_reads_the_default_settings(tmp_path, monkeypatch):
    """The file is where JupyterLab's server looks for it, and it names settings that exist."""
    from jupyterlab_server.settings_utils import _get_overrides

    monkeypatch.setenv("JUPYTER_CONFIG_PATH", lab.environment()["JUPYTER_CONFIG_PATH"])
    overrides, error = _get_overrides(str(tmp_path))
    assert not error and overrides["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    schemas = places.Path(sys.prefix) / "share/jupyter/lab/schemas"
    for plugin, settings in overrides.items():
        schema = json.loads((schemas / f"{plugin.replace(':', '/')}.json").read_text())
        assert settings.keys() <= schema["properties"].keys()


def test_an_installed_course_is_copied_and_never_overwritten(course, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "is_repository", lambda: False)
    target = lab.working_copy(tmp_path / "qlearn-course")
    mine = target / "exercises/01_grid.ipynb"
    assert mine.read_text() == (course / "exercises/01_grid.ipynb").read_text()
    mine.write_text("mine")
    (target / "lessons/00_sample.ipynb").unlink()
    assert lab.working_copy(tmp_path / "qlearn-course") == target
    assert mine.read_text() == "mine" and (target / "lessons/00_sample.ipynb").exists()
