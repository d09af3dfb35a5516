# The two commands: `make demo` and `make test`. Both make a virtual environment and install everything first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
EMULATOR := $(shell find tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test check bench format clean

demo: $(VENV)/.installed
	$(BIN)/gradloc demo --output gradloc-demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(EMULATOR)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_stub.py tests/test_plan.py tests/test_files.py

bench: $(VENV)/.installed
	$(BIN)/python bench/norms.py --json bench/results/norms-local.json
	$(BIN)/python bench/adamw.py --json bench/results/adamw-local.json
	$(BIN)/python bench/trace.py --json bench/results/trace-local.json
	$(BIN)/python bench/rounding.py --json bench/results/rounding-local.json

format: $(VENV)/.checks
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(SOURCES) $(EMULATOR)

# Editable: Python changes act at once; the compiled core is rebuilt when a source of it changed.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.checks: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[check]'
	touch $@

clean:
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache
