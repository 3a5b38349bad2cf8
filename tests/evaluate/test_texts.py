"""The texts that ship."""

import ast
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
