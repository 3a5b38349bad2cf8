"""Products straight from GGUF blocks and MXFP4: against the readable dequantization, within a bound that is derived."""

import numpy as np
import pytest
import torch

from qlearn.formats.gguf_blocks import BLOCK_TYPES, dequantize, quantize, unpack
from qlearn.formats.microscaling import MXFP4
from qlearn.kernels.cuda import SIMULATED, gguf, mxfp4_matmul, row_stream
from qlearn.kernels.cuda.block_codes import BLOCKS
from qlearn.kernels.cuda.block_products import GROUP, recipe_of

DEVICE = "cpu" if SIMULATED else "cuda"
UNIT = 2.0**-23  # tensor cores cut off what float32 does not hold, where others round: twice 2**-24
SMALLEST = {name: GROUP * blocks.align for name, blocks in BLOCKS.items()}  # columns of the shortest row
COMPARED = torch.float16, torch.bfloat16, torch.float32


def random(rows, columns, block_type, seed=0):
    weight = np.random.RandomState(seed).standard_normal((rows, columns)).astype(np.float32)
    return torch.from_numpy(quantize(weight, block_type))


def inputs(tokens, columns, dtype=torch.float16, seed=1):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(blocks, block_type):
    """How far codes lie above the weights: a number for each weight, float64 (rows, columns)."""
    fields = {name: number.astype(np.float64) for name, number in unpack(blocks.numpy(), block_type).items()}
    if block_type == "MXFP4":
        found = np.zeros((len(fields["e"]), 1))
    elif block_type == "Q4_K":
        found = fields["dmin"][:, None] * fields["mins"]
    elif block_type == "Q6_K":
        found = 32 * fields["d"][:, None] * fields["scales"]
    else:
        found = {"Q4_0": 8, "Q8_0": 128}[block_type] * fields["d"][:, None]
    weights = BLOCK_TYPES[block_type].weights
    return torch.from_numpy(abs(found).repeat(weights // found.shape[1], 1).reshape(len(blocks), -1))


def check(y, x, weight, above=0.0):
    """The error of float32 sums of (weight + above) * x and of above * x, and of rounding to the dtype of y.

    A product passes through fewer than 64 additions inside its block of 32, then one for each block, at most.
    """
    x, weight = x.double(), weight.double()
    exact, magnitude = x @ weight.T, x.abs() @ (weight.abs() + 2 * above).T
    error = (64 + x.shape[1] / 32) * UNIT * magnitude
    bound = error + (exact.abs() + error) * torch.finfo(y.dtype).eps / 2 + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape and ((y.cpu().double() - exact).abs() <= bound).all()


def product(x, blocks, block_type, blocks_of_threads=None, **options):
    x, blocks = x.to(DEVICE), blocks.to(DEVICE)
    y = torch.full((len(x), len(blocks)), float("nan"), dtype=x.dtype, device=DEVICE)
    if blocks_of_threads is None:
        for run in gguf.prepared(x, blocks, y, block_type, warps=1, **options):
            run()
        return y
    recipe = recipe_of(block_type, BLOCKS[block_type], x.dtype, len(x), warps=1)
    plan = row_stream.plan_for(recipe, len(blocks), x.shape[1], len(x), warps=1, **options)
    row_stream.prepare(recipe, plan._replace(blocks=blocks_of_threads), blocks, blocks, x, y)()
    return y


def check_product(x, blocks, block_type, **options):
    weight = torch.from_numpy(dequantize(blocks.numpy(), block_type))
    check(product(x, blocks, block_type, **options), x, weight, offsets(blocks, block_type))


@pytest.mark.parametrize(
    "tokens, dtype",
    [
        (1, torch.float16),
        (2, torch.float16),
        (3, torch.bfloat16),
        (8, torch.float16),
        (1, torch.float32),
        (5, torch.float32),
    ],
)
def test_rows_of_x(tokens, dtype):
    check_product(inputs(tokens, 256, dtype), random(3, 256, "Q4_0"), "Q4_0")


@pytest.mark.parametrize("block_type", ["Q8_0", "Q4_K", "MXFP4"])
def test_five_rows_of_x_weigh_block_by_block(block_type):
    check_product(inputs(5, SMALLEST[block_type]), random(2, SMALLEST[block_type], block_type), block_type)


@pytest.mark.parametrize("rows", [1, 15, 17])
def test_tiles_that_are_not_full(rows):
    check_product(inputs(1, 256), random(rows, 256, "Q4_K"), "Q4_K")


@pytest.mark.parametrize("tiles, slices", [(3, 2), (6, 1)])
def test_stages_and_sums_are_used_again(tiles, slices):
    """All by one block of threads, through two stages, so that each barrier goes through several phases."""
    columns = 256 * slices
    x, blocks = inputs(1, columns), random(16 * tiles - 3, columns, "Q4_0")
    check_product(x, blocks, "Q4_0", blocks_of_threads=1, per_stage=1, stages=2)


def test_a_slice_that_is_not_full():
    check_product(inputs(1, 768), random(3, 768, "Q4_0"), "Q4_0", per_stage=2)


def test_multipliers_share_a_slice():
    x, blocks = inputs(1, 768).to(DEVICE), random(16, 768, "Q4_0").to(DEVICE)
    y = torch.full((1, 16), float("nan"), dtype=x.dtype, device=DEVICE)
    for run in gguf.prepared(x, blocks, y, "Q4_0", warps=2, per_stage=1):
        run()
    check(y, x.cpu(), torch.from_numpy(dequantize(blocks.cpu().numpy())), offsets(blocks.cpu(), "Q4_0"))


@pytest.mark.parametrize("block_type", BLOCKS)
def test_random_bytes(block_type):
    """Every code and every scale there is; only float16 that are not finite are left out."""
    columns, kind = SMALLEST[block_type], BLOCK_TYPES[block_type]
    raw = np.random.RandomState(2).randint(0, 256, (4, columns // kind.weights, kind.nbytes)).astype(np.uint8)
    at = 0
    for field in kind.layout:
        if field.name in ("d", "dmin"):
            raw[..., at + 1] &= 0xBF  # of the exponent, the highest bit
        if field.name == "e":
            raw[..., at] = raw[..., at] % 20 + 110
        at += field.size
    check_product(inputs(1, columns), torch.from_numpy(raw.reshape(4, -1)), block_type)


def test_scales_and_codes_at_their_ends():
    """Rows of blocks that are all alike: scales of zero, negative, the largest, the smallest, each with four bytes."""
    rows = []
    for d in (0.0, -0.5, 65504.0, 2.0**-24):
        for codes in (0x00, 0xFF, 0x0F, 0xF0):
            rows.append(np.tile(np.concatenate([np.float16([d]).view(np.uint8), np.full(16, codes, np.uint8)]), 8))
    check_product(inputs(1, 256, torch.float32), torch.from_numpy(np.stack(rows)), "Q4_0")


def test_exponents_of_mxfp4_at_their_ends():
    """e = 0 is 2**-127, which float32 holds without its leading one."""
    blocks = random(2, 512, "MXFP4")
    blocks[0, ::17], blocks[1, ::17] = 0, 220
    weight = torch.from_numpy(dequantize(blocks.numpy(), "MXFP4"))
    x = torch.full((1, 512), 2.0**10)
    check(product(x, blocks, "MXFP4"), x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_that_float16_does_not_hold(dtype):
    x = inputs(4, 256, torch.float32) * torch.tensor([1e-37, 1e-20, 1e20, 1e30])[:, None]
    check_product(x.to(dtype), random(2, 256, "Q8_0"), "Q8_0")


def test_one_large_input_beside_small_ones():
    """Scaled by the largest, the others are still there to 2**-40 of it: far below a rounding of the sum."""
    x = inputs(1, 256, torch.bfloat16)
    x[0, 3] = 2.0**20
    check_product(x, random(16, 256, "Q8_0"), "Q8_0")


def test_zeros():
    assert (product(torch.zeros(2, 256), random(3, 256, "Q4_K"), "Q4_K") == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", COMPARED, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype):
    x, blocks = inputs(4, 256, dtype), random(2, 256, "Q4_0")
    x[1, 100], x[2, 7] = float("inf"), float("nan")
    y, finite = product(x, blocks, "Q4_0"), [0, 3]
    assert not y[1:3].isfinite().any()
    check(y[finite], x[finite], torch.from_numpy(dequantize(blocks.numpy())), offsets(blocks, "Q4_0"))


def test_as_it_is_called():
    x, blocks = inputs(1, 256).to(DEVICE), random(2, 256, "Q4_0").to(DEVICE)
    weight = torch.from_numpy(dequantize(blocks.cpu().numpy()))
    check(gguf.gguf_matmul(x, blocks), x.cpu(), weight, offsets(blocks.cpu(), "Q4_0"))


def test_no_rows_of_the_weight():
    assert gguf.gguf_matmul(inputs(2, 256).to(DEVICE), random(1, 256, "Q4_0")[:0].to(DEVICE)).shape == (2, 0)


def test_inputs_are_parted_when_shared_memory_is_too_small():
    recipe = recipe_of("Q4_0", BLOCKS["Q4_0"], torch.float16, 8)
    assert row_stream.plan_for(recipe, 4096, 14336, 8) is None
    x = torch.zeros(8, 14336, dtype=torch.float16)
    assert len(gguf.prepared(x, torch.zeros(16, 14336 // 32 * 18, dtype=torch.uint8), torch.zeros(8, 16).half())) == 2


@pytest.mark.parametrize(
    "x, blocks, block_type, message",
    [
        (torch.zeros(1, 256), torch.zeros(2, 144), "Q4_0", "torch.float32 .* is no matrix of Q4_0 blocks"),
        (torch.zeros(1, 256), torch.zeros(2, 126, dtype=torch.uint8), "Q4_0", "has 144 bytes"),
        (torch.zeros(1, 256), torch.zeros(144, dtype=torch.uint8), "Q4_0", "no matrix of Q4_0"),
        (torch.zeros(1, 256), torch.zeros(2, 144, dtype=torch.uint8), "Q5_0", "no kernel for blocks of type 'Q5_0'"),
        (torch.zeros(1, 128), torch.zeros(2, 72, dtype=torch.uint8), "Q4_0", "128 inputs are no multiple of 256"),
        (torch.zeros(1, 256), torch.zeros(2, 136, dtype=torch.uint8), "MXFP4", "256 inputs are no multiple of 512"),
        (torch.zeros(1, 512), torch.zeros(2, 420, dtype=torch.uint8), "Q6_K", "512 inputs are no multiple of 2048"),
        (torch.zeros(9, 256), torch.zeros(2, 144, dtype=torch.uint8), "Q4_0", "pass 1 to 8 contiguous rows"),
        (torch.zeros(0, 256), torch.zeros(2, 144, dtype=torch.uint8), "Q4_0", "pass 1 to 8 contiguous rows"),
        (torch.zeros(256), torch.zeros(2, 144, dtype=torch.uint8), "Q4_0", "pass 1 to 8 contiguous rows"),
        (torch.zeros(1, 256).double(), torch.zeros(2, 144, dtype=torch.uint8), "Q4_0", "float64"),
        (torch.zeros(1, 512)[:, ::2], torch.zeros(2, 144, dtype=torch.uint8), "Q4_0", "contiguous"),
        (torch.zeros(1, 256), torch.zeros(289, dtype=torch.uint8)[1:].view(2, 144), "Q4_0", "multiples of 16"),
    ],
)
def test_what_is_refused(x, blocks, block_type, message):
    with pytest.raises(ValueError, match=message):
        gguf.gguf_matmul(x.to(DEVICE), blocks.to(DEVICE), block_type)


# --- MXFP4 in two arrays ---


def planar(rows, columns):
    codes, scales = MXFP4.quantize(np.random.RandomState(3).standard_normal((rows, columns)).astype(np.float32))
    packed = torch.from_numpy(MXFP4.element.pack(codes)).view(rows, columns // 2)
    return packed, torch.from_numpy(scales), codes


def planar_product(x, packed, scales):
    y = torch.full((len(x), len(packed)), float("nan"), dtype=x.dtype, device=DEVICE)
    for run in mxfp4_matmul.prepared(x.to(DEVICE), packed.to(DEVICE), scales.to(DEVICE), y, warps=1):
        run()
    return y.cpu()


@pytest.mark.parametrize("tokens, dtype", [(1, torch.float16), (5, torch.bfloat16)])
def test_mxfp4_in_two_arrays(tokens, dtype):
    packed, scales, codes = planar(17, 512)
    x = inputs(tokens, 512, dtype)
    check(planar_product(x, packed, scales), x, torch.from_numpy(MXFP4.dequantize(codes, scales.numpy())))


def test_a_scale_that_is_nan():
    packed, scales, _ = planar(2, 512)
    scales[1, 5] = 255
    assert planar_product(inputs(1, 512), packed, scales).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(
    "codes, scales, message",
    [
        (torch.zeros(2, 256), torch.zeros(2, 16, dtype=torch.uint8), "do not belong to 512 inputs"),
        (torch.zeros(2, 512, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.uint8), "two codes to a byte"),
        (torch.zeros(2, 256, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.uint8), "one for 32"),
        (torch.zeros(2, 256, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.uint8), "one for 32"),
    ],
)
def test_what_is_refused_of_mxfp4(codes, scales, message):
    with pytest.raises(ValueError, match=message):
        mxfp4_matmul.mxfp4_matmul(torch.zeros(1, 512, device=DEVICE), codes.to(DEVICE), scales.to(DEVICE))
