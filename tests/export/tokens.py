"""Tokenizers of every kind that is known, trained in a moment, and texts that are hard to cut."""

import functools
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from qlearn.evaluate import calibration_text
from qlearn.export import pretokenizers
from qlearn.export.sentencepiece import BYTES, SPACE

NASTY = [
    "a",
    " ",
    "\n",
    "\t\t\tindented\n\t\twith tabs\n",
    "line one\r\nline two\r\n\r\n\r\nafter empty lines\r",
    "spaces      many                                  more" + " " * 70 + "end" + " " * 33,
    "   leading, trailing   ",
    "\n\n\n \n  \n   x\n \t \n",
    "0 1 12 123 1234 12345 1234567890123456789 3.14159e-10 0x1F 1_000_000 ½ ² ٣٤٥ १२३ Ⅷ",
    "I'm you're they'VE we'Ll she'D it'S don't 'tis '' 'x 'S's'",
    "naïve café Ångström coöperate e\u0301 n\u0303 (decomposed)",
    "Привет, мир! Ελληνικά. עברית. العربية ١٢٣. हिन्दी में. ไทย. 日本語の文章、テスト。中文测试！한국어 텍스트.",
    "🚀 😶\u200d🌫️ ✅🦙🦙 👩\u200d👩\u200d👧\u200d👦 🇩🇪 emoji",
    "zero\u200bwidth\u200d joiner\ufeff bom\u00a0nbsp\u2003em\u3000ideographic",
    "<|endoftext|> <s> </s> <unk> <0x0A> [PAD0] <|im_start|>user",
    "x=[i**2 for i in range(10)if i%2==0]#comment\ndef f(a,*,b:int=3)->None:\n    return a@b!=b\n",
    "!!!???...---===~~~```\"\"\"'''$$$%%%^^^&&&***((()))",
    "\\n is not a newline, \\t not a tab, C:\\path\\to\\file",
    "ǅ ﬁ ﬃ ſ İ ı ẞ ß 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 Ⓐ ™ №",
    "\u0085\u2028\u2029 odd newlines \x0b \x0c \x1c",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb abababababababab",
    "end of text",
]


@functools.cache
def byte_level(rule, bos=False, vocab_size=1000):
    """A byte-level BPE tokenizer that cuts by a rule of `pretokenizers.RULES`; with bos, <|begin|> begins each text."""
    pre_tokenizer, ignore_merges = pretokenizers.build(rule)
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([calibration_text()[:100_000], *NASTY], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|endoftext|>")


@functools.cache
def sentencepiece(prefix=True, pieces=600):
    """A tokenizer as it is converted from SentencePiece: all pairs that make a token, early tokens first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789 "))
    backend.train_from_iterator([calibration_text()[:60_000]], trainer)
    vocabulary = backend.get_vocab()
    texts = sorted(vocabulary, key=vocabulary.get)
    known = set(texts)
    merges = [(t[:i], t[i:]) for t in texts for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *texts]
    model = models.BPE(
        {text: id for id, text in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    from tokenizers.processors import TemplateProcessing

    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def metaspace():
    """The same as transformers' own class builds it, which adds no space to a text that begins with one."""
    model = json.loads(sentencepiece().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)


@functools.cache
def qwen():
    """As Qwen's class in transformers builds it: it composes accents first (NFC)."""
    model = json.loads(byte_level("qwen2").backend_tokenizer.to_str())["model"]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


KINDS = {
    **{rule: functools.partial(byte_level, rule) for rule in pretokenizers.RULES},
    "gpt-2 with BOS": functools.partial(byte_level, "gpt-2", bos=True),
    "llama-bpe with BOS": functools.partial(byte_level, "llama-bpe", bos=True),
    "SentencePiece": sentencepiece,
    "SentencePiece without prefix": functools.partial(sentencepiece, prefix=False),
}


def ids(tokenizer, text):
    """The tokens of a text in which nothing is special."""
    return tokenizer(text, split_special_tokens=True)["input_ids"]
