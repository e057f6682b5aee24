# make demo   install moejax in .venv and generate text with 40 % of the experts on the device
# make test   install the test tools too and run every test
# make lint   check formatting and style
#
# PYTHON=python3.12     the interpreter for a new .venv (3.11 to 3.14)
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                       where `make test` also looks for torch; PyPI's build for Linux is far larger

VENV ?= .venv
MODEL ?= tiny
SLOTS ?= 76
PROMPT ?= The old house stood at the end of the village, and
PYTHON ?=
TORCH_INDEX ?=

BIN := $(VENV)/bin
FIND_PYTHON = for p in $(PYTHON) python3 python python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& { echo "$$p"; break; }; done

# Copied, not linked: an editable install is shadowed in the folder that holds the clone.
SOURCES := $(shell find moejax kernels checkpoints -type f -not -name '*.pyc')

.PHONY: demo test lint clean
.SILENT: $(BIN)/python

demo: $(VENV)/core
	$(BIN)/moejax generate "$(PROMPT)" --model $(MODEL) --slots $(SLOTS) \
		--max-new-tokens 120 --temperature 0.7 --seed 1

test: $(VENV)/tests
	$(BIN)/python -m pytest

lint: $(VENV)/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/core: pyproject.toml $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install .
	@touch $@

$(VENV)/tests: pyproject.toml | $(BIN)/python
	@[ -n "$(TORCH_INDEX)" ] || echo "# torch comes from pip's usual index; to take the smaller build" \
		"for CPUs: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	$(BIN)/python -m pip install --quiet --editable '.[test]' \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@ $(VENV)/core

$(BIN)/python:
	python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "moejax needs Python 3.11 to 3.14, and none was found on PATH." >&2; \
		echo "Install one, or name it: make demo PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "$$python -m venv $(VENV)"; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "The venv module does not work here (Debian, Ubuntu: apt install python3-venv)." >&2; \
		exit 1; }

clean:
	rm -rf $(VENV) $(VENV)-newest build dist *.egg-info
