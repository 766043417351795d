PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DATA_DIR ?= data
RESULTS ?= $(if $(QUICK),quick-results,results)

.PHONY: demo test lint paper figures benchmark clean

demo: $(READY)  ## Train on handwritten digits with SGD, BatchNorm and BNP (ARGS=--help explains the options).
	$(BIN)/python examples/digits.py $(ARGS)

test: $(READY)  ## Run the tests, the doctests and the code of the README (ARGS passes options to pytest).
	$(BIN)/pytest $(ARGS)

lint: $(READY)  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

paper: $(READY)  ## Run the paper's experiments on the files in DATA_DIR; QUICK=1: minutes, on data that needs none.
	$(BIN)/python examples/paper.py --data-dir $(DATA_DIR) --results $(RESULTS) $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python examples/figures.py --results $(RESULTS)

figures: $(READY)  ## Draw the figures and write the tables of the READMEs from the CSV files.
	$(BIN)/python examples/figures.py --pages README.md results/README.md

benchmark: $(READY)  ## Measure steps of SGD, BNP and its peers (ARGS=--help explains the options), and compiling them.
	PYTHONPATH=examples $(BIN)/python benchmarks/steps.py $(ARGS)
	PYTHONPATH=examples $(BIN)/python benchmarks/compilation.py
	PYTHONPATH=examples $(BIN)/python benchmarks/report.py --pages docs/performance.md

clean:  ## Remove the environment.
	rm -rf .venv

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
