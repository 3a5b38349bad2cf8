"""A model and a tokenizer so small that an independent slow implementation can check every figure."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 32
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(add_bos=False):
    """One token for each byte, token 0 for <|endoftext|>; with add_bos it begins every text with that."""
    vocabulary = {"<|endoftext|>": 0} | {symbol: i + 1 for i, symbol in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=CONTEXT
    )


def tiny_llama(seed=0, dtype=torch.float64, tied=True):
    """A random Llama of two layers that reads 32 tokens; its weights are large enough that its predictions differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, initializer_range=0.3, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def bos_tokenizer():
    return byte_tokenizer(add_bos=True)


@pytest.fixture
def make_model():
    return tiny_llama


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def other_model():
    """The same model with its linear layers disturbed, as quantization would."""
    other = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in other.named_parameters():
        if "proj" in name:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


@pytest.fixture
def text():
    """77 tokens: no multiple of any window below."""
    return "def area(r):\n    return 3.14159 * r * r\n\n\nclass Circle:\n    radius = 1  # cm\n"[:77]
