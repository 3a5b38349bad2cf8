"""The tokenizer in a GGUF file: from a tokenizer of transformers, and back.

A file carries its tokenizer along, so that a text becomes the same tokens wherever the model is run:

    tokenizer.ggml.model            gpt2 (byte-level BPE) or llama (SentencePiece)
    tokenizer.ggml.pre              how a text is cut into words first (`pretokenizers.py`)
    tokenizer.ggml.tokens           the text of each token, in the order of their numbers
    tokenizer.ggml.token_type       for each: 1 normal, 3 control, 4 user-defined, 5 unused, 2 unknown, 6 a byte
    tokenizer.ggml.merges           gpt2: "Ġ t" and so on, the pairs in the order in which they are merged
    tokenizer.ggml.scores           llama: how early a token is made, the larger the earlier
    tokenizer.ggml.bos_token_id     and eos, padding, unknown
    tokenizer.ggml.add_bos_token    whether every text begins with BOS; and add_eos_token
    tokenizer.chat_template         a template for conversations, if the model has one

In byte-level BPE each of the 256 bytes is written as a letter of its own (a space as Ġ, a newline as Ċ), so that any
text can be written down, and the tokens are texts of such letters. Control tokens, `<|endoftext|>` and its like, are
stored as they are.

The embedding may have more rows than the tokenizer has tokens; those are filled up as unused. What llama.cpp cannot
do is refused: unknown rules for cutting, normalizers that change the text, added tokens that swallow spaces. One thing
cannot be seen in its results and is let pass: the tokenizers of Qwen compose accents first (Unicode NFC), which
llama.cpp leaves to the caller.

Source: conversion/base.py (get_vocab_base) and src/llama-vocab.cpp of llama.cpp.
"""

import json

import numpy as np

from qlearn.export import pretokenizers, sentencepiece
from qlearn.export.gguf_file import GGUFError, one_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers -> the file
_IN_FILE = "tokenizer.ggml."


