"""No notebook test touches the learner's own data."""

import pytest


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QLEARN_DATA", str(tmp_path / "data"))
