"""The model card of the bundled model, written from the record of its training so that the two cannot disagree.

    python -m qlearn.training.card

reads `training.json` beside the weights and writes `MODEL_CARD.md` next to it.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "models" / "bundled"

TEMPLATE = """\
---
license: apache-2.0
language: code
pipeline_tag: text-generation
library_name: transformers
---

# The bundled model of qlearn

A small language model that writes Python. It exists so that a course on quantization can run on a real model without
downloading one: large enough that its perplexity and its text respond to quantization as those of large models do,
small enough that a laptop evaluates it in seconds. It is a teaching aid, not a coding assistant.

| | |
|---|---|
| architecture | Llama: 8 layers, width 256, MLP 768, 4 heads with 2 key-value heads, tied embeddings |
| parameters | {parameters:,} |
| storage | bf16 safetensors |
| tokenizer | byte-level BPE of 4,096 tokens with GPT-2's pre-tokenization, trained on the same corpus |
| context | 1,024 tokens |
| licence of the weights | Apache-2.0 |

## Training

| | |
|---|---|
| date, machine | {date}, one {gpu}, Python {python}, torch {torch}, transformers {transformers} |
| command | `{command}` |
| steps | {steps:,} of {tokens_per_step:,} tokens: {billions:.2f} billion tokens, {passes:.1f} passes over the corpus |
| optimizer | AdamW, betas 0.9 and 0.95, weight decay 0.1 |
| learning rate | {learning_rate:g} after 150 steps of warm-up, then linearly to 0 |
| time | {seconds:.0f} s |

The loss curve is in `training.json`: the training loss every 25 steps, the held-out loss twelve times.

## Held-out text

Twenty modules of the standard library were never trained on: {modules}. On their {held_tokens:,} tokens the
perplexity is **{perplexity:.2f}**, in windows of 1,024 tokens; that is {bits_per_byte:.3f} bits per byte.

## Limits

It has seen nothing but Python. It imitates the look of good code, forgets what a function was for after a few lines,
and invents names. It has not been aligned, filtered or tested for any use outside this course.

## Corpus

{files:,} files, {megabytes:.0f} MB, {corpus_tokens:.1f} M tokens: the `.py` files of these packages, each under the
permissive licence that it declares. Files with very long lines, very short or very long files, and exact duplicates
were left out.

| package | licence | files | MB |
|---|---|---:|---:|
{rows}
"""


def render(record):
    """The card as Markdown, from the dictionary that `training.json` holds."""
    corpus, held_out = record["corpus"], record["held_out"]
    rows = [
        f"| {s['package']} | {s['licence']} | {s['files']:,} | {s['characters'] / 1e6:.2f} |" for s in corpus["sources"]
    ]
    return TEMPLATE.format(
        **record,
        billions=record["tokens_seen"] / 1e9,
        passes=record["tokens_seen"] / corpus["tokens"],
        files=corpus["files"],
        megabytes=corpus["characters"] / 1e6,
        corpus_tokens=corpus["tokens"] / 1e6,
        modules=", ".join(f"`{name}`" for name in held_out["modules"]),
        held_tokens=held_out["tokens"],
        perplexity=held_out["perplexity"],
        bits_per_byte=held_out["bits_per_byte"],
        rows="\n".join(rows),
    )


def main():
    """Write the card beside the weights."""
    record = json.loads((FOLDER / "training.json").read_text())
    (FOLDER / "MODEL_CARD.md").write_text(render(record))


if __name__ == "__main__":
    main()
