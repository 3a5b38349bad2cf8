"""Products with trits: integers against NumPy's 64 bits, exactly; floats within a derived bound."""

import numpy as np
import pytest
import torch

from qlearn.kernels.cpu import ternary as cpu
from qlearn.kernels.cuda import SIMULATED, ternary
from qlearn.kernels.cuda.ternary import pack_rows
from qlearn.methods import ternary as quantize_ternary

DEVICE = "cpu" if SIMULATED else "cuda"
UNIT = 2.0**-23  # tensor cores cut off what float32 does not hold
COLUMNS = {2: (256, 512), 1.6: (8, 320, 648)}
CASES = [(bits, columns) for bits, several in COLUMNS.items() for columns in several]


def random(rows, columns, seed=0):
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))


def inputs(tokens, columns, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (tokens, columns), generator=generator).to(dtype)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def packed(trits, bits):
    """As a QuantizedTensor holds them, or by `pack_rows`."""
    if bits == 1.6:
        return pack_rows(trits)
    from qlearn.formats.integers import Integers

    return Integers(2).pack(Integers(2).to_unsigned(trits)).view(len(trits), -1)


def product(x, trits, bits, scale=1.0, warps=1, **options):
    y_dtype = torch.int32 if x.dtype == torch.int8 else x.dtype
    y = torch.full((len(x), len(trits)), 77, dtype=y_dtype, device=DEVICE)
    weight = packed(trits, bits).to(DEVICE)
    for run in ternary.prepared(x.to(DEVICE), weight, y, bits, scale, warps=warps, **options):
        run()
    return y.cpu()


@pytest.mark.parametrize("bits, columns", CASES)
@pytest.mark.parametrize("tokens, rows", [(1, 17), (5, 3)])
def test_integers(tokens, rows, bits, columns):
    x, trits = inputs(tokens, columns, torch.int8), random(rows, columns)
    assert torch.equal(product(x, trits, bits).long(), x.long() @ trits.T)


@pytest.mark.parametrize("bits", COLUMNS)
def test_the_largest_sums(bits):
    """-128 times -1 is 128, which int8 lacks."""
    x = torch.tensor([-128, 127], dtype=torch.int8)[:, None].expand(2, 512).contiguous()
    trits = torch.tensor([-1, 1])[:, None].expand(2, 512)
    assert product(x, trits, bits).tolist() == [[128 * 512, -128 * 512], [-127 * 512, 127 * 512]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16], ids=str)
@pytest.mark.parametrize("bits, per_byte", [(2, 4), (1.6, 5)])
def test_every_pattern_of_a_byte(bits, per_byte, dtype):
    """Sixteen rows of sixteen bytes; with float16, sums of so few small integers are exact."""
    patterns = np.stack(np.meshgrid(*[[-1, 0, 1]] * per_byte, indexing="ij"), -1).reshape(-1, per_byte)
    trits = torch.zeros(16, 320 if bits == 1.6 else 256, dtype=torch.int64)
    flat = torch.from_numpy(np.resize(patterns, (256, per_byte)))
    trits[:, : 16 * per_byte] = flat.reshape(16, -1)
    x = (torch.arange(trits.shape[1]) * 37 % 31 - 15).to(dtype)[None]
    assert torch.equal(product(x, trits, bits).long(), x.long() @ trits.T)


@pytest.mark.parametrize("bits, columns", [(2, 512), (1.6, 648)])
@pytest.mark.parametrize(
    "tokens, dtype",
    [(8, torch.float16), (2, torch.bfloat16), (1, torch.float32)],
)
def test_floats(tokens, dtype, bits, columns):
    """A product passes through fewer additions than there are columns; digits are at most two, so three times |x|."""
    x, trits, scale = inputs(tokens, columns, dtype), random(16, columns), 0.375
    y, exact = product(x, trits, bits, scale), scale * (x.double() @ trits.double().T)
    error = scale * columns * UNIT * 3 * x.double().abs().sum(-1, keepdim=True)
    assert ((y.double() - exact).abs() <= error + (exact.abs() + error) * torch.finfo(dtype).eps / 2).all()


@pytest.mark.parametrize("bits", COLUMNS)
def test_stages_and_sums_are_used_again(bits):
    """Two tiles for one of the four blocks of threads, of two slices each, through two stages."""
    columns = 512 if bits == 2 else 640
    x, trits = inputs(1, columns, torch.int8), random(16 * 4 + 1, columns)
    assert torch.equal(product(x, trits, bits, per_stage=1, stages=2).long(), x.long() @ trits.T)


