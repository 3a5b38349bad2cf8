"""Products straight from GGUF blocks, from MXFP4 and from trits, at real sizes; of each also twenty in a row."""

import numpy as np
import pytest
import torch

from qlearn.formats.gguf_blocks import BLOCK_TYPES, dequantize, unpack
from qlearn.formats.integers import Integers
from qlearn.formats.microscaling import MXFP4
from qlearn.kernels.cpu import ternary as cpu
from qlearn.kernels.cuda import gguf, mxfp4_matmul, ternary
from tests.gpu.bounds import UNIT, check, check_product

pytestmark = pytest.mark.usefixtures("capability_9", "poisoned")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
DISTINCT = 64  # rows; a matrix repeats them in random order, since the CPU takes long to make them


def inputs(tokens, columns, dtype):
    if dtype == torch.int8:
        return torch.randint(-128, 128, (tokens, columns), device="cuda").to(dtype)
    return torch.randn(tokens, columns, device="cuda").to(dtype)


def shuffled(rows, *tensors):
    """Rows of the tensors, the same of each, on the GPU. An overlapping kernel may read them: they are finished."""
    which = torch.randint(0, DISTINCT, (rows,))
    tensors = [tensor[which].to("cuda") for tensor in tensors]
    torch.cuda.synchronize()
    return tensors


# --- GGUF and MXFP4 ---


def offsets(blocks, block_type):
    """How far codes lie above the weights, for each weight: what is taken off once a sum has been made."""
    fields = {name: number.astype(np.float64) for name, number in unpack(blocks, block_type).items()}
    if block_type == "MXFP4":
        found = np.zeros((len(fields["e"]), 1))
    elif block_type == "Q4_K":
        found = fields["dmin"][:, None] * fields["mins"]
    elif block_type == "Q6_K":
        found = 32 * fields["d"][:, None] * fields["scales"]
    else:
        found = {"Q4_0": 8, "Q8_0": 128}[block_type] * fields["d"][:, None]
    weights = BLOCK_TYPES[block_type].weights
    return abs(found).repeat(weights // found.shape[1], 1).reshape(len(blocks), -1)


def random_blocks(columns, block_type, rng):
    """Random bytes, with scales of usual size: (bytes, weights, offsets), of DISTINCT rows."""
    kind, at = BLOCK_TYPES[block_type], 0
    raw = rng.integers(0, 256, (DISTINCT, columns // kind.weights, kind.nbytes), np.uint8)
    for field in kind.layout:
        if field.name in ("d", "dmin"):
            scale = rng.random((*raw.shape[:2], 1)) * 0.01 + 0.001
            raw[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
        if field.name == "e":
            raw[..., at] = rng.integers(118, 124, raw.shape[:2])
        at += field.size
    raw = raw.reshape(DISTINCT, -1)
    return tuple(torch.from_numpy(a) for a in (raw, dequantize(raw, block_type), offsets(raw, block_type)))


def random_planar(columns, rng):
    """MXFP4 in two arrays: (codes, scales, weights), of DISTINCT rows."""
    codes = rng.integers(0, 16, (DISTINCT, columns), np.uint8)
    scales = rng.integers(118, 124, (DISTINCT, columns // 32), np.uint8)
    packed = torch.from_numpy(MXFP4.element.pack(codes)).view(DISTINCT, -1)
    return packed, torch.from_numpy(scales), torch.from_numpy(MXFP4.dequantize(codes, scales))


SHAPES = [(1, 2048), (1000, 6144), (4099, 4096)]
BLOCK_CASES = [
    ("Q4_0", 1, HALF),
    ("Q4_K", 2, BFLOAT),
    ("Q8_0", 1, FLOAT),
    ("Q6_K", 5, HALF),
    ("MXFP4", 8, BFLOAT),
    ("two arrays", 1, HALF),
]


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("kind, tokens, dtype", BLOCK_CASES)
def test_blocks(kind, tokens, dtype, rows, columns, rng):
    """A product passes through fewer than 64 additions inside its block of 32, then one for each block, at most."""
    x, above = inputs(tokens, columns, dtype), None
    if kind == "two arrays":
        codes, scales, weight = shuffled(rows, *random_planar(columns, rng))
        ys = [mxfp4_matmul.mxfp4_matmul(x, codes, scales, overlap=overlap) for overlap in (False, *[True] * 20)]
    else:
        blocks, weight, above = shuffled(rows, *random_blocks(columns, kind, rng))
        ys = [gguf.gguf_matmul(x, blocks, kind, overlap=overlap) for overlap in (False, *[True] * 20)]
    assert ys[0].dtype == dtype
    check_product(ys[0], x, weight, 64 + columns / 32, above)
    assert all(torch.equal(y, ys[0]) for y in ys)


# --- trits ---


def random_trits(columns, bits, rng):
    """(packed, trits), of DISTINCT rows."""
    trits = torch.from_numpy(rng.integers(-1, 2, (DISTINCT, columns)))
    if bits == 1.6:
        return ternary.pack_rows(trits), trits
    return Integers(2).pack(Integers(2).to_unsigned(trits)).view(DISTINCT, -1), trits


def several(product, *args):
    """The same product many times in a row, overlapping; it has to give the same bits."""
    y = product(*args)
    others = [product(*args, overlap=True) for _ in range(20)]
    assert all(torch.equal(other, y) for other in others)
    return y


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits", [2, 1.6])
def test_integers_times_trits(bits, rows, columns, rng):
    packed, trits = shuffled(rows, *random_trits(columns, bits, rng))
    for tokens in (1, 8):
        x = inputs(tokens, columns, torch.int8)
        y = several(ternary.ternary_matmul, x, packed, bits)
        assert y.dtype == torch.int32 and torch.equal(y.double(), x.double() @ trits.double().T)


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits, tokens, dtype", [(2, 1, HALF), (1.6, 3, FLOAT)])
def test_floats_times_trits(bits, tokens, dtype, rows, columns, rng):
    """A product passes through fewer additions than there are columns; digits are at most two, so three times |x|.

    That is a wide bound. Small whole numbers leave no room: their sums are exact.
    """
    packed, trits = shuffled(rows, *random_trits(columns, bits, rng))
    x, scale = inputs(tokens, columns, dtype), 0.375
    y = several(ternary.ternary_matmul, x, packed, bits, scale)
    size = x.double().abs().sum(-1, keepdim=True)
    check(y, scale * (x.double() @ trits.double().T), scale * columns * UNIT * 3 * size)
    x = torch.randint(-15, 16, (tokens, columns), device="cuda").to(dtype)
    y = several(ternary.ternary_matmul, x, packed, bits, scale)
    assert torch.equal(y, (scale * (x.double() @ trits.double().T)).to(dtype))


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("bits, tokens, dtype", [(2, 1, BFLOAT), (1.6, 2, FLOAT)])
def test_a_layer_of_bitnet(bits, tokens, dtype, rows, columns, rng):
    """That of the CPU bit for bit, which is made in float32 and rounded at the end."""
    packed, trits = shuffled(rows, *random_trits(columns, bits, rng))
    x, beta = inputs(tokens, columns, dtype), 0.7
    y = several(ternary.bit_linear, x, packed, beta, bits)
    expected = cpu.bit_linear(x.float().cpu().numpy(), cpu.pack_tiles(trits.cpu().numpy()), beta)
    assert torch.equal(y.cpu(), torch.from_numpy(expected).to(dtype))
