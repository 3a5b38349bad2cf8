"""The plug-in for transformers: quantize while loading, save, load again.

    config = qlearn.QuantizationConfig("absmax", bits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained("folder", quantization_config=config)
    model.save_pretrained("small")                           # the packed tensors, and config.json
    model = AutoModelForCausalLM.from_pretrained("small")    # the same logits, bit for bit

To load what was saved, transformers has to know of this package, and the one line that tells it is

    import qlearn.models

Without it transformers warns of an "Unknown quantization type, got qlearn", fills the quantized layers with random
numbers, and carries on. `qlearn.load_model("small")` needs no such line.

How it works. transformers builds a model without memory, on the device "meta", fills it tensor by tensor, and lets a
quantizer step in at three places:

* before the weights. In a saved model each quantized nn.Linear gives way to a QuantLinear whose packed tensors have
  sizes but no values. They are then filled from the file like any other tensor; the float matrix never exists.
* at each weight. A float checkpoint is quantized matrix by matrix, and each is dropped before the next one is read.
* after the weights. A method that learns from inputs needs the whole model to run, so it quantizes here.

What the way back needs is in `storage.py`. It is taken from the layers themselves at the moment of saving, so it is
right for any model, also for one whose layers differ in bits.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlearn import methods
from qlearn.models.experts import expert_matrices, replace_experts
from qlearn.models.layers import SKIP, check_skip, expert_stacks, linear_layers, replace_layers, warn_of_others
from qlearn.models.linear import QuantLinear
from qlearn.models.storage import CheckpointError, check, keep_as_it_is, place, storage_of

NAME = "qlearn"  # what config.json gives as the quant_method
VERSION = 1  # of `storage`; a file with a higher one is from a newer package


@register_quantization_config(NAME)
class QuantizationConfig(QuantizationConfigMixin):
    """How to quantize a model while it is loaded; the arguments are those of `qlearn.quantize_model`.

    method, bits, group_size, options: as for `qlearn.quantize`.  skip: the layers to leave out.
    calibration: for a method that learns from inputs, a text or a list of texts; None for the package's own. It stays
    out of config.json.
    Raises ValueError for an unknown method, and whatever the method itself raises for such arguments.

    >>> import qlearn.models.loading
    >>> from transformers import AutoModelForCausalLM
    >>> config = QuantizationConfig("absmax", bits=4, group_size=64)
    >>> model = AutoModelForCausalLM.from_pretrained(qlearn.models.loading.BUNDLED, quantization_config=config)
    >>> model.model.layers[0].mlp.down_proj
    QuantLinear(768, 256, bias=False, int4, 4.25 bits)
    """

    def __init__(self, method="absmax", bits=4, group_size=64, skip=SKIP, calibration=None, storage=None, **options):
        self.quant_method = NAME
        self.method = method
        self.bits = bits
        self.group_size = group_size
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.calibration = calibration
        self.options = options
        self.storage = storage
        if storage is None:
            self._check()

    def _check(self):
        if self.method not in methods.METHODS:
            raise ValueError(f"method {self.method!r} is unknown; choose from {', '.join(sorted(methods.METHODS))}")
        whole = isinstance(self.group_size, int) and self.group_size > 0
        self.try_row(self.group_size if whole else 64)

    def try_row(self, columns):
        """Ask the method itself whether it takes these arguments, with a row of zeros."""
        if self.method not in methods.CALIBRATED:
            with torch.device("cpu"):  # while transformers builds a model, the default is another one
                self.quantize(torch.zeros(1, columns))

    def quantize(self, weight):
        """A matrix (rows, columns), quantized as this says: QuantizedTensor."""
        return methods.quantize(weight, self.method, bits=self.bits, group_size=self.group_size, **self.options)

    def to_dict(self):
        """What goes into config.json."""
        fields = {name: value for name, value in vars(self).items() if name != "calibration"}
        options = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in self.options.items()}
        options = {name: v for name, v in options.items() if v is None or isinstance(v, (bool, int, float, str))}
        return {**fields, "options": options, "version": VERSION}

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """The inverse of `to_dict`. Raises CheckpointError for what a newer version of the package wrote."""
        fields = {name: value for name, value in config_dict.items() if name not in ("quant_method", "version")}
        version = config_dict.get("version", VERSION)
        if version > VERSION:
            raise CheckpointError(
                f"this model was saved by a newer qlearn (storage version {version}, this one reads {VERSION}); "
                "upgrade qlearn to load it"
            )
        options = fields.pop("options", {})
        options = {n: getattr(torch, v[6:]) if str(v).startswith("torch.") else v for n, v in options.items()}
        config = cls(**fields, **options)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(NAME)
class Quantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` call; the top of this file says when."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.waiting = set()  # names of the parameters that are to be quantized when they are read
        self.failure = None

    def is_serializable(self):
        """Any model of ours can be saved."""
        return True

    @property
    def is_trainable(self):
        """Codes have no gradient."""
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        if self.pre_quantized:
            place(model, config.storage)
        elif config.method not in methods.CALIBRATED:
            self.waiting = parameters_to_quantize(model, config)

    def param_needs_quantization(self, model, param_name, **kwargs):
        """Whether a parameter is to be quantized when it is read, or is already and its shape is for us to check."""
        if self.pre_quantized:
            return isinstance(model.get_submodule(param_name.rpartition(".")[0]), QuantLinear)
        return param_name in self.waiting

    def get_quantize_ops(self):
        """The operation that does so."""
        return QuantizeOnLoad(self)

    def take(self, model, name, value):
        """Quantize a parameter that was just read, and put that in the place of its layer.

        transformers turns an error at this point into a page of text, so the first one is kept for the end.
        """
        self.waiting.remove(name)
        try:
            put_quantized(model, name, value, self.quantization_config)
        except ValueError as error:
            self.failure = self.failure or ValueError(f"{_described(name, value)}: {error}")

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name in sorted(self.waiting):  # what transformers had no operation for
            self.take(model, name, model.get_parameter(name).data)
        if self.failure:
            raise self.failure
        if self.pre_quantized:
            check(model)
        elif config.method in methods.CALIBRATED:
            from qlearn.models.quantize import quantize_model

            options = {"progress": False, "calibration": config.calibration, **config.options}
            quantize_model(model, config.method, config.bits, config.group_size, tuple(config.skip), **options)
        return model

    def get_state_dict_and_metadata(self, model):
        """`save_pretrained` asks for the tensors, just before it writes config.json; the default ones will do."""
        model.config.quantization_config.storage = storage_of(model)
        # transformers would bring names and tensors back to how the model was first published, with one matrix for
        # q, k and v, say, which makes nonsense of packed ones. With no conversions to undo, all stays as it is.
        model._weight_conversions = []
        return None, {}


class QuantizeOnLoad(ConversionOps):
    """Quantizes float parameters as they are read."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def convert(self, input_dict, model=None, missing_keys=None, **kwargs):
        """input_dict: name -> tensor, or a list of one.  Returns those that are to be stored as they are."""
        values = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        taken = values.keys() & self.quantizer.waiting
        for name in taken:
            self.quantizer.take(model, name, values[name])
        missing_keys -= taken
        return {name: value for name, value in values.items() if name not in taken}


