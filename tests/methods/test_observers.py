"""Observers: torch's own, brute force on the raw values, and divergences computed one bin at a time."""

import math
import warnings

import pytest
import torch

from qlearn.methods.affine import FRACTIONS
from qlearn.methods.observers import OBSERVERS, histogram_divergences, histogram_mse, make_observer

BITS = (8, 4, 2)


def normal(count=20_000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


FAMILIES = {
    "normal": normal(),
    "heavy tails": normal() ** 3,
    "positive": normal().abs(),
    "silu": torch.nn.functional.silu(normal() * 3),
    "one outlier": torch.cat([normal(), torch.tensor([60.0])]),
    "sparse tail": torch.cat([normal(), torch.tensor([20.0, 30.0, 30.0, 44.0])]),
    "tiny": normal() * 1e-30,
}


@pytest.fixture(params=FAMILIES)
def values(request):
    return FAMILIES[request.param]


@pytest.fixture(params=OBSERVERS)
def name(request):
    return request.param


def errors(values, limit, bits):
    """|x - q(x)| of each value on the symmetric grid, in float64."""
    qmax = 2 ** (bits - 1) - 1
    x, step = values.double(), limit / qmax
    return (x - (x / step).round().clamp(-qmax, qmax) * step).abs()


@pytest.mark.parametrize("bits", BITS)
def test_minmax_is_torchs_minmax(values, bits):
    from torch.ao.quantization.observer import MinMaxObserver

    qmax = 2 ** (bits - 1) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        theirs = MinMaxObserver(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-qmax, quant_max=qmax, eps=0.0
        )
        ours = make_observer("minmax")
        for batch in values.split(6_000):
            theirs(batch)
            ours.observe(batch)
        scale = theirs.calculate_qparams()[0].item()
    assert ours.scale(bits) == pytest.approx(scale, rel=2**-23)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_at_most_a_bin_above_the_true_one(values, percentile):
    observer = make_observer("percentile", percentile=percentile)
    for batch in values.split(6_000):
        observer.observe(batch)
    rank = math.ceil(len(values) * percentile / 100 - 1e-9)
    true = values.double().abs().kthvalue(rank).values.item()
    assert true <= observer.limit() <= true + observer.histogram.width


def test_percentile_counts_zeros():
    half_zeros = torch.cat([torch.zeros(50), torch.arange(1.0, 51.0)])
    assert 40 <= make_observer("percentile", percentile=90.0).observe(half_zeros).limit() <= 40 + 64 / 2048
    mostly_zeros = torch.cat([torch.zeros(1000), torch.ones(1)])
    assert make_observer("percentile", percentile=99.0).observe(mostly_zeros).limit() == 2 / 2048  # its finest bin


@pytest.mark.parametrize("bits", BITS)
def test_mse_of_the_histogram_is_within_a_bin_of_the_raw_one(values, bits):
    """|x - q(x)| changes by at most d when x moves by d, so its square by at most (2 |x - q(x)| + d) d; d <= a bin."""
    observer = make_observer("mse").observe(values)
    width, limits = observer.histogram.width, FRACTIONS.double() * observer.histogram.peak
    estimated = histogram_mse(observer.histogram, limits, bits)
    raw = torch.stack([errors(values, limit, bits) for limit in limits.tolist()])
    bound = ((2 * raw + width) * width).mean(1)
    assert ((estimated - raw.square().mean(1)).abs() <= bound).all()
    chosen = errors(values, observer.limit(bits), bits).square().mean()
    assert chosen <= (raw.square().mean(1) + 2 * bound).min()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "tiny"]
)  # torch's observer takes seconds for those
def test_mse_is_no_worse_than_torchs_histogram_observer(family, bits):
    from torch.ao.quantization.observer import HistogramObserver

    qmax = 2 ** (bits - 1) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HistogramObserver(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-qmax, quant_max=qmax, eps=1e-38
        )
        values = FAMILIES[family]
        theirs(values)
        limit = theirs.calculate_qparams()[0].item() * qmax
    ours = errors(values, make_observer("mse").observe(values).limit(bits), bits).square().mean()
    assert ours <= errors(values, limit, bits).square().mean() * 1.01  # candidates are 1 % apart


