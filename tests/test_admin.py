"""What the admin listener answers; its sockets are tested with the processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from telemetry.admin import Admin, _Shared
from telemetry.health import Liveness
from telemetry.metrics import Metrics


class Process:
    """An `Admin`, and what it is told."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.age = 0.02
        self.liveness = Liveness(lambda: self.age)
        self.runs: Any = []
        self.admin = Admin(metrics, alive=self.liveness.checks, live=lambda: {"runs": self.runs})

    def get(self, target: str, accept: str = "") -> tuple[int, str]:
        answer = self.admin.answer("GET", target, accept)
        return answer.status, answer.body.decode()


@pytest.fixture
def process() -> Iterator[Process]:
    metrics = Metrics()
    yield Process(metrics)
    metrics.close()


def test_metrics_are_prometheus_text_unless_openmetrics_is_asked_for(process: Process) -> None:
    process.metrics["runs_started_total"].inc("g", "api")
    text = process.admin.answer("GET", "/metrics")
    openmetrics = process.admin.answer("GET", "/metrics?x=1", "application/openmetrics-text")

    assert text.status == 200
    assert text.media_type.startswith("text/plain")
    assert b'sereno_runs_started_total{graph="g",trigger="api"} 1.0' in text.body
    assert openmetrics.media_type.startswith("application/openmetrics-text")
    assert openmetrics.body.endswith(b"# EOF\n")


def test_a_process_whose_loop_turns_is_alive(process: Process) -> None:
    assert process.get("/livez") == (200, "ok")
    assert process.get("/livez?verbose") == (200, "ok\nevent_loop pass 0.02")
    assert process.metrics["health_checks_total"].value("/livez", "pass") == 2


def test_a_process_whose_loop_does_not_turn_says_so(process: Process) -> None:
    process.age = 12.0

    assert process.get("/livez") == (
        503,
        "failed\nevent_loop fail 12.0 it has not turned for 12.0 s",
    )
    assert process.metrics["health_checks_total"].value("/livez", "fail") == 1


def test_a_process_that_gave_up_is_not_alive(process: Process) -> None:
    process.liveness.fail("worker", "it cannot claim")

    assert process.get("/livez") == (503, "failed\nworker fail it cannot claim")
    assert process.get("/livez?verbose")[1].startswith("failed\nevent_loop pass")


def test_unfinished_work_is_shown(process: Process) -> None:
    process.runs = [{"run_id": "r", "thread_id": "\ud800", "nodes": [], "age_s": 1.5}]
    status, body = process.get("/debug/live")

    assert status == 200
    assert json.loads(body)["runs"][0]["run_id"] == "r"


@pytest.mark.parametrize("target", ["/", "", "/health", "/metrics/", "//metrics", "http://[/"])
def test_anything_else_is_told_what_there_is(process: Process, target: str) -> None:
    answer = process.admin.answer("GET", target)

    assert answer.status == 404
    assert answer.media_type == "application/problem+json"
    assert json.loads(answer.body)["detail"] == "there are /metrics, /livez, /debug/live"


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(process: Process, method: str) -> None:
    answer = process.admin.answer(method, "/metrics")

    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"
    assert json.loads(answer.body)["code"] == "method_not_allowed"


def test_what_fails_is_an_answer_too(process: Process) -> None:
    process.admin = Admin(process.metrics, alive=lambda: [], live=lambda: 1 / 0)  # type: ignore[arg-type]
    with capture_logs() as records:
        status, body = process.get("/debug/live")

    assert status == 500
    assert json.loads(body)["detail"] == "see the log"
    assert records[0]["exc_info"] is True
    assert process.metrics["telemetry_internal_errors_total"].value("admin") == 1


def test_scrapers_that_come_at_once_share_a_rendering() -> None:
    """One renders; those who come meanwhile wait, and one of them renders for all."""
    rendered: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def render(accept: str) -> tuple[bytes, str]:
        rendered.append(accept)
        begun.set()
        assert go_on.wait(30)
        return str(len(rendered)).encode(), accept

    shared = _Shared(render)
    answers: list[tuple[bytes, str]] = []
    scrapers = [threading.Thread(target=lambda: answers.append(shared("text"))) for _ in range(20)]
    scrapers[0].start()
    assert begun.wait(30)
    for scraper in scrapers[1:]:
        scraper.start()
    while shared.asked < 20:
        pass
    go_on.set()
    for scraper in scrapers:
        scraper.join()

    assert len(rendered) == 2
    assert sorted(answers) == [(b"1", "text")] + [(b"2", "text")] * 19


def test_each_form_and_each_time_is_rendered_anew() -> None:
    rendered: list[str] = []

    def render(accept: str) -> tuple[bytes, str]:
        rendered.append(accept)
        return b"", accept

    shared = _Shared(render)
    for accept in ("text", "text", "openmetrics", "text"):
        assert shared(accept)[1] == accept

    assert rendered == ["text", "text", "openmetrics", "text"]


def test_a_rendering_that_fails_is_nobody_elses() -> None:
    answers = iter([ZeroDivisionError(), (b"ok", "text")])

    def render(accept: str) -> tuple[bytes, str]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shared = _Shared(render)
    with pytest.raises(ZeroDivisionError):
        shared("text")

    assert shared("text") == (b"ok", "text")
