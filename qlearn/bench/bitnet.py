"""Trained to be ternary, or rounded to it afterwards: BitNet against its plain counterpart and what is made of that.

    python -m qlearn.bench.bitnet --runs FOLDER [--device cuda]

needs the files that the runs of `training/bitnet.py` wrote into FOLDER, one called bf16 among them. It writes two
records.

**bitnet_training.json**: the settings and the loss curves of all runs there, with every fourth point of a curve.

**bitnet.json**: a table in the conventions of the package, measured on its evaluation text. The reference, for
divergence and flips, is the model trained in bfloat16.

    trained      the runs, computing with their stored trits or signs and 8-bit inputs
    rounded      the bfloat16 model's weights turned into trits or signs by the same rule, and inputs left alone
    shipped      the GGUF file of the package, its trits with 8-bit inputs, its embedding in Q8_0
    rivals       what takes 2 or 3 bits of the same model: rounding with clipping, and GPTQ
    bundled      the bundled model, of the same size without the two more norms in each block; and that after
                 quantization-aware training for 2 bits

A minute for each row on two CPU cores.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from qlearn import evaluate
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.export import read_gguf, write_gguf
from qlearn.models import load_model, quantize_model
from qlearn.training import bitnet, qat

REFERENCE = "bf16"
ALWAYS = ("name", "kind", "curve", "held_out_curve")  # what each run has for itself, even if all have the same
THINNED = 4  # of the points of a curve, one is kept


def training_record(folder):
    """The records of all runs in a folder as one: what they have in common, and "runs", each with its "name".

    Curves become lists of [step, loss].
    Raises FileNotFoundError when there are none.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"there is no record of a run in {folder}; make one with python -m qlearn.training.bitnet"
        )
    runs = [{"name": path.stem, **json.loads(path.read_text())} for path in paths]
    for run in runs:
        run["curve"] = _pairs(run["curve"][THINNED - 1 :: THINNED])
        run["held_out_curve"] = _pairs(run["held_out_curve"])
    common = {n: v for n, v in runs[0].items() if n not in ALWAYS and all(run.get(n) == v for run in runs)}
    return common | {"runs": [{n: v for n, v in run.items() if n not in common} for run in runs]}


def recipes(folder, device):
    """dict (kind of row, name) -> function without arguments that gives the model, in the order of the table."""
    folder = Path(folder)
    run = lambda name: bitnet.load(folder / f"{name}.safetensors").to(device)  # noqa: E731
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if REFERENCE not in names:
        raise FileNotFoundError(f"there is no {REFERENCE}.safetensors in {folder}; train it with --kind bf16")
    names.sort(key=lambda name: name != REFERENCE)
    rows = {("trained", name): partial(run, name) for name in names}
    _, tokenizer = load_model()

    def of_reference(method, bits, group_size, **options):
        options = {"tokenizer": tokenizer, "progress": False, **options}
        return lambda: quantize_model(run(REFERENCE), method, bits, group_size, **options)

    rows |= {
        ("shipped", "GGUF"): lambda: read_gguf(bitnet.checkpoint("b158"))[0].to(device),
        ("rounded", "trits, one scale"): of_reference("ternary", 1.6, None),
        ("rounded", "trits, groups of 128"): of_reference("ternary", 1.6, 128),
        ("rounded", "trits, groups of 64"): of_reference("ternary", 1.6, 64),
        ("rounded", "trits, one scale from the largest"): of_reference("ternary", 1.6, None, scale="absmax"),
        ("rounded", "signs, one scale"): of_reference("binary", 1, None),
        ("rivals", "2 bits, clipping"): of_reference("zero_point", 2, 64, clip="mse"),
        ("rivals", "2 bits, GPTQ"): of_reference("gptq", 2, 64, act_order="static", clip="mse"),
        ("rivals", "3 bits, GPTQ"): of_reference("gptq", 3, 64, act_order="static", clip="mse"),
        ("bundled", "bundled"): lambda: load_model()[0].to(device),
        ("bundled", "bundled, QAT, 2 bits"): lambda: load_model(qat.checkpoint(2), progress=False)[0].to(device),
    }
    return rows


def ship(path):
    """Write the checkpoint of the package, TQ1_0 with the embedding in Q8_0, from the file of a run of kind b158."""
    model, tokenizer = bitnet.load(path), load_model()[1]
    types = {"token_embd.weight": "Q8_0"}
    return write_gguf(model, tokenizer, bitnet.checkpoint("b158"), "TQ1_0", types=types, progress=False)


def measure(folder, device="cpu", tokens=None, parse=True):
    """Yield evaluate.Row.as_dict() for each recipe, with "kind", and for a trained model the run's "held_out_loss"."""
    _, tokenizer = load_model()
    reference = None
    for (kind, name), make in recipes(folder, device).items():
        model = make()
        if reference is None:
            reference = evaluate.Reference(model, tokenizer, tokens=tokens)
        row = {"kind": kind, **evaluate.report(model, tokenizer, reference, name=name, parse=parse).as_dict()}
        if kind == "trained":
            row["held_out_loss"] = json.loads((Path(folder) / f"{name}.json").read_text())["held_out"]["loss"]
        if kind == "shipped":
            row["bytes"] = bitnet.checkpoint("b158").stat().st_size
        yield row


def _pairs(curve):
    return [[point["step"], point["loss"]] for point in curve]


def main(argv=None):
    """Write both records, and print each row as it comes."""
    parser = argparse.ArgumentParser(description="BitNet against its plain counterpart.")
    parser.add_argument("--runs", type=Path, required=True, help="folder with the files of training/bitnet.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ship", metavar="NAME", help="first make the checkpoint of the package from this run")
    parser.add_argument("--out", type=Path, help="folder to write; the package's results by default")
    options = parser.parse_args(argv)
    if options.ship:
        ship(options.runs / f"{options.ship}.safetensors")
    write("bitnet_training", training_record(options.runs), options.out)
    record = provenance(f"python -m qlearn.bench.bitnet --runs FOLDER --device {options.device}") | {"rows": []}
    for row in measure(options.runs, options.device):
        record["rows"].append(row)
        write("bitnet", record, options.out)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
