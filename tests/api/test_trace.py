"""A run's trace without a backend."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Serving
from .graphs.play import Stage
from .harness import Server, problem


def spans(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        span
        for resource in document["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


async def test_a_runs_trace_is_otlp_json(server: Server) -> None:
    run_id = await server.ended("free")
    lines = (await server.replay(run_id)).lines()
    answer = await server.get(f"/v1/runs/{run_id}/trace")
    document = answer.json()

    assert answer.headers["cache-control"] == "no-store"
    assert document["complete"] is True
    found = {span["spanId"]: span for span in spans(document)}
    assert {line["span_id"] for line in lines} <= set(found)
    assert {span["traceId"] for span in found.values() if span["kind"] != 2} == {
        line["trace_id"] for line in lines
    }
    (segment,) = [span for span in found.values() if span["name"] == "run free"]
    assert found[segment["parentSpanId"]]["kind"] == 2  # the request that asked for it
    assert all(span["startTimeUnixNano"].isdigit() for span in found.values())


async def test_a_run_that_goes_on_shows_what_is_open(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    document = (await server.get(f"/v1/runs/{run_id}/trace")).json()
    gates.open("first", "second")
    await server.wait(run_id)
    ended = (await server.get(f"/v1/runs/{run_id}/trace")).json()

    assert {"run gated", "node first", "attempt first"} <= {s["name"] for s in document["open"]}
    assert document["complete"] is False
    assert ended["complete"] is True
    assert {"run gated", "node second"} <= {span["name"] for span in spans(ended)}


async def test_a_run_whose_spans_made_room_has_no_trace(serve: Serving) -> None:
    async with serve(recorder_spans=6) as server:
        old, *_ = [await server.ended("free") for _ in range(6)]
        answer = await server.get(f"/v1/runs/{old}/trace")

    assert problem(answer, 404, "trace_not_recorded")["detail"].startswith("no span of run")


async def test_without_tracing_there_is_no_trace_and_lines_have_no_ids(
    serve: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with serve() as server:
        run_id = await server.ended("free")
        lines = (await server.replay(run_id)).lines()
        answer = await server.get(f"/v1/runs/{run_id}/trace")

    assert lines[-1]["type"] == "run.completed"
    assert not any({"trace_id", "span_id"} & set(line) for line in lines)
    assert lines[2]["data"] == {} or "node_span_id" not in lines[2]["data"]
    problem(answer, 404, "trace_not_recorded")


async def test_an_unknown_run_is_unknown(server: Server) -> None:
    problem(await server.get("/v1/runs/nobody/trace"), 404, "run_not_found")
