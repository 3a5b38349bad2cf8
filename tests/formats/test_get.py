"""The look-up of a format by the name that files store."""

import numpy as np
import pytest

from qlearn import formats


def test_every_name_gives_its_format_and_the_format_its_name():
    expected = {f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 9)}
    expected |= {
        "fp32",
        "fp16",
        "bf16",
        "fp8_e4m3fn",
        "fp8_e5m2",
        "fp6_e3m2",
        "fp6_e2m3",
        "fp4_e2m1",
        "e8m0",
        "nf4",
        "nf3",
        "sign",
        "dynamic8",
        "trit",
        "mx_int8",
    }
    assert set(formats.FORMATS) == expected
    for name in expected:
        assert formats.get(name).name == name
    assert formats.get("uint3") == formats.Integers(3, signed=False)
    assert formats.get("nf4") is formats.codebooks.NF4


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name != "fp32"])
def test_every_format_decodes_all_codes_of_its_bits_and_encodes_them_back(name):
    format = formats.get(name)
    codes = np.arange(format.count)
    numbers = format.decode(codes)
    assert numbers.dtype == np.float32 and numbers.shape == codes.shape
    known = ~np.isnan(numbers)
    assert np.array_equal(format.encode(numbers[known]), codes[known])
    assert np.array_equal(format.to_unsigned(format.from_unsigned(codes)), codes)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 1001])
@pytest.mark.parametrize("name", [name for name in formats.FORMATS if formats.get(name).bits <= 8])
def test_every_format_of_up_to_eight_bits_packs_its_codes(name, count):
    format = formats.get(name)
    codes = np.random.default_rng(0).integers(0, format.count, count).astype(np.uint8)
    packed = format.pack(codes)
    assert packed.dtype == np.uint8 and packed.shape == (format.packed_size(count),)
    assert format.packed_size(count) == -(-count * round(5 * format.bits) // 40)
    assert np.array_equal(format.unpack(packed, count), codes)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'int9' is unknown: choose from int1, .*uint8, fp32, .*e8m0, nf4, nf3, sign, dynamic8, trit"
    ):
        formats.get("int9")
