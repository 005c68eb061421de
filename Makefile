# turbolm: `make chat` talks to a model, `make test` checks everything, `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp)

export PROMPT MODEL

.PHONY: help chat ui test test-browser lint bench doctor clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

chat: $(VENV)/.installed  ## chat with MODEL (default: a small one, fetched once); PROMPT="..." asks one question
	@$(BIN)/turbolm chat $${MODEL:+"$$MODEL"} $${PROMPT:+--prompt "$$PROMPT"}

ui: $(VENV)/.ui-installed  ## chat with MODEL (or a server's http:// address) in the browser
	@$(BIN)/turbolm ui $${MODEL:+"$$MODEL"} $(ARGS)

test: $(VENV)/.test-installed  ## run every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-browser: $(VENV)/.test-installed  ## the chat page in headless Chromium, which has to be there already
	$(PIP_INSTALL) 'playwright>=1.50'
	$(BIN)/python -m pytest tests/ui/browser_chat.py $(ARGS)

lint: $(VENV)/.lint-installed  ## ruff, and mypy --strict on the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## time this machine: tokens per second of MODEL at several batch sizes
	@$(BIN)/turbolm bench throughput $${MODEL:-smollm2-135m} $(ARGS)

doctor: $(VENV)/.installed  ## what turbolm finds on this machine, and what it would use
	@$(BIN)/turbolm doctor

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info turbolm/ops/cpu/*.so

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"turbolm needs Python 3.10 to 3.13, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=python3.X")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "can't make $(VENV): is Python's venv module installed (Debian, Ubuntu: apt install python3-venv)?"; exit 1; }

$(VENV)/.installed: $(VENV)/bin/pip $(SOURCES)
	@echo "installing turbolm and what it needs into $(VENV) (once)" >&2
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.ui-installed: $(VENV)/.installed
	@$(PIP_INSTALL) --editable '.[ui]'
	@touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.lint-installed: $(VENV)/.test-installed
	@$(PIP_INSTALL) --editable '.[test,lint]'
	@touch $@