def metadata(tokenizer, vocab_size):
    """The metadata of a tokenizer: dict key -> int, bool, str, list of str, list of int, or float32 array.

    tokenizer: a fast tokenizer of transformers.  vocab_size: rows of the embedding.
    Raises ValueError for a tokenizer that llama.cpp would not follow, and for one with more tokens than the embedding.

    >>> import qlearn
    >>> found = metadata(qlearn.load_model()[1], 4096)
    >>> found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"], found["tokenizer.ggml.tokens"][300:303]
    ('gpt2', 'gpt-2', ['ct', 'Ġp', 'ed'])
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; load the model's tokenizer.json")
    parts = json.loads(backend.to_str())
    tokens, types = _tokens(tokenizer, parts, vocab_size)
    found = {"tokens": tokens, "token_type": types}
    found |= sentencepiece.metadata(parts, found) if sentencepiece.is_one(parts) else _byte_level(parts)
    for theirs, ours in SPECIAL.items():
        id = getattr(tokenizer, f"{theirs}_token_id")
        found |= {f"{ours}_token_id": id} if id is not None else {}
    found |= dict(zip(("add_bos_token", "add_eos_token"), _adds(tokenizer), strict=True))
    found = {_IN_FILE + key: value for key, value in found.items()}
    template = getattr(tokenizer, "chat_template", None)
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def tokenizer(file, context_length):
    """The tokenizer in a file, as a PreTrainedTokenizerFast.

    file: GGUFFile.  context_length: tokens that the model reads at once.
    Raises GGUFError for a kind that is not known here, and for entries that contradict each other.
    """
    from transformers import PreTrainedTokenizerFast

    kind = file.get(_IN_FILE + "model", str)
    tokens = file.get(_IN_FILE + "tokens", list)
    types = file.get(_IN_FILE + "token_type", np.ndarray, np.ones(len(tokens), np.int32)).tolist()
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise GGUFError(f"the file has {len(tokens)} tokens, some of them equal, and {len(types)} types; it is damaged")
    ids = {name: file.get(f"{_IN_FILE}{key}_token_id", int, -1) for name, key in SPECIAL.items()}
    if max(ids.values()) >= len(tokens):
        raise GGUFError(f"a special token has the number {max(ids.values())}, and there are {len(tokens)} tokens")
    special = {name: tokens[id] for name, id in ids.items() if id >= 0}
    try:
        backend = _backend(file, kind, tokens, types, special)
    except GGUFError:
        raise
    except Exception as error:  # the package `tokenizers` raises nothing more special
        raise GGUFError(f"the tokenizer in {file.path} contradicts itself ({one_line(error)})") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        chat_template=file.get("tokenizer.chat_template", str, "") or None,
        **{f"{name}_token": text for name, text in special.items()},
    )


def _byte_level(parts):
    """What is stored of a byte-level BPE tokenizer beside its tokens."""
    model, normalizer = parts["model"], parts["normalizer"]
    odd = {name: model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")}
    if model["type"] != "BPE" or model.get("byte_fallback") or any(odd.values()):
        raise ValueError(f"a {model['type']} tokenizer of this kind is not known here; byte-level BPE is")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ValueError(f"the tokenizer normalizes texts ({normalizer['type']}), which llama.cpp would not do")
    pre = pretokenizers.recognize(parts["pre_tokenizer"], model.get("ignore_merges"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": pre, "merges": merges}


def _tokens(tokenizer, parts, vocab_size):
    """(texts, types) of all tokens, filled up to vocab_size."""
    texts = {id: text for text, id in tokenizer.get_vocab().items()}
    if max(texts) >= vocab_size:
        raise ValueError(
            f"the tokenizer has a token number {max(texts)}, and the embedding {vocab_size} rows; they do not belong "
            "together"
        )
    added = {token["id"]: token for token in parts["added_tokens"]}
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(f"the token {token['content']!r} swallows spaces around it, which llama.cpp would not do")
    types = [_type(id, texts, added) for id in range(vocab_size)]
    return [texts.get(id, f"[PAD{id}]") for id in range(vocab_size)], types


def _type(id, texts, added):
    if id not in texts:
        return UNUSED
    if id not in added:
        return NORMAL
    return CONTROL if added[id]["special"] else USER_DEFINED


def _adds(tokenizer):
    """Whether a text begins with BOS, and whether it ends with EOS, seen from what the tokenizer does."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", verbose=False, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds = (ids[:1] == [bos] and bare[:1] != [bos], ids[-1:] == [eos] and bare[-1:] != [eos])
    if ids != [bos] * adds[0] + bare + [eos] * adds[1]:
        raise ValueError("the tokenizer puts other tokens around a text than BOS and EOS, which llama.cpp would not do")
    return adds


def _backend(file, kind, tokens, types, special):
    """The tokenizer as an object of the package `tokenizers`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = {text: id for id, text in enumerate(tokens)}
    if kind == "gpt2":
        pre_tokenizer, ignore_merges = pretokenizers.build(file.get(_IN_FILE + "pre", str))
        merges = [_pair(text) for text in file.get(_IN_FILE + "merges", list)]
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
        backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    elif kind == "llama":
        backend = sentencepiece.build(file, vocabulary, special)
    else:
        raise GGUFError(f"tokenizer.ggml.model is {kind!r}, and only gpt2 and llama are known here")
    for id, type in enumerate(types):
        if type in (CONTROL, USER_DEFINED):
            token = AddedToken(tokens[id], special=type == CONTROL, normalized=False)
            (backend.add_special_tokens if type == CONTROL else backend.add_tokens)([token])
    _surround(backend, file, vocabulary, special, default=kind == "llama")
    return backend


def _pair(text):
    """The two texts of a merge; a space parts them, and neither is empty."""
    space = text.find(" ", 1)
    if space < 0 or space == len(text) - 1:
        raise GGUFError(f"the merge {text!r} is no pair of two texts; the file is damaged")
    return text[:space], text[space + 1 :]


def _surround(backend, file, vocabulary, special, default):
    """Put BOS in front of each text, and EOS behind it, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    bos = special.get("bos") if file.get(_IN_FILE + "add_bos_token", bool, default) else None
    eos = special.get("eos") if file.get(_IN_FILE + "add_eos_token", bool, False) else None
    around = [token for token in (bos, eos) if token is not None]
    if around:
        one = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        two = [piece.replace("$A", "$B") + ":1" if piece == "$A" else f"{piece}:1" for piece in one]
        backend.post_processor = TemplateProcessing(
            single=one,
            pair=[*one, *two],
            special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(around)],
        )
