# `make` lists the targets. PYTHON=/path/to/python3.12 chooses the interpreter that `setup` builds .venv with.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USE := $(VENV)/.installed-use
SELDOM := /tests?/|/transformers/models/(?!__init__|auto/|bert/|modernbert/)
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
DEMO ?=
WORKERS := $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-e2e test-gpu test-chaos test-cluster test-soak lint format docs sbom bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with Cloze and its tools (needs Python 3.11 to 3.13, no compiler)

$(BIN)/python:
	@for python in "$(PYTHON)" python3 python3.12 python3.11 python3.13; do \
	  [ -n "$$python" ] && "$$python" -c '$(SUPPORTED)' 2>/dev/null && found="$$python" && break; \
	  [ -z "$(PYTHON)" ] || break; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: $(or $(PYTHON),python3): not Python 3.11 to 3.13; install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $$found: cannot create $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): EXTRAS := [dev]
$(STAMP) $(USE): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(SUPPORTED)' || { \
	  echo "error: $(VENV): not Python 3.11 to 3.13; remove $(VENV) and run make setup again" >&2; exit 1; }
	@echo 'installing into $(VENV): a few minutes the first time'
	$(PIP) --no-compile -e '.$(EXTRAS)'
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib || true # some are templates
	@touch $@ $(USE)

demo: $(USE) ## Text to shards to pretraining to a Hugging Face model, in minutes (DEMO=--fresh starts over)
	$(BIN)/python -m launch.demo $(DEMO)

test: setup ## Unit tests, 2-process tests, the quick end-to-end tests
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not slow'

test-e2e: setup ## The slow ones, end to end above all: real launchers, the wheel, compiled layers
	$(PYTEST) -n $(WORKERS) --dist worksteal -m slow

test-gpu: setup ## Kernels, LAMB, offload, compiled layers, plan's memory on one GPU (skipped where there is none)
	$(PYTEST) tests/gpu

test-chaos: setup ## Kill runs at random moments, hundreds of corruptions: nothing lost, nothing wrong (at most 15 minutes)
	$(PYTEST) -rA -n 2 --dist worksteal tests/chaos

test-cluster: setup ## Two nodes in network namespaces, over ssh: training, faults, preflight, soak (needs root; at most 20 minutes)
	$(PYTEST) -rA -n 2 --dist worksteal tests/cluster

test-soak: setup ## Random faults in runs on two nodes (needs root; CLOZE_SOAK_FAULTS=20: at most 15 minutes)
	CLOZE_SOAK_FAULTS=$${CLOZE_SOAK_FAULTS:-20} $(PYTEST) -rA -n 2 tests/cluster/test_soak.py

lint: setup ## Format check, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup ## Rewrite the sources as `lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## Build the site into site/; a broken link is an error
	@$(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build

sbom: setup ## What Cloze runs with, as CycloneDX: build/sbom.json
	@[ -x build/sbom/bin/cyclonedx-py ] || { $(BIN)/python -m venv build/sbom && \
	  build/sbom/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt cyclonedx-bom; }
	build/sbom/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o build/sbom.json $(BIN)/python

bench: setup ## Run every benchmark: a table each, and JSON beside it
	@for file in $(sort $(wildcard benchmarks/*.py)); do echo "== $$file"; PYTHONPATH=. $(BIN)/python "$$file" || exit 1; done

clean: ## Remove caches and build outputs; shards, runs and models stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
