# Two commands: `make quickstart` runs the whole main job on the embedded shop, `make test` passes the tests.
# Each makes the environment it needs in $(VENV). Set PYTHON, VENV or PIP_ARGS to change where things come from.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quickstart
PIP_ARGS ?=
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
export OMP_NUM_THREADS ?= 2
# Waiting threads sleep instead of spinning, which matters as soon as anything else runs on a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: quickstart test test-fast test-all lint bench clean help

help:
	@echo "make quickstart  install, then build data, SIDs and model, train, evaluate and report on the embedded shop"
	@echo "make test        install, then run the tests, but for the slow ones"
	@echo "make test-fast   the same without those that take more than a moment"
	@echo "make test-all    all tests, also those that train in several processes"
	@echo "make lint        install ruff and a type checker, then check style and the types of the public names"
	@echo "make bench       install, then run every benchmark in its quick form"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: sidtune needs Python 3.11 or newer; set PYTHON=/path/to/python3.11."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[test]"
# The grammar engine's own requirements include a GPU compiler that the tests do not need.
	$(INSTALL) --no-deps xgrammar apache-tvm-ffi
	@touch $@ $(VENV)/.base

$(VENV)/.lint: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[lint]"
	@touch $@

quickstart: $(VENV)/.base
	$(BIN)/sidtune run --config recipes/quickstart/pipeline.yaml --output_dir $(OUT)

# The tests' models are tiny: a second thread only costs time, a second process halves it. The tests of a file share what they trained.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.test
	$(PYTEST) -m "not slow and not medium"

# TEST_SECONDS=600 begins no test after so long.
test-all: $(VENV)/.test
	$(PYTEST) $(TEST_ONLY)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/support/typed_surface.py

bench: $(VENV)/.test
	@mkdir -p runs/benchmarks
	@for file in $$(grep -l '__main__' benchmarks/*.py | grep -v /table.py); do name=$$(basename $$file .py); echo "== $$name"; \
	  $(BIN)/python $$file --quick --json runs/benchmarks/$$name.json || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info runs
