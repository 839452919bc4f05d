# Everything that one does with this repository. Each target makes the virtual environment first, which takes a few
# minutes once and nothing afterwards: it is made anew only when pyproject.toml has changed.
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCHMARKS = $(filter-out campaign checkpoint_campaign peer_copies,$(patsubst benchmarks/%.py,%,$(shell grep -l 'return publish' benchmarks/*.py)))
FAULTS ?= 1000
COUNT ?= 1350
SEED ?= 1

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
say = @printf '\033[1m%s\033[0m\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bench-faults bench-checkpoints fmt manifests clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(READY) ## a training run is hurt twice and comes back (4 minutes)
	$(call say,demo: a laptop-sized cluster with a run that crashes and hangs)
	@$(BIN)/mend demo

test: $(READY) ## every test; WORKERS=8 for more at a time, PYTEST_ARGS for pytest
	$(call say,test: everything with $(WORKERS) workers)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 15 --durations-min 5 $(PYTEST_ARGS)

check: $(READY) ## everything that needs no server: style, types, layers, generated files, guards
	$(call say,check: style)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "some files are not formatted: run 'make fmt'"; exit 1; }
	$(call say,check: types)
	@$(BIN)/mypy
	$(call say,check: layers)
	@$(BIN)/lint-imports --no-logo
	$(call say,check: generated files)
	@$(BIN)/python manifests/generate.py --check
	$(call say,check: guards)
	@$(BIN)/python -m pytest -q tests/unit/test_house_*.py tests/unit/test_crd_*.py tests/unit/test_chart_*.py

bench: $(READY) ## the figures and docs/benchmarks.md; BENCH_ARGS=--quick for a first look
	@for each in $(BENCHMARKS); do \
	  printf '\033[1m%s\033[0m\n' "bench: $$each"; \
	  $(BIN)/python benchmarks/$$each.py $(BENCH_ARGS) --json benchmarks/results/$$each.json || exit 1; done
	$(call say,bench: the injection campaign in its short form)
	@$(BIN)/python benchmarks/campaign.py --count 100 $(BENCH_ARGS) --json benchmarks/results/campaign.json
	$(call say,bench: the checkpoint campaign in its short form)
	@$(BIN)/python benchmarks/checkpoint_campaign.py --count 100 $(BENCH_ARGS) --json benchmarks/results/checkpoint_campaign.json
	@$(BIN)/python benchmarks/render.py

bench-faults: $(READY) ## 1,000 faults of every kind at real gangs, and who was blamed; FAULTS=N SEED=S
	$(call say,bench: $(FAULTS) injections with seed $(SEED))
	@$(BIN)/python benchmarks/campaign.py --count $(FAULTS) --seed $(SEED) --json benchmarks/results/campaign.json
	@$(BIN)/python benchmarks/render.py

bench-checkpoints: $(READY) ## a thousand kills and hundreds of other faults of saving and restoring; COUNT=N SEED=S
	$(call say,bench: $(COUNT) faults of checkpoints with seed $(SEED))
	@$(BIN)/python benchmarks/checkpoint_campaign.py --count $(COUNT) --seed $(SEED) --json benchmarks/results/checkpoint_campaign.json
	@$(BIN)/python benchmarks/render.py

fmt: $(READY) ## put the code into its form
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

manifests: $(READY) ## make manifests/ from the chart
	@$(BIN)/python manifests/generate.py

clean: ## forget everything that was made here, the virtual environment too
	rm -rf $(VENV) build dist demo benchmarks/out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find operator trainer tests benchmarks manifests -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and exactly, so that pip does not look for another one while it solves the rest.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mend needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); set PYTHON=/path/to/python3.11"; exit 1; }
	$(call say,setting up: virtual environment in $(VENV))
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  $(PYTHON) -m virtualenv --clear --quiet $(VENV) || \
	  { echo "no virtual environment could be made; on Debian: apt install python3-venv, or pip install virtualenv"; exit 1; }
	$(call say,setting up: PyTorch (the big one, minutes))
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(call say,setting up: mend and its tools)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[operator,trainer,dev]'
	@touch $@
