"""Products with packed weights at real sizes, as they are called in earnest: in a row, overlapping, in CUDA graphs."""

from dataclasses import replace

import pytest
import torch

import qlearn
from qlearn.kernels import dispatch
from qlearn.kernels.cuda import layout
from qlearn.kernels.cuda import matmul as kernels
from qlearn.rotation import hadamard
from tests.gpu.bounds import UNIT, check

pytestmark = pytest.mark.usefixtures("capability_9")
HALF, BFLOAT = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def no_choice_of_kernels(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def random_weight(rows, columns, method="absmax", bits=4, group=None, **options):
    weight = torch.randn(rows, columns, device="cuda") / columns**0.5
    return qlearn.quantize(weight, method, bits=bits, group_size=group, **options)


def inputs(*shape, dtype=HALF):
    return torch.randn(*shape, device="cuda").to(dtype)


def run(x, units, plan=None, overlap=False):
    """y = x W^T into memory that holds NaN."""
    y = torch.full((len(x), units.shape[0]), float("nan"), dtype=x.dtype, device="cuda")
    torch.cuda.synchronize()  # an overlapping kernel may fetch weights while the one before it runs
    kernels.prepare(x, units, y, plan, overlap)()
    return y


def as_multiplied(x, quantized):
    """x and the weight as they come to the tensor cores, float64 (see `kernels/cuda/numbers.py`).

    A code minus a zero-point that is whole is exact. One with a fraction is rounded to the dtype of x, and so is the
    difference. With column scales, x times the scale is rounded. Scales of groups come after the sum, as float16.
    """
    zeros, dtype = 0, x.dtype
    if quantized.zeros is not None:
        zeros = quantized.zero_points().to(dtype).double().repeat_interleave(quantized.block[1], 1)
    numbers = (quantized.codes().double() - zeros).to(dtype).double()
    weight = numbers * quantized.scales.double().repeat_interleave(quantized.block[1], 1)
    if quantized.column_scales is not None:
        x = (x.float() * quantized.column_factors().float()).to(dtype)
    return x.double(), weight


def check_product(y, x, quantized, plan):
    """Within the error of float32 sums, and of one rounding of y.

    A product passes through additions in its group, of two halves of it, of groups, of warps, and of slices.
    """
    meant, columns, form = x.double() @ quantized.dequantize().double().T, x.shape[1], plan.form
    x, weight = as_multiplied(x, quantized)
    additions = form.group + 2 + -(-columns // form.group) + form.warps + plan.slices
    check(y, x @ weight.T, additions * UNIT * (x.abs() @ weight.abs().T))
    assert (y.double() - meant).norm() <= torch.finfo(y.dtype).eps * meant.norm()  # all roundings together


CUT = "32 rows so long that they are cut"
CASES = {
    "4 bits, absmax, one row": ("absmax", 4, 128, HALF, 1, 4096, 4096),
    "4 bits, zero-points, rows that fill no tile": ("zero_point", 4, 64, BFLOAT, 5, 1000, 4096),
    "8 bits, absmax, 16 rows": ("absmax", 8, 128, BFLOAT, 16, 512, 1024),
    "8 bits, zero-points, 32 rows": ("zero_point", 8, 32, HALF, 32, 520, 2048),
    "3 bits, zero-points": ("zero_point", 3, 64, HALF, 3, 4096, 1024),
    "3 bits, absmax, 32 rows": ("absmax", 3, 128, BFLOAT, 32, 512, 4096),
    "2 bits, zero-points, 8 rows": ("zero_point", 2, 32, HALF, 8, 512, 4096),
    "2 bits, hqq: zero-points with a fraction": ("hqq", 2, 64, BFLOAT, 1, 512, 4096),
    "4 bits, hqq, 12 rows": ("hqq", 4, 64, HALF, 12, 512, 4096),
    "4 bits, sinq: column scales": ("sinq", 4, 64, HALF, 1, 1024, 4096),
    "4 bits, sinq, 20 rows": ("sinq", 4, 64, BFLOAT, 20, 1024, 4096),
    CUT: ("absmax", 4, 128, HALF, 32, 512, 8192),
    "a tile that is not full, a unit that is not full": ("absmax", 4, None, HALF, 2, 7, 264),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    method, bits, group, dtype, M, N, K = CASES[case]
    quantized, x = random_weight(N, K, method, bits, group), inputs(M, K, dtype=dtype)
    assert quantized.scales.dtype == torch.float16  # others would be rounded to it
    units = layout.arrange(quantized)
    plan = kernels.plan_for(x, units)
    assert plan.slices > 1 or case != CUT
    y = run(x, units)
    check_product(y, x, quantized, plan)
    assert torch.equal(run(x, units, overlap=True), y)


@pytest.mark.parametrize("K", [264, 4104])
@pytest.mark.parametrize("N", [7, 1000, 5003])
@pytest.mark.parametrize("M", [1, 2])
def test_odd_shapes(M, N, K):
    quantized, x = random_weight(N, K), inputs(M, K)
    units = layout.arrange(quantized)
    check_product(run(x, units), x, quantized, kernels.plan_for(x, units))


def test_x_lies_at_the_end_of_its_memory():
    """Nothing behind it counts: NaN is there."""
    memory = torch.full((3, 4104), float("nan"), dtype=HALF, device="cuda")
    x = memory[:1].copy_(torch.randn(1, 4104))
    quantized = random_weight(1000, 4104)
    units = layout.arrange(quantized)
    check_product(run(x, units), x, quantized, kernels.plan_for(x, units))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_slices(slices, overlap):
    quantized, x = random_weight(1000, 4104), inputs(2, 4104)
    units = layout.arrange(quantized)
    plan = kernels.plan_for(x, units, slices=slices)
    assert plan.slices == slices
    y = run(x, units, plan, overlap)
    check_product(y, x, quantized, plan)
    assert torch.equal(run(x, units, plan), y)


def chain(count, slices, width=2048):
    """Launches of which each multiplies the result of the one before: (plan, weights, [x, y, y, ...])."""
    weights = [random_weight(width, width, group=128) for _ in range(count)]
    units = [layout.arrange(quantized) for quantized in weights]
    steps = [inputs(1, width)] + [torch.full_like(inputs(1, width), float("nan")) for _ in weights]
    plan = kernels.plan_for(steps[0], units[0], slices=slices)
    return plan, weights, units, steps


def launches(plan, units, steps, overlap):
    torch.cuda.synchronize()
    return [kernels.prepare(x, unit, y, plan, overlap) for unit, x, y in zip(units, steps[:-1], steps[1:], strict=True)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_row_of_launches_waits_for_each_other(slices, overlap):
    plan, weights, units, steps = chain(8, slices)
    for launch in launches(plan, units, steps, overlap):
        launch()
    for quantized, x, y in zip(weights, steps[:-1], steps[1:], strict=True):
        check_product(y, x, quantized, plan)
    first = [y.clone() for y in steps[1:]]
    for y in steps[1:]:
        y.fill_(float("nan"))
    for launch in launches(plan, units, steps, not overlap):
        launch()
    assert all(torch.equal(a, b) for a, b in zip(first, steps[1:], strict=True))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("slices", [1, 2])
def test_in_a_cuda_graph(slices, overlap):
    """It is recorded once, and replayed with other inputs."""
    plan, _, units, steps = chain(4, slices)
    made = launches(plan, units, steps, overlap)
    made[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in made:
            launch()
    for _ in range(3):
        steps[0].copy_(inputs(1, steps[0].shape[1]))
        for y in steps[1:]:
            y.fill_(float("nan"))
        graph.replay()
        expected = [steps[0]]
        for unit in units:
            expected.append(run(expected[-1], unit, plan))
        assert all(torch.equal(a, b) for a, b in zip(expected, steps, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("case", ["4 bits, absmax, one row", "4 bits, sinq: column scales", CUT])
def test_the_same_bits_each_time(case, overlap):
    """Twenty launches, one right after the other: a race would show."""
    method, bits, group, dtype, M, N, K = CASES[case]
    x, units = inputs(M, K, dtype=dtype), layout.arrange(random_weight(N, K, method, bits, group))
    ys = [torch.full((M, N), float("nan"), dtype=dtype, device="cuda") for _ in range(20)]
    made = [kernels.prepare(x, units, y, overlap=overlap) for y in ys]
    torch.cuda.synchronize()
    for launch in made:
        launch()
    assert ys[0].isfinite().all() and all(torch.equal(y, ys[0]) for y in ys)


# --- as the dispatcher calls it ---


@pytest.mark.usefixtures("poisoned")
def test_dispatched():
    quantized, x = random_weight(1000, 4104), inputs(2, 1, 4104)
    assert dispatch.choose(x, quantized).backend == "cuda"
    with dispatch.use("cuda"):
        y = dispatch.matmul(x, quantized)
    assert y.shape == (2, 1, 1000) and y.dtype == HALF
    units = layout.arrange(quantized)
    check_product(y[:, 0], x[:, 0], quantized, kernels.plan_for(x[:, 0], units))
    bias = inputs(1000)
    assert torch.equal(dispatch.matmul(x, quantized, bias), y + bias)


def test_dispatched_with_inputs_that_lie_apart():
    quantized, x = random_weight(64, 264), inputs(264, 2).T
    assert torch.equal(dispatch.matmul(x, quantized), dispatch.matmul(x.contiguous(), quantized))


def test_dispatched_with_a_rotated_weight():
    """The input is rotated instead, in float32, and rounded."""
    quantized, x = random_weight(1000, 4096, "hadamard", group=64, size=128), inputs(5, 4096, dtype=BFLOAT)
    assert quantized.hadamard == 128
    with dispatch.use("cuda"):
        y = dispatch.matmul(x, quantized)
    rotated, turned = hadamard(x.float(), 128).to(BFLOAT), replace(quantized, hadamard=None)
    check_product(y, rotated, turned, kernels.plan_for(rotated, layout.arrange(turned)))
    meant = x.double() @ quantized.dequantize().double().T
    assert (y.double() - meant).norm() <= torch.finfo(BFLOAT).eps * meant.norm()


def test_dispatched_with_too_many_rows():
    quantized, x, bias = random_weight(512, 4096, group=128), inputs(33, 4096), inputs(512)
    sentence = "x has 33 rows; the kernel takes 1 to 32"
    choice = dispatch.choose(x, quantized)
    assert choice.backend == "reference" and choice.reasons["cuda"] == sentence
    expected = torch.nn.functional.linear(x, quantized.dequantize(HALF), bias)
    assert torch.equal(dispatch.matmul(x, quantized, bias), expected)
    with dispatch.use("cuda"), pytest.raises(ValueError, match=sentence):
        dispatch.matmul(x, quantized)


def test_dispatched_in_float32():
    quantized, x = random_weight(64, 256), torch.randn(1, 256, device="cuda")
    choice = dispatch.choose(x, quantized)
    assert choice.backend == "reference" and "x is float32" in choice.reasons["cuda"]
