"""The parser: right for what the package gguf and the hand write, and one GGUFError for everything else."""

import itertools
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlearn.export import GGUFError, GGUFFile, fields, inspect
from tests.export import handmade
from tests.export.handmade import ARRAY, SMALL, STRING, array, entry, file, tensor, text

MEGABYTES = 3


@pytest.fixture
def write(tmp_path):
    """A function: bytes -> path of a file that holds them."""

    def path(data):
        (tmp_path / "file.gguf").write_bytes(data)
        return tmp_path / "file.gguf"

    return path


def test_a_small_file(write):
    found = GGUFFile(write(SMALL))
    assert found.version == 3 and found.alignment == 32 and found.size == len(SMALL)
    assert found.get("general.architecture", str) == "llama" and found.get("a.bool", bool) is True
    assert found.get("a.float", float) == 0.5 and found.get("texts", list) == ["one", "two", "drei"]
    assert found.get("an.array", np.ndarray).tolist() == [3, -1, 2] and found.kinds["an.array"] == "array of int32"
    assert list(found.tensors) == ["first", "second", "scalar"]
    assert found.weights("first").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.weights("second").tolist() == [(i & 15) - 8.0 for i in range(16)] + [-8.0] * 16
    assert found.weights("scalar").tolist() == [7.0]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_without_anything(write, version):
    found = GGUFFile(write(file(version=version)))
    assert found.version == version and not found.metadata and not found.tensors


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_other_alignments(write, alignment):
    data = np.float32([1, 2]).tobytes()
    entries = [entry("general.alignment", 4, alignment)]
    found = GGUFFile(write(file(entries, [tensor("t", [2])], data, alignment=alignment)))
    assert found.weights("t").tolist() == [1, 2] and found.tensor("t").start % alignment == 0


def test_tensors_in_another_order_than_their_data(write):
    data = np.float32([1] * 8 + [2] * 8).tobytes()
    found = GGUFFile(write(file((), [tensor("b", [8], 0, 32), tensor("a", [8], 0, 0)], data)))
    assert found.weights("a").tolist() == [1] * 8 and found.weights("b").tolist() == [2] * 8


def test_what_the_package_gguf_writes(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "any")
    for kind in (0, 1, 2, 3, 4, 5, 10, 11):
        name = gguf.GGUFValueType(kind).name.lower()
        getattr(writer, f"add_{name}")(f"number.{name}", 1 + kind)
    writer.add_float32("number.float32", 0.1)
    writer.add_float64("number.float64", 0.1)
    writer.add_string("text", "naïve 🚀")
    writer.add_array("many", [f"token {i}" for i in range(1000)])
    writer.add_array("floats", [0.5, 1.5])
    tensors = {f"t{i}": rng.standard_normal((3, 4, 5)[:i]).astype(np.float32) for i in (1, 2, 3)}
    for name, numbers in tensors.items():
        writer.add_tensor(name, numbers)
    blocks = gguf.quants.quantize(rng.standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(path)
    assert found.get("number.uint64", int) == 11 and found.kinds["number.int8"] == "int8"
    assert found.get("number.float32", float) == np.float32(0.1) and found.get("number.float64", float) == 0.1
    assert found.get("text", str) == "naïve 🚀" and found.get("many", list)[-1] == "token 999"
    for name, numbers in tensors.items():
        assert np.array_equal(found.weights(name), numbers)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found.weights("blocks"), expected) and np.array_equal(found.data("blocks"), blocks)


