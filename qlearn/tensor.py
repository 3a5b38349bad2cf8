"""A quantized matrix: codes packed to their true width, and what turns them back into numbers.

Every method of the package ends here, and everything that uses a quantized weight begins here. A weight matrix is cut
into blocks, and the weights of a block share a scale. A code is the index of a value on the grid of a format, so

    weight[i, j]  =  (value(code[i, j]) - zero[block]) * scale[block] * column_scale[j]

where `zero` and `column_scale` are there only for the methods that need them. Some methods round a matrix that was
rotated before (`rotation.py`); then `hadamard` says in what size, and the rotation is taken back at the end.

Which weights share a scale is said by `block`, the shape of a block in rows and columns. One scale for a (256, 768)
matrix is the block (256, 768); one for each row, (1, 768); one for each column, (256, 1); one for each 64 consecutive
weights of a row, (1, 64).

Nothing here is pretended. The codes lie packed, at 3 bits as at 8, `nbytes` adds up the bytes of the tensors that are
really held, and `bits_per_weight` divides them by the number of weights, so that scales and zeros are always paid
for.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qlearn import formats
from qlearn import scales as quantized_scales
from qlearn.rotation import check_size, hadamard
from qlearn.scales import QuantizedScales

_TENSORS = ("packed", "scales", "zeros", "column_scales")
_MAY_BE_QUANTIZED = ("scales", "zeros")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix in a low-precision format.

    packed: uint8 (bytes,), the codes row by row, packed by `format.pack`.
    scales: floating point (block rows, block columns), float16 unless the method was told otherwise; or
    QuantizedScales of that shape.
    format: the grid, with `.name`, `.decode(codes) -> float32` and its packing: Integers, Trits, FloatFormat, Codebook.
    shape: (rows, columns) of the matrix.
    block: (rows, columns) of the weights that share a scale; it divides the shape.
    zeros: None; or uint8, one integer zero-point for each block, packed like the codes; or floating point or
    QuantizedScales, shaped as scales.
    column_scales: None, or floating point (columns,); or (bands, columns), one row for each of equally many rows.
    hadamard: None, or the size of the Hadamard rotation of the rows that was made before rounding.

    >>> import torch
    >>> from qlearn.formats.integers import Integers
    >>> codes = torch.tensor([[3, -1, 0, 0, 2]])
    >>> qt = QuantizedTensor.from_codes(codes, torch.tensor([[0.25]]).half(), Integers(3), block=(1, 5))
    >>> qt.dequantize()
    tensor([[ 0.7500, -0.2500,  0.0000,  0.0000,  0.5000]])
    >>> qt.nbytes, qt.bits_per_weight            # 15 bits of codes fill 2 bytes, and the scale takes 2 more
    (4, 6.4)
    """

    packed: torch.Tensor
    scales: torch.Tensor | QuantizedScales
    format: object
    shape: tuple[int, int]
    block: tuple[int, int]
    zeros: torch.Tensor | QuantizedScales | None = None
    column_scales: torch.Tensor | None = None
    hadamard: int | None = None

    def __post_init__(self):
        rows, columns = self.shape
        block_rows, block_columns = self.block
        if rows % block_rows or columns % block_columns:
            raise ValueError(f"blocks of {self.block} do not divide a matrix of {self.shape}; choose a block that does")
        if self.hadamard is not None:
            check_size(self.hadamard, columns)
        if rows % self.metadata().get("bands", 1):
            raise ValueError(f"column_scales for {len(self.column_scales)} bands do not divide {rows} rows evenly")
        expect = sizes(self.metadata(), zeros_are_packed=self.zeros is not None and not self.zeros.is_floating_point())
        held = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        for name, tensor in held.items():
            if tuple(tensor.shape) != expect[name]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} where {expect[name]} is needed for {self}")

    @classmethod
    def from_codes(cls, codes, scales, format, block, zeros=None, column_scales=None, hadamard=None):
        """Pack a matrix of codes.

        codes: integer (rows, columns); signed values for a signed integer format, else indices 0 ... 2**bits - 1.
        scales: (block rows, block columns) in the dtype they are to be stored in.
        zeros: integer zero-points shaped as scales (they are packed), or floating-point ones (kept as they are).
        """
        packed = format.pack(format.to_unsigned(codes).flatten())
        if zeros is not None and not zeros.is_floating_point():
            zeros = format.pack(zeros.flatten())
        return cls(packed, scales, format, tuple(codes.shape), tuple(block), zeros, column_scales, hadamard)

    def codes(self):
        """The codes as an integer matrix (rows, columns): int8 for a signed integer format, uint8 for any other."""
        unsigned = self.format.unpack(self.packed, self.shape[0] * self.shape[1])
        return self.format.from_unsigned(unsigned).reshape(self.shape)

    def zero_points(self):
        """The zeros, float32, shaped as scales; None for a method that has none."""
        if self.zeros is None or self.zeros.is_floating_point():
            return None if self.zeros is None else self.zeros.float()
        return self.format.unpack(self.zeros, self.scales.numel()).reshape(self.scales.shape).float()

    def column_factors(self):
        """The column scales, float32, as a matrix that broadcasts over the weights: (1, columns) or (rows, columns)."""
        bands = self.column_scales.float().view(-1, self.shape[1])
        return bands if len(bands) == 1 else bands.repeat_interleave(self.shape[0] // len(bands), 0)

    def dequantize(self, dtype=torch.float32):
        """The matrix (rows, columns) that the codes stand for, computed in float32 and returned as `dtype`."""
        unsigned = self.format.unpack(self.packed, self.shape[0] * self.shape[1])
        values = self.format.decode(unsigned).view(_blocked(self.shape, self.block))
        if self.zeros is not None:
            values = values - self.zero_points()[:, None, :, None]
        values = (values * self.scales.float()[:, None, :, None]).view(self.shape)
        if self.column_scales is not None:
            values = values * self.column_factors()
        if self.hadamard is not None:
            values = hadamard(values, self.hadamard)  # its own inverse
        return values.to(dtype)

    @property
    def nbytes(self):
        """Bytes of everything that is stored: codes, scales, zeros, column scales."""
        return sum(tensor.nbytes for tensor in self.state_tensors().values())

    @property
    def bits_per_weight(self):
        """Bits stored for each weight, scales and zeros counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def device(self):
        """Where the tensors are."""
        return self.packed.device

    def to(self, device):
        """The same matrix with its tensors on another device."""
        held = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in held.items()})

    def state_tensors(self):
        """The tensors that are held, by name; with `metadata()` they are the whole matrix.

        Those of QuantizedScales are named after their place: scales_packed, scales_steps, zeros_offsets.
        """
        tensors = {}
        for name in _TENSORS:
            part = getattr(self, name)
            if isinstance(part, QuantizedScales):
                tensors |= {f"{name}_{inner}": tensor for inner, tensor in part.state_tensors().items()}
            elif part is not None:
                tensors[name] = part
        return tensors

    def metadata(self):
        """What is needed beside the tensors: the format's name, the shape, the block, and what is out of the ordinary.

        >>> import qlearn, torch
        >>> qlearn.quantize(torch.ones(2, 64), "absmax", bits=4, group_size=32).metadata()
        {'format': 'int4', 'shape': [2, 64], 'block': [1, 32]}
        """
        metadata = {"format": self.format.name, "shape": list(self.shape), "block": list(self.block)}
        for name in _MAY_BE_QUANTIZED:
            if isinstance(getattr(self, name), QuantizedScales):
                metadata[name] = getattr(self, name).metadata()
        if self.column_scales is not None and self.column_scales.dim() == 2:
            metadata["bands"] = len(self.column_scales)
        return metadata if self.hadamard is None else {**metadata, "hadamard": self.hadamard}

    @classmethod
    def from_state(cls, tensors, metadata):
        """The inverse of `state_tensors()` and `metadata()`."""
        format, tensors = formats.get(metadata["format"]), dict(tensors)
        for name in _MAY_BE_QUANTIZED:
            if name in metadata:
                parts = quantized_scales.sizes(metadata[name])
                parts = {part: tensors.pop(f"{name}_{part}") for part in parts}
                tensors[name] = QuantizedScales.from_state(parts, metadata[name])
        shape, block = tuple(metadata["shape"]), tuple(metadata["block"])
        return cls(format=format, shape=shape, block=block, hadamard=metadata.get("hadamard"), **tensors)

    def save(self, path):
        """Write a safetensors file, the metadata in its header; an existing file is replaced whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(path.name + ".part")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_tensors().items()}
        try:
            save_file(tensors, unfinished, metadata={"qlearn": json.dumps(self.metadata())})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote.

        Raises FileNotFoundError when there is no such file, and ValueError when it is truncated or was written by
        something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("qlearn")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); save the tensor again") from error
        known = {
            *_TENSORS,
            *(f"{name}_{part}" for name in _MAY_BE_QUANTIZED for part in ("packed", "steps", "offsets")),
        }
        if header is None or not set(tensors) <= known:
            raise ValueError(f"{path} holds no qlearn.QuantizedTensor; it was written by another program")
        return cls.from_state(tensors, json.loads(header))

    def __repr__(self):
        return f"QuantizedTensor({self.format.name}, shape={self.shape}, block={self.block})"


def sizes(metadata, zeros_are_packed=False):
    """The shapes of the tensors that a QuantizedTensor with that metadata may hold, by name.

    >>> sizes({"format": "int4", "shape": [2, 64], "block": [1, 32]})
    {'packed': (64,), 'scales': (2, 2), 'column_scales': (64,), 'zeros': (2, 2)}
    """
    (rows, columns), block = metadata["shape"], metadata["block"]
    packed_size = formats.get(metadata["format"]).packed_size
    blocks = (rows // block[0], columns // block[1])
    shapes = {"packed": (packed_size(rows * columns),), "scales": blocks, "column_scales": (columns,)}
    if "bands" in metadata:
        shapes["column_scales"] = (metadata["bands"], columns)
    shapes["zeros"] = (packed_size(blocks[0] * blocks[1]),) if zeros_are_packed else blocks
    for name in _MAY_BE_QUANTIZED:
        if name in metadata:
            parts = quantized_scales.sizes(metadata[name])
            shapes |= {f"{name}_{part}": shape for part, shape in parts.items()}
    return shapes


def _blocked(shape, block):
    """The shape in which a scale of (block rows, block columns) broadcasts over the weights it belongs to."""
    return shape[0] // block[0], block[0], shape[1] // block[1], block[1]
