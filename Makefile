# Every target works in $(VENV), which is made on first use and brought up to date when
# pyproject.toml or a lock file changes. `make test LATEST=1` resolves freely, in another one.

# The wheels that compile for an absent GPU would ask for its driver.
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK ?= 1

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint types check-native check-clients check-schema check-page check-docs check-trace check-device check-image check-ray gpu-check gpu-all study report faults soak lock newest

VENV := $(if $(LATEST),build/latest,.venv)
PY := $(VENV)/bin/python
LOCKED_JAX := 0.11.2
CLIENTS := openai2 openai3 aiperf

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.installed  ## make .venv with the run-time packages

demo: setup  ## answer questions with the checkpoint that ships here
	$(PY) benchmarks/demo.py

test: lint types check-native  ## ruff, mypy, the C checks and pytest (import rules included); LATEST=1: newest packages
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.installed-dev  ## ruff's rules and format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: $(VENV)/.installed-dev  ## mypy --strict
	$(PY) -m mypy

check-native: $(VENV)/.installed-dev  ## the launcher's C against a fake driver, sanitized; FULL=1: TSan too
	@command -v $(CC) >/dev/null || { echo "check-native: skipped, no C compiler"; exit 0; } && \
		$(MAKE) --no-print-directory -C tests/native check FULL=$(FULL) SITE="$$($(PY) -c \
			'import sysconfig; print(sysconfig.get_path("purelib"))')"

check-clients: $(VENV)/.installed $(CLIENTS:%=build/clients/%/.installed)  ## openai 2 and 3, and aiperf, against servers started here
	$(PY) tests/clients/run.py openai_client.py build/clients/openai2/bin/python
	$(PY) tests/clients/run.py openai_client.py build/clients/openai3/bin/python
	$(PY) tests/clients/run.py aiperf_client.py build/clients/aiperf/bin/python

check-schema: $(VENV)/.installed build/clients/schemathesis/.installed  ## schemathesis: /openapi.json against the server that gives it
	$(PY) tests/clients/run.py schemathesis_client.py build/clients/schemathesis/bin/python

check-page: $(VENV)/.installed build/clients/page/.installed  ## the page at / in headless Chromium; SHOTS=docs: take its pictures
	SHOTS=$(SHOTS) $(PY) tests/clients/run.py page_client.py build/clients/page/bin/python

check-trace: $(VENV)/.installed build/clients/trace/.installed  ## traces of servers, opened by Perfetto itself in headless Chromium
	$(PY) tests/clients/run.py perfetto_client.py build/clients/trace/bin/python

check-image:  ## do what deploy/Dockerfile does, in build/image: some GB of downloads; says how large it is. EXTRAS=triton
	PATH="$$(dirname "$$(.ci/python)"):$$PATH" EXTRAS=$(EXTRAS) python3 tests/image_check.py build/image

check-ray: build/clients/ray/.installed $(VENV)/.installed  ## two replicas behind Ray Serve, on this machine's processor, against a plain server
	$(RAY_HERE) $(PY) tests/clients/run.py ray_client.py build/clients/ray/bin/python
# On the loopback address, telling nobody, with a key that no file keeps; deploy for its replicas.
RAY_HERE = RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_USAGE_STATS_ENABLED=0 PYTHONPATH=$(CURDIR)/deploy \
	RAY_AUTH_TOKEN=$$($(PY) -c 'import secrets; print(secrets.token_hex(32))')

check-docs: $(VENV)/.installed-dev  ## every command of README and docs, run as far as this machine can; then check-page
	$(PY) tests/docs/check_docs.py
	@$(MAKE) --no-print-directory check-page

gpu-check:  ## on a GPU: settle what only it can tell; BACKEND=fake|host: without one; PYTHON= chooses
	$(PYTHON) benchmarks/gpu_check.py --backend $(BACKEND) --out benchmarks/results

gpu-all:  ## on a GPU: all that it has to tell, PART=check|kernels|profile|headline, each call LIMIT=540 s at most; goes on where it stopped
	$(PYTHON) benchmarks/gpu_all.py $(PART) --backend $(BACKEND) --limit-s $(LIMIT)
PYTHON ?= python3
BACKEND ?= cuda
LIMIT ?= 540

