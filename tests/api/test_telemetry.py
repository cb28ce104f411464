"""What requests about runs leave behind: one span each, numbers of streams, records, headers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from runtime.engines.memory import MemoryEngine
from runtime.errors import StorageFailed
from telemetry.setup import Telemetry

from .conftest import Serving
from .graphs.play import Stage
from .harness import NDJSON, Server, problem

Requests = Callable[[], list[ReadableSpan]]


def telemetry(server: Server) -> Telemetry:
    found: Telemetry = server.app.state.telemetry
    return found


def requests_of(server: Server) -> Requests:
    """The spans of requests, from now on."""
    exporter = InMemorySpanExporter()
    telemetry(server).tracing.add(SimpleSpanProcessor(exporter))
    return lambda: [s for s in exporter.get_finished_spans() if s.kind is SpanKind.SERVER]


@pytest.fixture
def requests(server: Server) -> Requests:
    return requests_of(server)


def said(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def value(server: Server, name: str, *labels: str) -> float:
    return server.services.metrics[name].value(*labels)


def records(logs: list[Any], type: str) -> list[dict[str, Any]]:
    return [record for record in logs if record.get("event_type") == type]


def tail(server: Server, run_id: str, *, window: int | None = None, **params: Any) -> Any:
    return server.stream("GET", f"/v1/runs/{run_id}/stream", params=params, window=window)


def trace_of(answer: Any) -> str:
    return str(answer.headers["traceresponse"].split("-")[1])


# A stream is one span, and says how it went.


async def test_a_stream_of_a_thousand_lines_is_one_span(
    server: Server, gates: Stage, requests: Requests, logs: list[Any]
) -> None:
    gates.open("burst")
    body = {"graph": "bursts", "input": {"n": 1000}, "thread_id": "t"}
    answer = await server.post("/v1/runs", body, headers=NDJSON)
    (span,) = requests()
    lines = [line for line in answer.lines() if "seq" in line]

    assert len(lines) > 1000
    assert span.name == "POST /v1/runs"
    assert span.status.status_code is StatusCode.UNSET
    assert (
        said(span).items()
        >= {
            "http.route": "/v1/runs",
            "http.response.status_code": 200,
            "sereno.run.id": answer.headers["x-run-id"],
            "sereno.thread.id": "t",
            "sereno.graph.name": "bursts",
            "sereno.stream": True,
            "sereno.stream.close_reason": "complete",
            "sereno.stream.events": len(lines),
            "sereno.stream.bytes": len(answer.body),
            "sereno.stream.from_seq": 0,
            "sereno.stream.last_seq": lines[-1]["seq"],
        }.items()
    )
    assert said(span)["sereno.stream.first_output_s"] > 0
    assert said(span)["sereno.stream.max_gap_s"] >= 0
    (opened,) = records(logs, "stream.opened")
    (closed,) = records(logs, "stream.closed")
    assert (opened["kind"], opened["from_seq"]) == ("origin", 0)
    for name in ("events", "bytes", "from_seq", "last_seq", "first_output_s", "max_gap_s"):
        assert closed[name] == said(span)[f"sereno.stream.{name}"]


async def test_a_stream_counts_what_it_delivers(
    server: Server, gates: Stage, logs: list[Any]
) -> None:
    gates.open("burst")
    body = {"graph": "bursts", "input": {"n": 100}}
    answer = await server.post("/v1/runs", body, headers=NDJSON)

    assert value(server, "stream_events_total", "custom") == 100
    assert value(server, "stream_events_total", "run.completed") == 1
    assert value(server, "stream_events_total", "caught_up") == answer.types().count("caught_up")
    assert value(server, "stream_bytes_total", "origin") == len(answer.body)
    assert value(server, "stream_delivery_lag_seconds", "origin") >= 1
    assert value(server, "stream_gap_seconds", "origin") >= 1
    assert value(server, "streams_active", "origin") == 0
    assert value(server, "streams_closed_total", "complete") == 1
    # Streams have families of their own, and records of their own.
    assert value(server, "http_request_duration_seconds", "POST", "/v1/runs", "2xx") == 0
    assert [record for record in logs if record["event"] == "Request"] == []


async def test_readers_are_told_apart(server: Server, gates: Stage, logs: list[Any]) -> None:
    body = {"graph": "gated", "input": {}}
    async with server.stream("POST", "/v1/runs", json=body, headers=NDJSON) as origin:
        await origin.until("node.started")
        run_id = origin.headers["x-run-id"]
        async with tail(server, run_id) as join, tail(server, run_id, after=2) as resume:
            await join.until("caught_up")
            await resume.until("caught_up")
            active = [value(server, "streams_active", k) for k in ("origin", "join", "resume")]
            gates.open("first", "second")
            await asyncio.gather(origin.end(), join.end(), resume.end())
    await server.replay(run_id)
    kinds = [record["kind"] for record in records(logs, "stream.opened")]

    assert active == [1, 1, 1]
    assert kinds == ["origin", "join", "resume", "join"]
    assert value(server, "stream_resumes_total", "complete") == 1
    assert value(server, "streams_closed_total", "complete") == 4


@pytest.mark.parametrize("how", ["get", "post"])
async def test_the_seed_profile_tells_who_started(
    server: Server, gates: Stage, logs: list[Any], how: str
) -> None:
    asked: dict[str, Any] = {"thread_id": "t", "graph": "gated"}
    for _ in range(2):
        if how == "get":
            stream = await server.open("GET", "/api/stream", params=asked)
        else:
            stream = await server.open("POST", "/api/stream", json=asked)
        await stream.until("node.started")
        await stream.close()

    assert [record["kind"] for record in records(logs, "stream.opened")] == ["origin", "join"]


# Every end has a reason.


@pytest.mark.parametrize("how", ["disconnect", "break_off"])
async def test_a_client_that_goes_is_no_error(
    serve: Serving, gates: Stage, logs: list[Any], how: str
) -> None:
    gates.open("burst")
    async with serve(heartbeat_s=0.02) as server:
        requests = requests_of(server)
        run_id = await server.start("gated")
        await gates.arrival("first")
        async with tail(server, run_id) as stream:
            seen = [await stream.line() for _ in range(4)]
            getattr(stream, how)()
            await stream.over()
        span = requests()[-1]

        assert seen[-1] is not None
        assert span.status.status_code is StatusCode.UNSET
        assert said(span)["sereno.stream.close_reason"] == "client_disconnect"
        assert said(span)["sereno.stream.events"] == 3
        assert value(server, "streams_closed_total", "client_disconnect") == 1
        assert value(server, "http_aborted_total", "streaming", "client") == 1
        assert value(server, "http_aborted_total", "streaming", "server") == 0
        assert records(logs, "stream.closed")[0]["reason"] == "client_disconnect"
        gates.open("first", "second")
        await server.wait(run_id)


async def test_a_client_that_does_not_read_is_slow(
    serve: Serving, gates: Stage, logs: list[Any]
) -> None:
    async with serve(write_timeout_s=0.05) as server:
        requests = requests_of(server)
        run_id = await server.ended("free")
        async with tail(server, run_id, window=1) as stream:
            await stream.over()
        span = requests()[-1]

        assert span.status.status_code is StatusCode.UNSET
        assert said(span)["sereno.stream.close_reason"] == "slow_consumer"
        assert said(span)["sereno.stream.last_seq"] == 0
        assert value(server, "streams_closed_total", "slow_consumer") == 1
        assert value(server, "stream_send_blocked_seconds_total") >= 0.04
        assert value(server, "http_aborted_total", "streaming", "server") == 1
        assert records(logs, "stream.slow")[0]["run_id"] == run_id


async def test_a_server_that_shuts_down_is_the_reason(
    server: Server, gates: Stage, requests: Requests, logs: list[Any]
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    async with tail(server, run_id, heartbeat=0) as stream:
        await stream.until("caught_up")
        await server.worker.drain()
        await stream.rest()
    span = requests()[-1]

    assert said(span)["sereno.stream.close_reason"] == "server_shutdown"
    assert span.status.status_code is StatusCode.UNSET
    assert value(server, "streams_closed_total", "server_shutdown") == 1


async def test_a_stream_that_took_too_long_is_the_reason(serve: Serving, gates: Stage) -> None:
    async with serve(stream_max_s=0.05) as server:
        requests = requests_of(server)
        run_id = await server.start("gated")
        await gates.arrival("first")
        async with tail(server, run_id) as stream:
            await stream.rest()
        span = requests()[-1]

        assert said(span)["sereno.stream.close_reason"] == "timeout"
        assert value(server, "streams_closed_total", "timeout") == 1
        gates.open("first", "second")
        await server.wait(run_id)


class Unreadable(MemoryEngine):
    """Its disk goes away while it serves."""

    gone: Exception | None = None

    async def read(self, run_id: str, after: int, limit: int = 1000) -> Any:
        if self.gone is not None:
            raise self.gone
        return await super().read(run_id, after, limit)


@pytest.mark.parametrize("error", [StorageFailed("disk"), RuntimeError("a mistake of ours")])
async def test_a_failure_after_200_is_an_error_of_the_request(
    serve: Serving, logs: list[Any], error: Exception
) -> None:
    """No line is invented: the client sees an end without the terminal line, and resumes."""
    engine = Unreadable()
    async with serve(engine=engine) as server:
        requests = requests_of(server)
        run_id = await server.ended("free")
        engine.gone = error
        async with tail(server, run_id) as stream:
            await stream.over()
            lines = await stream.rest()
        span = requests()[-1]
        engine.gone = None

        assert (stream.status, lines) == (200, [])
        assert span.status.status_code is StatusCode.ERROR
        assert said(span)["error.type"] == type(error).__name__
        assert [event.name for event in span.events] == ["exception"]
        assert said(span)["sereno.stream.close_reason"] == "error"
        assert value(server, "streams_closed_total", "error") == 1
        assert value(server, "http_aborted_total", "streaming", "server") == 1
        assert records(logs, "stream.closed")[0]["reason"] == "error"
        assert (await server.replay(run_id)).types()[-1] == "run.completed"


async def test_a_run_that_fails_is_no_error_of_the_request(
    server: Server, requests: Requests
) -> None:
    body = {"graph": "fails", "input": {}}
    answer = await server.post("/v1/runs", body, headers=NDJSON)
    (span,) = requests()

    assert answer.types()[-1] == "run.failed"
    assert span.status.status_code is StatusCode.UNSET
    assert said(span)["sereno.stream.close_reason"] == "complete"


# Whose trace is whose.


async def test_every_answer_about_a_run_names_its_trace(server: Server, gates: Stage) -> None:
    started = await server.post("/v1/runs", {"graph": "gated", "input": {}, "thread_id": "t"})
    run_id = started.json()["run_id"]
    traces = {started.headers["x-trace-id"]}
    path = f"/v1/runs/{run_id}"
    live = [
        await server.get(path),
        await server.get(f"{path}/wait", params={"timeout": 0}),
        await server.get(f"{path}/stream", params={"follow": 0}),
        await server.get("/api/stream", params={"run_id": run_id, "after": "x"}),
        await server.get(f"{path}/stream", params={"after": 999}),
    ]
    gates.open("first", "second")
    ended = [
        await server.get(f"{path}/wait"),
        await server.replay(run_id),
        await server.replay(run_id, after="latest"),
        await server.post(f"{path}/cancel"),
    ]
    answers = [started, *live, *ended]
    traces |= {a.headers["x-trace-id"] for a in answers if "x-trace-id" in a.headers}

    assert [a.status for a in live] == [200, 202, 200, 400, 400]
    assert [a.status for a in ended] == [200, 200, 204, 200]
    assert traces == {trace_of(started)}
    assert all("x-trace-id" in a.headers for a in answers if a is not live[3])
    assert len({trace_of(a) for a in answers}) == len(answers)


async def test_answers_about_no_run_name_no_runs_trace(server: Server) -> None:
    for path in ("/v1/runs", "/v1/runs/nope", "/v1/graphs", "/v1/threads/nope/state"):
        answer = await server.get(path)

        assert "x-trace-id" not in answer.headers
        assert trace_of(answer)


async def test_a_problem_names_the_requests_trace(server: Server, requests: Requests) -> None:
    unknown = await server.get("/v1/runs/nope")
    wrong = await server.post("/v1/runs", {"graph": "free"})
    large = await server.post("/v1/runs", {"graph": "free", "input": "x" * 10_000_000})
    nowhere = await server.get("/nowhere")

    for answer in (unknown, wrong, large, nowhere):
        assert answer.json()["trace_id"] == trace_of(answer)
    assert [said(span)["http.response.status_code"] for span in requests()] == [404, 422, 413, 404]
    assert {span.status.status_code for span in requests()} == {StatusCode.UNSET}


async def test_a_mistake_of_ours_is_an_error_with_its_name(
    server: Server, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def search(*_: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(server.engine, "search", search)
    answer = await server.get("/v1/runs")
    (span,) = requests()

    assert problem(answer, 500, "internal")["trace_id"] == trace_of(answer)
    assert (span.status.status_code, said(span)["error.type"]) == (StatusCode.ERROR, "RuntimeError")
    assert [event.name for event in span.events] == ["exception"]


async def test_a_refusal_is_an_error_with_its_name(server: Server, requests: Requests) -> None:
    await server.worker.drain()
    answer = await server.post("/v1/runs", {"graph": "free", "input": {}})
    (span,) = requests()

    assert answer.status == 503
    assert (span.status.status_code, said(span)["error.type"]) == (StatusCode.ERROR, "Draining")


async def test_joins_and_replays_link_to_the_run(
    server: Server, gates: Stage, requests: Requests
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    await server.replay(run_id, follow=0)
    gates.open("first", "second")
    result = await server.wait(run_id)
    await server.replay(run_id, after=1)
    await server.get("/api/stream", params={"run_id": run_id})
    trace_id = (await server.replay(run_id)).headers["x-trace-id"]
    started, *others = requests()
    readers = [span for span in others if "sereno.stream" in said(span)]

    assert result["status"] == "success"
    assert started.links == ()
    assert len(readers) == 3
    for span in readers:
        (link,) = span.links
        assert f"{link.context.trace_id:032x}" == trace_id
        assert dict(link.attributes or {}) == {"sereno.link.kind": "run"}


async def test_a_request_says_which_run_it_is_about(server: Server, requests: Requests) -> None:
    run_id = await server.ended("free", thread_id="t")
    for path in ("", "/wait", "/data/1/update"):
        await server.get(f"/v1/runs/{run_id}{path}")
    await server.get("/v1/threads/t/state")
    *about_run, about_thread = requests()

    assert {said(span)["sereno.run.id"] for span in about_run} == {run_id}
    for span in requests():
        assert said(span)["sereno.thread.id"] == "t"
        assert said(span)["sereno.graph.name"] == "free"
    assert "sereno.run.id" not in said(about_thread)


async def test_a_request_that_is_no_stream_has_a_line(server: Server, logs: list[Any]) -> None:
    run_id = await server.ended("free")
    lines = [record for record in logs if record["event"] == "Request"]

    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/v1/runs", 202),
        ("GET", "/v1/runs/{run_id}/wait", 200),
    ]
    assert run_id not in str([line["route"] for line in lines])
    assert value(server, "http_request_duration_seconds", "POST", "/v1/runs", "2xx") == 1


async def test_probes_leave_no_span(server: Server, requests: Requests, logs: list[Any]) -> None:
    for path in ("/health", "/healthz", "/livez", "/ready", "/readyz", "/startupz", "/metrics"):
        assert (await server.get(path)).status == 200
        assert value(server, "health_checks_total", path, "pass") == (path != "/metrics")

    assert (requests(), logs) == ([], [])


# Telemetry that fails.


NAMES_OF_SPANS = ("traceresponse", "x-trace-id")


def _breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("telemetry is broken")


@pytest.mark.parametrize(
    "target",
    [
        "telemetry.streams.StreamWatch._live",
        "telemetry.streams.StreamWatch._blocked",
        "telemetry.streams.StreamWatch._statistics",
        "telemetry.streams._time_of",
        "telemetry.streams._log.info",
        "telemetry.http.ids_of",
        "telemetry.http.set_error",
        "telemetry.metrics.Family.inc",
        "telemetry.metrics.Family.dec",
        "telemetry.metrics.Family.observe",
        "telemetry.selfwatch.Selfwatch.internal_error",
        "opentelemetry.sdk.trace.Span.set_attribute",
        "opentelemetry.sdk.trace.Span.set_attributes",
        "opentelemetry.sdk.trace.Span.add_link",
        "opentelemetry.sdk.trace.Span.end",
    ],
)
async def test_a_stream_is_the_same_when_telemetry_fails(
    server: Server, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Byte for byte, but for the headers that name spans."""
    run_id = await server.ended("free")
    path = f"/v1/runs/{run_id}/stream"

    async def told() -> list[Any]:
        found = []
        for params in ({}, {"after": 2}, {"types": "node.completed"}, {"after": 99}):
            answer = await server.get(path, params=params)
            headers = {k: v for k, v in answer.headers.items() if k not in NAMES_OF_SPANS}
            body = answer.body
            if answer.status == 400:  # a problem names the trace, and so differs in length too
                headers.pop("content-length")
                body = {k: v for k, v in answer.json().items() if k != "trace_id"}
            found.append((answer.status, headers, body))
        return found

    whole = await told()
    monkeypatch.setattr(target, _breaks)

    assert await told() == whole


async def test_a_run_whose_span_cannot_be_told_is_read_all_the_same(
    server: Server, requests: Requests
) -> None:
    run_id = await server.ended("free")
    whole = await server.replay(run_id)
    object.__setattr__(server.services, "run_context", _breaks)
    again = await server.replay(run_id)

    assert again.body == whole.body
    assert requests()[-1].links == ()
    assert value(server, "telemetry_internal_errors_total", "http") == 1
