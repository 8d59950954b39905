# Everything a newcomer needs; `make help` lists it. Needs Python 3.11 or newer, git and make.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_MODEL ?= examples/models/nano-llama
DEMO_OUT ?= out/nano-llama
DEMO_PROMPT ?= def main(argv):
TESTS ?= tests

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/compiler.done ## compile the example model, generate text, print the fusion report
	$(BIN)/dscompile $(DEMO_MODEL) -o $(DEMO_OUT) --force
	@echo
	$(BIN)/dsrun generate $(DEMO_OUT) -p "$(DEMO_PROMPT)" --max-new-tokens 60 --temperature 0.6 --top-p 0.9 --seed 3
	@echo
	$(BIN)/dsrun report $(DEMO_OUT)

test: .venv/dev.done lint types ## run the linters and the whole CPU test suite
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist worksteal -m "not gpu and not multigpu" $(TESTS)

lint: .venv/dev.done ## check style and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: .venv/dev.done ## check types
	$(BIN)/mypy

format: .venv/dev.done ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and what the demo wrote
	rm -rf .venv out build dist *.egg-info

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "dscompile needs Python 3.11 or newer; install it or set PYTHON" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/compiler.done: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[compiler]'
	@touch $@

.venv/dev.done: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	@touch $@ .venv/compiler.done