study: setup  ## simulate policies on Azure's traces (TRACES=DIR), write docs/results/study.md; goes on where it stopped
	$(PY) benchmarks/study.py --traces "$(TRACES)"

report: setup  ## turn benchmarks/results into docs/results.md with pictures, and the README's table
	$(PY) benchmarks/report.py

faults: $(VENV)/.installed-dev  ## attack servers with and without their guards, write docs/faults.md
	rm -rf build/faults && mkdir -p build/faults
	DUETJAX_FAULTS_OUT=build/faults $(PY) -m pytest -q -n 2 --dist loadfile $(wildcard tests/*/test_faults_*.py)
	$(PY) tests/faults_page.py build/faults

soak: setup  ## long mixed load: does anything grow, is anything lost? MINUTES=30 REQUESTS=1000000
	$(PY) benchmarks/soak.py --minutes $(MINUTES) --requests $(REQUESTS)
MINUTES ?= 30
REQUESTS ?= 1000000

check-device: $(VENV)/.installed-dev  ## compile every program for GPUs that are absent, renew the table
	$(PY) tests/cpu/device_table.py

lock:  ## resolve the lock files again, with jax at LOCKED_JAX; UPGRADE=1: with the newest packages
	[[ -x build/lock/bin/uv ]] || \
		{ python=$$(.ci/python) && "$$python" -m venv build/lock && build/lock/bin/pip install -q uv; }
	$(RESOLVE) --constraint <(echo jax==$(LOCKED_JAX)) -o requirements.lock pyproject.toml
	$(RESOLVE) --constraint requirements.lock \
		--constraint <(printf '%s==$(LOCKED_JAX)\n' jax-cuda13-{plugin,pjrt}) --extra dev -o requirements-dev.lock pyproject.toml
	$(RESOLVE) --constraint requirements.lock --constraint requirements-dev.lock \
		--extra cuda13 -o requirements-cuda13.lock pyproject.toml
RESOLVE := build/lock/bin/uv pip compile --quiet $(if $(UPGRADE),--upgrade) --universal --python-version 3.12 \
	--generate-hashes --no-annotate --custom-compile-command 'make lock'

# Installing takes seconds with uv, a minute with pip; both take the same files by their hashes.
ifneq ($(shell command -v uv),)
new_venv = uv venv --quiet --python "$$python"
install = uv pip install --python $(PY)
else
new_venv = "$$python" -m venv
install = $(PY) -m pip --disable-pip-version-check --no-input install --no-compile
endif

# An interrupted installer leaves packages that only look installed. So it runs while the stamps are
# away, and a set-up that finds no stamp starts from an empty environment.
LAUNCHER := setup.py $(wildcard launcher/csrc/*)

.venv/.installed: pyproject.toml requirements.lock $(LAUNCHER)
	[[ -e $@ ]] || { python=$$(.ci/python) && rm -rf .venv && $(new_venv) .venv; }
	rm -f .venv/.installed .venv/.installed-dev
	$(install) --no-deps --require-hashes -r requirements.lock
	$(install) --no-deps -e .
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.lock
	rm -f .venv/.installed
	$(install) --no-deps --require-hashes -r requirements-dev.lock
	touch .venv/.installed $@

build/latest/.installed build/latest/.installed-dev: newest ;
newest:
	python=$$(.ci/python) && rm -rf build/latest && $(new_venv) build/latest
	$(install) -e '.[dev]'

# A client's packages never meet the server's.
build/clients/%/.installed: PY = build/clients/$*/bin/python
build/clients/%/.installed: tests/clients/requirements-%.txt
	python=$$(.ci/python) && rm -rf $(@D) && $(new_venv) $(@D)
	$(install) -r $<
	touch $@

# Ray's replicas are servers, so theirs has what is locked for a server, and Ray.
build/clients/ray/.installed: PY = build/clients/ray/bin/python
build/clients/ray/.installed: tests/clients/requirements-ray.txt pyproject.toml requirements.lock
	python=$$(.ci/python) && rm -rf $(@D) && $(new_venv) $(@D)
	$(install) --no-deps --require-hashes -r requirements.lock
	$(install) --no-deps -e .
	$(install) -r $<
	touch $@
