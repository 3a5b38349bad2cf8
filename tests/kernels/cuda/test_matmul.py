"""Products of the kernel: against float64, within a bound derived from what is rounded on the way."""

import pytest
import torch

import qlearn
from qlearn.formats.integers import Integers
from qlearn.kernels.cuda import SIMULATED, launch, matmul
from qlearn.kernels.cuda.layout import arrange
from qlearn.tensor import QuantizedTensor

DEVICE = "cpu" if SIMULATED else "cuda"
SINGLE = 2.0**-23  # tensor cores cut off what float32 does not hold, where others round: twice 2**-24
SMALL = {"warps": 2, "per_stage": 2, "stages": 2, "per_multiprocessor": 1}  # blocks of four warps
METHODS = {
    "no zeros": ("absmax", {}),
    "integer zeros": ("zero_point", {}),
    "zeros with fractions": ("hqq", {}),
    "column scales": ("sinq", {"order": 3}),
}
pytestmark = pytest.mark.skipif(
    launch.capability() < matmul.CAPABILITY, reason="the kernel needs a GPU of compute capability 9.0"
)


@pytest.fixture(autouse=True)
def poisoned_shared_memory(monkeypatch):
    """Shared memory is full of NaN when a block begins; the simulator's own is full of zeros."""
    if not SIMULATED:
        return
    from numba.cuda.simulator import kernelapi

    begin = kernelapi.FakeCUDAShared.__init__

    def poisoned(self, size):
        begin(self, size)
        self._dynshared.view("uint8")[:] = 0xFF

    monkeypatch.setattr(kernelapi.FakeCUDAShared, "__init__", poisoned)


def quantized(zeros, rows, columns, bits=4, group=None, seed=0):
    method, options = METHODS[zeros]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.2
    return qlearn.quantize(weight, method, bits=bits, group_size=group, **options)


def inputs(rows, columns, dtype=torch.float16, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x, qt, overlap=False, **options):
    """y, from the kernel; it was full of NaN before."""
    x, units = x.to(DEVICE), arrange(qt.to(DEVICE))
    y = torch.full((len(x), qt.shape[0]), float("nan"), dtype=x.dtype, device=DEVICE)
    plan = matmul.plan_for(x, units, **{**SMALL, **options})
    matmul.prepare(x, units, y, plan, overlap=overlap)()
    return y.cpu()


def check(y, x, qt):
    """Compare with x W^T in float64. With u the rounding of the dtype, and |.| of every number:

    a weight without its scale, q - z, is exact if z is whole; else it is rounded once, after z itself (which float16
    holds as it is, and bfloat16 not): u |q - z| (1 + u) + u |z|.  x times a column scale is rounded once: u |x t|.
    Products are exact. Sums are of float32: each passes through fewer additions and multiplications than there are
    columns and 64 more.  y is rounded once.
    """
    eps, x, columns = torch.finfo(x.dtype).eps / 2, x.double(), qt.shape[1]
    weight = qt.dequantize().double()
    group = qt.block[1]
    exact, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    error = (columns + 64) * SINGLE * magnitude
    if qt.column_scales is not None:
        error += eps * magnitude
    if qt.zeros is not None and qt.zeros.is_floating_point():
        z = 0 if x.dtype == torch.float16 else (qt.zero_points() * qt.scales.float()).repeat_interleave(group, 1)
        error += eps * (1 + eps) * (x.abs() @ (weight.abs() + abs(z)).double().T)
    bound = error + (exact.abs() + error) * eps + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape and ((y.double() - exact).abs() <= bound).all()


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
TINY = {**SMALL, "warps": 1, "per_stage": 1}


@DTYPES
@pytest.mark.parametrize("zeros", ["no zeros", "integer zeros", "zeros with fractions"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_zeros_and_dtypes(bits, zeros, dtype):
    """Fifteen rows of three groups: neither the rows nor the columns of the unit are all there."""
    qt, x = quantized(zeros, 15, 96, bits, 32), inputs(1, 96, dtype)
    check(product(x, qt, **TINY), x, qt)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 17])
