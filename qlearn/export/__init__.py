"""Export: files that other programs read.

    write_gguf, read_gguf     a model as a file of llama.cpp, and back                   gguf.py, read.py
    imatrix, Imatrix          which columns matter, and the file that says so            imatrix.py
    inspect, fields           what a GGUF file holds, and which byte says it             inspect.py
    dissect                   the numbers in a block of weights, bit by bit              dissect.py

A GGUF file is header, metadata, and tensors (`gguf_file.py`). What the metadata say of the sizes of a model is in
`configs.py`, of its tokenizer in `tokenizers.py` (with `pretokenizers.py` and `sentencepiece.py`). Each tensor has a
name (`names.py`) and a type (`tensor_types.py`), which a recipe such as Q4_K_M chooses (`recipes.py`), and bytes
(`sources.py`, `exact.py`).
"""

from qlearn.export.dissect import dissect
from qlearn.export.gguf import write_gguf
from qlearn.export.gguf_file import GGUFError, GGUFFile
from qlearn.export.imatrix import Imatrix, imatrix
from qlearn.export.inspect import fields, inspect
from qlearn.export.read import read_gguf

__all__ = [
    "GGUFError", "GGUFFile", "Imatrix", "dissect", "fields", "imatrix", "inspect", "read_gguf", "write_gguf",
]  # fmt: skip
