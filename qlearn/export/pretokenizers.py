"""How a text is cut into words before byte pairs are merged: the rules that llama.cpp knows by name.

Byte pair encoding merges neighbours, but never across the border of a word, and what a word is differs between
tokenizers: GPT-2 keeps runs of digits together, Llama 3 cuts them after every third, Qwen after each. A tokenizer.json
says it by a regular expression. A GGUF file says it by a name, `tokenizer.ggml.pre`, and llama.cpp has the expressions
for each name in its source. Where a tokenizer's rule has no name, llama.cpp would cut the same text into other tokens,
which the model has never seen in that place; so a rule is either recognized for certain, or refused.

    gpt-2        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
    starcoder    the same, each digit by itself
    llama-bpe    digits by up to three; a word that is a token is taken whole, without merging
    smaug-bpe    the same expression, always merging
    qwen2        the same expression with digits one by one

The name decides nothing else here: whether a text begins with BOS is said by an entry of its own.

Source: llm_tokenizer_bpe in src/llama-vocab.cpp of llama.cpp.
"""

from qlearn.export.gguf_file import GGUFError

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the same, as most tokenizer.json files write it
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE, _ONE = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
GPT2 = ("bytes", True)  # ByteLevel, which brings GPT-2's expression with it
BYTES = ("bytes", False)

RULES = {  # name -> (steps, whether a word that is a token is taken whole)
    "gpt-2": ((GPT2,), False),
    "starcoder": ((("digits",), GPT2), False),
    "llama-bpe": ((("split", _ANY_CASE + _THREE), BYTES), True),
    "smaug-bpe": ((("split", _ANY_CASE + _THREE), BYTES), False),
    "qwen2": ((("split", _ANY_CASE + _ONE), BYTES), False),
}
SAME = {  # names that llama.cpp gives the same rule
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2", "exaone4": "gpt-2", "mellum": "gpt-2",
    "smollm": "starcoder", "refact": "starcoder", "command-r": "starcoder", "codeshell": "starcoder",
    "exaone": "starcoder", "minerva-7b": "starcoder", "dbrx": "smaug-bpe",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "stablelm2": "qwen2", "hunyuan": "qwen2",
}  # fmt: skip


def recognize(pre_tokenizer, ignore_merges):
    """llama.cpp's name for the rule of a tokenizer.

    pre_tokenizer: that part of a tokenizer.json, a dict.  ignore_merges: of its model.
    Raises ValueError for a rule without a name.

    >>> recognize({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, ignore_merges=False)
    'gpt-2'
    """
    wanted = (tuple(_steps(pre_tokenizer)), bool(ignore_merges))
    for name, rule in RULES.items():
        if rule == wanted:
            return name
    raise ValueError(
        f"the tokenizer cuts texts by {_short(wanted)}, for which llama.cpp has no rule that is known here; those that "
        f"are known are {', '.join(RULES)}"
    )


def build(name):
    """(pre-tokenizer as an object of the package `tokenizers`, ignore_merges) for a name in a file.

    Raises GGUFError for an unknown name.
    """
    from tokenizers import Regex, pre_tokenizers

    name = SAME.get(name, name)
    if name not in RULES:
        raise GGUFError(f"tokenizer.ggml.pre is {name!r}, and only {', '.join(RULES)} are known here")
    steps, ignore_merges = RULES[name]
    made = {
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "bytes": lambda use_regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex),
    }
    objects = [made[kind](*arguments) for kind, *arguments in steps]
    return (objects[0] if len(objects) == 1 else pre_tokenizers.Sequence(objects)), ignore_merges


def _steps(part):
    """The steps of a pre-tokenizer, in the words of RULES; what is not known there is given as it stands."""
    kind = part.get("type") if part else None
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "Digits" and part["individual_digits"]:
        yield ("digits",)
    elif kind == "ByteLevel" and not part["add_prefix_space"]:
        yield ("bytes", part.get("use_regex", True))
    elif kind == "Split" and part["behavior"] in ("Isolated", "Removed") and "Regex" in part["pattern"]:
        pattern = part["pattern"]["Regex"].replace(_CONTRACTIONS, _ANY_CASE)
        inverted = part.get("invert", False)
        # "Removed" with invert keeps the matches, and the expressions here match everything: the same words
        yield ("split", pattern) if (part["behavior"] == "Isolated") != inverted else (kind, str(part))
    else:
        yield (kind, str(part))


def _short(wanted):
    steps, ignore_merges = wanted
    text = " then ".join(" ".join(map(str, step)) for step in steps)
    return (text if len(text) < 160 else text[:157] + "...") + (", tokens taken whole" if ignore_merges else "")
