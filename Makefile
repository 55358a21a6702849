# make compare: the main job on the embedded digits. make test: lint, type-check, test.
# make bench: every speed that the library promises, as ratios; needs MNIST (ROOT).
# make verify: what the library promises, measured whole; needs MNIST (ROOT) and, if it is there, its VAE (RUN).
# All create the environment first if it is not there.
PYTHON ?= python3
VENV ?= .venv
UVFLAGS ?=
ROOT ?= data
JOBS ?= 2
RUN ?= runs/mnist/vae
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := benchmarks/.peers
INSTALL := -c requirements.txt -e '.[test]'

.PHONY: install compare bench verify notebooks test lint types unit requirements clean

install: $(STAMP)

compare: $(STAMP)
	$(BIN)/pyro-vae compare --data digits --estimator multilevel --proposal refined --out runs/digits --resume

# What the benchmarks compare with lies in a folder of its own, which only they see.
bench: $(PEERS)/.installed
	$(BIN)/python benchmarks/bench.py --root $(ROOT)

$(PEERS)/.installed: benchmarks/requirements.txt $(STAMP)
	rm -rf $(PEERS)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(PEERS) -r benchmarks/requirements.txt
	touch $@

verify: $(STAMP)
	$(BIN)/python tests/verify.py --root $(ROOT) --run $(RUN) --out docs/verification.md

# The notebooks, whole and executed, as runs/notebooks/*.ipynb.
notebooks: $(STAMP)
	$(BIN)/python tests/run_notebooks.py --out runs/notebooks

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# One thread for each of the processes that share the files: most tests are too small for more.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

# uv leaves the bytecode to the first import; with PYTHONDONTWRITEBYTECODE set, every process would compile it again.
$(STAMP): pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv \
		&& $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(UVFLAGS) $(INSTALL) \
		|| $(BIN)/python -m pip install -q --disable-pip-version-check $(INSTALL)
	touch $@

requirements: $(STAMP)
	$(BIN)/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate -o requirements.txt

clean:
	rm -rf $(VENV) $(PEERS) runs .pytest_cache .mypy_cache .ruff_cache
