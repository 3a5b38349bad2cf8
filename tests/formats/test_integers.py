"""Ranges, two's complement, packing to the true width, and trits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlearn.formats import integers
from qlearn.formats.integers import (
    TRIT,
    Integers,
    from_unsigned,
    integer_range,
    pack,
    pack_trits,
    packed_size,
    to_unsigned,
    unpack,
    unpack_trits,
)

ALL_BITS = range(1, 9)
every_width = pytest.mark.parametrize("bits", ALL_BITS)


def pack_bit_by_bit(codes, bits):
    """The definition in the module's first page, one bit at a time."""
    stream = [code >> j & 1 for code in codes for j in range(bits)]
    packed = [0] * -(-len(stream) // 8)
    for j, bit in enumerate(stream):
        packed[j // 8] |= bit << j % 8
    return packed


def random_codes(bits, count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8)


# ---- ranges and signs ------------------------------------------------------------------------------------------------


@every_width
def test_ranges_hold_as_many_integers_as_there_are_codes(bits):
    for signed in (True, False):
        low, high = integer_range(bits, signed)
        assert high - low + 1 == 2**bits and low <= 0 <= high
    assert (
        integer_range(8) == (-128, 127) and integer_range(8, signed=False) == (0, 255) and integer_range(1) == (-1, 0)
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_range_leaves_the_lowest_unused(bits):
    low, high = integer_range(bits, symmetric=True)
    assert low == -high == integer_range(bits)[0] + 1


@every_width
def test_stored_codes_are_the_low_bits_of_twos_complement(bits):
    numbers = np.arange(*integer_range(bits)).astype(np.int8)
    codes = to_unsigned(numbers, bits)
    assert codes.tolist() == [int(f"{int(n) % 256:08b}"[8 - bits :], 2) for n in numbers]
    assert codes.dtype == np.uint8


@every_width
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list], ids=["numpy", "torch", "list"])
def test_signed_round_trip(bits, kind):
    low, high = integer_range(bits)
    numbers = kind(list(range(low, high + 1)))
    back = from_unsigned(to_unsigned(numbers, bits), bits)
    assert back.tolist() == list(range(low, high + 1))
    assert str(back.dtype).endswith("int8")
    assert isinstance(back, torch.Tensor) == isinstance(numbers, torch.Tensor)


def test_signs_of_python_numbers_matrices_and_nothing():
    assert to_unsigned(-1, 4) == 15 and type(to_unsigned(-1, 4)) is int
    assert from_unsigned(15, 4) == -1 and type(from_unsigned(15, 4)) is int
    assert from_unsigned(torch.full((2, 3), 7), 3).tolist() == [[-1] * 3] * 2
    assert to_unsigned([], 4).tolist() == from_unsigned([], 4).tolist() == []


# ---- packing ---------------------------------------------------------------------------------------------------------


@every_width
def test_packing_follows_its_definition_at_every_length(bits):
    for count in range(0, 35):
        codes = random_codes(bits, count, seed=count)
        packed = pack(codes, bits)
        assert packed.dtype == np.uint8 and packed.tolist() == pack_bit_by_bit(codes.tolist(), bits)
        assert len(packed) == packed_size(count, bits)
        back = unpack(packed, bits, count)
        assert back.dtype == np.uint8 and np.array_equal(back, codes)


@every_width
def test_torch_packs_the_same_bytes(bits):
    for count in (0, 1, 7, 64, 1001):
        codes = random_codes(bits, count)
        packed = pack(torch.from_numpy(codes), bits)
        assert isinstance(packed, torch.Tensor) and packed.dtype == torch.uint8
        assert np.array_equal(packed.numpy(), pack(codes, bits))
        back = unpack(packed, bits, count)
        assert isinstance(back, torch.Tensor) and back.dtype == torch.uint8
        assert np.array_equal(back.numpy(), codes)


@every_width
def test_large_round_trip(bits):
    codes = random_codes(bits, 100_003)
    assert np.array_equal(unpack(pack(codes, bits), bits, codes.size), codes)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(ALL_BITS), data=st.data())
def test_any_codes_come_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    assert unpack(pack(codes, bits), bits, len(codes)).tolist() == codes
    first = data.draw(st.integers(0, len(codes)))
    assert unpack(pack(codes, bits), bits, first).tolist() == codes[:first]


