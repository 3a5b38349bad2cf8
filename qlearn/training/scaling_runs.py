"""The runs that a scaling law is fitted to, and those that Quartet's authors published.

A run is a row {"scheme": "bf16", "params": 30482560, "tokens": 749993984, "loss": 3.41571}: how it computed, its
parameters (those that are not embeddings), the tokens it learnt from, and the loss it ended with, in nats per token of
held-out text. Rows may have more keys.

`data/quartet_losses.csv` names where its figures come from. It has five schemes at sizes from 30 to 200 million, with
25 to 800 tokens for each parameter: 21 runs without rounding, and as many of most other schemes. Three more runs
without rounding lie beyond: two of 440 and 820 million parameters, and the smallest size with 48 billion tokens.
"""

import csv
import math
from pathlib import Path

import numpy as np

BASE = "bf16"
#: The published schemes with a rounding, and which efficiency each can have: "N" by its forward pass, "D" by its
#: backward pass.
SCHEMES = {
    "forward_quest": ("N",),
    "backward_sr": ("D",),
    "backward_rtn_v1": ("D",),
    "quest_forward_sr_backward": ("N", "D"),
}


def published(scheme=None):
    """The losses that Quartet's authors printed, of one scheme or of all.

    Returns rows {"scheme", "params", "tokens", "loss"}. Raises ValueError for an unknown scheme.

    >>> len(published()), published("bf16")[0]
    (104, {'scheme': 'bf16', 'params': 30482560, 'tokens': 749993984, 'loss': 3.41571})
    """
    lines = (Path(__file__).parent / "data" / "quartet_losses.csv").read_text(encoding="utf-8").splitlines()
    kinds = {"scheme": str, "params": int, "tokens": int, "loss": float}
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    rows = [{key: kind(row[key]) for key, kind in kinds.items()} for row in table]
    return rows if scheme is None else select(rows, scheme)


def select(rows, scheme):
    """The rows of one scheme, a list. Raises ValueError, listing the schemes there are, when there is none."""
    found = [row for row in rows if row.get("scheme") == scheme]
    if not found:
        known = ", ".join(sorted({str(row.get("scheme")) for row in rows})) or "none"
        raise ValueError(f"there are no runs of the scheme {scheme!r}; there are: {known}")
    return found


def logs(points):
    """log params, log tokens and log loss of the rows, float64 (3, rows). Raises ValueError for a bad row."""
    table = [[_number(row, key, place) for key in ("params", "tokens", "loss")] for place, row in enumerate(points)]
    return np.log(np.array(table, np.float64).reshape(-1, 3)).T


def _number(row, key, place):
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {place} has no number {key!r}: {row}; a row needs params, tokens and loss") from error
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"row {place} has {key}={value}; it must be finite and above 0")
    return value


def point_of(row):
    return row["params"], row["tokens"]


def enough(points, unknowns, kinds=2):
    """Whether points (N, D) can tell so many unknowns, and lie at `kinds` sizes and lengths at least."""
    return len(set(points)) >= unknowns and all(len(set(axis)) >= kinds for axis in zip(*points, strict=True))


def check_enough(points, unknowns, kinds=2):
    if not enough([point_of(row) for row in points], unknowns, kinds):
        different = {point_of(row) for row in points}
        sizes, lengths = (len({point[axis] for point in different}) for axis in (0, 1))
        needed = f"{unknowns} unknowns need as many" + (f", and {kinds} of each" if kinds else "")
        raise ValueError(
            f"there are {len(different)} different points, of {sizes} sizes and {lengths} numbers of tokens; {needed}"
        )
