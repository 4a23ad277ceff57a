# Two commands matter: `make demo` and `make test`. Each makes .venv first if it has to.
#
# Variables: PYTHON=python3.12       interpreter for .venv (default: the first one from Python 3.11 on PATH)
#            TORCH_CPU_INDEX=URL     where to find a CPU build of PyTorch when the configured package index has none
#            ARGS='--json out.json'  passed on to `flowprefill demo` and to pytest

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-fast check format bench clean distclean

export PYTHON TORCH_CPU_INDEX EXTRAS

VENV := .venv
BIN := $(VENV)/bin
# The name carries the checkout's path: a copied or moved checkout has no valid stamp and makes its own environment,
# since the editable installation in the copied one would silently run the code of the other checkout.
STAMP := $(VENV)/.stamp-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)
# A benchmark is a script that writes its result to --json FILE; what they share lies beside them.
BENCHMARKS = $(shell grep -l -e '"--json"' benchmarks/*.py)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv with a CPU-only SGLang (needs no root)

$(STAMP): pyproject.toml requirements/install-cpu.sh $(wildcard requirements/*.txt)
	@requirements/install-cpu.sh $(VENV) $(STAMP)

demo: $(STAMP) ## Run the whole system on this machine: make demo ARGS='--json out.json'
	$(BIN)/flowprefill demo $(ARGS)

test: check ## Every check and every test
	$(BIN)/pytest $(ARGS)

test-fast: $(STAMP) ## Tests that start no cluster and build no package
	$(BIN)/pytest -m 'not cluster and not packaging' $(ARGS)

check: $(STAMP) ## ruff and strict mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## Let ruff fix and format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP) ## Run every benchmark, one after another; results in benchmarks/results/
	@mkdir -p benchmarks/results
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script"; \
	  $(BIN)/python $$script --json benchmarks/results/$$(basename $$script .py).json; \
	done

clean: ## Remove build results and caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV) $(VENV).*
