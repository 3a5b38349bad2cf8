"""The inspector tells everything about a file, and every byte of it once."""

import itertools
import struct

import pytest

from qlearn.cli import main
from qlearn.export import GGUFError, GGUFFile, fields, inspect, write_gguf
from tests.export import tiny
from tests.export.handmade import SMALL


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    return write_gguf(tiny.model("bundled"), tiny.tokenizer(), folder / "model.gguf", "Q4_K_M", progress=False)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.gguf").write_bytes(SMALL)
    return tmp_path / "small.gguf"


def test_all_that_is_in_a_file_is_listed(path):
    text = repr(inspect(path))
    file = GGUFFile(path)
    assert all(key in text for key in file.metadata) and all(name in text for name in file.tensors)
    assert f"{path.stat().st_size:,} bytes" in text and "74 tensors, 5.068 bits per weight" in text
    (row,) = [line for line in text.splitlines() if line.startswith("  blk.0.attn_v.weight")]
    info = file.tensor("blk.0.attn_v.weight")
    assert row.split()[1:] == ["Q6_K", "128", "x", "256", str(info.start), str(info.nbytes), "6.5625"]
    assert "of 4096" in text and max(map(len, text.splitlines())) < 170


def test_a_small_file(small):
    text = repr(inspect(small))
    assert "  an.array              array of int32   [3, -1, 2] of 3" in text
    assert "texts" in text and "['one', 'two', 'drei'] of 3" in text and "a.bool" in text and "True" in text
    assert "  first   F32     2 x 4" in text and "  second  Q4_0    32 " in text


@pytest.mark.parametrize("which", ["path", "small"])
def test_every_byte_is_told_of_once(which, request):
    file = request.getfixturevalue(which)
    spans = fields(file)
    assert spans[0].start == 0 and spans[-1].end == file.stat().st_size
    assert all(before.end == after.start for before, after in itertools.pairwise(spans))
    assert all(span.start < span.end and span.meaning and span.name for span in spans)


def test_the_bytes_of_a_field_hold_its_value(small):
    data, found = SMALL, {span.name: span for span in fields(small)}

    def bytes_of(name):
        return data[found[name].start : found[name].end]

    assert bytes_of("magic") == b"GGUF" and bytes_of("version") == struct.pack("<I", 3)
    assert bytes_of("tensor count") == struct.pack("<Q", 3) and found["metadata count"].value == 5
    assert bytes_of("general.architecture") == b"llama" and found["general.architecture"].value == "llama"
    assert bytes_of("a.float") == struct.pack("<f", 0.5) and bytes_of("a.bool") == b"\1"
    assert bytes_of("an.array") == struct.pack("<3i", 3, -1, 2) and found["length of an.array"].value == 3
    assert bytes_of("texts").endswith(b"\4\0\0\0\0\0\0\0drei") and found["element type of texts"].value == 8
    assert found["first, dimension 0"].value == 4 and found["first, dimension 1"].value == 2
    assert found["type of second"].value == 2 and found["offset of second"].value == 32
    assert bytes_of("first") == struct.pack("<8f", *range(8)) and found["second"].value == "18 bytes"


def test_broken_files_are_told(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(SMALL[:100])
    for look in (inspect, fields):
        with pytest.raises(GGUFError):
            look(tmp_path / "broken.gguf")


def test_the_command(path, capsys):
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.strip() == repr(inspect(path)).strip()


def test_the_command_shows_a_block(path, capsys):
    assert main(["inspect", str(path), "blk.0.ffn_up.weight", "767"]) == 0
    out = capsys.readouterr().out
    assert "Q4_K" in out and "scales[7]" in out and "weight 255: d * scales[7] * code - dmin * mins[7]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing.gguf"], "nothing.gguf"), (["blk.9.x"], "has no tensor blk.9.x"),
     (["blk.0.ffn_up.weight", "768"], "blk.0.ffn_up.weight has 768 blocks"),
     (["blk.0.ffn_up.weight", "-1"], "blk.0.ffn_up.weight has 768 blocks")],
)  # fmt: skip
def test_the_command_tells_what_is_wrong(path, arguments, message, capsys):
    given = arguments if arguments[0].endswith(".gguf") else [str(path), *arguments]
    assert main(["inspect", *given]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
