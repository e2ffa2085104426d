# `make help` lists what there is. Everything runs in .venv, which .ci/setup makes on first use.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-slow test-gpu budget coverage lint docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## one kernel from request to result: generated, compiled, cached, loaded again
	$(BIN)/python examples/demo.py

test: $(READY) ## the tests that need no GPU (JOBS=2 processes)
	$(BIN)/python -m pytest -m "not gpu and not budget" -n $(JOBS)

test-slow: $(READY) ## the slow ones among them: every kernel that any card serves
	$(BIN)/python -m pytest -m "slow and not gpu and not budget" -n $(JOBS)

coverage: $(READY) ## the lines of rings 1 and 2 that these tests run: 90 % at least
	$(BIN)/python -m pip install -q 'coverage>=7.10'
	$(BIN)/python .ci/coverage -n $(JOBS)

budget: $(READY) ## the times that are promised, on a machine that does nothing else (FIGURES=file writes them)
	$(BIN)/python -m pytest -m "budget and not gpu" $(if $(FIGURES),--figures=$(FIGURES))

test-gpu: $(READY) ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

lint: $(READY) ## ruff
	$(BIN)/ruff check .

docs: $(READY) ## write the generated pages again
	$(BIN)/python docs/generate.py

clean: ## remove the environment and what tools left; the kernel cache stays
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml .ci/setup
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; name a Python 3.10 or newer: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) .ci/setup .venv
	@touch $@
