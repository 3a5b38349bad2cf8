"""llama.cpp from its source, which the package llama-cpp-python ships, to compare with.

    python -m qlearn.bench.ggml build/llama.cpp          # half a minute; needs cmake and a C++ compiler

builds the library `ggml-base`, which holds the quantizers and no arithmetic for a particular processor, and which
Python calls through ctypes. Other targets, the command line tools, take a quarter of an hour on two cores.
"""

import ctypes
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

from qlearn.export.tensor_types import TENSOR_TYPES

SDIST = "llama-cpp-python==0.3.36"
FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
]  # fmt: skip


def source(folder):
    """The folder of llama.cpp's source, fetched and unpacked where it is not there yet."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("llama_cpp_python-*/")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", SDIST]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/")) / "vendor" / "llama.cpp"


def build(folder, *targets):
    """Build targets of llama.cpp in folder; returns the folder of what was built, whose libraries lie in `bin`."""
    built = Path(folder) / "build"
    subprocess.run(["cmake", "-S", str(source(folder)), "-B", str(built), *FLAGS], check=True)
    subprocess.run(["cmake", "--build", str(built), "-j", "2", "--target", *targets], check=True)
    return built


class Ggml:
    """The quantizers of a built library."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_row_size.restype = ctypes.c_size_t

    def quantize(self, x, block_type, imatrix=None):
        """float32 (rows, columns) -> uint8 (rows, bytes of a row)."""
        x = np.ascontiguousarray(x, np.float32)
        number, (rows, columns) = TENSOR_TYPES[block_type].id, x.shape
        row_bytes = self.library.ggml_row_size(ctypes.c_int(number), ctypes.c_int64(columns))
        out = np.zeros((rows, row_bytes), np.uint8)
        imatrix = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
        self.library.ggml_quantize_chunk(
            ctypes.c_int(number), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(0),
            ctypes.c_int64(rows), ctypes.c_int64(columns),
            ctypes.c_void_p(None if imatrix is None else imatrix.ctypes.data),
        )  # fmt: skip
        return out


def load(folder):
    """The library that lies in folder/build/bin, built first where it is not there yet."""
    library = Path(folder) / "build" / "bin" / "libggml-base.so"
    if not library.exists():
        build(folder, "ggml-base")
    return Ggml(library)


if __name__ == "__main__":
    load(sys.argv[1] if len(sys.argv) > 1 else "build/llama.cpp")
