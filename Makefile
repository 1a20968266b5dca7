# Everything here needs Python 3.10 or newer and PyPI, nothing else. The virtual environment is made
# on the first use and again whenever its requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.PHONY: test test-slow check demo demo-fsdp demo-megatron demo-move bench docs clean

# With its path: `pytest` alone leaves out what is heavy. One worker a core; a file's tests run in one
# worker, in their order. What takes longest to make is made first (tests/conftest.py).
test: check
	$(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

# What takes minutes, with a real model.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real model, real DeepSpeed ZeRO-3 training, conversion, and the answers before and after.
demo: $(STAMP)
	$(BIN)/python -m demo.deepspeed_story demo-out

# The same with FSDP: converted for it, loaded, trained, saved by DCP, and converted back.
demo-fsdp: $(STAMP)
	$(BIN)/python -m demo.fsdp_story demo-out

# The same with megatron-core: into a Megatron model, taught, saved as torch_dist, and converted back.
demo-megatron: $(STAMP)
	$(BIN)/python -m demo.megatron_story demo-out

# A run that moves from DeepSpeed to FSDP and back, with its optimizer; the loss curves in an SVG picture.
demo-move: $(STAMP)
	$(BIN)/python -m demo.move_story demo-out

# Time, memory, bytes and system calls against DeepSpeed's own tools, the common scripts and cp, in about
# BUDGET minutes; writes benchmarks/results.json, docs/performance.md and its charts, README's table.
BUDGET ?= 40
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench bench-out --budget $(BUDGET) --publish

# The documentation as a site, in `site/`; needs no tests' packages.
docs:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs --editable .
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# torch comes first: by itself, so that a CPU build that pip is told of (PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL) is taken. DeepSpeed is built from source, its operators are not compiled.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--group dev --editable .
	$(BIN)/python -m compileall -q src
	touch $@

clean:
	rm -rf $(VENV) site demo-out bench-out .pytest_cache .mypy_cache .ruff_cache
