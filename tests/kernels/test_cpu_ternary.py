"""The product without multiplications: every kernel against NumPy's 64-bit integers, with the largest numbers."""

import numpy as np
import pytest

from qlearn.formats.integers import TRIT
from qlearn.kernels.cpu import ternary
from qlearn.kernels.cpu.ternary import LANES, MAX_IN_FEATURES, TILE, bit_linear, by_adding, pack_tiles, ternary_matmul

TOKENS = [0, 1, 2, 8, 9, 16, 17, 33, 64, 65, 130]
SHAPES = [
    (1, 1),
    (3, 4),
    (2, 5),
    (5, 6),
    (7, 79),  # a byte less than a tile of 16
    (7, 80),
    (7, 81),
    (4, 240),  # three tiles: as many as 16 bits can hold
    (4, 245),
    (33, 768),
    (0, 10),
    (3, 0),
]


def random(tokens, out, columns, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.integers(-128, 128, (tokens, columns)).astype(np.int8)
    return x, generator.integers(-1, 2, (out, columns)).astype(np.int8)


def product(x, trits):
    return x.astype(np.int64) @ trits.T.astype(np.int64)


@pytest.fixture(params=[5, 4])
def per_byte(request):
    return request.param


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("out, columns", SHAPES)
def test_random_numbers(tokens, out, columns, per_byte):
    x, trits = random(tokens, out, columns)
    y = ternary_matmul(x, pack_tiles(trits, per_byte), per_byte)
    assert y.dtype == np.int32 and y.flags.c_contiguous
    assert np.array_equal(y, product(x, trits))


def test_adding_one_by_one():
    x, trits = random(3, 4, 21)
    assert np.array_equal(by_adding(x, trits), product(x, trits))
    assert by_adding(x, trits).dtype == np.int32


@pytest.mark.parametrize("tokens", LANES)
@pytest.mark.parametrize("columns", [5 * 16 * 3, 4 * 16 * 3, 5000])
@pytest.mark.parametrize("number", [-128, 127])
@pytest.mark.parametrize("trit", [-1, 1])
def test_the_largest_sums(tokens, columns, number, trit, per_byte):
    """-128 times -1 is 128, which int8 lacks; and each sum of 16 bits is as full as it can get."""
    x = np.full((tokens, columns), number, np.int8)
    y = ternary_matmul(x, pack_tiles(np.full((3, columns), trit), per_byte), per_byte)
    assert (y == number * trit * columns).all()


def test_every_number_meets_every_trit(per_byte):
    x = np.arange(-128, 128).astype(np.int8)[:, None]
    y = ternary_matmul(x, pack_tiles([[-1], [0], [1]], per_byte), per_byte)
    assert np.array_equal(y, np.stack([-np.arange(-128, 128), np.zeros(256), np.arange(-128, 128)], 1))


def test_every_byte_is_looked_up(per_byte):
    """All patterns of the trits in a byte, and inputs from which each of them can be told."""
    trits = np.stack(np.meshgrid(*[[-1, 0, 1]] * per_byte, indexing="ij"), -1).reshape(-1, per_byte)
    x = (3 ** np.arange(per_byte, dtype=np.int8))[None]
    y = ternary_matmul(x, pack_tiles(trits, per_byte), per_byte)
    assert np.array_equal(y, product(x, trits)) and len(np.unique(y)) == 3**per_byte


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("out", [0, 1, 5, 64])
def test_threads_share_the_rows(threads, out, per_byte):
    x, trits = random(9, out, 100)
    y = ternary_matmul(x, pack_tiles(trits, per_byte), per_byte, threads)
    assert np.array_equal(y, product(x, trits))


def test_arrays_that_are_not_contiguous(per_byte):
    x, trits = random(20, 6, 50)
    tiles = pack_tiles(trits[::2].copy(order="F"), per_byte)
    assert np.array_equal(ternary_matmul(np.asfortranarray(x)[::-1], tiles, per_byte), product(x[::-1], trits[::2]))


def in_numpy(x, trits, beta):
    """The layer, step by step."""
    scale = np.float32(127) * (1 / np.maximum(np.abs(x).max(-1, keepdims=True, initial=0), np.float32(1e-5)))
    codes = np.rint(x * scale)
    return product(codes, trits).astype(np.float32) * (np.float32(beta) / scale)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("columns", [1, 81, 768])
def test_the_whole_layer(tokens, columns, per_byte):
    _, trits = random(0, 7, columns)
    x = (np.random.default_rng(2).standard_normal((tokens, columns)) ** 3).astype(np.float32)
    for token, size in enumerate([0, 1e-30, 1e-6, 1e30][:tokens]):
        x[token] *= np.float32(size)
    y = bit_linear(x, pack_tiles(trits, per_byte), 0.37, per_byte)
    assert y.dtype == np.float32 and np.array_equal(y, in_numpy(x, trits, 0.37))


def test_ties_go_to_the_even_number(per_byte):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)
    y = bit_linear(x, pack_tiles(np.eye(7), per_byte), 1.0, per_byte)
    assert y.tolist() == [[127, 0, 2, 2, 0, -2, 126]]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 3])
