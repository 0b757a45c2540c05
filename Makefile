# One virtual environment, two commands for a newcomer: `make quickstart` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test test-slow lint format clean

quickstart: .venv/quickstart.stamp
	$(BIN)/dynlora train examples/quickstart.yaml --overwrite true

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

lint: .venv/dev.stamp
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[quickstart]'
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
