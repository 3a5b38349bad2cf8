"""Each check says OK on this machine, and names the remedy for what it is there to find."""

import json
import time

import pytest
from safetensors.numpy import save_file

from qlearn import cli
from qlearn.course import doctor, places


def test_this_machine_is_healthy_and_the_answer_quick(capsys, course):
    began = time.perf_counter()
    assert cli.main(["doctor"]) == 0
    assert time.perf_counter() - began < 15  # two seconds on a quiet machine
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS) and all(line.startswith("OK ") for line in lines)
    assert not any(str(places.Path.home()) in line or str(course) in line for line in lines)


def test_json_and_exit_status(capsys, monkeypatch):
    def broken():
        raise doctor.Problem("it is broken", "Mend it")

    def surprising():
        raise KeyError("x")

    monkeypatch.setattr(doctor, "CHECKS", {"A": lambda: "fine", "B": broken, "C": surprising})
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"name": "A", "ok": True, "found": "fine", "remedy": ""},
        {"name": "B", "ok": False, "found": "it is broken", "remedy": "Mend it"},
        {"name": "C", "ok": False, "found": "KeyError: 'x'", "remedy": "Install qlearn again"},
    ]
    assert cli.main(["doctor"]) == 1
    assert (
        capsys.readouterr().out
        == "OK    A: fine\nFAIL  B: it is broken. Mend it\nFAIL  C: KeyError: 'x'. Install qlearn again\n"
    )


def problem(check, *arguments):
    with pytest.raises(doctor.Problem) as raised:
        check(*arguments)
    return raised.value.args


def test_python_and_packages(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4, "final", 0))
    assert problem(doctor.python)[0] == "3.10.4, but the course needs >=3.11"
    wanted = ["numpy>=999", "nobody-has-this", "torch>=2; extra == 'gpu'", "pytest>=1"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    found, remedy = problem(doctor.packages)
    assert found == "missing or too old: numpy>=999, nobody-has-this"
    assert remedy == "pip install -U 'numpy>=999' 'nobody-has-this'"


def test_kernel(tmp_path, monkeypatch):
    spec = tmp_path / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps(
            {"argv": ["/opt/other/bin/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    found, remedy = problem(doctor.kernel)
    assert found.startswith("python3 starts /opt/other/bin/python") and "ipykernel install" in remedy


def test_widgets_and_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.sys, "prefix", str(tmp_path))
    assert "jupyterlab_widgets" in problem(doctor.widgets)[1]
    monkeypatch.setattr(places, "SHIPPED", tmp_path)
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "qlearn")
    assert problem(doctor.notebooks) == ("the notebooks are missing", "Install qlearn again")


def test_model(tmp_path):
    import numpy as np

    assert problem(doctor.model, tmp_path)[0] == "config.json is missing"
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert problem(doctor.model, tmp_path)[0] == "model.safetensors is missing"
    weights = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(10, np.float32), "b": np.zeros(3, np.int8)}, weights)
    assert doctor.model(tmp_path) == "2 tensors, 0.0 MB"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    assert problem(doctor.model, tmp_path)[0] == f"model.safetensors has {len(whole) - 5} bytes instead of {len(whole)}"
    for damaged in (b"", b"\xff" * 40, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}", whole[:20]):
        weights.write_bytes(damaged)
        assert problem(doctor.model, tmp_path)[0] == "model.safetensors has no header that can be read"


def test_data_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLEARN_DATA", str(tmp_path / "file"))
    assert "QLEARN_DATA" in problem(doctor.data)[1]
    monkeypatch.setenv("QLEARN_DATA", str(tmp_path / "new"))
    assert doctor.data() == "can be written" and not list((tmp_path / "new").iterdir())


def test_a_gpu_that_does_not_answer(monkeypatch):
    def fails():
        raise OSError("driver mismatch")

    monkeypatch.setattr("qlearn.kernels.cuda.SIMULATED", False)
    monkeypatch.setattr("numba.cuda.get_current_device", fails)
    assert problem(doctor.gpu) == (
        "a GPU is here but does not answer (driver mismatch)",
        "Check the driver with nvidia-smi",
    )
