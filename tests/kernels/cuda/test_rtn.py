"""Round to nearest in one walk: the same bits as the readable methods on the CPU."""

import pytest
import torch

from qlearn.kernels.cuda import SIMULATED, rtn
from qlearn.kernels.cuda.rtn import COMPILED, quantize_absmax, quantize_zero_point
from qlearn.methods import absmax, zero_point

DEVICE = "cpu" if SIMULATED else "cuda"
METHODS = {"absmax": (quantize_absmax, absmax), "zero_point": (quantize_zero_point, zero_point)}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def check_same(method, weight, bits, group_size, **options):
    fast, readable = method
    got, expected = fast(weight.to(DEVICE), bits, group_size, **options), readable(weight, bits, group_size, **options)
    assert repr(got) == repr(expected) and got.bits_per_weight == expected.bits_per_weight
    for name in ("packed", "scales", "zeros"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a.cpu(), b)), name


def random(rows, columns, dtype=torch.bfloat16, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_weights(method, bits, dtype):
    check_same(method, random(3, 64, dtype), bits, 32)


@pytest.mark.parametrize("group_size", [64, 128])
def test_groups(method, group_size):
    check_same(method, random(2, 2 * group_size), 4, group_size)


@pytest.mark.parametrize("rows, columns, bits", [(1, 96, 4), (5, 32, 4), (3, 64, 8), (70, 32, 4)])
def test_zeros_packed_by_the_lanes(rows, columns, bits):
    check_same(METHODS["zero_point"], random(rows, columns) + 0.5, bits, 32)


@pytest.mark.parametrize("bits", [3, 8])
def test_rows_longer_than_a_block_of_threads_reads_at_once(method, bits):
    check_same(method, random(2, 8 * 64 + 32), bits, None)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_scales(method, scale_dtype):
    check_same(method, random(2, 64, torch.float32), 4, 32, scale_dtype=scale_dtype)


EDGES = {
    "zeros": torch.zeros(1, 32),
    "negative zeros": -torch.zeros(1, 32),
    "all alike": torch.full((1, 32), 0.3),
    "all positive": torch.arange(1.0, 33).view(1, 32),
    "all negative": -torch.arange(1.0, 33).view(1, 32),
    "ties": torch.tensor([7.0] + [k + 0.5 for k in range(-7, 7)] + [0.0] * 17).view(1, 32),
    "a tie at the upper end": torch.tensor([7.5, -7.5] + [0.5] * 30).view(1, 32),
    "one outlier": torch.tensor([1000.0] + [0.01] * 31).view(1, 32),
    "the largest scale of float16": torch.tensor([65504.0 * 7] + [1.0] * 31).view(1, 32),
    "scales below the normal float16": torch.full((1, 32), 1e-7),
    "scales that float16 rounds up to its smallest": torch.full((1, 32), 1e-12),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(method, name):
    check_same(method, EDGES[name], 4, 32)


@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e-25, 1e25, 3e37], ids=str)
def test_scales_so_small_or_large_that_a_reciprocal_would_not_do(method, factor):
    weight = torch.arange(-16.0, 16).view(1, 32) / 16 * factor
    check_same(method, weight, 4, 32, scale_dtype=torch.float32)


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (torch.zeros(2, 3, 4), {}, "none for this kernel"),
        (torch.zeros(0, 32), {}, "not empty"),
        (torch.zeros(2, 32, dtype=torch.float64), {}, "float64"),
        (torch.zeros(2, 64)[:, :32], {}, "one piece"),
        (torch.zeros(65)[1:].view(2, 32), {}, "multiple of 16"),
        (torch.zeros(2, 32), {"bits": 5}, "bits=5"),
        (torch.zeros(2, 32), {"group_size": 16}, "group_size=16"),
        (torch.zeros(2, 48), {"group_size": 32}, "48 columns"),
        (torch.zeros(2, 40), {"group_size": None}, "40 columns"),
        (torch.zeros(2, 32), {"scale_dtype": torch.float64}, "float64"),
        (torch.full((2, 32), float("nan")), {}, "not finite"),
        (torch.tensor([[float("-inf")] + [0.0] * 31]), {}, "not finite"),
        (torch.full((2, 32), 1e6), {}, "does not fit"),
    ],
)
def test_what_is_refused(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_absmax(weight.to(DEVICE), **{"bits": 4, "group_size": 32, **options})


def test_pack_zeros_when_they_do_not_fill_an_octet():
    from qlearn.formats.integers import pack

    zeros = torch.tensor([1.0, 5, 7, 0, 3, 2, 6, 4, 7, 1, 5])
    assert torch.equal(rtn.pack_zeros(zeros.to(DEVICE), 3).cpu(), pack(zeros.int(), 3))


def test_every_signature_is_that_of_a_launch():
    assert len({name for name, *_ in COMPILED}) == len(COMPILED)
