"""Each way for something to end has one outcome, and span, metric, log record and line say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from signals import attribute, label

from runtime.engines.memory import MemoryEngine
from runtime.errors import StorageFailed
from runtime.events import NODE_END_TYPES, TERMINAL_TYPES
from runtime.model import Run, StoredLine

from .chaos_graphs import graph_file, script
from .harness import NDJSON, Stream
from .observed import Observed, Observer


class Failing(MemoryEngine):
    """Its runs cannot be read while it is told so: a stream reads its run with each heartbeat."""

    fails = False

    async def get(self, run_id: str) -> Run:
        if self.fails:
            raise StorageFailed("the disk is gone")
        return await super().get(run_id)


@dataclass(frozen=True)
class Ends:
    """What is told of one run, of one of its nodes, and of the stream that began it."""

    #: What happens after the node's first attempt began.
    happens: Callable[[Scene], Awaitable[None]]
    graph: str
    #: The node's path, and what it does, call by call.
    node: str
    does: tuple[str, ...]
    #: Outcomes: of the segment, the node, and its attempts.
    run: str
    ended: str
    attempts: tuple[str, ...]
    #: Types of the run's last line and of the node's.
    last: str
    line: str | None
    #: Why something was cancelled, where something was.
    reason: str | None = None
    error_class: str | None = None
    #: How the stream closed, and whether that is an error of the request.
    stream: str = "complete"
    failed: bool = False
    #: Of the request.
    more: dict[str, Any] | None = None


@dataclass
class Scene:
    """A run whose node has begun, and the client that started it."""

    server: Observed
    engine: Failing
    run_id: str
    stream: Stream

    async def rest(self) -> None:
        await self.stream.rest()
        await self.stream.over()


async def nothing(scene: Scene) -> None:
    await scene.rest()


async def client_goes(scene: Scene) -> None:
    scene.stream.disconnect()
    await scene.stream.over()
    script.release("t")
    await scene.server.wait(scene.run_id)


async def delivery_fails(scene: Scene) -> None:
    scene.engine.fails = True
    await scene.stream.over()
    scene.engine.fails = False
    script.release("t")
    await scene.server.wait(scene.run_id)


async def somebody_cancels(scene: Scene) -> None:
    await scene.server.post(f"/v1/runs/{scene.run_id}/cancel", {"reason": "wrong question"})
    await scene.rest()


async def server_drains(scene: Scene) -> None:
    await scene.server.worker.drain()
    await scene.rest()


CANCELLED = {
    "run": "cancelled",
    "ended": "cancelled",
    "last": "run.cancelled",
    "line": "node.cancelled",
    "reason": "api",
}
SUCCESS: dict[str, Any] = {
    "run": "success",
    "ended": "success",
    "attempts": ("success",),
    "last": "run.completed",
    "line": "node.completed",
}
ERROR = {"run": "error", "ended": "error", "last": "run.failed", "line": "node.failed"}

CASES = (
    pytest.param(
        Ends(client_goes, "held", "hold", ("park",), stream="client_disconnect", **SUCCESS),
        id="a client disconnects",
    ),
    pytest.param(
        Ends(delivery_fails, "held", "hold", ("park",), stream="error", failed=True, **SUCCESS),
        id="the delivery fails in mid-stream",
    ),
    pytest.param(
        Ends(
            nothing,
            "asks",
            "ask",
            (),
            run="interrupted",
            ended="interrupted",
            attempts=("interrupted",),
            last="run.interrupted",
            line="node.interrupted",
        ),
        id="a node asks",
    ),
    pytest.param(
        Ends(somebody_cancels, "held", "hold", ("park",), attempts=("cancelled",), **CANCELLED),
        id="somebody cancels",
    ),
    pytest.param(
        Ends(somebody_cancels, "patient", "sleeps", ("fail",), attempts=("retried",), **CANCELLED),
        id="somebody cancels in a back-off",
    ),
    pytest.param(
        Ends(nothing, "commands", "sub/jump", (), **SUCCESS), id="a command to the graph around"
    ),
    pytest.param(
        Ends(nothing, "commands", "sub", (), **SUCCESS), id="the node that such a command ends"
    ),
    pytest.param(
        Ends(
            nothing,
            "timed",
            "brief",
            ("park", "park", "park"),
            attempts=("retried", "retried", "exhausted"),
            error_class="timeout",
            **ERROR,
        ),
        id="a node times out",
    ),
    pytest.param(
        Ends(
            nothing,
            "retried",
            "first",
            ("fatal",),
            attempts=("failed",),
            error_class="other",
            **ERROR,
        ),
        id="a node fails for good",
    ),
    pytest.param(
        Ends(
            nothing,
            "held",
            "hold",
            ("park",),
            run="timeout",
            ended="cancelled",
            attempts=("cancelled",),
            last="run.timed_out",
            line="node.cancelled",
            reason="deadline",
            error_class="timeout",
            more={"deadline_s": 1.0},
        ),
        id="the deadline passes",
    ),
    pytest.param(
        Ends(
            server_drains,
            "held",
            "hold",
            ("park",),
            run="drained",
            ended="drained",
            attempts=("cancelled",),
            last="run.requeued",
            line=None,
            reason="shutdown",
            stream="server_shutdown",
        ),
        id="the server drains",
    ),
)


@pytest.mark.parametrize("ends", CASES)
async def test_every_signal_tells_the_same_end(tmp_path: Path, ends: Ends) -> None:
    observer, engine = Observer(), Failing()
    script.forget("t")
    script.close("t")
    script.tell("t", {ends.node.rpartition("/")[2]: ends.does})
    with observer.logging():
        source = graph_file(tmp_path)
        async with observer.serving(source, store=engine, heartbeat_s=0.02) as server:
            body = {
                "graph": ends.graph,
                "input": {"n": 1},
                "thread_id": "t",
                "stream": ["updates"],
                **(ends.more or {}),
            }
            async with server.stream("POST", "/v1/runs", json=body, headers=NDJSON) as stream:
                begun = "node.retrying" if ends.attempts == ("retried",) else "node.started"
                await stream.until(begun)
                run_id = stream.headers["x-run-id"]
                await ends.happens(Scene(server, engine, run_id, stream))
            stored = [read(line) for line in await engine.read(run_id, 0)]

    check_run(observer, ends, stored)
    check_node(observer, ends, stored)
    check_stream(observer, ends)


def check_run(observer: Observer, ends: Ends, lines: list[dict[str, Any]]) -> None:
    (span,) = named(observer, f"run {ends.graph}")
    (record,) = observer.events(ends.last)
    failed = ends.run in ("error", "timeout")
    finished = {} if ends.run == "drained" else {(ends.graph, ends.run): 1}
    error = lines[-1]["data"].get("error", {})

    assert lines[-1]["type"] == ends.last
    assert lines[-1]["span_id"] == record["span_id"] == f"{span.context.span_id:016x}"
    assert attribute(span, "run.outcome") == ends.run
    assert attribute(span, "cancel.reason") == (ends.reason if not failed else None)
    assert (span.status.status_code is StatusCode.ERROR) == failed
    assert attribute(span, "error.class") == ends.error_class
    assert error.get("error_class") == record.get("error_class") == ends.error_class
    assert error.get("error_type") == (span.attributes or {}).get("error.type")
    if ends.last in TERMINAL_TYPES:
        assert lines[-1]["data"]["status"] == record["status"] == ends.run
    assert observer.samples("runs_finished_total") == finished
    errors = {(ends.graph, ends.error_class): 1} if failed else {}
    assert observer.samples("run_errors_total") == errors


def check_node(observer: Observer, ends: Ends, lines: list[dict[str, Any]]) -> None:
    name = ends.node.rpartition("/")[2]
    (span,) = named(observer, f"node {name}")
    attempts = named(observer, f"attempt {name}")
    told = [x for x in lines if x["type"] in NODE_END_TYPES and label(x) == ends.node]
    records = [
        record
        for record in observer.records
        if record.get("event") in NODE_END_TYPES and record["node"] == ends.node
    ]
    types = [ends.line] if ends.line is not None else []
    failed = ends.ended == "error"

    assert attribute(span, "node.outcome") == ends.ended
    assert attribute(span, "cancel.reason") == ends.reason
    assert (span.status.status_code is StatusCode.ERROR) == failed
    assert attribute(span, "error.class") == (ends.error_class if failed else None)
    assert [line["type"] for line in told] == [r["event"] for r in records] == types
    assert tuple(attribute(a, "attempt.outcome") for a in attempts) == ends.attempts
    for attempt, outcome in zip(attempts, ends.attempts, strict=True):
        cancelled = outcome == "cancelled"
        assert attribute(attempt, "cancel.reason") == (ends.reason if cancelled else None)
        raised = outcome in ("retried", "exhausted", "failed")
        assert (attempt.status.status_code is StatusCode.ERROR) == raised
        assert len(attempt.events) == raised
    counted = {
        (which, outcome): count
        for (_, node, which, outcome), count in observer.samples("node_attempts_total").items()
        if node == ends.node
    }
    assert counted == Counter(
        ("first" if number == 0 else "retry", outcome)
        for number, outcome in enumerate(ends.attempts)
    )


def check_stream(observer: Observer, ends: Ends) -> None:
    (span,) = [s for s in named(observer, "POST /v1/runs") if attribute(s, "stream.close_reason")]
    (record,) = observer.events("stream.closed")

    assert attribute(span, "stream.close_reason") == record["reason"] == ends.stream
    assert (span.status.status_code is StatusCode.ERROR) == ends.failed
    assert ((span.attributes or {}).get("error.type") == "StorageFailed") == ends.failed
    assert observer.samples("streams_closed_total") == {(ends.stream,): 1}
    by = {"client_disconnect": "client", "error": "server", "server_shutdown": "server"}
    aborted = {("streaming", by[ends.stream]): 1} if ends.stream in by else {}
    assert observer.samples("http_aborted_total") == aborted


async def test_a_node_whose_sibling_fails_is_cancelled_for_that(tmp_path: Path) -> None:
    observer, engine = Observer(), MemoryEngine()
    script.close("t")
    script.tell("t", {"work-0": ["park"], "work-1": ["fatal"]})
    with observer.logging():
        async with observer.serving(graph_file(tmp_path), store=engine) as server:
            run_id = await server.ended("fanned", {"n": 2}, thread_id="t")
            lines = [read(line) for line in await engine.read(run_id, 0)]
    nodes = {attribute(s, "node.outcome"): s for s in named(observer, "node work")}
    told = Counter(line["type"] for line in lines if line["type"] in NODE_END_TYPES)
    records = Counter(r["event"] for r in observer.records if r.get("event") in NODE_END_TYPES)

    assert set(nodes) == {"cancelled", "error"}
    assert attribute(nodes["cancelled"], "cancel.reason") == "sibling_failed"
    assert nodes["cancelled"].status.status_code is StatusCode.UNSET
    assert told == records == {"node.cancelled": 1, "node.failed": 1}
    assert observer.samples("node_attempts_total") == {
        ("fanned", "work", "first", "cancelled"): 1,
        ("fanned", "work", "first", "failed"): 1,
    }


def named(observer: Observer, name: str) -> list[ReadableSpan]:
    found = [span for span in observer.spans if span.name == name]
    return sorted(found, key=lambda span: span.start_time or 0)


def read(line: StoredLine) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(line.body)
    return found
