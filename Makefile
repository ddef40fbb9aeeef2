# `make demo` and `make test` need only Linux, make and Python >= 3.11. The first call creates an environment in .venv,
# later calls reuse it. `make help` lists the targets. Set variables as in `make test VENV=/tmp/env`.

ifndef PYTHON
# The first interpreter that runs and is new enough. If there is none: `python3`, so that the error message below names it.
PYTHON := $(shell for p in python3 python3.12 python3.13 python3.11; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; \
  done; command -v python3)
endif
VENV ?= .venv
BIN := $(VENV)/bin

# The torch to install first. On a machine with an NVIDIA GPU this is the default (CUDA) build. On other machines it is the
# CPU build of one release, because the default build downloads gigabytes of CUDA libraries. For the CPU build, pip looks
# in its default index first, then in PyTorch's index.
GPU := $(shell if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then echo yes; fi)
TORCH ?= $(if $(GPU),torch>=2.11$(comma)<2.14,torch==2.13.0)
# Additional pip arguments for torch, such as `--index-url URL`. If set, pip does not search the two indexes.
PIP_TORCH_ARGS ?=
# File with the tested versions. `make CONSTRAINTS=` (empty) installs the newest versions.
CONSTRAINTS ?= constraints/newest.txt
# Number of test processes. Each runs torch on one thread, which is enough for tiny models.
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_OUTPUT ?= demo-output
DEMO_ARGS ?=
BENCH_OUTPUT ?= bench-output

