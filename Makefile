# drydock's entry points. `make help` lists them; every target bootstraps what it needs first.
.DEFAULT_GOAL := help
.PHONY: help bootstrap image-cpu image-h100 image-gb200 image-ascend smoke test lint clean

# The first Python of at least 3.11 that really starts (a version manager's shim may not).
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3.14 python3,\
  $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
ENGINE ?= vllm
VENV := .venv
BIN := $(VENV)/bin

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  \1|/' | column -t -s '|'

bootstrap: $(VENV)/.bootstrapped ## make .venv with drydock and its hash-locked tools

$(VENV)/.bootstrapped: lock/drydock.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "drydock needs Python 3.11 or newer and found none: install one, or name it with PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "drydock needs Python 3.11 or newer, $(PYTHON) is not: name another with PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make a venv: install its venv package (Debian: apt-get install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r lock/drydock.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	@touch $@

image-cpu: bootstrap ## build the image that needs no accelerator (ENGINE=vllm)
	$(BIN)/drydock build cpu-$(ENGINE)

image-h100: bootstrap ## build the image for NVIDIA H100 and H200, x86-64
	$(BIN)/drydock build h100-$(ENGINE)

image-gb200: bootstrap ## build the image for NVIDIA GB200, aarch64 (on any machine, no emulation)
	$(BIN)/drydock build gb200-$(ENGINE)

image-ascend: bootstrap ## build the image for Huawei Ascend, aarch64, over the vendor's (ENGINE=vllm: Atlas A2; vllm-a3: A3)
	$(BIN)/drydock build ascend-$(ENGINE)

smoke: bootstrap ## the main job: build the image for this machine, verify it, run its fast tiers in it
	$(BIN)/nox -s $(ENGINE)_fast -- $(ARGS)

test: bootstrap ## drydock's own tests
	$(BIN)/nox -s tests -- $(ARGS)

lint: bootstrap ## ruff, mypy, and the workflows
	$(BIN)/nox -s lint

clean: ## remove the environment and results; the store (.drydock) stays
	rm -rf $(VENV) results .nox
