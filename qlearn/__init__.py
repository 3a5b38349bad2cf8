"""qlearn: quantization of language models, from the bits of a float to a model on disk.

The spine of the package, from the ground up:

    codes = qlearn.formats.floats.FP8_E4M3FN.encode(x)                # a format is a grid of numbers
    qt = qlearn.quantize(weight, "absmax", bits=4, group_size=64)     # a method puts a matrix on the grid
    model, tokenizer = qlearn.load_model()                            # a small language model, shipped with the package
    qlearn.quantize_model(model, "absmax", bits=4, group_size=64)     # every linear layer of it
    qlearn.evaluate.report(model, tokenizer)                          # what that cost, in one row of a table

The names above are imported when they are first used, so that `import qlearn` itself takes no time.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "QuantizedTensor": "qlearn.tensor",
    "quantize": "qlearn.methods",
    "load_model": "qlearn.models",
    "QuantizationConfig": "qlearn.models",
    "quantize_model": "qlearn.models",
    "generate": "qlearn.models",
}
_MODULES = ("bench", "course", "evaluate", "export", "formats", "methods", "models", "tensor", "training")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"qlearn.{name}")
    raise AttributeError(f"module 'qlearn' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
