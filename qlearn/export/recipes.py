"""Which block type each tensor gets: the recipes behind names such as Q4_K_M.

Q4_K_M is no type of block but a recipe. It says Q4_K for most matrices and more bits for those where, as its authors
found by trying, bits are best spent: the value projections and the down projections of some of the layers get Q6_K, and
so does the head. The letter at the end is the size (S, M, L): how generous the recipe is.

    layer                0     1     2     3     4     5     6     7        of 8 in all, Q4_K_M
    attn_v, ffn_down   Q6_K  Q4_K  Q4_K  Q6_K  Q4_K  Q4_K  Q6_K  Q6_K       "more bits": the first and the last eighth,
    the others         Q4_K in every layer                                   and every third of those between

    token_embd         Q4_K; but Q6_K where the head is tied to it, since it is the head then

The rules are llama.cpp's, line for line in what they do, so that a file written here has the same bytes as one that
llama-quantize makes. Some of them:

* **Never quantized**: norms and biases, which are small and stay F32.
* **The head** gets Q6_K, or Q8_0 where the scheme is Q8_0 already or its blocks do not fit.
* **Grouped queries**: where 4 or more heads share a value projection, it is small and much used; Q2_K gives it Q4_K.
* **With an imatrix**, Q4_0 and Q5_0 give the first eighth of the down projections the type with a minimum, Q4_1 or
  Q5_1.
* **Rows that are no multiple of 256** cannot be cut into K-quant blocks. They get a type with blocks of 32 that is
  somewhat larger, and F16 where not even that fits.

`MXFP4` is the exception: llama.cpp knows it for experts only, and makes everything else Q8_0. Here it means MXFP4 for
every linear layer and Q8_0 for embedding and head, which llama.cpp runs just as well.

Source: src/llama-quant.cpp of llama.cpp (llama_tensor_get_type_impl, tensor_type_fallback, tensor_allows_quantization).
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from qlearn.export.names import layer_number
from qlearn.export.tensor_types import TENSOR_TYPES
from qlearn.formats.gguf_blocks import BLOCK_TYPES


@dataclass(frozen=True)
class Scheme:
    """file_type: the number in `general.file_type`, llama_ftype in llama.h.  default: the type of most matrices."""

    file_type: int
    default: str


SCHEMES = {
    "F32": Scheme(0, "F32"), "F16": Scheme(1, "F16"), "BF16": Scheme(32, "BF16"),
    "Q8_0": Scheme(7, "Q8_0"), "Q6_K": Scheme(18, "Q6_K"),
    "Q5_K_M": Scheme(17, "Q5_K"), "Q5_K_S": Scheme(16, "Q5_K"), "Q5_1": Scheme(9, "Q5_1"), "Q5_0": Scheme(8, "Q5_0"),
    "Q4_K_M": Scheme(15, "Q4_K"), "Q4_K_S": Scheme(14, "Q4_K"), "Q4_1": Scheme(3, "Q4_1"), "Q4_0": Scheme(2, "Q4_0"),
    "MXFP4": Scheme(38, "MXFP4"),
    "Q3_K_L": Scheme(13, "Q3_K"), "Q3_K_M": Scheme(12, "Q3_K"), "Q3_K_S": Scheme(11, "Q3_K"),
    "Q2_K": Scheme(10, "Q2_K"), "Q2_K_S": Scheme(21, "Q2_K"),
    "TQ2_0": Scheme(37, "TQ2_0"), "TQ1_0": Scheme(36, "TQ1_0"),
}  # fmt: skip

WRITABLE = ("F32", "F16", "BF16", *BLOCK_TYPES)
FALLBACK = {  # for rows that are no multiple of 256
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """What the rules ask about a model: its architecture, and how many layers, heads, and key-value heads it has."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    @property
    def sharing(self):
        """How many heads share a key and a value."""
        return self.heads // self.kv_heads

    @property
    def is_70b(self):
        """Whether llama.cpp takes it for a model of 70 billion: it goes by the number of layers."""
        return self.layers == 80 and (
            self.architecture == "qwen2" or (self.architecture == "llama" and self.sharing > 1)
        )