def test_a_token_that_is_no_number_leaves_the_others_alone(bad, token):
    x = np.random.default_rng(3).standard_normal((5, 20)).astype(np.float32)
    expected = bit_linear(x, pack_tiles(np.ones((3, 20))), 1.0)
    x[token, 7] = bad
    y = bit_linear(x, pack_tiles(np.ones((3, 20))), 1.0)
    assert np.isnan(y[token]).all()
    assert np.array_equal(np.delete(y, token, 0), np.delete(expected, token, 0))


def test_the_layer_takes_float32_alone():
    with pytest.raises(ValueError, match=r"inputs are float64 \(2, 8\); give a matrix \(tokens, in\) of float32"):
        bit_linear(np.zeros((2, 8)), pack_tiles(np.zeros((3, 8))), 1.0)


def test_the_bytes_are_those_of_the_format():
    _, trits = random(0, 3, 5 * TILE * 2)
    tiles = pack_tiles(trits)
    assert tiles.shape == (2, 3, TILE)
    assert np.array_equal(tiles.swapaxes(0, 1).reshape(-1), TRIT.pack(TRIT.to_unsigned(trits)))


def test_inputs_that_could_overflow_are_refused():
    x = np.zeros((1, MAX_IN_FEATURES + 1), np.int8)
    tiles = np.zeros((ternary._tiles(x.shape[1], 5), 0, TILE), np.uint8)
    with pytest.raises(ValueError, match=f"{MAX_IN_FEATURES + 1} inputs could overflow the 32-bit sum"):
        ternary_matmul(x, tiles)


@pytest.mark.parametrize(
    ("x", "tiles", "per_byte", "message"),
    [
        (
            np.zeros((2, 8)),
            pack_tiles(np.zeros((3, 8))),
            5,
            r"inputs are float64 \(2, 8\); give a matrix \(tokens, in\) of int8",
        ),
        (np.zeros(8, np.int8), pack_tiles(np.zeros((3, 8))), 5, r"inputs are int8 \(8,\)"),
        (np.zeros((2, 81), np.int8), pack_tiles(np.zeros((3, 80))), 5, r"81 inputs need uint8 \(2, out, 16\)"),
        (np.zeros((2, 8), np.int8), np.zeros((1, 3, 16), np.int8), 5, "tiles are int8"),
        (np.zeros((2, 8), np.int8), np.zeros((3, 2), np.uint8), 5, r"tiles are uint8 \(3, 2\)"),
        (np.zeros((2, 8), np.int8), pack_tiles(np.zeros((3, 8))), 3, "per_byte=3 is not how many trits"),
    ],
)
def test_what_is_refused(x, tiles, per_byte, message):
    with pytest.raises(ValueError, match=message):
        ternary_matmul(x, tiles, per_byte)


@pytest.mark.parametrize("trits", [[[0, 2]], [[0.5, 1.0]], [1, 0], [[float("nan")]]])
def test_what_is_no_matrix_of_trits(trits):
    with pytest.raises(ValueError, match="is no matrix of -1, 0, 1"):
        pack_tiles(trits)
