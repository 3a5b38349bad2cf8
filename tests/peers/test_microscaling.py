"""torchao's MX and NVFP4: the same codes and the same scales, and the few places where the two are meant to differ.

They differ on purpose in four places, each of which has its test here:

- A block whose scale would be 2**-127: torchao stores that, and divides by 2**-126. Its numbers come back at half size.
- A block with an amax of 2**127 or more, and a rule that doubles its scale: here the scale is held where the largest
  number is still a float32.
- RCEIL of torchao goes through a logarithm in float32, and takes an amax a hair above a power of two times the largest
  element for that power. The hardware, and this package, double the scale there.
- A scale of NVFP4 below 2**-6: torchao stores 2**-6, this package what E4M3 has below it, down to 2**-9.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("torchao", reason="make test-peers installs it")
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    nvfp4_quantize,
    per_tensor_amax_to_scale,
)

from qlearn.formats.microscaling import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
)
from tests.conformance.families import families
from tests.formats.oracles import EVERY_BF16

pytestmark = pytest.mark.peers
FORMATS = {
    MXFP8_E4M3: torch.float8_e4m3fn,
    MXFP8_E5M2: torch.float8_e5m2,
    MXFP6_E3M2: DTYPE_FP6_E3M2,
    MXFP6_E2M3: DTYPE_FP6_E2M3,
    MXFP4: torch.float4_e2m1fn_x2,
}
RULES = {rule: ScaleCalculationMode[rule.upper()] for rule in ("floor", "ceil", "even", "rceil")}
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
every_rule = pytest.mark.parametrize("rule", RULES)


def torchao(x, format, rule="floor"):
    """(codes as uint8, scales as uint8, the two as torchao returned them)."""
    scales, data = to_mx(x, FORMATS[format], 32, RULES[rule])
    codes = unpack_uint4(data) if format is MXFP4 else data
    return codes.view(torch.uint8).reshape(x.shape), scales.view(torch.uint8), data, scales


def everything():
    """float32 (blocks, 32): all families, all bfloat16, random bits, a million normal ones, none at the ends."""
    random = np.random.RandomState(0)
    every = EVERY_BF16.astype(np.float32)
    bits = random.randint(0, 2**32, 2**18, dtype=np.uint64).astype(np.uint32).view(np.float32)
    normal = torch.from_numpy(random.standard_normal(2**20)).bfloat16().float().numpy()
    x = np.concatenate([*(f.ravel() for f in families().values()), every, np.sort(every), bits, normal])
    x = torch.from_numpy(x[np.isfinite(x)].astype(np.float32))
    blocks = x[: len(x) // 32 * 32].view(-1, 32)
    amax = blocks.abs().amax(-1)
    return blocks[(amax == 0) | ((amax >= 2.0**-110) & (amax < 2.0**127))]


EVERYTHING = everything()


@every_rule
@every_format
def test_codes_and_scales(format, rule):
    codes, scales = format.quantize(EVERYTHING, rule)
    their_codes, their_scales, *_ = torchao(EVERYTHING, format, rule)
    assert len(EVERYTHING) > 40_000
    assert torch.equal(scales, their_scales)
    assert torch.equal(codes, their_codes)


@every_format
def test_bfloat16_tensors(format):
    x = EVERYTHING.bfloat16()
    codes, scales = format.quantize(x)
    their_codes, their_scales, *_ = torchao(x, format)
    assert torch.equal(scales, their_scales) and torch.equal(codes, their_codes)


@every_format
def test_dequantized(format):
    codes, scales, their_data, their_scales = torchao(EVERYTHING, format)
    theirs = to_dtype(their_data, their_scales, FORMATS[format], 32, torch.float32)
    assert torch.equal(format.dequantize(codes, scales), theirs)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
@every_format
def test_at_the_smallest_scale_torchao_divides_by_twice_of_it(format, rule):
    x = torch.linspace(-1, 1, 32).repeat(4, 1) * torch.tensor(
        [[2.0**-127], [2.0**-126], [1.5 * 2.0**-126], [2.0**-125]]
    )
    codes, scales = format.quantize(x, rule)
    their_codes, their_scales, *_ = torchao(x, format, rule)
    assert not scales.any() and not their_scales.any()
    assert torch.equal(format.quantize(x / 2, rule)[0], their_codes)
    assert not torch.equal(codes, their_codes)


@pytest.mark.parametrize("rule", ["ceil", "even", "rceil"])
@every_format
def test_at_the_largest_scale_torchao_may_leave_float32(format, rule):
    x = torch.full((1, 32), torch.finfo(torch.float32).max)
    their_codes, their_scales, *_ = torchao(x, format, rule)
    codes, scales = format.quantize(x, rule)
    assert torch.equal(their_scales, scales + 1)
    assert (
        format.dequantize(their_codes, their_scales).isinf().all() and format.dequantize(codes, scales).isfinite().all()
    )


@every_format
def test_rceil_of_torchao_trusts_a_logarithm(format):
    """ceil(log2(amax / largest)) is one too small when the quotient is a hair above a large power of two."""
    powers = torch.arange(-60, 61)
    amax = np.nextafter(np.float32(format.element.max) * 2.0 ** powers.numpy().astype(np.float32), np.float32(np.inf))
    x = torch.from_numpy(amax)[:, None] * torch.eye(1, 32)
    scales = format.quantize(x, "rceil")[1][:, 0].int()
    theirs = torchao(x, format, "rceil")[1][:, 0].int()
    assert torch.equal(scales, powers.int() + 128)
    assert set((scales - theirs).tolist()) == {0, 1} and torch.equal(scales[60:62], theirs[60:62])


@pytest.mark.parametrize("family", [name for name, x in families().items() if x.any()])
def test_nvfp4(family):
    compare_nvfp4(torch.from_numpy(families()[family]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_of_a_million_numbers(dtype):
    small = compare_nvfp4(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert not small


def compare_nvfp4(x):
    """Returns how many blocks have scales below 2**-6, which torchao raises to that; all others have to agree."""
    codes, scales, tensor_scale = NVFP4.quantize(x)
    their_tensor_scale = per_tensor_amax_to_scale(x.abs().max())
    their_scales, their_codes = nvfp4_quantize(x, 16, their_tensor_scale)
    their_scales, their_codes = their_scales.view(torch.uint8), unpack_uint4(their_codes).view(x.shape)
    assert torch.equal(tensor_scale, their_tensor_scale)
    common = scales >= 8  # the code of 2**-6
    assert torch.equal(scales.clamp(min=8), their_scales.view(scales.shape))
    agree = (codes == their_codes).view(*scales.shape, 16).all(-1)
    assert agree[common].all()
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=their_tensor_scale).dequantize(torch.float32)
    ours = NVFP4.dequantize(their_codes, their_scales.view(scales.shape), their_tensor_scale)
    assert torch.equal(ours, theirs)
    return int((~common).sum())


def test_nvfp4_keeps_small_blocks_that_torchao_coarsens():
    x = torch.full((2, 16), 2688.0)
    x[1] = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).repeat(2) * 2.0**-9
    assert compare_nvfp4(x) == 1
    tensor_scale = per_tensor_amax_to_scale(x.abs().max())
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale).dequantize(torch.float32)
    assert torch.equal(NVFP4.round(x), x)
    assert theirs[1].unique().tolist() == [0, 2.0**-7, 2.0**-6]
