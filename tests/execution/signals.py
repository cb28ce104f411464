"""Checks that spans, metrics, records and lines tell the same of a set of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry
from structlog.testing import LogCapture, capture_logs

from runtime.events import NODE_END_TYPES, TERMINAL_TYPES
from telemetry.metrics import Metrics
from telemetry.segments import Segments
from telemetry.tracing import Tracing

Line = dict[str, Any]

#: How a node's span and its end line call the same end.
ENDS = {
    "success": "node.completed",
    "error": "node.failed",
    "interrupted": "node.interrupted",
    "cancelled": "node.cancelled",
}
GAUGES = ("nodes_active", "node_retries_sleeping", "call_retries_sleeping", "runs_active")


class Told(Protocol):
    """What was told besides lines, by one worker or by several."""

    @property
    def spans(self) -> Sequence[ReadableSpan]: ...
    @property
    def records(self) -> Sequence[Mapping[str, Any]]: ...
    def samples(self, name: str) -> Counter[tuple[str, ...]]: ...
    def live(self) -> int: ...


class Signals:
    """What a worker tells besides lines."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(processors=[SimpleSpanProcessor(self._exporter)], enabled=True)
        self.metrics = Metrics()
        self.segments = Segments(self.metrics, self.tracing)
        self.records: list[Mapping[str, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the records that are logged inside; a capture around this one sees them as well."""
        (first, *_) = structlog.get_config()["processors"]
        if isinstance(first, LogCapture):
            before = len(first.entries)
            yield
            self.records = first.entries[before:]
            return
        with capture_logs() as self.records:  # type: ignore[assignment]
            yield

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def samples(self, name: str) -> Counter[tuple[str, ...]]:
        return samples([self.metrics.registry], name)

    def live(self) -> int:
        return self.tracing.live()


def samples(registries: Iterable[CollectorRegistry], name: str) -> Counter[tuple[str, ...]]:
    """The samples of a counter or gauge by label values, without those that are 0."""
    summed: Counter[tuple[str, ...]] = Counter()
    for registry in registries:
        for family in registry.collect():
            for sample in family.samples:
                if sample.name == f"sereno_{name}" and sample.value:
                    summed[tuple(sample.labels.values())] += sample.value  # type: ignore[assignment]
    return summed


@dataclass(frozen=True)
class Tree:
    """Spans by their id."""

    spans: Sequence[ReadableSpan]
    by_id: Mapping[int, ReadableSpan] = field(init=False)

    def __post_init__(self) -> None:
        by_id = {span.context.span_id: span for span in self.spans}
        assert len(by_id) == len(self.spans), "a span was exported twice"
        object.__setattr__(self, "by_id", by_id)

    def parent(self, span: ReadableSpan) -> ReadableSpan | None:
        return self.by_id.get(span.parent.span_id) if span.parent is not None else None

    def named(self, kind: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name.split()[0] == kind]

    def attempts(self, layer: str) -> list[ReadableSpan]:
        return [
            span
            for span in self.named("attempt")
            if span.attributes["sereno.attempt.layer"] == layer
        ]


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(f"sereno.{name}")


def hex_id(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def label(line: Line) -> str:
    return "/".join((*line["ns"], line["node"]))


def check_signals(
    signals: Told, lines: Sequence[Line], *, graph_of: Mapping[str, str] | None = None
) -> None:
    """Whether all four agree on what these runs did; `lines` are all lines of all of them."""
    tree = Tree(signals.spans)
    graphs = graph_of or {}

    def graph(line: Line) -> str:
        return graphs.get(line["run_id"], "graph")

    check_tree(tree)
    check_attempts(signals, tree, lines, graph)
    check_nodes(signals, tree, lines, graph)
    check_calls(signals, tree, lines, graph)
    check_runs(signals, tree, lines, graph)
    for gauge in GAUGES:
        assert not signals.samples(gauge), f"{gauge} did not return to 0"
    assert signals.live() == 0, "spans that never ended"


def check_tree(tree: Tree) -> None:
    """Every span is in its place, and says whose it is."""
    for span in tree.spans:
        kind, parent = span.name.split()[0], tree.parent(span)
        assert attribute(span, "run.id"), span.name
        assert attribute(span, "thread.id"), span.name
        assert attribute(span, "run.epoch") is not None, span.name
        assert span.end_time >= span.start_time or kind == "run", span.name
        if kind == "run":
            assert parent is None or parent.name.split()[0] not in ("node", "attempt")
            continue
        assert parent is not None, f"{span.name} has no parent"
        assert parent.start_time <= span.start_time or parent.name.startswith("run "), span.name
        assert parent.context.trace_id == span.context.trace_id
        assert attribute(span, "node.path") or kind == "attempt", span.name
        if kind == "node":
            assert attribute(span, "attempt.number") is None
            assert not span.events, "a node span owns no exception"
        elif attribute(span, "attempt.layer") == "node":
            assert parent.name == f"node {attribute(span, 'node.name')}"
        error = span.status.status_code is StatusCode.ERROR
        outcome = attribute(span, "attempt.outcome") or attribute(span, "node.outcome")
        if outcome is not None:
            raised = outcome in ("error", "retried", "exhausted", "failed", "lost")
            no_error = attribute(span, "attempt.layer") == "call" and not span.events
            assert error == raised or (raised and no_error), f"{span.name}: {outcome}"
            assert ("error.type" in span.attributes) == error, span.name
        assert len(span.events) <= 1, span.name


def check_attempts(signals: Told, tree: Tree, lines: Sequence[Line], graph: Any) -> None:
    spans, started = tree.attempts("node"), [x for x in lines if x["type"] == "node.started"]
    retrying = [x for x in lines if x["type"] == "node.retrying"]
    counted = signals.samples("node_attempts_total")

    def key(span: ReadableSpan) -> tuple[str, str]:
        return attribute(span, "graph.name"), attribute(span, "node.path")

    # E1
    assert Counter(map(key, spans)) == Counter((graph(x), label(x)) for x in started)
    by_outcome = Counter((*key(s), attribute(s, "attempt.outcome")) for s in spans)
    assert by_outcome == _summed(counted, 0, 1, 3)
    assert {hex_id(s): attribute(s, "attempt.number") for s in spans} == {
        x["span_id"]: x["attempt"] for x in started
    }
    # E2
    retried = Counter(key(s) for s in spans if attribute(s, "attempt.will_retry"))
    assert retried == Counter((graph(x), label(x)) for x in retrying)
    assert retried == _summed({k: v for k, v in counted.items() if k[3] == "retried"}, 0, 1)
    assert retried == Counter((r["graph"], r["node"]) for r in _records(signals, "node.retrying"))
    # E3
    again = Counter((graph(x), label(x)) for x in started if x["attempt"] > 1)
    assert again == _summed({k: v for k, v in counted.items() if k[2] == "retry"}, 0, 1)
    assert not again - retried


def check_nodes(signals: Told, tree: Tree, lines: Sequence[Line], graph: Any) -> None:
    spans = tree.named("node")
    ends = [x for x in lines if x["type"] in NODE_END_TYPES]
    called = [x for x in ends if "attempt" in x]
    # Of what a run without room for lines was doing, its last line is the end.
    full = {
        x["run_id"]
        for x in lines
        if x["type"] == "run.failed" and x["data"]["error"]["code"] == "log_limit"
    }
    told = Counter(
        (attribute(s, "graph.name"), attribute(s, "node.path"), ENDS[outcome])
        for s in spans
        if (outcome := attribute(s, "node.outcome")) in ENDS
        and not (outcome == "cancelled" and attribute(s, "run.id") in full)
    )
    assert told == Counter(
        (graph(x), label(x), x["type"])
        for x in called
        if not (x["type"] == "node.cancelled" and x["run_id"] in full)
    )
    assert Counter(
        (r["graph"], r["node"], r["event_type"])
        for r in signals.records
        if r.get("event_type") in NODE_END_TYPES
    ) == Counter((graph(x), label(x), x["type"]) for x in ends)
    assert {hex_id(s) for s in spans} == {
        x["data"]["node_span_id"] for x in lines if x["type"] == "node.started"
    }
    cached = Counter((graph(x), label(x)) for x in ends if x["data"].get("cached"))
    assert cached == signals.samples("nodes_cached_total")
    measured = signals.samples("node_duration_seconds_count")
    assert measured == Counter(
        (attribute(s, "graph.name"), attribute(s, "node.path")) for s in spans
    )


def check_calls(signals: Told, tree: Tree, lines: Sequence[Line], graph: Any) -> None:
    spans, retrying = tree.attempts("call"), [x for x in lines if x["type"] == "call.retrying"]
    counted = signals.samples("call_attempts_total")
    assert _summed(counted, 0, 1, 3) == Counter(
        (attribute(s, "graph.name"), attribute(s, "call.name"), attribute(s, "attempt.outcome"))
        for s in spans
    )
    retried = Counter(
        (attribute(s, "graph.name"), attribute(s, "call.name"))
        for s in spans
        if attribute(s, "attempt.will_retry")
    )
    assert retried == Counter((graph(x), x["data"]["call"]) for x in retrying)
    assert retried == Counter((r["graph"], r["call"]) for r in _records(signals, "call.retrying"))
    assert {x["span_id"] for x in retrying} <= {hex_id(s) for s in spans}


def check_runs(signals: Told, tree: Tree, lines: Sequence[Line], graph: Any) -> None:
    segments = tree.named("run")
    finished = [x for x in lines if x["type"] in TERMINAL_TYPES]
    told = Counter((graph(x), x["data"]["status"]) for x in finished)
    final = Counter(
        (attribute(s, "graph.name"), attribute(s, "run.outcome"))
        for s in segments
        if attribute(s, "run.outcome") not in ("lost", "drained")
    )
    assert final == told
    assert signals.samples("runs_finished_total") == told
    assert told == Counter(
        (r["graph"], r["status"]) for r in signals.records if r.get("event_type") in TERMINAL_TYPES
    )
    queued = Counter(graph(x) for x in lines if x["type"] == "run.queued")
    assert _summed(signals.samples("runs_started_total"), 0) == queued
    ids = {hex_id(s) for s in segments}
    assert {x["span_id"] for x in (*finished, *lines) if x["type"].startswith("run.st")} <= ids
    assert {x["span_id"] for x in finished} <= ids


def _records(signals: Told, event: str) -> list[Mapping[str, Any]]:
    return [record for record in signals.records if record.get("event_type") == event]


def _summed(samples: Mapping[tuple[str, ...], float], *kept: int) -> Counter[tuple[str, ...] | str]:
    """Samples added up over the labels that are not kept."""
    summed: Counter[Any] = Counter()
    for labels, value in samples.items():
        key = tuple(labels[i] for i in kept)
        summed[key if len(key) > 1 else key[0]] += value
    return summed
