"""The type of every tensor, as llama-quantize chose them: a table that is kept in types.json.

It is made by `python -m tests.llamacpp.make_types`. For each model and scheme it has, for each kind of matrix, the
types layer by layer, with repetitions counted: "Q6_K Q4_K*2 Q6_K". With "+ imatrix" behind the scheme, an imatrix was
given.
"""

import itertools
import json
from pathlib import Path

from qlearn.export.names import layer_number

TABLE = Path(__file__).with_name("types.json")
WITH_IMATRIX = ("Q4_0", "Q5_0", "Q2_K_S")  # the schemes that choose differently, or cannot do without


def compact(types):
    """dict name of a tensor -> type, as dict kind -> text; what is F32 everywhere is left out.

    >>> compact({f"blk.{i}.ffn_up.weight": type for i, type in enumerate(["Q6_K", "Q4_K", "Q4_K"])})
    {'ffn_up.weight': 'Q6_K Q4_K*2'}
    """
    layers = {}
    for name in sorted(types, key=lambda name: (layer_number(name) or 0, name)):
        kind = name.split(".", 2)[2] if layer_number(name) is not None else name
        layers.setdefault(kind, []).append(types[name])
    found = {}
    for kind, row in sorted(layers.items()):
        runs = [(type, len(list(run))) for type, run in itertools.groupby(row)]
        if runs != [("F32", len(row))]:
            found[kind] = " ".join(type if count == 1 else f"{type}*{count}" for type, count in runs)
    return found


def table():
    """dict model -> dict scheme -> dict kind -> text."""
    return json.loads(TABLE.read_text())
