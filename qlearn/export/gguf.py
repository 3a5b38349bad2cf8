"""Writing a GGUF file: a model of transformers, quantized by a recipe, as llama.cpp loads it.

    write_gguf(model, tokenizer, "model.gguf", "Q4_K_M")

What happens, in order:

1. The architecture is looked up (`names.py`), and the configuration checked and written as metadata (`configs.py`).
2. The tokenizer is translated (`tokenizers.py`).
3. The recipe says which type each tensor gets (`recipes.py`).
4. The tensors are encoded and written one after another (`sources.py`), so that beside the model only one of them is
   held in memory.

The first three can fail, and do so before a file is opened. The file is written under another name, and gets its own
when it is complete. Its bytes, tensor by tensor, are those that llama-quantize makes from the unquantized file.
"""

import os
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from qlearn.export import configs, names, recipes, tokenizers
from qlearn.export.imatrix import Imatrix
from qlearn.export.sources import sources
from qlearn.export.tensor_types import TENSOR_TYPES

QUANTIZATION_VERSION = 2  # of the block types, GGML_QNT_VERSION


def write_gguf(model, tokenizer, path, scheme="Q4_K_M", imatrix=None, types=None, progress=True):
    """Write a model and its tokenizer as a GGUF file.

    model: a causal language model of transformers (Llama, Qwen2, Qwen3, BitNet), float or with quantized layers.
    path: of the file; an existing one is replaced when the new one is complete.
    scheme: a recipe, one of `recipes.SCHEMES`.
    imatrix: an `Imatrix`, or a dict name of a tensor -> importance of its columns; tensors that it lacks go without.
    types: exceptions from the recipe, dict pattern -> type: {"token_embd.weight": "Q8_0", "blk.0.*": "F16"}.
    progress: show a bar.
    Returns the path.
    Raises ValueError, in one sentence, for whatever llama.cpp could not load or would compute differently: another
    architecture, settings that it does not know, a tokenizer that it would not follow; and for numbers that are not
    finite, an imatrix of another model, an unknown scheme or type.

    Layers that were quantized by this package are written without a second rounding where the type allows it
    (`exact.py`): `signed_absmax` with 4 bits and groups of 32 as Q4_0, ternary layers as TQ1_0 or TQ2_0.

    >>> import qlearn, tempfile
    >>> from qlearn.export.gguf_file import GGUFFile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_gguf(*qlearn.load_model(), Path(folder) / "model.gguf", "Q8_0", progress=False)
    ...     GGUFFile(path).tensor("blk.0.attn_q.weight").type.name, path.stat().st_size < 8e6
    ('Q8_0', True)
    """
    architecture = names.architecture(model.config.model_type)
    tensors = sources(model, architecture)
    shapes = {source.name: source.shape for source in tensors}
    noted, imatrix = _noted(imatrix), _checked(imatrix, shapes)
    plan = recipes.tensor_types(scheme, shapes, _dimensions(model.config), imatrix is not None, types)
    entries = _general(model, scheme) | noted | configs.metadata(model.config, architecture)
    entries |= tokenizers.metadata(tokenizer, model.config.vocab_size)
    path, unfinished = Path(path), Path(f"{path}.part")
    try:
        _write(unfinished, architecture.name, entries, tensors, plan, imatrix or {}, progress)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _write(path, architecture, entries, tensors, plan, imatrix, progress):
    """Header, metadata, the list of tensors, and their data."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        for key, value in entries.items():
            _add(writer, key, value)
        for source in tensors:
            type = TENSOR_TYPES[plan[source.name]]
            number = GGMLQuantizationType(type.id)
            writer.add_tensor_info(source.name, source.shape, np.dtype(np.float32), type.size(source.shape), number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source in tqdm(tensors, desc=f"writing {path.stem}", unit=" tensors", disable=not progress):
            writer.write_tensor_data(source.encode(plan[source.name], imatrix.get(source.name)))
    finally:
        writer.close()


def _add(writer, key, value):
    """An entry of the metadata, by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value if isinstance(value, list) else value.tolist())


def _general(model, scheme):
    """What is said of any file."""
    return {
        "general.type": "model",
        "general.name": Path(model.config.name_or_path).name or type(model).__name__,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": recipes.SCHEMES[scheme].file_type,
    }


def _noted(imatrix):
    """What llama-quantize notes of an imatrix, but for the place it came from."""
    if not isinstance(imatrix, Imatrix):
        return {}
    found = {"entries_count": len(imatrix), "chunks_count": imatrix.chunks}
    found |= {"dataset": imatrix.datasets[0]} if imatrix.datasets else {}
    return {f"quantize.imatrix.{key}": value for key, value in found.items()}


def _dimensions(config):
    return recipes.Dimensions(
        config.model_type, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    )


def _checked(imatrix, shapes):
    """An imatrix as dict name -> float32 (columns,), of this model; None stays None."""
    if imatrix is None:
        return None
    known = {name: np.asarray(imatrix[name], np.float32) for name in shapes if name in imatrix}
    if not known:
        raise ValueError(f"the imatrix is of another model: it has none of {', '.join(list(shapes)[:3])} ...")
    for name, importance in known.items():
        if importance.shape != shapes[name][-1:]:
            raise ValueError(
                f"the imatrix has {importance.shape} numbers for {name}, whose rows have {shapes[name][-1]}"
            )
    return known
