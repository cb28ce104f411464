# Every target makes the virtual environment it needs from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser

LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header pyproject.toml

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

test-browser: $(BROWSER)  ## the page in a real Chromium: the one in PATH, or SERENO_CHROMIUM
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

lock: $(READY)  ## resolve both locks anew
	$(BIN)/pip install --quiet uv
	$(LOCK) --extra llm --extra dashboards --extra test --extra build -o requirements.lock
	$(LOCK) --extra browser --constraint requirements.lock -o requirements.browser.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Sereno needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing Sereno into $(VENV); this takes about a minute"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

# Playwright's wheel is large, and not there for each system that a server runs on.
$(BROWSER): requirements.browser.lock $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.browser.lock
	touch $(BROWSER)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
