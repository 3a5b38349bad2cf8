"""GGUF files put together by hand, byte for byte, so that any of their numbers can be a wrong one."""

import struct

STRING, ARRAY = 8, 9
FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}


def text(value, length=None):
    """A string; `length` claims another length than it has."""
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def value(kind, content):
    """A value of the metadata without its type."""
    return text(content) if kind == STRING else struct.pack(FORMS[kind], content)


def entry(key, kind, content):
    """An entry of the metadata."""
    return text(key) + struct.pack("<I", kind) + value(kind, content)


def array(key, kind, contents, count=None):
    """An entry that is an array; `count` claims another length than it has."""
    head = struct.pack("<IIQ", ARRAY, kind, len(contents) if count is None else count)
    return text(key) + head + b"".join(value(kind, content) for content in contents)


def tensor(name, dimensions, type=0, offset=0):
    """A tensor of the list; dimensions in ggml's order, the row first."""
    head = text(name) + struct.pack("<I", len(dimensions))
    return head + b"".join(struct.pack("<Q", n) for n in dimensions) + struct.pack("<IQ", type, offset)


def file(entries=(), tensors=(), data=b"", magic=b"GGUF", version=3, counts=None, alignment=32):
    """A whole file."""
    counts = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<I", version) + struct.pack("<QQ", *counts) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % alignment) + data


SMALL = file(
    [
        entry("general.architecture", STRING, "llama"),
        entry("a.bool", 7, 1),
        entry("a.float", 6, 0.5),
        array("an.array", 5, [3, -1, 2]),
        array("texts", STRING, ["one", "two", "drei"]),
    ],
    [tensor("first", [4, 2]), tensor("second", [32], 2, 32), tensor("scalar", [], 0, 64)],
    struct.pack("<8f", *range(8)) + struct.pack("<e", 1.0) + bytes(range(16)) + bytes(14) + struct.pack("<f", 7.0),
)
