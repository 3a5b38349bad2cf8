"""The float formats against ml_dtypes and NumPy, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlearn.formats import floats
from qlearn.formats.floats import BF16, E8M0, FP4_E2M1, FP8_E4M3FN, FP8_E5M2, FP16, FP32, FloatFormat
from tests.formats.oracles import (
    EVERY_BF16,
    EVERY_FP16,
    ORACLES,
    cells,
    name_of,
    oracle_decode,
    oracle_encode,
    oracle_max,
    some_codes,
)

pytestmark = pytest.mark.filterwarnings("error")
every_format = pytest.mark.parametrize("format", ORACLES, ids=name_of)
signed_format = pytest.mark.parametrize("format", [f for f in ORACLES if f.sign_bits], ids=name_of)
named_format = pytest.mark.parametrize("format", floats.FORMATS.values(), ids=name_of)

TINY32 = 2.0**-149
LANDMARKS = [
    0.0,
    1.0,
    1.5,
    2.0,
    1e-30,
    1e30,
    TINY32,
    2.0**-126,
    2.0**-127,
    1.5 * 2.0**-128,
    3.4028235e38,
    np.inf,
    np.nan,
]


def both_signs(x):
    return np.concatenate([x, -x])


def assert_same_codes(ours, theirs, format):
    """Bit for bit, but for the payload of NaN in FP16 and FP32, which NumPy carries over: ours is the quiet NaN."""
    ours, theirs = ours.astype(np.int64), theirs.astype(np.int64)
    if format in (FP16, FP32):
        nan = np.isnan(oracle_decode(theirs, format))
        payload = (1 << format.mantissa_bits) - 1
        assert np.array_equal(ours[nan] & payload, np.full(nan.sum(), (payload + 1) // 2))
        theirs = np.where(nan, theirs & ~np.int64(payload) | (payload + 1) // 2, theirs)
    assert np.array_equal(ours, theirs)


# ---- decoding --------------------------------------------------------------------------------------------------------


@every_format
def test_every_code_decodes_as_the_oracle(format):
    codes = some_codes(format)
    ours, theirs = format.decode(codes), oracle_decode(codes, format)
    assert ours.dtype == np.float32
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


@every_format
def test_every_number_encodes_to_its_own_code(format):
    codes = some_codes(format)
    numbers = format.decode(codes)
    known = ~np.isnan(numbers)
    for mode in floats.ROUNDING:
        assert np.array_equal(format.encode(numbers[known], mode, seed=0), codes[known])


# ---- encoding, to nearest --------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("numbers", [EVERY_BF16, EVERY_FP16], ids=["bf16", "fp16"])
def test_encoding_every_16_bit_number(format, numbers):
    ours = format.encode(numbers)
    assert_same_codes(ours, oracle_encode(numbers.astype(np.float32), format), format)
    if numbers.dtype != ORACLES[format]:  # a direct cast to itself is a copy, signalling NaN and all
        assert_same_codes(ours, oracle_encode(numbers, format), format)


@pytest.mark.parametrize("format", [f for f in ORACLES if f.bits <= 16], ids=name_of)  # FP32's are float64: see below
def test_encoding_midpoints_and_one_float32_ulp_either_side(format):
    low, high = cells(format)[:2]
    exact = both_signs((low + high) / 2)
    middle = exact.astype(np.float32)
    assert np.array_equal(middle, exact)
    with np.errstate(over="ignore", under="ignore"):  # NumPy warns of subnormal results of nextafter
        around = [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]
    for x in around:
        assert_same_codes(format.encode(x), oracle_encode(x, format), format)


@every_format
def test_encoding_midpoints_and_one_float64_ulp_either_side(format):
    """ml_dtypes rounds float64 to float32 first and takes these for ties, so the reference is the neighbours."""
    low, high, low_code, high_code = cells(format)
    middle = (low + high) / 2
    below, above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
    assert ((low < below) & (below < middle) & (middle < above) & (above < high)).all()
    tie = np.where((low_code % 2 == 0) & (format.mantissa_bits > 0), low_code, high_code)
    if not format.has_zero:  # E8M0 rounds up all that lies between its lowest two numbers, as the module says
        low_code = np.append(high_code[0], low_code[1:])
    sign = 1 << (format.bits - 1)
    for x, expected in ((below, low_code), (middle, tie), (above, high_code)):
        assert np.array_equal(format.encode(x), expected)
        if format.sign_bits:
            assert np.array_equal(format.encode(-x), expected | sign)


@every_format
def test_encoding_infinities_nan_zeros_and_extremes(format):
    with np.errstate(over="ignore"):
        edge = np.float32([oracle_max(format)])
        past_edge = np.nextafter(edge, np.float32(np.inf))
        numbers = both_signs(np.concatenate([np.float32(LANDMARKS), edge, past_edge, edge * 2, edge / 2]))
    assert_same_codes(format.encode(numbers), oracle_encode(numbers, format), format)


def test_what_the_docstring_says_of_the_special_inputs():
    assert FP8_E4M3FN.encode([464.0, 465.0, -np.inf, np.nan]).tolist() == [0x7E, 0x7F, 0xFF, 0x7F]
    assert FP8_E5M2.encode([61439.0, 61440.0, -np.inf, np.nan]).tolist() == [0x7B, 0x7C, 0xFC, 0x7E]
    assert FP4_E2M1.encode([1e9, -np.inf, np.nan, -np.nan, -0.0]).tolist() == [7, 15, 8, 0, 8]
    assert E8M0.encode([0.0, -0.0, -1.0, np.nan, np.inf]).tolist() == [255] * 5
    assert E8M0.encode([1e-45, 2.0**-128, 1.5, 3.0, 1.5 * 2.0**127]).tolist() == [0, 0, 128, 129, 255]


# ---- encoding, the other modes ---------------------------------------------------------------------------------------


def toward_zero_by_search(x, format):
    """The largest number that is no larger, found in the sorted list of all numbers."""
    numbers = oracle_decode(format.codes, format)
    codes = np.flatnonzero(np.isfinite(numbers) & ~np.signbit(numbers))
    place = np.searchsorted(numbers[codes].astype(np.float64), np.abs(x), side="right") - 1
    code = codes[np.maximum(place, 0)]
    if not format.sign_bits:
        return np.where(x > 0, code, format.encode(np.nan))
    return code | (np.signbit(x).astype(int) << (format.bits - 1))


@pytest.mark.parametrize("format", [f for f in ORACLES if f.bits <= 16], ids=name_of)
def test_toward_zero_equals_a_search_in_the_table(format):
    low, high = cells(format)[:2]
    random = np.random.default_rng(1)
    inside = low + (high - low) * random.random(low.shape)
    x = both_signs(np.concatenate([low, inside, np.nextafter(high, 0), 2 * high, [1e300, 1e-300, 0.0]]))
    assert np.array_equal(format.encode(x, mode="zero"), toward_zero_by_search(x, format))


def test_toward_zero_in_fp32_never_goes_outward():
    low_code = cells(FP32)[2]
    just_below_the_next = np.nextafter(FP32.decode(low_code[:-1] + 1).astype(np.float64), 0)
    assert np.array_equal(FP32.encode(just_below_the_next, mode="zero"), low_code[:-1])
    assert FP32.encode([1e300, -1e300], mode="zero").tolist() == [0x7F7FFFFF, 0xFF7FFFFF]


@every_format
def test_toward_zero_keeps_infinities_and_nan(format):
    special = np.array([np.inf, -np.inf, np.nan, -np.nan])
    assert np.array_equal(format.encode(special, mode="zero"), format.encode(special))


@every_format
def test_stochastic_picks_only_neighbours_and_repeats_with_its_seed(format):
    low, high, low_code, high_code = cells(format)
    x = np.repeat(low + (high - low) * np.random.default_rng(2).random(low.shape), 8)
    codes = format.encode(x, mode="stochastic", seed=3)
    assert ((codes == np.repeat(low_code, 8)) | (codes == np.repeat(high_code, 8))).all()
    assert np.array_equal(codes, format.encode(x, mode="stochastic", seed=3))
    assert not np.array_equal(codes, format.encode(x, mode="stochastic", seed=4))


@every_format
@pytest.mark.parametrize("fraction", [1 / 64, 0.25, 0.5, 0.7, 1 - 1 / 64])
def test_stochastic_is_unbiased(format, fraction):
    """Of n draws at a fraction p of the step, n p go up, give or take sqrt(n p (1 - p)); five of these are allowed."""
    n = 40_000
    low, high, _, high_code = cells(format)
    cell = np.random.default_rng(5).integers(1, len(low) - 1)
    x = low[cell] + fraction * (high[cell] - low[cell])
    for number in (x, -x) if format.sign_bits else (x,):
        codes = format.encode(np.full(n, number), mode="stochastic", seed=6).astype(np.int64)
        up = np.sum(codes & ((1 << (format.bits - format.sign_bits)) - 1) == high_code[cell])
        assert abs(up - n * fraction) <= 5 * np.sqrt(n * fraction * (1 - fraction))


def test_stochastic_rounding_of_a_sum_keeps_what_nearest_loses():
    """Add a tenth of a step a thousand times: nearest never moves, stochastic arrives, within 5 standard deviations."""
    generator = np.random.default_rng(7)
    nearest = stochastic = np.ones(64, np.float32)
    for _ in range(1000):
        nearest = BF16.round(nearest + np.float32(0.1 * 2**-7))
        stochastic = BF16.round(stochastic + np.float32(0.1 * 2**-7), mode="stochastic", seed=generator)
    assert (nearest == 1).all()
    deviation = 2**-7 * np.sqrt(1000 * 0.25 / 64)  # each draw varies by at most half a step; 64 runs are averaged
    assert abs(stochastic.mean() - (1 + 100 * 2**-7)) <= 5 * deviation


@every_format
def test_saturation_gives_the_largest_number(format):
    largest = oracle_max(format)
    beyond = np.array([1e39, np.inf, np.float64(largest) * 4])
    for mode in floats.ROUNDING:
        assert (format.round(beyond, mode, overflow="saturate", seed=0) == largest).all()
        if format.sign_bits:
            assert (format.round(-beyond, mode, overflow="saturate", seed=0) == -largest).all()
    assert format.encode(np.nan, overflow="saturate") == format.encode(np.nan)
    inside = np.array([largest, largest / 2, format.smallest_subnormal])
    assert np.array_equal(format.encode(inside, overflow="saturate"), format.encode(inside))


# ---- fields, neighbours, landmarks -----------------------------------------------------------------------------------


@every_format
def test_fields_are_the_bits_and_rebuild_the_number(format):
    codes = some_codes(format)
    fields = format.fields(codes)
    exponent_bits, mantissa_bits = format.exponent_bits, format.mantissa_bits
    assert np.array_equal((fields.sign << exponent_bits | fields.exponent) << mantissa_bits | fields.mantissa, codes)
    assert np.array_equal(fields.value, oracle_decode(codes, format), equal_nan=True)
    number = ~np.isin(fields.kind, ["inf", "nan"])
    rebuilt = (-1.0) ** fields.sign * 2.0**fields.power * fields.significand
    assert np.array_equal(rebuilt[number], fields.value[number])


@every_format
def test_kinds(format):
    codes = some_codes(format)
    kind, value = format.fields(codes).kind, oracle_decode(codes, format)
    smallest = format.smallest_normal
    assert np.array_equal(kind == "nan", np.isnan(value))
    assert np.array_equal(kind == "inf", np.isinf(value))
    assert np.array_equal(kind == "zero", value == 0)
    assert np.array_equal(kind == "subnormal", (value != 0) & (np.abs(value) < smallest))
    assert np.array_equal(kind == "normal", (np.abs(value) >= smallest) & np.isfinite(value))


def test_fields_of_scalars_are_scalars_and_integers_are_codes():
    assert FP8_E4M3FN.fields(1.75) == (0, 7, 6, "normal", 0, 1.75, 1.75)
    assert FP8_E4M3FN.fields(1) == (0, 0, 1, "subnormal", -6, 0.125, 2.0**-9)
    assert [type(part) for part in FP8_E4M3FN.fields(1)] == [int, int, int, str, int, float, float]
    assert FP8_E4M3FN.fields(1.8) == FP8_E4M3FN.fields(1.75)


@signed_format
def test_neighbours_equal_nextafter(format):
    codes = some_codes(format)
    numbers = codes.view(ORACLES[format])
    value = oracle_decode(codes, format)
    largest = np.inf if format.has_inf else oracle_max(format)
    with np.errstate(all="ignore"):
        end = np.full(codes.shape, largest).astype(ORACLES[format])
        up, down = np.nextafter(numbers, end).view(codes.dtype), np.nextafter(numbers, -end).view(codes.dtype)
    for ours, theirs, end in ((format.next_up(codes), up, largest), (format.next_down(codes), down, -largest)):
        stays = (value == end) | np.isnan(value)
        assert np.array_equal(ours, np.where(stays, codes, theirs))
        assert ours.dtype == codes.dtype


def test_neighbours_of_e8m0_stop_at_both_ends():
    assert E8M0.next_up([0, 1, 253, 254, 255]).tolist() == [1, 2, 254, 254, 255]
    assert E8M0.next_down([0, 1, 254, 255]).tolist() == [0, 0, 253, 255]


@every_format
def test_ulp_is_the_distance_to_the_next_number_outward(format):
    low, high = cells(format)[:2]
    assert np.array_equal(format.ulp(low), high - low if format.mantissa_bits else low)
    assert np.array_equal(format.ulp(np.nextafter(high, 0)), format.ulp(low))
    assert np.array_equal(format.ulp(-low), format.ulp(low))
    assert format.ulp(1e300) == format.ulp(format.max)
    assert format.ulp(0.0) == format.smallest_subnormal
    assert np.isnan(format.ulp([np.inf, -np.inf, np.nan])).all()


@every_format
def test_landmarks_equal_finfo(format):
    positive = oracle_decode(some_codes(format), format)
    positive = positive[np.isfinite(positive) & (positive > 0)]
    assert format.max == positive.max() == oracle_max(format)
    assert format.smallest_subnormal == positive.min()
    assert format.smallest_normal * (1 if format.mantissa_bits == 0 else 2**-format.mantissa_bits) == positive.min()
    values = oracle_decode(some_codes(format), format)
    assert format.has_nan == np.isnan(values).any()
    assert format.has_inf == np.isinf(values).any()
    assert format.has_zero == (values == 0).any()


def test_bits_and_codes():
    assert [f.bits for f in floats.FORMATS.values()] == [32, 16, 16, 8, 8, 6, 6, 4, 8]
    assert FP4_E2M1.codes.tolist() == list(range(16)) and FP4_E2M1.codes.dtype == np.uint8
    assert BF16.codes.dtype == np.uint16 and len(BF16.codes) == 65536
    with pytest.raises(ValueError, match=r"fp32 has 2\*\*32 codes"):
        _ = FP32.codes


# ---- properties ------------------------------------------------------------------------------------------------------


@named_format
@settings(max_examples=40, deadline=None)
@given(data=st.lists(st.floats(width=64, allow_nan=False), min_size=2, max_size=20))
def test_rounding_keeps_order_and_stays_within_half_a_step(format, data):
    lowest = -format.max if format.sign_bits else 2 * format.smallest_normal
    x = np.clip(np.sort(data), lowest, format.max)
    y = format.round(x, overflow="saturate").astype(np.float64)
    assert (np.diff(y) >= 0).all()
    assert (np.abs(y - x) <= format.ulp(x).astype(np.float64) / 2).all()
    assert np.array_equal(format.round(y), y)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match="mode 'up' is unknown: choose from nearest, zero, stochastic"):
        FP16.encode(1.0, mode="up")
    with pytest.raises(ValueError, match="overflow 'clip' is unknown"):
        FP16.encode(1.0, overflow="clip")
    with pytest.raises(ValueError, match="code 16 is out of range: codes here run from 0 to 15"):
        FP4_E2M1.decode([3, 16])
    with pytest.raises(ValueError, match="code -1 is out of range"):
        FP4_E2M1.next_up(-1)
    with pytest.raises(ValueError, match="codes must be integers, not float64"):
        FP4_E2M1.decode([1.0])
    for wrong in (np.array([1j]), np.array(["1.0"]), np.array([None]), np.array([1], dtype=np.longdouble)):
        with pytest.raises(ValueError, match=f"dtype {wrong.dtype}"):
            FP16.encode(wrong)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (("x", 1, 4, 3, 7, "fn"), "specials 'fn' of format 'x' is unknown"),
        (("x", 2, 4, 3, 7, "nan"), r"layout \(2, 4, 3\)"),
        (("x", 1, 0, 3, 7, "nan"), r"layout \(1, 0, 3\)"),
        (("x", 1, 5, 24, 15, "nan"), r"layout \(1, 5, 24\)"),
        (("x", 1, 3, 0, 3, "ieee"), "needs a mantissa bit"),
        (("x", 1, 8, 3, 100, "nan"), "reaches beyond FP32"),
        (("x", 1, 8, 23, 128, "ieee"), "reaches beyond FP32"),
    ],
)
def test_impossible_formats_are_refused(description, message):
    with pytest.raises(ValueError, match=message):
        FloatFormat(*description)
