# Two commands are all you need; both set everything up by themselves, in .venv, and start at once the second time.
#
#   make demo     a real language model learns from real data, proves it and writes a report (about three minutes)
#   make test     ruff, pyright and every test

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
VENV        := .venv
BIN         := $(VENV)/bin
WORKERS     ?= 2

# Compiling every file of torch and its friends takes longer than fetching them, and most are never imported. So pip
# compiles none; WARM imports what we use, which compiles that much. Later runs are quick only if that may be kept.
unexport PYTHONDONTWRITEBYTECODE
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --no-compile --constraint constraints.txt
WARM    := $(BIN)/python -c 'import torch, transformers.models.llama.modeling_llama, transformers.generation, rich.progress'
SHOW    := sed -un 's/^ *\(Downloading [^ ]* ([0-9]*[0-9][0-9][.0-9]* MB)\).*/  \1/p'

# the first of these that is 3.11 or newer
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# a .venv whose Python has gone (moved folder, upgraded system) is made again instead of failing for ever
ifeq ($(wildcard $(VENV)),$(VENV))
ifneq ($(shell $(BIN)/python -c 'print("alive")' 2>/dev/null),alive)
$(shell rm -rf $(VENV))
endif
endif

# one thread per worker: sums come in one order and the workers do not fight for the cores
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test lint format bench wheel clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile | sed '/^[^m]/d'
	@echo 'make lint     ruff and pyright alone        make format   let ruff mend what it can'
	@echo 'make bench    every figure the docs claim   make wheel    dist/*.whl        make clean'

demo: $(VENV)/demo.stamp
	@$(BIN)/veneer demo

test: lint assets
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q --durations 15 $(TESTS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: assets
assets: $(VENV)/test.stamp
	@$(BIN)/python -m veneer.assets

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.stamp
	for name in core mixed memory; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

wheel: $(VENV)/torch.stamp
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- set-up

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed.'; echo 'at: the PATH'; \
		echo 'do: install it, or name it: make PYTHON=/path/to/python3.11 ...'; exit 2; }
	@echo 'set-up: a virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo '$(PYTHON) cannot make a virtual environment.'; \
		echo 'do: install its venv module (Debian and Ubuntu: apt install python3-venv)'; exit 2; }

# torch first and alone: no other package's wish for "torch" may pick another build
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	@echo 'set-up: torch (the largest download)'
	@$(INSTALL) torch | $(SHOW)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo 'set-up: veneer and what the demo needs'
	@$(INSTALL) --editable '.[demo]' | $(SHOW)
	@$(WARM)
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo 'set-up: veneer and what its tests need'
	@$(INSTALL) --editable '.[dev]' | $(SHOW)
	@$(WARM)
	@touch $@ $(VENV)/demo.stamp
