# make chat    set up .venv and chat with the bundled model in the terminal
# make serve   set up .venv and serve the bundled model: OpenAI's protocol, and a page at http://127.0.0.1:8000
# make test    set up .venv and run every check: ruff, mypy, pytest
# make lint    ruff and mypy alone
# make clean   remove .venv, caches and build outputs
#
# Needs Python 3.11 or newer with its venv module; PYTHON=... chooses one. Nothing outside .venv is changed.

ifndef PYTHON
PYTHON := $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),--quiet --progress-bar off)

.DEFAULT_GOAL := help
.PHONY: help chat serve test lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The stamps live in the environment, so that they go when it goes. A stamp is older than a changed pyproject.toml.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "OpenGLM needs Python 3.11 or newer with venv: install it (on Debian and Ubuntu: apt install python3-venv), or say where it is: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "make: creating $(VENV) with $$($(PYTHON) --version)" >&2
	@$(PYTHON) -m venv $(VENV)

# The native kernels want a C++ compiler. Without one, and without the rights to install it, PyTorch's operators serve.
CSRC := $(wildcard openglm/ops/csrc/*) openglm/ops/build.py hatch_build.py
COMPILER := command -v c++ >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
	apt-get -qq update >/dev/null && apt-get -qq install -y g++ >/dev/null; } || true

# The sandbox of the agent's Python tool is bubblewrap's. Without it a container engine serves, or the tool is refused.
SANDBOX := [ "$$(uname)" != Linux ] || command -v bwrap >/dev/null || { command -v apt-get >/dev/null && \
	[ "$$(id -u)" = 0 ] && apt-get -qq update >/dev/null && apt-get -qq install -y bubblewrap >/dev/null; } || true

# The tests of the chat page want a browser; where there is none they are skipped.
BROWSER := command -v chromium >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
	apt-get -qq update >/dev/null && apt-get -qq install -y --no-install-recommends chromium fonts-noto-cjk >/dev/null; } || true

# The kernels of 64-bit ARM are tested on other machines too, under an emulator; else those tests are skipped.
ARM := [ "$$(uname -m)" != x86_64 ] || { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || { \
	command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get -qq update >/dev/null && \
	apt-get -qq install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user >/dev/null; } || true

$(VENV)/.installed: pyproject.toml $(CSRC) | $(BIN)/python
	@$(COMPILER)
	@$(SANDBOX)
	@echo "make: installing OpenGLM and PyTorch into $(VENV); the first time this takes some minutes" >&2
	@$(PIP_INSTALL) -e '.[chat,serve,grammar]'
	@touch $@

$(VENV)/.installed-tests: pyproject.toml $(CSRC) | $(BIN)/python
	@$(COMPILER)
	@$(SANDBOX)
	@$(BROWSER)
	@$(ARM)
	@echo "make: installing OpenGLM, PyTorch and the test tools into $(VENV); the first time this takes some minutes" >&2
	@$(PIP_INSTALL) -e '.[test,dev]'
	@touch $@ $(VENV)/.installed

chat: $(VENV)/.installed
	@$(BIN)/openglm chat

serve: $(VENV)/.installed
	@$(BIN)/openglm serve

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread for each of the JOBS processes: tiny tensors gain nothing from more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find openglm tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