def test_rows_of_x(tokens):
    qt, x = quantized("integer zeros", 7, 128, group=128), inputs(tokens, 128)
    check(product(x, qt, **TINY), x, qt)


@DTYPES
def test_column_scales(dtype):
    """Two warps multiply them in, and neither goes on before the other is done."""
    qt, x = quantized("column scales", 5, 136), inputs(3, 136, dtype)
    check(product(x, qt), x, qt)


@pytest.mark.parametrize("group", [32, 128, 256, None], ids=lambda group: "a row" if group is None else str(group))
def test_groups(group):
    qt, x = quantized("zeros with fractions", 3, 256, group=group), inputs(1, 256)
    check(product(x, qt, **TINY), x, qt)


@pytest.mark.parametrize("columns", [8, 120, 248], ids=lambda columns: f"{columns} columns")
def test_units_that_are_not_full(columns):
    """Behind its end, x in shared memory is filled up: what lies there is NaN, and a NaN times zero is NaN."""
    qt, x = quantized("no zeros", 7, columns), inputs(2, columns)
    check(product(x, qt, **TINY), x, qt)


@pytest.mark.parametrize("rows", [1, 15, 17])
def test_tiles_that_are_not_full(rows):
    qt, x = quantized("no zeros", rows, 128), inputs(1, 128)
    check(product(x, qt, **TINY), x, qt)


@pytest.mark.parametrize(
    "per_stage, overlap", [(2, True), (4, False)], ids=["one unit each, x is asked for at last", "two units each"]
)
def test_warps_share_a_tile(per_stage, overlap):
    """Five units, two warps: in the last stage there is one for the first warp and none for the second."""
    qt, x = quantized("integer zeros", 7, 640), inputs(3, 640)
    check(product(x, qt, per_stage=per_stage, overlap=overlap), x, qt)


@pytest.mark.parametrize("slices, tokens", [(2, 3), (4, 1)])
def test_slices(slices, tokens):
    """Five units: 3 + 2, and of four slices of two units the last has nothing and is left out: 2 + 2 + 1."""
    qt, x = quantized("column scales", 7, 600, group=None), inputs(tokens, 600)
    plan = matmul.plan_for(x.to(DEVICE), arrange(qt.to(DEVICE)), slices=slices, **TINY)
    assert plan.slices == min(slices, 3) and plan.form.sliced and plan.blocks % plan.slices == 0
    check(product(x, qt, slices=slices, **TINY), x, qt)


@pytest.mark.parametrize("tiles, tokens", [(4, 1), (3, 17)], ids=["two buffers for sums", "one buffer for sums"])
def test_stages_and_sums_are_used_again(tiles, tokens, monkeypatch):
    """All tiles by one block, through two stages, so that each barrier goes through several phases."""
    monkeypatch.setattr(matmul, "multiprocessors", lambda *_: 1)
    qt, x = quantized("no zeros", 16 * tiles - 2, 128, 2), inputs(tokens, 128)
    assert matmul.plan_for(x.to(DEVICE), arrange(qt.to(DEVICE)), **TINY).blocks == 1
    check(product(x, qt, **TINY), x, qt)


def test_twice_is_the_same():
    """A prepared product is run as often as one likes, on what x holds at that time."""
    qt, x = quantized("integer zeros", 7, 128), inputs(1, 128).to(DEVICE)
    units, y = arrange(qt.to(DEVICE)), torch.empty(1, 7, dtype=x.dtype, device=DEVICE)
    run = matmul.prepare(x, units, y, matmul.plan_for(x, units, **TINY))
    run()
    first = y.clone()
    check(first.cpu(), x.cpu(), qt)
    x.mul_(2)
    run()
    assert torch.equal(y, 2 * first)


