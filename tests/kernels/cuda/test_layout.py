"""The order of the weights: a decoder in plain loops, written from the table of `layout.py`, gives back all of it."""

import struct

import pytest
import torch

import qlearn
from qlearn.formats.integers import Integers
from qlearn.kernels.cuda.layout import arrange, unit_bytes, why_not
from qlearn.tensor import QuantizedTensor

METHODS = {  # name: (the method, its options, the kind of its zeros)
    "absmax": ("absmax", {}, None),
    "zero_point": ("zero_point", {}, "integer"),
    "hqq, zeros with fractions": ("hqq", {}, "float"),
    "sinq, column scales": ("sinq", {"order": 3}, "integer"),
    "sinq without zeros": ("sinq", {"order": 3, "shift": False}, None),
}
SIZES = {
    "one unit": (16, 128),
    "one row, and 8 columns more": (1, 136),
    "17 rows, half a unit": (17, 64),
    "20 rows, 3 units and a half": (20, 448),
    "33 rows, 2 units": (33, 256),
}


def quantized(name, rows, columns, bits, group, seed=0):
    method, options, _ = METHODS[name]
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.2
    return qlearn.quantize(weight, method, bits=bits, group_size=group, **options)


def code_of(words, bits, half, j, pair, which):
    """A code of lane 4g + t: of row g + 8 half, the input 32j + 8t + 2 pair + which.

    words: of the lane, in the order in which they are stored.
    """
    up = 16 * which
    if bits == 8:  # a word for each row, j and half of p
        return words[half * 8 + j * 2 + pair // 2] >> 8 * (pair % 2) + up & 255
    if bits == 4:  # a word for each row and j
        return words[half * 4 + j] >> 4 * pair + up & 15
    low = words[half * 2 + j // 2] >> 2 * (4 * (j % 2) + pair) + up & 3  # a word for each row and two j
    if bits == 2:
        return low
    return low | (words[4 + half] >> 4 * j + pair + up & 1) << 2  # and one for the third bits of each row


def decode(data, shape, bits, group, zeros):
    """(codes, scales, zeros or None) as lists of lists: a unit is 16 rows by 128 inputs, filled up at the edges."""
    data, (rows, columns) = bytes(data.tolist()), shape
    tiles, units, per_unit = -(-rows // 16), -(-columns // 128), 128 // group
    codes = [[None] * (128 * units) for _ in range(16 * tiles)]
    scales = [[None] * (per_unit * units) for _ in range(16 * tiles)]
    offsets = [[None] * (per_unit * units) for _ in range(16 * tiles)] if zeros else None
    words_of_lane, at = {8: (4, 4, 4, 4), 4: (4, 4), 3: (4, 2), 2: (4,)}[bits], 0
    for tile in range(tiles):
        for unit in range(units):
            words = [[] for _ in range(32)]
            for count in words_of_lane:  # a plane: for lane 0, for lane 1, ...
                for lane in range(32):
                    words[lane] += struct.unpack_from(f"<{count}I", data, at)
                    at += 4 * count
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for half in range(2):
                    for j in range(4):
                        for pair in range(4):
                            for which in range(2):
                                column = 128 * unit + 32 * j + 8 * t + 2 * pair + which
                                row = 16 * tile + g + 8 * half
                                codes[row][column] = code_of(words[lane], bits, half, j, pair, which)
            for values in (scales, offsets) if zeros else (scales,):
                for k in range(per_unit):
                    for row in range(16):
                        values[16 * tile + row][per_unit * unit + k] = struct.unpack_from("<e", data, at)[0]
                        at += 2
    assert at == len(data)
    return codes, scales, offsets


def per_weight(values, per, columns):
    """(rows, groups) -> (rows, columns), each repeated for its weights."""
    return values.repeat_interleave(per, 1)[:, :columns]


def check(qt, zeros):
    """Every code, scale and zero lies where the table says, and what does not fill a unit is filled up."""
    units, (rows, columns), bits = arrange(qt), qt.shape, qt.format.bits
    lift = 2 ** (bits - 1) if qt.format.signed else 0
    assert (units.shape, units.bits, units.zeros) == (qt.shape, bits, zeros)
    assert units.data.dtype == torch.uint8 and units.data.dim() == 1
    codes, scales, offsets = decode(units.data, qt.shape, bits, units.group, zeros)
    codes, scales = torch.tensor(codes), torch.tensor(scales)
    assert torch.equal(codes[:rows, :columns] - lift, qt.codes().long())
    assert not codes[rows:].any() and not codes[:, columns:].any()
    block = qt.block[1]
    expected = per_weight(qt.scales.float(), block, columns)
    assert torch.equal(per_weight(scales, units.group, columns)[:rows], expected)
    groups = -(-columns // units.group)
    assert not scales[rows:].any() and not scales[:, groups:].any()
    if zeros:
        offsets = per_weight(torch.tensor(offsets), units.group, columns)[:rows] - lift
        assert torch.equal(offsets, per_weight(qt.zero_points(), block, columns))
    return units


@pytest.mark.parametrize("group", [32, 64, 128, 256, None], ids=lambda group: "a row" if group is None else str(group))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_every_code_scale_and_zero(name, bits, group):
    qt = quantized(name, 18, 256, bits, group)
    units = check(qt, METHODS[name][2])
    assert units.group == (group if group in (32, 64) else 128)


@pytest.mark.parametrize("rows, columns", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [3, 4])
def test_sizes(name, bits, rows, columns):
    """Groups of 64 where they divide the columns; then one scale for a row, of a size that is none of the usual."""
    group = 64 if columns % 64 == 0 else None
    check(quantized(name, rows, columns, bits, group), METHODS[name][2])


def test_a_row_of_200_weights_with_one_scale():
    assert check(quantized("absmax", 3, 200, 4, None), None).group == 128


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_single_code_moves_only_its_own_bits(bits):
    """Each code in turn is all ones, all others zeros; so no bit of one lies where a bit of another does."""
    top, seen = 2**bits - 1, torch.zeros(unit_bytes(bits, 128), dtype=torch.int64)
    for number in range(0, 16 * 128, 5):
        codes = torch.zeros(16 * 128, dtype=torch.uint8)
        codes[number] = top
        format = Integers(bits, signed=False)
        qt = QuantizedTensor.from_codes(codes.view(16, 128), torch.zeros(16, 1).half(), format, (1, 128))
        data = arrange(qt).data.long()
        assert sum(bin(byte).count("1") for byte in data[data > 0].tolist()) == bits and not (seen & data).any()
        seen |= data


def test_signed_codes_of_methods_with_zeros_are_lifted_as_their_zeros():
    codes = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(1))
    zeros = torch.tensor([[-3.5], [0.0], [2.25], [7.0], [-8.0]]).half()
    check(QuantizedTensor.from_codes(codes, torch.ones(5, 1).half(), Integers(4), (1, 64), zeros=zeros), "float")


def test_column_scales_become_float32_and_the_rotation_is_kept():
    qt = quantized("sinq, column scales", 16, 128, 4, 64)
    assert qt.column_scales.dtype == torch.float16
    units = arrange(qt)
    assert units.column_scales.dtype == torch.float32 and torch.equal(units.column_scales, qt.column_scales.float())
    codes, scales = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1).half()
    units = arrange(QuantizedTensor.from_codes(codes, scales, Integers(4), (1, 64), hadamard=32))
    assert units.hadamard == 32 and units.column_scales is None


@pytest.mark.parametrize(
    "bits, group, zeros, expected",
    [
        (4, 128, None, 1024 + 32), (4, 32, None, 1024 + 128), (4, 64, "integer", 1024 + 128), (2, 128, None, 512 + 32),
        (3, 32, "float", 768 + 256), (8, 64, None, 2048 + 64), (8, 128, "integer", 2048 + 64),
    ],
)  # fmt: skip
def test_unit_bytes(bits, group, zeros, expected):
    """16 x 128 codes, and two bytes for a scale and for a zero of each row and group."""
    assert unit_bytes(bits, group, zeros) == expected and expected % 16 == 0  # so every copy can begin there


def test_nbytes_counts_what_a_product_reads():
    qt = quantized("sinq, column scales", 20, 192, 4, 64)  # 2 x 2 units
    units = arrange(qt)
    assert units.nbytes == 4 * unit_bytes(4, 64, "integer") + 192 * 4 and units.unit_bytes == 1024 + 2 * 64
    units = arrange(quantized("absmax", 16, 256, 4, None))  # one scale for a row is held for each of its units
    assert units.nbytes == 2 * (1024 + 32)


def of_codes(rows, columns, format, block, scales=None, **parts):
    codes = torch.zeros(rows, columns, dtype=torch.int8 if format.signed else torch.uint8)
    scales = torch.ones(rows // block[0], columns // block[1]).half() if scales is None else scales
    return QuantizedTensor.from_codes(codes, scales, format, block, **parts)


REFUSED = {
    "5 bits": (lambda: qlearn.quantize(torch.randn(4, 64), "absmax", bits=5), "the format is int5"),
    "NF4": (lambda: qlearn.quantize(torch.randn(4, 64), "nf4", group_size=64), "the format is nf4"),
    "groups of 16": (lambda: of_codes(4, 64, Integers(4), (1, 16)), "shared by 1 x 16 weights, not by 32, 64 or"),
    "groups of 96": (lambda: of_codes(4, 192, Integers(4), (1, 96)), "shared by 1 x 96 weights"),
    "groups of 200": (lambda: of_codes(4, 400, Integers(4), (1, 200)), "shared by 1 x 200 weights"),
    "one scale for all": (lambda: of_codes(4, 64, Integers(4), (4, 64)), "shared by 4 x 64 weights"),
    "a scale for each column": (lambda: of_codes(4, 64, Integers(4), (4, 1)), "shared by 4 x 1 weights"),
    "scales of float32": (
        lambda: of_codes(4, 64, Integers(4), (1, 64), scales=torch.full((4, 1), 1e5)),
        "the scales are float32, and the kernel keeps float16",
    ),
    "60 columns": (lambda: of_codes(4, 60, Integers(4), (1, 60)), "have 60 weights, which is no multiple of 8"),
    "bands of column scales": (
        lambda: of_codes(4, 64, Integers(4), (1, 64), column_scales=torch.ones(2, 64)),
        "column scales for several bands",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make, message):
    qt = make()
    assert message in why_not(qt)
    with pytest.raises(ValueError, match=f"this weight does not fit the kernel: .*{message}"):
        arrange(qt)


@pytest.mark.parametrize("group", [32, 64, 128, 256, 384])
def test_what_fits(group):
    assert why_not(of_codes(1, 768, Integers(4), (1, group))) is None
