"""One row for each model, one table for a sweep.

    reference = Reference(model, tokenizer)                                   # the unquantized model, run once
    rows = [report(model, tokenizer, reference, name="bf16")]
    for bits in (8, 4, 3):
        model, tokenizer = qlearn.load_model()
        qlearn.quantize_model(model, "absmax", bits=bits, group_size=64)
        rows.append(report(model, tokenizer, reference, name=f"absmax {bits}"))
    table(rows)

A table shows rounded figures, few enough digits that another machine prints the same; `row.as_dict()` holds the full
ones. The time it took is the one figure that differs from run to run, so it is shown only on request:
`table(rows, seconds=True)`.
"""

import html
import time
from dataclasses import asdict, dataclass

from qlearn.evaluate.divergence import compare
from qlearn.evaluate.parse import parse_rate
from qlearn.evaluate.perplexity import perplexity
from qlearn.evaluate.size import bits_per_weight, model_bytes


@dataclass(frozen=True, repr=False)
class Row:
    """What was measured on one model; None where it was not.

    kl_divergence: nats.  flip_rate, parse_rate: shares of 1.  same_top_p: percent.
    bits_per_weight: over the quantized layers.  bytes: of the whole model, as stored.  seconds: that measuring took.
    """

    name: str
    perplexity: float
    kl_divergence: float | None
    flip_rate: float | None
    same_top_p: float | None
    parse_rate: float | None
    bits_per_weight: float
    bytes: int
    seconds: float

    def as_dict(self):
        """All figures, unrounded, by name."""
        return asdict(self)

    def __repr__(self):
        return repr(Table([self]))

    def _repr_markdown_(self):
        return Table([self])._repr_markdown_()

    def _repr_html_(self):
        return Table([self])._repr_html_()


def report(model, tokenizer, reference=None, name="", tokens=None, parse=False, progress=False):
    """Measure a model.

    model, tokenizer: any causal language model of transformers, quantized or not, in eval mode.
    reference: a Reference; adds divergence and flips, and fixes the text (else the one that ships, "sliding").
    tokens: use only so many of the text's first tokens; with a reference, say it there.
    parse: measure the parse rate too.  progress: show a bar.
    Returns a Row.  Raises ValueError when `tokens` contradicts the reference, and as the measures do.
    """
    if reference is not None and tokens not in (None, reference.tokens):
        raise ValueError(f"tokens={tokens}, but the reference was run on {reference.tokens}; leave tokens out")
    started = time.perf_counter()
    if reference is None:
        compared = (perplexity(model, tokenizer, tokens=tokens, progress=progress), None, None, None)
    else:
        c = compare(model, reference, progress)
        compared = (c.perplexity, c.kl_divergence, c.flip_rate, c.same_top_p)
    parsed = parse_rate(model, tokenizer) if parse else None
    seconds = time.perf_counter() - started
    return Row(name, *compared, parsed, bits_per_weight(model), model_bytes(model), seconds)


def table(rows, seconds=False):
    """Rows as one table, for a terminal, a notebook or a README.  seconds: show the time column.  Returns a Table."""
    return Table(list(rows), seconds)


class Table:
    """Rows side by side; columns that no row measured are left out.

    >>> row = Row("absmax 4", 8.3871, 0.0412, 0.1373, 86.27, None, 4.25, 5_450_000, 9.1)
    >>> Table([row])
    name        perplexity  KLD     flips %  same top %  bits/weight  MB
    absmax 4         8.387  0.0412     13.7        86.3        4.250  5.45
    """

    def __init__(self, rows, seconds=False):
        if not rows:
            raise ValueError("a table needs at least one row; call report() first")
        self.rows = rows
        titles = [
            t for t, value, _ in COLUMNS if any(value(r) is not None for r in rows) and (seconds or t != "seconds")
        ]
        self.columns = [column for column in COLUMNS if column[0] in titles]

    def cells(self):
        """The rounded figures, a list of lists of str, the titles first."""
        lines = [[title for title, _, _ in self.columns]]
        for row in self.rows:
            values = [(value(row), form) for _, value, form in self.columns]
            lines.append(["" if value is None else form(value) for value, form in values])
        return lines

    def __repr__(self):
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for line in cells:
            first, *rest = line
            lines.append(
                "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])
            )
        return "\n".join(lines)

    def _repr_markdown_(self):
        titles, *body = [[cell.replace("|", "\\|") for cell in line] for line in self.cells()]
        rule = ["---"] + ["---:"] * (len(titles) - 1)
        return "\n".join("| " + " | ".join(line) + " |" for line in (titles, rule, *body))

    def _repr_html_(self):
        titles, *body = [[html.escape(cell) for cell in line] for line in self.cells()]
        head = "".join(f"<th>{cell}</th>" for cell in titles)
        rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _significant(x):
    """Four digits: enough to see a change, few enough to come out alike on other machines.

    >>> _significant(7.9196), _significant(10.8512), _significant(263.14), _significant(48123.7)
    ('7.920', '10.85', '263.1', '48124')
    """
    decimals = max(0, 4 - len(str(int(x)))) if x < 1e15 else 0
    return f"{x:.{decimals}f}" if x < 1e7 else f"{x:.3e}"


COLUMNS = (
    # title, what it shows, how it is written
    ("name", lambda row: row.name, str),
    ("perplexity", lambda row: row.perplexity, _significant),
    ("KLD", lambda row: row.kl_divergence, "{:.4f}".format),
    ("flips %", lambda row: None if row.flip_rate is None else 100 * row.flip_rate, "{:.1f}".format),
    ("same top %", lambda row: row.same_top_p, "{:.1f}".format),
    ("parse %", lambda row: None if row.parse_rate is None else 100 * row.parse_rate, "{:.0f}".format),
    ("bits/weight", lambda row: row.bits_per_weight, "{:.3f}".format),
    ("MB", lambda row: row.bytes / 1e6, "{:.2f}".format),
    ("seconds", lambda row: row.seconds, "{:.1f}".format),
)
