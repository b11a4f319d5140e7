# What a developer types. Every target first sets up what it needs in $(VENV); the second time that takes no time.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= 2.13.0
CUDA_TORCH ?= 2.11.0
ARGS ?=
OUT ?= gpu-results

PY := $(VENV)/bin/python
CPP_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# TORCH=... in so many words replaces a torch that is already there; the default does not.
TORCH_CHOICE := $(if $(filter file,$(origin TORCH)),default,explicit)
# Set up again when what the extension is built from has changed, torch included. The name tells checkouts and choices of torch
# apart, and only the last one set up in an environment has a stamp.
CHECKOUT := $(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.pycoll-$(CHECKOUT)-$(TORCH)
INPUTS := pyproject.toml setup.py pycoll/version.py $(wildcard build_support/*.py) $(shell find csrc -type f) \
          $(wildcard $(VENV)/lib/python3*/site-packages/torch/version.py)

.PHONY: help setup train test lint format bench cuda-check cuda-link gpu clean

help:  ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'VENV=DIR            an environment that is there already (default .venv, made when missing)'
	@echo 'TORCH=X.Y.Z         the torch to install (default $(TORCH); without TORCH= one that is there already is kept)'
	@echo 'CUDA_TORCH=X.Y.Z    the torch that cuda-link links with, under build/ (default $(CUDA_TORCH))'
	@echo 'PYTHON=...          the Python that makes .venv, and that cuda-link and gpu build with (default python3)'
	@echo 'ARGS="..."          passed on to pycoll train, pytest or pycoll bench'

setup: $(STAMP)  ## build and install pycoll in $(VENV)

$(STAMP): $(INPUTS)
	@test -x $(PY) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) cannot make a virtual \
	environment with pip in it: install that part of Python (Debian, Ubuntu: apt install python3-venv), or name an \
	environment that is there with VENV=DIR' >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pycoll needs Python 3.10 or newer: name one with PYTHON=, $(PYTHON) is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pycoll needs Python 3.10 or newer, $(PY) is " + sys.version)'
	@$(PY) -m pip --version >/dev/null || { echo '$(VENV) has no pip: $(PY) -m ensurepip' >&2; exit 1; }
	$(PY) -m pip install --quiet 'pip>=21.3'
	@torch=$$($(PY) build_support/pycoll_torch.py $(TORCH) $(TORCH_CHOICE)) || exit 1; \
	if test -n "$$torch"; then echo "$(PY) -m pip install $$torch"; $(PY) -m pip install "$$torch"; fi
	$(PY) -m pip install --editable '.[dev]'
	@$(PY) -c 'from pycoll import _build; print(_build.summary())'
	@rm -f $(VENV)/.pycoll-*
	@touch $@

train: $(STAMP)  ## train a GPT on two processes whose gradients travel through pycoll
	$(VENV)/bin/pycoll train $(ARGS)

test: lint  ## lint, then every test
	$(PY) -m pytest $(ARGS)

lint: $(STAMP)  ## ruff, clang-format and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	$(PY) -m mypy

format: $(STAMP)  ## lay the sources out as lint wants them
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CPP_FILES)

bench: $(STAMP)  ## time pycoll beside Gloo, MPI and the machine's ceiling
	$(VENV)/bin/pycoll bench all-reduce $(ARGS)

cuda-check:  ## compile the kernels for sm_80 to sm_120, where there is nvcc; no GPU needed
	@$(PYTHON) build_support/pycoll_cuda.py

cuda-link:  ## build all of pycoll with CUDA, where there is nvcc, link it with a CUDA torch, test it on fake GPUs; no GPU needed
	@$(PYTHON) build_support/pycoll_cuda_link.py $(CUDA_TORCH)

gpu:  ## where there is a GPU: build for it with the torch that is there, test, benchmark, in 10 minutes; results in OUT=
	@$(PYTHON) build_support/pycoll_gpu.py $(OUT)

clean:  ## remove what was built, not $(VENV)
	rm -rf build dist *.egg-info pycoll/_C*.so pycoll/_C*.json .mypy_cache .pytest_cache .ruff_cache
	find pycoll benchmarks build_support tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.pycoll-*
