# Everything runs in .venv, which each target sets up first if requirements.lock is newer than what is installed.
ifndef PYTHON
PYTHON := $(shell command -v python3)
endif
INSTALLED := .venv/installed
INSTALLED_EXTRA := .venv/installed-extra
# The other minor release of transformers that requirements.txt allows, and the tests of what depends on it most.
PREVIOUS := 5.23.0
INSTALLED_PREVIOUS := .venv-previous/transformers-$(PREVIOUS)
TESTS_OF_PREVIOUS := $(addprefix tests/test_, cache.py clients_peft.py clients_trl_images.py exits.py generation.py generation_cells.py \
	inference_loading.py media_generation.py media_model.py modeling.py pipelines.py pipelines_writing.py requirements.py static_cache.py \
	writing.py)
TOOLS := uv==0.13.9 pip-audit==2.10.1
INSTALLED_TOOLS := .venv-tools/installed
COMPILE := .venv-tools/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --upgrade \
	--generate-hashes --custom-compile-command "make lock"
# Installs into an environment: pip, or uv where UV names it, which takes a third of the time.
install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/python -m pip install --disable-pip-version-check)
# DeepSpeed compiles its operators with the ninja it finds on the path.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help quickstart quickstart-lm speedrun extra browser test test-slow test-gpu test-previous lint format docs lock check-lock audit newest

help:
	@echo "make quickstart      set up, train a small model on pictures, sound and text, evaluate it, show it a picture, report"
	@echo "make quickstart-lm   the same with text alone"
	@echo "make speedrun        all parts of the way to a model that answers: pretraining, conversations, rewards, report, a chat"
	@echo "make test            the fast tests"
	@echo "make test-slow       the tests through the launcher, long runs, and clients of requirements-extra.lock"
	@echo "make test-gpu        the tests that need a GPU"
	@echo "make test-previous   the fast tests of model and export with transformers $(PREVIOUS), all else as in the lock"
	@echo "make lint            ruff: rules and format"
	@echo "make format          ruff: repair what can be repaired"
	@echo "make docs            docs/config.md and docs/api.md, from the code"
	@echo "make extra           install what requirements-extra.lock has beside requirements.lock"
	@echo "make browser         install Debian's chromium, which tests of the server's page need, where it is missing"
	@echo "make lock            lock the newest versions that requirements.txt and requirements-extra.txt allow"
	@echo "make check-lock      that the lock has a version of everything for each Python, without installing it"
	@echo "make audit           known vulnerabilities of what is locked"
	@echo "make newest          lint and the fast tests with the newest versions that requirements.txt allows"

define environment
@test -n "$(PYTHON)" || { echo "error: python3 is not on the path; install Python 3.11 or newer" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
		"name another: make PYTHON=python3.12" >&2; exit 1; }
$(PYTHON) -m venv $(1)
endef

# A lock has all that its packages need: pip looks for nothing beside it.
$(INSTALLED): requirements.lock
	$(call environment,.venv)
	$(call install,.venv) --no-deps -r requirements.lock
	@touch $@

$(INSTALLED_EXTRA): requirements-extra.lock $(INSTALLED)
	$(call install,.venv) --no-deps -r requirements-extra.lock
	@touch $@

# Its packages come first on the path, those of .venv after them; setuptools, which Python brings with it, is the lock's.
$(INSTALLED_PREVIOUS): $(INSTALLED)
	.venv/bin/python -m venv --clear .venv-previous
	$(call install,.venv-previous) --no-deps transformers==$(PREVIOUS)
	.venv-previous/bin/python -m pip uninstall --disable-pip-version-check --quiet --yes setuptools
	.venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-previous/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/locked.pth"
	@touch $@

$(INSTALLED_TOOLS): Makefile
	$(call environment,.venv-tools)
	$(call install,.venv-tools) $(TOOLS)
	@touch $@

