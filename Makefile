# Each target starts from a bare machine with Python 3.11 or newer: it makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO ?= demo-atlas

.PHONY: help install demo test lint bench clean

help:
	@echo "make demo     install, simulate four slices, build an atlas of them, query it"
	@echo "make test     install with the test tools, run the tests"
	@echo "make install  the package and its dependencies in .venv"
	@echo "make lint     ruff, mypy, layer contract"
	@echo "make bench    benchmarks (tests/benchmarks/README.md)"

# torch first: with it in place nothing pulls another build
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lloki-atlas needs Python 3.11 or newer: set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	@touch $@

# the scgpt package is only the yardstick of one parity test; its own dependencies would replace half of the rest
$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev,oracle]'
	$(PIP) --no-deps scgpt==0.2.4
	@touch $@

install: $(VENV)/.core

demo: install
	$(BIN)/lloki-atlas demo $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff format --check lloki_atlas tests
	$(BIN)/ruff check lloki_atlas tests
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
