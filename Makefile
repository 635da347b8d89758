# The commands of a developer and of CI. `make setup` is the only step that touches the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STEPS ?= 400
DEMO_RUN ?= runs/demo

.PHONY: setup native test fast lint demo bench clean

setup: $(VENV)/.ready

NATIVE := CMakeLists.txt $(wildcard csrc/*/*)

$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	@command -v c++ > /dev/null || (test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq g++) \
	  || (echo "the native core needs a C++20 compiler: install g++ 11 or later" >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# After a change of csrc: builds the native core again, without pip's isolation.
native:
	flock .venv/.building $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

fast: setup
	$(BIN)/python -m pytest tests -m "not slow" -n 2

test: lint
	$(BIN)/python -m pytest tests -n 2 --durations 25

demo: setup
	$(BIN)/cofire train demo --out $(DEMO_RUN) --resume --set steps=$(DEMO_STEPS)
	$(BIN)/cofire generate $(DEMO_RUN) --prompt "def main(" --max-tokens 120 --speculative

bench: setup
	$(BIN)/python benchmarks/bench_model.py

clean:
	rm -rf $(VENV) build dist
