# All that a developer types. Needs Python 3.11, and for a cluster root on Debian 12 or newer with Go; everything else is installed
# from hash-locked files into .venv, or built once into $FINETUNE_CACHE (~/.cache/finetune-operator).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(shell python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo python3 || echo python3.11)
BIN := .venv/bin
READY := .venv/.ready
export FINETUNE_OPERATOR_IMAGE ?= localhost/finetune-operator:dev
export FINETUNE_TRAINER_IMAGE ?= localhost/finetune-trainer:dev

.PHONY: help
help:  ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

$(READY): requirements/dev.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 is needed (found: $$(python3 --version 2>&1 || true)). Install it, or: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "Python's venv module is missing. On Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing the locked packages into .venv; a first time downloads 3.3 GB from PyPI, as its torch is the CUDA build"
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/uv.txt; }
	$(BIN)/uv pip sync --quiet --require-hashes --python $(BIN)/python requirements/dev.txt
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --offline --python $(BIN)/python -e .
	touch $@

.PHONY: venv
venv: $(READY)  ## Make .venv from the lock files

.PHONY: check
check: $(READY)  ## Format, lint, types, module boundaries, generated files: what must hold before any test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit/test_project.py tests/unit/test_crd.py tests/unit/test_reasons.py tests/unit/test_docs.py

.PHONY: fix
fix: $(READY)  ## Format and repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: crds
crds: $(READY)  ## Write what is made from the models: the CRD, the chart's copy, pages in docs/
	$(BIN)/python crds/generate.py

.PHONY: try
try: $(READY)  ## A real fine-tuning on this machine's CPU in minutes: no root, no Go, no cluster
	$(BIN)/python -m demo.local

.PHONY: testbed
testbed:  ## Build the test cluster's programs, once
	$(PYTHON) -m testbed build

.PHONY: assets
assets: $(READY)  ## Make the real model and conversations of demo, tests and benchmarks, once
	$(BIN)/python -m demo.assets

.PHONY: images
images:  ## Build both images; unchanged layers are reused
	$(PYTHON) -m testbed build-image operator $(FINETUNE_OPERATOR_IMAGE)
	$(PYTHON) -m testbed build-image trainer $(FINETUNE_TRAINER_IMAGE)

.PHONY: test
test: check testbed assets images  ## Check, then all tests: pure, control plane, node with real containers
	# A machine has one node: the demo's is ended, and the testbed's own tests come before those that keep theirs up.
	# One process has all tests that need a cluster, and often waits; the other has the rest (tests/conftest.py).
	$(PYTHON) -m testbed down
	$(BIN)/pytest -n 2 tests/unit tests/hostile tests/chart tests/control_plane tests/cluster/test_testbed.py \
		$(filter-out %/test_testbed.py,$(wildcard tests/cluster/test_*.py))

.PHONY: test-fast
test-fast: $(READY)  ## The tests that need no cluster and no real model
	$(BIN)/pytest -m "not control_plane and not cluster and not real_model"

.PHONY: soak
soak: assets testbed images  ## Longer than a change waits for: twenty kills of the real model; a queue that holds a job for minutes
	FINETUNE_REAL_KILLS=20 $(BIN)/pytest tests/unit/test_exactness.py -k real_model
	FINETUNE_HELD_S=300 $(BIN)/pytest tests/cluster/test_e2e_disturbances.py -k queue

.PHONY: fuzz
fuzz: $(READY)  ## A hundred thousand changed data files through all readers: nothing lost, every end named
	PYTHONPATH=tests/support $(BIN)/python -m fuzzing 100000

.PHONY: templates
templates: $(READY)  ## Write bench/results/templates.md: what becomes of conversations by every chat template of TRL
	PYTHONPATH=tests/support $(BIN)/python -m template_table > bench/results/templates.md

.PHONY: demo
demo: assets testbed images  ## From nothing to a committed adapter on a real cluster; leaves the cluster up
	$(BIN)/python -m demo run

.PHONY: demo-down
demo-down:  ## Stop the demo's cluster
	$(PYTHON) -m testbed down

.PHONY: bench
bench: assets testbed images  ## Write the tables in bench/results
	$(BIN)/python -m bench.throughput
	$(BIN)/python -m bench.preference
	$(BIN)/python -m bench.preference_learns
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.operator

# `--upgrade` is left out: a lock changes only where pyproject.toml asks for it. `make lock UPGRADE=--upgrade` takes what is newest.
UPGRADE ?=
COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --python-version 3.11 --no-header --no-emit-index-url
.PHONY: lock
lock: $(READY)  ## Write requirements/*.txt anew from pyproject.toml
	$(COMPILE) $(UPGRADE) --extra operator --extra trainer --extra cli --group dev pyproject.toml -o requirements/dev.txt
	$(COMPILE) $(UPGRADE) --extra operator -c requirements/dev.txt pyproject.toml -o requirements/operator.txt
	$(COMPILE) $(UPGRADE) --extra cli -c requirements/dev.txt pyproject.toml -o requirements/cli.txt
	$(COMPILE) $(UPGRADE) --extra trainer -c requirements/dev.txt pyproject.toml -o requirements/trainer.txt
	$(COMPILE) $(UPGRADE) -c requirements/dev.txt requirements/uv.in -o requirements/uv.txt
	$(COMPILE) $(UPGRADE) --no-deps requirements/assets.in -o requirements/assets.txt

.PHONY: sbom
sbom: $(READY)  ## Write dist/sbom/*.cdx.json: what the images and the command line consist of, from the locks
	mkdir -p dist/sbom
	# Not validated: checking the tool's own output against the schema takes six times as long as writing it.
	for part in operator trainer cli; do \
		$(BIN)/cyclonedx-py requirements --no-validate --pyproject pyproject.toml --output-reproducible \
			--output-file dist/sbom/$$part.cdx.json requirements/$$part.txt; done

.PHONY: clean
clean:  ## Remove what was made in this folder (not the cache)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
