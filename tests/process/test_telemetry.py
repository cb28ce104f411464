"""What real servers export: whole traces, through kills, drains and collectors that do not answer.

Every test reads three accounts of the same runs, lines, spans and log records, and they agree.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from itertools import pairwise

import pytest
from lines import ENDS, completed, customs, texts, violations
from otlp import Sink, Span, collecting, nobody, serving_http, silence
from server import Line, Reader, Server, until

OUTCOMES = {
    "node.completed": "success",
    "node.failed": "error",
    "node.interrupted": "interrupted",
    "node.cancelled": "cancelled",
}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def exporting(url: str) -> dict[str, str]:
    """Variables of a server that exports there, soon."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_BLRP_SCHEDULE_DELAY": "50",
    }


@pytest.fixture
def sink() -> Iterator[Sink]:
    with collecting() as sink:
        yield sink


@pytest.fixture
def traced(serving: Callable[..., Server], sink: Sink) -> Server:
    return serving(**exporting(sink.url)).start()


class Elsewhere:
    """A server that nodes ask: its first answer to a path is 503, the others are 200."""

    def __init__(self) -> None:
        self.url = ""
        #: Path and `traceparent` of each request.
        self.asked: list[tuple[str, str]] = []


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    elsewhere = Elsewhere()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            again = any(path == self.path for path, _ in elsewhere.asked)
            elsewhere.asked.append((self.path, self.headers.get("traceparent", "")))
            self.send_response(200 if again or "thread" in self.path else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with serving_http(Handler) as elsewhere.url:
        yield elsewhere


# What must be true of the spans of every run that has ended.


def trace_of(sink: Sink, lines: Sequence[Line], *, cut: int = 0) -> list[Span]:
    """The trace of a run, once it is whole; it agrees with the lines, all epochs together.

    `cut` says how many back-offs were cut short.
    """
    assert violations(lines) == []
    (trace_id,) = {line["trace_id"] for line in lines}
    sink.wait(*{line["span_id"] for line in lines}, *node_ids(lines))
    spans = sink.trace(trace_id)
    known = {span.span_id: span for span in spans}
    assert len(known) == len(spans), "a span came twice"

    # Every parent is there.
    (root,) = [span for span in spans if span.parent_id not in known]
    assert (root.kind, root.parent_id) == ("SERVER", "")
    assert root.span_id == lines[0]["span_id"]

    # Segments: one for each epoch, each linked to the one before.
    begun = [line for line in lines if line["type"] in ("run.started", "run.recovered")]
    segments = [known[line["span_id"]] for line in begun]
    assert segments == [span for span in spans if span.name.startswith("run ")]
    assert {segment.parent_id for segment in segments} == {root.span_id}
    assert [segment.attributes["sereno.run.epoch"] for segment in segments] == [
        line["epoch"] for line in begun
    ]
    assert segments[-1].attributes["sereno.run.outcome"] == lines[-1]["data"]["status"]
    for before, segment in pairwise(segments):
        (link,) = segment.links
        assert (link.trace_id, link.span_id) == (trace_id, before.span_id)
        assert link.attributes == {"sereno.link.kind": "previous_segment"}

    # E1: attempts.
    started = [line for line in lines if line["type"] == "node.started"]
    attempts = [s for s in spans if s.attributes.get("sereno.attempt.layer") == "node"]
    assert {span.span_id: described(span) for span in attempts} == {
        line["span_id"]: (
            "/".join([*line["ns"], line["node"]]),
            line["epoch"],
            line["attempt"],
            line["data"]["node_span_id"],
        )
        for line in started
    }
    # E2: attempts that were retried; E3: retries.
    retrying = [line["span_id"] for line in lines if line["type"] == "node.retrying"]
    assert retrying == [s.span_id for s in attempts if s.attributes["sereno.attempt.will_retry"]]
    retries = [span for span in attempts if span.attributes["sereno.attempt.number"] > 1]
    assert len(retries) == len(retrying) - cut

    # Nodes: each with the outcome of its end line; without one it is drained or lost.
    requeued = {line["epoch"] for line in lines if line["type"] == "run.requeued"}
    ends = {(line["task"], line["epoch"]): line for line in lines if line["type"] in ENDS}
    outcomes = {}
    for line in started:
        end = ends.get((line["task"], line["epoch"]))
        without = "drained" if line["epoch"] in requeued else "lost"
        outcome = OUTCOMES[end["type"]] if end is not None else without
        outcomes[line["data"]["node_span_id"]] = outcome
    nodes = [span for span in spans if span.name.startswith("node ")]
    assert {span.span_id: span.attributes["sereno.node.outcome"] for span in nodes} == outcomes

    # Everything below the request says which run it is.
    of_run = {"sereno.run.id": lines[0]["run_id"], "sereno.thread.id": lines[0]["thread_id"]}
    for span in spans:
        assert span is root or of_run.items() <= span.attributes.items(), span.name
    return spans


def described(attempt: Span) -> tuple[str, int, int, str]:
    said = attempt.attributes
    path, epoch = said["sereno.node.path"], said["sereno.run.epoch"]
    return path, epoch, said["sereno.attempt.number"], attempt.parent_id


def node_ids(lines: Sequence[Line]) -> set[str]:
    return {line["data"]["node_span_id"] for line in lines if line["type"] == "node.started"}


def paths(spans: Sequence[Span]) -> Counter[str]:
    """Each span as the names from the root to it."""
    known = {span.span_id: span for span in spans}

    def path(span: Span) -> str:
        around = known.get(span.parent_id)
        return span.name if around is None else f"{path(around)} > {span.name}"

    return Counter(path(span) for span in spans)


def seconds(line: Line) -> float:
    return datetime.fromisoformat(line["ts"]).timestamp()


# One run.


def test_a_run_is_one_trace_from_the_request_to_the_requests_of_its_nodes(
    traced: Server, sink: Sink, elsewhere: Elsewhere
) -> None:
    given = {"seen": [], "url": elsewhere.url}
    answer = traced.post("/v1/runs", graph="calling", thread_id="t", input=given)
    lines = traced.lines(answer.json()["run_id"])
    spans = trace_of(sink, lines)

    trace_id = answer.headers["X-Trace-Id"]
    root = next(span for span in spans if not span.parent_id)
    assert trace_id == root.trace_id == lines[0]["trace_id"]
    assert answer.headers["traceresponse"] == f"00-{trace_id}-{root.span_id}-01"
    run = "POST /v1/runs > run calling"
    fetch = f"{run} > node fetch > attempt fetch"
    call = next(span.name for span in spans if span.name.endswith("look_up"))
    in_thread = f"{run} > node fetch_in_thread > attempt fetch_in_thread"
    assert paths(spans) == {
        "POST /v1/runs": 1,
        run: 1,
        f"{run} > node fetch": 1,
        fetch: 1,
        f"{fetch} > {call}": 2,
        f"{fetch} > {call} > GET": 2,
        f"{run} > node fetch_in_thread": 1,
        in_thread: 1,
        f"{in_thread} > GET": 1,
    }
    requests = [span for span in sorted(spans, key=lambda s: s.start) if span.name == "GET"]
    assert {span.kind for span in requests} == {"CLIENT"}
    # Those who were asked can go on with the trace.
    assert [seen for _, seen in elsewhere.asked] == [
        f"00-{trace_id}-{span.span_id}-01" for span in requests
    ]
    calls = [span for span in spans if span.name == call]
    assert [(s.status, s.attributes["sereno.attempt.outcome"]) for s in calls] == [
        ("ERROR", "retried"),
        ("UNSET", "success"),
    ]
    assert [span.events for span in calls] == [["exception"], []]
    errors = {span.name for span in spans if span.status == "ERROR"}
    assert errors == {call, "GET"}


def test_outbound_requests_are_no_spans_when_that_is_asked(
    serving: Callable[..., Server], sink: Sink, elsewhere: Elsewhere
) -> None:
    server = serving(**exporting(sink.url), SERENO_INSTRUMENT_HTTPX="0").start()
    given = {"seen": [], "url": elsewhere.url}
    spans = trace_of(sink, server.lines(server.submit("calling", "t", input=given)))

    assert not [span for span in spans if span.kind == "CLIENT"]


def test_a_reader_has_a_trace_of_its_own_that_leads_to_the_run(traced: Server, sink: Sink) -> None:
    traced.hold("t", "a")
    run_id = traced.submit("chain", "t")
    traced.entered("t", "a")
    with Reader(traced, run_id) as reader:
        reader.saw("caught_up")
        traced.release("t", "a")
    answer = traced.get(f"/v1/runs/{run_id}/stream", heartbeat=0)
    lines = traced.lines(run_id)
    spans = trace_of(sink, lines)

    assert answer.headers["X-Trace-Id"] == lines[0]["trace_id"]
    sink.wait(answer.headers["traceresponse"].split("-")[2])
    segment = next(span for span in spans if span.name == "run chain")
    readings = [s for s in sink.spans if s.name == "GET /v1/runs/{run_id}/stream"]
    live, *replayed = sorted(readings, key=lambda span: span.start)
    for reading in (live, *replayed):
        assert sink.trace(reading.trace_id) == [reading]
        (link,) = reading.links
        assert (link.trace_id, link.span_id) == (segment.trace_id, segment.span_id)
        assert link.attributes == {"sereno.link.kind": "run"}
        assert reading.attributes["sereno.stream.close_reason"] == "complete"
    assert live.start < segment.end <= replayed[0].start
    assert live.attributes["sereno.stream.events"] == len(reader.lines)
    assert replayed[0].attributes["sereno.stream.events"] == len(lines)


@pytest.mark.parametrize("trust", ["parent", "link", "ignore"])
def test_whose_trace_it_is_when_the_client_has_one(
    serving: Callable[..., Server], sink: Sink, trust: str
) -> None:
    server = serving(**exporting(sink.url), SERENO_TRACE_TRUST=trust).start()
    theirs, span = "ab" * 16, "cd" * 8
    answer = server.http.post(
        f"{server.url}/v1/runs",
        json={"graph": "chain", "thread_id": "t", "input": {}},
        headers={"traceparent": f"00-{theirs}-{span}-01"},
    )
    lines = server.lines(answer.json()["run_id"])
    sink.wait(*{line["span_id"] for line in lines})

    (trace_id,) = {line["trace_id"] for line in lines}
    root = next(s for s in sink.trace(trace_id) if s.span_id == lines[0]["span_id"])
    assert (trace_id == theirs) is (trust == "parent")
    assert root.parent_id == (span if trust == "parent" else "")
    links = [(link.trace_id, link.span_id) for link in root.links]
    assert links == ([(theirs, span)] if trust == "link" else [])


def test_log_records_come_to_the_collector_with_the_ids_of_their_spans(
    serving: Callable[..., Server], sink: Sink
) -> None:
    server = serving(**exporting(sink.url), SERENO_OTLP_LOGS="1").start()
    run_id = server.submit("chain", "t")
    spans = {span.span_id: span for span in trace_of(sink, server.lines(run_id))}
    server.term()
    assert server.wait() == 0

    told = [line for line in server.events("attempt.failed") if line["run_id"] == run_id]
    assert len(told) == 1
    logged = Counter(
        (line["event"], line["span_id"])
        for line in (parsed for name in EVENTS for parsed in server.events(name))
        if line["run_id"] == run_id
    )
    received = [r for r in sink.records if r.attributes.get("run_id") == run_id and r.event]
    assert Counter((r.event, r.span_id) for r in received if r.event in EVENTS) == logged
    assert {name for name, _ in logged} == set(EVENTS)
    assert {record.trace_id for record in received if record.event in EVENTS} == {
        span.trace_id for span in spans.values()
    }
    assert {span_id for _, span_id in logged} <= spans.keys()
    failed = next(record for record in received if record.event == "attempt.failed")
    assert spans[failed.span_id].name == "attempt c"
    assert failed.attributes["error_type"] == "ConnectionError"
    assert failed.resource == next(iter(spans.values())).resource


EVENTS = ("run.queued", "run.started", "node.retrying", "attempt.failed", "run.completed")


def test_exemplars_lead_to_spans(traced: Server, sink: Sink) -> None:
    trace_of(sink, traced.lines(traced.submit("chain", "t")))
    shown = traced.scrape(OPENMETRICS)
    found = re.findall(
        r'^(\w+)_bucket\{.*# \{(?=.*trace_id="(\w+)")(?=.*span_id="(\w+)")', shown, re.M
    )

    assert {"sereno_run_duration_seconds", "sereno_node_duration_seconds"} <= {
        name for name, _, _ in found
    }
    sink.wait(*(span_id for _, _, span_id in found))
    assert {(span.trace_id, span.span_id) for span in sink.spans} >= {
        (trace_id, span_id) for _, trace_id, span_id in found
    }
    assert "# {" not in traced.scrape("text/plain")


def test_two_processes_export_and_can_be_told_apart(
    serving: Callable[..., Server], sink: Sink
) -> None:
    servers = [serving(**exporting(sink.url)).start() for _ in range(2)]
    instances = []
    for server in servers:
        spans = trace_of(sink, server.lines(server.submit("short", "t")))
        (instance,) = {span.resource["service.instance.id"] for span in spans}
        assert {span.resource["service.name"] for span in spans} == {"sereno"}
        instances.append(instance)

    assert instances[0] != instances[1]


# Kills.


def exported(server: Server, sink: Sink, run_id: str) -> None:
    """Wait until what has ended of a run is at the collector; the process can die then."""
    ids: set[str] = set()
    lines = server.lines(run_id, follow=0)
    for number, line in enumerate(lines):
        if line["type"] == "node.started":
            later = [other for other in lines[number:] if other.get("task") == line["task"]]
            if any(other["type"] in ENDS for other in later):
                ids |= {line["span_id"], line["data"]["node_span_id"]}
            elif any(other["type"] == "node.retrying" for other in later):
                ids.add(line["span_id"])
    sink.wait(lines[0]["span_id"], *ids)


@dataclass(frozen=True, slots=True)
class Death:
    """Of a process, with the end of the lease that its run had. Unix seconds."""

    at: float
    lease: float


def kill(server: Server, sink: Sink, run_id: str) -> Death:
    """As the kernel does it, once what has ended is exported."""
    exported(server, sink, run_id)
    at = time.time()
    server.kill()
    db = sqlite3.connect(server.folder / "s.db")
    try:
        asked = db.execute("SELECT lease_until FROM runs WHERE run_id = ?", (run_id,))
        return Death(at, asked.fetchone()[0])
    finally:
        db.close()


def assert_lost(spans: Sequence[Span], lines: Sequence[Line], epoch: int, death: Death) -> None:
    """What was open when the process of an epoch died is written, as far as lines tell of it.

    It ends with the lease, which ends with the next process at the latest.
    """
    mine = [line for line in lines if line["epoch"] == epoch]
    over = {line["task"] for line in mine if line["type"] in ENDS}
    begun: dict[str, float] = {}
    for line in mine:
        if line["type"] in ("run.started", "run.recovered"):
            begun[line["span_id"]] = seconds(line)
        elif line["type"] == "node.started" and line["task"] not in over:
            begun.setdefault(line["data"]["node_span_id"], seconds(line))
            begun[line["span_id"]] = seconds(line)
        elif line["type"] == "node.retrying":
            begun.pop(line["span_id"], None)

    (recovered,) = [
        line for line in lines if line["type"] == "run.recovered" and line["epoch"] == epoch + 1
    ]
    lost = {s.span_id: s for s in spans if s.attributes.get("error.type") == "worker_lost"}
    lost = {i: s for i, s in lost.items() if s.attributes["sereno.run.epoch"] == epoch}
    assert lost.keys() == begun.keys()
    for span_id, span in lost.items():
        what = span.name.partition(" ")[0]
        assert span.attributes[f"sereno.{what}.outcome"] == "lost"
        assert span.status == "ERROR"
        assert span.start == pytest.approx(begun[span_id], abs=0.001)
        assert death.at - 0.001 < span.end < min(death.lease, seconds(recovered)) + 0.002


@pytest.mark.parametrize(
    ("graph", "node", "lost"),
    [
        ("chain", "b", ["attempt b", "node b", "run chain"]),
        ("chain", "c2", ["attempt c", "node c", "run chain"]),
        ("tiring", "tire", ["node tire", "run tiring"]),
        ("nested", "two", ["attempt sub", "attempt two", "node sub", "node two", "run nested"]),
    ],
    ids=["node", "later attempt", "back-off", "subgraph"],
)
def test_a_kill_leaves_no_hole_in_the_trace(
    traced: Server, sink: Sink, graph: str, node: str, lost: list[str]
) -> None:
    traced.hold("t", node)
    run_id = traced.submit(graph, "t")
    traced.entered("t", node)
    if graph == "tiring":
        traced.wait_line(run_id, "node.retrying")
    else:
        attempt = 2 if node == "c2" else 1
        name = "c" if node == "c2" else node
        traced.wait_line(run_id, "node.started", node=name, attempt=attempt)
    death = kill(traced, sink, run_id)
    traced.release("t", node)
    traced.start()
    lines = traced.lines(run_id)
    spans = trace_of(sink, lines, cut=1 if graph == "tiring" else 0)

    assert lines[-1]["type"] == "run.completed"
    assert_lost(spans, lines, 1, death)
    assert sorted(s.name for s in spans if s.attributes.get("error.type") == "worker_lost") == lost
    triggers = [s.attributes.get("sereno.run.trigger") for s in spans if s.name == f"run {graph}"]
    assert triggers[-1] == "recovery"
    assert traced.metric("sereno_runs_lost_total", graph=graph) == 1
    assert traced.metric("sereno_runs_recovered_total", graph=graph) == 1
    (told,) = traced.events("run.lost")
    assert (told["run_id"], told["trace_id"]) == (run_id, lines[0]["trace_id"])
    assert traced.metric("sereno_runs_finished_total", graph=graph) == 1


def test_a_lost_segment_ends_with_its_lease(serving: Callable[..., Server], sink: Sink) -> None:
    lease = {"SERENO_LEASE_S": "1", "SERENO_LEASE_HEARTBEAT_S": "0.2"}
    server = serving(**exporting(sink.url), **lease).start()
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    server.wait_line(run_id, "node.started", node="b")
    death = kill(server, sink, run_id)
    server.release("t", "b")
    until(lambda: time.time() > death.lease + 0.1, "the lease is over")
    server.start()
    lines = server.lines(run_id)
    spans = trace_of(sink, lines)

    assert_lost(spans, lines, 1, death)
    ends = [s.end for s in spans if s.attributes.get("error.type") == "worker_lost"]
    assert ends == [pytest.approx(death.lease, abs=0.001)] * 3


def test_two_kills_leave_no_hole_in_the_trace(traced: Server, sink: Sink) -> None:
    traced.hold("t", "a")
    run_id = traced.submit("chain", "t")
    deaths = []
    for node, following in (("a", "b"), ("b", "")):
        traced.entered("t", node)
        traced.wait_line(run_id, "node.started", node=node)
        if following:
            traced.hold("t", following)
        deaths.append(kill(traced, sink, run_id))
        traced.release("t", node)
        traced.start()
    lines = traced.lines(run_id)
    spans = trace_of(sink, lines)

    assert lines[-1]["epoch"] == 3
    for epoch, death in enumerate(deaths, 1):
        assert_lost(spans, lines, epoch, death)
    assert traced.metric("sereno_runs_lost_total", graph="chain") == 1


def test_a_run_that_kills_again_and_again_fails_and_has_a_whole_trace(
    traced: Server, sink: Sink
) -> None:
    traced.hold("t", "die")
    run_id = traced.submit("deadly", "t")
    deaths = 0
    while not (failed := traced.events("run.failed")):
        if traced.marks("t").count("die") > deaths:
            deaths += 1
            traced.wait_line(run_id, "node.started", epoch=deaths)
            exported(traced, sink, run_id)
            traced.release("t", "die")
            assert traced.wait() < 0
            traced.hold("t", "die")
            traced.start()
        time.sleep(0.01)
    lines = traced.lines(run_id)
    sink.wait(*(line["span_id"] for line in lines))
    spans = sink.trace(lines[0]["trace_id"])

    assert deaths > 1
    known = {span.span_id: span for span in spans}
    assert [s.name for s in spans if s.parent_id not in known] == ["POST /v1/runs"]
    assert {
        known[line["span_id"]].attributes["sereno.attempt.outcome"]
        for line in lines
        if (line["type"] == "node.started")
    } == {"lost"}
    segments = [known[line["span_id"]] for line in lines if line["type"].startswith("run.")]
    outcomes = [s.attributes["sereno.run.outcome"] for s in segments[1:]]
    assert outcomes == ["lost"] * deaths + ["error"]
    assert failed[0]["span_id"] == segments[-1].span_id


# Drains, interrupts.


def test_a_drained_run_goes_on_in_its_trace_and_nothing_is_lost(traced: Server, sink: Sink) -> None:
    traced.hold("t", "b")
    run_id = traced.submit("chain", "t")
    traced.entered("t", "b")
    traced.term()
    (draining,) = until(lambda: traced.logged("Draining"), "it drains")
    assert "trace_id" not in draining  # no request asks for it
    traced.release("t", "b")
    assert traced.wait() == 0
    traced.start()
    spans = trace_of(sink, traced.lines(run_id))

    segments = [span for span in spans if span.name == "run chain"]
    assert [s.attributes["sereno.run.outcome"] for s in segments] == ["drained", "success"]
    assert segments[0].attributes["sereno.cancel.reason"] == "shutdown"
    assert [s.attributes["sereno.run.trigger"] for s in segments] == ["api", "recovery"]
    assert not [s for s in spans if s.attributes.get("error.type") == "worker_lost"]
    assert [s.name for s in spans if s.status == "ERROR"] == ["attempt c"]
    assert traced.metric("sereno_runs_lost_total") == 0


def test_a_back_off_that_a_drain_cuts_short_is_no_loss(
    serving: Callable[..., Server], sink: Sink
) -> None:
    server = serving(**exporting(sink.url)).start(SERENO_DRAIN_S="0.2")
    server.hold("t", "tire")
    run_id = server.submit("tiring", "t")
    server.wait_line(run_id, "node.retrying")
    server.term()
    assert server.wait() == 0
    server.release("t", "tire")
    server.start()
    spans = trace_of(sink, server.lines(run_id), cut=1)

    nodes = [span for span in spans if span.name == "node tire"]
    assert [span.attributes["sereno.node.outcome"] for span in nodes] == ["drained", "success"]
    assert nodes[0].status == "UNSET"
    assert nodes[0].attributes["sereno.cancel.reason"] == "shutdown"
    assert 0 < nodes[0].attributes["sereno.node.backoff_s"] < 10
    assert server.metric("sereno_runs_lost_total") == 0


def test_an_answer_begins_a_trace_that_leads_to_the_question_in_another_process_too(
    traced: Server, sink: Sink
) -> None:
    asking = traced.submit("asking", "t")
    asked = trace_of(sink, traced.lines(asking))
    traced.term()
    assert traced.wait() == 0
    traced.start()
    answered = trace_of(sink, traced.lines(traced.resume("t", "yes")))

    before = next(span for span in asked if span.name == "run asking")
    after = next(span for span in answered if span.name == "run asking")
    assert before.attributes["sereno.run.outcome"] == "interrupted"
    assert after.attributes["sereno.run.trigger"] == "resume"
    assert before.trace_id != after.trace_id
    (link,) = after.links
    assert (link.trace_id, link.span_id) == (before.trace_id, before.span_id)
    assert link.attributes == {"sereno.link.kind": "resume_of"}
    assert {span.status for span in [*asked, *answered]} == {"UNSET"}


# What is unfinished.


def test_a_blocked_event_loop_answers_operators_and_is_told_with_the_node(
    traced: Server, sink: Sink
) -> None:
    run_id = traced.submit("freezing", "t")
    traced.entered("t", "freeze")
    age = "sereno_event_loop_heartbeat_age_seconds"
    until(lambda: traced.metric(age) > 0.5, "the loop is blocked", 4)
    began = time.monotonic()
    (run,) = traced.http.get(f"{traced.admin}/debug/live").json()["runs"]
    assert traced.http.get(f"{traced.admin}/livez").text.startswith("ok")
    blocked = traced.metric(age)
    took = time.monotonic() - began

    assert run["run_id"] == run_id
    assert [(node["node"], node["state"]) for node in run["nodes"]] == [("freeze", "running")]
    assert blocked > 0.5
    assert took < 2
    lines = traced.lines(run_id)
    trace_of(sink, lines)
    (stall,) = until(lambda: traced.events("loop.stalled", ongoing=False), "it is told")
    assert (stall["run_id"], stall["graph"], stall["node"]) == (run_id, "freezing", "freeze")
    assert stall["trace_id"] == lines[0]["trace_id"]
    assert stall["file"].endswith("tests/process/graphs.py")
    with open(stall["file"]) as source:
        assert "time.sleep(5)" in source.read().splitlines()[stall["line"] - 1]
    assert stall["blocked_s"] == pytest.approx(5, abs=1)
    assert traced.metric("sereno_event_loop_stalls_total", graph="freezing", node="freeze") == 1


def test_a_long_run_is_told_with_the_node_that_is_open(serving: Callable[..., Server]) -> None:
    server = serving(SERENO_RUN_HEARTBEAT_S="0.2").start()
    for node in ("two", "tire"):
        server.hold("t-" + node, node)
    nested, tiring = server.submit("nested", "t-two"), server.submit("tiring", "t-tire")
    server.entered("t-two", "two")

    def told(run_id: str, *nodes: tuple[str, str]) -> bool:
        beats = server.events("run.heartbeat", run_id=run_id)
        found = [[(node["node"], node["state"]) for node in beat["nodes"]] for beat in beats]
        return [*nodes] in found

    until(lambda: told(nested, ("sub", "running"), ("sub/two", "running")), "the nodes are told")
    until(lambda: told(tiring, ("tire", "retrying")), "the back-off is told")
    ages = [beat["age_s"] for beat in server.events("run.heartbeat", run_id=nested)]
    assert ages == sorted(ages)
    server.release("t-two", "two")
    assert server.lines(nested)[-1]["type"] == "run.completed"
    count = len(server.events("run.heartbeat", run_id=nested))
    seen = len(server.events("run.heartbeat", run_id=tiring))
    until(lambda: len(server.events("run.heartbeat", run_id=tiring)) > seen + 1, "it beats further")
    assert len(server.events("run.heartbeat", run_id=nested)) <= count + 1


# Collectors that are in trouble.

RUNS = 20
#: Ended spans of one run of the chain: segment, nodes, attempts, chats.
SPANS = 1 + 3 + 4 + 2


@contextmanager
def busy() -> Iterator[str]:
    """A collector that answers 503."""
    with collecting(status=503) as sink:
        yield sink.url


@pytest.mark.parametrize("logs", ["0", "1"], ids=["spans", "spans and logs"])
@pytest.mark.parametrize("collector", [nobody, silence, busy])
def test_a_collector_in_trouble_costs_no_line_and_no_time(
    serving: Callable[..., Server],
    collector: Callable[[], AbstractContextManager[str]],
    logs: str,
) -> None:
    with collector() as url:
        server = serving(**exporting(url), SERENO_OTLP_LOGS=logs).start()
        logs_of = run_many(server)
        lost = "sereno_telemetry_spans_total"
        until(lambda: server.metric(lost, result="failed") >= RUNS * SPANS, "losses are counted")
        exported = server.metric(lost, result="exported")
        server.term()
        began = time.monotonic()
        assert server.wait() == 0
        took = time.monotonic() - began

    for lines in logs_of:
        assert_whole_chain(lines)
    assert exported == 0
    assert took < 5
    told = Counter(line["signal"] for line in server.events("telemetry.degraded"))
    assert told["traces"] == 1
    assert told["logs"] <= 1
    # What libraries say of it themselves is said once, and at the end how often it was not.
    noise = [line for line in logged(server) if line["level"] == "ERROR"]
    assert all(line["name"].startswith("opentelemetry.exporter.") for line in noise)
    once = Counter(line["msg"] for line in noise if "suppressed" not in line)
    assert max(once.values(), default=0) <= 1


def test_a_full_queue_drops_spans_and_counts_them(serving: Callable[..., Server]) -> None:
    with silence() as url:
        small = {**exporting(url), "OTEL_BSP_MAX_QUEUE_SIZE": "32"}
        server = serving(**small).start()
        logs_of = run_many(server)
        dropped = server.metric("sereno_telemetry_spans_total", result="dropped_queue_full")
        capacity = server.metric("sereno_telemetry_span_queue_capacity")
        waiting = server.metric("sereno_telemetry_span_queue")

    for lines in logs_of:
        assert_whole_chain(lines)
    assert dropped > 0
    assert waiting <= capacity == 32
    assert [line["signal"] for line in server.events("telemetry.degraded")] == ["traces"]


def test_a_collector_that_comes_back_is_told_once(serving: Callable[..., Server]) -> None:
    with collecting(status=400) as sink:
        server = serving(**exporting(sink.url)).start()
        first = server.lines(server.submit("short", "first"))
        until(lambda: server.events("telemetry.degraded"), "the outage is told")
        sink.status = 200
        second = server.lines(server.submit("short", "second"))
        trace_of(sink, second)
        (recovered,) = until(lambda: server.events("telemetry.recovered"), "its end is told")
        failed = server.metric("sereno_telemetry_spans_total", result="failed")

    assert violations(first) == []
    (degraded,) = server.events("telemetry.degraded")
    assert degraded["reason"] == "HTTP 400"
    assert degraded["failed"] + recovered["failed"] == failed


def logged(server: Server) -> list[Line]:
    return [json.loads(line) for line in server.output.splitlines() if line.startswith("{")]


def run_many(server: Server) -> list[list[Line]]:
    """The whole logs of many runs at the same time."""
    logs: dict[int, list[Line]] = {}

    def run(number: int) -> None:
        logs[number] = server.lines(server.submit("chain", f"t{number}"))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(RUNS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logs) == RUNS
    return list(logs.values())


def assert_whole_chain(lines: Sequence[Line]) -> None:
    assert violations(lines) == []
    assert completed(lines) == {"a": 1, "b": 1, "c": 1}
    assert texts(lines) == ["first words of the chain", "second words"]
    assert customs(lines) == ["{'part': 1}", "{'part': 2}", "{'try': 'c'}"]
    assert lines[-1]["data"]["output"] == {"seen": ["a", "b", "c"]}
    expected = ["run.queued", "run.started"]
    for node in (
        ["started", "message", "completed"],
        ["started", "custom", "custom", "message", "completed"],
        ["started", "custom", "retrying", "started", "custom", "completed"],
    ):
        plain = ("message", "custom")
        expected += [name if name in plain else f"node.{name}" for name in node]
    # How many tokens a line joins depends on the time; nothing else does.
    types = [line["type"] for line in lines]
    assert [t for t in types if t != "token"] == [*expected, "run.completed"]
    assert types.count("token") >= 2
