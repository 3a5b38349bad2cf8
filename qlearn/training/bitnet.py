"""BitNet, trained from nothing on the corpus of the bundled model, as one command.

    python -m qlearn.training.tokens tokens.npz
    python -m qlearn.training.bitnet --kind b158 --tokens tokens.npz --out bitnet/

Three models of one architecture, which differ in their linear layers alone:

    bf16    plain ones: what the other two are to be compared with
    b158    BitLinear with ternary weights and 8-bit inputs, BitNet b1.58
    b1      BitLinear with binary weights and 8-bit inputs, the first BitNet

The architecture is transformers' `BitNetForCausalLM` in the sizes of the bundled model: a Llama with two more RMSNorms
in each block (`bitlinear.py` says why), which is also what llama.cpp computes for a file of architecture `bitnet`.
Tokenizer, corpus, batches and the 5,827 steps of 196,608 tokens are those of the bundled model (`pretrain.py`), so all
perplexities can be compared.

**Schedules.** `linear` is the bundled model's. `two-stage` follows the paper on training: a ternary weight moves only
when the float behind it crosses a threshold, so the learning rate is several times as high as for a float model; in the
second half it is a third lower, so that the weights settle, and their decay ends, which pulled each of them towards the
threshold. Both halves fall on straight lines towards zero at the last step. What each brought here, as perplexity on
the held-out modules (`bench/results/bitnet_training.json`):

    peak              3e-3      6e-3      1e-2      2e-2
    b158, linear      8.88      8.68
    b158, two-stage             8.75      8.67      8.66            bf16, linear, 3e-3:  7.34
    b1, two-stage               9.98      9.87

So the high rate is what matters, and two stages brought nothing: at 6e-3 they are behind here, and level on the
evaluation text of the package. Each figure is one run. The plain model was run once, at the bundled model's rate, and
nothing was tried to improve it.

**What is written**: `NAME.safetensors`, the weights in bfloat16, and for b158 and b1 beside each matrix its packed
trits or signs and the float32 scale. These cannot be made from the bfloat16: the floats gather at the thresholds, where
they are pushed to and fro, and of the run that ships, rounding them would flip 2.7 % of all trits. `NAME.json`, the
record of the run. `load` reads them.

Source: The Era of 1-bit LLMs: Training Tips, Code and FAQ (microsoft/unilm, 2024), section 2 and table 2: learning rate
1.5e-3, then 1e-3; weight decay 0.1, then 0; 375 steps of warm-up; betas 0.9 and 0.95.
"""

import argparse
import functools
import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BitNetConfig, BitNetForCausalLM

from qlearn.evaluate.provenance import provenance
from qlearn.formats.codebooks import SIGN
from qlearn.formats.integers import TRIT
from qlearn.models.bitlinear import PackedBitLinear
from qlearn.models.layers import SKIP, linear_layers, replace_layers
from qlearn.models.plugin import mark_quantized
from qlearn.tensor import QuantizedTensor
from qlearn.training.bitlinear import BitLinear, to_bitlinear
from qlearn.training.pretrain import (
    CONTEXT,
    PEAK_LR,
    TOKENS_PER_STEP,
    VOCABULARY,
    WEIGHT_DECAY,
    held_out_loss,
    linear,
    train,
)
from qlearn.training.tokens import load_tokens

KINDS = ("bf16", "b158", "b1")
STEPS, BATCH = 5827, TOKENS_PER_STEP // CONTEXT  # those of the bundled model
USUAL = {"bf16": ("linear", PEAK_LR), "b158": ("two-stage", 2e-2), "b1": ("two-stage", 1e-2)}  # schedule, peak
SECOND_STAGE, WARMUP_STEPS = 2 / 3, 375


