"""SINQ: the rounding written out in NumPy, its bound, each option, and every known edge."""

import numpy as np
import pytest
import torch

from qlearn import QuantizedTensor, quantize
from qlearn.formats.codebooks import NF3, NF4
from qlearn.methods import absmax, sinq, zero_point
from qlearn.methods.sinkhorn import sinkhorn
from qlearn.methods.sinq import fourth_moment
from tests.methods import edges

EXACT = {"scale_dtype": torch.float32}


def normal(rows=24, columns=48, seed=0, scale=0.05):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def large_columns(rows=64, columns=256):
    """A few columns are twenty times larger than the rest."""
    sizes = torch.ones(columns)
    sizes[::37] = 20
    return normal(rows, columns) * sizes


def tiles_of(weight, width):
    return weight.unflatten(1, (-1, width)).transpose(0, 1)


def written_out(weight, bits, width, order=16):
    """What is read back, float32: each tile balanced, each group rounded as it is published."""
    out, qmax = [], 2**bits - 1
    for tile in tiles_of(weight, width):
        balanced, mu1, mu2 = (x.numpy() for x in sinkhorn(tile, order)[:3])
        low, high = balanced.min(1, keepdims=True), balanced.max(1, keepdims=True)
        scale = np.maximum(high - low, np.float32(1e-4)) / np.float32(qmax)
        zero = -np.round(low / scale)
        codes = np.clip(np.round(balanced / scale + zero), 0, qmax)
        out.append((codes - zero) * (scale * mu2[:, None]) * mu1)
    return np.concatenate(out, 1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [16, 48])
def test_it_is_the_formulas(width, bits):
    weight = normal(seed=bits)
    qt = sinq(weight, bits, width, **EXACT)
    np.testing.assert_allclose(qt.dequantize(), written_out(weight, bits, width), rtol=2**-21, atol=1e-9)
    assert qt.column_scales.shape == (48,) and qt.zeros.dtype == torch.uint8


def bound(qt, steps=1.0):
    """Each weight's step, its two scales included: what no error may exceed, but for the roundings to float16."""
    step = qt.scales.float().repeat_interleave(qt.block[1], 1)
    if qt.column_scales is not None:
        step = step * qt.column_scales.float()
    return steps * step


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("make", [normal, large_columns])
def test_no_error_exceeds_a_step(make, bits):
    """Half a step for the rounding, and up to another half at an end, for the zero is rounded too. Two scales of 11
    bits move what is read by 2**-10 of itself."""
    weight = make()
    qt = sinq(weight, bits, 16)
    error = (qt.dequantize() - weight).abs()
    assert (error <= bound(qt) + qt.dequantize().abs() * 2**-10).all() and error.max() > 0.45 * bound(qt).min()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_large_columns_do_not_cost_the_others_their_steps(bits):
    """They are rounded about as well as if there were none, and more than twice as badly without balancing."""
    weight, small = large_columns(), torch.arange(256) % 37 != 0
    plain, ours = ((m(weight, bits, 64).dequantize() - weight)[:, small].norm() for m in (zero_point, sinq))
    even = (zero_point(normal(64, 256), bits, 64).dequantize() - normal(64, 256))[:, small].norm()
    assert ours < 1.1 * even and plain > 2 * even


def test_one_state_is_plain_rounding_without_column_scales():
    qt = sinq(normal(), 4, 16, order=1)
    assert qt.column_scales is None and qt.bits_per_weight == zero_point(normal(), 4, 16).bits_per_weight
    np.testing.assert_allclose(
        sinq(normal(), 4, 16, order=1, **EXACT).dequantize(), written_out(normal(), 4, 16, order=1), rtol=2**-21
    )


def test_without_shift_the_grid_is_that_of_absmax():
    weight = large_columns()
    qt = sinq(weight, 4, 64, shift=False, **EXACT)
    balanced, mu1, mu2, _ = sinkhorn(tiles_of(weight, 64))
    for i, tile in enumerate(balanced):
        plain = absmax(tile, 4, scale_dtype=torch.float32)
        columns = slice(64 * i, 64 * (i + 1))
        back = plain.dequantize() * mu2[i][:, None] * mu1[i]
        torch.testing.assert_close(qt.dequantize()[:, columns], back, rtol=2**-21, atol=0)
    assert qt.zeros is None and torch.equal(qt.codes().abs().max(), torch.tensor(7, dtype=torch.int8))


