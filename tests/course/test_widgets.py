"""Every widget of the course, swept over its whole range without a browser, and checked against the package."""

import base64
import io
import math
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image

import qlearn
from qlearn import formats
from qlearn.course import widgets
from qlearn.course.widgets import bits as bit_explorer
from qlearn.course.widgets import measure, numberline
from qlearn.formats.floats import FORMATS

SMALL_FLOATS = [name for name, format in FORMATS.items() if format.bits <= 8 and format.has_zero]


def weights(rows=16, columns=128):
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def write_text(bits):
    return f"def f():  # ${bits}$ <b>\n    return " + "x" * 200 + "\n" * 30, 2.0 ** (11 - bits)


MAKERS = {
    "BitExplorer": widgets.BitExplorer,
    "NumberLine": widgets.number_line_explorer,
    "AbsmaxExplorer": lambda: widgets.absmax_explorer(weights()),
    "OutlierExplorer": lambda: widgets.outlier_explorer(bits=(2, 4)),
    "ClipExplorer": lambda: widgets.clip_explorer(weights(4, 64)),
    "ZeroPointExplorer": lambda: widgets.zero_point_explorer(weights(4, 64)),
    "TextBreaker": lambda: widgets.text_breaker(write_text),
}


@pytest.fixture(params=list(MAKERS), scope="module")
def widget(request):
    return MAKERS[request.param]()


def test_a_sweep_reaches_different_states_and_ends_where_it_began(widget):
    before = repr(widget)
    summaries = widget.sweep()
    assert len(set(summaries)) > 6 and all("nan" not in s or "(nan)" in s for s in summaries)
    assert repr(widget) == before


def test_what_a_notebook_stores(widget):
    data, metadata = widget._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert data["text/plain"] == repr(widget) and repr(widget).startswith(f"{widget.name}: {widget.summary}")
    assert len(metadata["image/png"]["alt"]) > 40
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.width >= 500 and image.height >= 100
    assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn


def test_the_same_widget_made_again_says_and_shows_the_same(widget):
    again = MAKERS[widget.name]()
    assert repr(again) == repr(widget) and again.png() == widget.png()


def test_every_control_has_a_label(widget):
    assert all(control.description for control in widget.controls.values())


# ---- the bit explorer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_one_button_for_each_bit_in_the_order_of_the_fields(name):
    explorer = widgets.BitExplorer(name, "1")
    buttons = bit_explorer._buttons(explorer.bits)
    assert [button.bit for button in buttons] == list(range(FORMATS[name].bits - 1, -1, -1))
    code = int("".join(button.description for button in buttons), 2)
    assert code == explorer.code == FORMATS[name].encode(1.0)
    assert all(button.field in button.tooltip and "press to flip" in button.tooltip for button in buttons)


@pytest.mark.parametrize("name", FORMATS)
def test_pressing_a_button_flips_its_bit(name):
    explorer = widgets.BitExplorer(name, "1")
    for button in bit_explorer._buttons(explorer.bits):
        before, text = explorer.code, button.description
        button.click()
        assert explorer.code == before ^ 1 << button.bit and button.description != text
        value = FORMATS[name].decode(explorer.code)
        assert f" = {value:.9g} (" in explorer.summary and explorer.controls["number"].value == f"{value:.9g}"
        button.click()
        assert explorer.code == before


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_the_formula_gives_the_value_for_every_code(name):
    format = FORMATS[name]
    for code in format.codes.tolist():
        fields = format.fields(code)
        if fields.kind not in ("inf", "nan"):
            spoken = bit_explorer.formula(format, code)
            python = spoken.replace("−", "-").replace("^", "**").replace("×", "*")
            assert eval(python) == fields.value, spoken


