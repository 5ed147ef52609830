# Two commands on a fresh machine: 'make demo' and 'make test'. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SETUP := $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help demo test pytest lint ruff mypy slow docs site wheel clean

help:
	@echo "make demo    time a trained model, then train, export and verify one on digits (six minutes)"
	@echo "make test    lint, type check and every test that CI runs"
	@echo "make slow    the tests that take minutes"
	@echo "make lint    ruff and mypy only"
	@echo "make docs    write docs/reference/api.md and settings.md from docstrings"
	@echo "make site    docs/ as a web site, in build/site"
	@echo "make wheel   a wheel of this checkout, in dist/"
	@echo "make clean   remove .venv and the demo's output"

demo: $(VENV)/demo.stamp
	$(BIN)/advmoe demo --out demo-out

# Types are checked beside the tests, of which at times one waits.
test: ruff
	$(MAKE) --jobs=2 mypy pytest

pytest: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile \
	    --no-loadscope-reorder

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

lint: ruff mypy

ruff: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

mypy: $(VENV)/dev.stamp
	$(BIN)/mypy

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/programs/generate.py

site: $(VENV)/dev.stamp
	$(BIN)/mkdocs build

# What an earlier build left in build/ would go into the wheel as well.
wheel: $(BIN)/python
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The extras of 'dev' include those of 'demo', so either set-up serves the demo.
$(VENV)/demo.stamp: pyproject.toml
	$(SETUP) --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml
	$(SETUP) --editable '.[dev]'
	@touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