def test_multipliers_share_a_slice():
    x, trits = inputs(3, 1280, torch.int8), random(16, 1280)
    assert torch.equal(product(x, trits, 1.6, warps=2, per_stage=2).long(), x.long() @ trits.T)


@pytest.mark.parametrize("bits", COLUMNS)
def test_bitnet_in_float32_is_that_of_the_cpu_bit_for_bit(bits):
    x, trits = inputs(3, 512, torch.float32), random(18, 512)
    x[1] = 0
    x[2, 7] = 1e-7
    expected = cpu.bit_linear(x.numpy(), cpu.pack_tiles(trits.numpy()), 0.7)
    assert torch.equal(product(x, trits, bits, 0.7, rounds=True), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bitnet_in_half_precision_is_rounded_at_the_end(dtype):
    x, trits = inputs(2, 256, dtype), random(16, 256)
    expected = cpu.bit_linear(x.float().numpy(), cpu.pack_tiles(trits.numpy()), 0.7)
    assert torch.equal(product(x, trits, 2, 0.7, rounds=True), torch.from_numpy(expected).to(dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("rounds", [False, True])
def test_what_is_not_finite_stays_in_its_row(rounds):
    x, trits = inputs(3, 320, torch.bfloat16), random(4, 320)
    clean = product(x[:1], trits, 1.6, rounds=rounds)
    x[1, 100], x[2, 7] = float("inf"), float("nan")
    y = product(x, trits, 1.6, rounds=rounds)
    assert not y[1:].isfinite().any() and torch.equal(y[:1], clean)


def test_as_they_are_called():
    qt = quantize_ternary(torch.randn(3, 256, generator=torch.Generator().manual_seed(4)), bits=2)
    x, weight = inputs(1, 256, torch.int8).to(DEVICE), qt.packed.view(3, 64).to(DEVICE)
    assert torch.equal(ternary.ternary_matmul(x, weight).cpu().long(), x.cpu().long() @ qt.codes().long().T)
    x = inputs(1, 256, torch.float32)
    expected = cpu.bit_linear(x.numpy(), cpu.pack_tiles(qt.codes().numpy()), 0.5)
    assert torch.equal(ternary.bit_linear(x.to(DEVICE), weight, 0.5).cpu(), torch.from_numpy(expected))


def test_rows_are_filled_up_and_paid_for():
    assert pack_rows(random(2, 320)).shape == (2, 64) and pack_rows(random(2, 321)).shape == (2, 128)
    assert pack_rows(random(1, 8192)).numel() * 8 / 8192 == 1.625


@pytest.mark.parametrize(
    "x, weight, bits, message",
    [
        (torch.zeros(1, 256).half(), torch.zeros(2, 64, dtype=torch.uint8), 3, "bits=3"),
        (torch.zeros(1, 128).half(), torch.zeros(2, 64, dtype=torch.uint8), 2, "128 inputs are no multiple of 256"),
        (torch.zeros(1, 12).half(), torch.zeros(2, 64, dtype=torch.uint8), 1.6, "12 inputs are no multiple of 8"),
        (torch.zeros(1, 256).half(), torch.zeros(2, 52, dtype=torch.uint8), 1.6, r"pass uint8 \(N, 64\)"),
        (torch.zeros(1, 256).half(), torch.zeros(128, dtype=torch.uint8), 2, r"pass uint8 \(N, 64\)"),
        (torch.zeros(9, 256).half(), torch.zeros(2, 64, dtype=torch.uint8), 2, "pass 1 to 8"),
        (torch.zeros(1, 256).int(), torch.zeros(2, 64, dtype=torch.uint8), 2, "int32"),
    ],
)
def test_what_is_refused(x, weight, bits, message):
    with pytest.raises(ValueError, match=message):
        ternary.ternary_matmul(x.to(DEVICE), weight.to(DEVICE), bits)


@pytest.mark.parametrize("trits", [[[2, 0]], [[0.5, 0]], [0, 1], [[float("nan"), 0]]], ids=str)
def test_what_is_no_trit(trits):
    with pytest.raises(ValueError, match=r"no matrix of -1, 0, 1"):
        pack_rows(torch.tensor(trits))
