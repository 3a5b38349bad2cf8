"""Quantizing a whole model, in place: layer by layer, and with calibration block by block.

`layers.py` says which matrices are quantized. Each nn.Linear gives way to a QuantLinear as soon as its codes are known,
and its float matrix is freed before the next one is begun. So the peak of the memory is the model, and what is
needed to work on one layer.

**Methods that learn from inputs**, GPTQ and AWQ, go along with the calibration text (`calibration.py`) from the first
block of the model to the last. Within a block they proceed by groups of layers that read the same tensor, in the order
in which the block runs them: in a Llama the projections to q, k, v; then the output projection; gate and up; down. The
inputs of a group are collected anew when its turn comes, so that each layer is calibrated on what it will be given,
with all that lies before it already quantized. This is known as true sequential quantization. Layers outside of the
blocks, such as a head that was not skipped, come last, with the whole model quantized.

**What cannot be calibrated** gets the grid of the method without its calibration, `absmax` or `zero_point` with
clip="mse": experts that no token was sent to, and layers that text does not reach, such as those for images. A warning
counts them.

**Failures.** All that can be checked is checked for every layer before the first one is replaced, so that a wrong
argument or a broken weight leaves the model as it was. Should something fail later (the memory ends, a matrix cannot be
factorized), the error names the layer, and the model has to be loaded again.
"""

import warnings
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from qlearn import methods
from qlearn.methods.blocking import block_shape, check_weight
from qlearn.models.calibration import blocks, resolve_ids, walk, whole
from qlearn.models.expert_inputs import collect_expert_inputs
from qlearn.models.experts import expert_matrices, replace_experts
from qlearn.models.layers import (
    SKIP,
    check_skip,
    expert_stacks,
    kinds,
    linear_layers,
    replace_layers,
    warn_of_others,
)
from qlearn.models.linear import QuantLinear
from qlearn.models.plugin import mark_quantized

__all__ = ["SKIP", "linear_layers", "quantize_model"]

TRIAL_WIDTH = 16  # columns of the small matrix that shows whether a calibrated method takes its arguments


def quantize_model(
    model,
    method="absmax",
    bits=4,
    group_size=64,
    skip=SKIP,
    progress=True,
    calibration=None,
    tokenizer=None,
    **options,
):
    """Quantize the linear layers and the experts of a model, in place.

    method, bits, group_size, options: as for `qlearn.quantize`.  progress: show a bar.
    skip: layers to leave out: full names, their last parts ("down_proj"), or patterns ("model.layers.0.*").
    calibration: for the methods in `methods.CALIBRATED`, which look at inputs; others ignore it. A str, a list of str,
    int64 token ids (windows, window), or None for the calibration text that ships with the package.
    tokenizer: what makes token ids of a text; None loads the one that lies with the model.
    Returns the model.
    Raises ValueError for an unknown method, a layer the method cannot take (its name and size are said), a name in
    `skip` that fits nothing, calibration that does not fit the model, and a model without anything to quantize; the
    model is unchanged then. An error that says so leaves the model partly quantized.
    Warns about large matrices that are neither linear layers nor experts and not named in `skip`, and about those that
    a method had to quantize without calibration.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> quantize_model(model, "absmax", bits=4, group_size=64, progress=False).model.layers[0].mlp.down_proj
    QuantLinear(768, 256, bias=False, int4, 4.25 bits)
    """
    recipe = _Recipe(method, bits, group_size, options)
    skip = check_skip(model, skip)
    layers, stacks = linear_layers(model, skip), expert_stacks(model, skip)
    if not layers and not stacks:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize with skip={skip}; quantize_model handles "
            "nn.Linear and three-dimensional parameters of experts"
        )
    recipe.check(layers, stacks)
    ids = resolve_ids(model, calibration, tokenizer) if recipe.calibrated else None
    warn_of_others(model, skip)
    with tqdm(total=len(layers) + len(stacks), desc=recipe.title, unit=" layers", disable=not progress) as bar:
        work = _Work(model, recipe, layers, stacks, bar)
        try:
            work.calibrated(ids) if recipe.calibrated else work.plain()
        except Exception as error:
            raise work.explained(error) from error
    if work.unseen:
        warnings.warn(work.remark(), stacklevel=2)
    mark_quantized(model, method, bits, group_size, skip, **options)
    return model


