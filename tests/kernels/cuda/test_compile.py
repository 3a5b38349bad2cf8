"""Kernels of every module are compiled and assembled as for a GPU, without one.

A module lists in COMPILED what is compiled: (name, Kernel, signature, the least compute capability). The compiler runs
in a process of its own, because here Numba simulates. It prints one JSON object for each kernel, and these are checked.
The kernels keep everything in registers, unless their module says in SPILLS how many bytes of a thread do not fit.
All of them take minutes for each capability: QLEARN_COMPILE_ALL=1 pytest --timeout=0.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

CAPABILITIES = [(7, 5), (8, 0), (9, 0), (10, 0)]
ALL = bool(os.environ.get("QLEARN_COMPILE_ALL"))
MISSING = [name for name in ("numba.cuda", "llvmlite", "cuda.bindings") if importlib.util.find_spec(name) is None]

COMPILE = r"""
import importlib, json, pkgutil, re, sys

import qlearn.kernels.cuda as folder
from qlearn.kernels.cuda import SIMULATED

assert not SIMULATED
from numba import cuda

capability, most = tuple(map(int, sys.argv[1].split("."))), int(sys.argv[2])
try:
    from cuda.bindings import nvjitlink
except ImportError:
    nvjitlink = None


def assemble(ptx, registers):
    "What the assembler says of it."
    options = ["-arch=sm_%d%d" % capability, "-verbose", "-O3"]
    options += ["-maxrregcount=%d" % registers] if registers else []
    handle, data = nvjitlink.create(len(options), options), ptx.encode()
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
        nvjitlink.complete(handle)
        size, get = nvjitlink.get_info_log_size, nvjitlink.get_info_log
    except Exception:
        size, get = nvjitlink.get_error_log_size, nvjitlink.get_error_log
    log = bytearray(size(handle))
    get(handle, log)
    nvjitlink.destroy(handle)
    return log.decode(errors="replace").rstrip("\0")


for found in sorted(pkgutil.iter_modules(folder.__path__), key=lambda found: found.name):
    module = importlib.import_module(folder.__name__ + "." + found.name)
    entries = [entry for entry in getattr(module, "COMPILED", []) if entry[3] <= capability]
    for name, kernel, signature, _ in entries[:: -(-len(entries) // most) or 1]:
        result = {"module": found.name, "name": name}
        try:
            ptx = kernel.ptx(signature, capability)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"[-2000:]
        else:
            result["target"] = re.search(r"^\.target (\S+)", ptx, re.M)[1]
            result["doubles"] = sorted(set(re.findall(r"\b(?:add|sub|mul|div|fma|mad|neg|abs|sqrt|rcp|cvt|setp|min|max)"
                                                      r"[.\w]*\.f64[.\w]*", ptx)))
            registers = kernel._jitted.targetoptions.get("max_registers")
            result["log"] = assemble(ptx, registers) if nvjitlink else None
            result["spills"] = getattr(module, "SPILLS", 0)
        print(json.dumps(result), flush=True)
"""


def compiled(capability, most):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "{}.{}".format(*capability), str(most)],
        env=environment, capture_output=True, text=True, timeout=None if ALL else 280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} cannot be imported: install qlearn[gpu]")
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: "sm_{}{}".format(*capability))
def test_kernels_are_compiled_and_assembled(capability):
    """Of every module the first, and for 9.0 three from all over the list; with QLEARN_COMPILE_ALL=1 all of them."""
    results = compiled(capability, 1000 if ALL else 3 if capability == (9, 0) else 1)
    assert len(results) >= 2 and len({(r["module"], r["name"]) for r in results}) == len(results)
    wrong = []
    for result in results:
        name = f"{result['module']}: {result['name']}"
        if "error" in result:
            wrong.append(f"{name} is not compiled: {result['error']}")
            continue
        if result["target"] != "sm_{}{}".format(*capability):
            wrong.append(f"{name} is for {result['target']}")
        if result["doubles"]:
            wrong.append(f"{name} computes with float64: {result['doubles']}")
        if result["log"] is None:
            continue
        if "Used" not in result["log"]:
            wrong.append(f"{name} is not assembled: {result['log']}")
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", result["log"])))
        if spilled > result["spills"]:
            wrong.append(f"{name} spills {spilled} bytes")
    assert not wrong, "\n".join(wrong)
