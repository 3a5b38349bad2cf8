"""What transformers and llama.cpp call the same things, architecture by architecture.

    model.layers.3.self_attn.q_proj.weight   is   blk.3.attn_q.weight
    model.embed_tokens.weight                     token_embd.weight
    lm_head.weight                                output.weight

A GGUF file says in `general.architecture` which program runs it. Four that are alike are known here: `llama`, `qwen2`
(biases on q, k, v), `qwen3` (a norm on each head of q and k), and `bitnet` (a norm in front of the output projection
and of the down projection). A head that is tied to the embedding is not stored: without `output.weight`, llama.cpp uses
`token_embd.weight` twice, and its `bitnet` never looks for another one.

**Rotary embeddings turn pairs of numbers, and there are two ways to choose the pairs.** In a head of size d,
transformers turns number i together with number i + d/2. llama.cpp does so too for most architectures (it calls that
NEOX), but for `llama` it turns neighbours, 2i and 2i + 1, as Meta's own code did. Which numbers are neighbours is a
matter of the order of the rows of the matrices that make q and k; so in a `llama` file the rows of each head are
reordered, those of the first half and of the second half taking turns:

    rows of a head in transformers   0 1 2 3 4 5 6 7        in the file   0 4 1 5 2 6 3 7

Queries and keys are reordered alike, so their dot products, and all that follows, stay the same. Blocks lie within a
row, so that whole rows of encoded bytes can be moved as well.

Source: gguf/tensor_mapping.py of gguf-py; conversion/llama.py (`permute`) and llama_model_rope_type of llama.cpp.
"""

import re
from dataclasses import dataclass

from qlearn.export.gguf_file import GGUFError

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
SUB_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """How one architecture is stored.

    name: llama.cpp's, which is transformers' `model_type` as well.  layer: dict names in a layer, there -> here.
    interleaved: whether the rows of q and k are reordered.  biases: the layers that llama.cpp can give a bias.
    tied: whether the head is always the embedding.
    """

    name: str
    layer: dict
    interleaved: bool = False
    biases: tuple = QKV
    tied: bool = False

    def modules(self, layers):
        """dict name of a module in transformers -> its name in the file, for a model of so many layers.

        >>> list(ARCHITECTURES["llama"].modules(1).items())[:2]
        [('model.embed_tokens', 'token_embd'), ('model.layers.0.input_layernorm', 'blk.0.attn_norm')]
        """
        names = {"model.embed_tokens": OUTSIDE["model.embed_tokens"]}
        for i in range(layers):
            names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in self.layer.items()}
        return names | {name: OUTSIDE[name] for name in ("model.norm", "lm_head")}

    def heads(self, name, config):
        """How many heads the rows of a tensor are reordered in; None for one that is stored as it is.

        name: in the file.  config: transformers' configuration.
        """
        if not self.interleaved:
            return None
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        return heads.get(name.split(".")[-2])


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", LAYER, True, (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
        Architecture("qwen2", LAYER),
        Architecture("qwen3", LAYER | HEAD_NORMS),
        Architecture("bitnet", LAYER | SUB_NORMS, biases=(), tied=True),
    )
}


def architecture(name):
    """The architecture of that name.  Raises GGUFError for one that is not known here.

    >>> architecture("qwen3").interleaved
    False
    """
    if name not in ARCHITECTURES:
        raise GGUFError(f"architecture {name!r} is not known here; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def layer_number(name):
    """The layer that a tensor of a file belongs to, or None.

    >>> layer_number("blk.12.attn_q.weight"), layer_number("output.weight")
    (12, None)
    """
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else None


def interleave(rows, heads):
    """The rows of q or k as a `llama` file has them: in each head, those of the two halves take turns.

    rows: array (heads * size of a head, ...).  Returns an array like it.

    >>> import numpy as np
    >>> interleave(np.arange(8), heads=1).tolist()
    [0, 4, 1, 5, 2, 6, 3, 7]
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows, heads):
    """The inverse of `interleave`.

    >>> import numpy as np
    >>> deinterleave(np.array([0, 4, 1, 5, 2, 6, 3, 7]), heads=1).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
