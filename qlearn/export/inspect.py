"""Looking into a GGUF file: what it says, and which byte says it.

`inspect` lists a file: its header, its metadata, its tensors. `fields` goes through its bytes from the first to the
last, and tells for each stretch what it is; together the stretches are the whole file. `dissect` (`dissect.py`) goes on
within a block of weights.
"""

from dataclasses import dataclass

import numpy as np

from qlearn.export.gguf_file import GGUFFile, Span, printable

SHOWN = 6  # elements of an array
LONGEST = 60  # letters of a text


@dataclass(frozen=True)
class Contents:
    """What a file holds; print it.  file: GGUFFile."""

    file: GGUFFile

    @property
    def bits_per_weight(self):
        """Bits for each weight over all tensors, scales counted, metadata not."""
        tensors = self.file.tensors.values()
        return 8 * sum(t.nbytes for t in tensors) / max(1, sum(int(np.prod(t.shape)) for t in tensors))

    def __repr__(self):
        file = self.file
        lines = [
            f"{file.path.name}: GGUF version {file.version}, {file.size:,} bytes, {len(file.metadata)} entries of "
            f"metadata, {len(file.tensors)} tensors, {self.bits_per_weight:.3f} bits per weight",
            "",
            "metadata",
        ]
        width = max(map(len, file.metadata), default=0)
        kinds = max(map(len, file.kinds.values()), default=0)
        for key, value in file.metadata.items():
            lines.append(f"  {printable(key):<{width}}  {file.kinds[key]:<{kinds}}  {shortened(value)}")
        width = max(map(len, file.tensors), default=0)
        lines += [
            "",
            "tensors",
            f"  {'name':<{width}}  {'type':<8}{'shape':<18}{'offset':>12}{'bytes':>12}   bits/weight",
        ]
        for info in file.tensors.values():
            shape = " x ".join(map(str, info.shape))
            numbers = f"{info.start:>12}{info.nbytes:>12}   {info.type.bits_per_weight:g}"
            lines.append(f"  {printable(info.name):<{width}}  {info.type.name:<8}{shape:<18}{numbers}")
        return "\n".join(lines)


def inspect(path):
    """What a GGUF file holds, to be printed.

    Returns Contents, whose `file` is the GGUFFile.  Raises FileNotFoundError, and GGUFError for a damaged file.

    >>> import qlearn, tempfile
    >>> from qlearn.export import write_gguf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     contents = inspect(write_gguf(*qlearn.load_model(), f"{folder}/model.gguf", "Q4_K_M", progress=False))
    >>> print(repr(contents)[:86])
    model.gguf: GGUF version 3, 4,782,944 bytes, 27 entries of metadata, 74 tensors, 5.068
    """
    return Contents(GGUFFile(path))


def fields(path):
    """What each byte of a GGUF file is: list of Span, one after another from byte 0 to the end.

    Each piece of the header, the metadata and the list of tensors has a Span of its own; an array has one for all its
    elements, and a tensor one for its data.  Raises what `inspect` raises.

    >>> import qlearn, tempfile
    >>> from qlearn.export import write_gguf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     spans = fields(write_gguf(*qlearn.load_model(), f"{folder}/model.gguf", "Q8_0", progress=False))
    >>> for span in spans[:2] + spans[4:6]:
    ...     print(span.start, span.end, span.name, repr(span.value))
    0 4 magic 'GGUF'
    4 8 version 3
    24 32 length of key 0 20
    32 52 key 0 'general.architecture'
    """
    spans = []
    file = GGUFFile(path, trace=spans)
    at = spans[-1].end if spans else 0
    for info in sorted(file.tensors.values(), key=lambda info: info.start):
        if info.start > at:
            spans.append(_padding(at, info.start))
        meaning = f"the tensor {info.name}: {' x '.join(map(str, info.shape))} in {info.type.name} blocks"
        spans.append(Span(info.start, info.end, info.name, f"{info.nbytes} bytes", meaning))
        at = info.end
    return spans + ([_padding(at, file.size)] if file.size > at else [])


def shortened(value):
    """A value of the metadata in one line.

    >>> shortened(["a"] * 100), shortened(1e-6)
    ("['a', 'a', 'a', 'a', 'a', 'a', ...] of 100", '1e-06')
    """
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else value[: LONGEST - 3] + "...")
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, (list, np.ndarray)):
        return str(value)
    first = ", ".join(shortened(one.item() if isinstance(one, np.generic) else one) for one in value[:SHOWN])
    return f"[{first}{', ...' if len(value) > SHOWN else ''}] of {len(value)}"


def _padding(start, end):
    return Span(start, end, "padding", end - start, "bytes between tensors, so that each begins at a multiple of 32")
