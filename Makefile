PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint clean

demo: $(READY)  ## Train on handwritten digits with SGD, BatchNorm and BNP (ARGS=--help explains the options).
	$(BIN)/python examples/digits.py $(ARGS)

test: $(READY)  ## Run the tests, the doctests and the code of the README (ARGS passes options to pytest).
	$(BIN)/pytest $(ARGS)

lint: $(READY)  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the environment.
	rm -rf .venv

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
