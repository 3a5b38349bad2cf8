"""Tables: exact text, colours by value, and a clear refusal of what cannot be read."""

import numpy as np
import pytest
import torch

from qlearn.course.tables import table


def test_vectors_become_rows():
    w = np.array([0.9, -0.31, 0.14, -0.02, 0.6])
    codes = np.array([3, -1, 0, 0, 2])
    assert repr(table(original=w, codes=codes, reconstructed=codes * 0.3)).splitlines() == [
        "original       0.90  -0.31  0.14  -0.02  0.60",
        "codes             3     -1     0      0     2",
        "reconstructed  0.90  -0.30  0.00   0.00  0.60",
    ]


def test_matrices_stand_side_by_side():
    shown = table(original=[[1.5, -2], [0, 0.25]], codes=[[1, -1], [0, 0]])
    assert repr(shown).splitlines() == ["original      codes", " 1.50 -2.00    1 -1", " 0.00  0.25    0  0"]


def test_torch_tensors_of_any_dtype_are_read():
    weight = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
    shown = table(weight=weight, half=weight.bfloat16(), codes=torch.tensor([1, -2], dtype=torch.int8))
    assert repr(shown).splitlines()[1].split() == ["half", "0.50", "-1.00"]


def test_minus_zero_is_printed_as_zero_and_nan_as_nan():
    assert repr(table(x=[-0.0, float("nan"), float("inf")])) == "x  0  nan  inf"


def test_decimals_can_be_chosen():
    assert repr(table(x=[0.12345, 1], decimals=4)) == "x  0.1235  1.0000"


def test_html_has_headers_and_every_number():
    page = table(original=[[1.5, -2], [0, 0.25]], codes=[[1, -1], [0, 0]])._repr_html_()
    assert page.count("<td") == 2 * 4 + 3  # numbers, and a gap in each row and the head
    assert page.count('scope="colgroup"') == 2 and ">original<" in page and ">-2.00<" in page
    page = table(**{"a<b": [1, 2]})._repr_html_()
    assert page.count("<td") == 2 and 'scope="row"' in page and "a&lt;b" in page


def test_colour_follows_sign_and_size():
    def color(value):
        page = table(x=[value, 1.0])._repr_html_()
        hexadecimal = page.split("background: #")[1][:6]
        return [int(hexadecimal[i : i + 2], 16) for i in (0, 2, 4)]

    assert color(0.0) == [255, 255, 255]
    strong, weak = color(1.0), color(0.1)
    assert strong[2] > strong[0] and weak[2] > weak[0] and sum(strong) < sum(weak)  # blue, and more of it
    assert color(-1.0)[0] > color(-1.0)[2]  # vermillion


def test_black_text_is_readable_on_every_colour():
    page = table(x=[-1.0, 1.0])._repr_html_()
    for part in page.split("background: #")[1:]:
        rgb = np.array([int(part[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        light = np.dot([0.2126, 0.7152, 0.0722], np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4))
        assert (light + 0.05) / 0.05 >= 4.5  # WCAG 2, against black


def test_nothing_but_zeros_and_infinities_is_white():
    assert "#ffffff" in table(x=[0, 0])._repr_html_()
    assert "#ffffff" in table(x=[float("inf"), float("nan")])._repr_html_()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "nothing to show"),
        ({"a": [1, 2], "b": [1, 2, 3]}, r"one shape, got a \(2,\), b \(3,\)"),
        ({"a": np.zeros((2, 2, 2))}, r"a has shape \(2, 2, 2\)"),
        ({"a": 3.0}, r"a has shape \(\)"),
        ({"a": []}, r"a has shape \(0,\)"),
        ({"a": np.zeros((30, 30))}, "a slice for instance"),
    ],
)
def test_what_cannot_be_read_is_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        table(**arrays)
