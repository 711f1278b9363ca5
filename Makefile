# Everything runs in .venv, which each target sets up first if requirements.txt is newer than what is installed.
ifndef PYTHON
PYTHON := $(shell command -v python3)
endif
INSTALLED := .venv/installed
# DeepSpeed compiles its operators with the ninja it finds on the path.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help quickstart quickstart-lm test test-slow test-gpu lint format docs

help:
	@echo "make quickstart      set up, train a small model on pictures, sound and text, evaluate it, show it a picture"
	@echo "make quickstart-lm   the same with text alone"
	@echo "make test            the fast tests"
	@echo "make test-slow       the tests through the launcher, and long runs"
	@echo "make test-gpu        the tests that need a GPU"
	@echo "make lint            ruff: rules and format"
	@echo "make format          ruff: repair what can be repaired"
	@echo "make docs            docs/config.md, from the configuration classes"

$(INSTALLED): requirements.txt
	@test -n "$(PYTHON)" || { echo "error: python3 is not on the path; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
			"name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

quickstart: RUN ?= runs/recurrent_vlm
quickstart: $(INSTALLED)
	.venv/bin/deepspeed pretrain.py --config configs/recurrent_vlm.yaml --training.output_dir $(RUN)
	.venv/bin/python evaluate.py $(RUN) --num-steps 1 2 4 8
	.venv/bin/python -m inference.generate $(RUN) --image docs/images/scene.png --greedy

quickstart-lm: RUN ?= runs/recurrent_lm
quickstart-lm: $(INSTALLED)
	.venv/bin/deepspeed pretrain.py --config configs/recurrent_lm.yaml --training.output_dir $(RUN)
	.venv/bin/python evaluate.py $(RUN) --num-steps 1 2 4 8 16
	.venv/bin/python -m inference.generate $(RUN) --prompt "The wind" --num-steps 8

test: $(INSTALLED)
	.venv/bin/python -m pytest -m "not slow and not gpu"

test-slow: $(INSTALLED)
	.venv/bin/python -m pytest -m "slow and not gpu"

test-gpu: $(INSTALLED)
	.venv/bin/python -m pytest -m gpu

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: $(INSTALLED)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: $(INSTALLED)
	.venv/bin/python -m configs.reference
