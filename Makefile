# The whole developer interface. PIP_ARGS goes to pip, e.g. PIP_ARGS="--extra-index-url URL" for another build of torch;
# INSTALL is another installer than pip, such as INSTALL="uv pip install --python .venv/bin/python".
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL ?= $(BIN)/python -m pip install
READY := $(VENV)/.ready
# uv leaves out what pip does: without bytecode every start of a program parses thousands of files again
export UV_COMPILE_BYTECODE ?= 1

.PHONY: help setup demo test test-fast check bench up
.DEFAULT_GOAL := help

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 11

setup: $(READY) ## make the virtual environment

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "alignflow needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,gpu,server,dask,ray,benchmarks,serve,dev]"
	$(BIN)/python -m tasks.tracking.databases
	@touch $@

demo: $(READY) ## run the demo: from votes to an aligned model
	@mkdir -p .alignflow
	$(BIN)/alignflow run demo --summary .alignflow/demo.json

# "auto" is one process more than there are cores; tests/conftest.py sorts the fast tests before the slow ones
PYTEST := $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

test: $(READY) ## run all tests, fast ones first; each failure is shown when it happens
	$(PYTEST)

test-fast: $(READY) ## run the tests that need no servers and little time
	$(PYTEST) -m "not slow"

check: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## measure
	$(BIN)/python -m tests.benchmarks.run

up: $(READY) ## serve Prefect's and MLflow's pages until Ctrl-C
	$(BIN)/alignflow up
