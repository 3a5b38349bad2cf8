"""The order in which the weights of a matrix lie, so that a warp takes them as they come.

A tensor core multiplies a piece of 16 rows and 16 columns, and each of the 32 lanes of a warp has to bring eight
numbers of it: lane 4g + t brings some from row g and some from row g + 8. Were the codes stored row by row, every lane
would have to gather its own from 16 places. So they are sorted once, when a model is loaded:

**A unit** is 16 rows by 128 inputs. It begins with the codes, in planes of 512 bytes: the first 16 bytes of a plane are
for lane 0, the next for lane 1, and so on. After them come the scales of the 16 rows, as float16, and then the
zero-points, if there are any. One unit is one copy of about a kilobyte; those of the same 16 rows lie in a row.

Lane 4g + t owns, of row g and of row g + 8, the inputs 32j + 8t ... 32j + 8t + 7 for j = 0, 1, 2, 3. They make 4 pairs:

    bits   word of the lane                   where the two codes of a pair p lie in it
    8      for each row, j and half of p      bits 8 (p % 2) and 16 + 8 (p % 2)
    4      for each row and j                 bits 4p and 16 + 4p
    2      for each row and two j             bits 2P and 16 + 2P            with P = 4 (j % 2) + p
    3      as for 2, and a word for the       the third bit of the codes: bits P and 16 + P of that word, P = 4j + p
           third bits of each row

The two of a pair lie 16 bits apart, since that is where the two numbers of half precision in a word have their lowest
bits. `matmul.py` makes one of the other with two instructions.

**What is the same for all methods.** A signed code is stored with 2**(bits - 1) added, so that every code is unsigned
and every method subtracts something: the same number everywhere, or the zero-point of its group. Groups of 32, 64 and
128 inputs are stored as they are. One scale for more inputs is repeated for each unit: 2 bytes for 128 weights.

What does not fill a unit is filled up: rows with zeros, inputs with scales of zero.
"""

from dataclasses import dataclass

import torch

from qlearn.formats.integers import Integers