def test_the_summary_names_kind_neighbours_and_ulp():
    fp8 = FORMATS["fp8_e4m3fn"]
    assert bit_explorer.summary(fp8, 0x7E) == "fp8_e4m3fn 0 1111 110 = 448 (normal), below 416, ulp 32"
    assert bit_explorer.summary(fp8, 0x7F) == "fp8_e4m3fn 0 1111 111 = nan (nan)"
    assert "(subnormal)" in bit_explorer.summary(fp8, 0x01) and "(zero)" in bit_explorer.summary(fp8, 0x80)
    assert bit_explorer.summary(FORMATS["e8m0"], 127).startswith("e8m0 01111111 = 1 (normal), below 0.5, above 2")
    assert bit_explorer.summary(FORMATS["bf16"], 0xFF80) == "bf16 1 11111111 0000000 = -inf (inf)"


def test_typing_encodes_and_another_format_encodes_again():
    explorer = widgets.BitExplorer("fp8_e4m3fn", "0.3")
    assert explorer.code == 42
    explorer.controls["number"].value = "-1000"
    assert explorer.code == FORMATS["fp8_e4m3fn"].encode(-1000.0)
    explorer.controls["format"].value = "fp4_e2m1"
    assert explorer.code == FORMATS["fp4_e2m1"].encode(-1000.0) and "= -6 (normal)" in explorer.summary


def test_what_is_no_number_is_refused_in_the_note_and_changes_nothing():
    explorer = widgets.BitExplorer("fp8_e4m3fn", "0.3")
    explorer.controls["number"].value = "<three>"
    assert explorer.code == 42 and "&#x27;&lt;three&gt;&#x27; is not a number" in explorer.note.value
    explorer.controls["number"].value = "1"
    assert explorer.error is None and explorer.code == 0x38
    with pytest.raises(ValueError, match="'abc' is not a number"):
        widgets.BitExplorer("fp8_e4m3fn", "abc")


def test_right_functions_of_the_learner_drive_it_without_complaint():
    fp8 = FORMATS["fp8_e4m3fn"]
    explorer = widgets.BitExplorer(fp8, "0.3", encode=fp8.encode, decode=lambda code: np.float64(fp8.decode(code)))
    assert explorer.controls["format"].options == ("fp8_e4m3fn",)
    assert not any("your" in summary for summary in explorer.sweep())


def test_a_wrong_decode_is_shown_and_contradicted():
    explorer = widgets.BitExplorer("fp4_e2m1", "3", decode=lambda code: 2 * FORMATS["fp4_e2m1"].decode(code))
    assert explorer.summary.endswith("your decode says 6, the format says 3")
    assert "<b>6</b>" in explorer.reading.value


def test_a_wrong_encode_decides_the_bits_and_is_contradicted():
    explorer = widgets.BitExplorer("fp4_e2m1", "3", encode=lambda x: torch.tensor(2))
    assert explorer.code == 2 and explorer.summary.endswith("your encode says 0010, the format says 0101")
    explorer.flip(0)  # a click is not the encoder's doing
    assert "your encode" not in explorer.summary


@pytest.mark.parametrize("answer", [16, -1, 2.5, None, "0101", [5]])
def test_an_encode_that_gives_no_code_is_told_so(answer):
    explorer = widgets.BitExplorer("fp4_e2m1", "3", encode=lambda x: answer)
    assert explorer.code == 5 and f"your encode says {answer!r}, which is no code of 4 bits" in explorer.summary


@pytest.mark.parametrize("answer", [None, "three", np.zeros(2)])
def test_a_decode_that_gives_no_number_is_told_so(answer):
    explorer = widgets.BitExplorer("fp4_e2m1", "3", decode=lambda code: answer)
    assert f"your decode says {answer!r}, the format says 3" in explorer.summary


def test_functions_that_raise_are_quoted():
    def decode(code):
        raise NotImplementedError("write me")

    explorer = widgets.BitExplorer("fp4_e2m1", "3", encode=lambda x: 1 / 0, decode=decode)
    assert explorer.code == 5 and explorer.error is None
    assert "your encode raised ZeroDivisionError: division by zero" in explorer.summary
    assert "your decode raised NotImplementedError: write me" in explorer.summary


@pytest.mark.parametrize(
    ("mine", "true", "same"),
    [
        (0.0, -0.0, False),
        (-0.0, -0.0, True),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
    ],
)
def test_values_are_the_same_when_their_codes_are(mine, true, same):
    assert bit_explorer._same(mine, true) == same


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="'fp5' is unknown: choose from fp32"):
        widgets.BitExplorer("fp5")


