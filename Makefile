# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-data test-slow test-parity lint clean

quickstart: $(VENV)/.installed
	$(BIN)/jaxlm quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

# Tests of what needs the extras data, ja and sp, in a folder of their own: 1.5 GB.
test-data: $(VENV)-data/.installed
	$(VENV)-data/bin/python -m pytest -m "not slow" tests/test_clean.py tests/test_sources.py \
		tests/test_tokenizer.py tests/test_data_command.py $(ARGS)

$(VENV)-data/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-data
	$(VENV)-data/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[data,ja,sp]' pytest hypothesis
	touch $@

test-slow: $(VENV)/.installed-dev
	JAXLM_TESTS_XLA= $(BIN)/python -m pytest -m slow $(ARGS)

test-parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest tests/test_parity.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxlm needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[parity]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-data
