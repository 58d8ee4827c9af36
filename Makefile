# The whole developer interface. PIP_ARGS goes to pip, e.g. PIP_ARGS="--extra-index-url URL" for another build of torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test check bench up
.DEFAULT_GOAL := help

help: ## say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## make the virtual environment

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "alignflow needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[train,gpu,server,dask,dev]"
	$(BIN)/python -m tasks.tracking.databases
	@touch $@

demo: $(READY) ## run the demo: from votes to an aligned model
	$(BIN)/alignflow run demo --summary .alignflow/demo.json

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## measure
	$(BIN)/python -m tests.benchmarks.run

up: $(READY) ## serve Prefect's and MLflow's pages until Ctrl-C
	$(BIN)/alignflow up
