"""The hex view: bytes as a grid, coloured by what they hold, and one number of them taken apart.

    hex_view(weights)            a block of weights, in a type that is chosen from a menu: Q4_0, Q4_K, Q6_K ...
    hex_view("model.gguf")       the beginning of a file: header, metadata, list of tensors

A slider walks through the numbers that the bytes hold. Of the one that is chosen the bytes are framed in the grid, and
beside it stand its bits, marked within their bytes, the integer that they make, the formula with its numbers filled in,
the value, and what it means. A mouse that rests on a byte shows all that lies in it. What lies where is not decided
here: it comes from `qlearn.export.dissect` (blocks) and `qlearn.export.fields` (files).
"""

import html
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib.patches import Rectangle

from qlearn.course import plots
from qlearn.course.live import LiveView
from qlearn.export.dissect import Bits, dissect
from qlearn.export.inspect import fields, shortened
from qlearn.export.tensor_types import TENSOR_TYPES, encode
from qlearn.formats.arrays import to_numpy

TYPES = ("Q4_K", "Q4_0", "Q8_0", "Q6_K", "Q3_K", "Q2_K", "F16")
TINTS = {
    "scale": "#CFE4F2", "minimum": "#CDEBE0", "code": "#FBE3D2",
    "mantissa": "#CDEBE0", "exponent": "#CFE4F2", "sign": "#FBE3D2",
    "number": "#CFE4F2", "length": "#E6E6E6", "text": "#FBE3D2", "array": "#CDEBE0", "padding": "#FFFFFF",
}  # fmt: skip
_A_ROW, _MOST = 16, 256  # bytes


@dataclass(frozen=True)
class Part:
    """A number or a text in some bytes. bits: where, the lowest first. raw: as an integer, or None. lines: about it."""

    name: str
    kind: str
    bits: tuple
    raw: int | None
    value: str
    lines: tuple

    @property
    def bytes(self):
        return sorted({piece.byte for piece in self.bits})


class HexView(LiveView):
    """Bytes as a grid, and what they hold; see `hex_view`."""

    def __init__(self, sources):
        self._sources, self._known, self._shown = sources, {}, None
        options = list(sources)
        controls = {
            "bytes": ipywidgets.Dropdown(options=options, description="bytes of"),
            "part": ipywidgets.SelectionSlider(options=["-"], description="part", layout={"width": "32em"}),
        }
        controls["part"].style.description_width = "initial"
        self.grid, self.reading = ipywidgets.HTML(), ipywidgets.HTML()
        view = ipywidgets.HBox([self.grid, self.reading], layout=ipywidgets.Layout(flex_flow="row wrap"))
        alt = "Bytes in hexadecimal, sixteen in a row, coloured by what they hold; those of the chosen part are framed."
        super().__init__("HexView", alt, controls, [view])

    def parts(self, source=None):
        """Everything that the bytes hold, in the order of the slider: a list of Part."""
        return self._of(source or self.controls["bytes"].value)[1]

    def select(self, name):
        """Choose a part by its name, as the slider does.  Raises ValueError for a name that is not there."""
        names = [part.name for part in self.parts()]
        if name not in names:
            raise ValueError(f"there is no {name!r} here; there are {', '.join(names[:6])} ...")
        self.controls["part"].index = names.index(name)

    def show(self, bytes, part):
        if bytes != self._shown:
            self._offer(bytes)
        data, parts = self._of(bytes)
        chosen = parts[self.controls["part"].index]
        self.grid.value = _grid_as_html(data, parts, chosen)
        self.reading.value = _reading_as_html(data, chosen)
        return summary(bytes, data, chosen)

    def png(self):
        """The grid and the reading as a static picture, PNG bytes."""
        source = self.controls["bytes"].value
        data, parts = self._of(source)
        return picture(source, data, parts, parts[self.controls["part"].index]).png()

    def draw(self):
        if self._shown != "in between":  # the slider gets other options, and reports a change of its own
            super().draw()

    def _offer(self, source):
        """Give the slider the parts of another source, the place along it kept as far as there is one."""
        slider, names = self.controls["part"], [part.name for part in self._of(source)[1]]
        place = 0 if self._shown is None else min(slider.index or 0, len(names) - 1)
        self._shown = "in between"
        slider.options = names
        slider.index = place
        self._shown = source

    def _of(self, source):
        if source not in self._known:
            self._known[source] = self._sources[source]()
        return self._known[source]


def hex_view(what=None, types=TYPES):
    """See which byte of a block, or of a file, says what.

    what: 256 weights (list, array or tensor), each type showing its first block of them; or the path of a GGUF file, of
    which the first 256 bytes are shown. None takes made-up weights.  types: the types to choose from.
    Raises ValueError for another number of weights, a type that is not written, and what `encode` and `fields` raise.

    >>> hex_view([0.25, -2.0] + [0.0] * 254, types=["Q4_0"])
    HexView: Q4_0, d: bytes 0-1, raw 13312 = 0x3400, value 0.25
    """
    if isinstance(what, (str, PathLike)):
        path = Path(what)
        return HexView({path.name: lambda: _file(path)})
    x = np.asarray(_made_up() if what is None else to_numpy(what)[0], np.float32).ravel()
    if len(x) != 256:
        raise ValueError(f"{len(x)} weights; give 256, the largest block there is")
    if not types:
        raise ValueError("no types; give some, such as ['Q4_0', 'Q4_K']")
    return HexView({name: lambda name=name: _block(x, name) for name in types})


