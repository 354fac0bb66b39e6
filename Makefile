# `make demo` shows a base model learning to reason; `make test` checks everything.
# Either makes .venv first, if that was not done, from the versions in constraints.txt.
# Needs nothing but Python 3.11 to 3.13 and, the first time, a network.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint install install-dev clean

# Another interpreter: make test PYTHON=/path/to/python3.12
PYTHON ?=
# Processes that run tests, each with eight fake devices.
WORKERS ?= 2

PY := .venv/bin/python
export TIMEFORMAT := (%1R s)

help:
	@echo "make demo       watch a base model learn to reason: under 6 minutes on 2 cores"
	@echo "make test       lint, formatting, types and tests"
	@echo "make test-slow  the same, with the long-running tests"
	@echo "make clean      remove .venv and caches (runs/ stays)"

demo: .venv/base.stamp
	@$(PY) -m alignjax demo r1-zero

test: lint
	@echo "== pytest"
	@time $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

test-slow: lint
	@echo "== pytest, long-running tests included"
	@time XLA_FLAGS=--xla_backend_optimization_level=3 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "slow or not slow"

lint: .venv/dev.stamp
	@echo "== ruff check" && time $(PY) -m ruff check .
	@echo "== ruff format --check" && time $(PY) -m ruff format --check .
	@echo "== mypy" && time $(PY) -m mypy

install: .venv/base.stamp
install-dev: .venv/dev.stamp

.venv/base.stamp: pyproject.toml constraints.txt
	@$(call install,.,alignjax and what it needs)
	@touch $@

# Everything in the base is in here too.
.venv/dev.stamp: pyproject.toml constraints.txt
	@$(call install,.[dev],alignjax and what its tests need)
	@touch .venv/base.stamp $@

# Makes a sound .venv if there is none, then installs $(1), which is described as $(2).
define install
if ! $(PY) -m pip --version >/dev/null 2>&1; then \
  python=; \
  for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
      >/dev/null 2>&1; then python=$$candidate; break; fi; \
  done; \
  if [ -z "$$python" ]; then \
    found=$$("$(or $(PYTHON),python3)" --version 2>/dev/null) || found="not to be found"; \
    echo "alignjax needs Python 3.11, 3.12 or 3.13; $(or $(PYTHON),python3) is $$found." \
      "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
  fi; \
  echo "Making .venv with $$("$$python" --version) ($$(command -v "$$python"))"; \
  rm -rf .venv; \
  "$$python" -m venv .venv || { rm -rf .venv; \
    echo "No virtual environment could be made (on Debian: apt install python3-venv)." >&2; exit 1; }; \
fi; \
echo "Installing $(2) into .venv: some minutes, this once"; \
time $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '$(1)'
endef

clean:
	@rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache
