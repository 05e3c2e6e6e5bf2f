# Each target works alone and first: it makes .venv and installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := checkpoints/open-llama-tiny-native

# What a change breaks first, in seconds: the parts of the model, and the whole of it against transformers.
QUICK := $(addprefix tests/test_,$(addsuffix .py,attention cache config fidelity generation losses masks names \
	golden reader rope)) tests/parity/test_model_parity.py::test_every_value_and_gradient_is_hf_s

.PHONY: help demo quick test lint check parity processors kills fuzz interop bench gpu package record clean

help:
	@echo "make demo        convert the shipped checkpoint and continue an English and a Chinese prompt"
	@echo "make quick       lint, types and the fastest tests, in less than 30 seconds: before each commit"
	@echo "make test        the test suite, comparing with transformers 4.31.0"
	@echo "make lint        lint and types"
	@echo "make check       lint, types and the test suite: before a pull request"
	@echo "make parity      the long comparison with transformers 4.31.0, with thousands of models"
	@echo "make processors  the comparison as older processors would compute it, with one and two threads"
	@echo "make kills       kill conversions at 240 random moments and at every rename (COUNT=1000 for more moments)"
	@echo "make fuzz        change checkpoints at random for an hour and read them (MINUTES=5 for less)"
	@echo "make interop     the same model in transformers 4.31.0, in current transformers and in llama.cpp; Trainer and peft"
	@echo "make bench       how fast this package, installed peers and the machine itself are: table, JSON and pictures"
	@echo "make gpu         the same for a GPU, with parity, in 8 minutes"
	@echo "make package     build the wheel, install it in an empty environment and use it there"
	@echo "make record      write tests/golden.safetensors again, confirmed by transformers 4.31.0"
	@echo "make clean       remove .venv, .venv-interop and what make demo wrote"

demo: .venv/.installed
	$(BIN)/openllama convert checkpoints/open-llama-tiny $(NATIVE) --overwrite
	$(BIN)/openllama generate $(NATIVE) --dtype float32 --prompt "ROMEO:" --prompt "春江花月夜" \
		--max-new-tokens 100 --temperature 0.7 --seed 10

quick: lint .venv/.installed-test
	$(BIN)/python -m pytest --quiet $(QUICK)

test: .venv/.installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: .venv/.installed-test .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

parity: .venv/.installed-test
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/parity

# ARGS="--processor avx2 --threads 1" runs a part of it.
processors: .venv/.installed-test
	$(BIN)/python -m tests.parity.cpus $(ARGS)

COUNT ?= 240
kills: .venv/.installed-test
	$(BIN)/python -m tests.kills $(COUNT)

MINUTES ?= 60
fuzz: .venv/.installed-test
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

# Current transformers and llama.cpp, which is compiled (about 15 minutes), have an environment of their own. Without
# GGML_NATIVE llama.cpp has no AMX kernels, which crash on some processors. ARGS=--small leaves out the 880 M model.
interop: .venv/.installed-test .venv-interop/.installed
	$(BIN)/python -m tests.interop --peer .venv-interop/bin/python $(ARGS)

.venv-interop/.installed: tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	CMAKE_ARGS="-DGGML_NATIVE=OFF" .venv-interop/bin/pip install --quiet --requirement $<
	@touch $@

bench: .venv/.installed-test .venv/.installed-plot
	$(BIN)/python benchmarks/bench.py --json bench.json --plot bench.png --roofline roofline.png $(ARGS)

gpu: .venv/.installed-test
	$(BIN)/python benchmarks/gpu.py --json gpu.json $(ARGS)

package:
	$(PYTHON) .ci/package.py

# tests/golden.safetensors: written only if transformers 4.31.0 confirms every number.
record: .venv/.installed-test
	$(BIN)/python -m tests.parity.record

clean:
	rm -rf .venv .venv-interop $(NATIVE)

# .installed: the package; .installed-EXTRA: the package with that extra.
.venv/.installed: setup.cfg pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable .
	@touch $@

.venv/.installed-%: setup.cfg pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable ".[$*]"
	@touch $@
