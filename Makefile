# llorch. The two commands to know: `make home` and `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(or $(LLORCH_CACHE),$(HOME)/.cache/llorch)
INPUTS := pyproject.toml constraints.txt
HOME_READY := $(VENV)/.home-$(shell cat $(INPUTS) | sha256sum | cut -c1-12)
DEV_READY := $(VENV)/.dev-$(shell cat $(INPUTS) | sha256sum | cut -c1-12)
PACKAGES := crds store model web operator node_agent gateway home

.PHONY: help home test smoke lint types contracts check-generate generate unit functional e2e bench-agent soak engine cluster clean

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 24

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"llorch needs Python 3.11 or newer, and $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11 …" if v < (3, 11) else 0)'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(HOME_READY): $(VENV)/pyvenv.cfg $(INPUTS)
	@test -f $(DEV_READY) || { echo "installing llorch and its engine into $(VENV)"; \
	  $(BIN)/pip install -q --disable-pip-version-check --prefer-binary --no-compile -c constraints.txt -e '.[home]'; }
	@touch $@

$(DEV_READY): $(VENV)/pyvenv.cfg $(INPUTS)
	@echo "installing llorch with its tests into $(VENV)"
	@$(BIN)/pip install -q --disable-pip-version-check --prefer-binary -c constraints.txt -e '.[dev]'
	@touch $@

home: $(HOME_READY) ## sets everything up and serves a small model on this machine, until Ctrl-C
	@exec $(BIN)/llorch home --demo

smoke: $(DEV_READY) ## the same without hands: free ports, one pool, one streamed chat, exit 0
	@$(BIN)/python tests/smoke.py

test: $(DEV_READY) ## lint, types, contracts, generated files, then unit, functional and e2e
	@$(MAKE) --no-print-directory --keep-going lint types contracts check-generate
	@$(BIN)/pytest

lint: $(DEV_READY) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .

types: $(DEV_READY) ## mypy --strict
	@$(BIN)/mypy

contracts: $(DEV_READY) ## the layers, and that core/ is pure
	@$(BIN)/lint-imports --config pyproject.toml | tail -n +1 | grep -vE '^$$' | tail -4; exit $${PIPESTATUS[0]}

generate: $(DEV_READY) ## CRDs from the models, into crds/ and the chart
	@$(BIN)/python -m llorch_api.generate crds charts/llorch/crds

check-generate: $(DEV_READY) ## fails when a generated file is stale
	@$(BIN)/python -m llorch_api.generate --check crds charts/llorch/crds

unit: $(DEV_READY) ## pure cores: seconds
	@$(BIN)/pytest -q tests/unit

functional: $(DEV_READY) ## against a real API server, llama-server and a fake NVML
	@$(BIN)/pytest -q tests/functional

e2e: $(DEV_READY) ## helm install on kind, to a streamed chat and a failover
	@$(BIN)/pytest -q tests/e2e

bench-agent: $(DEV_READY) ## what the agent costs: latency, memory, CPU, and the API server's CPU per heartbeat; a minute
	@$(BIN)/python tests/bench/agent.py

soak: $(DEV_READY) ## ten minutes of traffic against engines that are killed all the time; SECONDS=90 for less
	@$(BIN)/python tests/soak/agent.py $(or $(SECONDS),600)

engine: $(VENV)/pyvenv.cfg ## builds llama-server from the llama-cpp-python source (LLORCH_CUDA=1 for NVIDIA GPUs)
	@node_agent/build-engine.sh

cluster: ## what e2e needs: Docker, kind and its images; built where none can be pulled
	@tests/cluster/up.sh

clean: ## removes .venv and what a home left in .runtime
	rm -rf $(VENV) .runtime