BROKEN = {
    "empty file": (b"", "has 0 bytes, fewer than the 24 of a header"),
    "23 bytes": (SMALL[:23], "has 23 bytes"),
    "another format": (b"PK\3\4" + bytes(50), r"begins with b'PK\\x03\\x04', where a GGUF file has b'GGUF'"),
    "version 1": (file(version=1), "version 1 is not supported"),
    "version 4": (file(version=4), "version 4 is not supported"),
    "big-endian": (file(version=3 << 24), "the file is big-endian"),
    "too many tensors": (file(counts=(2**60, 0)), "tensors do not fit in"),
    "too many entries": (file(counts=(0, 2**63)), "entries of metadata and 0 tensors do not fit"),
    "one entry too many": (
        file([entry("k", 0, 1)], counts=(0, 2), data=bytes(64)), "metadata key '' of entry 1 is empty"),
    "no key": (file([entry("", 0, 1)]), "metadata key '' of entry 0 is empty"),
    "key twice": (file([entry("k", 0, 1)] * 2), "metadata key 'k' occurs twice"),
    "key too long": (file([text("k", 2**40) + bytes(20)]), "key 0 needs 1099511627776 bytes at offset 32"),
    "key that is no text": (
        file([text(b"\xff\xfe") + struct.pack("<IB", 0, 1)]), "key 0 at offset 32 is not valid UTF-8"),
    "unknown type": (file([text("k") + struct.pack("<IQ", 13, 0)]), "type of k is 13, and no type of value has that"),
    "bool of 2": (file([entry("k", 7, 2)]), "metadata 'k' is 2, where a bool is 0 or 1"),
    "bools of 2": (file([array("k", 7, [0, 2])]), "metadata 'k' holds 2, where a bool"),
    "text too long": (file([text("k") + struct.pack("<I", STRING) + text("v", 2**63)]), "k needs 9223372036854775808"),
    "text that is no text": (
        file([text("k") + struct.pack("<I", STRING) + text(b"\xc3")]), "k at offset 45 is not valid"),
    "array of arrays": (file([array("k", ARRAY, []) + bytes(9)]), "metadata 'k' is an array of arrays"),
    "array of unknown": (file([text("k") + struct.pack("<IIQ", ARRAY, 77, 0)]), "element type of k is 77"),
    "array too long": (file([array("k", 4, [1], 2**61)]), "metadata 'k' needs 9223372036854775808 bytes"),
    "array that overflows": (file([array("k", 12, [1], 2**62)]), "metadata 'k' needs 36893488147419103232 bytes"),
    "texts too many": (file([array("k", STRING, ["a"], 2**60)]), "claims 1152921504606846976 strings"),
    "text in array too long": (
        file([text("k") + struct.pack("<IIQ", ARRAY, STRING, 1) + text("v", 99)]), r"k\[0\] needs 99"),
    "alignment 0": (file([entry("general.alignment", 4, 0)]), "general.alignment is 0"),
    "alignment 24": (file([entry("general.alignment", 4, 24)]), "alignment is 24 .uint32., where a power of two"),
    "alignment as text": (file([entry("general.alignment", STRING, "32")]), "alignment is 32 .string."),
    "name of 64 bytes": (file((), [tensor("n" * 64, [1])], bytes(4)), "name of tensor 0 has 64 bytes, and 63 are"),
    "five dimensions": (file((), [tensor("t", [1] * 5)], bytes(4)), "tensor 't' has 5 dimensions, and 4 are allowed"),
    "2**32 dimensions": (file((), [text("t") + struct.pack("<I", 2**32 - 1) + bytes(99)]), "has 4294967295 dimensions"),
    "unknown tensor type": (file((), [tensor("t", [1], 99)], bytes(4)), "tensor 't' is of type 99, which is unknown"),
    "type given up": (
        file((), [tensor("t", [32], 4)], bytes(32)), "is of type 4, which is unknown here or was given up"),
    "half a block": (
        file((), [tensor("t", [33], 2)], bytes(64)), "row of 't' has 33 weights, no whole Q4_0 blocks of 32"),
    "nothing in it": (file((), [tensor("t", [2**60, 0, 2**60])], bytes(4)), "tensor 't' has a dimension of 0"),
    "size that overflows": (file((), [tensor("t", [2**32, 2**32, 2**32])], bytes(4)), "tensor 't' ends at byte"),
    "offset not aligned": (file((), [tensor("t", [1], 0, 4)], bytes(99)), "'t' begins at 4, no multiple of 32"),
    "offset outside": (file((), [tensor("t", [1], 0, 2**40)], bytes(4)), "tensor 't' ends at byte 10995"),
    "data cut off": (file((), [tensor("t", [8])], bytes(31)), "'t' ends at byte 96, and the file has 95"),
    "name twice": (file((), [tensor("t", [1]), tensor("t", [1], 0, 32)], bytes(64)), "tensor 't' occurs twice"),
    "overlap": (file((), [tensor("a", [16]), tensor("b", [1], 0, 32)], bytes(64)), "'a' and 'b' overlap"),
    "same place": (file((), [tensor("a", [8]), tensor("b", [8])], bytes(64)), "tensors 'a' and 'b' overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_wrong_is_told_in_one_sentence(write, data, message):
    with pytest.raises(GGUFError, match=message) as error:
        GGUFFile(write(data))
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_cut_off_anywhere(write):
    for length in range(len(SMALL)):
        with pytest.raises(GGUFError):
            GGUFFile(write(SMALL[:length]))


def test_padding_at_the_end(write):
    """What is behind the last tensor is padding, and nobody misses it."""
    for padding in (0, 1, 28, 100):
        assert len(GGUFFile(write(SMALL + bytes(padding))).tensors) == 3


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [("missing", int, "has no metadata 'missing'"), ("a.bool", int, "is of the type bool, where int is needed"),
     ("a.float", int, "of the type float32"), ("texts", np.ndarray, "of the type array of string"),
     ("an.array", list, "of the type array of int32")],
)  # fmt: skip
def test_metadata_that_are_not_what_is_needed(write, key, kind, message):
    with pytest.raises(GGUFError, match=message):
        GGUFFile(write(SMALL)).get(key, kind)


def test_garbage_is_quoted_in_one_printable_line(write):
    for key in ("one\ntwo\x1b[31m", "x" * 5000):
        with pytest.raises(GGUFError) as error:
            GGUFFile(write(file([entry(key, 7, 2)])))
        message = str(error.value)
        assert message.isprintable() and len(message) < 400 and message.endswith("fetch or write it again")


def test_a_default_stands_in(write):
    found = GGUFFile(write(SMALL))
    assert found.get("missing", int, 0) == 0 and found.get("missing", bool, False) is False


def test_a_tensor_that_is_not_there(write):
    with pytest.raises(GGUFError, match="has no tensor third"):
        GGUFFile(write(SMALL)).weights("third")


def test_a_type_that_can_be_listed_and_not_decoded(write):
    found = GGUFFile(write(file((), [tensor("t", [32], 9)], bytes(36))))
    assert found.tensor("t").type.name == "Q8_1"
    with pytest.raises(GGUFError, match="tensor t: type Q8_1 is not decoded here"):
        found.weights("t")


# ---- whatever the bytes: a result, or GGUFError ----------------------------------------------------------------------


NUMBERS = [0, 1, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1]


@st.composite
def damaged(draw):
    """The small file with bytes changed, cut out, put in, and its end cut off."""
    data = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["change", "flip", "cut", "insert", "number"]))
        if kind == "change":
            data[at] = draw(st.integers(0, 255))
        elif kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        else:
            data[at : at + 8] = struct.pack(
                "<Q", draw(st.sampled_from([0, 1, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1]))
            )
        data = data or bytearray(1)
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def use(path):
    """Everything that can be asked about a file."""
    found = GGUFFile(path)
    for name in found.tensors:
        try:
            found.weights(name)
        except GGUFError as error:
            assert "not decoded" in str(error)
    assert repr(inspect(path))
    spans = fields(path)
    assert spans[0].start == 0 and spans[-1].end == found.size
    assert all(before.end == after.start for before, after in itertools.pairwise(spans))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(damaged(), st.binary(max_size=200).map(lambda tail: SMALL[:24] + tail)))
def test_any_bytes_give_a_result_or_a_gguf_error(write, data):
    path = write(data)
    tracemalloc.start()
    try:
        use(path)
    except GGUFError as error:
        assert str(error).isprintable()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEGABYTES * 2**20


def test_handmade_is_what_gguf_reads(write):
    """The hand that made these files is right itself."""
    reader = gguf.GGUFReader(write(handmade.file(
        [entry("general.architecture", STRING, "llama"), array("an.array", 5, [3, -1, 2])], [tensor("first", [4, 2])],
        np.arange(8, dtype=np.float32).tobytes()))
    )  # fmt: skip
    assert reader.fields["an.array"].contents() == [3, -1, 2]
    assert reader.tensors[0].data.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
