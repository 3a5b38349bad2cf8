"""AWQ in a whole model: one block's scales, found by what they do to the block and folded where that is exact.

`qlearn/methods/awq.py` says what the scales are and how one matrix is searched. In a model two things are different.

**Layers that read the same tensor share a scale**, since it is that tensor which is divided: q, k and v; gate and up.
So they are searched together, and the error is measured where their outputs have come together again: at the output of
the smallest module that contains all of them, the attention or the MLP. A layer that reads a tensor alone is judged by
its own output. The module is run again for each candidate, over a few windows of the calibration text.

**Most of the 1/s cost nothing**, because a norm or a linear layer in front can divide (`folding.py`). Then the weight
is multiplied by s once and for all, and quantized as it is. Where nothing can divide, s is handed on, to be stored with
the matrix.

As in the authors' code, all groups of a block are searched while its weights are still unrounded; then the scales are
folded; then the groups of weights are clipped and rounded, which is not done here.
"""

from itertools import takewhile

import torch
from torch import nn
from torch.func import functional_call

from qlearn.methods.awq import search_scale
from qlearn.models.excerpt import excerpt
from qlearn.models.folding import fold
from qlearn.models.recording import call, hidden_states, hooks

TOKENS = 2048  # what candidates are compared on; with twice as many the bundled model became no better


def scale_block(block, groups, bits=4, group_size=None, *, scale=None, clip=True, tokens=TOKENS, **options):
    """Search the scales of one block's layers, and fold those that can be folded.

    block: a `calibration.Block` whose layers at hand are still nn.Linear.
    groups: lists of names of layers that read the same tensor, as from `block.groups`.
    bits, group_size, options: as for `methods.awq`, to which they will be passed too; clip is of no influence here, and
    a scale other than None becomes the answer for every layer, without a search.
    tokens: about how many tokens of the calibration text the candidates are compared on.
    Returns dict name -> what to give `methods.awq` as its `scale`, along with inputs that are collected anew: a tensor
    (in_features,) that is to be stored with the matrix; or the number 1, nothing to search and nothing to store, for a
    layer whose weight is multiplied by its scale now and the operation in front divided, and for one that is best left
    unscaled.
    Raises ValueError as `methods.awq` does.

    >>> import qlearn
    >>> from qlearn.models.calibration import calibration_ids, walk
    >>> model, tokenizer = qlearn.load_model()
    >>> block = next(walk(model, calibration_ids(tokenizer, tokens=64, window=32)))
    >>> scales = scale_block(block, [["mlp.down_proj"], ["self_attn.o_proj"]], bits=3, group_size=64, n_grid=4)
    >>> scales["mlp.down_proj"], scales["self_attn.o_proj"].shape
    (1, torch.Size([256]))
    """
    if scale is not None:
        return {name: scale for group in groups for name in group}
    found, answers = _searches(block, groups, tokens, bits, group_size, options), {}
    for group in groups:
        search = found.get(group[0])
        done = search is None or search.ratio == 0 or fold(block, group, search.scale)
        answers |= dict.fromkeys(group, 1 if done else search.scale)
    return answers


def _searches(block, groups, tokens, bits, group_size, options):
    """The search of each group that is given any input: dict name of its first layer -> ScaleSearch."""
    inputs = block.collect({g[0]: block.module.get_submodule(g[0]) for g in groups}, hessian=False, sample=0)
    groups = [group for group in groups if inputs[group[0]].count]
    around = [_module_around(block.module, group) for group in groups]
    runs, found = _runs(block, set(around), tokens), {}
    for path, group in zip(around, groups, strict=True):
        weights = [block.module.get_submodule(name).weight for name in group]
        loss = _loss(block.module, path, group, runs[path])
        found[group[0]] = search_scale(weights, bits, group_size, inputs=inputs[group[0]], loss=loss, **options)
    return found


def _module_around(module, names):
    """The path of the smallest module that contains all of the named layers and is called as a whole.

    >>> _module_around(nn.ModuleDict({"a": nn.Linear(1, 1)}), ["a"])
    'a'
    """
    if len(names) == 1:
        return names[0]
    parents = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, parents)]
    while isinstance(module.get_submodule(".".join(path)), nn.ModuleList | nn.ModuleDict):
        path.pop()
    return ".".join(path)


def _runs(block, paths, tokens):
    """What some modules are called with, and what they return: dict path -> list of (args, kwargs, output)."""
    runs = {path: [] for path in paths}

    def hook_for(path):
        return lambda module, args, kwargs, output: runs[path].append((args, kwargs, hidden_states(output)))

    modules = {path: block.module.get_submodule(path) for path in paths}
    with hooks([m.register_forward_hook(hook_for(path), with_kwargs=True) for path, m in modules.items()]):
        for arguments in excerpt(block.calls, tokens):
            call(block.module, arguments)
    return runs


def _loss(block, path, names, runs):
    """How far the outputs of a module are off when its named layers have other weights: a function of these weights."""
    module, keys = block.get_submodule(path), [f"{name}.weight".removeprefix(f"{path}.") for name in names]
    dtypes = [block.get_submodule(name).weight.dtype for name in names]

    @torch.no_grad()
    def loss(weights):
        replaced = {key: weight.to(dtype) for key, weight, dtype in zip(keys, weights, dtypes, strict=True)}
        error = 0.0
        for args, kwargs, output in runs:
            changed = hidden_states(functional_call(module, replaced, args, kwargs))
            error += (changed - output).float().square().sum().item()
        return error

    return loss
