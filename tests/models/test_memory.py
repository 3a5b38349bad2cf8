"""Peak memory of quantize_model, measured in a process of its own: the model, and about one block.

The process notes its resident memory before it quantizes and its high-water mark after, both from Linux' /proc, and
reports the difference in units of a block (q, k, v, o of 768 x 768 and three matrices of 1280 x 768 in float32, 21 MB).
It has quantized a smaller model before, large enough for the compiled loops, so that libraries are loaded and caches
filled, and glibc is told to give every larger piece of memory back at once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 to it sets the high-water mark back to the present
pytestmark = pytest.mark.skipif(not CLEAR_REFS.exists(), reason="reads the memory of a process from Linux' /proc")

SCRIPT = """
import json
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import qlearn

def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

def make(blocks, hidden, intermediate):
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks}
    config = LlamaConfig(**sizes, vocab_size=64, num_attention_heads=4, num_key_value_heads=4)
    return LlamaForCausalLM(config).eval().requires_grad_(False)

def measure(method, blocks, bits):
    options = {"bits": bits, "group_size": 64, "progress": False, "calibration": torch.arange(256).view(2, 128) % 64}
    qlearn.quantize_model(make(1, 128, 128), method, **options)
    model = make(blocks, 768, 1280)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    qlearn.quantize_model(model, method, **options)
    return (memory("VmHWM") - before) / block, (memory("VmRSS") - before) / block

print(json.dumps({"absmax": measure("absmax", 6, 8), "gptq": measure("gptq", 3, 4)}))
"""


@pytest.fixture(scope="module")
def measured():
    """For each method the peak and the end of the resident memory over what it was before, in blocks."""
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=settings, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def test_rounding_to_nearest(measured):
    """What is needed beside the model is at most 1 block: it is the work on one matrix.

    The largest matrix has 1280 x 768 of the block's 5.3 million weights, 0.19 of a block in float32. Rounding holds at
    most four such arrays at once (weights by groups, the rounded ones, the result of one more operation, and integer
    codes of an eighth to a fourth of that, packed and unpacked), 0.75 of a block. Were float matrices kept until the
    end, 6 blocks of packed codes would come on top, 6 x 8.25/32 = 1.5 blocks.
    """
    peak, end = measured["absmax"]
    assert peak < 1
    assert end == pytest.approx(-6 * (1 - 8.25 / 32), abs=0.3)  # each float matrix became 8.25 bits a weight


def test_gptq(measured):
    """At most 1.5 blocks: the work on the matrix with the largest Hessian, less what has been freed by then.

    That Hessian is 1280 x 1280, 0.31 of a block. It, its copy in the order of the columns, the Cholesky factor, the
    identity and the inverse are up to five of these at once, 1.54 blocks. With three arrays like the matrix itself (the
    weights, the errors of a block of columns, codes), 0.56, and hidden states of 256 x 768, 0.04, that is 2.14 blocks.
    But the matrix is the last of its block, and the six before it (0.81 of the block) take 4.3 bits instead of 32 by
    then: 0.7 less. Were their float matrices kept, it would be 0.8 more.
    """
    peak, end = measured["gptq"]
    assert peak < 1.5
    assert end < -1.5  # of 3 x (1 - 4.3/32) = 2.6 blocks that became free, less what libraries keep