def make_model(kind="b158", **sizes):
    """The architecture, freshly initialized.

    kind: "bf16", "b158" or "b1".  sizes: changes to transformers' BitNetConfig, for a smaller or a larger model.
    Raises ValueError for another kind.
    """
    check_kind(kind)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    model = BitNetForCausalLM(BitNetConfig(**(settings | sizes)))
    return model if kind == "bf16" else to_bitlinear(model, kind)


def check_kind(kind):
    """Raise ValueError unless there is such a model."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose from {', '.join(KINDS)}")


def two_stage(step, steps, peak):
    """Linear warm-up; then on a line to zero, from halfway on a lower one, without weight decay.

    Returns (learning rate, weight decay) of a step.

    >>> [two_stage(step, 6000, peak=6.0) for step in (1500, 2999, 3000, 6000)]
    [(4.5, 0.1), (3.001, 0.1), (2.0, 0.0), (0.0, 0.0)]
    """
    second = step >= steps / 2
    rate = peak * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
    return rate * (SECOND_STAGE if second else 1.0), 0.0 if second else WEIGHT_DECAY


SCHEDULES = {"linear": linear, "two-stage": two_stage}


def stored_tensors(model):
    """What a checkpoint holds, by name: see the top of this file. The head is the embedding, and is not repeated."""
    tensors = {n: p.detach().to(torch.bfloat16).cpu().contiguous() for n, p in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            V, beta = layer.rounded()
            format = TRIT if layer.kind == "b158" else SIGN
            tensors |= {f"{name}.packed": format.pack(format.encode(V.cpu())), f"{name}.scale": beta.cpu().reshape(1)}
    return tensors


@torch.no_grad()
def round_floats(model):
    """Round in place to bfloat16 what a checkpoint keeps in it: all parameters, but for the floats behind BitLinear."""
    behind = {layer.weight for layer in model.modules() if isinstance(layer, BitLinear)}
    for parameter in model.parameters():
        if parameter not in behind:
            parameter.copy_(parameter.bfloat16())
    return model


def checkpoint(kind):
    """The file of a BitNet that ships with the package. kind: "b158". Raises ValueError for another."""
    if kind != "b158":
        raise ValueError(f"there is no trained checkpoint of kind {kind!r}; choose b158")
    return Path(__file__).parent / "checkpoints" / f"bitnet_{kind}.gguf"


def load(path, packed=True, **sizes):
    """The model of a file that `run` has written.

    path: of the .safetensors file.  packed: for b158 and b1, layers that compute with the stored trits or signs
    (`models.bitlinear`); False for BitLinear with the floats behind them, of which bfloat16 is left.
    sizes: as for `make_model`.
    Returns the model, float32, in eval mode, without gradients.
    Raises FileNotFoundError, and ValueError for a file that is incomplete or was written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("kind")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error
    if kind not in KINDS:
        raise ValueError(f"{path} is no file of this training; it has no kind in its header")
    stored = {n: tensors.pop(n) for n in list(tensors) if n.endswith((".packed", ".scale"))}
    packed = packed and kind != "bf16"
    model = make_model("bf16" if packed else kind, **sizes)
    for name, parameter in model.named_parameters():
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        if found != tuple(parameter.shape):
            raise ValueError(
                f"{path} has {found} for {name}, not {tuple(parameter.shape)}; pass the sizes of the model"
            )
        parameter.data.copy_(tensors[name])
    if packed:
        _use_stored(model, kind, stored)
    return model.eval().requires_grad_(False)


def _use_stored(model, kind, stored):
    """Put packed layers with the stored codes in the place of the linear ones."""
    format = TRIT if kind == "b158" else SIGN
    packed = {}
    for name, layer in linear_layers(model).items():
        shape = tuple(layer.weight.shape)
        codes, scale = stored[f"{name}.packed"], stored[f"{name}.scale"].view(1, 1)
        packed[layer] = PackedBitLinear(QuantizedTensor(codes, scale, format, shape, block=shape))
    replace_layers(model, packed)
    mark_quantized(model, "ternary" if kind == "b158" else "binary", format.bits, None, SKIP)