def mark_quantized(model, method, bits, group_size, skip, **options):
    """Make a model that was quantized in place one that `save_pretrained` can save.

    The arguments are those of `quantize_model`, for config.json.  A module that is no model of transformers is left
    alone.
    """
    if isinstance(model, PreTrainedModel):
        config = QuantizationConfig(method, bits, group_size, skip, storage=[], **options)
        model.config.quantization_config = config
        model.hf_quantizer = Quantizer(config)


def parameters_to_quantize(model, config):
    """Names of the parameters that `quantize_model` would quantize, in a model without weights.

    Raises ValueError when the method cannot take one of them, before anything is read.
    """
    skip = check_skip(model, config.skip)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    matrix_of = {f"{name}.weight": layer.weight for name, layer in linear_layers(model, skip).items()}
    matrix_of |= {name: next(expert_matrices(*place)) for name, place in expert_stacks(model, skip).items()}
    tried = set()
    for name, matrix in matrix_of.items():
        if matrix.shape[1] not in tried:
            tried.add(matrix.shape[1])
            try:
                config.try_row(matrix.shape[1])
            except ValueError as error:
                raise ValueError(f"{_described(name, matrix)}: {error}") from error
    warn_of_others(model, skip)
    return matrix_of.keys() - tied


def put_quantized(model, name, value, config):
    """Quantize the value of a parameter, and replace the layer or the experts that it belongs to."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, nn.Linear):
        replace_layers(model, {module: QuantLinear(config.quantize(value), module.bias)})
    else:
        setattr(module, attribute, nn.Parameter(value, requires_grad=False))
        layers = [QuantLinear(config.quantize(matrix)) for matrix in expert_matrices(module, attribute)]
        replace_experts(module, attribute, layers)
        keep_as_it_is(module)


def _described(name, value):
    return f"layer {name.removesuffix('.weight')} ({' x '.join(map(str, value.shape))})"
