# Everything happens in .venv, which is set up from setup.cfg, and again whenever that changes. `make help` lists the targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGED := setup.cfg pyproject.toml

.PHONY: help run test test-slow reproduce reproduce-gpu lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

run: $(VENV)/installed ## set up, then run the first study; flags by ARGS, e.g. make run ARGS="--quick"
	$(BIN)/python -m experiments.quickstart $(ARGS)

test: $(VENV)/installed-dev ## set up, then run the tests, side by side on all cores; flags for pytest by ARGS
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: $(VENV)/installed-dev ## notebooks, quick forms of studies and other long tests
	$(BIN)/python -m pytest -m slow $(ARGS) || test $$? -eq 5  # 5: no test is slow

reproduce: $(VENV)/installed ## all published results in full, as docs/results.md shows them; studies by ARGS
	$(BIN)/python -m experiments.reproduce --record docs $(ARGS)

reproduce-gpu: $(VENV)/installed-cuda ## the same on an NVIDIA GPU, with the studies that take too long on a CPU
	$(BIN)/python -m experiments.reproduce --record docs $(ARGS)

lint: $(VENV)/installed-dev ## style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/mypy fl_jax experiments

clean: ## remove .venv and what tools have cached here; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that a set-up that was interrupted is done again.
$(VENV)/installed-dev: EXTRAS := [dev,notebooks]
$(VENV)/installed-cuda: EXTRAS := [cuda]
$(VENV)/installed $(VENV)/installed-dev $(VENV)/installed-cuda: $(PACKAGED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "fl_jax needs Python 3.11 or newer, but \
	$(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1); name a newer one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) could not make a virtual \
	environment; on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) from setup.cfg (a minute or two the first time)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $(VENV)/installed $@
