"""Scales that are themselves quantized.

A float16 scale for each 64 weights costs 16 / 64 = 0.25 bits a weight. Where that is too much, the scales are treated
as the weights were: codes of 8 bits, say, and a few second-level scales, which are called *steps* here,

    scale = value(code) * step + offset

Three published schemes are cases of it, and differ in which scales share a step. To say so, the scales are laid out row
by row in a table, the **layout** (m, n), and steps and offsets are shaped (m, n), (m, 1), (1, n) or (1, 1):

                                  value                 layout            step              offset
    NF4, double quantization      a list of 256         (scales/256, 256) (m, 1) absmax     (1, 1) the mean
    NVFP4                         E4M3                  (1, scales)       (1, 1)            none
    SINQ, 8-bit scales            0 ... 255             (32, scales/32)   (1, n) range/255  (1, n) the minimum

A layout may have more places than there are scales; the last ones are left empty.
"""

import math
from dataclasses import dataclass, replace

import torch

from qlearn import formats

PARTS = ("packed", "steps", "offsets")


@dataclass(frozen=True, eq=False)
class QuantizedScales:
    """A table of scales (or of zeros) as codes. It stands where a tensor of floats would: see QuantizedTensor.

    packed: uint8 (bytes,), the codes row by row, packed by `format.pack`.
    format: the grid of the codes.
    shape: (block rows, block columns) of the scales.
    layout: (m, n), with room for all scales.
    steps, offsets: floating point, each axis as long as the layout or 1; offsets may be None.

    >>> from qlearn.formats.integers import Integers
    >>> codes = torch.tensor([[0, 255], [128, 2]])
    >>> scales = QuantizedScales.from_codes(codes, Integers(8, signed=False), torch.tensor([[0.5], [0.25]]))
    >>> scales.float()
    tensor([[  0.0000, 127.5000],
            [ 32.0000,   0.5000]])
    >>> scales.nbytes                                # four codes, and two float32
    12
    """

    packed: torch.Tensor
    format: object
    shape: tuple[int, int]
    layout: tuple[int, int]
    steps: torch.Tensor
    offsets: torch.Tensor | None = None

    def __post_init__(self):
        count, room = self.numel(), math.prod(self.layout)
        if count > room:
            raise ValueError(f"the layout {self.layout} has no room for {count} scales; make it larger")
        needed, held = self.format.packed_size(count), tuple(self.packed.shape)
        if held != (needed,):
            raise ValueError(f"packed has shape {held}; {count} scales need {(needed,)}")
        for name in ("steps", "offsets"):
            part = getattr(self, name)
            if part is not None and not _fits(tuple(part.shape), self.layout):
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}; each axis has to be 1 or that of {self.layout}"
                )

    @classmethod
    def from_codes(cls, codes, format, steps, offsets=None, layout=None):
        """Pack a matrix of codes.

        codes: integer (block rows, block columns), as `format.encode` gives them.
        steps, offsets: floats in the dtype they are to be stored in.  layout: (m, n); the shape of codes unless given.
        """
        packed = format.pack(format.to_unsigned(codes).flatten())
        return cls(packed, format, tuple(codes.shape), tuple(layout or codes.shape), steps, offsets)

    def codes(self):
        """The codes as an integer matrix (block rows, block columns)."""
        return self.format.from_unsigned(self.format.unpack(self.packed, self.numel())).reshape(self.shape)

    def float(self):
        """The scales that the codes stand for: float32 (block rows, block columns)."""
        values = self.format.decode(self.format.unpack(self.packed, self.numel()))
        room = math.prod(self.layout)
        table = torch.nn.functional.pad(values, (0, room - self.numel())).view(self.layout) * self.steps.float()
        if self.offsets is not None:
            table = table + self.offsets.float()
        return table.flatten()[: self.numel()].view(self.shape)

    def numel(self):
        """How many scales there are."""
        return math.prod(self.shape)

    def is_floating_point(self):
        """True: it stands where floats would."""
        return True

    @property
    def nbytes(self):
        """Bytes of everything that is stored."""
        return sum(tensor.nbytes for tensor in self.state_tensors().values())

    def to(self, device):
        """The same scales with their tensors on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.state_tensors().items()})

    def state_tensors(self):
        """The tensors that are held, by name."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}

    def metadata(self):
        """What is needed beside the tensors, and their sizes: enough to make room for them before they are read."""
        shapes = {
            name: list(getattr(self, name).shape) for name in ("steps", "offsets") if getattr(self, name) is not None
        }
        return {"format": self.format.name, "shape": list(self.shape), "layout": list(self.layout), **shapes}

    @classmethod
    def from_state(cls, tensors, metadata):
        """The inverse of `state_tensors()` and `metadata()`."""
        shape, layout = tuple(metadata["shape"]), tuple(metadata["layout"])
        return cls(format=formats.get(metadata["format"]), shape=shape, layout=layout, **tensors)


def sizes(metadata):
    """The shapes of the tensors of QuantizedScales with that metadata, by name.

    >>> sizes({"format": "uint8", "shape": [4, 8], "layout": [1, 32], "steps": [1, 1]})
    {'packed': (32,), 'steps': (1, 1)}
    """
    packed = formats.get(metadata["format"]).packed_size(math.prod(metadata["shape"]))
    return {"packed": (packed,), **{name: tuple(metadata[name]) for name in ("steps", "offsets") if name in metadata}}


def _fits(shape, layout):
    """Whether a table of that shape can be spread over the layout."""
    return len(shape) == 2 and all(n in (1, places) for n, places in zip(shape, layout, strict=True))