def test_the_picture_in_the_docstring():
    """Code i of the eight has all its three bits set, the others none: its digit marks the bits that it owns."""
    picture = [list("22111000"), list("54443332"), list("77766655")]
    for place in range(8):
        codes = [7 if i == place else 0 for i in range(8)]
        drawn = [f"{byte:08b}" for byte in pack(codes, 3)]
        assert drawn == ["".join("1" if digit == str(place) else "0" for digit in row) for row in picture]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint32, np.bool_])
def test_any_integer_dtype_packs(dtype):
    assert pack(np.array([[1, 0], [1, 1]], dtype=dtype), 1).tolist() == [0b1101]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint16, torch.uint32, torch.bool])
def test_any_integer_tensor_packs(dtype):
    assert pack(torch.tensor([[1, 0], [1, 1]]).to(dtype), 1).tolist() == [0b1101]


def test_packing_reads_views_row_by_row_and_changes_nothing():
    codes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert unpack(pack(codes.T, 4), 4, 12).tolist() == codes.T.reshape(-1).tolist()
    assert unpack(pack(torch.from_numpy(codes).T, 4), 4, 12).tolist() == codes.T.reshape(-1).tolist()
    assert codes.tolist() == np.arange(12).reshape(3, 4).tolist()
    packed = pack(codes, 4)
    unpack(packed, 4, 12)[:] = 0
    assert packed.tolist() == pack(codes, 4).tolist()


def test_unpack_ignores_what_lies_past_the_last_code():
    packed = np.array([0x21, 0xF3, 0xFF, 0xFF], dtype=np.uint8)
    assert unpack(packed, 4, 3).tolist() == [1, 2, 3]
    assert unpack(packed, 3, 0).tolist() == []


def test_torch_operations_do_the_same(monkeypatch):
    """What runs for a tensor on a GPU, here on the CPU, where NumPy would otherwise step in."""
    monkeypatch.setattr(integers, "native", lambda x: (x, lambda result: result))
    for bits in ALL_BITS:
        codes = torch.from_numpy(random_codes(bits, 1001))
        packed = pack(codes, bits)
        assert packed.tolist() == pack_bit_by_bit(codes.tolist(), bits)
        assert torch.equal(unpack(packed, bits, 1001), codes)
        signed = from_unsigned(codes, bits)
        assert signed.dtype == torch.int8 and torch.equal(to_unsigned(signed, bits), codes)
        for format in (Integers(bits), Integers(bits, signed=False)):
            numbers = format.decode(codes)
            assert numbers.dtype == torch.float32 and torch.equal(format.from_unsigned(codes).float(), numbers)
    trits = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, 1003, dtype=np.int8))
    assert torch.equal(unpack_trits(pack_trits(trits), 1003), trits)


# ---- trits -----------------------------------------------------------------------------------------------------------


def test_every_group_of_five_trits_has_its_own_byte():
    groups = np.array(np.meshgrid(*[[-1, 0, 1]] * 5)).reshape(5, -1).T
    packed = pack_trits(groups)
    assert packed.tolist() == [sum((int(t) + 1) * 3**i for i, t in enumerate(group)) for group in groups]
    assert sorted(packed.tolist()) == list(range(243))
    assert np.array_equal(unpack_trits(packed, groups.size).reshape(-1, 5), groups)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_trits_are_a_format(kind):
    numbers = kind([-3.0, -0.51, -0.5, 0.0, 0.5, 0.51, float("inf")])
    codes = TRIT.encode(numbers)
    assert codes.tolist() == [0, 0, 1, 1, 1, 2, 2] and str(codes.dtype).endswith("uint8")
    assert TRIT.round(numbers).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert TRIT.from_unsigned(codes).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert torch.equal(torch.as_tensor(TRIT.to_unsigned(TRIT.from_unsigned(codes))), torch.as_tensor(codes))
    assert torch.equal(torch.as_tensor(TRIT.pack(codes)), torch.as_tensor(pack_trits(TRIT.from_unsigned(codes))))


