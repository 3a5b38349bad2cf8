"""The bit explorer: click the bits of a number, in any format from FP32 to FP4, and watch what they mean.

Each bit is a button, coloured by its field: sign, exponent, mantissa. Below stand the formula with its numbers filled
in, the value, the kind of number, the two neighbours, and the ulp, the step from here to the next number. Typing a
number encodes it.

A learner can put their own functions in the place of the format's: `encode(x) -> code` decides which bits a typed
number gets, `decode(code) -> value` what the bits are worth. The format keeps an eye on both, and a disagreement is
written out, with what was expected. A function that raises is quoted, and the format stands in for it.

The format itself, `qlearn.formats.floats.FloatFormat`, does all the arithmetic; here it is only shown.
"""

import html
import math
import operator

import ipywidgets
from matplotlib.patches import Rectangle

from qlearn.course import plots
from qlearn.course.live import LiveView
from qlearn.formats.floats import FORMATS

FIELDS = ("sign", "exponent", "mantissa")
_TYPED = ("0", "-0.0", "0.1", "-1e-3", "1e30", "inf", "nan")  # what a sweep types
_TINT = {
    "sign": "#FBE3D2",
    "exponent": "#D3E6F3",
    "mantissa": "#D2EFE6",
}  # a bit that is 0; one that is 1 has the full colour


class BitExplorer(LiveView):
    """Click the bits of a floating-point number.

    format: the format to begin with, a FloatFormat or its name.  number: the number to begin with, as it would be
    typed.
    encode(x) -> code, decode(code) -> value: the learner's functions (int codes, float values); with either, the
    format stays fixed.
    Raises ValueError for an unknown format or a number that cannot be read.

    >>> BitExplorer("fp4_e2m1", "1.4")
    BitExplorer: fp4_e2m1 0 01 1 = 1.5 (normal), below 1, above 2, ulp 0.5
    """

    def __init__(self, format="fp8_e4m3fn", number="0.3", encode=None, decode=None):
        name = getattr(format, "name", format)
        if name not in FORMATS:
            raise ValueError(f"format {name!r} is unknown: choose from {', '.join(FORMATS)}")
        self.encode, self.decode = encode, decode
        self.code, self._encoded, self._said, self._shown = 0, None, "", None
        names = [name] if encode or decode else list(FORMATS)
        controls = {
            "format": ipywidgets.Dropdown(options=names, value=name, description="format"),
            "number": ipywidgets.Text(value=str(number), description="number", continuous_update=False),
        }
        self.bits, self.reading = ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap")), ipywidgets.HTML()
        alt = "The bits of a floating-point number, coloured by field, with the formula that gives its value."
        super().__init__("BitExplorer", alt, controls, [self.bits, self.reading])

    @property
    def format(self):
        """The format on display."""
        return FORMATS[self.controls["format"].value]

    def show(self, format, number):
        if (format, number) != self._encoded:
            self.code, self._said = self._code_of(parse(number))
            self._encoded = format, number
        self._show_bits()
        value, said = self._value()
        self.reading.value = _reading_as_html(self.format, self.code, value)
        return "; ".join(filter(None, [summary(self.format, self.code), self._said, said]))

    def flip(self, bit):
        """Flip one bit, 0 being the lowest; the number field follows without encoding anything."""
        self.code, self._said = self.code ^ (1 << bit), ""
        number = f"{self.format.decode(self.code):.9g}"
        self._encoded = self.controls["format"].value, number
        self.controls["number"].value = number
        self.draw()

    def sweep(self):
        """In every format, type a few numbers and flip every bit there and back; returns the summaries, for tests."""
        summaries, start = [], self.values()
        for name in self.controls["format"].options:
            self.controls["format"].value = name
            for number in _TYPED:
                self.controls["number"].value = number
                summaries.append(self._checked_summary())
            for bit in [*range(self.format.bits)] * 2:
                self.flip(bit)
                summaries.append(self._checked_summary())
        for control, value in start.items():
            self.controls[control].value = value
        return summaries

    def _checked_summary(self):
        if self.error:
            raise self.error
        return self.summary

    def png(self):
        """The bits as a static picture, PNG bytes."""
        return picture(self.format, self.code).png()

    def _code_of(self, x):
        """The code of a typed number, and what is to be said about the learner's encode."""
        true = int(self.format.encode(x))
        mine, said = _ask("encode", self.encode, x, true)
        bits = self.format.bits
        try:
            code = operator.index(mine)
        except TypeError:
            code = -1
        if not 0 <= code < 2**bits:
            return true, f"your encode says {mine!r}, which is no code of {bits} bits; the format says {true:0{bits}b}"
        if code != true:
            said = f"your encode says {code:0{bits}b}, the format says {true:0{bits}b}"
        return code, said

    def _value(self):
        """The value to show, and what is to be said about the learner's decode."""
        true = float(self.format.decode(self.code))
        mine, said = _ask("decode", self.decode, self.code, true)
        if _same(mine, true):
            return true, said
        return mine, f"your decode says {_number(mine)}, the format says {_number(true)}"

    def _show_bits(self):
        format = self.format
        if self._shown != format.name:
            self.bits.children = [_field(name, bits, self.flip) for name, bits in fields_of(format)]
            self._shown = format.name
        for button in _buttons(self.bits):
            on = self.code >> button.bit & 1
            button.description = str(on)
            button.style.button_color = plots.COLORS[button.field] if on else _TINT[button.field]
            button.style.text_color = "white" if on else "black"
            button.tooltip = f"{button.field} bit {button.bit}, now {on}; press to flip"


