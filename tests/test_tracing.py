"""What every span has: ids, parents, the run around it, errors once, and a bound on everything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, use_span
from structlog.testing import capture_logs

from telemetry.contract import VERSION
from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch
from telemetry.tracing import (
    LONGEST_TEXT,
    Tracing,
    exemplar,
    ids_of,
    new_context,
    read_traceparent,
    set_error,
    traceparent,
)

RUN = {"sereno.run.id": "01RUN", "sereno.graph.name": "g"}
SECRET = "sk-canary-4711"


class Kept(SpanProcessor):
    """The spans that ended, in that order."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)

    def __getitem__(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self.spans if span.name == name)
        return span

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.spans]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def tracing(kept: Kept) -> Iterator[Tracing]:
    made = Tracing(processors=[kept])
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator has said nothing."""
    import os

    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def context_of(span: trace.Span) -> SpanContext:
    return span.get_span_context()


# Parents and ids.


def test_a_span_without_a_parent_is_a_root_whatever_span_is_current(
    tracing: Tracing, kept: Kept
) -> None:
    outer = tracing.start("outer")
    with use_span(outer):
        tracing.start("root").end()

    assert kept["root"].parent is None
    assert kept["root"].context.trace_id != context_of(outer).trace_id


def test_a_span_has_the_parent_links_kind_and_start_that_it_is_given(
    tracing: Tracing, kept: Kept
) -> None:
    parent, other = new_context(), new_context()
    tracing.start(
        "child",
        kind=SpanKind.CLIENT,
        parent=parent,
        attributes={"a": 1, "nothing": None},
        links=[Link(other, {"sereno.link.kind": "resume_of"})],
        start_ns=17,
    ).end()

    span = kept["child"]
    assert span.parent == parent
    assert span.context.trace_id == parent.trace_id
    assert span.kind is SpanKind.CLIENT
    assert span.start_time == 17
    assert dict(span.attributes) == {"a": 1}
    assert [link.context for link in span.links] == [other]


def test_a_root_can_be_put_into_a_given_trace(tracing: Tracing, kept: Kept) -> None:
    tracing.start("given", trace_id=77).end()
    tracing.start("own").end()

    assert kept["given"].parent is None
    assert kept["given"].context.trace_id == 77
    assert kept["own"].context.trace_id != 77


def test_a_given_trace_id_is_used_once_even_if_the_start_fails(
    tracing: Tracing, kept: Kept
) -> None:
    with pytest.raises(AttributeError):
        tracing.start("bad", trace_id=77, links=[object()])  # type: ignore[list-item]
    tracing.start("next").end()

    assert kept["next"].context.trace_id != 77


def test_spans_are_kept_below_a_parent_that_is_not_sampled(tracing: Tracing, kept: Kept) -> None:
    caller = read_traceparent(f"00-{5:032x}-{6:016x}-00")
    assert caller is not None
    tracing.start("here", parent=caller).end()

    assert kept["here"].context.trace_flags.sampled


def test_a_span_of_the_past_has_the_ids_that_it_had(tracing: Tracing, kept: Kept) -> None:
    context, parent = new_context(), new_context()
    tracing.write(
        "attempt score",
        context=context,
        parent=parent,
        attributes=RUN | {"nothing": None},
        start_ns=10,
        end_ns=20,
        error="worker_lost",
    )

    span = kept["attempt score"]
    assert (span.context, span.parent) == (context, parent)
    assert (span.start_time, span.end_time) == (10, 20)
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes) == RUN | {"error.type": "worker_lost"}
    assert span.resource.attributes["service.name"] == "sereno"
    assert tracing.live() == 0


@pytest.mark.parametrize("flags", ["00", "01", "03"])
def test_a_traceparent_is_read_as_it_was_written(flags: str) -> None:
    header = f"00-{0xABC:032x}-{0xDEF:016x}-{flags}"
    context = read_traceparent(f" {header} ")

    assert context is not None
    assert context.is_remote
    assert (context.trace_id, context.span_id) == (0xABC, 0xDEF)
    assert traceparent(context) == header[:-1] + ("1" if flags != "00" else "0")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(None, id="none"),
        pytest.param("", id="empty"),
        pytest.param("00-abc-def-01", id="short"),
        pytest.param(f"00-{0:032x}-{1:016x}-01", id="no-trace"),
        pytest.param(f"00-{1:032x}-{0:016x}-01", id="no-span"),
        pytest.param(f"ff-{1:032x}-{1:016x}-01", id="forbidden-version"),
        pytest.param(f"00-{1:032x}-{1:016x}-01-more", id="tail-of-version-0"),
        pytest.param(f"00-{10:032X}-{1:016x}-01", id="upper-case"),
        pytest.param(f"00-{1:032x}-{1:016x}-01\nx", id="line-break"),
    ],
)
def test_what_is_not_a_traceparent_is_nobody(value: str | None) -> None:
    assert read_traceparent(value) is None


def test_a_later_version_of_the_traceparent_may_say_more() -> None:
    assert read_traceparent(f"01-{1:032x}-{1:016x}-01-more") is not None


def test_ids_are_spelled_in_hex_and_those_of_nobody_are_none() -> None:
    context = new_context(trace_id=0xABC)
    trace_id, span_id = ids_of(context) or ("", "")

    assert trace_id == f"{0xABC:032x}"
    assert int(span_id, 16) == context.span_id
    assert exemplar(context) == {"trace_id": trace_id, "span_id": span_id}
    assert ids_of(None) is None
    assert exemplar(trace.INVALID_SPAN_CONTEXT) is None


# What is around a span.


def test_other_peoples_spans_learn_the_run_they_belong_to(kept: Kept) -> None:
    around = RUN | {"sereno.node.name": "score"}
    tracing = Tracing(processors=[kept], identify=lambda: around)
    tracer = tracing.provider.get_tracer("httpx")
    tracer.start_span("GET", attributes={"sereno.node.name": "mine"}).end()
    tracer.start_span("POST /v1/runs", kind=SpanKind.SERVER).end()
    tracing.start("node a", attributes={"sereno.run.id": "other"}).end()

    assert dict(kept["GET"].attributes) == RUN | {"sereno.node.name": "mine"}
    assert dict(kept["POST /v1/runs"].attributes) == {}
    assert dict(kept["node a"].attributes) == {"sereno.run.id": "other"}


def test_an_error_in_telemetry_reaches_nobody_and_is_counted(kept: Kept) -> None:
    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise ValueError

        def _on_ending(self, span: Any) -> None:
            raise ValueError

        def on_end(self, span: Any) -> None:
            raise ValueError

    def broken() -> dict[str, Any]:
        raise ValueError

    metrics = Metrics()
    tracing = Tracing(processors=[Broken(), kept], identify=broken, selfwatch=Selfwatch(metrics))
    with capture_logs() as logs:
        tracing.start("a").end()

    assert kept.names == ["a"]
    assert metrics["telemetry_internal_errors_total"].value("tracing") == 4
    assert len(logs) == 1


def test_live_spans_are_those_neither_ended_nor_discarded(tracing: Tracing, kept: Kept) -> None:
    ended = tracing.start("a", attributes=RUN)
    dropped = tracing.start("b", attributes=RUN)
    left = tracing.start("c", attributes=RUN)
    ended.end()
    tracing.discard(dropped)
    tracing.discard(dropped)

    assert tracing.live() == 1
    assert [span.name for span in tracing.open_spans("01RUN")] == ["c"]
    assert tracing.open_spans("other") == []
    left.end()
    assert tracing.live() == 0
    assert kept.names == ["a", "c"]


# Bounds.


def test_a_budget_leaves_out_later_spans_of_a_run_but_no_parent_of_one_that_is_kept(
    kept: Kept,
) -> None:
    metrics = Metrics()
    tracing = Tracing(processors=[kept], selfwatch=Selfwatch(metrics), budget=50)
    segment = tracing.start("run g", attributes=RUN | {"sereno.run.trigger": "api"})
    loop = tracing.start("node loop", parent=context_of(segment), attributes=RUN)
    for number in range(100):
        node = tracing.start(f"node {number}", parent=context_of(loop), attributes=RUN)
        tracing.start(f"attempt {number}", parent=context_of(node), attributes=RUN).end()
        node.end()
    tracing.start("elsewhere", attributes={"sereno.run.id": "other"}).end()
    tracing.write(
        "checkpoint put", context=new_context(), parent=None, attributes=RUN, start_ns=1, end_ns=2
    )
    loop.end()
    segment.end()

    assert len(kept.spans) == 50 + len({"run g", "elsewhere"})
    there = {span.context.span_id for span in kept.spans}
    assert all(span.parent is None or span.parent.span_id in there for span in kept.spans)
    assert tracing.suppressed("01RUN") == 202 - 50
    assert metrics["telemetry_spans_total"].value("dropped_budget") == 202 - 50
    assert tracing.live() == 0
    tracing.forget("01RUN")
    assert tracing.suppressed("01RUN") == 0


def test_long_text_is_cut_and_said_to_be(tracing: Tracing, kept: Kept) -> None:
    span = tracing.start("a", attributes={"fits": "x" * LONGEST_TEXT, "number": 1})
    span.end()
    tracing.start("b", attributes={"long": "x" * (LONGEST_TEXT + 1), "number": 1}).end()

    assert dict(kept["a"].attributes) == {"fits": "x" * LONGEST_TEXT, "number": 1}
    assert dict(kept["b"].attributes) == {
        "long": "x" * LONGEST_TEXT,
        "number": 1,
        "sereno.truncated": True,
    }


# Errors.


def test_an_error_has_its_class_and_the_exception_once_at_the_innermost_span(
    tracing: Tracing, kept: Kept
) -> None:
    exc = caught(ConnectionError("refused"))
    segment = tracing.start("run")
    node = tracing.start("node", parent=context_of(segment))
    attempt = tracing.start("attempt", parent=context_of(node))
    between = tracing.start("mine", parent=context_of(attempt))
    call = tracing.start("call", parent=context_of(between))
    for span in (call, attempt, node, segment):
        set_error(span, exc, messages=True)
    for span in (call, between, attempt, node, segment):
        span.end()

    for name in ("call", "attempt", "node", "run"):
        span = kept[name]
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "refused"
        assert span.attributes["error.type"] == "ConnectionError"
        assert span.attributes["sereno.error.class"] == "connection"
    assert [span.name for span in kept.spans if span.events] == ["call"]
    (event,) = kept["call"].events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "ConnectionError"
    assert event.attributes["exception.message"] == "refused"
    assert "in caught" in event.attributes["exception.stacktrace"]


def test_an_exception_that_is_raised_again_is_told_by_the_next_attempt_too(
    tracing: Tracing, kept: Kept
) -> None:
    exc = caught(ValueError("same object"))
    node = tracing.start("node", start_ns=1)
    for number in (1, 2):
        attempt = tracing.start(f"attempt {number}", parent=context_of(node), start_ns=number + 1)
        set_error(attempt, exc, messages=True)
        attempt.end()
    set_error(node, exc, messages=True)
    node.end()

    assert [len(span.events) for span in kept.spans] == [1, 1, 0]


def test_without_messages_a_span_says_the_class_and_the_place_only(
    tracing: Tracing, kept: Kept
) -> None:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as cause:
            exc = ValueError(SECRET)
            exc.add_note(SECRET)
            raise exc from cause
    except ValueError as caught_one:
        span = tracing.start("attempt")
        set_error(span, caught_one, messages=False)
        span.end()

    assert SECRET.removeprefix("sk") not in kept["attempt"].to_json()
    (event,) = kept["attempt"].events
    assert "exception.message" not in event.attributes
    assert __name__.rpartition(".")[2] in event.attributes["exception.stacktrace"]
    assert kept["attempt"].status.description == "ValueError"


def test_without_messages_other_peoples_spans_are_silenced_too(kept: Kept) -> None:
    tracing = Tracing(processors=[kept], exception_messages=False)
    tracer = tracing.provider.get_tracer("httpx")
    with pytest.raises(ValueError, match="canary"), tracer.start_as_current_span("GET"):
        raise ValueError(SECRET)
    span = tracing.start("attempt")
    set_error(span, caught(ValueError(SECRET)), messages=False)
    span.end()

    assert SECRET not in kept["GET"].to_json()
    assert kept["GET"].status.status_code is StatusCode.ERROR
    assert dict(kept["GET"].events[0].attributes) == {
        "exception.type": "ValueError",
        "exception.escaped": "False",
    }
    assert "exception.stacktrace" in kept["attempt"].events[0].attributes


def test_a_long_stack_keeps_its_end(tracing: Tracing, kept: Kept) -> None:
    span = tracing.start("attempt")
    set_error(span, caught(ValueError("x" * 10_000 + "the end")), messages=True)
    span.end()

    attributes = kept["attempt"].events[0].attributes
    assert len(attributes["exception.stacktrace"]) == LONGEST_TEXT
    assert attributes["exception.stacktrace"].endswith("the end\n")
    assert attributes["sereno.truncated"] is True


@dataclass(frozen=True)
class Frozen(Exception):
    reason: str


class Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("exc", [Frozen("no"), Hostile()], ids=["frozen", "hostile"])
def test_any_exception_can_be_told_of(tracing: Tracing, kept: Kept, exc: Exception) -> None:
    outer = tracing.start("outer", start_ns=1)
    inner = tracing.start("inner", parent=context_of(outer), start_ns=2)
    for span in (inner, outer):
        set_error(span, exc, messages=True)
        span.end()

    assert [len(span.events) for span in kept.spans] == [1, 0]
    assert kept["inner"].attributes["error.type"] == type(exc).__name__


def test_an_ended_span_and_no_span_take_no_error(tracing: Tracing, kept: Kept) -> None:
    span = tracing.start("a")
    span.end()
    set_error(span, ValueError(), messages=True)
    set_error(trace.INVALID_SPAN, ValueError(), messages=True)

    assert kept["a"].status.status_code is StatusCode.UNSET


def caught(exc: Exception) -> Exception:
    try:
        raise exc
    except Exception as raised:
        return raised


# What the operator says.


def test_a_resource_says_who_this_is_and_not_how_it_was_called(kept: Kept) -> None:
    tracing = Tracing(resource={"service.version": "1.2"}, processors=[kept])
    other = Tracing()
    tracing.start("a").end()

    said = kept["a"].resource.attributes
    assert said["service.name"] == "sereno"
    assert said["service.version"] == "1.2"
    assert said["sereno.contract.version"] == VERSION
    assert said["telemetry.sdk.language"] == "python"
    assert said["service.instance.id"] != other.resource.attributes["service.instance.id"]
    assert not any(name.startswith("process.c") for name in said)
    assert sys.argv[0] not in kept["a"].resource.to_json()


def test_an_operator_names_the_service(monkeypatch: pytest.MonkeyPatch, kept: Kept) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod,service.version=9"
    )
    tracing = Tracing(resource={"service.version": "1.2"}, processors=[kept])
    tracing.start("a").end()

    said = kept["a"].resource.attributes
    assert said["service.name"] == "mine"
    assert said["service.version"] == "9"
    assert said["deployment.environment.name"] == "prod"


@pytest.mark.parametrize("how", ["variable", "argument"])
def test_tracing_can_be_off(monkeypatch: pytest.MonkeyPatch, kept: Kept, how: str) -> None:
    if how == "variable":
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    metrics = Metrics()
    tracing = Tracing(
        processors=[kept],
        enabled=False if how == "argument" else None,
        selfwatch=Selfwatch(metrics),
    )
    span = tracing.start("a", parent=new_context())
    set_error(span, ValueError(), messages=True)
    span.end()
    tracing.write("b", context=new_context(), parent=None, start_ns=1, end_ns=2)
    tracing.provider.get_tracer("x").start_span("c").end()
    tracing.discard(span)

    assert not tracing.enabled
    assert ids_of(context_of(span)) is None
    assert ids_of(tracing.context()) is None
    assert kept.spans == []
    assert tracing.live() == 0
    assert tracing.open_spans("01RUN") == []
    assert not tracing.make_global()
    for gauge in ("live_spans", "span_queue", "span_queue_capacity"):
        assert metrics[f"telemetry_{gauge}"].value() == 0
    tracing.close()
    metrics.close()


@pytest.mark.parametrize(
    ("variables", "exports"),
    [
        pytest.param({}, False, id="nothing-said"),
        pytest.param({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True, id="endpoint"),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True, id="traces"
        ),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"},
            False,
            id="none",
        ),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "otlp"},
            True,
            id="otlp",
        ),
    ],
)
def test_spans_are_exported_where_an_endpoint_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], exports: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    metrics = Metrics()
    tracing = Tracing(selfwatch=Selfwatch(metrics))

    assert (metrics["telemetry_span_queue_capacity"].value() > 0) is exports
    tracing.close()
