"""Make gguf_blocks.json: the SHA-256 of what ggml writes for every block type, family and importance matrix.

    python -m tests.conformance.make_gguf_hashes          # builds ggml first, in build/llama.cpp

Run it again when the families or the version of llama-cpp-python change; the tests read the file and need no ggml.
"""

import hashlib
import json
from pathlib import Path

from qlearn.bench import ggml
from qlearn.formats.gguf_blocks import BLOCK_TYPES
from tests.conformance.families import families, importances

PATH = Path(__file__).with_name("gguf_blocks.json")


def main():
    """Write the file."""
    library = ggml.load("build/llama.cpp")
    hashes = {}
    for block_type, kind in BLOCK_TYPES.items():
        for importance, imatrix in importances().items():
            if kind.uses_importance or imatrix is None:
                for family, x in families().items():
                    blocks = library.quantize(x, block_type, imatrix)
                    hashes[f"{block_type} | {family} | {importance}"] = hashlib.sha256(blocks.tobytes()).hexdigest()
    record = {"source": ggml.SDIST, "command": "python -m tests.conformance.make_gguf_hashes", "sha256": hashes}
    PATH.write_text(json.dumps(record, indent=1) + "\n")
    print(len(hashes), "hashes")


if __name__ == "__main__":
    main()
