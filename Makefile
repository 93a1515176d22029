# Every target that needs Python makes .venv first, with the interpreter PYTHON, and again when that
# interpreter or pyproject.toml changes.
PYTHON ?= python3

VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
STAMP := .venv/installed-$(VERSION)
RUN := .venv/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-newest fuzz lint format check bench peers clean

help: ## list the targets
	@echo 'make TARGET [PYTHON=python3.13]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train a classifier of handwritten digits with Newton steps
	@$(RUN) examples.digits

test: $(STAMP) ## run the tests and the examples in the docstrings
	$(RUN) pytest -n 2

test-slow: $(STAMP) ## run the tests that take long: many devices, several processes
	$(RUN) pytest -n 2 -m slow

# The newest Python that is installed, on the path or by pyenv; none is no error.
NEWEST ?= $(firstword $(foreach n,15 14 13,$(if $(shell python3.$n -c 1 2>/dev/null && echo x),python3.$n)) \
  $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[3-9]*/bin/python))))

SMOKE := curvature tests/test_architecture.py tests/test_readme.py tests/transforms/test_hessian.py \
  tests/transforms/test_soundness.py tests/linalg/test_cg.py tests/optimizers/test_methods.py

test-newest: ## run the docstrings and a few tests on the newest Python and JAX, in .venv-newest; NEWEST=python3.14
	@if test -z '$(NEWEST)'; then echo 'No Python newer than 3.12 is installed: nothing to run.'; else \
	  test -e .venv-newest || $(NEWEST) -m venv .venv-newest; \
	  .venv-newest/bin/python -m pip install -qq -U -e '.[examples,test]' && .venv-newest/bin/python -m pytest -n 2 $(SMOKE); fi

fuzz: $(STAMP) ## try random programs against plain JAX, SEEDS=0:5000, or KIND=graphs; one that fails is printed, made small
	@$(RUN) tests.fuzz $(or $(SEEDS),0:300) $(KIND)

lint: $(STAMP) ## check style, format, types and spelling
	$(RUN) ruff check
	$(RUN) ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) pyright
	.venv/bin/typos

format: $(STAMP) ## format the code and fix what can be fixed
	$(RUN) ruff check --fix
	$(RUN) ruff format

check: lint test ## lint, then test: what every commit passes

bench: $(STAMP) | .venv/peers ## race every library; BENCH="--quick --suite modes" passes options
	@$(RUN) benchmarks $(BENCH)

peers: $(STAMP) ## install the large libraries that bench compares with (0.5 GB; make bench does it once)
	@rm -f .venv/peers
	@$(MAKE) --no-print-directory .venv/peers

clean: ## remove .venv, caches and build products
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each by itself: a library that cannot be installed is absent from the report, and keeps no other out of it. Builds
# for the CPU come first, since those that the index offers to Linux bring gigabytes of CUDA along. curvlinops needs
# torchvision, which would replace torch by one that fits it: the two are chosen together.
CPU_TORCH := --retries 1 --timeout 20 --index-url https://download.pytorch.org/whl/cpu
.venv/peers: | $(STAMP)
	@echo 'Installing the libraries to compare with, about 0.5 GB to download; without builds for the CPU alone, 4 GB.'
	@install() { $(RUN) pip install -q --disable-pip-version-check "$$@"; }; \
	absent() { echo "$$1 could not be installed: the report will have it as absent. make peers tries again."; }; \
	install $(CPU_TORCH) torch torchvision 2>/dev/null || install torch torchvision || absent torch; \
	install tensorflow-cpu 2>/dev/null || install tensorflow || absent tensorflow; \
	$(RUN) pip show -qq torch && { install curvlinops-for-pytorch || absent curvlinops-for-pytorch; }; \
	install sif2jax || absent sif2jax
	@touch $@

# The stamp goes before the installation starts and comes back when it has succeeded. An environment that
# has one is only brought up to date; any other is made anew.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'curvature needs Python 3.11 or newer; PYTHON=$(PYTHON) is $(or $(VERSION),no Python at all).' \
	    'Name another one, for example: make test PYTHON=python3.13' >&2; exit 1; }
	@echo 'Installing curvature and its tools into .venv with Python $(VERSION); the first time takes a minute or more.'
	@test -e $@ || { rm -f .venv/installed-*; $(PYTHON) -m venv --clear .venv; }
	@rm -f $@
	@$(RUN) pip install -qq -e '.[examples,test,lint,bench]'
	@touch $@
