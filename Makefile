# A fresh machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup search bench example test test-fast lint format

setup: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

search: setup
	$(BIN)/python tuning/run_search.py $(ARGS)

bench: setup
	$(BIN)/python benchmarks/speed.py $(ARGS)

example: setup
	$(BIN)/python benchmarks/example.py --place build/example $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-fast: setup
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
