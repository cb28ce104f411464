"""Keeps the latest spans of runs, so that a run's trace can be read without any backend.

Spans are kept by their `sereno.run.id`, which a request's span is given late: so it is looked for
when a span ends. Room is made by forgetting whole runs: those that have ended, oldest first, and
only then the one that was quiet for longest.
"""

from __future__ import annotations

import base64
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind

from telemetry.tracing import RUN_ID, TRIGGER, encodable, plain

__all__ = ["Recorded", "Recorder", "otlp"]

OUTCOME = "sereno.run.outcome"
SUPPRESSED = "sereno.run.spans_suppressed"

_MOST_PER_RUN = 5_000
_MOST_REQUESTS = 100
_MOST_FORGOTTEN = 10_000
#: Outcomes of a segment after which another process goes on with the run.
_PASSED_ON = frozenset(("lost", "drained"))
#: Of SpanFlags: whether the parent is remote is known; and it is.
_REMOTE_KNOWN, _REMOTE = 0x100, 0x200


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is known of a run's trace."""

    spans: Sequence[ReadableSpan]
    #: Spans that have not ended.
    open: Sequence[ReadableSpan]
    #: Whether the run has ended and nothing of it is missing here.
    complete: bool
    #: Its spans were here and had to make room.
    forgotten: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing of the run itself, but at most requests about it."""
        return all(span.kind is SpanKind.SERVER for span in (*self.spans, *self.open))


class _Run:
    __slots__ = ("ended", "lost", "requests", "spans")

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.ended = False
        #: How many of them are requests about it.
        self.requests = 0
        #: Whether something of it is not here.
        self.lost = False


class Recorder(SpanProcessor):
    """Holds up to `most` spans, and up to `most_per_run` of one run."""

    def __init__(self, most: int = 20_000, *, most_per_run: int = _MOST_PER_RUN) -> None:
        self._most = most
        self._most_per_run = most_per_run
        self._lock = threading.Lock()
        self._count = 0
        #: In the order of their latest spans.
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        #: Those that do not go on here, in the order in which they ended.
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._forgotten: OrderedDict[str, None] = OrderedDict()

    @property
    def kept(self) -> int:
        """Spans that are here now."""
        return self._count

    def on_end(self, span: ReadableSpan) -> None:
        attributes = plain(span)
        run_id = attributes.get(RUN_ID)
        if run_id is None:
            return
        span = _slim(span, attributes)
        with self._lock:
            self._keep(str(run_id), span, attributes)

    def run(self, run_id: str, open_spans: Sequence[ReadableSpan]) -> Recorded | None:
        """A run's spans in the order of their end; None when none was ever seen.

        `open_spans` are those that have not ended: `Tracing.open_spans(run_id)`.
        """
        with self._lock:
            run = self._runs.get(run_id)
            spans = list(run.spans) if run else []
            forgotten = run_id in self._forgotten
            complete = run is not None and run.ended and not run.lost
        if run is None and not open_spans and not forgotten:
            return None
        done = {span.context.span_id for span in spans if span.context}
        # One that ended between the two looks is in both.
        still = [span for span in open_spans if span.context and span.context.span_id not in done]
        # The request that asks for this is about the run, and open.
        going_on = any(span.kind is not SpanKind.SERVER for span in still)
        return Recorded(
            spans=spans, open=still, complete=complete and not going_on, forgotten=forgotten
        )

    def _keep(self, run_id: str, span: ReadableSpan, attributes: Mapping[str, Any]) -> None:
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = _Run()
            run.lost = run_id in self._forgotten
        self._runs.move_to_end(run_id)
        segment = TRIGGER in attributes
        if segment:
            run.ended = attributes.get(OUTCOME) not in _PASSED_ON
            # What an earlier process saw of the run died with it.
            run.lost |= attributes[TRIGGER] == "recovery" or bool(attributes.get(SUPPRESSED))
        if segment or (span.kind is SpanKind.SERVER and not run.spans):
            self._idle[run_id] = None  # a request alone may be about a run of long ago
        elif not run.ended:
            self._idle.pop(run_id, None)
        if span.kind is SpanKind.SERVER:  # who asks for a run often does not push it out
            if run.requests >= _MOST_REQUESTS:
                return
            run.requests += 1
        elif len(run.spans) - run.requests >= self._most_per_run and not segment:
            run.lost = True
            return
        run.spans.append(span)
        self._count += 1
        while self._count > self._most:
            self._forget(next(iter(self._idle or self._runs)))

    def _forget(self, run_id: str) -> None:
        self._idle.pop(run_id, None)
        self._count -= len(self._runs.pop(run_id).spans)
        self._forgotten[run_id] = None
        if len(self._forgotten) > _MOST_FORGOTTEN:
            self._forgotten.popitem(last=False)


def _slim(span: ReadableSpan, attributes: Mapping[str, Any]) -> ReadableSpan:
    """The same span at less than half the memory, when its lists are empty and it lost nothing."""
    if span.dropped_attributes or span.dropped_events or span.dropped_links:
        return span
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def otlp(recorded: Recorded) -> dict[str, Any]:
    """A run's trace as OTLP/JSON. Spans that have not ended are a member of their own, `open`."""
    return {
        "resourceSpans": _by_resource(recorded.spans),
        "open": [_span(span) for span in recorded.open],
        "complete": recorded.complete,
    }


