# make install   .venv with everything the rest needs
# make demo      a job that loses a node and ends bit-identical, on this machine
# make test      lint, types, import rules, fast tests, then tests on a real local Ray cluster
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PIP_ARGS ?=

.PHONY: help install demo lint test test-fast test-ray clean

help:
	@sed -n 's/^# //p' Makefile | head -3

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard tests/servers/install.sh)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[dev]'
	if [ -f tests/servers/install.sh ]; then PYTHON=$(PYTHON) sh tests/servers/install.sh; fi
	touch $(STAMP)

demo: install
	$(BIN)/ray-dr demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

# Each process takes a stretch of the tests, and what is left of another's when it is through: a server or a set of worker
# processes that tests share is started by one of them.
test-fast: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not ray and not gpu" --ignore tests/test_architecture.py

test-ray: install
	$(BIN)/python -m pytest -m ray

test: test-fast
	$(BIN)/python -m pytest -m ray

clean:
	rm -rf $(VENV) .venv-moto .venv-moto.lock .ceph .ceph.lock .ceph.new build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
