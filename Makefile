# Each command makes .venv from nothing where it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Large memory pages where the system has them: 6 to 14 % less time a small step (benchmarks/results/throughput.json).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

$(VENV)/ready: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --require-hashes --requirement requirements.lock
	$(RUN) -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.lock
	$(RUN) -m pip install --quiet --require-hashes --requirement requirements-dev.lock
	$(RUN) -m pip install --quiet --no-deps --editable .
	touch $@

# XLA's compiler for NVIDIA GPUs has an environment of its own: without a GPU it says so at each start of JAX.
GPU := build/gpu-check
$(GPU)/ready: pyproject.toml
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --upgrade pip
	$(GPU)/bin/python -m pip install --quiet --editable '.[plan-gpu]'
	touch $@

gpu-check: $(GPU)/ready  ## compiles a stage of each system for an H200, without one, and checks the programs; 15 minutes
	$(GPU)/bin/python -m benchmarks.gpu_check

# The site and the code of its pages, in an environment of their own.
DOCS := build/docs
$(DOCS)/ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(DOCS)/ready  ## builds the site into build/site; a dead link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

docs-test: $(DOCS)/ready  ## runs the code of the README, the pages of the site and the notebooks; ten minutes
	$(DOCS)/bin/python -m pytest -n 2 --durations=0 tests/on_docs.py

browser: $(VENV)/ready-dev  ## the report's pages in Chromium
	$(RUN) -m pip install --quiet --editable '.[browser]'
	$(RUN) -m pytest tests/in_browser.py

.PHONY: demo test test-all faults check audit lock gpu-check docs docs-test browser clean
demo: $(VENV)/ready  ## AMAE on built-in phantoms: all stages, evaluation, report
	$(RUN) -m jmae.train --config configs/amae.py --workdir runs/demo

PYTEST = $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/ready-dev  ## the quick tests, for every commit
	$(PYTEST) -m "not long"

test-all: $(VENV)/ready-dev  ## all tests, also those that are marked `long`
	$(PYTEST)

faults: $(VENV)/ready-dev  ## injects 30 classes of faults and writes benchmarks/results/faults.json; 20 minutes
	$(RUN) tests/faults --out benchmarks/results/faults.json

audit: $(VENV)/ready-dev  ## looks for known holes in the packages of the lock files, and writes their bill of materials
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	$(RUN) launch/sbom.py > build/sbom.json
	build/audit/bin/pip-audit --disable-pip --require-hashes --requirement requirements-dev.lock

lock:  ## writes the lock files anew
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet uv
	build/lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet pyproject.toml --output-file requirements.lock
	build/lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet --extra dev pyproject.toml --constraint requirements.lock --output-file requirements-dev.lock

check: $(VENV)/ready-dev  ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(GPU) $(DOCS) build/site runs
