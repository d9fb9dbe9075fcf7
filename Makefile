# make demo    draw images, train a small model on them and show what it learned, within five minutes on two cores
# make test    the test suite on a CPU, without what takes long, on two cores; WORKERS=4 is for four
# make long    tests of several seconds each, which `make test` leaves out
# make check   format, lint, types, tests, long ones too
# make slurm   a two-node training on a real Slurm, preempted and requeued (root, Debian's slurm-wlm and munge)
# make gpu     the tests that need CUDA, and no others
# make bench   speed and memory on this machine, into bench/results.jsonl and bench/README.md
# Each target installs what it needs into .venv with pip; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
WORKERS = 2
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SOURCES = pyproject.toml constraints.txt

# Tests start hundreds of short processes, each of which would compile the repository's modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test long lint check slurm gpu bench clean

demo: .venv/.run
	$(BIN)/python demo.py

test: .venv/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

long: .venv/.test
	$(BIN)/python -m pytest -m long -n $(WORKERS) --dist worksteal

lint: .venv/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test long

slurm: .venv/.test
	$(BIN)/python -m pytest -m slow tests/test_train_distributed.py

gpu: .venv/.test
	$(BIN)/python -m pytest -m "gpu and not (slow or network)"

bench: .venv/.run
	$(BIN)/python bench/clustering.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/predictors.py
	$(BIN)/python bench/optimizers.py
	$(BIN)/python bench/loading.py
	$(BIN)/python bench/evaluations.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/results.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python $(SOURCES)
	@echo "installing into .venv: a minute or two, about 5.5 GB with torch's CUDA libraries"
	$(INSTALL) -e .
	@touch $@

.venv/.test: .venv/.run
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/.check: .venv/.test
	$(INSTALL) -e '.[test,check]'
	@touch $@

clean:
	rm -rf .venv
