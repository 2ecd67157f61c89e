# make demo and make test set up all they need: python3 (3.10+) with venv and pip, make, g++.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: demo test test-long test-10k test-mutations test-matrix test-kernels test-gpu fuzz
.PHONY: bench bench-gpu lint docs package clean

demo: $(READY)
	$(BIN)/python docs/demo.py

test: $(READY)
	$(BIN)/python -m pytest

# what takes minutes: saves killed, failed and interrupted at every system call, 300 killed at random
# times, 20,000 bit flips, an array of 4.1 GiB
test-long: $(READY)
	GPUSTORE_TEST_LONG=1 GPUSTORE_TEST_BIG=1 $(BIN)/python -m pytest tests/test_crash.py tests/test_stopped_saves.py \
	  tests/test_damage.py tests/test_layouts.py

# the round trips with 10,000 examples in all
test-10k: $(READY)
	GPUSTORE_HYPOTHESIS_PROFILE=ci10k $(BIN)/python -m pytest tests/test_properties.py --timeout=1800

# 10,000 mutations of the fixtures, the same ones each time
test-mutations: $(READY)
	GPUSTORE_HYPOTHESIS_PROFILE=mutations $(BIN)/python -m pytest tests/test_mutations.py

# coverage-guided fuzzing with atheris, FUZZ_SECONDS for reading files and as many for code in them
FUZZ_SECONDS ?= 300
FUZZ_CORPUS ?= .fuzz
FUZZ := .venvs/fuzz/bin/python tests/fuzz/fuzz.py
FUZZ_LIMITS := -timeout=20 -rss_limit_mb=1024 -max_total_time=$(FUZZ_SECONDS)
fuzz:
	$(PYTHON) -m venv .venvs/fuzz
	.venvs/fuzz/bin/python $(PIP) --editable '.[test]' atheris
	mkdir -p $(FUZZ_CORPUS)/load $(FUZZ_CORPUS)/code
	$(FUZZ) load $(FUZZ_LIMITS) -artifact_prefix=$(FUZZ_CORPUS)/load- $(FUZZ_CORPUS)/load
	$(FUZZ) code $(FUZZ_LIMITS) -artifact_prefix=$(FUZZ_CORPUS)/code- $(FUZZ_CORPUS)/code

test-matrix:
	PYTHON=$(PYTHON) .ci/matrix

# the kernels compiled for real architectures; their arithmetic is run on the host by `make test`
test-kernels:
	PYTHON=$(PYTHON) .ci/kernels

# the whole suite with real CuPy arrays in the role of the device, by the python at hand: it has what
# it has, so plugins may be missing, and warnings of libraries of other versions are no errors
test-gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" GPUSTORE_TEST_DEVICE=cuda JAX_PLATFORMS=cpu \
	  $(PYTHON) -m pytest --override-ini addopts="-ra --doctest-modules -p no:cacheprovider" \
	  -W default --continue-on-collection-errors

# beside safetensors, and beside torch where it is installed
bench: $(READY)
	$(BIN)/python $(PIP) --editable ".[bench]"
	$(BIN)/python bench/import_time.py
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/convolution.py

# on a machine with a GPU, by the python at hand; rivals that are missing are left out
bench-gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) bench/gpu.py $(BENCH)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_usage.py

# the site of the documentation, into site/: strictly, for use without a network
docs:
	$(PYTHON) -m venv .venvs/docs
	.venvs/docs/bin/python $(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 .venvs/docs/bin/mkdocs build --strict

# wheel and sdist: built, checked, tried from an empty folder in an empty environment
package:
	PYTHON=$(PYTHON) .ci/package

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	extra=$$($(BIN)/python .ci/cuda_extra.py); \
	  $(BIN)/python $(PIP) --editable ".[dev$${extra:+,$$extra}]"
	touch $@

clean:
	rm -rf $(VENV) .venvs .fuzz build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
