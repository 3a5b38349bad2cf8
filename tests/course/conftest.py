"""Fixtures for the course's machinery: a small course of its own, and a data folder that is nobody's."""

import copy
import shutil
from pathlib import Path

import pytest

from qlearn.course import build, cells, places, tasks

SAMPLES = Path(__file__).parent / "samples"
collect_ignore = ["samples"]  # they need the registry that the fixtures below set up


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """No test touches the learner's own progress."""
    folder = tmp_path / "data"
    monkeypatch.setenv("QLEARN_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def built_samples(tmp_path_factory):
    """The sample course, built once: a folder with lessons/, solutions/ and exercises/."""
    root = tmp_path_factory.mktemp("course")
    shutil.copytree(SAMPLES, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "__path__", [*tasks.__path__, str(SAMPLES / "tasks")])
        patch.setenv("SAMPLE_TASKS", str(SAMPLES / "tasks"))
        build.build(root, say=lambda line: None)
    return root


@pytest.fixture
def sample_tasks(monkeypatch):
    """The sample tasks are in the registry, here and in the kernels that a test starts."""
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(SAMPLES / "tasks")])
    monkeypatch.setenv("SAMPLE_TASKS", str(SAMPLES / "tasks"))


@pytest.fixture
def course(built_samples, sample_tasks, tmp_path, monkeypatch):
    """A copy of the built sample course in place of the real one; returns its folder."""
    root = tmp_path / "course"
    shutil.copytree(built_samples, root)
    monkeypatch.setattr(places, "course_root", lambda: root)
    return root


@pytest.fixture
def solution(course):
    return cells.read_notebook(course / "solutions" / "01_grid.ipynb")


@pytest.fixture
def exercise(course):
    return cells.read_notebook(course / "exercises" / "01_grid.ipynb")


@pytest.fixture
def solved(exercise, solution):
    """The exercise as a learner who solved it would have it."""
    made = copy.deepcopy(exercise)
    own = {cells.about(cell)["answer"]: cell.source for cell in answers(solution)}
    for cell in answers(made):
        cell.source = own[cells.about(cell)["answer"]]
    return made


def answers(notebook):
    """The answer cells of a notebook."""
    return [cell for cell in cells.code_cells(notebook) if "answer" in cells.about(cell)]
