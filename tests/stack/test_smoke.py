"""The smoke test passes on what is built, and fails on each of four broken runtimes.

It needs a Docker engine and the images: `.ci/smoke` sees to both, and then calls this. Without an
engine it is skipped, unless SERENO_SMOKE=1 says that there has to be one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROJECT = f"sereno-smoke-{os.getpid()}"

Smoke = Callable[[str], tuple[int, set[str], set[str]]]


def compose(*args: str, files: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    layers = [word for file in ("compose.smoke.yml", *files) for word in ("-f", file)]
    return subprocess.run(
        ["docker", "compose", "--ansi", "never", "-p", PROJECT, *layers, *args],
        cwd=ROOT,
        env={**os.environ, "PULL_POLICY": "never"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def _engine() -> None:
    try:
        there = subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    except FileNotFoundError:
        there = False
    if not there:
        assert os.environ.get("SERENO_SMOKE") != "1", "no Docker engine"
        pytest.skip("no Docker engine")


@pytest.fixture
def smoke(_engine: None, tmp_path: Path) -> Iterator[Smoke]:
    """Runs the smoke test: its exit code, and the checks that passed and that failed."""

    def run(breaks: str) -> tuple[int, set[str], set[str]]:
        layer = tmp_path / "broken.json"
        broken = {
            "environment": {"PYTHONPATH": "/broken", "SMOKE_BREAK": breaks},
            "volumes": [f"{HERE / 'broken'}:/broken:ro"],
        }
        impatient = {"environment": {"SMOKE_PATIENCE_S": "10"}}
        layer.write_text(json.dumps({"services": {"runtime": broken, "smoke": impatient}}))
        up = ("up", "--no-build", "--abort-on-container-exit", "--exit-code-from", "smoke")
        done = compose(*up, files=(str(layer),) if breaks else ())
        print(done.stdout)
        said = re.findall(r"\| (ok|FAIL) +(\w+):", done.stdout)
        passed, failed = ({name for word, name in said if word == w} for w in ("ok", "FAIL"))
        return done.returncode, passed, failed

    yield run
    compose("down", "--volumes", "--timeout", "5")


def test_it_passes_on_what_is_built(smoke: Smoke) -> None:
    code, passed, failed = smoke("")

    assert (code, failed) == (0, set())
    assert {"health", "ready", "declared", "deltas", "streams", "resume", "traces"} <= passed


@pytest.mark.parametrize(
    ("breaks", "noticed"),
    [
        pytest.param("health", {"health"}, id="health_without_ts"),
        pytest.param("metric", {"declared", "deltas"}, id="a_metric_renamed"),
        pytest.param("spans", {"traces", "scraped", "chat"}, id="spans_not_exported"),
        pytest.param(
            "terminal",
            {"streams", "deltas", "resume", "answered", "task", "chat"},
            id="the_terminal_line_missing",
        ),
    ],
)
def test_it_fails_on_a_broken_runtime_and_says_where(
    smoke: Smoke, breaks: str, noticed: set[str]
) -> None:
    code, passed, failed = smoke(breaks)

    assert code == 1
    assert failed == noticed
    assert passed, "the other checks are made all the same"
