"""AWQ on one matrix: by hand, against the formulas written out in NumPy, and against trying everything."""

import numpy as np
import pytest
import torch

from qlearn.methods import absmax, quantize, zero_point
from qlearn.methods.awq import CLIPS, awq, clip_groups, search_scale
from qlearn.methods.statistics import InputStatistics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def salient(tokens=200, columns=64, channels=(3, 20, 41), factor=30.0):
    """Inputs with a few channels that are much larger than the others."""
    x = normal(tokens, columns, seed=1)
    x[:, list(channels)] *= factor
    return x


def rounded(weight, bits, group_size, sym=False):
    return (absmax if sym else zero_point)(weight, bits, group_size).dequantize()


def output_error(weight, qt, x):
    return (x @ (qt.dequantize() - weight).T).square().mean().item()


def test_by_hand():
    """Doubling the second column takes its 0.25 from halfway between two codes to a code of its own."""
    weight = torch.tensor([[0.0, 0.25, 1.5, 0.5]])
    qt = awq(weight, bits=2, inputs=torch.ones(1, 4), scale=torch.tensor([1.0, 2.0, 1.0, 1.0]), clip=False)
    assert qt.scales.tolist() == [[0.5]]
    assert qt.codes().tolist() == [[0, 1, 3, 1]]
    assert qt.column_scales.tolist() == [1.0, 0.5, 1.0, 1.0]
    assert torch.equal(qt.dequantize(), weight)
    assert zero_point(weight, bits=2).codes().tolist() == [[0, 0, 3, 1]]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
class TestGivenScale:
    def test_one_is_the_plain_method(self, bits, sym):
        weight = normal(8, 64)
        qt = awq(weight, bits, 16, inputs=salient(), scale=1, clip=False, sym=sym)
        plain = (absmax if sym else zero_point)(weight, bits, 16)
        assert qt.column_scales is None
        assert qt.metadata() == plain.metadata()
        for name, tensor in plain.state_tensors().items():
            assert torch.equal(qt.state_tensors()[name], tensor)

    def test_its_inverse_is_what_is_stored(self, bits, sym):
        weight, scale = normal(8, 64), normal(64, seed=2).exp()
        qt = awq(weight, bits, 16, inputs=salient(), scale=scale, clip=False, sym=sym)
        stored = (1 / scale).half()
        assert torch.equal(qt.column_scales, stored)
        assert torch.equal(qt.dequantize(), rounded(weight / stored.float(), bits, 16, sym) * stored.float())


def test_a_scale_survives_saving(tmp_path):
    qt = awq(normal(8, 64), 3, 16, inputs=salient())
    qt.save(tmp_path / "weight")
    assert torch.equal(type(qt).load(tmp_path / "weight").dequantize(), qt.dequantize())


def test_explicit_scales_are_paid_for():
    """16 bits for each column are 16 / rows for each weight."""
    weight, x = normal(32, 64), salient()
    assert awq(weight, 4, 16, inputs=x).bits_per_weight == zero_point(weight, 4, 16).bits_per_weight + 16 / 32
    assert awq(weight, 4, 16, inputs=x, scale=1).bits_per_weight == zero_point(weight, 4, 16).bits_per_weight