def divergence_by_hand(counts, levels, i):
    """KL(P || Q) for the first i bins, as TensorRT's slides say it, a bin at a time."""
    p = counts[:i]
    p = [*p[:-1], p[-1] + sum(counts[i:])]
    q = [0.0] * i
    for level in range(levels):
        bins = [b for b in range(i) if level * i <= b * levels < (level + 1) * i]
        full = [b for b in bins if counts[b]]
        for b in full:
            q[b] = sum(counts[k] for k in bins) / len(full)
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    if any(a and not b for a, b in zip(p, q, strict=True)):
        return math.inf
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("levels", [2, 8, 128])
def test_divergences_agree_with_those_computed_by_hand(levels):
    generator = torch.Generator().manual_seed(levels)
    for empty in (0.0, 0.3, 0.9):
        counts = torch.randint(1, 1000, (200,), generator=generator)
        counts[torch.rand(200, generator=generator) < empty] = 0
        counts[0] = counts[-1] = 5
        divergences = histogram_divergences(counts, levels)
        assert len(divergences) == 200 - levels + 1
        for i in {levels, levels + 1, 150, 151, 199, 200}:
            by_hand = divergence_by_hand(counts.tolist(), levels, i)
            assert divergences[i - levels].item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
def test_entropy_takes_the_smallest_divergence(values, bits):
    observer, levels = make_observer("entropy").observe(values), 2 ** (bits - 1)
    divergences = histogram_divergences(observer.histogram.counts[: observer.histogram.occupied], levels)
    bins = math.ceil(observer.limit(bits) / observer.histogram.width)
    assert divergences[bins - levels] == divergences.min()


def test_entropy_clips_a_lone_giant_and_mse_at_8_bits_does_not():
    values = FAMILIES["one outlier"]
    assert make_observer("entropy").observe(values).limit() < 10
    assert make_observer("mse").observe(values).limit() > 30


def test_zeros_do_not_move_entropy_or_mse(values):
    with_zeros = torch.cat([values, torch.zeros(100_000)])
    for name in ("entropy", "mse"):
        assert make_observer(name).observe(values).limit() == make_observer(name).observe(with_zeros).limit()


class TestEdges:
    def test_batches_do_not_matter(self, name, values):
        whole, parts = make_observer(name).observe(values), make_observer(name)
        for batch in values.split(777):
            assert parts.observe(batch) is parts
        assert parts.limit() == whole.limit()

    def test_limits_lie_within_what_was_seen(self, name, values):
        for bits in range(2, 9):
            observer = make_observer(name).observe(values)
            assert 0 < observer.limit(bits) <= values.abs().max().item()
            assert observer.scale(bits) == observer.limit(bits) / (2 ** (bits - 1) - 1)

    def test_only_zeros(self, name):
        observer = make_observer(name).observe(torch.zeros(3, 4))
        assert (observer.limit(), observer.scale()) == (0.0, 1.0)

    @pytest.mark.parametrize("value", [1.0, -3.7, 1e-20, 3e38])
    def test_one_value(self, name, value):
        x = torch.full((10,), value)
        assert make_observer(name).observe(x).limit() == pytest.approx(x.abs().max().item(), rel=2**-10)

    def test_a_giant_among_small_numbers(self, name):
        observer = make_observer(name).observe(torch.cat([normal(), torch.tensor([1e6])]))
        assert 0 < observer.limit() <= 1e6 and math.isfinite(observer.scale())

    def test_an_empty_batch_changes_nothing(self, name):
        observer = make_observer(name).observe(normal()).observe(torch.empty(0, 8))
        assert observer.limit() == make_observer(name).observe(normal()).limit()

    @pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_is_refused_and_not_remembered(self, name, broken):
        observer = make_observer(name).observe(torch.ones(3))
        with pytest.raises(ValueError, match="1 of 2 values are NaN or infinite"):
            observer.observe(torch.tensor([9.0, broken]))
        assert observer.histogram.peak == 1.0

    def test_never_observed(self, name):
        for observer in (make_observer(name), make_observer(name).observe(torch.empty(0))):
            with pytest.raises(ValueError, match="nothing was observed yet"):
                observer.scale()

    def test_integers_are_refused(self, name):
        with pytest.raises(ValueError, match=r"torch\.int8"):
            make_observer(name).observe(torch.ones(2, dtype=torch.int8))

    @pytest.mark.parametrize("bits", [1, 9, 7.5])
    def test_bits_out_of_range(self, name, bits):
        with pytest.raises(ValueError, match=f"bits={bits} is out of range"):
            make_observer(name).observe(torch.ones(2)).limit(bits)


@pytest.mark.parametrize("percentile", [0, -1, 100.1])
def test_a_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match=f"percentile={percentile} is no percentage"):
        make_observer("percentile", percentile=percentile)


def test_an_unknown_observer_lists_the_known_ones():
    with pytest.raises(ValueError, match="'kl' is unknown; choose from minmax, percentile, mse, entropy"):
        make_observer("kl")