def tensor_types(scheme, shapes, dimensions, has_imatrix=False, types=None):
    """The type of every tensor.

    scheme: a name in SCHEMES.  shapes: dict name in the file -> shape, rows first.  dimensions: Dimensions.
    types: dict pattern of names -> type, for those that should not follow the recipe: {"token_embd.weight": "Q8_0"}.
    Returns dict name -> name of the type.
    Raises ValueError for an unknown scheme or type, a pattern that fits no matrix, and Q2_K_S without an imatrix.

    >>> shapes = {f"blk.{i}.ffn_down.weight": (256, 768) for i in range(8)} | {"token_embd.weight": (4096, 256)}
    >>> found = tensor_types("Q4_K_M", shapes, Dimensions("llama", 8, 4, 2))
    >>> found["token_embd.weight"], *(found[f"blk.{i}.ffn_down.weight"] for i in range(4))
    ('Q6_K', 'Q6_K', 'Q4_K', 'Q4_K', 'Q6_K')
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; choose from {', '.join(SCHEMES)}")
    types = _checked(types or {}, shapes)
    tied = "output.weight" not in shapes
    found = {}
    for name, shape in shapes.items():
        if not is_quantized(name, shape):
            found[name] = "F32"
            continue
        wanted = next((type for pattern, type in types.items() if fnmatchcase(name, pattern)), None)
        if wanted is None:
            wanted = _by_recipe(scheme, name, shape, dimensions, tied, has_imatrix)
        found[name] = fitting(wanted, shape[-1])
    in_layers = {type for name, type in found.items() if layer_number(name) is not None}
    if scheme == "Q2_K_S" and "Q2_K" in in_layers and not has_imatrix:
        raise ValueError("Q2_K_S without an imatrix makes a broken model; pass imatrix=, or choose Q2_K")
    return found


def is_quantized(name, shape):
    """Whether a tensor is a weight matrix, and no norm and no bias.

    >>> is_quantized("blk.0.attn_q.weight", (256, 256)), is_quantized("blk.0.attn_norm.weight", (256,))
    (True, False)
    """
    return len(shape) >= 2 and name.endswith("weight") and not name.endswith("_norm.weight")


def fitting(type, columns):
    """The type itself where rows of that length are whole blocks of it, else the one that takes its place.

    >>> fitting("Q4_K", 512), fitting("Q4_K", 96), fitting("Q4_K", 80), fitting("Q8_0", 80)
    ('Q4_K', 'Q5_0', 'F16', 'F16')
    """
    if columns % TENSOR_TYPES[type].weights:
        type = FALLBACK.get(type, type)
    return "F16" if columns % TENSOR_TYPES[type].weights else type


def more_bits(i, n):
    """Whether layer i of n is one of those that get more: the first and the last eighth, and every third between.

    >>> [i for i in range(32) if more_bits(i, 32)]
    [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _by_recipe(scheme, name, shape, model, tied, has_imatrix):
    """The type of a matrix, before it is asked whether its rows fit."""
    default = SCHEMES[scheme].default
    if default in ("F32", "F16", "BF16"):
        return default
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return _head(scheme, default, shape[-1])
    if name == "token_embd.weight":
        return {"TQ1_0": "Q4_K", "TQ2_0": "Q4_K", "MXFP4": "Q8_0"}.get(scheme, default)
    i, n, kind = layer_number(name), model.layers, name.split(".")[-2]
    if kind == "attn_v":
        return _value(scheme, default, i, n, model)
    if kind == "ffn_down":
        return _down(scheme, default, i, n, has_imatrix)
    if kind == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(scheme, default)
    return default


def _head(scheme, default, columns):
    """The matrix that picks the words."""
    if default == "Q8_0" or scheme == "MXFP4" or columns % TENSOR_TYPES[default].weights:
        return "Q8_0"
    return "Q6_K"


def _value(scheme, default, i, n, model):
    """The value projection of layer i of n."""
    shared = model.sharing >= 4
    found = {
        "Q2_K": "Q4_K" if shared else "Q3_K",
        "Q2_K_S": "Q4_K" if shared else default,
        "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if i < 4 else default,
        "Q4_K_M": "Q6_K" if more_bits(i, n) else default,
        "Q5_K_M": "Q6_K" if more_bits(i, n) else default,
    }.get(scheme, default)
    return "Q5_K" if model.is_70b and found in ("Q3_K", "Q4_K") else found


def _down(scheme, default, i, n, has_imatrix):
    """The down projection of layer i of n."""
    first = i < n // 8
    return {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if first else default,
        "Q3_K_M": "Q5_K" if i < n // 16 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "Q4_K_S": "Q5_K" if first else default,
        "Q4_K_M": "Q6_K" if more_bits(i, n) else default,
        "Q5_K_M": "Q6_K" if more_bits(i, n) else default,
        "Q4_0": "Q4_1" if first and has_imatrix else default,
        "Q5_0": "Q5_1" if first and has_imatrix else default,
    }.get(scheme, default)


def _checked(types, shapes):
    """The caller's own choices, each a type that can be written, for a pattern that fits something."""
    matrices = [name for name, shape in shapes.items() if is_quantized(name, shape)]
    for pattern, type in types.items():
        if type not in WRITABLE:
            raise ValueError(f"type {type!r} of {pattern!r} cannot be written; choose from {', '.join(WRITABLE)}")
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ValueError(f"types={pattern!r} fits no matrix; they are called {', '.join(matrices[:3])} ...")
    return types
