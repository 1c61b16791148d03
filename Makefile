# Everything is done inside .venv, which each target makes when it is not there.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
NAME   ?= demo-$(shell date +%Y%m%d-%H%M%S)
ARGS   ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test setup lint format types docs bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*  ## ' Makefile | sed -E 's/:[^#]*  ## /\t/' | expand -t 12
	@echo
	@echo 'make demo ARGS="trainer.max_steps=100"   passes settings on; make test ARGS="-k masks" too.'

demo: .venv/.demo  ## pretrain a small 2:4 GPT on real text, with curves and a sample (minutes, no GPU needed)
	$(BIN)/python training/run.py experiment=demo name=$(NAME) $(ARGS)

# One thread per worker: two workers with two threads each would fight over two cores.
test: .venv/.dev  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

setup: .venv/.dev  ## install all that development needs into .venv

lint: .venv/.dev  ## check style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev  ## rewrite the code in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.dev  ## check types (mypy)
	$(BIN)/mypy

docs: .venv/.dev  ## bring the line numbers in README.md and docs/ up to date
	$(BIN)/python docs/lines.py

bench: .venv/.demo  ## measure a sparse against a dense training step, and the program's overhead
	$(BIN)/python benchmarks/cpu_step.py --output logs/cpu_step $(ARGS)
	$(BIN)/python benchmarks/program_overhead.py --output logs/program_overhead

clean:  ## remove .venv and caches; runs (logs/, checkpoints/) and token caches stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

# --- set-up; each file is made once and again when what it needs changes ----------------------

# Some systems ship venv without its own pip: then the system's pip fills it.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older; type: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv" && { \
		$(PYTHON) -m venv .venv >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip .venv && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --quiet pip; }; }; }
	@touch $@

# torch first and by itself, so that no other package chooses its version; one that is there stays.
.venv/.torch: .venv/.python
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || \
		{ echo "installing $(TORCH)"; $(PIP) $(TORCH); }
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml $(CONSTRAINTS)
	@echo "installing slope-llm[demo]"
	@$(PIP) -c $(CONSTRAINTS) -e '.[demo]'
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml $(CONSTRAINTS)
	@echo "installing slope-llm[dev]"
	@$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@ .venv/.demo
