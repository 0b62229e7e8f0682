# `make train` and `make test` do all of their own set-up: they need python3 (3.10 or newer) and a C++ compiler.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# With another TORCH the packages are not those that were installed.
TOOLS := .venv/.tools-$(subst =,-,$(TORCH))
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: test older test-sanitize train lint build cuda bench gpu clean

train: $(VENV)/.train
	$(BIN)/fastres train $(ARGS)

# Two at a time: most tests keep one core busy, or wait for a process that they start. Threads that wait must
# not spin, or each holds up the other's.
test: $(VENV)/.test lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# What depends on the version of PyTorch, with another than the pinned one: make older TORCH=torch==2.10.0
older: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	    tests/test_convolution_node.py tests/test_fuse*.py tests/test_ops_errors.py tests/test_residual_blocks.py \
	    tests/test_sequence*.py tests/test_special_gradients.py

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: a package beside the built library.
SANITIZED := build/sanitize
KERNEL_TESTS := tests/test_ops.py tests/test_ops_errors.py tests/test_max_pool.py tests/test_sequence_op.py $(wildcard tests/test_conv*.py)
test-sanitize: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B $(SANITIZED) -DFASTRES_SANITIZE=ON -DFASTRES_CUDA=off \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED) --target _C
	rm -rf $(SANITIZED)/package && mkdir $(SANITIZED)/package && cp -r fastres $(SANITIZED)/package/
	rm -f $(SANITIZED)/package/fastres/_C*.so && cp $(SANITIZED)/_C*.so $(SANITIZED)/package/fastres/
	PYTHONPATH="$(CURDIR)/$(SANITIZED)/package" FASTRES_KEEP_MEMORY=off ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	    $(BIN)/pytest $(or $(ARGS),$(KERNEL_TESTS))

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

build: $(VENV)/.train

# Compiles the CUDA kernels, also where no GPU is; fails where nvcc is missing.
cuda: $(TOOLS)
	FASTRES_CUDA=on $(BIN)/pip install --no-build-isolation -e .

bench: $(VENV)/.test
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/results/latest.json $(ARGS)

# With a GPU: its tests, compute-sanitizer and its benchmarks. Without: compiles for one, and checks the rest.
gpu: $(VENV)/.test
	PYTHON=$(BIN)/python benchmarks/gpu.sh $(ARGS)

$(TOOLS):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.25" numpy
	rm -f $(VENV)/.tools-*
	touch $@

$(VENV)/.train: $(TOOLS) $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e .
	touch $@

# torchvision and timm are clients of the tests; their own choice of torch is not wanted.
$(VENV)/.test: $(VENV)/.train
	$(BIN)/pip install --quiet pytest pytest-benchmark "pytest-xdist>=3.7" "ruff==0.17.*" "clang-format==23.1.*" transformers pyyaml huggingface_hub safetensors playwright
	$(BIN)/pip install --quiet --no-deps torchvision timm
	touch $@

clean:
	rm -rf $(VENV) build dist fastres/_C*.so
