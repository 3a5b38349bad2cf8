"""The texts that ship."""

import ast
import hashlib
import re

import pytest

from qlearn.evaluate import calibration_text, evaluation_text
from qlearn.models.loading import BUNDLED


@pytest.mark.parametrize("text", [evaluation_text, calibration_text])
def test_a_text_is_python_and_long_enough(text):
    from transformers import AutoTokenizer

    ast.parse(text())
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert len(tokenizer(text(), verbose=False)["input_ids"]) >= 32_768


def test_the_texts_share_no_file():
    named = [
        {line for line in text().splitlines() if re.fullmatch(r"# [\w/]+\.py", line)}
        for text in (evaluation_text, calibration_text)
    ]
    assert named[0] and named[1] and not named[0] & named[1]


@pytest.mark.parametrize(
    "text, digest",
    [
        (evaluation_text, "582372a984b99b110fa73d071dbae5dd759f0d8d4bb3fd8a5eb0df24dc717f68"),
        (calibration_text, "094681ac4f13e3ebb20ed196656cccf21ab64ba5f4c1b8bdbee47fcbbed6921f"),
    ],
)
def test_a_text_stays_frozen(text, digest):
    """Every figure of the course is measured on these: changing a character makes all of them incomparable."""
    assert hashlib.sha256(text().encode()).hexdigest() == digest
