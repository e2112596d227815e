# Everything runs in .venv, which the first target that needs it builds. Only python3.11+, make and a C++ compiler are assumed.
PYTHON ?= python3
# Installed before the package: an unpinned torch would bring several gigabytes of CUDA libraries to a machine without a GPU.
# For another build: make clean, then e.g. make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CXX_FILES := $(shell find csrc bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
CMAKE_FILES := CMakeLists.txt $(shell find csrc -name CMakeLists.txt)
DIST := dist
WHEEL := build/wheel
# make wheel KERNELS=FOLDER packs the libraries that lie there and compiles none: tests do so.
KERNELS := required

.DEFAULT_GOAL := help
.PHONY: help setup build test check lint docs format bench demo wheel gpu-kit room-named mutants clean
.DELETE_ON_ERROR:

help:
	@echo "make setup    build .venv: torch, the package (editable) and the developer tools"
	@echo "make build    set-up, then compile what changed in csrc: simulator, and kernels where there is nvcc"
	@echo "make test     build, then all checks: ruff, mypy, clang-format, the reference, pytest"
	@echo "make check    lint, and the tests of what has changed since main, without the slow ones: under a minute"
	@echo "make lint     ruff, mypy and clang-format alone"
	@echo "make docs     the reference of every function, in build/docs; a warning there is an error"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make bench    set-up, then the benchmarks"
	@echo "make demo     set-up, then examples/demo/run.py"
	@echo "make wheel    set-up, then $(DIST)/magihuman_fast-*.whl with the kernels compiled: installs without nvcc"
	@echo "make gpu-kit  build, then build/gpu-kit: what travels to a bare GPU machine for bench/gpu_check.py"
	@echo "make mutants ROOM=pipeline [N=20] [SEED=0]  faults planted in a room of the package: which does no test notice?"
	@echo "make clean    remove .venv and everything built"
	@echo "Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)"

setup: $(VENV)/.installed

# Tools and torch: once for a virtual environment.
$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "error: no interpreter '$(PYTHON)'; name one of version 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: magihuman_fast needs Python 3.11 or later, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "$(PIP_INSTALL) $(TORCH)"
	@$(PIP_INSTALL) $(TORCH) || { echo "error: pip cannot install '$(TORCH)' for $$($(PYTHON) --version) (its own message is above); choose another interpreter (PYTHON=...) or another torch, 2.11 or later (TORCH=torch==...)" >&2; exit 1; }
	@touch $@

# By path (compat), not by import hook: a hook would lose to the clone's own folder where that lies beside a script.
# No build isolation: an isolated build would fetch its own requirements again, and later a second torch. They are listed
# once, in pyproject.toml.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py magihuman_fast/__init__.py
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' >$(VENV)/build-requires.txt
	$(PIP_INSTALL) --requirement $(VENV)/build-requires.txt
	@echo "set-up: installing the package and compiling csrc; some minutes, once"
	$(PIP_INSTALL) --no-build-isolation --config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

# The editable install compiles csrc too; from then on only what changed.
build: $(VENV)/.built

$(VENV)/.built: $(VENV)/.installed $(CXX_FILES) $(CMAKE_FILES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

docs: setup
	$(BIN)/python docs/reference.py

# One process a core. The tests' tensors are small: a second thread of theirs waits more than it computes.
test: lint docs build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest python_tests -m "not gpu" -n auto --maxprocesses 8 --dist worksteal

# What one wants to know while working: the checks, and the tests of what has changed, but the slow ones.
check: lint build
	OMP_NUM_THREADS=1 $(BIN)/python python_tests/changed_tests.py

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

demo: setup
	$(BIN)/python examples/demo/run.py

# Compiled apart from the editable install, since the source lines that profilers like would carry this machine's paths.
# The same commit in the same folder gives the same bytes. auditwheel finds the oldest Linux that the libraries run on and
# names it; what they need besides the system is in the wheel already.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
wheel: setup
	@rm -rf $(WHEEL)/package $(WHEEL)/plain && mkdir -p $(WHEEL)
	@MAGIHUMAN_KERNELS=$(KERNELS) $(BIN)/python -W "ignore:setup.py install" setup.py --quiet \
		egg_info --egg-base $(WHEEL) build --build-base $(WHEEL) --build-lib $(WHEEL)/package \
		bdist_wheel --skip-build --dist-dir $(WHEEL)/plain
	@PATH="$$(cd $(BIN) && pwd):$$PATH" $(BIN)/auditwheel repair --only-plat --wheel-dir $(DIST) $(WHEEL)/plain/*.whl

gpu-kit: build
	$(BIN)/python bench/gpu_kit.py

# A report for people, which CI does not make; its tool is installed here only.
N ?= 20
SEED ?= 0

$(VENV)/.mutants: $(VENV)/.installed
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["mutants"], sep="\n")' >$(VENV)/mutants-requires.txt
	$(PIP_INSTALL) --requirement $(VENV)/mutants-requires.txt
	@touch $@

room-named:
	@test -n "$(ROOM)" || { echo "error: name a room of magihuman_fast, or a module in one: make mutants ROOM=pipeline" >&2; exit 1; }

mutants: room-named build $(VENV)/.mutants
	@OMP_NUM_THREADS=1 $(BIN)/python python_tests/mutants.py $(ROOM) --sample $(N) --seed $(SEED)

clean:
	rm -rf $(VENV) build dist *.egg-info magihuman_fast/*.so magihuman_fast/kernels/*.so .mypy_cache .ruff_cache .pytest_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
