# virtio-bdev. `make demo` and `make test` work in a fresh clone: each sets up what it needs.

PYTHON ?= python3#  any Python from 3.11 on, to make VENV with; `make clean` before changing it
VENV   ?= .venv
ARGS   ?=#          for pytest, as in: make test ARGS="-k ring"
export CC PYTHON

PREFLIGHT   = $(PYTHON) tools/preflight.py
PIP         = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
PYTEST      = $(VENV)/bin/python -m pytest
INTERPRETED = VIRTIO_INTERPRETED=1 PYTHONPATH=$(CURDIR)/src
SANITIZED   = PYTHONMALLOC=malloc LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) \
              ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
SOURCES     = setup.py $(shell find src/virtio* -name __pycache__ -prune -o -print)# folders too: files can go

.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## this list (ARGS="-k ring" hands pytest options on)
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 25

demo: build ## read, write and verify two disks of the embedded target
	@$(VENV)/bin/virtio-bdev demo

test: test-compiled test-interpreted ## the whole suite, first compiled and then interpreted

test-compiled: peers build
	$(PYTEST) $(ARGS)

test-interpreted: build
	$(INTERPRETED) $(PYTEST) $(ARGS)

lint: build ## style, types (also of examples, against what is installed) and layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	PATH="$(VENV)/bin:$$PATH" cython-lint src
	$(VENV)/bin/mypy
	$(if $(wildcard examples/*.py),$(VENV)/bin/mypy --strict --config-file= --cache-dir=build/cache/examples examples)
	$(PYTEST) -q tests/test_layers.py

format: $(VENV)/.ready ## what lint would complain of, where a tool can mend it
	$(VENV)/bin/ruff check --fix --quiet
	$(VENV)/bin/ruff format

debug: build/checked.lock ## the suite on a build that checks every index and access
	PYTHONPATH=$(CURDIR)/build/checked/site $(PYTEST) $(ARGS)

asan: build/asan.lock ## the tests of rings and targets under the address and undefined-behaviour sanitizers
	$(SANITIZED) PYTHONPATH=$(CURDIR)/build/asan/site $(PYTEST) --capture=sys $(wildcard tests/ring tests/target) $(ARGS)

mutants: build ## each clause's one-line mutant, and whether its test kills it
	$(VENV)/bin/python tests/mutants.py $(ARGS)

bench: build ## ours beside other clients, on two cores and an idle machine (ARGS="--turns 7 vhost python")
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

reference: build ## docs/reference.md, out of the docstrings
	$(VENV)/bin/python tools/reference.py

coverage: build ## of the interpreted suite
	$(INTERPRETED) $(VENV)/bin/coverage run -m pytest $(ARGS)
	$(VENV)/bin/coverage report --skip-covered --show-missing

clean: ## all that make has made, .venv too
	rm -rf build .venv .venv-*
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help demo test test-compiled test-interpreted lint format debug asan mutants bench reference coverage clean build peers

##### How it is set up. One make at a time: a second one waits, and then finds it done.

LOCKED = @mkdir -p build && flock build/.lock $(MAKE) --silent

build: ## the package, compiled and installed in .venv (what needs it makes it)
	$(LOCKED) $(VENV)/.installed

build/%.lock:
	$(LOCKED) build/$*/.installed

peers: # says or installs what is missing; with no .venv yet, what that needs is in the same command
	@$(PREFLIGHT) $(if $(wildcard $(VENV)/.ready),,build) peers >/dev/null

# A stamp comes last, so what a failed attempt leaves behind is not taken for an environment.
$(VENV)/.ready: pyproject.toml
	@set -e; python=$$($(PREFLIGHT) build); \
	[ -e $@ ] || { echo "making $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); }
	@$(VENV)/bin/python tools/requirements.py | $(PIP) install --requirement /dev/stdin
	@touch $@

# Not editable and not in place: src is kept free of extensions, so that PYTHONPATH=src runs it interpreted.
# A stamp is as old as the start of the build: what is edited meanwhile is newer.
INSTALL = $(PIP) install --no-index --no-deps --no-build-isolation --force-reinstall

$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	@echo "installing virtio-bdev into $(VENV)"
	@touch build/.start
	@VIRTIO_BUILD=fast $(INSTALL) .
	@mv build/.start $@

build/%/.installed: $(VENV)/.ready $(SOURCES)
	@echo "building the $* set into build/$*/site"
	@touch build/.start
	@VIRTIO_BUILD=$* $(INSTALL) --upgrade --target build/$*/site .
	@mv build/.start $@
