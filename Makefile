# make compare: the main job on the embedded digits. make test: lint, type-check, test.
# Both create the environment first if it is not there.
PYTHON ?= python3
VENV ?= .venv
UVFLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := -c requirements.txt -e '.[test]'

.PHONY: install compare test lint types unit requirements clean

install: $(STAMP)

compare: $(STAMP)
	$(BIN)/pyro-vae compare --data digits --out runs/digits --resume

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest

$(STAMP): pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv \
		&& $(BIN)/uv pip install -q --python $(BIN)/python $(UVFLAGS) $(INSTALL) \
		|| $(BIN)/python -m pip install -q --disable-pip-version-check $(INSTALL)
	touch $@

requirements: $(STAMP)
	$(BIN)/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate -o requirements.txt

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
