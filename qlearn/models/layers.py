"""Which matrices of a model are quantized.

Nothing here knows an architecture. The model is walked, and every nn.Linear is taken, and every parameter that holds
the experts of a mixture (`experts.py`), except

* a class derived from nn.Linear with a forward function of its own, which computes something else,
* what the caller names in `skip`; `lm_head` unless told otherwise, as is usual, for it picks the words, and
* a layer tied to the input embedding: that table must be kept anyway, so the matrix would be stored twice.

Almost all weights of a language model are there, and embeddings and norms are left as they are on purpose. But some
models keep large weights elsewhere. To leave them out silently would make a nonsense of any bits-per-weight figure: a
warning names them when they are more than a hundredth of all parameters. The routers of a mixture are less than that,
and are meant to stay as they are.
"""

import re
import warnings
from fnmatch import fnmatchcase

from torch import nn

from qlearn.models.experts import expert_parameters
from qlearn.models.linear import QuantLinear

SKIP = ("lm_head",)
WORTH_A_WARNING = 0.01  # share of the parameters


def linear_layers(model, skip=SKIP):
    """The layers that `quantize_model` would quantize: dict name -> nn.Linear, in the model's order."""
    embedding = _input_embedding(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and _is_linear(module) and module.weight is not embedding and not matches(name, skip)
    }


def expert_stacks(model, skip=SKIP):
    """The experts that `quantize_model` would quantize: dict name of a parameter -> (its module, its name there)."""
    return {name: place for name, place in expert_parameters(model).items() if not matches(name, skip)}


def replace_layers(model, replacements):
    """Put each replacement wherever its layer is: a layer may be known under several names.

    replacements: dict module -> module.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])


def turn_linear_layers(model, cls, skip=SKIP, **options):
    """Turn the linear layers of a model into a class derived from nn.Linear, in place; they keep their parameters.

    cls: takes (in_features, out_features, bias, device=..., **options).  skip: layers to leave out.
    Returns the new layers, a list.  Raises ValueError for a model without linear layers.

    >>> class Loud(nn.Linear):
    ...     def forward(self, x):
    ...         return 10 * super().forward(x)
    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> weight = model[0].weight
    >>> turn_linear_layers(model, Loud)
    [Loud(in_features=2, out_features=1, bias=True)]
    >>> model[0].weight is weight
    True
    """
    layers = linear_layers(model, skip)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to train with skip={skip}; skip fewer")
    replacements = {layer: _turned(layer, cls, options) for layer in layers.values()}
    replace_layers(model, replacements)
    return list(replacements.values())


def matches(name, patterns):
    """Whether a dotted name is one of the patterns, ends with one, or fits one with wildcards.

    >>> name = "model.layers.3.mlp.down_proj"
    >>> matches(name, ["down_proj"]), matches(name, ["model.layers.*.mlp.*"]), matches(name, ["proj"])
    (True, True, False)
    """
    return any(name == p or name.endswith("." + p) or fnmatchcase(name, p) for p in patterns)


def check_skip(model, skip):
    """The names to skip as a tuple.

    Raises ValueError for one that fits nothing, which is a mistake, but for the default: not all models have a head.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for pattern in skip:
        if pattern not in SKIP and not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"skip={pattern!r} fits no layer of {type(model).__name__}; print(model) shows the names")
    return skip


def warn_of_others(model, skip, stacklevel=2):
    """Say which matrices stay as they are because they are neither a linear layer, nor an embedding, nor experts."""
    known = {
        parameter
        for module in model.modules()
        if _is_linear(module) or isinstance(module, (nn.Embedding, QuantLinear))
        for parameter in module.parameters(recurse=False)
    }
    known |= {getattr(module, name) for module, name in expert_parameters(model).values()}
    left = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and p not in known and not matches(n, skip)}
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    share = sum(p.numel() for p in left.values()) / (sum(p.numel() for p in model.parameters()) + quantized)
    if share > WORTH_A_WARNING:
        warnings.warn(
            f"{len(left)} matrices with {share:.1%} of the parameters are neither linear layers nor experts and stay "
            f"unquantized: {', '.join(kinds(left))}; name them in skip= to say that this is intended",
            stacklevel=stacklevel + 1,
        )


def kinds(names):
    """Names with their numbers replaced by a star, each kind once.

    >>> kinds(["layers.0.up_proj", "layers.11.up_proj", "layers.0.experts.3.up_proj"])
    ['layers.*.experts.*.up_proj', 'layers.*.up_proj']
    """
    return sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names})


def _turned(layer, cls, options):
    """A layer of another class with the parameters of a linear layer."""
    new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta", **options)
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def _is_linear(module):
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _input_embedding(model):
    """The weight of the input embedding; None for a model that has none."""
    get = getattr(model, "get_input_embeddings", None)
    return getattr(get(), "weight", None) if get is not None else None
