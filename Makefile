# make help: what there is. Needs Python 3.10 or newer and nothing else; all goes into .venv.
PYTHON ?= python3
DEMO_SIZE ?= 20
# More options for pip, such as --extra-index-url with PyTorch's own index of CPU wheels.
PIP_FLAGS ?=
# More options for pytest, such as -k name.
PYTEST_FLAGS ?=

BIN := .venv/bin
DEMO_READY := .venv/.ready-demo
DEV_READY := .venv/.ready-dev
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c constraints.txt -e
# Slow tests run where CI=true.
FAST_ONLY = $(if $(filter true,$(CI)),,-m "not slow")

.DEFAULT_GOAL := help
.PHONY: help demo test lint
# Two installations into one environment at a time would break it.
.NOTPARALLEL:

help:  ## shows this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1    /p' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  DEMO_SIZE=20        records per run of the demo'
	@echo '  PYTHON=python3      the Python that .venv is made with'
	@echo '  PIP_FLAGS=          more options for pip'
	@echo '  PYTEST_FLAGS=       more options for pytest'
	@echo '  CI=true             make test runs the slow tests too'

demo: $(DEMO_READY)  ## edits both tiny backbones, on E-VQA and E-IC; results in results/demo
	@rm -rf results/demo
	@set -e; for backbone in tiny_blip2 tiny_minigpt4; do for task in vqa caption; do \
		set -x; \
		$(BIN)/python run_edit.py --hparams_dir hparams/$$backbone.yaml --task $$task \
			--size $(DEMO_SIZE) --output results/demo/$$backbone-$$task; \
		{ set +x; } 2>/dev/null; \
	done; done

test: $(DEV_READY)  ## runs the tests
	$(BIN)/python -m pytest $(FAST_ONLY) $(PYTEST_FLAGS)

lint: $(DEV_READY)  ## checks style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer; name one: make PYTHON=...")'
	$(PYTHON) -m venv .venv

$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo]'
	@touch $@

# The development tools come with all that the demo and the figures need.
$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,figures,notebooks,scale,dev]'
	@touch $@ $(DEMO_READY)
