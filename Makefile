# Every target does all of its own set-up in .venv: run it on a fresh clone.
#   make demo | test | ptx | bench | lint | sanitize | clean
# PIP_FLAGS holds further flags for pip, such as an index that carries a CPU-only build of torch.

PYTHON ?= python3
PYTEST ?= -q
PIP_FLAGS ?=
export MMFAST_HOST ?= 1

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SOURCES := setup.py mmfast/__init__.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test ptx bench lint sanitize clean

demo: .venv/installed-demo .venv/built
	$(BIN)/mmfast demo

# Two processes on as many cores: threads that wait in a loop would take the time of those that work.
test: .venv/installed-dev .venv/built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

# The CUDA kernels' PTX on the CPU, all of it: make test runs a part.
ptx: .venv/installed-dev .venv/built
	MMFAST_PTX=long OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal tests/ptx $(PYTEST)

bench: .venv/installed-dev .venv/built
	$(BIN)/python -m benchmarks.bench

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# First the solvers as a warp runs them, for races. The sanitizers must be loaded before Python; torch never frees some of its memory, so leaks are not looked for.
# The interpreted Triton kernels are Python, and would take half of the time.
sanitize: .venv/installed-dev
	$(BIN)/python tests/races.py
	MMFAST_SANITIZE=1 MMFAST_HOST=0 MMFAST_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize/lib
	OMP_WAIT_POLICY=passive LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 MMFAST_LIBRARY=$(CURDIR)/build/sanitize/lib/mmfast/_C.so $(BIN)/python -m pytest --capture=sys --ignore-glob="tests/test_triton*" $(PYTEST)

clean:
	rm -rf .venv build dist *.egg-info mmfast/_*.so mmfast/_build.json

# Two architectures in place of all that a wheel holds: three times as fast.
.venv/installed-% .venv/built: export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0+PTX

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed-%: .venv/created pyproject.toml constraints.txt
	$(PIP) 'setuptools>=77' ninja pybind11 torch
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@

.venv/built: $(SOURCES) .venv/created
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