quickstart: RUN ?= runs/recurrent_vlm
quickstart: $(INSTALLED)
	.venv/bin/deepspeed pretrain.py --config configs/recurrent_vlm.yaml --training.output_dir $(RUN)
	.venv/bin/python -m evaluation $(RUN) --num-steps 1 2 4 8
	.venv/bin/python -m inference.generate $(RUN) --image docs/images/scene.png --greedy
	.venv/bin/python -m evaluation.report $(RUN)

quickstart-lm: RUN ?= runs/recurrent_lm
quickstart-lm: $(INSTALLED)
	.venv/bin/deepspeed pretrain.py --config configs/recurrent_lm.yaml --training.output_dir $(RUN)
	.venv/bin/python -m evaluation $(RUN) --num-steps 1 2 4 8 16
	.venv/bin/python -m inference.generate $(RUN) --prompt "The wind" --num-steps 8
	.venv/bin/python -m evaluation.report $(RUN)

speedrun: RUN ?= runs/speedrun
speedrun: $(INSTALLED)
	.venv/bin/deepspeed pretrain.py --config configs/speedrun.yaml --training.output_dir $(RUN)/pretrained
	.venv/bin/deepspeed finetune.py --config configs/finetune_lora.yaml --training.max_steps 450 \
		--model.path $(RUN)/pretrained --training.output_dir $(RUN)/adapter
	.venv/bin/python convert.py merge $(RUN)/adapter --output $(RUN)/merged
	.venv/bin/deepspeed finetune.py --config configs/finetune_speedrun.yaml \
		--model.path $(RUN)/merged --training.output_dir $(RUN)/rewarded
	.venv/bin/python -m evaluation $(RUN)/rewarded --num-steps 1 2 4 8
	.venv/bin/python -m evaluation.report $(RUN)/rewarded
	printf '%s\n' "9-4=" /new "83-38=" /new "71-25=" | .venv/bin/python -m inference.chat $(RUN)/rewarded --greedy

extra: $(INSTALLED_EXTRA)

browser:
	command -v chromium >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends chromium)

test: $(INSTALLED)
	.venv/bin/python -m pytest -m "not slow and not gpu" $(TESTS)

test-slow: $(INSTALLED_EXTRA)
	.venv/bin/python -m pytest -m "slow and not gpu" $(TESTS)

test-gpu: $(INSTALLED)
	.venv/bin/python -m pytest -m gpu

test-previous: $(INSTALLED_PREVIOUS)
	.venv-previous/bin/python -m pytest -m "not slow and not gpu" $(TESTS_OF_PREVIOUS)

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: $(INSTALLED)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: $(INSTALLED)
	.venv/bin/python -m configs.reference

# The extras first: requirements.lock is the part of the same versions that the project itself needs.
lock: $(INSTALLED_TOOLS)
	$(COMPILE) requirements.txt requirements-extra.txt --annotation-style line --output-file requirements-extra.lock >/dev/null
	$(COMPILE) requirements.txt --constraint requirements-extra.lock --no-annotate --output-file requirements.lock >/dev/null
	$(MAKE) check-lock

check-lock: $(INSTALLED_TOOLS)
	for version in 3.11 3.12 3.13; do \
		.venv-tools/bin/uv pip compile --quiet --no-config --python-version $$version requirements-extra.lock >/dev/null \
			|| exit 1; \
	done

audit: $(INSTALLED_TOOLS)
	.venv-tools/bin/pip-audit --disable-pip --require-hashes --strict --progress-spinner off -r requirements-extra.lock

newest: export PATH := $(CURDIR)/.venv-newest/bin:$(PATH)
newest:
	$(call environment,.venv-newest)
	$(call install,.venv-newest) --upgrade --upgrade-strategy eager -r requirements.txt
	.venv-newest/bin/ruff check .
	.venv-newest/bin/ruff format --check .
	.venv-newest/bin/python -m pytest -m "not slow and not gpu"
