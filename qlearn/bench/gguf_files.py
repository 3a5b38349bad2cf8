"""The bundled model as a GGUF file of every scheme: its size, and the perplexity that llama.cpp and this package find.

    python -m qlearn.bench.gguf_files        # needs the tools of llama.cpp: qlearn/bench/llamacpp.py

For each scheme, and again with an imatrix where one changes something, a row with

    bytes, bits_per_weight    of the file, and of its tensors
    perplexity                of the model that read_gguf reads back from it, in llama.cpp's convention
    llama_perplexity          what llama-perplexity prints for the file
    ratio                     llama_perplexity / perplexity
    same_bytes                whether llama-quantize makes the same tensors from the F32 file

on the evaluation text, 512 tokens at a time; the imatrix is from the calibration text. The ratio is not quite 1,
because llama.cpp rounds the inputs of quantized matrices to 8 bits, and keys and values to float16, which read_gguf's
model does not.

For the first of the schemes, the greedy continuations of some prompts by both programs as well. Where they differ, they
part at a token that the model hesitates about, and `gaps` has by how much it does (nats between the two choices): a
continuation is a chain of decisions, and the smallest difference can turn a close one.

It takes an hour on a CPU core and writes `results/gguf_files.json`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from qlearn import evaluate
from qlearn.bench.ggml import SDIST
from qlearn.bench.llamacpp import LlamaCpp
from qlearn.bench.results import write
from qlearn.evaluate.provenance import provenance
from qlearn.export import GGUFFile, imatrix, inspect, read_gguf, write_gguf
from qlearn.export.recipes import SCHEMES
from qlearn.models import generate, load_model
from qlearn.training import qat

WITH_IMATRIX = [s for s in SCHEMES if s not in ("F32", "F16", "BF16", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")]
WITHOUT = [s for s in SCHEMES if s != "Q2_K_S"]
TEXTS = ("F32", "F16", "Q8_0")
PROMPTS = (
    "import numpy as", "def add(a, b):", "class Point:\n    def __init__", "for i in range(", "if __name__ ==",
    "try:\n    import", "return self.", "with open(path) as", "    raise ValueError(", "def test_", "# Copyright",
    "from collections import",
)  # fmt: skip
NEW_TOKENS = 48


def measure(llama, folder, chunks=-1, schemes=WITHOUT, with_imatrix=WITH_IMATRIX, texts=TEXTS):
    """Yield a dict for each scheme, then for each with an imatrix, then for the model after QAT.

    llama: LlamaCpp.  folder: for files.  chunks: of the evaluation text, -1 for all.
    """
    model, tokenizer = load_model()
    text, source, saved = (Path(folder) / name for name in ("text.txt", "source.gguf", "imatrix.gguf"))
    text.write_text(evaluate.evaluation_text(), newline="", encoding="utf-8")
    write_gguf(model, tokenizer, source, "F32", progress=False)
    importance = imatrix(model, tokenizer) if with_imatrix else None
    if importance:
        importance.save(saved)
    for scheme in schemes:
        path = write_gguf(model, tokenizer, _path(folder), scheme, progress=False)
        row = {"name": scheme, "scheme": scheme, "imatrix": False} | _row(llama, path, text, chunks)
        row["same_bytes"] = _same_as_theirs(llama, source, path, scheme)
        yield row | (_texts(llama, path) if scheme in texts else {})
    for scheme in with_imatrix:
        path = write_gguf(model, tokenizer, _path(folder), scheme, importance, progress=False)
        row = {"name": f"{scheme}, imatrix", "scheme": scheme, "imatrix": True} | _row(llama, path, text, chunks)
        yield row | {"same_bytes": _same_as_theirs(llama, source, path, scheme, saved)}
    trained, _ = load_model(qat.checkpoint(4), progress=False)
    path = write_gguf(trained, tokenizer, _path(folder), "Q4_0", progress=False)
    yield {"name": "Q4_0, QAT", "scheme": "Q4_0", "imatrix": False} | _row(llama, path, text, chunks)


def _path(folder):
    return Path(folder) / "model.gguf"


def _row(llama, path, text, chunks):
    """Size and perplexities of a file."""
    tokens = None if chunks < 0 else chunks * 512
    ours = evaluate.perplexity(*read_gguf(path), convention="llama.cpp", tokens=tokens)
    theirs = llama.perplexity(path, text, chunks)
    return {
        "bytes": path.stat().st_size,
        "bits_per_weight": inspect(path).bits_per_weight,
        "perplexity": ours,
        "llama_perplexity": theirs,
        "ratio": theirs / ours,
    }


def _same_as_theirs(llama, source, path, scheme, importance=None):
    """Whether llama-quantize makes the same tensors."""
    made = path.with_name("theirs.gguf")
    llama.quantize(source, made, scheme, importance)
    ours, theirs = GGUFFile(path), GGUFFile(made)
    return ours.tensors.keys() == theirs.tensors.keys() and all(
        ours.tensor(name).type == theirs.tensor(name).type and np.array_equal(ours.data(name), theirs.data(name))
        for name in ours.tensors
    )


def _texts(llama, path):
    """How many of the prompts both programs continue in the same way, and how close the others were."""
    model, tokenizer = read_gguf(path)
    gaps = [gap(llama, path, model, tokenizer, prompt, NEW_TOKENS) for prompt in PROMPTS]
    return {"prompts": len(PROMPTS), "same_texts": gaps.count(0.0), "gaps": [gap for gap in gaps if gap]}


def gap(llama, path, model, tokenizer, prompt, new_tokens):
    """0.0 where both programs write the same; else how much more likely the model found its own token, in nats."""
    ours = generate(model, tokenizer, prompt, new_tokens)
    theirs = llama.complete(path, prompt, new_tokens)
    if ours == theirs:
        return 0.0
    a, b = (tokenizer(prompt + written)["input_ids"] for written in (ours, theirs))
    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    with torch.inference_mode():
        logits = model(torch.tensor([a[:first]])).logits[0, -1]
    return float(logits[a[first]] - logits[b[first]])


def main(argv=None):
    """Measure everything, print each row as it comes, write the results."""
    parser = argparse.ArgumentParser(description="Write the bundled model as GGUF files and measure them.")
    parser.add_argument("--chunks", type=int, default=-1, help="of 512 tokens of the evaluation text; all by default")
    parser.add_argument("--out", type=Path, help="folder to write; the package's results by default")
    options = parser.parse_args(argv)
    command = "python -m qlearn.bench.gguf_files" + (f" --chunks {options.chunks}" if options.chunks >= 0 else "")
    record = provenance(command) | {"llama_cpp": SDIST.replace("==", " "), "chunks": options.chunks, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(LlamaCpp(), folder, options.chunks):
            record["rows"].append(row)
            write("gguf_files", record, options.out)
            print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