class TestSearch:
    @pytest.mark.parametrize("duo", [False, True])
    @pytest.mark.parametrize("i", [0, 1, 7, 19])
    def test_the_candidates_are_those_of_the_papers(self, i, duo):
        """Against the formulas written out in float64; a float16 is off by up to 2**-11 of itself, float32 by less."""
        weight, x, seen = normal(8, 64), salient(), []

        def loss(candidates):
            seen.append(candidates[0])
            return float(len(seen) != i + 1)

        found = search_scale(weight, 3, 16, inputs=x, loss=loss, duo=duo)
        assert (found.ratio, list(found.losses)) == (i / 20, [n / 20 for n in range(20)])
        assert torch.equal(seen[i], rounded(weight * found.scale, 3, 16) / found.scale)
        mean_abs, w = x.double().abs().numpy().mean(0), weight.double().abs().numpy().reshape(8, 4, 16)
        size = (w / w.max(-1, keepdims=True)).reshape(8, 64).mean(0)
        s = mean_abs ** (i / 20)
        if duo and i:
            s = s / (size ** (1 - i / 20) + 1e-4)
        np.testing.assert_allclose(found.scale.numpy(), s / np.sqrt(s.max() * s.min()), rtol=2**-11 + 1e-5)

    def test_the_loss_is_the_error_of_the_outputs(self):
        weight, x = normal(8, 64), salient()
        found = search_scale(weight, 3, 16, inputs=x)
        for ratio in (0, found.ratio):
            scale = torch.ones(64) if ratio == 0 else found.scale
            qt = awq(weight, 3, 16, inputs=x, scale=scale, clip=False)
            assert found.losses[ratio] == pytest.approx(output_error(weight, qt, x), rel=1e-4)
        assert found.losses[found.ratio] == min(found.losses.values())

    def test_equal_channels_are_not_scaled(self):
        x = torch.where(normal(50, 64) > 0, 3.0, -3.0)
        found = search_scale(normal(8, 64), 3, 16, inputs=x)
        assert found.ratio == 0
        assert torch.equal(found.scale, torch.ones(64))

    def test_inverses_are_float16(self):
        scale = search_scale(normal(8, 64), 3, 16, inputs=salient(factor=1e3)).scale
        assert not torch.equal(scale, torch.ones(64))
        assert torch.equal(1 / (1 / scale).half().float(), scale)

    def test_several_matrices_share_a_scale(self):
        first, second, x = normal(8, 64), normal(24, 64, seed=3) * 2, salient()
        together = search_scale([first, second], 3, 16, inputs=x)
        alone = [search_scale(w, 3, 16, inputs=x) for w in (first, second)]
        assert together.losses == {
            ratio: pytest.approx(sum(search.losses[ratio] for search in alone)) for ratio in together.losses
        }

    def test_fewer_candidates(self):
        assert list(search_scale(normal(8, 64), 3, inputs=salient(), n_grid=4).losses) == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("options", [{}, {"sym": True}, {"duo": True}, {"clip": False}], ids=str)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_salient_channels_come_out_better_than_by_rounding(bits, group_size, options):
    weight, x = normal(32, 64), salient()
    plain = (absmax if options.get("sym") else zero_point)(weight, bits, group_size)
    found = search_scale(weight, bits, group_size, inputs=x, **{k: options[k] for k in ("sym", "duo") if k in options})
    error = output_error(weight, awq(weight, bits, group_size, inputs=x, **options), x)
    assert found.ratio > 0
    assert error < 0.7 * output_error(weight, plain, x)


