# A fresh machine needs only Python 3.11, pip and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo serve test check wheel wheel-test docs bench device-check clean

# A whole run on text that ships with Python: train, score, refine, train again.
demo: $(INSTALLED)
	$(BIN)/reprise run configs/demo.yaml

# Prefect's server and UI on the loopback interface, the deployments, and a worker; Ctrl-C stops all of them.
serve: $(INSTALLED)
	$(BIN)/reprise serve

# Style, types, import contracts and tests. Tests run in two processes, each file in one of them: starting ranks then
# leaves a core to the other process.
test: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The wheel and the source distribution, in dist/. What an earlier build has left in build/ would be in the wheel.
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# Installs the wheel in a new environment and there, outside the checkout, does all that a newcomer does, in some minutes:
# init, run, report, serve, and a run from Prefect. It gets the newest versions that pyproject.toml allows.
wheel-test: $(INSTALLED)
	$(BIN)/pytest -m "slow or not slow" tests/test_distribution.py

# The site of the documentation, in site/; broken links and anchors are errors.
docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Prints each performance claim as a ratio to a named baseline and writes it to benchmarks/results/.
bench: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.run

# Checks what Reprise computes on this machine's device, its speed and its memory, in ten minutes at most; the result is
# runs/device-check/summary.md. Recording the losses of a CPU first takes one or two minutes.
device-check: $(INSTALLED)
	$(BIN)/python -W ignore -m benchmarks.device run --output runs/device-check

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist site
