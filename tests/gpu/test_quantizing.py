"""The kernels that quantize, at real sizes: against the readable methods on the CPU.

Not against those on the GPU: there torch multiplies by 1/7 where it should divide by 7, and a few scales differ.
"""

import pytest
import torch

import qlearn
from qlearn.formats.microscaling import MXFP4
from qlearn.kernels.cuda import fake_quant, gptq, mxfp4, rtn, sinq
from qlearn.methods.gptq import _Grids, _sweep, _upper_factor
from qlearn.rotation import hadamard
from qlearn.training.fake_quant import fake_quantize

pytestmark = pytest.mark.usefixtures("poisoned")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def weights(rows, columns, dtype=BFLOAT):
    """Rows and columns of different sizes."""
    sizes = (torch.rand(columns) + 0.5) * (torch.rand(rows, 1) + 0.5)
    return (torch.randn(rows, columns) * 0.02 * sizes).to(dtype)


# --- round to nearest ---


@pytest.mark.parametrize(
    "method, rows, columns, dtype, bits, group",
    [
        ("absmax", 4096, 4096, BFLOAT, 4, 64),
        ("zero_point", 4096, 4096, BFLOAT, 4, 64),
        ("zero_point", 1024, 4096, HALF, 3, 32),
        ("absmax", 1024, 4096, FLOAT, 8, 128),
        ("zero_point", 1024, 4096, FLOAT, 2, None),
        ("absmax", 3, 32 * 77, BFLOAT, 2, 32),
        ("absmax", 1023, 14336, BFLOAT, 3, None),
    ],
)
def test_round_to_nearest(method, rows, columns, dtype, bits, group):
    weight = weights(rows, columns, dtype)
    quantize = {"absmax": rtn.quantize_absmax, "zero_point": rtn.quantize_zero_point}[method]
    got = quantize(weight.to("cuda"), bits, group)
    expected = qlearn.quantize(weight, method, bits=bits, group_size=group)
    assert repr(got) == repr(expected)
    for name in ("packed", "scales", "zeros"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a.cpu(), b)), name


# --- SINQ ---


@pytest.mark.usefixtures("capability_8")
@pytest.mark.parametrize(
    "rows, columns, dtype",
    [
        (1024, 1024, HALF),
        (5003, 512, BFLOAT),
        (777, 512, FLOAT),
    ],
)
def test_sinq(rows, columns, dtype):
    """mu1 and mu2 are good to 1e-6, so a scale may be rounded to its neighbour; and codes differ only at a tie.

    Numbers that differ by 1e-6 are rounded to different float16, whose neighbours are 2**-10.5 apart on the average,
    in about one case of 700. A code then differs if what is rounded is so near a tie as the scale makes it move.
    """
    weight = weights(rows, columns, dtype)
    got, again = (sinq.quantize_sinq(weight.to("cuda"), 4, 64) for _ in range(2))
    expected = qlearn.quantize(weight, "sinq", bits=4, group_size=64)
    assert repr(got) == repr(expected)
    for name, tensor in got.state_tensors().items():
        assert torch.equal(tensor, again.state_tensors()[name]), name  # a race would show
    for name in ("scales", "column_scales"):
        a, b = getattr(got, name).cpu(), getattr(expected, name)
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=2**-9.9, atol=2**-24), name
        assert (a != b).float().mean() <= 1 / 200, name
    assert (got.zeros is None) == (expected.zeros is None)
    codes, others = got.codes().cpu().float(), expected.codes().float()
    zeros, scales = (t.float().repeat_interleave(64, 1) for t in (expected.zero_points(), expected.scales))
    assert (got.zero_points().cpu() != expected.zero_points()).float().mean() <= 1 / 200
    before = weight.float() / expected.column_factors().float() / scales + zeros  # what is rounded to a code
    same_zeros = got.zero_points().cpu().float().repeat_interleave(64, 1) == zeros
    differ = (codes != others) & same_zeros
    assert differ.float().mean() <= 1e-4
    assert ((codes - others)[differ].abs() == 1).all()
    moves = 2 * 2**-9.9 * (before - zeros).abs() + 1e-4
    tie = (codes + others) / 2
    assert ((before - tie).abs() <= moves)[differ].all()
    error, usual = ((q.dequantize().cpu() - weight.float()).norm() for q in (got, expected))
    assert abs(error / usual - 1) <= 1e-4


# --- MXFP4 ---


@pytest.mark.parametrize(
    "rows, columns, dtype, size",
    [
        (256, 4096, BFLOAT, 32),
        (257, 4096, HALF, 64),
        (31, 14336, FLOAT, 128),
        (64, 4096, BFLOAT, None),
    ],
)
def test_mxfp4(rows, columns, dtype, size):
    x = torch.randn(rows, columns).to(dtype) * torch.rand(rows, 1).to(dtype) * 3
    packed, scales = mxfp4.quantize_mxfp4(x.to("cuda"), size)
    codes, expected = MXFP4.quantize(hadamard(x.float(), size) if size else x.float())
    assert torch.equal(scales.cpu().view(torch.uint8), expected)
    assert torch.equal(packed.cpu().flatten(), MXFP4.element.pack(codes))


