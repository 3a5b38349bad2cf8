"""Adapters as files, in the format of the package peft, so that it reads ours and we read its.

A folder holds two files:

    adapter_config.json            r, lora_alpha, lora_dropout, which layers (target_modules), and what else was on
    adapter_model.safetensors      base_model.model.<name of the layer>.lora_A.weight      (r, in)
                                   base_model.model.<name of the layer>.lora_B.weight      (out, r)

The base model is not in there. An adapter is a change to one certain set of weights: what was trained on quantized
weights makes up for their rounding errors as well, and belongs on these weights again (`merging.py` measures what it
costs to put it elsewhere). So the quantized base is saved beside it, before the adapters are added:

    quantize_model(model, "zero_point", bits=4).save_pretrained("base")
    add_lora(model, ...);  train;  save_adapters(model, "adapter", base="base")

    model, tokenizer = load_model("base")
    load_adapters(model, "adapter")

peft knows nothing of our quantized layers; it loads the adapter on a float model. In some mixtures of experts it takes
`down_proj` and the like, wherever they are, for names of experts; there it reads the adapters of the attention only.

Source: peft 0.21, `utils/save_and_load.py` and `tuners/lora/config.py`.
"""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlearn.models.layers import matches, replace_layers
from qlearn.training.lora import LoraLinear, adaptable_layers, check_rank, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the sums that a layer computes, and the values that mean it is off.
_OFF = (None, False, {}, [], "none")
_UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip


def save_adapters(model, folder, base=None):
    """Write the adapters of a model into a folder that is made if need be, each file whole or not at all.

    base: the id or folder of the model that they belong on, for the config; None takes what the model itself says.
    Raises ValueError for a model without adapters, and for adapters of unequal r, alpha or dropout.

    >>> import tempfile
    >>> from qlearn import load_model
    >>> from qlearn.training.lora import add_lora
    >>> model, tokenizer = load_model()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapters(add_lora(model, r=4), folder)
    ...     sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters to save; add_lora gives it some")
    settings = {(layer.r, layer.alpha, getattr(layer.dropout, "p", 0.0)) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(
            f"the adapters differ in (r, alpha, dropout): {sorted(settings)}; save models with one setting"
        )
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.B.detach().cpu().contiguous()
    config = _config(model, layers, *settings.pop(), base)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n"))


def load_adapters(model, folder):
    """Put the adapters of a folder, written by `save_adapters` or by peft, on a model, in place.

    model: of the architecture and the weights that they were trained on, without adapters.
    Returns the model, frozen but for the adapters.
    Raises FileNotFoundError when a file is missing, and ValueError when one is incomplete, when the adapters are of
    a kind that is more than W x + scale B A x, or do not fit the model; the model is unchanged then.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    r, alpha, dropout = (config.get(name, 0.0) for name in ("r", "lora_alpha", "lora_dropout"))
    check_rank(r, alpha, dropout)
    alpha *= math.sqrt(r) if config.get("use_rslora") else 1  # rank-stabilized: the scale is alpha / sqrt(r)
    names = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors})
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others or not tensors:
        raise ValueError(
            f"{folder / WEIGHTS} has {others or 'no tensors'}, not only lora_A and lora_B; load it with peft"
        )
    layers = adaptable_layers(model, skip=())
    adapters = {}
    for name in names:
        if name not in layers:
            raise ValueError(f"{folder} has an adapter for {name}, which is no linear layer of {type(model).__name__}")
        adapters[layers[name]] = _filled(LoraLinear(layers[name], r, alpha, dropout), name, tensors, folder)
    for adapter in adapters.values():
        adapter.train(model.training)
    model.requires_grad_(False)
    replace_layers(model, adapters)
    return model


def _filled(layer, name, tensors, folder):
    """An adapter with the values of a file."""
    for own in ("A", "B"):
        key, parameter = f"{PREFIX}{name}.lora_{own}.weight", getattr(layer, own)
        shape = tuple(tensors[key].shape) if key in tensors else "nothing"
        if shape != tuple(parameter.shape):
            raise ValueError(f"{folder} has {shape} for {key}, not {tuple(parameter.shape)}; it is for another model")
        parameter.data.copy_(tensors[key])
    return layer


def _config(model, layers, r, alpha, dropout, base):
    """What peft needs to know. What is not said is off in peft."""
    of_model = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": str(base or of_model or "") or None,
        "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": target_modules(model, layers),
    }  # fmt: skip


def target_modules(model, layers):
    """The shortest way to name these layers: last parts of their names if those fit no other layer, else full names.

    >>> from torch import nn
    >>> block = lambda: nn.ModuleDict({"up": nn.Linear(1, 1)})
    >>> model = nn.ModuleDict({"a": block(), "b": block()})
    >>> target_modules(model, ["a.up", "b.up"]), target_modules(model, ["a.up"])
    (['up'], ['a.up'])
    """
    short = sorted({name.rpartition(".")[2] for name in layers})
    inside = tuple(f"{name}." for name in layers)  # the parts of an adapted layer are not layers of the model
    every = {n for n, _ in model.named_modules() if matches(n, short) and not n.startswith(inside)}
    return short if every == set(layers) else sorted(layers)


def _write(path, write):
    unfinished = path.with_name(path.name + ".part")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(folder):
    """(config, tensors) of a folder."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {str(folder)!r}; give the folder that an adapter is in")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"a file of the adapter in {str(folder)!r} is incomplete ({error}); copy it again") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"the adapter in {str(folder)!r} is of type {config.get('peft_type')!r}; only LORA can be read"
        )
    beyond = [name for name in _UNSUPPORTED if config.get(name) not in _OFF]
    if beyond:
        raise ValueError(f"the adapter in {str(folder)!r} uses {', '.join(beyond)}; load it with peft, and merge it")
    return config, {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