@dataclass(frozen=True)
class _Recipe:
    """A method and its arguments."""

    method: str
    bits: int
    group_size: int | None
    options: dict

    def __post_init__(self):
        if self.method not in methods.METHODS:
            raise ValueError(f"method {self.method!r} is unknown; choose from {', '.join(sorted(methods.METHODS))}")

    @property
    def calibrated(self):
        return self.method in methods.CALIBRATED

    @property
    def title(self):
        return f"{self.method}, {self.bits} bits"

    def __call__(self, weight, **inputs):
        """A matrix (out, in) as a QuantizedTensor."""
        arguments = {"bits": self.bits, "group_size": self.group_size, **self.options, **inputs}
        return methods.quantize(weight, self.method, **arguments)

    def without_calibration(self):
        """The recipe for the same grid, as it is without having seen any inputs."""
        kept = {name: value for name, value in self.options.items() if name == "scale_dtype"}
        method = "absmax" if self.options.get("sym") else "zero_point"
        return _Recipe(method, self.bits, self.group_size, {"clip": "mse", **kept})

    def check(self, layers, stacks):
        """Raise ValueError, naming the layer, unless the method can take each of the weights."""
        trials = set()
        for name, weight in _weights(layers, stacks):
            try:
                checked = check_weight(weight)
                self._try_calibrated(checked, trials) if self.calibrated else self._try(checked)
            except ValueError as error:
                rows, columns = weight.shape
                raise ValueError(f"layer {name} ({rows} x {columns}): {error}") from error

    def _try(self, weight):
        """Quantize the row with the largest weight; or all, where rows belong together (tiles; groups in columns)."""
        if self.options.get("tile_rows") or self.options.get("axis") == 0:
            self(weight)
            return
        row = int(weight.abs().argmax()) // weight.shape[1]
        self(weight[row : row + 1])

    def _try_calibrated(self, weight, done):
        """Quantize a small part, as wide as a group; once for each width, since the work grows with it."""
        _, width = block_shape(weight.shape, self.group_size)
        width = width if self.group_size else min(width, TRIAL_WIDTH)
        if width not in done:
            done.add(width)
            self(weight[:1, :width], inputs=torch.eye(width, device=weight.device))