def fields_of(format):
    """[(field, bits)]: the fields that a format has, each with the numbers of its bits, highest first."""
    counts = (format.sign_bits, format.exponent_bits, format.mantissa_bits)
    fields, top = [], format.bits
    for name, count in zip(FIELDS, counts, strict=True):
        if count:
            fields.append((name, range(top - 1, top - count - 1, -1)))
        top -= count
    return fields


def parse(text):
    """The number that was typed; ValueError says what may be typed.

    >>> parse("-1e-3"), parse("inf")
    (-0.001, inf)
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number; type one such as 0.1, -3e4, inf or nan") from None


def formula(format, code):
    """The value of a code as a product, its numbers filled in.

    >>> formula(FORMATS["fp8_e4m3fn"], 0b0_0101_010)
    '(−1)^0 × 2^(5 − 7) × (1 + 2/8)'
    >>> formula(FORMATS["fp8_e4m3fn"], 0b1_0000_001)
    '(−1)^1 × 2^(1 − 7) × (0 + 1/8)'
    """
    f = format.fields(code)
    if f.kind in ("inf", "nan"):
        return "the exponent is all ones: " + (
            "mantissa 0 means infinity" if f.kind == "inf" else "this code means not a number"
        )
    leading = 0 if f.kind in ("zero", "subnormal") else 1
    parts = [f"(−1)^{f.sign}"] if format.sign_bits else []
    parts.append(f"2^({f.power + format.bias} − {format.bias})")
    if format.mantissa_bits:
        parts.append(f"({leading} + {f.mantissa}/{2**format.mantissa_bits})")
    return " × ".join(parts)


def summary(format, code):
    """One line: format, bits by field, value, kind, neighbours, ulp."""
    bits = f"{code:0{format.bits}b}"
    grouped = " ".join("".join(bits[format.bits - 1 - i] for i in places) for _, places in fields_of(format))
    f = format.fields(code)
    line = f"{format.name} {grouped} = {_number(f.value)} ({f.kind})"
    return line + "".join(f", {name} {value}" for name, value in _surroundings(format, code))


def picture(format, code):
    """A static picture of the bits of a code, coloured by field, with the formula below."""
    width = max(6, 0.32 * format.bits + 1)
    figure = plots.blank(width, 1.7)
    with plots.style():
        axes = figure.subplots()
        axes.set(xlim=(-0.2, max(format.bits, (width - 1) / 0.32) + 0.2), ylim=(0, 4))
        axes.set_axis_off()
        for name, places in fields_of(format):
            _draw_field(axes, format, code, name, places)
        value = _number(format.fields(code).value)
        axes.text(0, 1.15, f"{format.name}:  {formula(format, code)}", va="center")
        axes.text(0, 0.35, f"= {value}", va="center", fontweight="bold")
    return plots.Picture(figure, summary(format, code))


def _draw_field(axes, format, code, name, places):
    left = format.bits - 1 - places[0]
    axes.text(left, 3.45, name if len(places) > 2 else name[:1], color=plots.COLORS[name], fontsize=11)
    for i in places:
        on, x = code >> i & 1, format.bits - 1 - i
        color = plots.COLORS[name] if on else _TINT[name]
        axes.add_patch(Rectangle((x + 0.04, 2), 0.92, 1.2, facecolor=color))
        axes.text(
            x + 0.5,
            2.55,
            str(on),
            ha="center",
            va="center",
            color="white" if on else "black",
            family="DejaVu Sans Mono",
        )


def _surroundings(format, code):
    """[(name, number)] of the neighbours and the ulp; nothing for what has none."""
    value = format.fields(code).value
    if not math.isfinite(value):
        return []
    below, above = float(format.decode(format.next_down(code))), float(format.decode(format.next_up(code)))
    found = [("below", below)] if below != value else []
    found += [("above", above)] if above != value else []
    return [(name, _number(x)) for name, x in [*found, ("ulp", float(format.ulp(value)))]]


def _reading_as_html(format, code, value):
    kind = format.fields(code).kind
    rows = [
        ("code", f"{code} = 0x{code:0{-(-format.bits // 4)}x}"),
        ("formula", formula(format, code)),
        ("value", f"<b>{html.escape(_number(value))}</b>"),
        ("kind", kind),
        *_surroundings(format, code),
    ]
    body = "".join(
        f'<tr><th scope="row" style="text-align: left; padding-right: 1em">{k}</th><td>{v}</td></tr>' for k, v in rows
    )
    return f'<table class="qbits-reading" style="line-height: 1.5">{body}</table>'


def _field(name, places, flip):
    """A labelled row of buttons, one for each bit of a field."""
    buttons = []
    for bit in places:
        button = ipywidgets.Button(layout=ipywidgets.Layout(width="1.7em", padding="0", margin="1px"))
        button.bit, button.field = bit, name
        button.on_click(lambda pressed: flip(pressed.bit))
        button.add_class("qbits-bit")
        buttons.append(button)
    label = ipywidgets.HTML(f'<b style="color: {plots.COLORS[name]}">{name}</b>')
    return ipywidgets.VBox([label, ipywidgets.HBox(buttons)])


def _buttons(box):
    return [button for field in box.children for button in field.children[1].children]


def _ask(name, function, argument, true):
    """What the learner's function answers and "" ; or the true answer and a quotation of what it raised."""
    if function is None:
        return true, ""
    try:
        return function(argument), ""
    except Exception as error:
        return true, f"your {name} raised {type(error).__name__}: {error}"


def _same(mine, true):
    """Equal as codes are: NaN equals NaN, and 0.0 does not equal -0.0. What is no number equals nothing."""
    try:
        mine = float(mine)
    except Exception:
        return False
    if math.isnan(true):
        return math.isnan(mine)
    return mine == true and math.copysign(1, mine) == math.copysign(1, true)


def _number(x):
    """A number in at most nine digits, which tell all float32 apart; anything else as its repr."""
    try:
        return f"{float(x):.9g}"
    except Exception:
        return repr(x)