@pytest.mark.parametrize(("bits", "codebook"), [(3, NF3), (4, NF4)])
@pytest.mark.parametrize("shift", [True, False])
def test_normal_float(bits, codebook, shift):
    """Each balanced group, its mean taken off, over its largest: the nearest value of the list."""
    weight = large_columns(32, 128)
    qt = sinq(weight, bits, 64, normal_float=True, shift=shift, **EXACT)
    assert qt.format is codebook and (qt.zeros is None) == (not shift)
    balanced, mu1, mu2, _ = sinkhorn(tiles_of(weight, 64))
    groups = balanced - balanced.mean(-1, keepdim=True) * shift
    largest = groups.abs().amax(-1, keepdim=True)
    distance = (groups / largest)[..., None] - torch.tensor(codebook.values)
    nearest = torch.tensor(codebook.values)[distance.abs().argmin(-1)] * largest + balanced - groups
    back = (nearest * mu1[:, None] * mu2[..., None]).transpose(0, 1).reshape(32, 128)
    torch.testing.assert_close(qt.dequantize(), back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_moved_zeros_err_less_in_the_balanced_tiles(bits):
    weight = large_columns()
    tiles = sinkhorn(tiles_of(weight, 64))
    scale = tiles.mu1[:, None] * tiles.mu2[..., None]

    def error(**options):
        return ((tiles_of(sinq(weight, bits, 64, **options, **EXACT).dequantize() - weight, 64)) / scale).abs().mean()

    assert error(hqq=True) < error()
    assert sinq(weight, bits, 64, hqq=True).zeros.dtype == torch.float16


def test_small_scales():
    weight = large_columns()
    full, small = sinq(weight, 4, 64), sinq(weight, 4, 64, small_scales=True)
    assert torch.equal(full.codes(), small.codes()) and torch.equal(full.zero_points(), small.zero_points())
    assert torch.equal(full.column_scales, small.column_scales)
    assert full.bits_per_weight == 4 + (16 + 4) / 64 + 16 / 64
    assert small.bits_per_weight == 4 + (8 + 64 / 32 + 4) / 64 + 16 / 64
    off = (full.scales.float() - small.scales.float()).abs()
    assert (off <= small.scales.steps.max() / 2 + full.scales.float() * 2**-11).all()
    assert (small.dequantize() - weight).norm() < 1.01 * (full.dequantize() - weight).norm()
    moved = sinq(weight, 4, 64, small_scales=True, hqq=True)
    assert moved.zeros.layout == (256, 1) and moved.bits_per_weight == 4 + (8 + 2 + 8) / 64 + 64 / 16384 + 16 / 64


def test_the_gate():
    weight = normal(64, 64)
    heavy = torch.where(torch.arange(64) == 0, weight * 30, weight)
    assert fourth_moment(weight) < 5 < fourth_moment(heavy)
    assert sinq(weight, 4, 16, kurtosis=5.0).column_scales is not None
    gated = sinq(heavy, 4, 16, kurtosis=5.0)
    assert gated.column_scales is None
    assert torch.equal(gated.dequantize(), sinq(heavy, 4, 16, order=1).dequantize())
    assert sinq(heavy, 4, 16).column_scales is not None


def test_kurtosis_is_scipys():
    from scipy.stats import kurtosis

    weight = normal(64, 64) ** 3
    assert fourth_moment(weight) == pytest.approx(kurtosis(weight.flatten().double(), fisher=False), rel=1e-4) or (
        weight.var() < 1e-6
    )
    weight = weight / weight.std()
    assert fourth_moment(weight) == pytest.approx(kurtosis(weight.flatten().double(), fisher=False), rel=1e-4)


def test_an_input_scale_multiplies_the_balanced_columns_and_is_divided_out():
    weight = normal()
    s = torch.linspace(0.5, 2, 48)
    scaled = sinq(weight * s, 4, 16, order=1, **EXACT)
    qt = sinq(weight, 4, 16, order=1, input_scale=s, **EXACT)
    assert torch.equal(qt.codes(), scaled.codes())
    torch.testing.assert_close(qt.column_scales, 1 / s)
    torch.testing.assert_close(qt.dequantize(), scaled.dequantize() / s, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tile_rows", [8, 32, 64])
def test_bands_are_matrices_of_their_own(tile_rows):
    weight = large_columns()
    qt = sinq(weight, 3, 64, tile_rows=tile_rows)
    apart = [sinq(band, 3, 64) for band in weight.split(tile_rows)]
    assert torch.equal(qt.dequantize(), torch.cat([band.dequantize() for band in apart]))
    assert qt.nbytes == sum(band.nbytes for band in apart)
    assert qt.bits_per_weight == 3 + (16 + 3) / 64 + 16 / tile_rows


EDGES = edges.EDGES | {
    "a column of zeros": normal(4, 32) * (torch.arange(32) != 5),
    "a row of zeros": normal(4, 32) * (torch.arange(4) != 2)[:, None],
    "one column of a tile": normal(4, 32),
}


@pytest.mark.parametrize("options", [{}, {"shift": False}, {"hqq": True}, {"normal_float": True}], ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges_keep_a_bound(name, options):
    """No weight is further off than the steps of its group's grid allow: one step evenly spaced, half of the largest
    gap, 0.15 of the scale, for NF4. HQQ may move the zero by another step. No grid is finer than 1e-4 allows."""
    weight, width = EDGES[name], 1 if name == "one column of a tile" else 16
    qt = sinq(weight, 4, width, **options)
    back = qt.dequantize()
    steps = 0.16 if "normal_float" in options else 2.0 if "hqq" in options else 1.0
    limit = bound(qt, steps) + (back.abs() + weight.abs()) * 2**-9 + 1e-5
    if "hqq" in options:  # a zero of z steps is off by 2**-11 z
        limit += qt.zero_points().abs().repeat_interleave(width, 1) * bound(qt) * 2**-10
    assert ((back - weight).abs() <= limit).all()


def test_a_group_without_the_number_0_keeps_its_fine_steps():
    weight = normal(8, 32) + 3
    qt = sinq(weight, 4, 16)
    assert qt.zeros.dtype == torch.float16 and (qt.zero_points() < 0).all()
    assert (qt.dequantize() - weight).norm() < 0.2 * (zero_point(weight, 4, 16).dequantize() - weight).norm()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"small_scales": True},
        {"tile_rows": 16},
        {"hqq": True, "small_scales": True},
        {"normal_float": True},
        {"shift": False},
    ],
    ids=str,
)
def test_save_and_load(tmp_path, options):
    qt = quantize(large_columns(), "sinq", bits=4, group_size=64, **options)
    qt.save(tmp_path / "q.safetensors")
    back = QuantizedTensor.load(tmp_path / "q.safetensors")
    assert torch.equal(back.dequantize(), qt.dequantize()) and back.nbytes == qt.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 is out of range"),
        ({"bits": 9}, "bits=9 is out of range"),
        ({"group_size": 5}, "group_size=5 does not divide the 48 columns"),
        ({"order": 0}, "order=0 looks at no state"),
        ({"tile_rows": 5}, "tile_rows=5 does not divide the 24 rows"),
        ({"tile_rows": 0}, "tile_rows=0 does not divide the 24 rows"),
        ({"kurtosis": 0}, "kurtosis=0 lets no matrix pass"),
        ({"bits": 2, "normal_float": True}, "there is no NormalFloat of 2 bits"),
        ({"hqq": True, "shift": False}, "hqq=True moves the zeros"),
        ({"hqq": True, "normal_float": True}, "hqq=True moves the zeros"),
        ({"input_scale": torch.ones(47)}, r"an input_scale of shape \(47,\) does not fit 48 columns"),
        ({"input_scale": torch.zeros(48)}, "is not positive"),
        ({"weight": normal() * 1e9}, "a scale of .* does not fit torch.float16; pass scale_dtype=torch.float32"),
        ({"weight": torch.tensor([[1.0, torch.nan]]), "group_size": None}, "1 of 2 weights are not finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        sinq(**{"weight": normal(), "bits": 4, "group_size": 16} | change)
