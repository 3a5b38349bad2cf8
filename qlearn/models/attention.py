"""Quantized attention in any model of transformers: one line, no weight changes, and the same line back.

    model.set_attn_implementation("qlearn_int8")        # the schemes of `methods/attention.py`, with "qlearn_" before
    model.set_attn_implementation("sdpa")               # as it was

or, to use a combination that has no name, and to hear of it if the model cannot do this at all,

    quantize_attention(model, Scheme("int8", "fp16", smooth_k=False))        # of methods/attention.py

How it works. transformers keeps a table of attention functions by name, `AttentionInterface`, and a second one of
functions that make the masks they want, `AttentionMaskInterface`. Importing this file adds the schemes to both. A
layer calls its function with q, k and v after the rotary embedding and after the cache, so in generation there is one
query, and as many keys as there are tokens so far. The cache keeps k and v as they were; they are rounded at each call.

The mask is always asked for in full, a bool for each query and key, so causality, padding, sliding windows and packed
sequences all come as one tensor, whatever the architecture. That costs memory that a kernel would save.

This is an emulation: it shows what the rounding does to a model, at the speed of ordinary arithmetic or less.
"""

from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qlearn.methods.attention import SCHEMES, Scheme, as_scheme, attention
from qlearn.models.recording import forward

PREFIX = "qlearn_"


def quantize_attention(model, scheme="int8"):
    """Let every attention of a model compute by a scheme, in place.

    model: of transformers.  scheme: a name in `methods.attention.SCHEMES`, or a Scheme.
    Returns the model.  `model.set_attn_implementation("sdpa")` (or "eager") undoes it.
    Raises ValueError for an unknown scheme, and for a model whose attention cannot be exchanged.

    >>> import qlearn
    >>> model, _ = qlearn.load_model()
    >>> quantize_attention(model, "nvfp4").config._attn_implementation
    'qlearn_nvfp4'
    """
    name = register(as_scheme(scheme))
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be exchanged; take a model of transformers whose code "
            "calls AttentionInterface"
        )
    model.set_attn_implementation(name)
    return model


def register(scheme):
    """Make a scheme known to transformers.

    Returns the name for `set_attn_implementation`: that in SCHEMES with "qlearn_" before it, or one made of all the
    choices.

    >>> register(Scheme("int8", "fp8", smooth_k=True)), register(Scheme("int8", "float"))
    ('qlearn_int8_fp8', 'qlearn_int8_float_False_False_block_True_128_64')
    """
    named = {known: name for name, known in SCHEMES.items()}
    name = PREFIX + (named.get(scheme) or "_".join(str(choice) for choice in vars(scheme).values()))
    return _register(name, partial(attention_forward, scheme=scheme))


def _register(name, function):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, full_mask)
    return name


def operands(model, ids):
    """What every attention of a model multiplies, for a batch of texts.

    ids: int64 (texts, tokens).
    Returns a list of dicts, in the order in which the layers run, for the arguments of `attention` of these names:
    q (texts, heads, tokens, d), after the rotary embedding, k and v (texts, kv_heads, tokens, d), mask, scaling.
    The model is left as it was.

    >>> import qlearn
    >>> model, tokenizer = qlearn.load_model()
    >>> first, *others = operands(model, tokenizer("import os", return_tensors="pt").input_ids)
    >>> len(others), first["q"].shape, first["k"].shape
    (7, torch.Size([1, 4, 2, 64]), torch.Size([1, 2, 2, 64]))
    """
    found, before = [], model.config._attn_implementation

    def see(module, query, key, value, attention_mask, scaling=None, **options):
        found.append({"q": query, "k": key, "v": value, "mask": attention_mask, "scaling": scaling})
        return attention_forward(module, query, key, value, attention_mask, scaling, scheme=Scheme(), **options)

    model.set_attn_implementation(_register(PREFIX + "operands", see))
    try:
        forward(model, ids)
    finally:
        model.set_attn_implementation(before)
    return found


def full_mask(**arguments):
    """The mask, bool (batch, 1, queries, keys), made even where another function could do without one."""
    return sdpa_mask(**arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def attention_forward(module, query, key, value, attention_mask, scaling=None, *, scheme, **options):
    """What a layer of transformers calls.

    query: (batch, heads, queries, d).  key, value: (batch, kv_heads, keys, d).
    attention_mask: None, bool, or floating point to be added; broadcast to (batch, heads, queries, keys).
    options: of these softcap and s_aux, the sinks, are used.
    Returns (batch, queries, heads, d), and None for the weights, which are never there as a whole.
    Raises ValueError for what is not emulated: training, a paged cache, position biases; and as `attention` does.
    """
    if module.training:
        raise ValueError("no gradient passes through quantized attention; call model.eval() first")
    for name, what in (("cache", "a paged cache"), ("position_bias", "a position bias")):
        if options.get(name) is not None:
            raise ValueError(f"quantized attention does not work with {what}; use attn_implementation='eager' here")
    if attention_mask is None and options.get("is_causal", getattr(module, "is_causal", False)):
        attention_mask = causal(query, key)
    out = attention(query, key, value, scheme, attention_mask, scaling, options.get("softcap"), options.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None


def causal(query, key):
    """The mask of a model that sends none: the last query sees all keys, the one before all but the last."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


for _scheme in SCHEMES.values():
    register(_scheme)
