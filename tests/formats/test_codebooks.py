"""Codebooks: nearest value by brute force, ties, and NormalFloat against its published tables."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlearn.formats.codebooks import DYNAMIC8, NF3, NF4, Codebook, dynamic_map, normal_float

# As in bitsandbytes 0.50 (functional.py) and SINQ 0.2 (dual_shift.py); written out here, not taken from the package.
PUBLISHED_NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
PUBLISHED_NF3 = """
    -1.0 -0.5350227355957031 -0.2469314038753510 0.0 0.1833375245332718 0.3819939494132996 0.6229856610298157 1.0
"""
UNEVEN = Codebook("uneven", (-3, -1, -0.5, 0, 0.125, 7))
every_codebook = pytest.mark.parametrize("codebook", [NF4, NF3, DYNAMIC8, UNEVEN], ids=lambda c: c.name)


def values_of(codebook):
    return np.array(codebook.values, dtype=np.float64)


@pytest.mark.parametrize(
    ("codebook", "published", "offset"),
    [(NF4, PUBLISHED_NF4, 0.9677083), (NF3, PUBLISHED_NF3, None)],
    ids=["nf4", "nf3"],
)
def test_normal_float_is_the_published_table_and_its_derivation(codebook, published, offset):
    table = np.array(published.split(), dtype=np.float32)
    assert np.array_equal(codebook.decode(range(2**codebook.bits)), table)
    assert np.array_equal(normal_float(codebook.bits, offset), table)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_has_an_exact_zero_and_evenly_used_values(bits):
    values = normal_float(bits)
    half = 2 ** (bits - 1)
    assert len(values) == 2**bits and (np.diff(values) > 0).all()
    assert values[0] == -1 and values[half - 1] == 0 and values[-1] == 1
    largest = NormalDist().inv_cdf(1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2)
    shares = np.array([NormalDist().cdf(float(v) * largest) for v in values])
    for steps in (np.diff(shares[:half]), np.diff(shares[half - 1 :])):
        # In float32 a probability is off by up to 1.5 * 2**-24 and a value moves it by less than 0.5 * 2**-24 more;
        # a step is the difference of two, and so is what it is compared with.
        assert np.abs(steps - steps.mean()).max() <= 8 * 2**-24


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_map_divides_each_decade_evenly(bits):
    """In exact decimals: decade number i from the top has half as many values as the one above, in the middles."""
    expect = {0.0, 1.0}
    for i in range(bits - 1):
        parts = 2 ** (bits - 2 - i)
        middles = [(0.1 + 0.9 * (k + 0.5) / parts) / 10**i for k in range(parts)]
        expect |= {*middles, *(-m for m in middles)}
    np.testing.assert_allclose(dynamic_map(bits), sorted(expect), rtol=2**-22)
    assert len(dynamic_map(bits)) == 2**bits


def test_dynamic8_is_the_map_of_8_bits():
    assert DYNAMIC8.values == tuple(dynamic_map(8).tolist()) and DYNAMIC8.bits == 8


@every_codebook
def test_encoding_finds_the_nearest_value(codebook):
    x = np.random.default_rng(0).normal(0, 1, 5000)
    distance = np.abs(x[:, None] - values_of(codebook))
    assert np.array_equal(codebook.encode(x), distance.argmin(1))
    assert np.array_equal(codebook.encode(x.reshape(50, 100)), codebook.encode(x).reshape(50, 100))


@every_codebook
def test_a_tie_goes_to_the_lower_value_and_a_hair_more_to_the_upper(codebook):
    values = values_of(codebook)
    middle = (values[:-1] + values[1:]) / 2
    lower = np.arange(len(middle))
    assert np.array_equal(codebook.encode(middle), lower)
    assert np.array_equal(codebook.encode(np.nextafter(middle, -np.inf)), lower)
    assert np.array_equal(codebook.encode(np.nextafter(middle, np.inf)), lower + 1)


@every_codebook
def test_values_are_their_own_codes_and_the_ends_catch_the_rest(codebook):
    last = len(codebook.values) - 1
    assert codebook.encode(codebook.values).tolist() == list(range(last + 1))
    assert codebook.round(list(codebook.values)).tolist() == list(codebook.values)
    assert codebook.encode([-np.inf, -1e300, 1e300, np.inf]).tolist() == [0, 0, last, last]
    assert codebook.round(-0.0) == 0.0


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30, unique=True), x=st.floats(-200, 200))
def test_any_codebook_finds_the_nearest_value(values, x):
    codebook = Codebook("any", tuple(sorted({v + 0.0 for v in values} | {101.0})))
    best = min(abs(x - v) for v in codebook.values)
    assert abs(x - codebook.round(x)) == best


def test_bits_are_what_the_codes_need():
    assert [Codebook("n", tuple(range(n))).bits for n in (2, 3, 4, 5, 16, 17, 256)] == [1, 2, 2, 3, 4, 5, 8]
    assert (NF4.bits, NF3.bits, NF4.name, NF3.name) == (4, 3, "nf4", "nf3")


def test_codebooks_compare_by_value():
    assert Codebook("a", (0, 1)) == Codebook("a", (0.0, 1.0)) != Codebook("a", (0, 2))
    assert hash(NF4) == hash(Codebook("nf4", NF4.values))


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match="NaN has no nearest value in codebook 'nf4'"):
        NF4.encode([0.0, np.nan])
    with pytest.raises(ValueError, match="code 6 is out of range: codes here run from 0 to 5"):
        UNEVEN.decode([0, 6])
    for values in ((1.0,), tuple(range(257)), ((0, 1), (2, 3))):
        with pytest.raises(ValueError, match=r"codebook 'x' has values of shape .* list 2 to 256 numbers"):
            Codebook("x", values)
    for values in ((0, 0), (1, 0), (0, np.inf), (0, np.nan), (1.0, 1.0 + 1e-12)):
        with pytest.raises(ValueError, match="codebook 'x' must be finite and strictly rising"):
            Codebook("x", values)
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"NormalFloat of {bits} bits is not defined"):
            normal_float(bits)
        with pytest.raises(ValueError, match=f"dynamic map of {bits} bits is not defined"):
            dynamic_map(bits)
