"""Where figures come from: the processor is named, wherever it can be."""

import platform

import pytest

from qlearn.evaluate.provenance import processor, provenance

X86 = """processor\t: 0
model name\t: Some CPU @ 2.0GHz: 8 cores
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 fsrm
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp i8mm
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (X86, ("Some CPU @ 2.0GHz: 8 cores", ["avx2", "avx512f", "avx512_vnni", "amx_int8"])),
        (X86.replace("avx2 avx512f avx512_vnni amx_int8", "sse2"), ("Some CPU @ 2.0GHz: 8 cores", [])),
        (ARM, (None, ["asimddp", "i8mm"])),
        ("", (None, [])),
    ],
)
def test_the_processor_as_linux_describes_it(tmp_path, cpuinfo, expected):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert processor(tmp_path / "cpuinfo") == expected


@pytest.mark.parametrize(("known", "expected"), [("arm", "arm"), ("", None)])
def test_elsewhere_python_names_it(monkeypatch, tmp_path, known, expected):
    monkeypatch.setattr(platform, "processor", lambda: known)
    assert processor(tmp_path / "none") == (expected, None)


def test_the_record():
    record = provenance("a command")
    assert (record["processor"], record["instructions"]) == processor()
    assert list(record)[:5] == ["command", "date", "machine", "processor", "instructions"]