def run(
    kind, tokens, out, *, name=None, schedule=None, lr=None, steps=STEPS, seconds=None, batch=BATCH, device="cuda",
    compile=True, **sizes,
):  # fmt: skip
    """Train one model and write its two files.

    kind: "bf16", "b158" or "b1".  tokens: a file made by `tokens.prepare`.  out: the folder to write.
    name: of the files; the kind unless given.
    schedule: "linear" or "two-stage".  lr: its peak.  Those in `USUAL` unless given.
    steps, seconds: so many steps, or fewer if all of it would take longer.  batch: windows of 1,024 tokens in a step.
    sizes: as for `make_model`.
    Returns the record.  Raises ValueError for an unknown kind or schedule, and when the training diverges.
    """
    begun = time.time()
    check_kind(kind)
    name, schedule, lr = name or kind, schedule or USUAL[kind][0], lr or USUAL[kind][1]
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = make_model(kind, **sizes).to(device)
    stream, held_out, about = load_tokens(tokens, device)
    print(f"{name}: {schedule}, peak {lr}, {about['tokens']} tokens, {time.time() - begun:.0f} s", flush=True)
    done = train(
        model, stream, held_out, None, steps, schedule=functools.partial(SCHEDULES[schedule], peak=lr), batch=batch,
        deadline=begun + seconds if seconds else None, compile=compile,
    )  # fmt: skip
    as_trained = held_out_loss(model, held_out)
    loss = held_out_loss(round_floats(model), held_out)
    command = f"python -m qlearn.training.bitnet --kind {kind} --steps {done['steps']} --lr {lr} --schedule {schedule}"
    record = {
        **provenance(f"{command} --tokens tokens.npz --name {name}"),
        "kind": kind,
        "learning_rate": lr,
        "schedule": schedule,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": about,
        "tokens_per_step": batch * CONTEXT,
        "tokens_seen": done["steps"] * batch * CONTEXT,
        "held_out": {
            "loss_before_bfloat16": as_trained,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss * about["held_out_tokens"] / about["held_out_bytes"] / math.log(2),
        },
        "steps_asked": steps,
        **done,
        "wall_seconds": round(time.time() - begun, 1),
    }
    write(model, record, out, name)
    print(name, record["held_out"], f"{record['wall_seconds']} s", flush=True)
    return record


def write(model, record, folder, name):
    """The weights and the record; each is there whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored_tensors(model), folder / f"{name}.part", metadata={"format": "pt", "kind": record["kind"]})
    os.replace(folder / f"{name}.part", folder / f"{name}.safetensors")
    (folder / f"{name}.part").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(folder / f"{name}.part", folder / f"{name}.json")


def main(argv=None):
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Train a BitNet, or its plain counterpart, from nothing.")
    parser.add_argument("--tokens", required=True, help="the file that `python -m qlearn.training.tokens` has made")
    parser.add_argument("--kind", choices=KINDS, default="b158")
    parser.add_argument("--schedule", choices=SCHEDULES, help="linear for bf16, else two-stage")
    parser.add_argument("--lr", type=float, help="peak learning rate; 3e-3, 2e-2, 1e-2 for bf16, b158, b1")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, help="all that there is; fewer steps are planned if they do not fit")
    parser.add_argument("--out", default="bitnet", help="folder to write")
    parser.add_argument("--batch", type=int, default=BATCH, help="windows of 1,024 tokens in a step")
    parser.add_argument("--name", help="name of the files; the kind unless given")
    options = parser.parse_args(argv)
    if not Path(options.tokens).is_file():
        parser.error(f"there is no file {options.tokens}; python -m qlearn.training.tokens {options.tokens} makes it")
    if not torch.cuda.is_available():
        parser.error("training needs a CUDA GPU; the finished model ships with the package")
    run(**{name: value for name, value in vars(options).items() if value is not None})


if __name__ == "__main__":
    main()