# --- fake quantization ---


@pytest.mark.parametrize(
    "rows, columns, dtype, bits, group, scale_gradient",
    [
        (1024, 4096, BFLOAT, 4, 32, False),
        (1024, 4096, FLOAT, 4, 64, True),
        (1023, 512, HALF, 2, 128, True),
    ],
)
def test_fake_quantization(rows, columns, dtype, bits, group, scale_gradient):
    weight, gradient = weights(rows, columns, dtype), torch.randn(rows, columns).to(dtype)
    values = fake_quant.signed_absmax_values(weight.to("cuda"), bits, group)
    got = fake_quant.signed_absmax_gradient(
        weight.to("cuda"), gradient.to("cuda"), bits, group, scale_gradient=scale_gradient
    ).cpu()
    readable = weight.clone().requires_grad_()
    expected = fake_quantize(readable, "signed_absmax", bits, group, scale_gradient=scale_gradient)
    expected.backward(gradient)
    assert values.dtype == dtype and torch.equal(values.cpu(), expected.detach())
    if not scale_gradient:
        assert torch.equal(got, readable.grad)
        return
    # a sum of n products, each at most g (half + 1), is off by n rounding errors of it at most, here and there
    expected, half = readable.grad.double(), 2 ** (bits - 1)
    largest = gradient.double().abs().unflatten(1, (-1, group)).amax(-1, keepdim=True) * (half + 1) * group / half
    bound = 2 * group * 2.0**-24 * largest.expand(-1, -1, group).flatten(1) + torch.finfo(dtype).eps * expected.abs()
    assert ((got.double() - expected).abs() <= bound).all()


# --- GPTQ's block ---


@pytest.mark.usefixtures("capability_8")
@pytest.mark.parametrize(
    "rows, columns, bits, sym, group, late",
    [
        (4096, 128, 4, False, 128, True),
        (4096, 128, 4, False, 64, True),
        (14336, 128, 4, True, 128, True),
        (1023, 96, 3, False, 32, False),
    ],
)
def test_gptq_block(rows, columns, bits, sym, group, late):
    weight, x = torch.randn(rows, columns), torch.randn(4 * columns, columns) @ torch.randn(columns, columns)
    order = torch.arange(columns)[None]
    U = _upper_factor((x.T @ x)[None] / len(x), order, 0.01, [len(x)])[0].contiguous()
    grids = _Grids(weight[None], bits, group, sym, clip="minmax", scale_dtype=torch.float16)
    scales, zeros = (torch.full((columns // group, rows), float("nan")) for _ in range(2))
    if not late:
        scales, zeros = grids.scales[0].T.contiguous(), grids.zeros[0].T.contiguous()
    codes = torch.full((columns, rows), 99, dtype=torch.int8 if sym else torch.uint8)
    given = (
        weight.T.contiguous(),
        U,
        (order[0] // group).int(),
        scales,
        zeros,
        codes,
        torch.full_like(weight.T, torch.nan),
    )
    given = [tensor.contiguous().to("cuda") for tensor in given]
    gptq.gptq_block(*given, bits=bits, sym=sym, late=late, group_size=group)
    *_, scales, zeros, codes, errors = (tensor.cpu() for tensor in given)

    # Whatever the grids are: weights and values differ by the errors, W - Q = Err^T U. A row of float32: each column
    # takes as many multiply-adds as there are columns before it, then a product, a difference and a quotient.
    U = U.double().triu()
    values = ((codes.double() - zeros.double().repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T
    off = errors.T.double() @ U - (weight.double() - values)
    size = weight.double().abs() + values.abs() + errors.T.double().abs() @ U.abs()
    assert (off.abs() <= (columns + 4) * 2.0**-24 * size).all()
    # and each weight, as it was when its turn came, has the nearest code, but at the ends of the grid
    steps = (errors.double() * U.diagonal()[:, None] / scales.double().repeat_interleave(group, 0)).abs()
    inside = (codes > grids.low) & (codes < grids.high)
    assert (steps[inside] <= 0.5 + 1e-4).all()
    # The same as the readable loop, but for rows in which a weight lay at a tie: there the rest differs, too.
    expected = _sweep(weight[None], U.float()[None], order, grids, late, [0])[0]
    same = (expected == codes.T) & (grids.scales[0] == scales.T).repeat_interleave(group, 1)
    same &= (grids.zeros[0] == zeros.T).repeat_interleave(group, 1)
    assert same.all(1).float().mean() >= 0.995
