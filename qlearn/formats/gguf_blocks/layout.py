"""Where the numbers of a block lie in its bytes.

A block type is told by two things. Its **layout**, here, is a list of byte fields in the order in which they lie in the
file. Its **fields** are the numbers that those bytes stand for: the scale `d`, the small integers that scale its
sub-blocks, a code for each weight. `pack` goes from the numbers to the bytes and `unpack` back, without loss, and both
are cutting and shifting only.

Narrow codes are **stacked**: a byte does not hold neighbours, but codes that lie a fixed distance apart, so that one
vector instruction can cut 16 or 32 weights out of as many bytes with the same shift. Two codes of 4 bits, or four of 2,
or eight of 1, make a byte:

    codes of 4 bits       0  1  2  3  4  5 ... 15        low halves of bytes 0 ... 15
                         16 17 18 19 20 21 ... 31        high halves of bytes 0 ... 15

which is the Q4_0 block. Types with codes of 3, 5 or 6 bits store 2 or 4 bits in one such stack and the rest in another.
"""

from dataclasses import dataclass

import numpy as np

from qlearn.formats.gguf_blocks.signed_max import check_scales


@dataclass(frozen=True)
class Field:
    """Some consecutive bytes of a block: their name in ggml's source, their number, and what they mean."""

    name: str
    size: int
    meaning: str


class BlockType:
    """One kind of block. A subclass gives the class attributes and the four methods.

    name: what ggml calls it.  weights: consecutive weights of a row in a block.  layout: tuple of Field.
    uses_importance: whether an importance matrix changes anything.
    """

    name: str
    weights: int
    layout: tuple[Field, ...]
    uses_importance = True

    @property
    def nbytes(self):
        """Bytes of a block."""
        return sum(field.size for field in self.layout)

    @property
    def bits_per_weight(self):
        """Bits for each weight, scales counted."""
        return 8 * self.nbytes / self.weights

    def search(self, x, importance, fit):
        """Find the numbers to store: float32 (rows, blocks, weights) -> fields, a dict of arrays (rows * blocks, ...).

        importance: float32 (blocks, weights), or None.  fit: a module with the functions of `search.py`.
        """
        raise NotImplementedError

    def values(self, fields):
        """The weights that the fields stand for: float32 (blocks, weights)."""
        raise NotImplementedError

    def pack(self, fields):
        """Numbers -> bytes: fields -> uint8 (blocks, nbytes)."""
        raise NotImplementedError

    def unpack(self, blocks):
        """Bytes -> numbers: uint8 (blocks, nbytes) -> fields."""
        raise NotImplementedError

    def join(self, **parts):
        """Lay byte fields (blocks, size) side by side in the order of the layout: uint8 (blocks, nbytes)."""
        return np.concatenate([parts[field.name].astype(np.uint8, copy=False) for field in self.layout], axis=-1)

    def split(self, blocks):
        """The inverse of `join`: name -> uint8 (blocks, size)."""
        stops = np.cumsum([field.size for field in self.layout])
        return dict(zip([field.name for field in self.layout], np.split(blocks, stops[:-1], axis=-1), strict=True))

    def __repr__(self):
        return f"{self.name}, {self.weights} weights in {self.nbytes} bytes"


def stack(codes, bits):
    """Stack codes of `bits` bits into bytes: uint8 (..., 8 / bits, n) -> (..., n), the first row in the lowest bits.

    >>> stack(np.array([[1, 2], [3, 15]], dtype=np.uint8), bits=4).tolist()        # 0x31, 0xf2
    [49, 242]
    """
    total = codes[..., 0, :].copy()
    for level in range(1, 8 // bits):
        total |= codes[..., level, :] << (bits * level)
    return total


def unstack(stacked, bits):
    """The inverse of `stack`: uint8 (..., n) -> (..., 8 / bits, n).

    >>> unstack(np.array([49, 242], dtype=np.uint8), bits=4).tolist()
    [[1, 2], [3, 15]]
    """
    levels = np.arange(0, 8, bits, dtype=np.uint8)
    return (stacked[..., None, :] >> levels[:, None]) & np.uint8(2**bits - 1)


def float16_bytes(numbers):
    """float16 (blocks,) -> uint8 (blocks, 2), the low byte first."""
    return np.ascontiguousarray(numbers, dtype="<f2").view(np.uint8).reshape(-1, 2)


def float16_of(two_bytes):
    """uint8 (blocks, 2) -> float16 (blocks,)."""
    return np.ascontiguousarray(two_bytes).view("<f2")[:, 0].astype(np.float16, copy=False)


def to_float16(d):
    """Round float32 to float16; ValueError when a number is beyond it. A block's scale has no other type."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(d, dtype=np.float32).astype(np.float16)
    check_scales(rounded)
    return rounded
