"""How large published models become: SINQ's claim of 60 to 70 % less memory, added up from the shapes of the matrices.

The paper gives the sizes of Qwen3 models in gigabytes, all but their linear layers in bfloat16. What a scheme adds to a
code can be read off the authors' package, and so their figures should come out:

    rtn, 4 bit     a 16-bit scale and a 16-bit zero for each 64 weights                     4.5 bits a weight
    sinq, 4 bit    and a 16-bit factor for each column of a matrix                          4.5 + 16 / rows
    sinq, 3 bit    the same, but 10 codes to 32 bits                                        3.7 + 16 / rows

Here codes of 3 bits take 3 bits, and integer zeros take as many bits as a code. `quantized_bytes` adds up what a matrix
really takes, without making one: 16 bits for what is not quantized.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from qlearn.models.layers import linear_layers

GROUP_SIZE = 64
SHAPES = {  # hidden, intermediate, layers, heads; 8 heads of k and v of 128 channels, a vocabulary of 151,936
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-14B": (5120, 17408, 40, 40, False),
    "Qwen3-32B": (5120, 25600, 64, 64, False),
}
PUBLISHED = {  # SINQ, table 1, in GB
    ("Qwen3-1.7B", "bf16"): 3.44,
    ("Qwen3-1.7B", "RTN, 4 bit, as published"): 1.42,
    ("Qwen3-1.7B", "SINQ, 3 bit, as published"): 1.28,
}
SCHEMES = {  # bits of a code, of a scale and a zero together, and of a factor of a column
    "RTN, 4 bit, as published": (4, 32, 0),
    "SINQ, 4 bit, as published": (4, 32, 16),
    "SINQ, 3 bit, as published": (3.2, 32, 16),
    "SINQ, 4 bit": (4, 16 + 4, 16),
    "SINQ, 3 bit": (3, 16 + 3, 16),
    "SINQ with 8-bit scales, 4 bit": (4, 10 + 4, 16),
    "SINQ with 8-bit scales, 3 bit": (3, 10 + 3, 16),
}


def sizes():
    """A list of dicts: model, scheme, bits per weight of the linear layers, bytes, share of bf16 that is saved, and the
    published GB or None."""
    rows = []
    for name in SHAPES:
        model = without_values(name)
        layers = [layer.weight.shape for layer in linear_layers(model).values()]
        weights, total = sum(r * c for r, c in layers), sum(p.numel() for p in model.parameters())
        for scheme in ("bf16", *SCHEMES):
            inside = 2 * weights if scheme == "bf16" else sum(quantized_bytes(shape, scheme) for shape in layers)
            whole = inside + 2 * (total - weights)
            rows.append({
                "model": name, "scheme": scheme, "parameters": total, "bits_per_weight": 8 * inside / weights,
                "bytes": whole, "saved": 1 - whole / (2 * total), "published_gb": PUBLISHED.get((name, scheme)),
            })  # fmt: skip
    return rows


def quantized_bytes(shape, scheme, group_size=GROUP_SIZE):
    """Bytes of a matrix (rows, columns) in one of SCHEMES.

    >>> quantized_bytes((2048, 2048), "SINQ, 4 bit, as published") * 8 / 2048**2       # 4 + 32/64 + 16/2048
    4.5078125
    """
    rows, columns = shape
    code, group, column = SCHEMES[scheme]
    return (rows * columns * (code + group / group_size) + columns * column) / 8


def without_values(name):
    """A model of SHAPES on the device "meta", where tensors have sizes and no values."""
    hidden, intermediate, layers, heads, tied = SHAPES[name]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
