"""SentencePiece tokenizers (Llama 2, Mistral): scores in the file, merges in tokenizer.json.

SentencePiece keeps spaces inside the tokens, written as ▁ (U+2581), puts one in front of each text, and falls back to
tokens for single bytes, `<0x0A>`, where a letter has no token. It joins two neighbours whenever the two together are a
token, those first that make the token with the highest score. A tokenizer.json lists the pairs instead, in the order
in which they are joined. The two say the same when

* every pair of tokens that makes a token is in the list, and
* the pairs that make one token stand together,

which is so in the files that were made from a SentencePiece model. Then the place in the list, taken negative, is a
score. Where it is not so (a tokenizer that was trained as a list), llama.cpp would join what the tokenizer never does,
and the export is refused.

One difference is let pass. To a text that begins with a space already, SentencePiece and llama.cpp add another one. So
does a tokenizer.json of the older kind (the normalizer Prepend); the newer kind (the pre-tokenizer Metaspace) does not.
"""

import numpy as np

from qlearn.export.gguf_file import GGUFError

SPACE = "▁"
NEVER = -1e6  # the score of a token that is not made by joining
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6


def is_one(parts):
    """Whether a tokenizer.json, as a dict, is of this kind: BPE that falls back to bytes.

    >>> is_one({"model": {"type": "BPE", "byte_fallback": True}})
    True
    """
    return parts["model"]["type"] == "BPE" and bool(parts["model"].get("byte_fallback"))


def metadata(parts, found):
    """What is stored of such a tokenizer, beside tokens and the numbers of the special ones.

    parts: a tokenizer.json as a dict.  found: dict with the lists "tokens" and "token_type".
    Returns a dict of the same kind.  Raises ValueError for a tokenizer that llama.cpp would not follow.
    """
    tokens, types = found["tokens"], list(found["token_type"])
    missing = set(BYTES) - set(tokens)
    if missing:
        raise ValueError(f"the tokenizer falls back to bytes, and has no token for {len(missing)} of them")
    for id, text in enumerate(tokens):
        if text in BYTES:
            types[id] = _BYTE
        elif text == parts["model"].get("unk_token"):
            types[id] = _UNKNOWN
    normal = [text for text, type in zip(tokens, types, strict=True) if type == _NORMAL]
    ranks = _ranks(parts["model"]["merges"], set(normal))
    scores = np.float32([-ranks[text] if text in ranks else NEVER for text in tokens])
    prefix = _prefix(parts)
    return {"model": "llama", "pre": "default", "token_type": types, "scores": scores, "add_space_prefix": prefix}


def build(file, vocabulary, special):
    """The tokenizer in a file as an object of the package `tokenizers`.

    file: GGUFFile.  vocabulary: dict text -> id.  special: dict "unk" ... -> text.
    Raises GGUFError when its entries do not fit together.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.get("tokenizer.ggml.scores", np.ndarray)
    types = file.get("tokenizer.ggml.token_type", np.ndarray)
    if len(scores) != len(vocabulary) or len(types) != len(vocabulary):
        raise GGUFError(
            f"the file has {len(vocabulary)} tokens, {len(scores)} scores, {len(types)} types; it is damaged"
        )
    normal = [text for text, id in vocabulary.items() if types[id] == _NORMAL]
    known = set(normal)
    merges = [pair for text in sorted(normal, key=lambda t: -scores[vocabulary[t]]) for pair in _pairs(text, known)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=special.get("unk"), fuse_unk=True, byte_fallback=True))
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def _pairs(text, known):
    """All pairs of tokens that make a token."""
    return [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in known and text[i:] in known]


def _ranks(merges, normal):
    """The place in the list of each token's pairs; ValueError unless list and scores say the same."""
    ranks, count, last = {}, {}, None
    for rank, pair in enumerate(merges):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        made = first + second
        if made in ranks and made != last:
            raise ValueError(
                f"the tokenizer makes {made!r} early from one pair and late from another, which llama.cpp cannot do"
            )
        ranks.setdefault(made, rank)
        count[made] = count.get(made, 0) + 1
        last = made
    for text in normal:
        if len(_pairs(text, normal)) != count.get(text, 0):
            raise ValueError(
                f"the tokenizer joins {text!r} from {count.get(text, 0)} of the {len(_pairs(text, normal))} pairs of "
                "tokens that make it, and llama.cpp would from all; it was not made from a SentencePiece model"
            )
    return ranks


def _prefix(parts):
    """Whether a space is put in front of a text; ValueError for anything else that is done to it."""
    normalizer, pre = parts["normalizer"], parts["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = [step["type"] for step in steps]
    replaces = [step.get("content") for step in steps if step["type"] == "Replace"] == [SPACE]
    if pre is None and kinds == ["Prepend", "Replace"] and replaces:
        return True
    if pre is None and kinds == ["Replace"] and replaces:
        return False
    if not kinds and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        return pre["prepend_scheme"] != "never"
    raise ValueError(f"the tokenizer prepares texts by {kinds or pre}, which llama.cpp does not do for SentencePiece")
