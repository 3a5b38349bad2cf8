import pytest

import qlearn
from qlearn.bench.llamacpp import LlamaCpp
from qlearn.export import imatrix, write_gguf
from tests.export import tiny


@pytest.fixture(scope="session")
def llama():
    try:
        return LlamaCpp()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def unquantized(folder):
    """A function: name of a tiny model -> its F32 file."""

    def path(name):
        found = folder / f"{name}.gguf"
        return found if found.exists() else write_gguf(tiny.model(name), tiny.tokenizer(), found, "F32", progress=False)

    return path


@pytest.fixture(scope="session")
def importance(folder):
    """A function: name of a tiny model -> (its Imatrix, the file)."""
    kept = {}

    def pair(name):
        if name not in kept:
            kept[name] = imatrix(tiny.model(name), tiny.tokenizer(), tokens=1024)
            kept[name].save(folder / f"{name}.imatrix.gguf")
        return kept[name], folder / f"{name}.imatrix.gguf"

    return pair


@pytest.fixture(scope="session")
def text(folder):
    """The evaluation text as a file."""
    path = folder / "text.txt"
    path.write_text(qlearn.evaluate.evaluation_text(), newline="")
    return path
