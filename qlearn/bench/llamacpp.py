"""The command line tools of llama.cpp, called from Python, to compare with.

    python -m qlearn.bench.llamacpp build/llama.cpp        # a quarter of an hour on two cores

builds them from the source that the package llama-cpp-python ships (`ggml.py`). Tools that are there already are found
by the environment variable LLAMACPP_BIN, the folder they lie in.

They are given one thread: their last lines are written by a thread of its own, which they do not wait for at the end,
so that on a busy machine those lines get lost. A run without its last line is repeated.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from qlearn.bench.ggml import build

FOLDER = Path("build/llama.cpp")
TOOLS = ("llama-quantize", "llama-perplexity", "llama-imatrix", "llama-completion", "llama-tokenize")
ATTEMPTS = 5
END = b"\n\n"  # llama-completion puts that behind every text
FLOAT32 = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")  # options: attention with nothing rounded to float16


class LlamaCpp:
    """The tools in a folder; None takes LLAMACPP_BIN, or what was built here.

    Raises FileNotFoundError, saying how to get them, when one is not there.
    """

    def __init__(self, folder=None):
        self.folder = Path(folder or os.environ.get("LLAMACPP_BIN") or FOLDER / "build" / "bin").absolute()
        for tool in TOOLS:
            if not (self.folder / tool).is_file():
                raise FileNotFoundError(
                    f"there is no {tool} in {self.folder}; build it by python -m qlearn.bench.llamacpp, or set "
                    "LLAMACPP_BIN to the folder of the tools"
                )

    def run(self, tool, *arguments, expect=""):
        """What a tool prints, errors included.

        expect: a regular expression that must be found in it.
        Raises RuntimeError with the last lines when the tool fails.
        """
        for _ in range(ATTEMPTS):
            command = [str(self.folder / tool), *map(str, arguments)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            text = done.stdout.decode("utf-8", "replace")
            if done.returncode:
                raise RuntimeError(f"{tool} failed: " + " | ".join(text.strip().splitlines()[-8:]))
            if re.search(expect, text):
                return text
        raise RuntimeError(f"{tool} did not print {expect!r} in {ATTEMPTS} runs")

    def quantize(self, source, target, scheme, imatrix=None):
        """Quantize a float file by one of the schemes of `export.recipes`."""
        options = ["--imatrix", imatrix] if imatrix else []
        if scheme == "MXFP4":  # by itself it is for experts only
            scheme = "MXFP4_MOE"
            options += [option for part in ("attn", "ffn") for option in ("--tensor-type", f"{part}=mxfp4")]
        self.run("llama-quantize", *options, source, target, scheme, 1)

    def perplexity(self, model, text, chunks=-1, context=512, options=()):
        """Perplexity of a text file, over its first chunks."""
        options = ["-c", context, "-b", context, "--chunks", chunks, "-t", 1, *options]
        printed = self.run("llama-perplexity", "-m", model, "-f", text, *options, expect=r"Final estimate")
        return float(re.search(r"Final estimate: PPL = ([-+.\w]+)", printed)[1])

    def imatrix(self, model, text, target, chunks=-1, context=512, options=()):
        """Collect an importance matrix from a text file."""
        options = ["-c", context, "-b", context, "--chunks", chunks, "-t", 1, "--no-ppl", *options]
        self.run("llama-imatrix", "-m", model, "-f", text, "-o", target, *options)

    def complete(self, model, prompt, tokens, options=()):
        """The greedy continuation of a prompt, a str."""
        with tempfile.NamedTemporaryFile("w", newline="", encoding="utf-8") as file:
            file.write(prompt)
            file.flush()
            command = [
                str(self.folder / "llama-completion"), "-m", str(model), "-f", file.name, "-n", str(tokens), "-t", "1",
                "--temp", "0", "-no-cnv", "--no-display-prompt", "--no-warmup", "--no-escape", *options,
            ]  # fmt: skip
            for _ in range(ATTEMPTS):
                done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=True)
                if done.stdout.endswith(END):
                    return done.stdout.removesuffix(END).decode("utf-8", "replace")
        raise RuntimeError(f"llama-completion did not finish its output in {ATTEMPTS} runs")

    def tokenize(self, model, text, parse_special=False):
        """The tokens of a text: list of ints, BOS in front where the model asks for it."""
        with tempfile.NamedTemporaryFile("w", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            options = ["--ids", "--no-escape", "--log-disable"] + ([] if parse_special else ["--no-parse-special"])
            printed = self.run("llama-tokenize", "-m", model, "-f", file.name, *options, expect=r"\[[\d, ]*\]")
        return [int(number) for number in re.findall(r"\d+", printed.strip().splitlines()[-1])]


if __name__ == "__main__":
    build(sys.argv[1] if len(sys.argv) > 1 else FOLDER, *TOOLS)