ROWS, INPUTS = 16, 128
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True, eq=False)
class Units:
    """A matrix in this order.

    data: uint8 (bytes,).  shape: (rows, columns).  bits: of a code.  group: inputs that share a scale, 32, 64 or 128.
    zeros: None, "integer" or "float".
    column_scales: None, or float32 (columns,): the input is to be multiplied by them.
    hadamard: None, or the size of the rotation that the input needs first.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    bits: int
    group: int
    zeros: str | None = None
    column_scales: torch.Tensor | None = None
    hadamard: int | None = None

    @property
    def unit_bytes(self):
        """Bytes of a unit."""
        return unit_bytes(self.bits, self.group, self.zeros)

    @property
    def nbytes(self):
        """Bytes of everything that a product reads, the input aside."""
        return self.data.nbytes + (0 if self.column_scales is None else self.column_scales.nbytes)


def unit_bytes(bits, group, zeros=None):
    """Bytes of a unit: codes, scales, zero-points.

    >>> unit_bytes(4, 128), unit_bytes(3, 32, "integer")
    (1056, 1024)
    """
    return ROWS * INPUTS * bits // 8 + INPUTS // group * ROWS * 2 * (1 if zeros is None else 2)


def why_not(quantized):
    """None if a QuantizedTensor can be put in this order, else a sentence that says why not."""
    format, columns, (block_rows, group) = quantized.format, quantized.shape[1], quantized.block
    if not isinstance(format, Integers) or format.bits not in BITS:
        return f"the format is {format.name}, and the kernel knows integers of 2, 3, 4 and 8 bits"
    if block_rows != 1 or not (group in GROUPS or group % INPUTS == 0 or group == columns):
        return f"a scale is shared by {block_rows} x {group} weights, not by 32, 64 or a multiple of 128 of one row"
    if isinstance(quantized.scales, torch.Tensor) and quantized.scales.dtype != torch.float16:
        return f"the scales are {str(quantized.scales.dtype).removeprefix('torch.')}, and the kernel keeps float16"
    if columns % 8:
        return f"the rows have {columns} weights, which is no multiple of 8"
    if quantized.column_scales is not None and quantized.column_scales.dim() == 2:
        return "there are column scales for several bands of rows"
    return None


def arrange(quantized):
    """Put a QuantizedTensor in this order, on the device where it is.

    Returns Units. Raises ValueError where `why_not` has a sentence.

    >>> import qlearn
    >>> units = arrange(qlearn.quantize(torch.randn(32, 256), "absmax", bits=4, group_size=64))
    >>> units.data.shape, units.unit_bytes                       # 2 x 2 units
    (torch.Size([4352]), 1088)
    """
    sentence = why_not(quantized)
    if sentence is not None:
        raise ValueError(f"this weight does not fit the kernel: {sentence}")
    format, columns = quantized.format, quantized.shape[1]
    lift = 2 ** (format.bits - 1) if format.signed else 0
    group = quantized.block[1]
    per_unit = group if group in GROUPS else INPUTS
    parts, kind = [quantized.scales.float()], None
    if quantized.zeros is not None:
        kind = "float" if quantized.zeros.is_floating_point() else "integer"
        parts.append(quantized.zero_points() + lift)
    codes = _codes(_filled(quantized.codes().to(torch.int32) + lift, INPUTS), format.bits)
    parts = [_vectors(_for_each(part, group, per_unit, columns), per_unit) for part in parts]
    data = torch.cat([codes, *parts], 2).reshape(-1).contiguous()
    factors = None if quantized.column_scales is None else quantized.column_scales.float().contiguous()
    return Units(data, quantized.shape, format.bits, per_unit, kind, factors, quantized.hadamard)


def _for_each(values, group, per_unit, columns):
    """(rows, groups) -> one value for each `per_unit` inputs; a group may be longer, up to a whole row."""
    index = torch.arange(0, columns, per_unit, device=values.device) // group
    return values[:, index]


def _filled(matrix, columns):
    """The matrix with zeros around it, up to whole units."""
    rows = -len(matrix) % ROWS
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, rows))


def _codes(codes, bits):
    """(rows, columns) -> uint8 (tiles of rows, units, bytes)."""
    tiles, units = len(codes) // ROWS, codes.shape[1] // INPUTS
    codes = codes.view(tiles, 2, 8, units, 4, 4, 4, 2)  # tile, half, g, unit, j, t, pair, one of two
    codes = codes.permute(0, 3, 1, 4, 6, 2, 5, 7)  # tile, unit, half, j, pair, g, t, one of two
    pairs = codes[..., 0] | codes[..., 1] << 16  # tile, unit, half, j, pair, g, t
    if bits == 8:
        words = _in_one(pairs.unflatten(4, (2, 2)), 8)  # ..., half, j, half of the pairs, g, t
        words = words.unflatten(3, (2, 2)).flatten(4, 5)  # ..., half, j // 2, (j % 2, half of the pairs), g, t
        planes = [words.flatten(2, 3)]
    elif bits == 4:
        planes = [_in_one(pairs, 4)]
    else:
        low = _in_one((pairs & 0x00030003).unflatten(3, (2, 2)).flatten(4, 5), 2)  # ..., half, j // 2, g, t
        planes = [low.flatten(2, 3)[:, :, None]]
        if bits == 3:
            planes.append(_in_one((pairs >> 2 & 0x00010001).flatten(3, 4)[:, :, :, None], 1)[:, :, None, :, 0])
    return torch.cat([_bytes(plane) for plane in planes], 2)


def _in_one(pairs, bits):
    """Pairs along the third axis from the end, each `bits` further up than the last, in one word."""
    word = torch.zeros_like(pairs[..., 0, :, :])
    for p in range(pairs.shape[-3]):
        word |= pairs[..., p, :, :] << bits * p
    return word


def _bytes(plane):
    """(tiles, units, planes, words, g, t) int32 -> uint8 (tiles, units, bytes), a lane's words side by side."""
    return plane.permute(0, 1, 2, 4, 5, 3).contiguous().view(torch.uint8).flatten(2)


def _vectors(values, group):
    """(rows, groups) -> uint8 (tiles, units, bytes): for each group the float16 of the 16 rows."""
    values = _filled(values, INPUTS // group)
    values = values.view(len(values) // ROWS, ROWS, -1, INPUTS // group).permute(0, 2, 3, 1)
    return values.to(torch.float16).contiguous().view(torch.uint8).flatten(2)
