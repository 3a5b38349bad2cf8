"""Tokenizers go into the metadata and come back the same; what llama.cpp would not follow is refused.

That llama.cpp makes the same tokens of the same texts is shown in tests/llamacpp/test_run.py.
"""

import copy
import json
import unicodedata

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlearn.evaluate import evaluation_text
from qlearn.export import GGUFError, GGUFFile, tokenizers, write_gguf
from qlearn.export.pretokenizers import RULES, SAME, build, recognize
from tests.export import handmade, tiny, tokens
from tests.export.handmade import STRING, array, entry

KINDS = {"bundled": tiny.tokenizer, **tokens.KINDS}


def there_and_back(tokenizer, folder, vocab_size=None):
    """The tokenizer that is read from a file it was written to."""
    config = tiny.config("odd", vocab_size=vocab_size or len(tokenizer), num_hidden_layers=1)
    path = write_gguf(tiny.build(config), tokenizer, folder / "model.gguf", "F16", progress=False)
    return tokenizers.tokenizer(GGUFFile(path), 512)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(a tokenizer, the same from a file)."""
    tokenizer = KINDS[request.param]()
    return tokenizer, there_and_back(tokenizer, tmp_path_factory.mktemp("file"))


@pytest.mark.parametrize("text", tokens.NASTY, ids=[f"{text[:12]!a}" for text in tokens.NASTY])
def test_the_same_tokens(pair, text):
    before, after = pair
    assert tokens.ids(after, text) == tokens.ids(before, text)
    assert after(text)["input_ids"] == before(text)["input_ids"]


def test_a_long_text_there_and_back(pair):
    before, after = pair
    ids = before(evaluation_text()[:20_000])["input_ids"]
    assert after(evaluation_text()[:20_000])["input_ids"] == ids and after.decode(ids) == before.decode(ids)


def test_special_tokens(pair):
    before, after = pair
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(after, name) == getattr(before, name)
    text = f"a{before.eos_token}b"
    assert after(text)["input_ids"] == before(text)["input_ids"] and after.model_max_length == 512


def test_two_texts_at_once(pair):
    before, after = pair
    assert after("a", add_special_tokens=False)["input_ids"] == before("a", add_special_tokens=False)["input_ids"]


def test_a_vocabulary_that_is_smaller_than_the_embedding(tmp_path):
    tokenizer = tokens.byte_level("gpt-2")
    after = there_and_back(tokenizer, tmp_path, vocab_size=len(tokenizer) + 5)
    assert after("x = 1")["input_ids"] == tokenizer("x = 1")["input_ids"]
    found = GGUFFile(tmp_path / "model.gguf")
    assert found.get("tokenizer.ggml.tokens", list)[-1] == f"[PAD{len(tokenizer) + 4}]"
    assert found.metadata["tokenizer.ggml.token_type"][-6:].tolist() == [1, 5, 5, 5, 5, 5]


def test_a_chat_template_comes_along(tmp_path):
    tokenizer = copy.deepcopy(tokens.byte_level("gpt-2"))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    after = there_and_back(tokenizer, tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(messages, tokenize=False) == "<user>hi"


def test_tokens_that_were_added_and_are_not_special(tmp_path):
    tokenizer = copy.deepcopy(tokens.byte_level("gpt-2"))
    tokenizer.add_tokens(["<think>", "  twice  "])
    after = there_and_back(tokenizer, tmp_path)
    for text in ("a<think>b", "x  twice  y", "<think><think>"):
        assert tokens.ids(after, text) == tokens.ids(tokenizer, text)
    assert GGUFFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.token_type"][-2:].tolist() == [4, 4]


def test_the_llama_tokenizer_of_transformers(tmp_path):
    """Its one difference: to a text that begins with a space it adds no other one, which SentencePiece does."""
    before = tokens.metaspace()
    after = there_and_back(before, tmp_path)
    for text in tokens.NASTY:
        expected = tokens.ids(before, text)
        if text.startswith(" "):
            spaced = tokens.ids(tokens.sentencepiece(), text)
            assert tokens.ids(after, text) == spaced != expected
        else:
            assert tokens.ids(after, text) == expected


def test_the_qwen_tokenizer_of_transformers(tmp_path):
    """Its one difference: it composes accents first."""
    before = tokens.qwen()
    after = there_and_back(before, tmp_path)
    for text in tokens.NASTY:
        composed = unicodedata.normalize("NFC", text)
        assert tokens.ids(after, composed) == tokens.ids(before, composed) == tokens.ids(before, text)
        assert (tokens.ids(after, text) == tokens.ids(before, text)) == (text == composed)
    assert GGUFFile(tmp_path / "model.gguf").get("tokenizer.ggml.pre", str) == "qwen2"


@pytest.mark.parametrize("name", RULES)
def test_rules_are_recognized_from_what_they_build(name):
    pre_tokenizer, ignore_merges = build(name)
    assert recognize(json.loads(pre_tokenizer.__getstate__()), ignore_merges) == name


def test_other_spellings_of_a_rule_are_recognized():
    pattern = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    split = {"type": "Split", "pattern": {"Regex": RULES["qwen2"][0][0][1]}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    expanded = copy.deepcopy(split)
    expanded["pattern"]["Regex"] = pattern + split["pattern"]["Regex"].partition(")")[2]
    removed = split | {"behavior": "Removed", "invert": True}
    for one in (split, expanded, removed):
        assert recognize({"type": "Sequence", "pretokenizers": [one, bytes_]}, False) == "qwen2"


def test_all_names_of_a_rule_are_read():
    for name, rule in SAME.items():
        assert build(name)[1] == build(rule)[1] and rule in RULES


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges"),
    [
        (None, False),
        ({"type": "Whitespace"}, False),
        (BYTE_LEVEL, True),
        (BYTE_LEVEL | {"add_prefix_space": True}, False),
        (BYTE_LEVEL | {"use_regex": False}, False),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}, False),
        ({"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Contiguous"}, BYTE_LEVEL]}, False),
        ({"type": "Split", "pattern": {"Regex": r"\d{3}|\p{L}+"}, "behavior": "Isolated", "invert": False}, False),
        ({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}, False),
    ],
    ids=["none", "white space", "whole words", "prefix space", "no expression", "runs of digits", "punctuation",
         "another expression", "a string"],
)  # fmt: skip
def test_rules_without_a_name_are_refused(pre_tokenizer, ignore_merges):
    with pytest.raises(ValueError, match="has no rule that is known here; those that are known are gpt-2"):
        recognize(pre_tokenizer, ignore_merges)


def changed(tokenizer=None, **parts):
    """A tokenizer with parts of its tokenizer.json replaced: by a value, or by a function of the old one."""
    found = json.loads((tokenizer or tokens.byte_level("gpt-2")).backend_tokenizer.to_str())
    for name, part in parts.items():
        found[name] = part(found[name]) if callable(part) else part
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(found)))
    made.bos_token, made.eos_token = "<|begin|>", "<|endoftext|>"
    return made


def with_merges(merges):
    return changed(tokens.sentencepiece(), model=lambda m: m | {"merges": merges(m["merges"])})


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<x>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<x>": {"id": "<x>", "ids": [7], "tokens": ["<x>"]}},
}
REFUSED = {
    "lower case": (lambda: changed(normalizer={"type": "Lowercase"}), "normalizes texts .Lowercase."),
    "ends of words": (lambda: changed(model=lambda m: m | {"end_of_word_suffix": "</w>"}), "of this kind is not known"),
    "dropout": (lambda: changed(model=lambda m: m | {"dropout": 0.1}), "BPE tokenizer of this kind is not known here"),
    "whole words": (
        lambda: changed(model={"type": "WordLevel", "vocab": {"a": 0, "<|begin|>": 1, "<|endoftext|>": 2},
                               "unk_token": "a"}), "a WordLevel tokenizer of this kind"),
    "another token behind": (lambda: changed(post_processor=TEMPLATE), "other tokens around a text than BOS and EOS"),
    "a token that swallows spaces": (
        lambda: changed(added_tokens=lambda t: [one | {"rstrip": True} for one in t]), "swallows spaces around it"),
    "an unknown rule": (lambda: changed(pre_tokenizer={"type": "Whitespace"}), "cuts texts by Whitespace"),
    "SentencePiece, a pair missing": (
        lambda: with_merges(lambda m: m[:-1]), "pairs of tokens that make it, and llama.cpp would from all"),
    "SentencePiece, out of order": (
        lambda: with_merges(_apart), "early from one pair and late from another"),
    "SentencePiece, lower case": (
        lambda: changed(tokens.sentencepiece(), normalizer={"type": "Lowercase"}), "does not do for SentencePiece"),
}  # fmt: skip


def _apart(merges):
    """The pairs of one token in two places."""
    made = ["".join(pair) for pair in merges]
    first = next(i for i in range(len(made) - 1) if made[i] == made[i + 1])
    return merges[: first + 1] + merges[first + 2 :] + [merges[first + 1]]


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_would_not_follow_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.metadata(make(), 5000)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        pass

    with pytest.raises(ValueError, match="Slow is no fast tokenizer"):
        tokenizers.metadata(Slow(), 10)


def test_more_tokens_than_the_embedding_has_rows():
    with pytest.raises(ValueError, match="has a token number 4095, and the embedding 100 rows"):
        tokenizers.metadata(tiny.tokenizer(), 100)


# ---- files whose tokenizer makes no sense ----------------------------------------------------------------------------

GOOD = {
    "model": entry("tokenizer.ggml.model", STRING, "gpt2"),
    "pre": entry("tokenizer.ggml.pre", STRING, "gpt-2"),
    "tokens": array("tokenizer.ggml.tokens", STRING, ["a", "b", "ab", "<e>"]),
    "types": array("tokenizer.ggml.token_type", 5, [1, 1, 1, 3]),
    "merges": array("tokenizer.ggml.merges", STRING, ["a b"]),
    "eos": entry("tokenizer.ggml.eos_token_id", 4, 3),
}


def read(folder, **changes):
    entries = [part for part in (GOOD | changes).values() if part]
    (folder / "f.gguf").write_bytes(handmade.file(entries))
    return tokenizers.tokenizer(GGUFFile(folder / "f.gguf"), 10)


def test_the_smallest_tokenizer(tmp_path):
    assert read(tmp_path)("abba<e>")["input_ids"] == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": entry("tokenizer.ggml.model", STRING, "bert")}, "'bert', and only gpt2 and llama are known here"),
        ({"pre": entry("tokenizer.ggml.pre", STRING, "tekken")}, "tokenizer.ggml.pre is 'tekken', and only gpt-2"),
        ({"pre": b""}, "has no metadata 'tokenizer.ggml.pre'"),
        ({"tokens": array("tokenizer.ggml.tokens", STRING, ["a", "a", "ab", "<e>"])}, "4 tokens, some of them equal"),
        ({"types": array("tokenizer.ggml.token_type", 5, [1, 1])}, "4 tokens, some of them equal, and 2 types"),
        ({"types": array("tokenizer.ggml.token_type", STRING, ["x"])}, "of the type array of string"),
        ({"merges": array("tokenizer.ggml.merges", STRING, ["a"])}, "the merge 'a' is no pair"),
        ({"merges": array("tokenizer.ggml.merges", STRING, ["a "])}, "the merge 'a ' is no pair"),
        ({"merges": array("tokenizer.ggml.merges", STRING, [" "])}, "the merge ' ' is no pair"),
        ({"merges": array("tokenizer.ggml.merges", STRING, ["a c"])}, "the tokenizer in .* contradicts itself"),
        ({"merges": b""}, "has no metadata 'tokenizer.ggml.merges'"),
        ({"eos": entry("tokenizer.ggml.eos_token_id", 4, 4)}, "a special token has the number 4, and there are 4"),
        ({"model": entry("tokenizer.ggml.model", STRING, "llama")}, "has no metadata 'tokenizer.ggml.scores'"),
    ],
    ids=["model", "pre", "no pre", "token twice", "few types", "types as text", "half a merge", "empty second",
         "empty merge", "unknown merge", "no merges", "eos outside", "no scores"],
)  # fmt: skip
def test_tokenizers_that_make_no_sense_are_told(tmp_path, changes, message):
    with pytest.raises(GGUFError, match=message):
        read(tmp_path, **changes)
