# Each target does its own set-up, in .venv. Needed: make, git, and a Python >= 3.10 with venv.
#
#   make env      .venv with torch, the stand-ins, the package (editable) and its extras
#   make test     all tests and doctests, JOBS processes, one torch thread each
#   make demo     the main example (ARGS="--steps 500" passes arguments)
#   make lint     ruff and mypy
#   make bench    the benchmarks
#   make docs     the documentation, in docs/_build/html; warnings are errors
#   make mutants  faults planted in the code one at a time, to see whether tests fail (ARGS="maps/affine.py")
#   make tutorials  the notebooks, executed (ARGS=--smoke: short runs, nothing kept)
#   make clean    remove .venv and caches
#
# Variables: PYTHON, the interpreter of .venv; TORCH, what pip is given to install torch (any build
# of it serves; pip arguments may stand there, such as --index-url of the CPU wheels); JOBS; ARGS.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: env test demo lint bench docs mutants tutorials clean

env: $(STAMP)

$(STAMP): setup.cfg pyproject.toml pyro_equiflow/version.py $(shell find stand_ins -name '*.py' -o -name '*.toml')
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "expected Python >= 3.10, found %s: name another with PYTHON=..." % sys.version.split()[0])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "python3-venv is missing: on Debian, apt-get install python3-venv" >&2; exit 1; }
	@# torch goes first: what depends on it would pull in the default build.
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet ./stand_ins/py3nj ./stand_ins/lie_learn --editable '.[plots,tutorials,docs,bench,dev]'
	$(PIP) check
	@touch $@

# One thread a process: small tensor work is many times slower where threads outnumber cores.
test bench mutants tutorials: export OMP_NUM_THREADS = 1
test: env
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

demo: env
	$(BIN)/python tutorials/karate.py $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: env
	$(BIN)/python -m sphinx -W --keep-going -n -q -d docs/_build/doctrees docs docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

mutants: env
	$(PIP) install --quiet --editable '.[mutants]'
	$(BIN)/python tests/mutants.py $(ARGS)

tutorials: env
	$(BIN)/python tutorials/run.py $(ARGS)

clean:
	rm -rf $(VENV) docs/_build docs/tutorials build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find stand_ins \( -name build -o -name '*.egg-info' \) -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
