"""A block taken apart: each bit belongs to one number, and the numbers are those that the decoder finds."""

import gguf
import numpy as np
import pytest

from qlearn.export import dissect
from qlearn.export.dissect import Bits
from qlearn.export.tensor_types import TENSOR_TYPES, encode
from qlearn.formats.gguf_blocks import BLOCK_TYPES, unpack

RNG = np.random.default_rng(0)
BIASED = {"Q3_K": ("scales", 32)}  # what is added to a number before it is stored


def blocks(name, count=20):
    """Blocks of random bytes, with scales that are finite numbers."""
    found = RNG.integers(0, 256, (count, BLOCK_TYPES[name].nbytes), np.uint8)
    at = 0
    for field in BLOCK_TYPES[name].layout:
        if field.name in ("d", "m", "dmin"):
            found[:, at + 1] &= 0xBB  # never all ones in the exponent of a float16
        if name == "TQ1_0" and field.name in ("qs", "qh"):
            found[:, at : at + field.size] = encode(RNG.integers(-1, 2, (count, 256)).astype(np.float32), name)[
                :, at : at + field.size
            ]
        at += field.size
    return found


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_bit_belongs_to_one_number(name):
    """In TQ1_0 a byte belongs to several weights as a whole."""
    fields = dissect(blocks(name, 1)[0], name)
    bits = [(b.byte, bit) for field in fields for b in field.bits for bit in range(b.low, b.low + b.count)]
    assert set(bits) == {(byte, bit) for byte in range(BLOCK_TYPES[name].nbytes) for bit in range(8)}
    assert len(bits) == len(set(bits)) or name == "TQ1_0"


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_numbers_are_those_that_unpack_finds(name):
    for block in blocks(name):
        fields, expected = {f.name: f for f in dissect(block, name)}, unpack(block, name)
        for part, numbers in expected.items():
            for index, number in enumerate(numbers[0] if numbers.ndim == 2 else numbers):
                field = fields[part if numbers.ndim == 1 else f"{part}[{index}]"]
                if part == "codes":
                    width = sum(b.count for b in field.bits)
                    assert field.raw == (int(number) % 2**width if number < 0 else number)
                elif part in ("scales", "mins"):
                    offset = 32 if name == "Q3_K" else 0
                    assert field.value == number and field.raw == (int(number) + offset) % 256
                elif part == "e":
                    assert field.raw == number and field.value == 2.0 ** (int(number) - 127)
                else:
                    assert field.value == number and field.raw == np.float16(number).view(np.uint16)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_weights_are_those_that_the_package_gguf_decodes(name):
    for block in blocks(name, 5):
        weights = [f.value for f in dissect(block, name) if f.kind == "code"]
        with np.errstate(over="ignore", invalid="ignore"):
            theirs = gguf.quants.dequantize(block[None], gguf.GGMLQuantizationType[name])[0]
        assert np.array_equal(np.float32(weights), theirs)


FORMULA = {  # by hand, from the fields alone
    "Q4_0": lambda f, j: f["d"].value * (f[f"codes[{j}]"].raw - 8),
    "Q5_1": lambda f, j: f["d"].value * f[f"codes[{j}]"].raw + f["m"].value,
    "Q2_K": lambda f, j: (f["d"].value * f[f"scales[{j // 16}]"].value * f[f"codes[{j}]"].raw
                          - f["dmin"].value * f[f"mins[{j // 16}]"].value),
    "Q3_K": lambda f, j: f["d"].value * f[f"scales[{j // 16}]"].value * (f[f"codes[{j}]"].raw - 4),
    "Q4_K": lambda f, j: (f["d"].value * f[f"scales[{j // 32}]"].value * f[f"codes[{j}]"].raw
                          - f["dmin"].value * f[f"mins[{j // 32}]"].value),
    "Q6_K": lambda f, j: f["d"].value * f[f"scales[{j // 16}]"].value * (f[f"codes[{j}]"].raw - 32),
    "TQ1_0": lambda f, j: f["d"].value * (f[f"codes[{j}]"].raw - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULA)
def test_the_formulas_give_the_weights(name):
    x = RNG.standard_normal((1, BLOCK_TYPES[name].weights)).astype(np.float32)
    fields = {field.name: field for field in dissect(encode(x, name)[0], name)}
    for j in range(BLOCK_TYPES[name].weights):
        field = fields[f"codes[{j}]"]
        assert field.value == pytest.approx(FORMULA[name](fields, j), rel=1e-5, abs=1e-6)
        assert field.meaning.startswith(f"weight {j}: ")


def test_pieces_in_several_bytes():
    fields = {field.name: field for field in dissect(bytes(144), "Q4_K")}
    assert fields["scales[6]"].bits == (Bits(14, 0, 4), Bits(6, 6, 2)) and fields["scales[6]"].bytes == (6, 14)
    assert fields["mins[7]"].bits == (Bits(15, 4, 4), Bits(11, 6, 2))
    assert "byte 14 bits 0-3, byte 6 bits 6-7" in str(fields["scales[6]"]) and "bytes 0-1" in str(fields["d"])


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [("F32", -0.15625, (2097152, 124, 1)), ("F16", 1.5, (512, 15, 0)), ("BF16", 0.0, (0, 0, 0)),
     ("F16", 2.0**-24, (1, 0, 0))],
)  # fmt: skip
def test_plain_numbers(name, value, parts):
    mantissa, exponent, sign = dissect(encode(np.float32([[value]]), name)[0], name)
    assert (mantissa.raw, exponent.raw, sign.raw) == parts
    assert sign.value * mantissa.value * 2.0**exponent.value == value and f"{value:.9g}" in sign.meaning
    assert sum(b.count for field in (mantissa, exponent, sign) for b in field.bits) == 8 * TENSOR_TYPES[name].nbytes


@pytest.mark.parametrize(
    ("block", "name", "message"),
    [(bytes(17), "Q4_0", "a Q4_0 block has 18 bytes, not 17"), (bytes(36), "Q4_0", "not 36; give one block"),
     (b"", "Q8_0", "not 0"), (bytes(18), "IQ4_NL", "type 'IQ4_NL' cannot be dissected; choose from Q4_0"),
     (bytes(18), "q4_0", "type 'q4_0' cannot")],
    ids=["too short", "two blocks", "nothing", "no layout", "lower case"],
)  # fmt: skip
def test_what_is_no_block_is_told(block, name, message):
    with pytest.raises(ValueError, match=message):
        dissect(block, name)
