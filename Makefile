# The two commands: `make bench` (the main job) and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV   ?= .venv
# CI pins the torch it tests; any torch >= 2.8 works: `make test TORCH=torch`.
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q

# Where there is a compiler for a CPU that the kernels serve, a failed native build is an error, not a note.
REQUIRE_NATIVE ?= $(if $(filter x86_64 amd64,$(shell uname -m)),$(if $(shell command -v $${CXX:-c++}),1))
INSTALL := LORA_FUSED_REQUIRE_NATIVE=$(REQUIRE_NATIVE) $(PIP) install --no-build-isolation -e

NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: bench bench-full test test-full test-peft format lint clean

bench: $(VENV)/.bench
	$(PY) -m benchmarks --quick

bench-full: $(VENV)/.bench
	$(PY) -m benchmarks --full

test: $(VENV)/.test
	$(PY) -m pytest

test-full: $(VENV)/.test
	$(PY) -m pytest -m "full or not full"

test-peft: $(VENV)/.peft
	$(PY) tests/peft_suite.py

format: $(VENV)/.dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(VENV)/bin/clang-format -i

lint: $(VENV)/.dev $(VENV)/.test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run --Werror

$(VENV)/.installed: $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja numpy
	$(INSTALL) .
	touch $@

$(VENV)/.test: $(VENV)/.bench
	$(INSTALL) ".[test]"
	touch $@

$(VENV)/.peft: $(VENV)/.test
	$(INSTALL) ".[peft-suite]"
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(INSTALL) ".[bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info lora_fused/_C*.so .pytest_cache .mypy_cache .ruff_cache