comma := ,
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The stamp file marks an up-to-date environment. Its name depends on everything that decides what is installed.
KEY := $(shell (cat pyproject.toml setup.py $(CONSTRAINTS); echo '$(CURDIR) $(VENV) $(TORCH) $(PIP_TORCH_ARGS)') | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.flare-made-$(KEY)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q --progress-bar off
VERSIONS := $(BIN)/python -c 'from importlib.metadata import version as v; print(*(n + " " + v(n) for n in ("torch", "transformers", "peft")), sep=", ")'

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format types bench compile-all clean

help: ## show this list
	@echo "make demo and make test create an environment in $(VENV) and reuse it."
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 | \2/p' Makefile | awk -F'|' '{ printf "%-20s%s\n", $$1, $$2 }'
	@echo "Variables (make TARGET NAME=VALUE):"
	@echo "  PYTHON          $(PYTHON) (3.11 or newer)"
	@echo "  VENV            $(VENV)"
	@echo "  TORCH           $(TORCH) $(if $(GPU),(GPU found),(no GPU found: CPU build))"
	@echo "  PIP_TORCH_ARGS  additional pip arguments for torch, such as --index-url $(CPU_INDEX)"
	@echo "  CONSTRAINTS     file with the tested versions ($(CONSTRAINTS)); if empty, the newest versions are installed"
	@echo "  WORKERS         number of test processes ($(WORKERS))"
	@echo "  PYTEST_ARGS     additional arguments for pytest"
	@echo "  DEMO_OUTPUT     output folder of make demo ($(DEMO_OUTPUT))"
	@echo "  DEMO_ARGS       additional arguments for flare demo, such as --seeds 1"
	@echo "  BENCH_OUTPUT    output folder of make bench: rows, table and figures ($(BENCH_OUTPUT))"
	@echo "  HUB_OUTPUT      output folder of make hub-kernel ($(HUB_OUTPUT))"
	@echo "  HUB_REPO        repository on the hub for the output of make hub-kernel ($(HUB_REPO))"

env: $(STAMP) ## create the environment only

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No python3 was found. Install Python 3.11 or newer, or pass its path: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is required; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Pass another Python: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create environments (no venv or ensurepip). On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@if [ -x "$(BIN)/python" ] && "$(BIN)/python" -m pip --version >/dev/null 2>&1; then \
	  echo "==> updating $(VENV): pyproject.toml or a variable has changed"; \
	else \
	  echo "==> creating an environment in $(VENV) with $(PYTHON) (once; later calls reuse it)"; \
	  "$(PYTHON)" -m venv "$(VENV)"; fi
	@rm -f "$(VENV)"/.flare-made-*
	@if [ -n "$(GPU)$(PIP_TORCH_ARGS)" ]; then \
	  echo "==> installing $(TORCH) $(PIP_TORCH_ARGS)"; $(INSTALL) "$(TORCH)" $(PIP_TORCH_ARGS); \
	elif $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit("$(TORCH)" != "torch==" + m.version("torch").split("+")[0])' 2>/dev/null; then \
	  echo "==> $(TORCH) is already installed"; \
	else \
	  echo "==> no GPU found: installing the CPU build of $(TORCH) (make help: TORCH, PIP_TORCH_ARGS)"; \
	  $(INSTALL) "$(TORCH)+cpu" 2>/dev/null \
	  || { echo "    pip's default index has no CPU build; trying $(CPU_INDEX)"; \
	       $(INSTALL) "$(TORCH)+cpu" --extra-index-url $(CPU_INDEX) --timeout 30 --retries 1 2>/dev/null; } \
	  || { echo "    no CPU build available; installing pip's default $(TORCH), which may be large"; $(INSTALL) "$(TORCH)"; }; fi
	@echo "==> installing flare-kernels (editable) with the dependencies of its tests and demo (a few minutes)"
	@$(INSTALL) -e '.[dev]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	@touch "$(STAMP)"
	@echo "==> $(VENV) is ready: $$($(VERSIONS))"

demo: $(STAMP) ## run cross-lingual transfer on a small corpus: a table, a figure and results.json in demo-output
	@echo "==> flare demo: results are written to $(DEMO_OUTPUT)"
	@$(BIN)/flare demo --output "$(DEMO_OUTPUT)" $(DEMO_ARGS)

test: $(STAMP) ## run the test suite
	@echo "==> pytest, $(WORKERS) workers, $$($(VERSIONS))"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --durations=10 $(PYTEST_ARGS)

lint: $(STAMP) ## check rules and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## fix and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check types with mypy
	$(BIN)/mypy

bench: $(STAMP) ## run the benchmarks: real model sizes on a GPU, small models on a CPU (four minutes)
	@echo "==> pytest benchmarks/: rows are written to $(BENCH_OUTPUT)"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest benchmarks/ -q --benchmark-columns=median,iqr,rounds \
	  --results "$(BENCH_OUTPUT)/results.json" $(PYTEST_ARGS)
	@$(BIN)/python benchmarks/plot.py "$(BENCH_OUTPUT)/results.json" --output "$(BENCH_OUTPUT)"

compile-all: $(STAMP) ## compile every kernel configuration for every GPU generation (no GPU needed)
	$(BIN)/python -m flare_kernels.aot --all

HUB_OUTPUT ?= hub-kernel
HUB_REPO ?= local/flare-kernels
.PHONY: hub-kernel
hub-kernel: ## write the kernels as a package for the Hugging Face kernels hub (docs/kernels-hub.md)
	@"$(PYTHON)" tools/build_hub_kernel.py "$(HUB_OUTPUT)" --repo-id "$(HUB_REPO)"

clean: ## remove environments, caches, build folders, demo-output, bench-output and hub-kernel
	@for v in .venv .venv-oldest "$(VENV)"; do if ls "$$v"/.flare-made-* >/dev/null 2>&1; then echo "removing $$v"; rm -rf "$$v"; fi; done
	@rm -rf build dist flare_kernels.egg-info demo-output bench-output hub-kernel .pytest_cache .mypy_cache .ruff_cache .benchmarks
	@for d in flare flare_kernels tests benchmarks; do if [ -d $$d ]; then find $$d -name __pycache__ -type d -prune -exec rm -rf {} +; fi; done
