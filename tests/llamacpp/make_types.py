"""Writes tests/export/types.json: the types that llama-quantize chooses, for tiny models and all schemes.

python -m tests.llamacpp.make_types
"""

import json
import tempfile
from pathlib import Path

from qlearn.bench.llamacpp import LlamaCpp
from qlearn.export import GGUFFile, imatrix, write_gguf
from qlearn.export.recipes import SCHEMES
from tests.export import tiny
from tests.export.types import TABLE, WITH_IMATRIX, compact


def types(path):
    """dict name -> type of a file."""
    return {info.name: info.type.name for info in GGUFFile(path).tensors.values()}


def main():
    llama, found = LlamaCpp(), {}
    with tempfile.TemporaryDirectory() as folder:
        source, importance, target = (Path(folder) / name for name in ("f32.gguf", "imatrix.gguf", "quantized.gguf"))
        for name in tiny.NAMES:
            write_gguf(tiny.model(name), tiny.tokenizer(), source, "F32", progress=False)
            imatrix(tiny.model(name), tiny.tokenizer(), tokens=512).save(importance)
            for scheme in SCHEMES:
                for given in (None, importance) if scheme in WITH_IMATRIX else (None,):
                    if scheme == "Q2_K_S" and not given:
                        continue
                    llama.quantize(source, target, scheme, given)
                    key = f"{scheme} + imatrix" if given else scheme
                    found.setdefault(name, {})[key] = compact(types(target))
            print(name, flush=True)
    TABLE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
