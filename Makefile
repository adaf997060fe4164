# make demo    before/after on the bundled model, written to out/
# make test    the whole suite except tests that need a GPU
# make test-numeric   the numeric tests as another processor computes them
# make lint    ruff and mypy
# make docs    renew the computed parts of the pages, then the site in site/
# make wheel   wheel and sdist in dist/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-numeric lint docs wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/diffaccel showcase --output out --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu" $(PYTEST_ARGS)

# Another processor's rounding: without AVX-512, matrix units and bfloat16 instructions.
NUMERIC := $(filter-out %_benchmark.py %_evidence.py %_apply.py,$(wildcard tests/test_erasure_*.py)) tests/test_attention_body.py \
	tests/test_block_selection.py tests/test_cache_write.py tests/test_dense.py tests/test_matching.py tests/test_merge.py \
	tests/test_nag_blend.py tests/test_slot_map.py tests/test_sparse_softmax.py
test-numeric: $(VENV)/.installed-dev
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu" $(PYTEST_ARGS) $(NUMERIC)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/hooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed-dev
	$(PIP) install --quiet --constraint constraints.txt build
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) dist out site .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, at the pinned version: a later requirement can then no longer pick another build.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[metrics]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
