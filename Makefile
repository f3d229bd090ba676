# make help: what there is. Needs Python 3.10 or newer and nothing else; all goes into .venv.
PYTHON ?= python3
DEMO_SIZE ?= 20
# More options for pip, such as --extra-index-url with PyTorch's own index of CPU wheels.
PIP_FLAGS ?=
# More options for pytest, such as -k name.
PYTEST_FLAGS ?=

BIN := .venv/bin
DEMO_READY := .venv/.ready-demo
# What a former demo left of its runs: it is replaced, and nothing else is.
RUN_FILES := manifest.json records.jsonl summary.json
DEV_READY := .venv/.ready-dev
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt -e
LAVIS := .venv-lavis/bin/python
LAVIS_READY := .venv-lavis/.ready
PAGE := .venv-page/bin/python
PAGE_READY := .venv-page/.ready
# Tests run in parallel, one thread each: toy models gain nothing from a second thread. WORKERS=0: one process.
WORKERS ?= logical
PARALLEL = -n $(WORKERS) --maxprocesses=8 --dist=worksteal
# Slow tests run where CI=true.
FAST_ONLY = $(if $(filter true,$(CI)),,-m "not slow")

.DEFAULT_GOAL := help
.PHONY: help demo demo-page test lint test-lavis test-page
# Two installations into one environment at a time would break it.
.NOTPARALLEL:

help:  ## shows this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1    /p' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  DEMO_SIZE=20        records per run of the demo'
	@echo '  PYTHON=python3      the Python that .venv is made with'
	@echo '  PIP_FLAGS=          more options for pip'
	@echo '  PYTEST_FLAGS=       more options for pytest'
	@echo '  WORKERS=logical     test processes; 0: one process, in which --pdb works'
	@echo '  CI=true             make test runs the slow tests too'

demo: $(DEMO_READY)  ## edits both toy models by UniKE + scope gate, then compares methods; results in results/demo
	@set -e; for backbone in tiny_blip2 tiny_minigpt4; do for task in vqa caption; do \
		run=results/demo/$$backbone-$$task; \
		rm -f $(RUN_FILES:%=$$run/%); \
		set -x; \
		$(BIN)/unike edit --hparams scoped/$$backbone --task $$task --size $(DEMO_SIZE) --output $$run; \
		{ set +x; } 2>/dev/null; \
	done; done
	@rm -f $(foreach method,ft paper_preset gate,$(RUN_FILES:%=results/demo/methods/$(method)/%))
	$(BIN)/unike demo --size $$(( $(DEMO_SIZE) < 20 ? $(DEMO_SIZE) : 20 )) --output results/demo/methods
	@echo 'All of it is installed in .venv; to go on: source .venv/bin/activate'

demo-page: $(PAGE_READY)  ## serves a page to try editing, on this computer only
	$(PAGE) -m unike.demo

test: $(DEV_READY)  ## runs the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(FAST_ONLY) $(PYTEST_FLAGS)

test-lavis: $(LAVIS_READY) $(DEV_READY)  ## tests `backend: lavis` in an environment of its own, .venv-lavis (6 GB); not in CI
	OMP_NUM_THREADS=1 $(LAVIS) -m pytest -m "not slow" $(PYTEST_FLAGS) tests/test_lavis.py tests/test_backbones.py tests/test_methods.py

test-page: $(PAGE_READY)  ## tests that page, in a browser where there is one; not in CI
	$(PAGE) -m pytest $(PYTEST_FLAGS) tests/test_demo.py tests/test_demo_page.py

lint: $(DEV_READY)  ## checks style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python $(PAGE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer; name one: make PYTHON=...")'
	$(PYTHON) -m venv $(@:/bin/python=)

$(LAVIS):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12) and "LAVIS needs Python 3.10 or 3.11; name one: make PYTHON=...")'
	$(PYTHON) -m venv .venv-lavis

$(LAVIS_READY): requirements-lavis.txt | $(LAVIS)
	$(LAVIS) -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -r requirements-lavis.txt $(shell grep ^pytest constraints.txt)
	$(LAVIS) -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

# An environment of its own: Gradio does not take the Pillow that all else is tested with.
$(PAGE_READY): pyproject.toml constraints.txt | $(PAGE)
	sed 's/^pillow==[0-9.]*/pillow==12.3.0/' constraints.txt > .venv-page/constraints.txt
	$(PAGE) -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c .venv-page/constraints.txt -e '.[demo,page,browser,dev]'
	@touch $@

$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo]'
	@touch $@

# The development tools come with all that the demo and the figures need.
$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,figures,notebooks,scale,logging,browser,docs,dev]'
	@touch $@ $(DEMO_READY)
