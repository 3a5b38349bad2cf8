"""The column explorer, swept over its whole range without a browser, and checked against the package."""

import pytest
import torch

from qlearn.course import widgets
from qlearn.course.widgets.column_by_column import METHODS
from qlearn.methods import gptq, zero_point
from qlearn.methods.statistics import InputStatistics
from tests.course.explorers import check_sweep

RTN, GPTQ, LARGEST = METHODS


def made_up(rows=3, columns=8):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs


@pytest.fixture(scope="module")
def explorer():
    return widgets.column_explorer(*made_up())


def test_a_sweep_reaches_different_states_and_ends_where_it_began(explorer):
    check_sweep(explorer, 10, pixels=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_last_state_is_what_the_package_gives(explorer, method, bits):
    weights, inputs = made_up()
    if method == RTN:
        expected = zero_point(weights, bits).dequantize()
    else:
        expected = gptq(weights, bits, inputs=inputs, act_order=METHODS[method]).dequantize()
    (order, states, _), errors = explorer._states(method, bits), explorer.output_errors(method, bits)
    assert sorted(order) == list(range(8)) and len(states) == len(errors) == 9
    torch.testing.assert_close(states[-1], expected)
    squares = ((states[-1] - weights) @ inputs.T).square().sum() / (weights @ inputs.T).square().sum()
    assert errors[-1] == pytest.approx(100 * squares.item(), rel=1e-4) and errors[0] == 0


def test_columns_that_are_done_stay_and_nearest_leaves_the_others_alone(explorer):
    weights, _ = made_up()
    for method in METHODS:
        order, states, _ = explorer._states(method, 3)
        for count, state in enumerate(states):
            torch.testing.assert_close(state[:, order[:count]], states[-1][:, order[:count]], rtol=0, atol=1e-6)
            if method == RTN:
                assert torch.equal(state[:, count:], weights[:, count:])


def test_the_largest_input_is_first():
    weights, inputs = made_up()
    explorer = widgets.column_explorer(weights, inputs)
    size = InputStatistics.from_inputs(inputs).hessian.diagonal()
    assert explorer._states(LARGEST, 3)[0] == size.argsort(descending=True).tolist()


def test_the_summary_says_what_is_drawn(explorer):
    explorer.controls["method"].value, explorer.controls["rounded"].value = GPTQ, 5
    states, errors = explorer._states(GPTQ, 3)[1], explorer.output_errors(GPTQ, 3)
    moved = (states[5] - made_up()[0])[:, 5:].abs() / zero_point(made_up()[0], 3).scales.float()
    assert explorer.summary == (
        f"3 bits, GPTQ, 5 of 8 columns: output error {errors[5]:.3g} %; the others were shifted by up to "
        f"{moved.max():.2f} steps"
    )
    explorer.controls["rounded"].value = 8
    assert explorer.summary == f"3 bits, GPTQ, 8 of 8 columns: output error {errors[8]:.3g} %"
    explorer.controls["rounded"].value = 0


def test_what_the_lesson_says_of_the_made_up_matrix():
    explorer = widgets.column_explorer()
    for bits in (2, 3, 4):
        nearest, fast, ordered = (explorer.output_errors(method, bits) for method in METHODS)
        assert nearest[-1] > fast[-1] > 2 * ordered[-1]
        assert fast[8] < nearest[8] / 5 and max(nearest[-2:]) - nearest[-3] > nearest[-1] / 2


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        (torch.ones(2, 33), torch.ones(4, 33), "33 columns cannot be shown"),
        (torch.ones(2, 1), torch.ones(4, 1), "1 columns cannot be shown"),
        (torch.ones(2, 4), torch.ones(4, 3), "inputs of 3 channels do not fit 4 columns"),
        (torch.zeros(2, 4), torch.ones(4, 4), "nothing but zeros"),
        (torch.ones(2, 4), torch.zeros(4, 4), "all outputs are 0"),
        (torch.ones(2, 4), torch.tensor([[1.0, float("nan"), 1.0, 1.0]]), "NaN or infinite"),
        (torch.ones(2, 4), None, "pass weights and inputs, or neither"),
    ],
)
def test_what_does_not_fit_is_refused(weights, inputs, message):
    with pytest.raises(ValueError, match=message):
        widgets.column_explorer(weights, inputs)


def test_bits_out_of_range_are_refused():
    with pytest.raises(ValueError, match="bits="):
        widgets.column_explorer(*made_up(), bits=(1, 4))