# ---- the number line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL_FLOATS, "int4", "uint3", "int8", "nf4", "nf3"])
def test_values_are_all_numbers_of_the_format(name):
    values, format = numberline.values_of(name), formats.get(name)
    assert (np.diff(values) > 0).all() and np.isfinite(values).all()
    assert (np.asarray(format.round(values)) == values).all()
    outside = 2 * FORMATS[name].has_inf + 2 * (name == "fp8_e4m3fn") if name in FORMATS else 0
    zeros = name in FORMATS
    assert len(values) == 2**format.bits - zeros - outside - 6 * (name == "fp8_e5m2")


@pytest.mark.parametrize("mode", ["nearest", "zero"])
@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_cells_are_what_rounds_to_their_value(name, mode):
    """What is just inside the cell of a value goes there, what is just outside does not; the outermost aside."""
    format, values = FORMATS[name], numberline.values_of(name)
    for value in values[1:-1]:
        low, high = numberline.cell_of(values, value, mode)
        inside = np.array([low + (value - low) * 1e-6, value, high - (high - value) * 1e-6])
        assert (format.round(inside, mode=mode) == value).all()
        beyond = np.array([low - (high - low) * 1e-6, high + (high - low) * 1e-6])
        assert (format.round(beyond, mode=mode) != value).all()


@pytest.mark.parametrize("name", numberline.SMALL)
def test_the_explorer_rounds_like_the_format(name):
    line = widgets.number_line_explorer(name)
    values, format = numberline.values_of(name), formats.get(name)
    for x in np.linspace(values[0], values[-1], 7):
        line.controls["x"].value = x = float(np.clip(x, line.controls["x"].min, line.controls["x"].max))
        assert f"{x:.6g} goes to {float(format.round(x)):.6g} (nearest)" in line.summary


def test_stochastic_rounding_names_both_ends_and_their_chances():
    line = widgets.number_line_explorer("fp4_e2m1")
    line.controls["mode"].value = "stochastic"
    line.controls["x"].value = 2.25
    assert "2.25 goes to 2 with probability 0.75, to 3 with 0.25 (stochastic), cell 2 to 3" in line.summary
    line.controls["x"].value = 3
    assert "3 goes to 3 with probability 1.00, to 3 with 0.00" in line.summary


def test_zooming_halves_the_window_and_x_stays_inside():
    line = widgets.number_line_explorer("fp8_e5m2")
    line.controls["zoom"].value = 20
    limit = 57344 / 2**20
    assert line.controls["x"].max == limit and 0 < line.controls["x"].value < limit
    assert line._axes.get_xlim() == pytest.approx((-1.04 * limit, 1.04 * limit))
    line.controls["negative"].value = False
    assert line.controls["x"].min == 0 and line._axes.get_xlim()[0] == pytest.approx(-0.02 * limit)
    line.controls["format"].value = "int2"  # its window can be halved less often
    assert line.controls["zoom"].value == line.controls["zoom"].max < 20 and line.error is None


def test_the_still_line_shows_rows_and_can_be_scaled():
    picture = widgets.number_line("fp4_e2m1", "nf4", negative=False, limit=3)
    assert repr(picture) == "Picture: All numbers of fp4_e2m1, nf4 as ticks on a line from 0 to 3."
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fp4_e2m1", "nf4"]
    assert len(axes.collections[0].get_segments()) == 6  # 0, 0.5, 1, 1.5, 2, 3
    assert "from -1 to 1" in repr(widgets.number_line("int4", "fp6_e3m2", scaled=True))


@pytest.mark.parametrize("name", ["fp16", "fp32", "bf16"])
def test_long_formats_have_no_number_line(name):
    with pytest.raises(ValueError, match="at most 8 bits"):
        widgets.number_line(name)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'int4' is not among those"):
        widgets.number_line_explorer("int4", names=("nf4",))
    with pytest.raises(ValueError, match="'int99' is unknown"):
        widgets.number_line_explorer("int4", names=("int4", "int99"))