def test_what_is_no_trit_is_refused():
    with pytest.raises(ValueError, match="NaN cannot be stored as a trit"):
        TRIT.encode(float("nan"))
    for function in (TRIT.decode, TRIT.from_unsigned, TRIT.pack):
        with pytest.raises(ValueError, match="3"):
            function(np.array([0, 3]))
    with pytest.raises(ValueError, match="2"):
        TRIT.to_unsigned(np.array([0, 2]))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 1003])
def test_trits_come_back_at_any_length(kind, count):
    trits = np.random.default_rng(count).integers(-1, 2, count, dtype=np.int8)
    packed = pack_trits(kind(trits))
    assert len(packed) == -(-count // 5) and isinstance(packed, torch.Tensor) == (kind is not np.asarray)
    back = unpack_trits(packed, count)
    assert str(back.dtype).endswith("int8") and np.array_equal(np.asarray(back), trits)


# ---- the format object -----------------------------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("signed", [True, False])
def test_the_format_stores_every_integer_of_its_range(bits, signed):
    format = Integers(bits, signed)
    low, high = integer_range(bits, signed)
    numbers = np.arange(low, high + 1, dtype=np.float32)
    codes = format.encode(numbers)
    assert sorted(codes.tolist()) == list(range(2**bits))
    assert np.array_equal(format.decode(codes), numbers)
    assert np.array_equal(format.to_unsigned(numbers.astype(np.int64)), codes)
    assert np.array_equal(format.from_unsigned(codes), numbers)
    assert format.encode([-1e9, -np.inf, 1e9, np.inf]).tolist() == [codes[0], codes[0], codes[-1], codes[-1]]
    assert format.name == ("int" if signed else "uint") + str(bits)


def test_encoding_rounds_ties_to_even():
    assert Integers(4).round([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4999]).tolist() == [-2, -2, 0, 0, 2, 2, 2]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_errors_name_the_value(kind):
    with pytest.raises(ValueError, match="code 16 is out of range: codes here run from 0 to 15"):
        pack(kind([3, 16, 2]), 4)
    with pytest.raises(ValueError, match="code -3 is out of range: codes here run from 0 to 15"):
        pack(kind([3, -3, 2]), 4)
    with pytest.raises(ValueError, match="code 8 is out of range: codes here run from -8 to 7"):
        to_unsigned(kind([8]), 4)
    with pytest.raises(ValueError, match="code 2 is out of range: codes here run from -1 to 1"):
        pack_trits(kind([0, 2]))
    with pytest.raises(ValueError, match=r"codes must be integers, not .*float"):
        pack(kind([1.0, 2.0]), 4)
    packed = pack(kind([1, 2, 3]), 4)
    with pytest.raises(ValueError, match="5 codes of 4 bits take 3 bytes, but only 2 were given"):
        unpack(packed, 4, 5)
    with pytest.raises(ValueError, match="16 trits take 4 bytes, but only 2 were given"):
        unpack_trits(packed, 16)
    with pytest.raises(ValueError, match=r"packed codes are 1-D uint8, not 2-D .*uint8"):
        unpack(packed.reshape(1, -1), 4, 2)
    with pytest.raises(ValueError, match=r"packed codes are 1-D uint8, not 1-D .*int64"):
        unpack(kind([33, 3]), 4, 2)
    with pytest.raises(ValueError, match="code 243 is out of range"):
        unpack_trits(pack(kind([243]), 8), 5)
    with pytest.raises(ValueError, match="count -1 is negative"):
        unpack(packed, 4, -1)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5])
def test_widths_that_do_not_exist(bits):
    calls = [
        lambda: pack([0], bits),
        lambda: unpack(np.zeros(9, np.uint8), bits, 1),
        lambda: integer_range(bits),
        lambda: packed_size(1, bits),
        lambda: Integers(bits),
        lambda: to_unsigned([0], bits),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"integers of {bits} bits are not supported"):
            call()


def test_symmetric_ranges_that_do_not_exist():
    with pytest.raises(ValueError, match="no symmetric range has 1 signed bits"):
        integer_range(1, symmetric=True)
    with pytest.raises(ValueError, match="no symmetric range has 4 unsigned bits"):
        integer_range(4, signed=False, symmetric=True)


def test_nan_is_no_integer():
    with pytest.raises(ValueError, match="NaN cannot be stored as int4"):
        Integers(4).encode([1.0, np.nan])
