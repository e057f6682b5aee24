# make demo   install moejax in .venv and generate text with 40 % of the experts on the device
# make test   install the test tools too and run every test
# make sanitize
#             run the native kernels' tests with every access to memory checked (Linux, g++)
# make lint   check formatting and style
# make experiments
#             run the experiments in their quick form into build/experiments, then a report on
#             them (under 45 minutes on 2 cores; goes on where it was stopped)
#
# PYTHON=python3.12     the interpreter for a new .venv (3.11 to 3.14)
# JOBS=2                tests that run at once; each takes up to 3 GB of memory
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                       where `make test` also looks for torch; PyPI's build for Linux is far larger

VENV ?= .venv
MODEL ?= tiny
SLOTS ?= 76
PROMPT ?= The old house stood at the end of the village, and
PYTHON ?=
JOBS ?= 2
TORCH_INDEX ?=
RECORDS ?= build/experiments

BIN := $(VENV)/bin
FIND_PYTHON = for p in $(PYTHON) python3 python python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& { echo "$$p"; break; }; done

# Copied, not linked: an editable install is shadowed in the folder that holds the clone.
SOURCES := $(shell find moejax kernels checkpoints -type f -not -name '*.pyc')

# The library is the only code so built; the interpreter and its packages are not, so leaks, which
# they have, are not reported. Nothing else is suppressed.
SANITIZE := -O1 -g -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS \
	-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
SANITIZED_TESTS := tests/test_native.py tests/test_native_rows.py tests/test_native_memory.py \
	tests/test_transport.py tests/test_link_log.py tests/test_host_experts.py

.PHONY: demo test sanitize lint experiments clean
.SILENT: $(BIN)/python

demo: $(VENV)/core
	$(BIN)/moejax generate "$(PROMPT)" --model $(MODEL) --slots $(SLOTS) \
		--max-new-tokens 120 --temperature 0.7 --seed 1

test: $(VENV)/tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The interpreter is not linked with the checks' libraries and must load them first. What they find
# goes to descriptor 2 as the process ends: pytest must not hold it.
sanitize: export MOEJAX_NATIVE_FLAGS := $(SANITIZE)
sanitize: export MOEJAX_HYPOTHESIS := quick
sanitize: export ASAN_OPTIONS := detect_leaks=0
sanitize: export UBSAN_OPTIONS := print_stacktrace=1
sanitize: $(VENV)/tests
	compiler=$$($(BIN)/python -c 'from moejax.kernels import build; print(*build.compiler())') && \
	preload= && for name in libasan.so libubsan.so libstdc++.so.6; do \
		path=$$($$compiler -print-file-name=$$name); \
		[ -f "$$path" ] || { echo "$$compiler has no $$name" >&2; exit 1; }; \
		preload="$$preload $$(realpath "$$path")"; \
	done && \
	$(BIN)/python -W error -c 'from moejax.kernels import build; print(build.build())' && \
	export LD_PRELOAD="$$preload" && \
	$(BIN)/python -c 'from moejax.kernels import build; assert build.library(), build.status()' && \
	$(BIN)/python -m pytest --capture=sys $(SANITIZED_TESTS)

lint: $(VENV)/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

experiments: $(VENV)/tests
	$(BIN)/python -m experiments.suite $(RECORDS)

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