class TestClip:
    @pytest.mark.parametrize("column_scales", [None, torch.linspace(0.5, 2, 24).half()], ids=["", "scaled"])
    @pytest.mark.parametrize("sym", [False, True])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_every_group_takes_the_best_length(self, bits, sym, column_scales):
        """Against one group at a time, each length tried on all inputs in float64."""
        weight, x = normal(3, 24) ** 3, salient(columns=24, channels=(1, 9), factor=5.0)
        clipped = clip_groups(weight, bits, 8, inputs=x, column_scales=column_scales, sym=sym)
        read = x if column_scales is None else x * column_scales.float()
        lengths = set()
        for row in range(3):
            for start in (0, 8, 16):
                part, inputs = weight[row : row + 1, start : start + 8], read[:, start : start + 8].double()
                candidates = [part.clamp(-c * part.abs().max(), c * part.abs().max()) for c in CLIPS]
                errors = [
                    (inputs @ (rounded(c, bits, None, sym) - part).double().T).square().mean() for c in candidates
                ]
                best = int(torch.stack(errors).argmin())
                lengths.add(CLIPS[best])
                assert torch.equal(clipped[row : row + 1, start : start + 8], candidates[best])
        assert len(lengths) > 1

    def test_ten_lengths(self):
        np.testing.assert_allclose(CLIPS, np.linspace(1, 0.55, 10))

    @pytest.mark.parametrize("group_size", [None, 16])
    def test_the_sample_will_do_where_there_is_no_hessian(self, group_size):
        weight, x = normal(8, 64) ** 3, salient()
        statistics = InputStatistics.from_inputs(x, hessian=False)
        assert len(statistics.sample) == len(x)
        expected = clip_groups(weight, 3, group_size, inputs=x)
        assert not torch.equal(expected, weight)
        assert torch.equal(clip_groups(weight, 3, group_size, inputs=statistics), expected)

    def test_it_can_be_left_out(self):
        weight, x = normal(8, 64) ** 3, salient()
        clipped, whole = (awq(weight, 3, 16, inputs=x, scale=1, clip=clip) for clip in (True, False))
        assert torch.equal(whole.dequantize(), rounded(weight, 3, 16))
        assert output_error(weight, clipped, x) < output_error(weight, whole, x)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "weight, x",
    [
        (normal(8, 64), torch.zeros(10, 64)),
        (torch.zeros(8, 64), salient()),
        (torch.full((8, 64), -0.7), salient()),
        (normal(8, 64), salient() * (torch.arange(64) % 2)),
        (normal(8, 64), salient(factor=1e12)),
        (normal(8, 64) * 1e-6, salient(factor=1e-12)),
        (normal(1, 64), salient(tokens=1)),
        (normal(8, 64) * (torch.arange(64) > 16), salient()),
    ],
    ids=["no input", "no weight", "constant", "dead channels", "huge", "tiny", "one token, one row", "an empty group"],
)
@pytest.mark.parametrize("duo", [False, True])
def test_edges_stay_finite(weight, x, bits, duo):
    """And no result is worse on its own inputs than rounding, but for what float32 can tell apart."""
    qt = awq(weight, bits, 16, inputs=x, duo=duo, clip=False)
    assert torch.isfinite(qt.dequantize()).all()
    assert (qt.column_scales > 0).all()
    assert torch.isfinite(qt.column_scales).all()
    assert output_error(weight, qt, x) <= output_error(weight, zero_point(weight, bits, 16), x) * 1.001
    assert torch.isfinite(awq(weight, bits, 16, inputs=x, duo=duo).dequantize()).all()


def test_half_precision_is_read_as_float32():
    weight, x = normal(8, 64).bfloat16(), salient().bfloat16()
    half, full = (awq(w, 4, 16, inputs=i) for w, i in ((weight, x), (weight.float(), x.float())))
    assert torch.equal(half.dequantize(), full.dequantize())


def test_scales_in_float32():
    qt = awq(normal(8, 64) * 1e6, 4, 16, inputs=salient(), scale_dtype=torch.float32)
    assert qt.scales.dtype == torch.float32


def test_by_name():
    weight, x = normal(8, 64), salient()
    expected = awq(weight, 3, 16, inputs=x, duo=True).dequantize()
    assert torch.equal(quantize(weight, "awq", 3, 16, inputs=x, duo=True).dequantize(), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inputs": torch.ones(5, 32)}, "inputs of 32 channels do not fit a weight of 64 columns"),
        ({"inputs": torch.ones(0, 64)}, "no inputs to learn from"),
        ({"inputs": torch.full((5, 64), torch.nan)}, "320 of 320 inputs are NaN"),
        ({"scale": torch.ones(32)}, r"scale of shape \(32,\) does not fit 64 columns"),
        ({"scale": torch.zeros(64)}, "is not positive"),
        ({"scale": torch.full((64,), torch.inf)}, "is not positive"),
        ({"scale": 2}, r"scale of shape \(\) does not fit 64 columns"),
        ({"n_grid": 0}, "n_grid=0 is no number of candidates"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 1}, "bits=1"),
        ({"group_size": 48}, "group_size=48 does not divide the 64 columns"),
        ({"weight": torch.full((8, 64), torch.nan)}, "weights are not finite"),
        ({"weight": torch.full((8, 64), 1e6)}, "pass scale_dtype=torch.float32"),
    ],
)
def test_a_refusal_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        awq(**{"weight": normal(8, 64), "bits": 4, "group_size": 16, "inputs": salient(), **options})
