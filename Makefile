# Everything happens in .venv, which is made when it is missing. Works from any folder: make -C path/to/medseg-diffusion demo
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint check docs wheel-test wheel-install-test dist audit bench gpu clean

help:
	@echo "make setup | demo | test | test-all | lint | check | docs | wheel-test | wheel-install-test | dist | audit | bench | gpu | clean"

# Stamps: an install runs again only when pyproject.toml has changed.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed-%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

setup: .venv/.installed-demo .venv/.installed-test .venv/.installed-dev

demo: .venv/.installed-demo
	$(BIN)/python examples/demo.py

# The tests of a file share what they train, so that a file stays in one process. Each process has one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: .venv/.installed-test
	$(PYTEST) -m "not slow"

test-all: .venv/.installed-test
	$(PYTEST)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy medseg_diffusion cli configs examples benchmarks
	$(BIN)/lint-imports --no-cache

check: lint test wheel-test

# The documentation as a site, in site/. Warnings, such as a dead link or anchor, are errors.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A table of ours beside others, in ten minutes on two idle cores: make bench QUICK=1 rehearses it. See benchmarks/README.md.
bench: .venv/.installed-test
	$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick)

# What needs a GPU, in nine minutes: make gpu PART=brain DATA=tiny-imagenet-200.zip LABELMAPS=folder OUT=folder REHEARSE=1.
# An environment that is there is used as it is: a machine with a GPU may have no package index.
PART ?= tests throughput generators
gpu:
	@test -x $(BIN)/python || $(MAKE) .venv/.installed-test
	OUT="$(OUT)" $(BIN)/python benchmarks/gpu.py --part $(PART) $(if $(DATA),--data "$(DATA)") \
	    $(if $(LABELMAPS),--labelmaps "$(LABELMAPS)") $(if $(REHEARSE),--rehearse)

# The time of the last commit dates the files in a wheel: two builds of a commit are equal byte for byte.
dist wheel-test wheel-install-test: export SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2> /dev/null || echo 1704067200)

# What would be uploaded: an sdist, and the wheel that is built from it.
dist: .venv/.installed-release
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

# Licences of everything that is installed, then its known vulnerabilities, for which pypi.org is asked.
audit: .venv/.installed-release
	$(BIN)/pip-licenses --from=mixed --order=license
	$(BIN)/python -m pip freeze --disable-pip-version-check --exclude-editable > $(BIN)/../audited.txt
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(BIN)/../audited.txt || { echo "make audit: a package" \
	    "has a known vulnerability, or could NOT be looked up at pypi.org (see above): run it where that is reached" >&2; exit 1; }

# As a new user: the wheel and all of its dependencies from the package index, in an empty environment and another
# folder, then a first segmentation. It takes minutes and 6 GB.
wheel-install-test: .venv/.installed-test
	@set -eu; root=$$(pwd); tmp=$$(mktemp -d); trap 'rm -rf "$$tmp" "$$root/build"' EXIT; rm -rf build; \
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$$tmp" .; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	start=$$(date +%s); "$$tmp/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$$tmp"/*.whl; \
	echo "installed in $$(( $$(date +%s) - start )) s, $$(du -sh "$$tmp/venv" | cut -f1)"; cd "$$tmp"; \
	env -u PYTHONPATH MEDSEG_HOME="$$tmp/home" venv/bin/python "$$root/tests/helpers/first_run.py"

# The wheel in a fresh environment, tested from another folder, and built twice to the same bytes. Dependencies are borrowed from .venv through a .pth file;
# .pth files that lie in there are not followed, so its editable install is out of reach.
wheel-test: .venv/.installed-test
	@set -eu; root=$$(pwd); tmp=$$(mktemp -d); trap 'rm -rf "$$tmp" "$$root/build"' EXIT; rm -rf build; \
	for n in 1 2; do \
	    rm -rf build; $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$$tmp/$$n" .; \
	done; \
	cmp "$$tmp"/1/*.whl "$$tmp"/2/*.whl; mv "$$tmp"/1/*.whl "$$tmp"; \
	$(BIN)/python -m venv --without-pip "$$tmp/venv"; \
	$(BIN)/python -m pip --python "$$tmp/venv/bin/python" install --quiet --disable-pip-version-check --no-deps "$$tmp"/*.whl; \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$("$$tmp/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"; \
	cd "$$tmp"; \
	venv/bin/medseg --help > /dev/null; \
	venv/bin/python -c 'import medseg_diffusion as m, pathlib; p = next(iter(m.__path__)); assert p.startswith(str(pathlib.Path.cwd())), p'; \
	venv/bin/python -m zipfile -l *.whl | grep -E '\.(yaml|j2|json|safetensors) ' || true; \
	venv/bin/python -m pytest -p no:cacheprovider --rootdir "$$tmp" -c "$$root/pyproject.toml" \
	    "$$root/tests/test_packaging.py" "$$root/tests/cli"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache demo-output bench-output gpu-output site
