# Everything a user or a contributor runs, on a fresh machine with Python >= 3.11 and network access to a package index.
# `make` alone lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Installing takes minutes the first time; these empty files record that it was done for the present list of packages.
DEMO_READY := $(VENV)/.installed-demo
DEV_READY  := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help native demo test test-slow lint format types docs check clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): minutes the first time'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,analysis,report,zoo]'
	@touch $@

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): minutes the first time'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(DEMO_READY)  # dev contains all that the demo needs

native: | $(BIN)/python  ## Build the CPU engine beside its sources; without a compiler everything runs through the torch reference
	@export PATH="$$PATH:$(abspath $(BIN))"; \
	command -v cmake >/dev/null || $(BIN)/python -m pip install --quiet cmake; \
	if cmake -S . -B build/native >/dev/null && cmake --build build/native --parallel 2; \
	then cmake --install build/native --prefix src; \
	else echo 'The CPU engine was not built: cmake or a C++ compiler is missing'; fi

demo: $(DEMO_READY) native  ## Train, record and explain a small network; writes demo/index.html
	$(BIN)/python examples/demo.py --out demo

test: $(DEV_READY) native  ## The fast suite: everything not marked slow or zoo
	$(BIN)/python -m pytest -n 2 -m 'not slow and not zoo'

test-slow: $(DEV_READY) native  ## The rest: long runs, and every network of the registries
	$(BIN)/python -m pytest -n 2 -m 'slow or zoo'

lint: $(DEV_READY)  ## Style, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_READY)  ## Bring every file into the style that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_READY)  ## Check the annotations in src
	$(BIN)/mypy

docs: $(DEV_READY)  ## Build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet  # material's notice about its successor

check: lint types docs  ## What a commit must pass besides the tests

clean:  ## Remove what building and running wrote; the environment stays
	rm -rf build dist site demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
