"""Outliers: the few channels of a layer's inputs that are much larger than all others, and how to make one.

A token's hidden state is a list of numbers, and one would expect them to be alike in size. In large language models a
few of them, always the same channels whatever the token, are twenty to a hundred times as large as the rest
(LLM.int8(), arXiv 2208.07339). For a weight that is stored in few bits they are no trouble. For an input that is
quantized as a whole they are: the grid has to reach the largest value, and if that is a hundred times the ordinary
one, then the ordinary values of an 8-bit grid share a level or two.

To see them, `outliers` notes the largest magnitude of each channel, max|X[j]|, and compares the largest of them with
the median.

**Making one.** Small models have milder outliers, so a lesson needs a way to make a large one in a model that otherwise
stays what it is. Between two operations a factor can be hidden: if one multiplies its channel j by f, and all layers
that read it divide their column j by f, the model computes the same as before.

    norm weight[j] · f     columns j of q, k, v ÷ f          or   row j of up · f     column j of down ÷ f

If f is a power of two then not a bit of the outputs changes, as only exponents do. But between the two there is now a
channel f times as large, which is just what quantizing activations trips over. It is what SmoothQuant does, done
backwards, and with the same function: `folding.fold`.
"""

from dataclasses import dataclass

import torch

from qlearn.models.calibration import resolve_ids, walk
from qlearn.models.folding import fold
from qlearn.models.layers import linear_layers

TRIAL_SHAPE = (2, 16)  # windows and tokens that show in which order a block runs its layers


@dataclass(frozen=True, eq=False)
class ChannelMaxima:
    """The largest magnitude of each channel that a layer reads.

    maxima: float32 (in_features,), max|X[j]| over the calibration text.
    """

    maxima: torch.Tensor

    @property
    def largest(self):
        """The largest magnitude of all."""
        return self.maxima.max().item()

    @property
    def channel(self):
        """The channel it is in."""
        return int(self.maxima.argmax())

    @property
    def ratio(self):
        """The largest magnitude, as a multiple of the median channel's; infinite where that is 0."""
        return self.largest / self.maxima.median().item() if self.maxima.median() else float("inf")

    def __repr__(self):
        return f"channel {self.channel} of {len(self.maxima)} reaches {self.largest:.3g}, {self.ratio:.1f} x the median"


def outliers(model, calibration=None, tokenizer=None, progress=True):
    """What each linear layer in the blocks of a model reads, channel by channel.

    calibration, tokenizer: as for `quantize_model`.  progress: show a bar.
    Returns dict name of a layer -> ChannelMaxima, in the order in which the model runs them; layers that were given
    nothing are left out.  Raises ValueError for calibration that does not fit the model.

    >>> import qlearn
    >>> from qlearn.models.calibration import calibration_ids
    >>> model, tokenizer = qlearn.load_model()
    >>> found = outliers(model, calibration_ids(tokenizer, tokens=256, window=128), progress=False)
    >>> len(found), len(found["model.layers.3.mlp.down_proj"].maxima)
    (56, 768)
    """
    found = {}
    for block, group, maxima in channel_maxima(model, resolve_ids(model, calibration, tokenizer), progress):
        found |= {f"{block.name}.{name}": ChannelMaxima(maxima.cpu()) for name in group}
    return found


def channel_maxima(model, ids, progress=True):
    """Go through the blocks of a model, group by group of layers that read the same tensor.

    ids: int64 (windows, window).
    Yields the `calibration.Block`, the names within it of the layers of a group, and float32 (in_features,), the
    largest magnitude of each channel that they read; a group that was given nothing is left out.
    """
    layers = linear_layers(model, skip=())
    for block in walk(model, ids, progress=progress):
        inside = _inside(block, layers)
        groups = block.groups(inside)
        statistics = block.collect({group[0]: inside[group[0]] for group in groups}, hessian=False, sample=0)
        for group in groups:
            if statistics[group[0]].count:
                yield block, group, statistics[group[0]].abs_max


def add_outlier(model, layer, channel, factor=64.0):
    """Make one channel that a layer reads `factor` times as large, in place, with what the model computes unchanged.

    layer: full name of a linear layer in one of the model's blocks; the layers that read the same tensor change too.
    channel: 0 ... in_features - 1.  factor: positive; a power of two leaves every bit of the outputs as it was.
    Returns the names of the layers whose columns were divided.
    Raises ValueError for an unknown layer, a channel or factor out of range, and a layer with nothing in front of it
    that could multiply the channel; the model is unchanged then.

    >>> import qlearn
    >>> model, _ = qlearn.load_model()
    >>> add_outlier(model, "model.layers.0.mlp.up_proj", channel=7)
    ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    layers = linear_layers(model, skip=())
    if layer not in layers:
        raise ValueError(f"there is no linear layer {layer!r}; take a full name, such as {next(iter(layers), None)}")
    width = layers[layer].in_features
    if channel not in range(width):
        raise ValueError(f"channel={channel} is out of range; {layer} reads channels 0 to {width - 1}")
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor={factor} is no factor; choose a positive number, such as 64")
    block, group = _group_of(model, layers, layer)
    scale = torch.ones(width)
    scale[channel] = 1 / factor
    if not fold(block, group, scale):
        raise ValueError(f"nothing in front of {layer} could multiply a channel; choose a layer behind a norm")
    return [f"{block.name}.{name}" for name in group]


def _group_of(model, layers, layer):
    """The block that a layer is in, and the names within it of all layers that read the same tensor."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, TRIAL_SHAPE, generator=torch.Generator().manual_seed(0))
    for block in walk(model, ids):
        if layer.startswith(f"{block.name}."):
            inside = _inside(block, layers)
            return block, next(g for g in block.groups(inside) if layer.removeprefix(f"{block.name}.") in g)
    raise ValueError(f"{layer} is in none of the model's blocks; choose a layer in one")


def _inside(block, layers):
    """The layers of a block, by their names within it."""
    prefix = f"{block.name}."
    return {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
