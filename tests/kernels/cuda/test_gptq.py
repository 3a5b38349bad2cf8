"""GPTQ's block in one kernel, against the readable loop over columns."""

import pytest
import torch

from qlearn.kernels.cuda import SIMULATED
from qlearn.kernels.cuda.gptq import gptq_block
from qlearn.methods.gptq import _Grids, _sweep, _upper_factor

DEVICE = "cpu" if SIMULATED else "cuda"


def problem(rows, columns, seed=0):
    """A weight (rows, columns), and the upper factor of a Hessian of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = (x.T @ x)[None] / len(x)
    return weight, _upper_factor(hessian, torch.arange(columns)[None], 0.01, [len(x)])[0]


def run(weight, U, bits, sym, group_size, late, which=None):
    """(codes, errors, scales, zeros) of the kernel, codes and grids of the readable loop."""
    rows, n = weight.shape
    grids = _Grids(weight[None], bits, group_size, sym, clip="minmax", scale_dtype=torch.float16)
    which = torch.arange(n) // group_size if which is None else which
    order = torch.arange(n)[None]
    scales, zeros = (torch.full((n // group_size, rows), float("nan")) for _ in range(2))
    if not late:
        scales, zeros = grids.scales[0].T.contiguous(), grids.zeros[0].T.contiguous()
    codes = torch.empty(n, rows, dtype=torch.int8 if sym else torch.uint8)
    given = weight.T.contiguous(), U.contiguous(), which.int(), scales, zeros, codes, torch.empty(n, rows)
    given = [tensor.to(DEVICE) for tensor in given]
    gptq_block(*given, bits=bits, sym=sym, late=late, group_size=group_size)
    expected = _sweep(weight[None], U[None], order, grids, late, [0])[0]
    *_, scales, zeros, codes, errors = (tensor.cpu() for tensor in given)
    return codes.T, errors, scales.T, zeros.T, expected, grids


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("rows, n, group_size", [(5, 32, 32), (33, 32, 16), (3, 64, 32)])
def test_codes_and_grids(rows, n, group_size, late, sym):
    weight, U = problem(rows, n)
    codes, errors, scales, zeros, expected, grids = run(weight, U, 4, sym, group_size, late)
    assert torch.equal(scales, grids.scales[0]) and torch.equal(zeros, grids.zeros[0])
    assert torch.equal(codes, expected)
    assert errors.isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bits(bits):
    weight, U = problem(4, 32, seed=1)
    codes, _, _, _, expected, _ = run(weight, U, bits, False, 32, True)
    assert torch.equal(codes, expected)


def test_errors_are_what_the_later_columns_are_shifted_by():
    weight, U = problem(4, 32, seed=2)
    codes, errors, scales, zeros, *_ = run(weight, U, 4, False, 32, True)
    # weights and values differ by the errors: W - Q = Err^T U, exactly but for rounding in float32
    values = (codes.float() - zeros) * scales
    assert torch.allclose((errors.T.double() @ U.double().triu()).float(), weight - values, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(U=torch.zeros(32, 16)), "U has shape"),
        (lambda a: a.update(codes=torch.zeros(32, 4, dtype=torch.int8)), "codes are int8 if sym"),
        (lambda a: a.update(scales=torch.zeros(1, 5), zeros=torch.zeros(1, 5)), "scales of"),
        (lambda a: a.update(group_size=12), "group_size=12"),
        (lambda a: a.update(bits=9), "9 bits"),
    ],
)
def test_what_is_refused(change, message):
    arguments = {
        "W": torch.zeros(32, 4), "U": torch.eye(32), "which": torch.zeros(32, dtype=torch.int32),
        "scales": torch.zeros(1, 4), "zeros": torch.zeros(1, 4), "codes": torch.zeros(32, 4, dtype=torch.uint8),
        "errors": torch.zeros(32, 4), "group_size": 32,
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        gptq_block(**{name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})