@dataclass
class _Work:
    """Replaces one layer after the other, and lets go of those that are done.

    layers: dict name -> nn.Linear, what is still to be done.  stacks: dict name -> (module, name), likewise.
    """

    model: torch.nn.Module
    recipe: _Recipe
    layers: dict
    stacks: dict
    bar: tqdm
    at: str = "calibration"  # what is being worked on, for the case that it fails
    changed: bool = False
    unseen: list = field(default_factory=list)  # names of the matrices that no token reached

    def plain(self):
        """All layers, without looking at inputs."""
        for name in list(self.layers):
            self._layer(name)
        for name in list(self.stacks):
            self._experts(name)

    def calibrated(self, ids):
        """Block by block, then what lies outside of the blocks."""
        for block in walk(self.model, ids) if blocks(self.model) else ():
            self._block(block, f"{block.name}.")
        if self.layers or self.stacks:
            self._block(whole(self.model, ids))

    def _block(self, block, prefix=""):
        """The layers of a block, group by group, then its experts."""
        layers = {n.removeprefix(prefix): layer for n, layer in self.layers.items() if n.startswith(prefix)}
        self.at = f"block {block.name or 'of the whole model'}"
        groups = block.groups(layers)
        more = self._scales(block, groups) if self.recipe.method == "awq" and prefix else {}
        for stage in _stages(groups):
            self.at = f"the inputs of {prefix}{stage[0][0]}"
            found = block.collect({group[0]: layers[group[0]] for group in stage})
            for group in stage:
                inputs = found.pop(group[0])
                for name in group:
                    del layers[name]
                    self._layer(prefix + name, inputs, **more.get(name, {}))
        for name in [name for name in self.stacks if name.startswith(prefix)]:
            self._experts(name, block)

    def _scales(self, block, groups):
        """AWQ's scales for the columns of each layer, as options for `methods.awq`."""
        from qlearn.models.awq import scale_block

        self.changed = True
        scales = scale_block(block, groups, self.recipe.bits, self.recipe.group_size, **self.recipe.options)
        return {name: {"scale": scale} for name, scale in scales.items()}

    def _layer(self, name, inputs=None, **more):
        """Quantize a layer and put the result in its place."""
        layer = self.layers.pop(name)
        self.at = f"layer {name} ({layer.out_features} x {layer.in_features})"
        replace_layers(self.model, {layer: QuantLinear(self._codes(name, layer.weight, inputs, **more), layer.bias)})
        self._done()

    def _experts(self, name, block=None):
        """Quantize a parameter that holds experts, each matrix on its own, and put the result in its place."""
        module, own_name = self.stacks.pop(name)
        self.at = f"experts {name} {tuple(getattr(module, own_name).shape)}"
        inputs = _expert_inputs(module, own_name, block)
        layers = [
            QuantLinear(self._codes(f"{name}.{number}", matrix, next(inputs)))
            for number, matrix in enumerate(expert_matrices(module, own_name))
        ]
        replace_experts(module, own_name, layers)
        self._done()

    def _codes(self, name, weight, inputs, **more):
        """The QuantizedTensor of a matrix.  inputs: its InputStatistics; None for a method that needs none."""
        if inputs is None:
            return self.recipe(weight)
        if inputs.count:
            return self.recipe(weight, inputs=inputs, **more)
        self.unseen.append(name)
        return self.recipe.without_calibration()(weight)

    def _done(self):
        self.changed = True
        self.bar.update()

    def explained(self, error):
        """An error that says where it happened and what has become of the model."""
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        fate = "the model is partly quantized by now, so load it again" if self.changed else "the model is unchanged"
        return kind(f"{self.at}: {error}; {fate}")

    def remark(self):
        """What to say of the matrices that no token reached."""
        without = self.recipe.without_calibration().method
        return (
            f"{len(self.unseen)} matrices were given no token of the calibration text, so they were quantized with "
            f"{without}, clip='mse', instead of {self.recipe.method}: {', '.join(kinds(self.unseen))}; calibrate with "
            "more or other text"
        )


def _weights(layers, stacks):
    """All matrices that are to be quantized, with their names, one after another."""
    for name, layer in layers.items():
        yield name, layer.weight
    for name, place in stacks.items():
        yield from ((f"{name}.{number}", matrix) for number, matrix in enumerate(expert_matrices(*place)))


def _expert_inputs(module, name, block=None):
    """The InputStatistics of all experts of a parameter, one after another; None for each without a block.

    Statistics have a matrix of in x in for each expert. So many experts are collected at once as keep these matrices
    no larger than the parameter itself.
    """
    experts = len(getattr(module, name))
    if block is None:
        yield from [None] * experts
        return
    out, columns = next(expert_matrices(module, name)).shape
    at_once = max(1, experts * out // columns)
    for start in range(0, experts, at_once):
        numbers = range(start, min(start + at_once, experts))
        yield from collect_expert_inputs(block, module, name, columns, numbers).values()


def _stages(groups):
    """Lists of groups that are calibrated in one go: each group alone, but the same layers of all experts together.

    >>> _stages([["q", "k"], ["experts.0.up"], ["experts.0.down"], ["experts.1.up"], ["experts.1.down"]])
    [[['q', 'k']], [['experts.0.up'], ['experts.1.up']], [['experts.0.down'], ['experts.1.down']]]
    """
    stages = {}
    for group in groups:
        equal = kinds(group) if all("expert" in name for name in group) else group
        stages.setdefault(tuple(equal), []).append(group)
    return list(stages.values())
