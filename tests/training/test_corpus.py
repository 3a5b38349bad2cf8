"""The corpus: what is kept, what is left out, and that held-out modules stay out."""

import pytest

from qlearn.training import corpus


@pytest.mark.parametrize(
    "licence, kept",
    [
        ("MIT", True),
        ("BSD-3-Clause AND 0BSD AND MIT", True),
        ("Apache Software License", True),
        ("Python Software Foundation License", True),
        ("", False),
        ("GPL-3.0-or-later", False),
        ("LGPL-2.1", False),
        ("MIT AND LGPL-2.1-only", False),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
        ("MPL-2.0 AND MIT", False),
        ("NVIDIA Proprietary Software", False),
        ("SUMMIT", False),
    ],
)
def test_licences(licence, kept):
    assert corpus.is_permissive(licence) is kept


def test_learnable_files():
    code = "def double(x):\n    return 2 * x\n" * 20
    assert corpus.is_learnable(code)
    assert not corpus.is_learnable(code[:200])
    assert not corpus.is_learnable(code * 10_000)
    assert not corpus.is_learnable("table = [" + "1, " * 200 + "]\n" * 3)


def test_the_twenty_held_out_modules_are_found_and_nothing_else_is_held_out():
    held_out = {path.stem for path, _, held in corpus.standard_library() if held}
    assert held_out == corpus.HELD_OUT_MODULES


def test_a_licence_is_read_from_expression_classifier_or_text():
    import email.message

    class Distribution:
        def __init__(self, **headers):
            self.metadata = email.message.Message()
            for name, value in headers.items():
                self.metadata[name.replace("_", "-")] = value

    assert corpus.licence_of(Distribution(License_Expression="MIT", License="other")) == "MIT"
    assert corpus.licence_of(Distribution(Classifier="License :: OSI Approved :: BSD License")) == "BSD License"
    assert corpus.licence_of(Distribution(License="ISC\nlong text")) == "ISC"
    assert corpus.licence_of(Distribution()) == ""


def test_sources_add_up():
    files = [
        corpus.SourceFile("abc", "a 1"),
        corpus.SourceFile("de", "b 2"),
        corpus.SourceFile("f", "a 1", held_out=True),
    ]
    rows = corpus.summarize(files, {"a 1": "MIT", "b 2": "ISC"})
    assert rows == [
        {"package": "a 1", "licence": "MIT", "files": 2, "characters": 4},
        {"package": "b 2", "licence": "ISC", "files": 1, "characters": 2},
    ]
