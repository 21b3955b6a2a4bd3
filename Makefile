# Everything runs in .venv, made on first use and renewed when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
# One thread a process: with two processes on two cores, two threads each can be 20 times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench zoo figures clean

demo: .venv/.ready
	$(BIN)/chanaxes demo

test: .venv/.ready
	$(BIN)/python -m pytest -q

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.ready
	$(BIN)/python -m tests.benchmarks.checkpoint
	$(BIN)/python -m tests.benchmarks.reconstruction
	$(BIN)/python -m tests.benchmarks.lesions
	$(BIN)/python -m tests.benchmarks.pruning
	$(BIN)/python -m tests.benchmarks.speedup

# A hundred networks of torchvision and timm pruned, saved, exported and tracked; it goes on where it was interrupted.
zoo: .venv/.zoo
	$(BIN)/python -m tests.benchmarks.zoo run --jobs $(JOBS)

# The pictures of the README, from the tables in notebooks/results.
figures: .venv/.ready
	$(BIN)/python notebooks/figures/make.py

clean:
	rm -rf .venv

.venv/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/.zoo: .venv/.ready
	$(BIN)/python -m pip install --quiet --editable ".[zoo]"
	touch $@

include configs/study/study.mk
