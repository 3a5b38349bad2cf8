"""Scales that are quantized: the formula at every place of a layout, bytes counted, and what is refused."""

import pytest
import torch

from qlearn.formats.floats import FP8_E4M3FN
from qlearn.formats.integers import Integers
from qlearn.scales import QuantizedScales, sizes

U8 = Integers(8, signed=False)


def codes(rows=3, columns=5):
    return torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", [(3, 5), (1, 15), (15, 1), (4, 4), (2, 9)], ids=str)
@pytest.mark.parametrize("along", ["rows", "columns", "one", "all"])
@pytest.mark.parametrize("offset", [True, False])
def test_each_scale_has_the_step_of_its_place(layout, along, offset):
    m, n = layout
    shape = {"rows": (m, 1), "columns": (1, n), "one": (1, 1), "all": (m, n)}[along]
    steps, offsets = torch.rand(shape), torch.rand(shape) if offset else None
    scales = QuantizedScales.from_codes(codes(), U8, steps, offsets, layout)
    for place, code in enumerate(codes().flatten().tolist()):
        at = [place // n if shape[0] > 1 else 0, place % n if shape[1] > 1 else 0]
        expected = code * steps[at[0], at[1]] + (offsets[at[0], at[1]] if offset else 0)
        assert scales.float().flatten()[place] == expected
    assert scales.nbytes == 15 + 4 * steps.numel() * (1 + offset)


def test_codes_of_a_float_format_and_of_few_bits():
    scales = QuantizedScales.from_codes(
        FP8_E4M3FN.encode(torch.tensor([[1.5, 448.0]])), FP8_E4M3FN, torch.full((1, 1), 2.0)
    )
    assert scales.float().tolist() == [[3.0, 896.0]]
    small = QuantizedScales.from_codes(torch.tensor([[1, 7, 0]]), Integers(3, signed=False), torch.ones(1, 1))
    assert small.float().tolist() == [[1.0, 7.0, 0.0]] and small.packed.numel() == 2


def test_from_state_is_the_inverse():
    scales = QuantizedScales.from_codes(codes(), U8, torch.rand(4, 1).half(), torch.rand(1, 1), (4, 4))
    back = QuantizedScales.from_state(scales.state_tensors(), scales.metadata())
    assert torch.equal(back.float(), scales.float()) and back.metadata() == scales.metadata()
    assert torch.equal(back.codes().long(), codes())
    assert sizes(scales.metadata()) == {name: tuple(t.shape) for name, t in scales.state_tensors().items()}


@pytest.mark.parametrize(
    ("steps", "layout", "message"),
    [
        (torch.ones(1, 1), (3, 4), "has no room for 15 scales"),
        (torch.ones(5), (3, 5), "steps has shape"),
        (torch.ones(2, 1), (3, 5), "steps has shape"),
    ],
    ids=["too small a layout", "one axis", "wrong length"],
)
def test_what_does_not_fit_is_refused(steps, layout, message):
    with pytest.raises(ValueError, match=message):
        QuantizedScales.from_codes(codes(), U8, steps, layout=layout)


def test_missing_bytes_are_refused():
    with pytest.raises(ValueError, match="15 scales need"):
        QuantizedScales(torch.zeros(14, dtype=torch.uint8), U8, (3, 5), (3, 5), torch.ones(1, 1))