def test_whole_numbers_are_exact():
    """Where nothing has to be rounded, nothing is: each of 32 inputs, and a scale for each row."""
    codes = torch.randint(-8, 8, (16, 32), generator=torch.Generator().manual_seed(2))
    scales = 2.0 ** torch.arange(-4, 12)[:, None]
    qt = QuantizedTensor.from_codes(codes, scales.half(), Integers(4), (1, 32))
    y = product(torch.eye(32).half(), qt, **TINY)
    assert torch.equal(y.double(), qt.dequantize().double().T)


def test_what_is_not_finite_stays_in_its_row():
    qt, x = quantized("no zeros", 7, 96), inputs(3, 96)
    clean = product(x, qt, **TINY)
    x[1, 90] = float("nan")
    y = product(x, qt, **TINY)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_the_largest_sums_overflow_as_float16_does():
    qt = QuantizedTensor.from_codes(
        torch.full((2, 64), 7), torch.tensor([[64.0], [-64.0]]).half(), Integers(4), (1, 64)
    )
    y = product(torch.full((1, 64), 4.0).half(), qt, **TINY)  # 4 * 7 * 64 * 64 = 114,688
    assert y.tolist() == [[float("inf"), -float("inf")]]


def test_as_it_is_called():
    """With the plan that is chosen: ten warps in a block."""
    qt, x = quantized("integer zeros", 7, 136), inputs(1, 136)
    check(matmul.matmul(x.to(DEVICE), arrange(qt.to(DEVICE))).cpu(), x, qt)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(1, 128), "x is torch.float32"),
        (torch.zeros(0, 128).half(), "x has 0 rows"),
        (torch.zeros(33, 128).half(), "x has 33 rows"),
        (torch.zeros(1, 120).half(), r"x is torch.float16 \(1, 120\); pass float16 or bfloat16 \(M, 128\)"),
        (torch.zeros(128).half(), r"x is torch.float16 \(128,\)"),
        (torch.zeros(128, 2).half().T, "strides"),
        (torch.zeros(2, 256).half()[:, :128], "strides"),
    ],
    ids=["float32", "no rows", "33 rows", "120 columns", "a vector", "transposed", "every second row"],
)
def test_what_is_refused(x, message):
    units = arrange(quantized("no zeros", 7, 128).to(DEVICE))
    with pytest.raises(ValueError, match=message):
        matmul.matmul(x.to(DEVICE), units)


def test_x_that_begins_in_between_is_refused():
    units = arrange(quantized("no zeros", 7, 128).to(DEVICE))
    with pytest.raises(ValueError, match="no multiple of 16"):
        matmul.matmul(torch.zeros(132, device=DEVICE).half()[4:].view(1, 128), units)


@pytest.mark.parametrize("warps, per_stage", [(1, 3), (2, 1), (2, 6), (4, 6)])
def test_stages_that_warps_cannot_share_are_refused(warps, per_stage):
    units, x = arrange(quantized("no zeros", 7, 128).to(DEVICE)), inputs(1, 128).to(DEVICE)
    with pytest.raises(ValueError, match=f"per_stage={per_stage} with {warps} warps; pass {warps} or a multiple"):
        matmul.plan_for(x, units, warps=warps, per_stage=per_stage)


def test_plans():
    """Fewer blocks than multiprocessors for fewer tiles; slices where x does not fit into shared memory."""

    def plan(tokens, rows, columns, **options):
        qt = QuantizedTensor.from_codes(
            torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows, 1).half(), Integers(4), (1, columns)
        )
        return matmul.plan_for(torch.zeros(tokens, columns).half(), arrange(qt), **options)

    assert [plan(tokens, 16, 128).form.tiles for tokens in (1, 8, 9, 16, 17, 32)] == [1, 1, 2, 2, 4, 4]
    assert plan(1, 16, 128).blocks == 1 and plan(1, 16, 128).slices == 1
    long = plan(32, 16, 128 * 200)
    assert long.slices > 1 and long.form.sliced and long.shared_bytes <= matmul.SHARED_MOST
    with pytest.raises(ValueError, match="32 rows of 25600 numbers do not fit into shared memory; pass fewer rows"):
        plan(32, 16, 128 * 200, slices=1)
