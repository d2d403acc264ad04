# Everything a fresh machine needs is Python 3.11, pip and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo serve test check bench device-check clean

# The whole job on the text that Python carries: trains, scores, refines, trains again.
demo: $(INSTALLED)
	$(BIN)/reprise run configs/demo.yaml

# Prefect's server and UI on this machine alone, the deployments, and a worker; Ctrl-C stops all of it.
serve: $(INSTALLED)
	$(BIN)/reprise serve

# Style, types, rooms and tests, these in two processes, a file at a time: ranks that start leave a core to others.
test: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Prints each claim as a ratio to a named baseline and writes it to benchmarks/results/.
bench: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.run

# What Reprise computes on this machine's device, how fast and in how much memory: runs/device-check/summary.md, in ten
# minutes at most. Before it, a CPU's losses are recorded, in one or two.
device-check: $(INSTALLED)
	$(BIN)/python -W ignore -m benchmarks.device run --output runs/device-check

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