def summary(source, data, part):
    """One line: where it is, what is there, and what it stands for."""
    raw = "" if part.raw is None else f", raw {part.raw} = 0x{part.raw:x}"
    return f"{source}, {part.name}: {_where(part)}{raw}, value {part.value}"


def picture(source, data, parts, chosen):
    """A static picture of the grid, with the lines about the chosen part below."""
    rows = -(-len(data) // _A_ROW)
    lines = [f"{label}: {text}" for label, text in _rows(data, chosen)]
    figure = plots.blank(9, 0.5 + 0.24 * rows + 0.25 * len(lines))
    kinds = _kinds(len(data), parts)
    with plots.style():
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 9), ylim=(figure.get_figheight(), 0))
        axes.set_axis_off()
        for at, byte in enumerate(data):
            x, y = 0.9 + 0.45 * (at % _A_ROW), 0.2 + 0.24 * (at // _A_ROW)
            if not at % _A_ROW:
                axes.text(0.15, y + 0.12, f"{at:4}", family="DejaVu Sans Mono", fontsize=10, color="#555", va="center")
            share = 0.43 / max(1, len(kinds[at]))
            for i, kind in enumerate(kinds[at]):
                axes.add_patch(Rectangle((x + i * share, y), share, 0.22, facecolor=TINTS[kind]))
            if at in chosen.bytes:
                axes.add_patch(Rectangle((x, y), 0.43, 0.22, fill=False, edgecolor="black", linewidth=2))
            words = {"family": "DejaVu Sans Mono", "fontsize": 10, "ha": "center", "va": "center"}
            axes.text(x + 0.215, y + 0.115, f"{byte:02x}", **words)
        for i, line in enumerate(lines):
            y = 0.45 + 0.24 * rows + 0.25 * i
            axes.text(0.15, y, _clipped(line, 105).replace("$", r"\$"), fontsize=11, va="center")
    return plots.Picture(figure, summary(source, data, chosen))


# ---- where the parts come from ---------------------------------------------------------------------------------------


def _block(x, name):
    """(bytes, parts) of the first block of the weights in a type."""
    weights = TENSOR_TYPES[name].weights if name in TENSOR_TYPES else len(x)
    data = encode(x[None, : max(weights, 1)], name)[0]
    found = dissect(data, name)
    values = {field.name: f"{field.value:.6g}" for field in found}
    parts = []
    for field in found:
        lines = [("meaning", field.meaning)]
        if field.kind == "code":
            index = int(field.name[6:-1])
            formula = field.meaning.partition(": ")[2]
            code = field.raw - 256 if name == "Q8_0" and field.raw > 127 else field.raw  # a signed byte
            lines = [
                ("formula", formula + ("" if code == field.raw else ", the code being a signed byte")),
                ("with numbers", _filled(formula, values, code)),
                ("meaning", f"weight {index}, which was {x[index]:.6g}"),
            ]
        parts.append(Part(field.name, field.kind, field.bits, field.raw, f"{field.value:.6g}", tuple(lines)))
    return data, parts


def _file(path):
    """(bytes, parts) of the beginning of a file: as many spans as fit."""
    spans = [span for span in fields(path) if span.start < _MOST]
    with open(path, "rb") as file:
        data = np.frombuffer(file.read(min(_MOST, spans[-1].end)), np.uint8)
    parts, seen = [], set()
    for span in spans:
        name = span.name if span.name not in seen else f"{span.name} at {span.start}"
        seen.add(name)
        bits = tuple(Bits(at, 0, 8) for at in range(span.start, min(span.end, len(data))))
        number = isinstance(span.value, (int, np.integer)) and span.end - span.start <= 8
        kind = "array" if isinstance(span.value, (list, np.ndarray)) else "text" if not number else "number"
        kind = "padding" if span.name == "padding" else "length" if span.name.startswith("length of") else kind
        raw = int.from_bytes(data[span.start : span.end].tobytes(), "little") if number else None
        beyond = f"; it goes on to byte {span.end - 1}" if span.end > len(data) else ""
        parts.append(Part(name, kind, bits, raw, shortened(span.value), (("meaning", span.meaning + beyond),)))
    return data, parts


def _filled(formula, values, code):
    """A formula with its numbers in the place of its names."""
    numbers = values | {"code": str(code)}

    def number(found):
        text = numbers.get(found[0], found[0])
        return f"({text})" if text.startswith("-") else text

    return re.sub(r"(?:scales|mins)\[\d+\]|\b(?:dmin|d|m|e|code)\b(?!\()", number, formula)


def _made_up():
    """Weights as a layer has them: small, and of another size in each 32."""
    generator = np.random.RandomState(0)
    return 0.03 * generator.standard_normal(256) * np.repeat(generator.uniform(0.5, 1.5, 8), 32)


# ---- how they are shown ----------------------------------------------------------------------------------------------


def _kinds(length, parts):
    """For each byte the kinds of what lies in it, the highest bits first: a list of lists."""
    found = [{} for _ in range(length)]
    for part in parts:
        for piece in part.bits:
            found[piece.byte].setdefault(part.kind, piece.low)
    return [sorted(kinds, key=kinds.get, reverse=True) for kinds in found]


def _inhabitants(length, parts):
    """For each byte what lies in it, as text for a mouse that rests there."""
    found = [[] for _ in range(length)]
    for part in parts:
        for piece in part.bits:
            bits = "" if piece.count == 8 else f"bit{'s' * (piece.count > 1)} {_range(piece.low, piece.count)}: "
            found[piece.byte].append((piece.low, f"{bits}{part.name} = {part.value}"))
    return [[text for _, text in sorted(texts, reverse=True)] for texts in found]


def _grid_as_html(data, parts, chosen):
    kinds, inside, framed = _kinds(len(data), parts), _inhabitants(len(data), parts), set(chosen.bytes)
    rows = []
    for first in range(0, len(data), _A_ROW):
        cells = [f'<th scope="row" style="{_OFFSET}">{first}</th>']
        for at in range(first, min(first + _A_ROW, len(data))):
            title = html.escape("\n".join([f"byte {at}", *inside[at]]))
            frame = "outline: 2px solid black; outline-offset: -2px; font-weight: bold;" if at in framed else ""
            mark = " qhex-chosen" if at in framed else ""
            style = f"{_CELL}; background: {_background(kinds[at])}; {frame}"
            cells.append(f'<td class="qhex-byte{mark}" title="{title}" style="{style}">{data[at]:02x}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="qhex-grid" style="border-collapse: collapse">{"".join(rows)}</table>{_legend(parts)}'


_CELL = "font-family: monospace; color: black; padding: 0.05em 0.28em; border: 1px solid white; cursor: default"
_OFFSET = "font-family: monospace; font-weight: normal; text-align: right; padding-right: 0.6em; opacity: 0.7"


def _background(kinds):
    """One colour; or stripes, where a byte holds parts of two kinds."""
    colors = [TINTS[kind] for kind in kinds] or ["#FFFFFF"]
    if len(colors) == 1:
        return colors[0]
    stops = [f"{color} {100 * i // len(colors)}% {100 * (i + 1) // len(colors)}%" for i, color in enumerate(colors)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def _legend(parts):
    kinds = dict.fromkeys(part.kind for part in parts)
    marks = (f'<span style="background: {TINTS[kind]}; color: black; padding: 0 0.5em">{kind}</span>' for kind in kinds)
    return f'<div style="line-height: 1.6; margin-top: 0.3em">{" ".join(marks)}</div>'


def _reading_as_html(data, chosen):
    rows = "".join(
        f'<tr><th scope="row" style="text-align: left; vertical-align: top; padding-right: 1em">{label}</th>'
        f'<td style="font-family: monospace; text-align: left; white-space: pre-wrap">{_marked(text)}</td></tr>'
        for label, text in _rows(data, chosen)
    )
    return f'<table class="qtext qhex-reading" style="margin-left: 1.5em; max-width: 34em">{rows}</table>'


def _rows(data, chosen):
    """(label, text) of everything that is said about a part; its bits stand in brackets."""
    rows = [("part", chosen.name), ("where", _where(chosen))]
    if len(chosen.bytes) <= 4:
        rows += [(f"byte {at}", f"{data[at]:02x} = {_byte(data[at], at, chosen)}") for at in chosen.bytes]
    if chosen.raw is not None:
        rows.append(("raw", f"{chosen.raw} = 0x{chosen.raw:x}"))
    return [*rows, *chosen.lines[:-1], ("value", chosen.value), chosen.lines[-1]]


def _byte(byte, at, part):
    """The bits of a byte, highest first, those of the part in brackets."""
    inside = {bit for piece in part.bits if piece.byte == at for bit in range(piece.low, piece.low + piece.count)}
    text, within = "", False
    for bit in range(7, -1, -1):
        if (bit in inside) != within:
            within = not within
            text += "[" if within else "]"
        text += str(byte >> bit & 1)
    return text + "]" * within


def _marked(text):
    """Escaped; bits in brackets become bold."""
    return re.sub(r"\[([01]+)\](?=[01\[]|$)", r"<b><u>\1</u></b>", html.escape(text))


def _where(part):
    """The place of a part in words, the lowest bits first."""
    first, last = part.bytes[0], part.bytes[-1]
    if all(piece.count == 8 for piece in part.bits):
        return f"byte {first}" if first == last else f"bytes {first}-{last}"
    pieces = [(p.byte, f"bit{'s' * (p.count > 1)} {_range(p.low, p.count)}") for p in part.bits]
    return ", then ".join(f"{bits} of byte {byte}" for byte, bits in pieces)


def _range(low, count):
    return f"{low}-{low + count - 1}" if count > 1 else f"{low}"


def _clipped(text, length):
    return text if len(text) <= length else text[: length - 1] + "…"
