"""W8A8 for a whole model: its linear layers become `Int8Linear` (`int8.py`), their input scales come from text.

Weights need no text: absmax, 8 bits, a scale for each row. What activations need depends on the kind.

    dynamic    nothing: each token brings its own scale when it comes.
    static     one scale for each layer. The float model runs over the calibration text while an observer
               (`methods/observers.py`) watches what each layer is given, and chooses the scale at the end. Layers
               that read the same tensor share an observer.

`smooth` moves outliers from the activations into the weights first (`smoothquant.py`), while all is still in floats.

Experts of a mixture stay in floating point: their inputs pass inside of one module, where no scale can be put. A
warning says so.

Source: LLM.int8() (arXiv 2208.07339) and SmoothQuant (arXiv 2211.10438).
"""

import warnings

from tqdm.auto import tqdm

from qlearn.evaluate.windows import LOGITS_AT_ONCE
from qlearn.methods.affine import absmax
from qlearn.methods.blocking import check_weight
from qlearn.methods.observers import make_observer
from qlearn.models import smoothquant
from qlearn.models.calibration import resolve_ids, whole
from qlearn.models.int8 import Int8Linear
from qlearn.models.layers import (
    SKIP,
    check_skip,
    expert_stacks,
    kinds,
    linear_layers,
    replace_layers,
    warn_of_others,
)
from qlearn.models.plugin import mark_quantized
from qlearn.models.recording import GLANCE, forward, watching

ACTIVATIONS = ("dynamic", "static")


def quantize_w8a8(
    model,
    activations="dynamic",
    observer="minmax",
    smooth=None,
    calibration=None,
    tokenizer=None,
    skip=SKIP,
    progress=True,
    **options,
):
    """Quantize the linear layers of a model to W8A8, in place.

    activations: "dynamic", or "static" with scales from an observer.
    observer: "minmax", "percentile", "mse" or "entropy"; options: its own.
    smooth: None, or the alpha of `smoothquant.smooth` (0.5 is usual), which is applied to the float model first.
    calibration, tokenizer: what static activations and smoothing learn from, as for `quantize_model`.
    skip: layers to leave out, as for `quantize_model`.  progress: show bars.
    Returns the model.
    Raises ValueError as `quantize_model` does, and for a layer that the calibration text never reached; no layer is
    replaced then, but the model may be smoothed already, which leaves what it computes as it was.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> quantize_w8a8(model, progress=False).model.layers[0].mlp.down_proj
    Int8Linear(768, 256, bias=False, int8, 8.02 bits, inputs int8 dynamic)
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    make_observer(observer, **options)  # a mistake in these is found before the calibration, not after it
    skip = check_skip(model, skip)
    layers, scales = linear_layers(model, skip), {}
    _check_weights(model, layers, skip)
    if activations == "static" or smooth is not None:
        ids = resolve_ids(model, calibration, tokenizer)
    if smooth is not None:
        smoothquant.smooth(model, smooth, ids, progress=progress)
    if activations == "static":
        scales = calibrate_scales(model, layers, ids, observer, progress, **options)
    _warn_of_floats(model, skip)
    for name in tqdm(list(layers), desc=f"W8A8, {activations}", unit=" layers", disable=not progress):
        layer = layers.pop(name)  # let go of each float weight before the next one's turn
        replace_layers(model, {layer: Int8Linear(absmax(layer.weight, bits=8), layer.bias, scales.get(name))})
    mark_quantized(model, "absmax", 8, None, skip, activations=activations)
    return model


def calibrate_scales(model, layers, ids, observer="minmax", progress=True, **options):
    """Run the model over calibration text and choose a scale for the inputs of each layer.

    layers: dict name -> layer.  ids: int64 (windows, window).  observer, options: as for `make_observer`.
    Returns dict name -> float.  Raises ValueError for a layer that was given nothing, or NaN.
    """
    groups = whole(model, ids[:1, :GLANCE]).groups(layers)  # layers that read the same tensor need one observer
    observers = {group[0]: make_observer(observer, **options) for group in groups}
    batch = max(1, LOGITS_AT_ONCE // (model.config.get_text_config().vocab_size * ids.shape[1]))

    def see(name, x):
        try:
            observers[name].observe(x)
        except ValueError as error:
            raise ValueError(f"the inputs of layer {name}: {error}") from error

    with watching({name: layers[name] for name in observers}, see):
        for windows in tqdm(ids.split(batch), desc="observing", unit=" batches", disable=not progress):
            forward(model, windows)
    return {name: _scale(observers[group[0]], name) for group in groups for name in group}


def _scale(observer, name):
    """The scale for the inputs of a layer, or an error that names the layer."""
    try:
        return observer.scale(bits=8)
    except ValueError as error:
        raise ValueError(
            f"layer {name} was given nothing by the calibration text; use activations='dynamic', or name it in skip"
        ) from error


def _check_weights(model, layers, skip):
    """Raise ValueError for a layer that cannot be quantized, before any is."""
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize with skip={skip}; name fewer of them")
    for name, layer in layers.items():
        try:
            largest_row = check_weight(layer.weight).abs().amax(1).argmax()
            absmax(layer.weight[largest_row : largest_row + 1], bits=8)
        except ValueError as error:
            raise ValueError(f"layer {name} ({layer.out_features} x {layer.in_features}): {error}") from error


def _warn_of_floats(model, skip):
    """Say which large matrices stay in floating point: their inputs cannot be quantized from outside."""
    warn_of_others(model, skip, stacklevel=3)
    stacks = expert_stacks(model, skip)
    if stacks:
        warnings.warn(
            f"{len(stacks)} stacks of experts stay in floating point, because their inputs pass inside of one module: "
            f"{', '.join(kinds(stacks))}; name them in skip= to say that this is intended",
            stacklevel=3,
        )
