"""Reading a model from a GGUF file: the way back into transformers.

    model, tokenizer = read_gguf("model.gguf")

The metadata give the configuration (`configs.py`), and the tensors the weights: decoded to float32, the rows of q and k
of a `llama` file put back into transformers' order. So the model computes with exactly the numbers that the file
stands for, in float32 throughout. (llama.cpp itself is a little less exact: before it multiplies with a quantized
matrix, it rounds the inputs to 8 bits as well.)

The exception is a `bitnet` file whose matrices are all ternary, with one scale each. They become packed layers that
round their inputs to 8 bits, which is how such a model was trained (`models/bitnet.py`).

Everything is checked before anything large is allocated: that each tensor is there, with the shape that the metadata
ask for, and that none is left over.
"""

import torch

from qlearn.export import configs, names, tokenizers
from qlearn.export.gguf_file import GGUFError, GGUFFile, one_line
from qlearn.models.bitnet import pack_bitnet
from qlearn.models.layers import linear_layers

SCALE = ".scale"  # some bitnet files keep a matrix's scale in a tensor beside it


def read_gguf(path):
    """The model and the tokenizer in a GGUF file of llama.cpp.

    path: of a file of architecture llama, qwen2, qwen3 or bitnet, in any type of blocks that can be decoded.
    Returns (model in eval mode, without gradients, float32, on the CPU; PreTrainedTokenizerFast).
    Raises FileNotFoundError for no file, and GGUFError, a ValueError of one sentence, for one that is damaged or holds
    something else.

    >>> import qlearn, tempfile
    >>> from qlearn.export import write_gguf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_gguf(*qlearn.load_model(), folder + "/model.gguf", "Q4_0", progress=False)
    ...     model, tokenizer = read_gguf(path)
    >>> type(model).__name__, tokenizer.decode(tokenizer("import os")["input_ids"])
    ('LlamaForCausalLM', 'import os')
    """
    file = GGUFFile(path)
    config = configs.config(file)
    architecture = names.architecture(config.model_type)
    wanted = _wanted(file, config, architecture)
    tokenizer = tokenizers.tokenizer(file, config.max_position_embeddings)
    model = _empty(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored, heads = wanted[name]
            parameter.copy_(torch.from_numpy(_numbers(file, stored, heads, parameter.shape)))
    model = model.eval().requires_grad_(False)
    if architecture.name == "bitnet" and all(_is_ternary(layer.weight) for layer in linear_layers(model).values()):
        pack_bitnet(model, "b158", scale="absmax")
    model.name_or_path = str(path)
    return model, tokenizer


def _is_ternary(weight):
    """Whether a matrix holds but one number, its negative, and zeros."""
    size = weight.abs()
    return bool(((size == 0) | (size == size.max())).all())


def _wanted(file, config, architecture):
    """dict name of a parameter -> (name in the file or None, heads); GGUFError unless file and model fit together."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    except Exception as error:  # sizes that are positive and yet make no model
        raise GGUFError(f"the metadata of {file.path} make no model: {one_line(error)}") from error
    ours, wanted = architecture.modules(config.num_hidden_layers), {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        stored = f"{ours[module]}.{kind}"
        if kind == "bias" and stored not in file.tensors:
            stored = None  # transformers has either all biases or none
        elif file.tensor(stored).shape != shape:
            raise GGUFError(f"tensor {stored} has the shape {file.tensor(stored).shape}, where {shape} is needed")
        wanted[name] = stored, architecture.heads(f"{ours[module]}.weight", config)
    known = {stored for stored, _ in wanted.values()} | {configs.ROPE_FREQS}
    known |= {stored.removesuffix(".weight") + SCALE for stored in known if stored}
    left = file.tensors.keys() - known
    if left:
        raise GGUFError(f"{file.path} has {len(left)} tensors that are not known here: {', '.join(sorted(left)[:3])}")
    return wanted


def _empty(config):
    """A model whose weights are still to come."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def _numbers(file, stored, heads, shape):
    """The numbers of a parameter: float32 array, rows in transformers' order."""
    if stored is None:
        return torch.zeros(shape).numpy()
    numbers = file.weights(stored)
    scale = stored.removesuffix(".weight") + SCALE
    if scale in file.tensors:
        numbers = numbers * file.weights(scale).reshape(-1)[:1]
    return names.deinterleave(numbers, heads) if heads else numbers
