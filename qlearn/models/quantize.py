"""Quantizing a whole model: every nn.Linear in it, wherever it is.

Nothing here knows an architecture. The model is walked, each nn.Linear is quantized and replaced by a QuantLinear,
except

* layers the caller names in `skip`; `lm_head` unless told otherwise, as is usual, for it picks the words, and
* a layer tied to the input embedding: that table must be kept anyway, so the matrix would be stored twice.

Almost all weights of a language model are in its linear layers, and embeddings and norms are left as they are on
purpose. But some models keep large weights elsewhere, such as the experts of a mixture in one three-dimensional
tensor. Those cannot be quantized here, and to leave them out silently would make a nonsense of any bits-per-weight
figure: a warning names them.

All layers are quantized before the first one is replaced, so that a failure leaves the model as it was.
"""

import re
import warnings
from fnmatch import fnmatchcase

from torch import nn
from tqdm.auto import tqdm

from qlearn.methods import METHODS, quantize
from qlearn.models.linear import QuantLinear

SKIP = ("lm_head",)


def quantize_model(model, method="absmax", bits=4, group_size=64, skip=SKIP, progress=True, **options):
    """Quantize the linear layers of a model, in place.

    method, bits, group_size, options: as for `qlearn.quantize`.  progress: show a bar.
    skip: layers to leave out: full names, their last parts ("down_proj"), or patterns ("model.layers.0.*").
    Returns the model.
    Raises ValueError for an unknown method, a layer the method cannot take (its name and size are said), a name in
    `skip` that fits nothing, and a model without any linear layer to quantize; the model is unchanged then.
    Warns about matrices that are not nn.Linear and not named in `skip`.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> quantize_model(model, "absmax", bits=4, group_size=64, progress=False).model.layers[0].mlp.down_proj
    QuantLinear(768, 256, bias=False, int4, 4.25 bits)
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose from {', '.join(sorted(METHODS))}")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    _check_skip(model, skip)
    layers = linear_layers(model, skip)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize with skip={skip}; quantize_model handles nn.Linear"
        )
    _warn_of_others(model, skip)
    replacements = {}
    for name, layer in tqdm(layers.items(), desc=f"{method}, {bits} bits", unit=" layers", disable=not progress):
        try:
            quantized = quantize(layer.weight, method, bits=bits, group_size=group_size, **options)
        except ValueError as error:
            rows, columns = layer.weight.shape
            raise ValueError(f"layer {name} ({rows} x {columns}): {error}") from error
        replacements[layer] = QuantLinear(quantized, layer.bias)
    _replace(model, replacements)
    return model


def linear_layers(model, skip=SKIP):
    """The layers that `quantize_model` would quantize: dict name -> nn.Linear, in the model's order."""
    embedding = _input_embedding(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear) and module.weight is not embedding and not matches(name, skip)
    }


def matches(name, patterns):
    """Whether a dotted name is one of the patterns, ends with one, or fits one with wildcards.

    >>> name = "model.layers.3.mlp.down_proj"
    >>> matches(name, ["down_proj"]), matches(name, ["model.layers.*.mlp.*"]), matches(name, ["proj"])
    (True, True, False)
    """
    return any(name == p or name.endswith("." + p) or fnmatchcase(name, p) for p in patterns)


def _input_embedding(model):
    """The weight of the input embedding; None for a model that has none."""
    get = getattr(model, "get_input_embeddings", None)
    return getattr(get(), "weight", None) if get is not None else None


def _check_skip(model, skip):
    """A name in `skip` that fits nothing is a mistake, but for the default, which models without a head do not have."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for pattern in skip:
        if pattern not in SKIP and not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"skip={pattern!r} fits no layer of {type(model).__name__}; print(model) shows the names")


def _warn_of_others(model, skip):
    """Say which matrices stay as they are because they are neither in an nn.Linear nor in an embedding."""
    known = {
        parameter
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding, QuantLinear))
        for parameter in module.parameters(recurse=False)
    }
    left = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and p not in known and not matches(n, skip)}
    if not left:
        return
    share = sum(p.numel() for p in left.values()) / sum(p.numel() for p in model.parameters())
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in left})
    warnings.warn(
        f"{len(left)} matrices with {share:.1%} of the parameters are not in an nn.Linear and stay unquantized: "
        f"{', '.join(kinds)}; name them in skip= to say that this is intended",
        stacklevel=3,
    )


def _replace(model, replacements):
    """Put each replacement wherever its layer is: a layer may be known under several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])