def _by_resource(spans: Iterable[ReadableSpan]) -> list[dict[str, Any]]:
    # By identity first: to compare resources means to serialise them.
    groups: dict[int, tuple[ReadableSpan, dict[Any, list[ReadableSpan]]]] = {}
    for span in spans:
        _, scopes = groups.setdefault(id(span.resource), (span, {}))
        scopes.setdefault(span.instrumentation_scope, []).append(span)
    found = []
    for first, scopes in groups.values():
        resource = first.resource
        found.append(
            _filled(
                resource={"attributes": _attributes(resource.attributes)},
                scopeSpans=[_scope(scope, inside) for scope, inside in scopes.items()],
                schemaUrl=resource.schema_url,
            )
        )
    return found


def _scope(scope: Any, spans: Iterable[ReadableSpan]) -> dict[str, Any]:
    about = {}
    if scope is not None:
        about = _filled(
            name=scope.name, version=scope.version, attributes=_attributes(scope.attributes)
        )
    return _filled(
        scope=about,
        spans=[_span(span) for span in spans],
        schemaUrl=scope.schema_url if scope is not None else None,
    ) | {"scope": about}


def _span(span: ReadableSpan) -> dict[str, Any]:
    context, parent, status = span.context, span.parent, span.status
    assert context is not None
    return _filled(
        traceId=f"{context.trace_id:032x}",
        spanId=f"{context.span_id:016x}",
        traceState=context.trace_state.to_header(),
        parentSpanId=f"{parent.span_id:016x}" if parent else None,
        flags=_flags(parent),
        name=encodable(span.name),
        kind=span.kind.value + 1,  # 0 is "unspecified" on the wire
        startTimeUnixNano=_nanos(span.start_time),
        endTimeUnixNano=_nanos(span.end_time),
        attributes=_attributes(span.attributes),
        droppedAttributesCount=span.dropped_attributes,
        events=[_event(event) for event in span.events],
        droppedEventsCount=span.dropped_events,
        links=[_link(link) for link in span.links],
        droppedLinksCount=span.dropped_links,
        status=_filled(code=status.status_code.value, message=encodable(status.description or "")),
    )


def _event(event: Event) -> dict[str, Any]:
    return _filled(
        timeUnixNano=_nanos(event.timestamp),
        name=encodable(event.name),
        attributes=_attributes(event.attributes),
        droppedAttributesCount=event.dropped_attributes,
    )


def _link(link: Link) -> dict[str, Any]:
    return _filled(
        traceId=f"{link.context.trace_id:032x}",
        spanId=f"{link.context.span_id:016x}",
        attributes=_attributes(link.attributes),
        droppedAttributesCount=link.dropped_attributes,
        flags=_flags(link.context),
    )


def _flags(context: SpanContext | None) -> int:
    return _REMOTE_KNOWN | (_REMOTE if context is not None and context.is_remote else 0)


def _nanos(time: int | None) -> str | None:
    return None if time is None else str(time)


def _attributes(attributes: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"key": encodable(name), "value": _value(v)} for name, v in (attributes or {}).items()]


def _value(value: Any) -> dict[str, Any]:
    """A value with its type, as JSON writes what Protobuf holds: 64 bits are text."""
    match value:
        case None:
            return {}
        case bool():
            return {"boolValue": value}
        case str():
            return {"stringValue": encodable(value)}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value if math.isfinite(value) else _ODD.get(value, "NaN")}
        case bytes():
            return {"bytesValue": base64.b64encode(value).decode()}
        case Mapping():
            return {"kvlistValue": {"values": _attributes(value)}}
        case _:
            return {"arrayValue": {"values": [_value(item) for item in value]}}


_ODD = {math.inf: "Infinity", -math.inf: "-Infinity"}


def _filled(**members: Any) -> dict[str, Any]:
    """Without those that have the value they would have anyway."""
    return {name: value for name, value in members.items() if value}
