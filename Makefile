PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DATA_DIR ?= data
RESULTS ?= $(if $(QUICK),quick-results,experiments/results)
DIST ?= dist

.PHONY: demo test check-experiments lint docs dist check-dist paper methods optimizers figures benchmark clean

demo: $(READY)  ## Train on handwritten digits with SGD and Adam, plain and in BNP's variables, and with BatchNorm (ARGS=--help).
	$(BIN)/python experiments/digits.py $(ARGS)

test: $(READY)  ## Run the tests, the doctests and the code of the pages (ARGS passes options to pytest, say --cov).
	$(BIN)/pytest $(ARGS)

check-experiments: $(READY)  ## Test the experiments' programs, and that the pages show what their CSV files say.
	$(BIN)/pytest experiments/tests $(ARGS)

lint: $(READY)  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## Build the documentation, running its notebooks, into docs/_build/html; warnings are errors.
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . docs/_build/html

dist: $(READY)  ## Build what is published into DIST; PROJECT_URL is the repository's address, for the README's links.
	$(if $(PROJECT_URL),,$(error PROJECT_URL is missing: make dist PROJECT_URL=https://github.com/OWNER/bnp_optax))
	PROJECT_URL=$(PROJECT_URL) $(BIN)/python -m build --outdir $(DIST) .
	$(BIN)/twine check --strict $(DIST)/*

check-dist: $(READY)  ## In an environment of its own, run the README's code on the wheel alone, then tests of the sdist.
	rm -rf build && mkdir -p build/readme build/sdist
	$(MAKE) dist DIST=build/dist PROJECT_URL=https://example.org/bnp_optax
	$(PYTHON) -m venv build/venv
	wheel=$$(ls build/dist/*.whl) && build/venv/bin/python -m pip install --quiet "$$wheel[test]"
	cp README.md conftest.py build/readme && cd build/readme && ../venv/bin/pytest -c /dev/null --rootdir . --confcutdir . README.md
	tar -xf build/dist/*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && ../venv/bin/pytest README.md tests/test_linen.py tests/test_nnx.py

paper: $(READY)  ## Run the paper's experiments on the files in DATA_DIR; QUICK=1: minutes, on data that needs none.
	$(BIN)/python experiments/paper.py --data-dir $(DATA_DIR) --results $(RESULTS) $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python experiments/figures.py --results $(RESULTS)

methods: $(READY)  ## Run the experiments of the other methods on the files in DATA_DIR; QUICK=1: a short form, as above.
	$(BIN)/python experiments/methods.py --data-dir $(DATA_DIR) --results $(RESULTS) $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python experiments/methods_report.py --results $(RESULTS)

optimizers: $(READY)  ## Run the experiments with Momentum, Adam and Muon on the files in DATA_DIR; QUICK=1: a short form.
	$(BIN)/python experiments/optimizers.py --data-dir $(DATA_DIR) --results $(RESULTS) $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python experiments/optimizers_report.py --results $(RESULTS)

figures: $(READY)  ## Draw the figures and write the tables of the pages from the CSV files.
	$(BIN)/python experiments/figures.py --pages experiments/results/README.md
	$(BIN)/python experiments/methods_report.py --pages experiments/results/methods.md docs/contrib/README.md
	$(BIN)/python experiments/optimizers_report.py --pages README.md experiments/results/optimizers.md docs/migration.md docs/reinforcement_learning.md \
		docs/contrib/centred_kernels.md
	$(BIN)/python experiments/report.py --pages docs/performance.md

benchmark: $(READY)  ## Measure steps of SGD, BNP and its peers (ARGS=--help explains the options), and compiling them.
	$(BIN)/python experiments/steps.py $(ARGS)
	$(BIN)/python experiments/compilation.py
	$(BIN)/python experiments/report.py --pages docs/performance.md

clean:  ## Remove the environment, and what was built.
	rm -rf .venv build dist docs/_build

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
