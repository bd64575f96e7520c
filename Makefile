# Two commands for a newcomer: `make serve` and `make test`. Each sets up all it needs in .venv first.
#
#   make serve PIP_FLAGS="--extra-index-url ..."   get PyTorch from an index of yours, too (pytorch.org, "Get started",
#                                                  names one for your GPU, or for CPU only, a smaller download)
#   make serve PYTHON=python3.12 IGD_PORT=9000

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS)

.PHONY: serve test lint bench bench-rank clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

serve: $(VENV)/.installed ## set everything up and serve the bundled model on http://127.0.0.1:8000
	@exec $(BIN)/igd serve

test: $(VENV)/.installed-dev ## set everything up and run all tests
	@command -v redis-server >/dev/null || echo "note: redis-server is not installed; the tests that need a real one will say they skip"
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed ## what the defense and the service cost, against peers (an hour and a half; needs wrk)
	@command -v wrk >/dev/null || { echo "the benchmarks need wrk; on Debian and Ubuntu: apt install wrk" >&2; exit 1; }
	$(BIN)/python benchmarks/engine_speed.py
	$(BIN)/python benchmarks/http_throughput.py
	$(BIN)/python benchmarks/overload.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/against_peers.py
	$(BIN)/python benchmarks/summary.py

bench-rank: $(VENV)/.installed ## what LO-IR costs, against a plain pass and the literal loop
	$(BIN)/python benchmarks/rank_cost.py

clean: ## remove the virtual environment and caches, not your data in .igd
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ig-defense needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version); try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV): the first time this downloads PyTorch, which takes a few minutes."
	$(PIP) -e '.[openvino]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV): the first time this downloads PyTorch, which takes a few minutes."
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
