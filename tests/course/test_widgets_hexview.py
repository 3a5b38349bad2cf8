"""The hex view, swept over all its parts without a browser, and checked against the bytes themselves."""

import re

import numpy as np
import pytest

import qlearn
from qlearn.course import widgets
from qlearn.course.widgets.hexview import TYPES
from qlearn.export import fields, write_gguf
from qlearn.export.tensor_types import TENSOR_TYPES, decode, encode
from tests.course.explorers import check_sweep


def weights():
    return (0.05 * np.random.RandomState(3).standard_normal(256)).astype(np.float32)


@pytest.fixture(scope="module")
def view():
    return widgets.hex_view(weights())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_gguf(*qlearn.load_model(), tmp_path_factory.mktemp("file") / "model.gguf", "Q4_0", progress=False)


def test_a_sweep_reaches_different_states_and_ends_where_it_began():
    view = widgets.hex_view(types=["Q4_0", "Q2_K"])
    states = 1 + len(view.parts("Q4_0"))
    check_sweep(view, states, most=states)


@pytest.mark.parametrize("type", TYPES)
def test_the_parts_are_what_the_package_reads(view, type):
    size = TENSOR_TYPES[type]
    expected = decode(encode(weights()[None], type)[:, : size.nbytes], type)[0]
    parts = view.parts(type)
    codes = [part for part in parts if part.kind == "code"]
    if type != "F16":
        assert [float(part.value) for part in codes] == pytest.approx(expected, rel=1e-5)
    everywhere = sorted((bit.byte, bit.low + i) for part in parts for bit in part.bits for i in range(bit.count))
    assert everywhere == [(byte, bit) for byte in range(size.nbytes) for bit in range(8)]


@pytest.mark.parametrize("type", [type for type in TYPES if type != "F16"])
def test_the_formula_with_its_numbers_gives_the_value(view, type):
    for part in view.parts(type):
        if part.kind == "code":
            formula = dict(part.lines)["with numbers"]
            assert re.fullmatch(r"[-+*().\de ]+", formula), formula
            assert eval(formula) == pytest.approx(float(part.value), rel=1e-4, abs=1e-5)


def test_the_chosen_bytes_are_framed_and_the_reading_is_about_them(view):
    view.controls["bytes"].value = "Q4_K"
    view.select("scales[5]")
    cells = re.findall(r'class="qhex-byte( qhex-chosen)?" title="([^"]*)"[^>]*>(\w\w)<', view.grid.value)
    assert len(cells) == 144 and [i for i, (mark, *_) in enumerate(cells) if mark] == [5, 13]
    assert "".join(text for *_, text in cells) == encode(weights()[None], "Q4_K").tobytes().hex()
    value = next(part.value for part in view.parts() if part.name == "scales[5]")
    assert f"bits 6-7: scales[5] = {value}" in cells[5][1] and "bits 0-5: scales[1] = " in cells[5][1]
    assert view.summary.startswith("Q4_K, scales[5]: bits 0-3 of byte 13, then bits 6-7 of byte 5, raw ")
    assert re.search(r"<b><u>[01]{2}</u></b>[01]{6}", view.reading.value)
    assert re.search(r"[01]{4}<b><u>[01]{4}</u></b>", view.reading.value)


def test_another_type_keeps_the_place_along_the_slider(view):
    view.controls["bytes"].value = "Q6_K"
    view.controls["part"].index = 272
    last = view.summary
    view.controls["bytes"].value = "Q4_0"
    assert view.controls["part"].index == 32 and "codes[31]" in view.summary and view.error is None
    view.controls["bytes"].value = "F16"
    assert "sign" in view.summary and last.startswith("Q6_K, codes[255]")


def test_a_file_is_shown_as_its_fields_tell(path):
    view = widgets.hex_view(str(path))
    assert view.summary == "model.gguf, magic: bytes 0-3, value 'GGUF'"
    spans = [span for span in fields(path) if span.start < 256]
    assert [part.bytes[0] for part in view.parts()] == [span.start for span in spans]
    assert sorted(byte for part in view.parts() for byte in part.bytes) == list(range(256))
    view.select("version")
    assert view.summary == "model.gguf, version: bytes 4-7, raw 3 = 0x3, value 3"
    view.controls["part"].index = len(spans) - 1
    assert spans[-1].end <= 256 or f"it goes on to byte {spans[-1].end - 1}" in view.reading.value
    assert len(set(view.sweep())) == len(spans)


def test_the_picture_says_what_the_page_says(view):
    view.controls["bytes"].value = "Q4_0"
    before = view.png()
    view.controls["part"].index = 5
    assert view.png() != before and view.png()[:4] == b"\x89PNG"


def test_words_of_a_file_cannot_become_markup(tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "<b>llama</b>")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    view = widgets.hex_view(path)
    view.select("general.architecture")
    assert "&lt;b&gt;llama" in view.reading.value and "<b>llama" not in view.reading.value + view.grid.value
    assert view.png()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": [1.0] * 32}, "32 weights; give 256"),
        ({"types": []}, "no types"),
        ({"types": ["IQ2_S"]}, "IQ2_S"),
        ({"what": [float("nan")] * 256}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        widgets.hex_view(**arguments)


def test_a_part_that_is_not_there(view):
    with pytest.raises(ValueError, match="there is no 'scales"):
        view.controls["bytes"].value = "Q4_0"
        view.select("scales[3]")
