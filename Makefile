# Two commands for a fresh machine:  make demo   and   make test
#
# Inside an activated virtual or conda environment its Python is used, but for conda's base;
# otherwise .venv is made here, by uv where it is installed and by python3 -m venv where it is not.

PYTHON ?= python3
# Only what holds a Python: a conda environment may hold none, and is then nothing to install into.
with_python = $(if $(wildcard $(1)/bin/python),$(1))
CONDA := $(if $(filter base,$(CONDA_DEFAULT_ENV)),,$(CONDA_PREFIX))
# .venv is relative, so that the checkout's path may hold spaces.
VENV := $(or $(call with_python,$(VIRTUAL_ENV)),$(call with_python,$(CONDA)),.venv)
PY := $(VENV)/bin/python
DEMO_DIR ?= outputs/demo
FONT := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
GROUPS := /usr/share/unicode/emoji/emoji-test.txt
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
# The environment may hold a fastldm installed from another checkout: the stamp names the last one.
STAMP := $(VENV)/.fastldm-$(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)

# A virtual environment made by uv holds no pip.
INSTALL = $$($(PY) -m pip --version >/dev/null 2>&1 \
	&& echo "$(PY) -m pip install --disable-pip-version-check" \
	|| echo "uv pip install --python $(PY)")

.PHONY: demo test sanitize bench lint format setup setup-test emoji-data clean help
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: setup emoji-data ## train both stages on emoji and write pictures to outputs/demo
	$(PY) examples/demo.py --output-dir '$(DEMO_DIR)'

test: setup-test emoji-data ## run every check and test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations=15 \
		--cov --cov-report=term:skip-covered --cov-report=xml --cov-fail-under=90 $(PYTEST_ARGS)

# A copy is built, beside which the installed extension stays as it is. vptr wants the run-time
# types of torch's classes, which its libraries keep to themselves. An error ends the process: the
# signal has Python name the test, and pytest must not keep what the sanitizer writes.
SANITIZE := -O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all
SANITIZED = CXXFLAGS='$(SANITIZE)' OMP_NUM_THREADS=2 \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=abort_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" $(PY_BELOW)
PY_BELOW = $(PY:.venv/%=../../.venv/%)
sanitize: setup-test ## C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r benchmarks csrc fastldm tests pyproject.toml setup.py LICENSE README.md build/sanitize
	rm -f build/sanitize/fastldm/*.so
	cd build/sanitize && FASTLDM_BUILD=cpp FASTLDM_CXXFLAGS='$(SANITIZE)' \
		$(PY_BELOW) setup.py build_ext --inplace
	cd build/sanitize && $(SANITIZED) -c 'from fastldm.ops import _extension as e; e.extension()'
	cd build/sanitize && $(SANITIZED) -m pytest tests/ops -p no:cacheprovider --capture=sys \
		-k 'cpp or search or device_logic' --deselect tests/ops/vector_quantize/test_memory.py

bench: setup-test ## run the benchmarks, without the slow ones (all: pytest benchmarks)
	$(PY) -m pytest benchmarks -m 'not slow' $(PYTEST_ARGS)

lint: setup-test ## ruff, mypy and import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: setup-test ## format the Python and C++ sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(INSTALL) clang-format && $(VENV)/bin/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

setup: $(STAMP)-train ## virtual environment, package and extension
setup-test: $(STAMP)-test

CHECK_VERSION := import sys; sys.exit(sys.version_info < (3, 11))

# torch first: the extension is compiled against the torch that will load it.
$(STAMP)-train $(STAMP)-test: $(STAMP)-%: $(SOURCES) | $(PY)
	@$(PY) -c '$(CHECK_VERSION)' || { \
		echo "fastldm needs Python 3.11 or newer, and $(PY) is older: make an environment with a newer one" >&2; exit 1; }
	rm -f '$(VENV)'/.fastldm-*
	$(INSTALL) 'torch>=2.11' 'setuptools>=77' 'pybind11>=2.13' ninja numpy
	$(INSTALL) --no-build-isolation -e '.[$*]'
	$(PY) -m fastldm.env
	touch $(STAMP)-train $@

$(PY):
	@if command -v uv >/dev/null 2>&1; then uv venv --allow-existing --python '>=3.11' '$(VENV)'; \
	elif ! $(PYTHON) -c '$(CHECK_VERSION)'; then \
		echo "fastldm needs Python 3.11 or newer as '$(PYTHON)'; name another with: make PYTHON=python3.12 …" >&2; exit 1; \
	else $(PYTHON) -m venv '$(VENV)' || { rm -rf '$(VENV)'; \
		echo "no virtual environment could be made; on Debian or Ubuntu first: sudo apt install python3-venv" >&2; exit 1; }; fi

# The demo's pictures: the Noto Color Emoji font and Unicode's list of emoji groups.
emoji-data:
	@if [ -n "$$FASTLDM_EMOJI_FONT" ] || { [ -f $(FONT) ] && [ -f $(GROUPS) ]; }; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then run=; elif sudo -n true 2>/dev/null; then run=sudo; else run=no; fi; \
	if [ "$$run" != no ] && command -v apt-get >/dev/null 2>&1; then \
		$$run apt-get update -q && $$run env DEBIAN_FRONTEND=noninteractive apt-get install -q -y fonts-noto-color-emoji unicode-data; \
	fi; \
	if ! { [ -f $(FONT) ] && [ -f $(GROUPS) ]; }; then \
		echo "the emoji font is missing; install it with: sudo apt install fonts-noto-color-emoji unicode-data" >&2; exit 1; \
	fi

clean: ## remove what was built, but not the virtual environment or outputs
	rm -rf build dist *.egg-info fastldm/*.so .coverage* coverage.xml .pytest_cache .mypy_cache .ruff_cache
	rm -f $(STAMP)-*
