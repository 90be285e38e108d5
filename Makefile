# Each target makes its own virtual environment (.venv) when there is none; PYTHON chooses the interpreter, WORKERS how
# many processes run the tests.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPTIMISED = $(shell grep -rl --include='test_*.py' 'mark.optimised' tests)  # the files with tests that need it
export JAX_PLATFORMS ?= cpu

.PHONY: help demo test test-all lint format clean

help:            ## lists the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(READY)

demo: $(READY)   ## compares six ways of transfer on two real domain shifts, offline
	$(BIN)/python -m experiments.demo

test: lint       ## checks style and types, runs the tests
	$(BIN)/python -m pytest -m "not slow" --unoptimised -n $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m "not slow and optimised" -n $(WORKERS) --dist worksteal $(OPTIMISED)

test-all: lint   ## runs every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY)   ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY) ## mends what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## removes the environment and caches, never runs/
	rm -rf $(VENV) .ruff_cache .pytest_cache build dist *.egg-info
