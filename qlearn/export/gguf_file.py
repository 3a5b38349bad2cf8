"""Reading a GGUF file: what its bytes are, and the refusal of everything that is not quite one.

GGUF is the file format of llama.cpp: one file that holds a model's weights and all that is needed to run it, laid out
so that the weights can be used where they lie, by mapping the file into memory. It has four parts, little-endian
throughout:

    header      "GGUF", the version (uint32), the number of tensors and of metadata entries (uint64 each)
    metadata    for each entry: a key (string), the type of the value (uint32), the value
    tensors     for each tensor: its name (string), the number of dimensions (uint32), the dimensions (uint64 each), its
                type (uint32), where its data begin, counted from the start of the data (uint64)
    data        the tensors, each beginning at a multiple of the alignment: 32, or the metadata's general.alignment

A string is its length in bytes (uint64) and that many bytes of UTF-8. An array is the type of its elements (uint32),
their number (uint64), and the elements. So the smallest file, without metadata or tensors, has 24 bytes:

    47 47 55 46   03 00 00 00   00 00 00 00 00 00 00 00   00 00 00 00 00 00 00 00
    G  G  U  F    version 3     0 tensors                 0 entries of metadata

Dimensions stand in ggml's order: the length of a row comes first, where NumPy and torch have it last. Here a shape is
always rows first.

**Nothing is believed.** A file may be cut off, or damaged, or made to do harm: a count of 2**60 would have a careless
reader ask for all the memory there is. So each number is checked against the bytes that are really there before
anything is made of it, and all that can be wrong ends in a `GGUFError` of one sentence. What is held in memory is the
metadata; the weights stay in the file until they are asked for.

Source: docs/gguf.md of ggml; ggml/src/gguf.cpp in llama.cpp, which refuses the same.
"""

import itertools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlearn.export import tensor_types
from qlearn.export.tensor_types import BY_ID, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
LONGEST_NAME = 63  # bytes: ggml keeps names in 64, with a zero at the end
MOST_DIMENSIONS = 4
LONGEST_MESSAGE = 400  # letters
STRING, ARRAY, BOOL = 8, 9, 7
VALUES = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"), 4: ("uint32", "<I"),
    5: ("int32", "<i"), 6: ("float32", "<f"), BOOL: ("bool", "<B"), STRING: ("string", None), ARRAY: ("array", None),
    10: ("uint64", "<Q"), 11: ("int64", "<q"), 12: ("float64", "<d"),
}  # fmt: skip
SMALLEST = {"metadata": 13, "tensor": 24}  # bytes of an entry: a name of one letter, a value of one byte; no dimensions
REMEDY = "the file is incomplete or damaged; fetch or write it again"


class GGUFError(ValueError):
    """A file that is no GGUF file, or not a whole one, or one that cannot be used for what was asked.

    What is quoted from the file may be garbage; it is made printable, and a long sentence is cut in the middle.
    """

    def __init__(self, message):
        message = printable(message)
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:200]} ... {message[-120:]}")


def printable(text):
    """A text from a file with escapes for everything that is no letter, sign or space.

    >>> print(printable("a.key" + chr(27) + "!"))
    a.key\\x1b!
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error):
    """What an exception says, without the lines around it: the last one says most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and what it is.

    shape: rows first.  start, nbytes: its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    nbytes: int

    @property
    def end(self):
        return self.start + self.nbytes

    @property
    def row_bytes(self):
        """Bytes of a row: of its last dimension."""
        return self.type.size(self.shape[-1:])


@dataclass(frozen=True)
class Span:
    """Some bytes of a file, and what they say.  Bytes start ... end - 1; value: the number or text that they hold."""

    start: int
    end: int
    name: str
    value: object
    meaning: str


