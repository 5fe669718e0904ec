# Every target sets up .venv if it is missing or if pyproject.toml has changed since.
# PYTHON=python3.12 make ... picks the interpreter that .venv is made with.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := adamerge modules trainers tests benchmarks train.py
PYTHONS := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11
MODERN := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help install quickstart test test-all lint bench bench-gpu clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(STAMP)  ## create .venv and install what everything here needs

quickstart: $(STAMP)  ## adapt a merge of the built-in experts and print the table
	$(BIN)/python train.py fit --config configs/quickstart.yaml --name quickstart

test: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -q -m "not slow and not gpu" --numprocesses auto --dist worksteal --durations=15

test-all: $(STAMP)  ## all tests; those for a GPU skip where there is none
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal --durations=15

lint: $(STAMP)  ## style, format and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

bench: $(STAMP)  ## time and memory, in short: steps, routing, spectral rules, merges from files (3 GB of disk)
	$(BIN)/python -m benchmarks.adaptation_step --images 8 --repeats 1 --no-memory
	$(BIN)/python -m benchmarks.scaling --only experts memory evaluation start
	$(BIN)/python -m benchmarks.teachers --repeats 1
	$(BIN)/python -m benchmarks.compositions --repeats 1 --first 8
	$(BIN)/python -m benchmarks.spectral
	$(BIN)/python -m benchmarks.regmean_memory
	$(BIN)/python -m benchmarks.static_merge --parameters 2e8

bench-gpu: $(STAMP)  ## the tests for a GPU, and time and memory there; says so where there is none
	$(BIN)/python -m benchmarks.gpu

clean:  ## remove caches and build output; .venv/ and runs/ stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@if ! $(BIN)/python -c '$(MODERN)' 2>/dev/null || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for candidate in $(PYTHONS); do \
	        if $$candidate -c '$(MODERN)' 2>/dev/null; then found=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "adamerge needs Python 3.11 or newer, and none of these is one: $(PYTHONS)." >&2; \
	        echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	        exit 1; \
	    fi; \
	    echo "$$found -m venv $(VENV)"; \
	    $$found -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	@echo "installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --editable ".[dev,notebooks]"
	@touch $@
