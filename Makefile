# Every target makes the virtual environment it needs from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-process stack-test smoke test-browser dashboards bench bench-telemetry lint types check lock clean

run: $(READY)  ## serve the examples on port 8009
	$(BIN)/sereno serve --config examples/screening/langgraph.json --config examples/research/langgraph.json --config examples/assistant/langgraph.json

test: $(READY)  ## isolated tests: no server, no network
	$(BIN)/pytest

test-process: $(READY)  ## tests that start, kill and restart real servers on free ports
	$(BIN)/pytest tests/process

stack-test: $(READY)  ## what SREs look at, run by the real programs that it is for
	.ci/programs
	SERENO_REQUIRE_STACK=1 SERENO_REQUIRE_PROMTOOL=1 $(BIN)/pytest tests/stack --ignore=tests/stack/test_smoke.py

smoke: $(READY)  ## the Docker smoke test, and that it fails when it should
	.ci/smoke

dashboards: $(READY)  ## write dashboards/grafana anew
	$(BIN)/python -m dashboards.src

test-browser: $(READY)  ## the page in a real Chromium; needs playwright and Debian's chromium
	$(BIN)/pytest tests/browser

bench: $(READY)  ## ratios against a naive server, in one run
	$(BIN)/python -m benchmarks

bench-telemetry: $(READY)  ## what telemetry costs: on against off, and under a scrape
	$(BIN)/python -m benchmarks.telemetry

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

check: lint types test  ## what CI calls before the slower stages

lock: $(READY)  ## resolve requirements.lock anew
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --all-extras pyproject.toml -o requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Sereno needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing Sereno into $(VENV); this takes about a minute"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
