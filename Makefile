# One command each: `make repro` runs the experiment, `make test` the tests. `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help env repro test nightly serve-test check ui clean system lock

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.complete
UV := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
export PATH := $(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
# Without bytecode every worker compiles some 2,000 modules of torch and transformers anew: ten seconds of CPU each.
export PYTHONDONTWRITEBYTECODE :=

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1 \2/p' $(MAKEFILE_LIST) | while read name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

env: $(STAMP)  ## make the environment in .venv, from requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@for python in python3.11 python3.12 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "ocvtp needs Python 3.11 or newer; none was found" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || $$found -m venv $(VENV); \
	[ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	$(BIN)/uv pip sync --quiet --compile-bytecode requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

repro: $(STAMP)  ## run the whole experiment (dvc repro)
	dvc repro

system:  # what Debian must provide for all tests; needs root
	@scripts/system-packages

# Two files at once, but for tests that wait for jobs, daemons and browsers.
ALONE := tests/cluster tests/integration
test: $(STAMP) system  ## run the tests
	@failed=; OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile $(ALONE:%=--ignore=%) || failed=1; \
	pytest $(ALONE) || failed=1; [ -z "$$failed" ]

nightly: $(STAMP) system  ## run the tests that take minutes each
	pytest -m nightly

# vLLM in an environment of its own (6 GB); where it cannot be made, nothing is proven, and make says so and fails.
VLLM := .vllm-env
serve-test: $(STAMP)  ## run the tests on a real vLLM, in an environment of its own
	@[ -e $(VLLM)/.complete ] && [ ! requirements-vllm.lock -nt $(VLLM)/.complete ] \
	|| { $(BIN)/uv venv --quiet --clear --python 3.11 $(VLLM) \
	  && $(BIN)/uv pip install --quiet --python $(VLLM)/bin/python --no-deps -r requirements-vllm.lock \
	  && $(BIN)/uv pip install --quiet --python $(VLLM)/bin/python --no-deps --editable . \
	  && touch $(VLLM)/.complete; } \
	|| { echo "NOT PROVEN: vLLM could not be installed in $(VLLM), see above" >&2; rm -rf $(VLLM); exit 1; }
	pytest -m nightly tests/serving

check: $(STAMP)  ## all that CI asks: format, lint, types, import contracts, tests
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	@$(MAKE) --no-print-directory test

ui: $(STAMP)  ## open the MLflow UI on http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

lock:  # pin every package anew
	uv pip compile --quiet --universal --no-header --python-version 3.11 --extra dev --upgrade pyproject.toml -o requirements.lock

clean:  ## remove results and caches; the environment and the store of finished tasks stay
	rm -rf data models results reports dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