# ---- the explorers of quantizers -------------------------------------------------------------------------------------


def test_error_is_measured_right():
    w = weights(4, 32)
    qt = qlearn.quantize(w, "absmax", bits=3, group_size=16)
    error, difference = measure.measure(w, qt), (qt.dequantize() - w).double()
    assert error.rms == pytest.approx(difference.pow(2).mean().sqrt().item(), rel=1e-5)
    assert error.sqnr == pytest.approx(-10 * math.log10(difference.pow(2).mean() / w.double().pow(2).mean()), abs=1e-3)
    assert error.largest == difference.abs().max().item() and error.bits_per_weight == 4.0
    by_group = difference.reshape(4, 2, 16).abs().amax(-1) / (qt.scales.double() / 2)
    assert error.worst == pytest.approx(by_group.max().item(), rel=1e-5)
    exact = torch.tensor([[1.0, -1.0, 0.0]])
    assert measure.measure(exact, qlearn.quantize(exact, "absmax", bits=2)).sqnr == math.inf


def test_absmax_never_errs_by_more_than_half_a_step():
    explorer = widgets.absmax_explorer(weights())
    assert all(error.worst <= 1 + 1e-3 for error in explorer._errors.values())


def test_absmax_says_what_the_package_gives():
    w = weights()
    explorer = widgets.absmax_explorer(w, bits=(3, 5), group_size=[None, 32])
    explorer.controls["bits"].value = 5
    explorer.controls["shared"].value = 32
    qt = qlearn.quantize(w, "absmax", bits=5, group_size=32)
    relative = (qt.dequantize() - w).pow(2).mean().sqrt() / w.pow(2).mean().sqrt()
    assert explorer.summary.startswith(f"5 bits, groups of 32: {qt.bits_per_weight:.3f} bits per weight; ")
    assert f"rms error {100 * relative:.3g} % of the rms weight" in explorer.summary


def test_absmax_offers_the_groups_that_divide():
    labels = [label for label, _ in measure.sharers(weights(2, 96), None)]
    assert labels == ["whole tensor", "row", "groups of 32"]
    with pytest.raises(ValueError, match="groups of 64 do not divide rows of 96"):
        widgets.absmax_explorer(weights(2, 96), group_size=[64])


def test_a_growing_outlier_costs_the_others():
    explorer = widgets.outlier_explorer()
    curve = explorer._curve(4, measure.ROW)
    assert curve[-1] > 95 and curve[-1] > 5 * curve[0]  # in the end all others are stored as zero
    assert explorer._curve(4, 16)[-1] < 60  # with groups only fifteen others suffer


def test_clipping_and_rounding_add_up_and_the_star_is_the_packages_choice():
    w = weights(8, 64)
    explorer = widgets.clip_explorer(w)
    for bits in (2, 4):
        (steps, rounding, clipping), (where, least) = explorer._curves(bits)
        assert (np.diff(steps) > 0).all() and (np.diff(clipping) <= 0).all() and clipping[-1] == 0
        assert least == pytest.approx((rounding + clipping).min(), rel=0.02)
        qt = qlearn.quantize(w, "absmax", bits=bits, per="tensor", clip="mse")
        assert least == pytest.approx(100 * ((qt.dequantize() - w).pow(2).sum() / w.pow(2).sum()).item(), rel=1e-4)
        assert where < 100
    unclipped = qlearn.quantize(w, "absmax", bits=4, per="tensor")
    expected = 100 * ((unclipped.dequantize() - w).pow(2).sum() / w.pow(2).sum()).item()
    assert explorer._curves(4)[0][1][-1] == pytest.approx(expected, rel=1e-4)


def test_zero_point_wins_once_the_values_are_on_one_side():
    explorer = widgets.zero_point_explorer()
    symmetric, asymmetric = ([error for _, error, _ in explorer._results(m, 4)] for m in ("absmax", "zero_point"))
    assert symmetric[0] == pytest.approx(asymmetric[0], rel=0.2)
    assert symmetric[-1] > 1.7 * asymmetric[-1]
    explorer.controls["shift"].value = 4
    assert "the code of zero is 0 of 0 to 15" in explorer.summary


@pytest.mark.parametrize("make", [widgets.absmax_explorer, widgets.clip_explorer, widgets.zero_point_explorer])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), "NaN or infinity"),
        (torch.zeros(2, 2), "nothing but zeros"),
        (torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
        (torch.ones(0), r"shape \(1, 0\)"),
    ],
)
def test_bad_weights_are_refused(make, bad, message):
    with pytest.raises(ValueError, match=message):
        make(bad)


@pytest.mark.parametrize("bits", [(1, 4), (2, 9), (5, 4)])
def test_bits_out_of_range_are_refused(bits):
    for make in (widgets.absmax_explorer, widgets.clip_explorer, widgets.zero_point_explorer):
        with pytest.raises(ValueError, match="bits="):
            make(weights(2, 16), bits=bits)


def test_an_outlier_needs_company():
    with pytest.raises(ValueError, match="at least 64 weights"):
        widgets.outlier_explorer(torch.ones(5))


def test_vectors_parameters_and_lists_are_weights_too():
    for w in (torch.nn.Parameter(weights(1, 64)[0]), weights(1, 64).numpy().tolist(), weights(1, 64).bfloat16()):
        assert "4 bits" in widgets.absmax_explorer(w, bits=(4, 4), group_size=[None]).summary


def test_other_threads_of_torch_come_back():
    before = torch.get_num_threads()
    widgets.absmax_explorer(weights(2, 32), bits=(2, 3))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "control", "values"),
    [
        ("absmax_explorer", "bits", range(3, 5)),
        ("clip_explorer", "clip", range(5, 101)),
        ("zero_point_explorer", "shift", np.arange(0, 4, 0.1)),
    ],
)
def test_65536_weights_follow_the_hand(name, control, values, monkeypatch):
    """While a control is dragged nothing is quantized any more, and what remains beside the drawing takes 5 ms."""
    explorer = getattr(widgets, name)(weights(256, 256), bits=(3, 4))
    monkeypatch.setattr(qlearn, "quantize", None)
    took = []
    for value in values:
        settings = explorer.values() | {control: value}
        begin = time.thread_time()
        explorer._update(**settings)
        took.append(time.thread_time() - begin)
    assert statistics.median(took) <= 0.005


# ---- the text breaker ------------------------------------------------------------------------------------------------


def test_texts_are_made_once_each_and_only_when_shown():
    calls = []

    def generate(bits):
        calls.append(bits)
        return f"text at {bits}", float(bits)

    breaker = widgets.text_breaker(generate, bits=(2, 4))
    assert calls == [4] and breaker.controls["bits"].continuous_update is False
    breaker.controls["bits"].value = 2
    breaker.controls["bits"].value = 4
    breaker.controls["bits"].value = 2
    assert calls == [4, 2] and "text at 2" in breaker.text.value


def test_text_is_shown_as_text():
    breaker = widgets.text_breaker(lambda bits: ("<script>alert(1)</script> $x$", 1.0))
    assert "&lt;script&gt;" in breaker.text.value and breaker.png()


def test_while_it_writes_the_note_says_so():
    notes = []

    def generate(bits):
        if bits == 2:
            notes.append(breaker.note.value)
        return "", 1.0

    breaker = widgets.text_breaker(generate, bits=(2, 3))
    breaker.controls["bits"].value = 2
    assert "writing with 2 bits" in notes[0] and "writing" not in breaker.note.value


def test_a_failing_generate_shows_in_the_note():
    def generate(bits):
        if bits < 3:
            raise RuntimeError("out of memory")
        return "fine", 1.0

    breaker = widgets.text_breaker(generate, bits=(2, 4))
    breaker.controls["bits"].value = 2
    assert "RuntimeError: out of memory" in breaker.note.value and breaker.png()


@pytest.mark.parametrize("bits", [(4, 2), (0, 2), (1, float("inf"))])
def test_an_empty_range_of_bits_is_refused(bits):
    with pytest.raises(ValueError, match="bits="):
        widgets.text_breaker(lambda bits: ("", 1.0), bits=bits)
