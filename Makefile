# Everything a newcomer runs. Each target first sees to it that what it needs is there (.ci/setup), which costs
# nothing the second time.

SHELL := /bin/bash
export PATH := $(PATH):/usr/sbin:/sbin
# Compiled tests are kept: rewriting the assertions of 250 modules takes each worker 5 s of every run.
unexport PYTHONDONTWRITEBYTECODE
PY := .venv/bin/python
# Two workers: what the time limits of this project are stated for.
WORKERS ?= 2
# Where `make man` installs: `sudo make man PREFIX=/usr/local` for all users.
PREFIX ?= .venv
# Further arguments for pytest, as in: make test ARGS='-k qcow2 -x'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check format man map bench soak hostile mutate lock audit clean

help:  ## this list
	@grep -hE '^[a-z]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*  ## /  make \1\t/' | expand -t 18

demo:  ## the main job on a real Linux disk image, in under two minutes
	@.ci/setup demo
	@$(PY) -m docs.demo

test:  ## the tests; what enumerates takes a share of its cases (tests/exhaustive.py)
	@.ci/setup test
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check:  ## ruff, mypy --strict, the architecture test
	@.ci/setup lint
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@$(PY) -m pytest -q tests/test_architecture.py tests/test_errors.py tests/test_raises.py

format:  ## put the code in the one layout, and fix what ruff can fix
	@.ci/setup lint
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

man:  ## write the man pages from the command line, and install them below PREFIX (default: .venv)
	@.ci/setup lint
	@$(PY) -m docs.man
	@install -d $(PREFIX)/share/man/man1
	@install -m 644 docs/man/man1/*.1 $(PREFIX)/share/man/man1

map:  ## write the list of modules in docs/architecture.md again
	@.ci/setup lint
	@$(PY) -m docs.modules

bench:  ## measure the promises of speed and memory
	@.ci/setup bench
	@$(PY) -m pytest -p no:xdist -m bench -s --timeout 1800 $(ARGS)

soak:  ## all cases of what enumerates, the tests that run for minutes, and guests on QEMU 10
	@.ci/setup soak
	@EXHAUSTIVE=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m soak --timeout 7200 $(ARGS)
	@.ci/qemu10 >/dev/null
	@TEST_QEMU="$$(.ci/qemu10)" $(PY) -m pytest -n $(WORKERS) --dist worksteal \
		tests/guest tests/merge/test_live*.py tests/ops/test_ship_running.py tests/ops/test_ship_bitmap.py $(ARGS)

hostile:  ## ten thousand mutated peers, stores, records and images (ARGS='--kind peers --seed 7 --count 1')
	@.ci/setup test
	@$(PY) -m tests.hostile --corpus --count 10000 $(ARGS)

mutate:  ## break each line that keeps a promise, and see a test turn red (ARGS: words that choose some)
	@.ci/setup test
	@$(PY) -m tests.mutations $(ARGS)

lock:  ## pin the newest versions that pyproject.toml allows, by hash, in requirements.lock and .ci/tools.lock
	@.ci/setup tools
	@.cache/tools/bin/python .ci/lock .cache/tools/bin/uv

audit:  ## known vulnerabilities in what the locks pin, asked of OSV or a mirror of it (OSV_URL=...)
	@.ci/setup tools
	@.cache/tools/bin/python .ci/audit .cache/tools/bin/pip-audit $(OSV_URL)

clean:  ## forget everything made here, the virtual environment too
	rm -rf .venv .cache build dist demo-work fixtures/made .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
