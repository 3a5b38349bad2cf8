"""Round-to-nearest on the bundled model, by bit width: the line that every better method has to beat.

    python -m qlearn.bench.rtn

quantizes all linear layers with absmax and with zero-point, at 8 down to 2 bits and one scale for each 64 weights, and
measures each model on the whole evaluation text. It takes five minutes on two CPU cores and writes `results/rtn.json`.
"""

from qlearn import evaluate
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.models import load_model, quantize_model

BITS = (8, 6, 5, 4, 3, 2)
GROUP_SIZE = 64


def measure(methods=("absmax", "zero_point"), bits=BITS, tokens=None, parse=True):
    """One row for the unquantized model, then one for each method and number of bits.

    tokens: how much of the evaluation text to use, None for all.  Returns a list of evaluate.Row.
    """
    model, tokenizer = load_model()
    reference = evaluate.Reference(model, tokenizer, tokens=tokens)
    rows = [evaluate.report(model, tokenizer, reference, name="unquantized", parse=parse)]
    for method in methods:
        for b in bits:
            model, _ = load_model()
            quantize_model(model, method, bits=b, group_size=GROUP_SIZE, progress=False)
            rows.append(evaluate.report(model, tokenizer, reference, name=f"{method} {b} bit", parse=parse))
            print(rows[-1], flush=True)
    return rows


def main():
    """Measure everything, print the table, write the results."""
    rows = measure()
    print(evaluate.table(rows, seconds=True))
    model, tokenizer = load_model()
    record = provenance("python -m qlearn.bench.rtn") | {
        "group_size": GROUP_SIZE,
        "perplexity_llama_cpp": evaluate.perplexity(model, tokenizer, convention="llama.cpp"),
        "rows": [row.as_dict() for row in rows],
    }
    write("rtn", record)


if __name__ == "__main__":
    main()