class GGUFFile:
    """A GGUF file: its metadata, and its tensors where they lie.

    path: of the file.  trace: a list that a `Span` is added to for every piece of header, metadata and tensor list.

    version, alignment, data_start, size: numbers.
    metadata: dict key -> number, bool, str, NumPy array, or list of str.
    kinds: dict key -> the type of the value as a word, such as "uint32" or "array of string".
    tensors: dict name -> TensorInfo, in the order of the file.

    Raises FileNotFoundError for no file, and GGUFError for one that is not a complete GGUF file of version 2 or 3.
    """

    def __init__(self, path, trace=None):
        self.path = Path(path)
        self._bytes = _mapped(self.path)
        self.size = len(self._bytes)
        cursor = _Cursor(self._bytes, trace)
        self.version, tensors, entries = _header(cursor)
        self.metadata, self.kinds = _metadata(cursor, entries)
        self.alignment = _alignment(self.metadata, self.kinds)
        found = [_tensor(cursor, number) for number in range(tensors)]
        self.data_start = -(-cursor.at // self.alignment) * self.alignment if found else cursor.at
        cursor.pad(self.data_start)
        self.tensors = _placed(found, self.data_start, self.alignment, self.size)

    def data(self, name):
        """The bytes of a tensor as they lie in the file: uint8 (rows, bytes of a row), read when they are looked at."""
        info = self.tensor(name)
        flat = np.frombuffer(self._bytes, np.uint8, info.nbytes, info.start)
        return flat.reshape(-1, info.row_bytes)

    def weights(self, name):
        """The numbers of a tensor: float32 in its shape.  Raises GGUFError for a type that cannot be decoded."""
        info = self.tensor(name)
        try:
            return tensor_types.decode(self.data(name), info.type.name).reshape(info.shape)
        except ValueError as error:
            raise GGUFError(f"tensor {name}: {error}") from error

    def block(self, name, index):
        """The bytes of one block of a tensor, counted from 0 through all rows: uint8 (bytes of a block,)."""
        blocks = self.data(name).reshape(-1, self.tensor(name).type.nbytes)
        if not 0 <= index < len(blocks):
            raise GGUFError(f"tensor {name} has {len(blocks)} blocks, and no number {index}; count from 0")
        return blocks[index]

    def tensor(self, name):
        """TensorInfo of a tensor.  Raises GGUFError when the file has none of that name."""
        if name not in self.tensors:
            raise GGUFError(f"{self.path} has no tensor {name}; it is incomplete, or of another architecture")
        return self.tensors[name]

    def get(self, key, kind, default=None):
        """The value of a key, an int, float, bool, str, or array.

        kind: int, float, bool, str, list (of strings) or np.ndarray (of numbers).
        Raises GGUFError when it is there and of another kind, or when it is not and there is no default.
        """
        if key not in self.metadata:
            if default is None:
                raise GGUFError(f"{self.path} has no metadata {key!r}, and a model needs it; it was not written whole")
            return default
        value = self.metadata[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise GGUFError(f"metadata {key!r} is of the type {self.kinds[key]}, where {kind.__name__} is needed")
        return value

    def __repr__(self):
        sizes = f"{len(self.metadata)} entries of metadata, {len(self.tensors)} tensors"
        return f"GGUFFile({self.path.name}, version {self.version}, {sizes})"


class _Cursor:
    """Reads one piece after another, and never beyond the end."""

    def __init__(self, data, trace):
        self.data, self.at, self.trace = data, 0, trace

    def take(self, count, what):
        """Pass over so many bytes; where they begin."""
        if count > len(self.data) - self.at:
            left = len(self.data) - self.at
            raise GGUFError(f"{what} needs {count} bytes at offset {self.at}, and {left} are left; {REMEDY}")
        self.at += count
        return self.at - count

    def number(self, form, name, meaning):
        """A number of a `struct` format."""
        start = self.take(struct.calcsize(form), name)
        (value,) = struct.unpack_from(form, self.data, start)
        self.note(start, name, value, meaning)
        return value

    def text(self, name, meaning, noted=True):
        """A string: its length and its bytes."""
        start = self.take(8, f"the length of {name}")
        (length,) = struct.unpack_from("<Q", self.data, start)
        first = self.take(length, name)
        try:
            value = self.data[first : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{name} at offset {first} is not valid UTF-8; {REMEDY}") from error
        if noted and self.trace is not None:
            self.trace.append(Span(start, first, f"length of {name}", length, "bytes of the text that follows"))
            self.note(first, name, value, meaning)
        return value

    def note(self, start, name, value, meaning):
        if self.trace is not None and self.at > start:
            self.trace.append(Span(start, self.at, name, value, meaning))

    def pad(self, end):
        """Go on to where the data begin; there may be nothing behind it."""
        start, self.at = self.at, min(end, len(self.data))
        self.note(start, "padding", self.at - start, "zeros, so that the data begin at a multiple of the alignment")


def _mapped(path):
    """The bytes of a file, mapped into memory."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise GGUFError(f"{path} has {size} bytes, fewer than the 24 of a header; it is no GGUF file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _header(cursor):
    """(version, number of tensors, number of metadata entries), the numbers possible in a file of this size."""
    magic = bytes(cursor.data[:4])
    cursor.take(4, "the magic")
    if magic != MAGIC:
        raise GGUFError(f"the file begins with {magic!r}, where a GGUF file has {MAGIC!r}; it is something else")
    cursor.note(0, "magic", "GGUF", "the four letters that every GGUF file begins with")
    version = cursor.number("<I", "version", "of the format; 3 since August 2023")
    if version not in VERSIONS:
        if version.to_bytes(4, "big") in [v.to_bytes(4, "little") for v in (1, *VERSIONS)]:
            raise GGUFError("the file is big-endian; convert it on the machine that wrote it, or take another one")
        raise GGUFError(f"GGUF version {version} is not supported; write the file anew in version 2 or 3")
    tensors = cursor.number("<Q", "tensor count", "how many tensors the file holds")
    entries = cursor.number("<Q", "metadata count", "how many entries of metadata follow")
    left = len(cursor.data) - cursor.at
    if entries * SMALLEST["metadata"] + tensors * SMALLEST["tensor"] > left:
        raise GGUFError(f"{entries} entries of metadata and {tensors} tensors do not fit in {left} bytes; {REMEDY}")
    return version, tensors, entries


def _metadata(cursor, count):
    """(values, kinds) by key."""
    values, kinds = {}, {}
    for number in range(count):
        key = cursor.text(f"key {number}", "what this entry of the metadata is about")
        if not key or key in values:
            what = "occurs twice" if key else f"of entry {number} is empty"
            raise GGUFError(f"metadata key {key!r} {what}; {REMEDY}")
        kind = _kind(cursor, f"type of {key}")
        values[key], kinds[key] = _array(cursor, key) if kind == ARRAY else (_value(cursor, kind, key), VALUES[kind][0])
    return values, kinds


def _kind(cursor, name):
    """The number of a type of value, a known one."""
    kind = cursor.number("<I", name, "the type of the value that follows")
    if kind not in VALUES:
        raise GGUFError(f"{name} is {kind}, and no type of value has that number; {REMEDY}")
    return kind


def _value(cursor, kind, key):
    """A single value."""
    if kind == STRING:
        return cursor.text(key, "the value")
    value = cursor.number(VALUES[kind][1], key, "the value")
    if kind != BOOL:
        return value
    if value > 1:
        raise GGUFError(f"metadata {key!r} is {value}, where a bool is 0 or 1; {REMEDY}")
    return bool(value)


def _array(cursor, key):
    """(array or list, its kind as words)."""
    kind = _kind(cursor, f"element type of {key}")
    if kind == ARRAY:
        raise GGUFError(f"metadata {key!r} is an array of arrays, which nothing writes and llama.cpp refuses; {REMEDY}")
    count = cursor.number("<Q", f"length of {key}", "elements of the array that follows")
    word, form = VALUES[kind]
    start = cursor.at
    if kind == STRING:
        if count * 8 > len(cursor.data) - start:
            raise GGUFError(f"metadata {key!r} claims {count} strings, more than the file has room for; {REMEDY}")
        value = [cursor.text(f"{key}[{i}]", "", noted=False) for i in range(count)]
    else:
        start = cursor.take(count * struct.calcsize(form), f"metadata {key!r}")
        value = np.frombuffer(cursor.data, form, count, start)
        if kind == BOOL and value.max(initial=0) > 1:
            raise GGUFError(f"metadata {key!r} holds {value.max()}, where a bool is 0 or 1; {REMEDY}")
    cursor.note(start, key, value, f"the elements, {word}" + (", each after its length" if kind == STRING else ""))
    return value, f"array of {word}"


def _alignment(metadata, kinds):
    """What the data are aligned to."""
    key = "general.alignment"
    value = metadata.get(key, ALIGNMENT)
    if kinds.get(key, "uint32") != "uint32" or value == 0 or value & (value - 1):
        raise GGUFError(f"{key} is {value} ({kinds[key]}), where a power of two in a uint32 is needed; {REMEDY}")
    return value


def _tensor(cursor, number):
    """TensorInfo with `start` counted from the start of the data."""
    name = cursor.text(f"name of tensor {number}", "of a tensor")
    if len(name.encode()) > LONGEST_NAME:
        raise GGUFError(f"the name of tensor {number} has {len(name.encode())} bytes, and {LONGEST_NAME} are allowed")
    dimensions = cursor.number("<I", f"dimensions of {name}", "how many numbers its shape has")
    if dimensions > MOST_DIMENSIONS:
        raise GGUFError(f"tensor {name!r} has {dimensions} dimensions, and {MOST_DIMENSIONS} are allowed; {REMEDY}")
    sizes = [cursor.number("<Q", f"{name}, dimension {i}", _DIMENSION[min(i, 1)]) for i in range(dimensions)]
    id = cursor.number("<I", f"type of {name}", "the type of its blocks")
    if id not in BY_ID:
        raise GGUFError(f"tensor {name!r} is of type {id}, which is unknown here or was given up by llama.cpp")
    shape, type = tuple(reversed(sizes)) or (1,), BY_ID[id]
    if 0 in shape:
        raise GGUFError(f"tensor {name!r} has a dimension of 0, so nothing in it; {REMEDY}")
    if shape[-1] % type.weights:
        raise GGUFError(f"a row of {name!r} has {shape[-1]} weights, no whole {type.name} blocks of {type.weights}")
    offset = cursor.number("<Q", f"offset of {name}", "where its data begin, from the start of the data")
    return TensorInfo(name, shape, type, offset, type.size(shape))


_DIMENSION = ("weights of a row: the last dimension comes first", "the next dimension: in a matrix, the rows")


def _placed(infos, data_start, alignment, size):
    """The tensors by name, their place counted from the start of the file; each in a place of its own."""
    placed = {}
    for info in infos:
        start = data_start + info.start
        if info.start % alignment:
            raise GGUFError(f"tensor {info.name!r} begins at {info.start}, no multiple of {alignment}; {REMEDY}")
        if start + info.nbytes > size:
            raise GGUFError(
                f"tensor {info.name!r} ends at byte {start + info.nbytes}, and the file has {size}; {REMEDY}"
            )
        if info.name in placed:
            raise GGUFError(f"tensor {info.name!r} occurs twice; {REMEDY}")
        placed[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.nbytes)
    in_order = sorted(placed.values(), key=lambda info: info.start)
    for before, after in itertools.pairwise(in_order):
        if after.start < before.end:
            raise GGUFError(f"tensors {before.name!r} and {after.name!r} overlap; {REMEDY}")
    return placed
