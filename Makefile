# A fresh machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup search bench gpu example test test-fast test-soak lint format

setup: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

search: setup
	$(BIN)/python tuning/run_search.py $(ARGS)

bench: setup
	$(BIN)/python benchmarks/speed.py $(ARGS)

gpu: setup
	$(BIN)/python benchmarks/gpu.py $(ARGS)

example: setup
	$(BIN)/python benchmarks/example.py --place build/example $(ARGS)

# Several processes share the tests: slow ones first, those that share what is dear to make in the same process.
# Bytecode is kept even if the environment says not to: to read and rewrite the tests anew takes seconds.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadgroup --no-loadscope-reorder --maxprocesses 4
# Slow tests also wait, for processes to start and end: one more process than cores uses that time.
ONE_MORE = $$($(BIN)/python -c 'import os; print((os.cpu_count() or 1) + 1)')

test: setup
	$(PYTEST) --numprocesses $(ONE_MORE) $(ARGS)

test-fast: setup
	$(PYTEST) --numprocesses auto -m 'not slow' $(ARGS)

test-soak: setup
	$(PYTEST) --numprocesses auto -m soak --soak $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
