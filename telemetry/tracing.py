"""Makes the process's spans: their ids, parents and errors, and what holds for all of a run.

Every span, ours and other people's, passes `_Spans` on its way to the processors: it gives a span
the ids of the run around it, keeps count of what is open, and holds each run to its budget.
"""

from __future__ import annotations

import os
import random
import re
import threading
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk.environment_variables import (
    OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT,
    OTEL_SDK_DISABLED,
    OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import (
    Event,
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.sdk.version import __version__ as sdk_version
from opentelemetry.trace import (
    INVALID_SPAN,
    INVALID_SPAN_CONTEXT,
    Link,
    NonRecordingSpan,
    NoOpTracerProvider,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from telemetry.contract import VERSION, classify, error_text, error_type
from telemetry.exporting import Exporting, otlp_exporter
from telemetry.selfwatch import Selfwatch
from telemetry.stacks import quotes

__all__ = [
    "LONGEST_TEXT",
    "Tracing",
    "exemplar",
    "ids_of",
    "new_context",
    "plain",
    "read_traceparent",
    "set_error",
    "traceparent",
]

SCOPE = "sereno"
RUN_ID = "sereno.run.id"
#: Only a run's segment has it.
TRIGGER = "sereno.run.trigger"
TRUNCATED = "sereno.truncated"
#: Characters of an attribute's text.
LONGEST_TEXT = 4096
#: Spans of one run, its segments aside: §2.6 of the contract.
SPAN_BUDGET = 5_000

_MOST_LIVE = 50_000
_MOST_RUNS = 10_000
_FRAMES = 20
#: Of an attribute that is a list.
_MOST_ITEMS = 128
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_CONTEXT = Context()
#: Where an exception keeps the trace and the start of the span that tells of it.
_TOLD = "_sereno_told"


class Tracing:
    """The process's tracer, and where its spans go. Make it after any fork."""

    def __init__(
        self,
        *,
        resource: Mapping[str, str | int] | None = None,
        processors: Sequence[SpanProcessor] = (),
        enabled: bool | None = None,
        identify: Callable[[], Mapping[str, Any]] | None = None,
        selfwatch: Selfwatch | None = None,
        exception_messages: bool = True,
        budget: int = SPAN_BUDGET,
    ) -> None:
        """`identify` tells the attributes of the run and node around the current code.

        Spans are exported as the OTEL_* variables say, and nowhere when they name no endpoint.
        `enabled` None: unless OTEL_SDK_DISABLED is true.
        """
        disabled = os.environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true"
        self.enabled = not disabled if enabled is None else enabled and not disabled
        self._selfwatch = selfwatch or Selfwatch()
        self._spans = _Spans(identify, self._selfwatch, exception_messages, budget)
        self._ids = _Ids()
        self.resource = _resource(resource or {})
        self._exporting: Exporting | None = None
        self._closing = threading.Lock()
        if not self.enabled:
            self.provider: trace.TracerProvider = NoOpTracerProvider()
            self._selfwatch.watch(self.live, None)
            return
        provider = self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=self.resource,
            shutdown_on_exit=False,  # close() is bounded, the SDK's handler is not
            active_span_processor=self._spans,
            id_generator=self._ids,
            span_limits=_limits(),
        )
        self.provider = provider
        version = str((resource or {}).get("service.version", ""))
        self._scope = InstrumentationScope(SCOPE, version)
        self._tracer = provider.get_tracer(SCOPE, version)
        for processor in processors:
            provider.add_span_processor(processor)
        if (exporter := otlp_exporter()) is not None:
            self._exporting = Exporting(exporter, self._selfwatch)
            provider.add_span_processor(self._exporting)
        self._selfwatch.watch(self.live, self._exporting)

    def make_global(self) -> bool:
        """Let libraries that ask for the global provider find ours, unless there is one."""
        if not self.enabled or not isinstance(
            trace.get_tracer_provider(), trace.ProxyTracerProvider
        ):
            return False
        trace.set_tracer_provider(self.provider)
        return True

    def add(self, processor: SpanProcessor) -> None:
        """Hand spans to one more processor from now on."""
        self._spans.add_span_processor(processor)

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanContext | None = None,
        trace_id: int | None = None,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[Link] = (),
        start_ns: int | None = None,
    ) -> Span:
        """A span that the caller ends. Without a parent it is a root, whatever span is current."""
        if not self.enabled:
            return INVALID_SPAN
        if parent is not None:
            context = set_span_in_context(NonRecordingSpan(parent), _NO_CONTEXT)
        else:
            context = _NO_CONTEXT
            self._ids.trace_id = trace_id
        try:
            return self._tracer.start_span(
                name, context, kind, _known(attributes), links, start_time=start_ns
            )
        finally:
            self._ids.trace_id = None

    def write(
        self,
        name: str,
        *,
        context: SpanContext,
        parent: SpanContext | None,
        start_ns: int,
        end_ns: int,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[Link] = (),
        error: str | None = None,
    ) -> None:
        """A span of the past, with the ids that it had. `error` is its `error.type`."""
        if not self.enabled or not context.is_valid:
            return
        said = dict(_known(attributes) or {})
        if error is not None:
            said["error.type"] = error
        self._spans.write(
            ReadableSpan(
                name=name,
                context=context,
                parent=parent,
                resource=self.resource,
                attributes=BoundedAttributes(None, said, max_value_len=LONGEST_TEXT + 1),
                links=links,
                kind=kind,
                status=Status(StatusCode.UNSET if error is None else StatusCode.ERROR, error),
                start_time=start_ns,
                end_time=end_ns,
                instrumentation_scope=self._scope,
            )
        )

    def discard(self, span: Span) -> None:
        """Forget a span that will never be ended."""
        self._spans.discard(span.get_span_context().span_id)

    def live(self) -> int:
        """Spans that were started, and neither ended nor discarded."""
        return len(self._spans.live)

    def open_spans(self, run_id: str) -> list[ReadableSpan]:
        """A run's spans that have not ended, in the order of their start."""
        spans = list(self._spans.live.values())
        return [span for span in spans if plain(span).get(RUN_ID) == run_id]

    def suppressed(self, run_id: str) -> int:
        """How many spans of a run its budget left out so far."""
        return self._spans.suppressed(run_id)

    def forget(self, run_id: str) -> None:
        """A run has ended: its budget is of no more use."""
        self._spans.forget(run_id)

    def context(self) -> SpanContext:
        """The ids of a span that will be written afterwards."""
        return new_context() if self.enabled else INVALID_SPAN_CONTEXT

    def close(self, timeout_s: float = 5.0) -> None:
        """Export what is left, for `timeout_s` at most; what is not delivered by then is counted.

        Other people's processors may block for longer. They are left to a thread that dies with
        the process.
        """
        if not self.enabled or not self._closing.acquire(blocking=False):
            return
        thread = threading.Thread(
            target=self._shut_down,
            args=(timeout_s * 0.9,),
            name="sereno-tracing-close",
            daemon=True,
        )
        thread.start()
        thread.join(timeout_s)

    def _shut_down(self, timeout_s: float) -> None:
        try:
            if self._exporting is not None:
                self._exporting.shutdown(timeout_s)
            self._provider.shutdown()
        except Exception:
            self._selfwatch.internal_error("tracing", "shutdown")


def _known(attributes: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Without those that have no value."""
    if attributes and None in attributes.values():
        return {name: value for name, value in attributes.items() if value is not None}
    return attributes


class _Ids(RandomIdGenerator, threading.local):
    """Random ids, but for the trace id that the current thread asked for."""

    trace_id: int | None = None

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, None
        return given or super().generate_trace_id()


class _Spans(SynchronousMultiSpanProcessor):
    """Where every span passes; no error of a processor gets out of here."""

    def __init__(
        self,
        identify: Callable[[], Mapping[str, Any]] | None,
        selfwatch: Selfwatch,
        exception_messages: bool,
        budget: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, SdkSpan] = {}
        self._identify = identify
        self._selfwatch = selfwatch
        self._exception_messages = exception_messages
        self._budget = budget
        self._counting = threading.Lock()
        #: Spans of a run: started, left out.
        self._runs: OrderedDict[str, list[int]] = OrderedDict()
        #: Open spans that are left out, by id.
        self._left_out: set[int] = set()
        #: What says to which run an open span belongs, by id: users' attributes push it out.
        self._owners: dict[int, dict[str, Any]] = {}

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        try:
            self._begin(span)
        except Exception:
            self._selfwatch.internal_error("tracing", "start of a span")
        for processor in self._span_processors:
            try:
                processor.on_start(span, parent_context)
            except Exception:
                self._selfwatch.internal_error("tracing", type(processor).__name__)

    def _on_ending(self, span: SdkSpan) -> None:
        for processor in self._span_processors:
            try:
                processor._on_ending(span)
            except Exception:
                self._selfwatch.internal_error("tracing", type(processor).__name__)

    def on_end(self, span: ReadableSpan) -> None:
        context = span.context
        assert context is not None
        self.live.pop(context.span_id, None)
        owner = self._owners.pop(context.span_id, None)
        if context.span_id in self._left_out:
            self._left_out.discard(context.span_id)
            self._selfwatch.lost("traces", "dropped_budget")
            return
        self._hand_on(span, owner)

    def write(self, span: ReadableSpan) -> None:
        """A span that nobody started."""
        if self._admits(plain(span)):
            self._hand_on(span)
        else:
            self._selfwatch.lost("traces", "dropped_budget")

    def discard(self, span_id: int) -> None:
        self.live.pop(span_id, None)
        self._owners.pop(span_id, None)
        self._left_out.discard(span_id)

    def suppressed(self, run_id: str) -> int:
        counts = self._runs.get(run_id)
        return counts[1] if counts else 0

    def forget(self, run_id: str) -> None:
        with self._counting:
            self._runs.pop(run_id, None)

    def _begin(self, span: SdkSpan) -> None:
        context = span.get_span_context()
        self.live[context.span_id] = span
        if len(self.live) > _MOST_LIVE:  # somebody never ends theirs
            self.discard(next(iter(self.live)))
        own = plain(span)
        if span.kind is SpanKind.SERVER:
            return
        if self._identify is not None and RUN_ID not in own:
            more = {name: v for name, v in self._identify().items() if name not in own}
            if more:
                span.set_attributes(more)
                own.update(more)
        if RUN_ID in own:
            ours = {name: value for name, value in own.items() if name.startswith("sereno.")}
            self._owners[context.span_id] = ours
        if not self._admits(own):
            self._left_out.add(context.span_id)

    def _admits(self, attributes: Mapping[str, Any]) -> bool:
        """Whether a run's budget has room for a span.

        It is asked when the span starts: a parent starts before its children, so whatever is kept
        has its parent. A segment and a request are always kept.
        """
        run_id = attributes.get(RUN_ID)
        if run_id is None or TRIGGER in attributes:
            return True
        with self._counting:
            counts = self._runs.get(str(run_id))
            if counts is None:
                counts = self._runs[str(run_id)] = [0, 0]
                if len(self._runs) > _MOST_RUNS:
                    self._runs.popitem(last=False)
            counts[0] += 1
            if counts[0] <= self._budget:
                return True
            counts[1] += 1
            return False

    def _hand_on(self, span: ReadableSpan, owner: Mapping[str, Any] | None = None) -> None:
        try:
            if owner is not None and not owner.items() <= plain(span).items():
                span = _copy(span, cut=False, mute=False, more=owner)
            span = self._trimmed(span)
        except Exception:
            self._selfwatch.internal_error("tracing", "end of a span")
        for processor in self._span_processors:
            try:
                processor.on_end(span)
            except Exception:
                self._selfwatch.internal_error("tracing", type(processor).__name__)

    def _trimmed(self, span: ReadableSpan) -> ReadableSpan:
        """The span with its long text cut and said to be, and without messages if unwanted."""
        long = _unfit(span.name) or _unfit(span.status.description)
        for name, value in plain(span).items():
            long = long or _unfit(value) or _unfit(name)
        for event in span.events:
            long = long or _unfit(event.name) or any(map(_unfit, (event.attributes or {}).values()))
        mute = False
        if not self._exception_messages and (span.events or span.status.description):
            scope = span.instrumentation_scope
            mute = scope is None or scope.name != SCOPE  # ours has no messages to begin with
        return _copy(span, cut=long, mute=mute) if long or mute else span


def plain(span: ReadableSpan) -> dict[str, Any]:
    """A span's attributes, copied: the SDK's own mapping is slow to look into."""
    attributes: Any = span.attributes
    copy: dict[str, Any] = attributes.copy()
    return copy


def _copy(
    span: ReadableSpan, *, cut: bool, mute: bool, more: Mapping[str, Any] | None = None
) -> ReadableSpan:
    attributes = plain(span) | dict(more or {})
    if cut:
        attributes = {_cut(name): _cut(value) for name, value in attributes.items()}
        attributes[TRUNCATED] = True
    events, status, name = span.events, span.status, span.name
    if cut:
        name = _cut(name)
        events = tuple(
            Event(
                _cut(event.name),
                BoundedAttributes(
                    None, {name: _cut(value) for name, value in (event.attributes or {}).items()}
                ),
                event.timestamp,
            )
            for event in events
        )
        if status.description is not None:
            status = Status(status.status_code, _cut(status.description))
    if mute:
        events = tuple(_muted(event) for event in events)
        if status.description is not None:
            status = Status(status.status_code, str(attributes.get("error.type", "")) or None)
    bounded = BoundedAttributes(None, attributes)
    bounded.dropped = span.dropped_attributes
    return ReadableSpan(
        name=name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=bounded,
        events=events,
        links=span.links,
        kind=span.kind,
        status=status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _muted(event: Event) -> Event:
    kept = {name: v for name, v in (event.attributes or {}).items() if name not in _MESSAGES}
    return Event(event.name, BoundedAttributes(None, kept), event.timestamp)


def _unfit(value: Any) -> bool:
    """Whether it is too long, or holds what no UTF-8 can: that would cost a whole batch."""
    if isinstance(value, str):
        return len(value) > LONGEST_TEXT or encodable(value) != value
    if isinstance(value, (tuple, list)):
        return len(value) > _MOST_ITEMS or any(map(_unfit, value))
    if isinstance(value, Mapping):
        return any(map(_unfit, value)) or any(map(_unfit, value.values()))
    return False


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value[:LONGEST_TEXT])[:LONGEST_TEXT]
    if isinstance(value, (tuple, list)):
        return tuple(map(_cut, value[:_MOST_ITEMS]))
    if isinstance(value, Mapping):
        return {_cut(name): _cut(inner) for name, inner in value.items()}
    return value


def encodable(text: str) -> str:
    """Without lone surrogates: no UTF-8 can hold them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def new_context(trace_id: int | None = None) -> SpanContext:
    """Random ids for a span, in a given trace or in one of its own."""
    return SpanContext(
        trace_id or random.getrandbits(128) or 1,
        random.getrandbits(64) or 1,
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )


def traceparent(context: SpanContext) -> str:
    """The W3C header that names a span as the parent."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"


def read_traceparent(value: str | None) -> SpanContext | None:
    """The span that a W3C header names; None when it is not one."""
    found = _TRACEPARENT.fullmatch(value.strip()) if value else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest):
        return None
    context = SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
    return context if context.is_valid else None


def ids_of(context: SpanContext | None) -> tuple[str, str] | None:
    """Trace id and span id as logs and lines spell them."""
    if context is None or not context.is_valid:
        return None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def exemplar(context: SpanContext | None) -> dict[str, str] | None:
    """What makes an observation point to its span."""
    ids = ids_of(context)
    return None if ids is None else {"trace_id": ids[0], "span_id": ids[1]}


def set_error(span: Span, exc: BaseException, *, messages: bool) -> bool:
    """End a span's operation in an error: status, class, and once the exception itself.

    The innermost span is the first that an exception is set on. What encloses it began earlier in
    the same trace, and only says the class. Whether this is the innermost one.
    """
    try:
        if not span.is_recording():
            return True
        span.set_attributes({"error.type": error_type(exc), "sereno.error.class": classify(exc)})
        text = error_text(exc) if messages else error_type(exc)
        span.set_status(StatusCode.ERROR, text or error_type(exc))
        if _told_below(span, exc):
            return False
        span.add_event("exception", _exception_attributes(exc, messages))
    except BaseException:  # an exception's own methods may do anything
        pass
    return True


def _told_below(span: Span, exc: BaseException) -> bool:
    """Whether a span inside this one tells of the exception already; else this one does now."""
    trace_id = span.get_span_context().trace_id
    began = getattr(span, "start_time", None) or 0
    told = exc.__dict__.get(_TOLD)
    if told is not None and told[0] == trace_id and began <= told[1]:
        return True
    exc.__dict__[_TOLD] = (trace_id, began)
    return False


def _exception_attributes(exc: BaseException, messages: bool) -> dict[str, Any]:
    kind = type(exc)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    attributes: dict[str, Any] = {"exception.type": f"{module}{kind.__qualname__}"}
    if messages:
        attributes["exception.message"] = error_text(exc)
    if messages and not quotes(exc):
        lines = traceback.format_exception(exc, limit=-_FRAMES)
    else:  # neither the message, nor that of a cause, nor a note
        lines = traceback.format_tb(exc.__traceback__, limit=-_FRAMES)
    stack = "".join(lines)
    if len(stack) > LONGEST_TEXT:  # its end says most
        stack = stack[-LONGEST_TEXT:]
        attributes[TRUNCATED] = True
    if stack:
        attributes["exception.stacktrace"] = stack
    return attributes


_MESSAGES = frozenset(("exception.message", "exception.stacktrace"))


def _resource(given: Mapping[str, str | int]) -> Resource:
    """Who we are. What the operator says by OTEL_* wins; the command line is not told."""
    ours: dict[str, Any] = {
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "opentelemetry",
        "telemetry.sdk.version": sdk_version,
        "service.name": "sereno",
        "service.instance.id": str(uuid.uuid4()),
        "process.pid": os.getpid(),
        "sereno.contract.version": VERSION,
    }
    return Resource(ours | dict(given)).merge(OTELResourceDetector().detect())


def _limits() -> SpanLimits:
    """One character more than we keep, so that a cut is seen; the operator's own limit if any."""
    mine = OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT, OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT
    if any(os.environ.get(name) for name in mine):
        return SpanLimits()
    return SpanLimits(max_attribute_length=LONGEST_TEXT, max_span_attribute_length=LONGEST_TEXT + 1)
