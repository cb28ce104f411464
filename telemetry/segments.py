"""One execution of a run: turns what the seam observes into spans, metrics and records that agree.

Every start asks first whether a line is made of it (`Segment.lines`). What a line refuses, because
the run has ended, is nowhere; what it takes is counted exactly once when it ends, at the latest
with the segment. So spans, metrics, lines and records are equal by construction.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import structlog
from opentelemetry import context as otel_context
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)

from telemetry.contract import classify, error_text, error_type
from telemetry.langchain import Witness, current_witness
from telemetry.lost import Lost
from telemetry.metrics import Metrics
from telemetry.observations import (
    AttemptEnded,
    AttemptOutcome,
    AttemptStarted,
    CallAttemptEnded,
    CallAttemptStarted,
    CallRetrying,
    NodeEnded,
    NodeRetrying,
    Observation,
    Visit,
    current_listener,
)
from telemetry.tracing import Tracing, exemplar, ids_of, set_error

__all__ = ["Segment", "Segments", "current_segment"]

#: The segment that the current code belongs to.
current_segment: ContextVar[Segment | None] = ContextVar("sereno_segment", default=None)
#: Provider, model and direction, as `llm_tokens_total` has them.
Spender = tuple[str, str, str]
#: The innermost attempt, of a node or of a call, around the current code.
_inside: ContextVar[_Inside | None] = ContextVar("sereno_inside", default=None)

_FAILED: frozenset[AttemptOutcome] = frozenset(("retried", "exhausted", "failed"))
#: Retried calls that are shown of an attempt.
_CALLS = 10
#: Where an exception keeps which attempt's record had it: the segment's id, the attempt's begin.
_TOLD_OF = "_sereno_record"


class Lines(Protocol):
    """Who makes lines of observations. False: it takes no more, so it must not count."""

    def __call__(
        self, seen: Observation, *, span_id: str | None = None, node_span_id: str | None = None
    ) -> bool: ...


def _no_lines(
    seen: Observation, *, span_id: str | None = None, node_span_id: str | None = None
) -> bool:
    return True


class _Node:
    """An open visit of a node."""

    __slots__ = (
        "attempt",
        "attempts",
        "attributes",
        "backoff_s",
        "began",
        "label",
        "retry_in_s",
        "slept_at",
        "span",
        "visit",
    )

    def __init__(self, visit: Visit, span: Span, attributes: Mapping[str, Any]) -> None:
        self.visit = visit
        self.label = visit.label
        self.span = span
        self.attributes = attributes
        self.began = time.perf_counter()
        self.attempt: _Attempt | None = None
        self.attempts = 0
        #: When its back-off began; None while it does not sleep.
        self.slept_at: float | None = None
        #: How long that is to be at least.
        self.retry_in_s = 0.0
        self.backoff_s = 0.0

    def describe(self) -> dict[str, Any]:
        """While it sleeps, `attempt` is the one that follows."""
        now, slept_at, attempt = time.perf_counter(), self.slept_at, self.attempt
        return {
            "node": self.label,
            "attempt": self.attempts + (slept_at is not None),
            "age_s": round(now - self.began, 3),
            **_state(slept_at, self.retry_in_s, now),
            **(attempt.calls.describe(now) if attempt is not None else {}),
        }


class _Inside:
    """A span that is current in a body; knows what was current around it."""

    __slots__ = ("before", "began", "held", "number", "outcome", "outer", "span", "spent")

    def __init__(self, span: Span, number: int) -> None:
        self.span = span
        self.number = number
        #: None until it has ended.
        self.outcome: AttemptOutcome | None = None
        #: What its models spent that is not booked yet; and those of nodes inside of it that came
        #: through, which an interrupt around them does not undo.
        self.spent: Counter[Spender] = Counter()
        self.held: Counter[Spender] = Counter()
        self.began = time.perf_counter()
        self.outer: _Inside | None = None
        self.before: otel_context.Context | None = None

    def enter(self) -> None:
        self.outer, self.before = _inside.get(), otel_context.get_current()
        _inside.set(self)
        otel_context.attach(set_span_in_context(self.span, self.before))

    def leave(self) -> None:
        """Put back what was current, unless the body ran in another context than this."""
        here = _inside.get()
        while here is not None and here is not self:
            here = here.outer  # a loop that was left inside of the body
        if here is self and self.before is not None:
            _inside.set(self.outer)
            otel_context.attach(self.before)


class _Retries:
    """The retried calls of one attempt: open attempts and back-offs, by call id."""

    __slots__ = ("open", "sleeping")

    def __init__(self) -> None:
        self.open: dict[str, _Call] = {}
        self.sleeping: dict[str, _Sleep] = {}

    def describe(self, now: float) -> dict[str, Any]:
        """Those that sleep first: they are looked for. Nothing where there are none."""
        told = [
            {"call": sleep.name, "attempt": sleep.number, **_state(sleep.since, sleep.for_s, now)}
            for sleep in list(self.sleeping.values())
        ]
        for call in list(self.open.values()):
            told.append({"call": call.name, "attempt": call.number, **_state(None, 0.0, now)})
        more = {"calls_not_shown": len(told) - _CALLS} if len(told) > _CALLS else {}
        return {"calls": told[:_CALLS], **more} if told else {}


class _Attempt(_Inside):
    __slots__ = ("calls", "failure")

    def __init__(self, span: Span, number: int) -> None:
        super().__init__(span, number)
        self.calls = _Retries()
        #: How it ended, until the retry that follows is told.
        self.failure: AttemptEnded | None = None


class _Call(_Inside):
    __slots__ = ("failure", "name")

    def __init__(self, name: str, span: Span, number: int) -> None:
        super().__init__(span, number)
        self.name = name
        self.failure: CallAttemptEnded | None = None


class _Sleep:
    __slots__ = ("for_s", "name", "number", "since")

    def __init__(self, name: str, number: int, for_s: float) -> None:
        self.name = name
        #: The attempt that follows, and the least time until then.
        self.number = number
        self.for_s = for_s
        self.since = time.perf_counter()


def _state(slept_at: float | None, for_s: float, now: float) -> dict[str, Any]:
    if slept_at is None:
        return {"state": "running"}
    return {"state": "retrying", "retry_in_s": round(max(0.0, slept_at + for_s - now), 3)}


class Segments:
    """Begins segments, and knows those that are open."""

    def __init__(
        self,
        metrics: Metrics,
        tracing: Tracing,
        *,
        witness: Witness | None = None,
        exception_messages: bool = True,
    ) -> None:
        #: Who is told of the models and tools that runs call.
        self.witness = witness
        self.metrics = metrics
        self.tracing = tracing
        self.exception_messages = exception_messages
        self.open: dict[str, Segment] = {}
        self.log = structlog.get_logger("runtime")
        self.runs_started = metrics["runs_started_total"]
        self.runs_finished = metrics["runs_finished_total"]
        self.run_errors = metrics["run_errors_total"]
        self.runs_active = metrics["runs_active"]
        self.runs_lost = metrics["runs_lost_total"]
        self.runs_recovered = metrics["runs_recovered_total"]
        self.run_duration = metrics["run_duration_seconds"]
        self.first_output = metrics["run_first_output_seconds"]
        self.queue_wait = metrics["run_queue_wait_seconds"]
        self.interrupt_wait = metrics["interrupt_wait_seconds"]
        self.node_duration = metrics["node_duration_seconds"]
        self.nodes_active = metrics["nodes_active"]
        self.nodes_cached = metrics["nodes_cached_total"]
        self.attempts = metrics["node_attempts_total"]
        self.attempt_failures = metrics["node_attempt_failures_total"]
        self.attempt_duration = metrics["node_attempt_duration_seconds"]
        self.backoff = metrics["node_backoff_seconds_total"]
        self.sleeping = metrics["node_retries_sleeping"]
        self.call_attempts = metrics["call_attempts_total"]
        self.call_failures = metrics["call_attempt_failures_total"]
        self.call_duration = metrics["call_attempt_duration_seconds"]
        self.call_backoff = metrics["call_backoff_seconds_total"]
        self.calls_sleeping = metrics["call_retries_sleeping"]
        self.tokens = metrics["llm_tokens_total"]

    def graph(self, name: str) -> None:
        """Begin the gauges of a served graph that are read at scrape time."""
        self.metrics["run_oldest_active_seconds"].watch(lambda: self._oldest(name), name)
        self.metrics["run_silence_seconds"].watch(lambda: self._silence(name), name)

    def queued(self, graph: str, trigger: str) -> None:
        """A run was committed."""
        self.runs_started.inc(graph, trigger)

    def begin(
        self,
        *,
        run_id: str,
        thread_id: str,
        graph: str,
        epoch: int,
        trigger: str,
        version: str = "",
        parent: SpanContext | None = None,
        trace_id: int | None = None,
        links: Sequence[Link] = (),
        start: float | None = None,
    ) -> Segment:
        """Open a segment and its span; `start` in unix seconds. It is to be ended or discarded."""
        attributes = {
            "sereno.run.id": run_id,
            "sereno.thread.id": thread_id,
            "sereno.graph.name": graph,
            "sereno.run.epoch": epoch,
        }
        span = self.tracing.start(
            f"run {graph}",
            parent=parent,
            trace_id=trace_id,
            attributes={
                **attributes,
                "sereno.run.trigger": trigger,
                "sereno.graph.version": version,
            },
            links=links,
            start_ns=round(start * 1e9) if start is not None else None,
        )
        return Segment(self, attributes, span)

    def live(self) -> dict[str, Any]:
        """What is unfinished now, without content; for any thread."""
        return {"runs": [segment.describe() for segment in list(self.open.values())]}

    def finished(
        self,
        graph: str,
        status: str,
        data: Mapping[str, Any],
        span: SpanContext,
        *,
        first_output: bool,
    ) -> None:
        """A run's terminal line is committed."""
        self.runs_finished.inc(graph, status)
        error = data.get("error")
        if error is not None:
            self.run_errors.inc(graph, str(error.get("error_class", "other")))
        if (duration := data.get("duration_ms")) is not None:
            self.run_duration.observe(duration / 1000, graph, status, exemplar=exemplar(span))
        if not first_output and status in ("error", "timeout"):
            self.first_output.observe(math.inf, graph)

    def _oldest(self, graph: str) -> float:
        now = time.monotonic()
        return max((now - s.began for s in self._of(graph)), default=0.0)

    def _silence(self, graph: str) -> float:
        now = time.monotonic()
        return max((now - s.last_line for s in self._of(graph)), default=0.0)

    def _of(self, graph: str) -> list[Segment]:
        return [segment for segment in list(self.open.values()) if segment.graph == graph]


class Segment:
    """One execution of one run in one epoch: the listener of all that it runs."""

    def __init__(self, segments: Segments, attributes: dict[str, Any], span: Span) -> None:
        self.run_id: str = attributes["sereno.run.id"]
        self.thread_id: str = attributes["sereno.thread.id"]
        self.graph: str = attributes["sereno.graph.name"]
        self.epoch: int = attributes["sereno.run.epoch"]
        #: What every span of the run carries.
        self.attributes = attributes
        self.span = span
        self.context = span.get_span_context()
        #: Hex ids for lines and records, None when tracing is off.
        self.ids = ids_of(self.context)
        #: Who makes lines of what is observed.
        self.lines: Lines = _no_lines
        self.began = self.last_line = time.monotonic()
        #: Why it is to stop, as `sereno.cancel.reason` says it.
        self.stopping: str | None = None
        #: The last checkpoint of the root graph.
        self.checkpoint_id: str | None = None
        self._all = segments
        self._claimed = False
        self._nodes: dict[str, _Node] = {}
        #: Retried calls that are in no node.
        self._loose = _Retries()
        self._steps: set[int] = set()
        self._attempts = 0
        self._backoff_s = 0.0
        self._closed = False
        # Threads of sync nodes observe too, and a collected iterator may at any moment.
        self._lock = threading.RLock()

    # Its life.

    def claimed(self, *, waited_s: float | None) -> None:
        """The claim is committed; `waited_s` when it is the run's first."""
        everything = self._all
        self._claimed = True
        everything.open[self.run_id] = self
        everything.runs_active.inc(self.graph)
        if waited_s is not None:
            everything.queue_wait.observe(max(0.0, waited_s), self.graph)

    def follows(self, lost: Lost | None, *, recovered: bool) -> None:
        """The segment before went with its process; `lost` when that one was traced."""
        self._all.runs_lost.inc(self.graph)
        if recovered:
            self._all.runs_recovered.inc(self.graph)
        epoch = self.epoch - 1 if recovered else self.epoch
        self._all.log.warning(
            "Run lost", event_type="run.lost", **self.line_ids, **self._where, epoch=epoch
        )
        if lost is not None:
            lost.write(self._all.tracing, {**self.attributes, "sereno.run.epoch": epoch})

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What runs inside, and the tasks that it makes, belong to the segment."""
        listener, segment = current_listener.set(self), current_segment.set(self)
        witness = current_witness.set(self._all.witness)
        token = otel_context.attach(set_span_in_context(self.span))
        try:
            yield
        finally:
            otel_context.detach(token)
            current_witness.reset(witness)
            current_segment.reset(segment)
            current_listener.reset(listener)

    def first_output(self, seconds: float) -> None:
        """The run's first line that a client waits for, so long after it was queued."""
        self._all.first_output.observe(seconds, self.graph, exemplar=exemplar(self.context))

    def end(self, data: Mapping[str, Any], *, had_output: bool) -> None:
        """The epoch's last line is committed: a terminal one has a `status` in its data."""
        outcome = str(data.get("status", "drained"))
        self._close(outcome)
        span = self.span
        if (suppressed := self._all.tracing.suppressed(self.run_id)) > 0:
            span.set_attribute("sereno.run.spans_suppressed", suppressed)
        span.set_attributes(
            {
                "sereno.run.outcome": outcome,
                "sereno.run.steps": len(self._steps),
                "sereno.run.attempts": self._attempts,
                "sereno.run.backoff_s": round(self._backoff_s, 6),
            }
        )
        if outcome in ("cancelled", "drained"):
            span.set_attribute("sereno.cancel.reason", self._reason)
        if self.checkpoint_id is not None:
            span.set_attribute("sereno.checkpoint.id", self.checkpoint_id)
        if (error := data.get("error")) is not None:
            _failed(span, str(error["error_type"]), str(error["error_class"]))
        if "status" in data:
            self._all.finished(self.graph, outcome, data, self.context, first_output=had_output)
        span.end()
        self._all.tracing.forget(self.run_id)

    def discard(self) -> None:
        """Another epoch goes on with the run, and tells what is to be told of this one."""
        self._close("lost")
        self._all.tracing.discard(self.span)

    def describe(self) -> dict[str, Any]:
        """As `/debug/live` shows it; calls that are in no node stand beside the nodes."""
        now = time.monotonic()
        return {
            **self.line_ids,
            "run_id": self.run_id,
            "thread_id": self.thread_id,
            "graph": self.graph,
            "age_s": round(now - self.began, 3),
            "silence_s": round(now - self.last_line, 3),
            "nodes": [node.describe() for node in list(self._nodes.values())],
            **self._loose.describe(time.perf_counter()),
        }

    def node_attributes(self, visit: Visit) -> dict[str, Any]:
        """What every span below a node carries."""
        return {
            **self.attributes,
            "sereno.node.name": visit.node,
            "sereno.node.path": visit.label,
        }

    def reapplied(self, label: str, *, cached: bool) -> None:
        """A node's result is known and no call made it: from the cache, or from before a crash."""
        if cached:
            self._all.nodes_cached.inc(self.graph, label)

    def spend(self, tokens: Mapping[Spender, int], *, kept: bool) -> None:
        """A model was called here; not `kept` when its answer is of no use already."""
        with self._lock:
            self._spend(tokens, _inside.get(), kept=kept)

    def _spend(
        self,
        tokens: Mapping[Spender, int],
        inside: _Inside | None,
        *,
        kept: bool = True,
        held: bool = False,
    ) -> None:
        """Book tokens as soon as it is known whether an attempt around them was in vain."""
        while kept and inside is not None:
            if inside.outcome is None:
                (inside.held if held else inside.spent).update(tokens)
                return
            kept = inside.outcome == "success" or (held and inside.outcome == "interrupted")
            held = held or isinstance(inside, _Attempt)
            inside = inside.outer
        for spender, count in tokens.items():
            self._all.tokens.inc(*spender, "kept" if kept else "discarded", by=count)

    # What the seam tells.

    def __call__(self, seen: Observation) -> None:
        with self._lock:
            if not self._closed:
                _TOLD[type(seen)](self, seen)

    def _attempt_started(self, seen: AttemptStarted) -> None:
        visit = seen.visit
        known = self._nodes.get(visit.task)
        node = known or self._new_node(visit)
        attributes = {
            **node.attributes,
            "sereno.attempt.number": seen.attempt,
            "sereno.attempt.layer": "node",
        }
        if node.slept_at is not None:
            waited = time.perf_counter() - node.slept_at
            attributes["sereno.attempt.wait_before_s"] = round(waited, 6)
        tracing = self._all.tracing
        span = tracing.start(
            f"attempt {visit.node}", parent=node.span.get_span_context(), attributes=attributes
        )
        if not self.lines(seen, span_id=_hex(span), node_span_id=_hex(node.span)):
            tracing.discard(span)
            if known is None:
                tracing.discard(node.span)
            return
        if known is None:
            self._nodes[visit.task] = node
            self._all.nodes_active.inc(self.graph, node.label)
            if not visit.path:
                self._steps.add(visit.step)
        self._wake(node)
        if node.attempt is not None:  # its end was not told
            self._end_attempt(node, node.attempt, "cancelled")
        node.attempts = seen.attempt
        self._attempts += 1
        node.attempt = _Attempt(span, seen.attempt)
        node.attempt.enter()

    def _new_node(self, visit: Visit) -> _Node:
        attributes = self.node_attributes(visit)
        span = self._all.tracing.start(
            f"node {visit.node}",
            parent=self.around(),
            attributes={
                **attributes,
                "sereno.task.id": visit.task,
                "sereno.step": visit.step,
            },
        )
        return _Node(visit, span, attributes)

    def around(self) -> SpanContext:
        """What is current, if it belongs to the run's trace: in a subgraph the calling attempt, or
        what is inside of that. In a trace of the user's own it is the innermost attempt."""
        inside = _inside.get()
        for span in (get_current_span(), inside.span if inside is not None else None):
            if span is not None and span.get_span_context().trace_id == self.context.trace_id:
                return span.get_span_context()
        return self.context

    def _attempt_ended(self, seen: AttemptEnded) -> None:
        node = self._nodes.get(seen.visit.task)
        attempt = node.attempt if node is not None else None
        if node is None or attempt is None or attempt.number != seen.attempt:
            return
        attempt.leave()
        if seen.outcome == "retried":
            attempt.failure = seen
        else:
            if seen.max_attempts is not None:
                attempt.span.set_attribute("sereno.attempt.max", seen.max_attempts)
            self._end_attempt(node, attempt, seen.outcome, seen.error)

    def _node_retrying(self, seen: NodeRetrying) -> None:
        node = self._nodes.get(seen.visit.task)
        attempt = node.attempt if node is not None else None
        if node is None or attempt is None or attempt.failure is None:
            return
        if not self.lines(seen, span_id=_hex(attempt.span)):
            return
        attempt.span.set_attributes(
            {
                "sereno.attempt.max": seen.max_attempts,
                "sereno.attempt.backoff_s": seen.retry_in_s,
                "sereno.attempt.jitter_ms": round(seen.jitter_s * 1000, 3),
            }
        )
        self._end_attempt(node, attempt, "retried", seen.error)
        node.retry_in_s = seen.retry_in_s
        node.slept_at = time.perf_counter()
        self._all.sleeping.inc(self.graph, node.label)

    def _end_attempt(
        self,
        node: _Node,
        attempt: _Attempt,
        outcome: AttemptOutcome,
        error: BaseException | None = None,
    ) -> None:
        node.attempt = None
        self._end_calls(attempt.calls)
        everything, span = self._all, attempt.span
        duration = time.perf_counter() - attempt.began
        which = "first" if attempt.number == 1 else "retry"
        everything.attempts.inc(self.graph, node.label, which, outcome)
        everything.attempt_duration.observe(duration, self.graph, node.label)
        self._finish(attempt, outcome)
        if outcome in _FAILED:
            assert error is not None
            everything.attempt_failures.inc(self.graph, node.label, classify(error))
            self._raised(
                attempt, outcome, error, node=node.label, attempt=attempt.number, layer="node"
            )
        self._end_span(span, outcome)

    def _node_ended(self, seen: NodeEnded) -> None:
        node = self._nodes.get(seen.visit.task)
        if node is None:
            return
        if node.attempt is not None:  # its end was not told, as after an error in a listener
            self._end_attempt(node, node.attempt, "cancelled")
        outcome: str = seen.outcome
        if outcome in ("cancelled", "drained"):  # a cancel drains too, and a drain may cancel
            outcome = "drained" if self.stopping == "shutdown" else "cancelled"
        if self.lines(seen):
            self._end_node(node, outcome, seen.error)

    def _end_node(self, node: _Node, outcome: str, error: BaseException | None = None) -> None:
        del self._nodes[node.visit.task]
        self._wake(node)
        everything, span = self._all, node.span
        everything.nodes_active.dec(self.graph, node.label)
        everything.node_duration.observe(
            time.perf_counter() - node.began,
            self.graph,
            node.label,
            exemplar=exemplar(span.get_span_context()),
        )
        span.set_attributes(
            {
                "sereno.node.attempts": node.attempts,
                "sereno.node.outcome": outcome,
                "sereno.node.backoff_s": round(node.backoff_s, 6),
            }
        )
        if outcome in ("cancelled", "drained"):
            span.set_attribute("sereno.cancel.reason", self._reason)
        if error is not None:
            _failed(span, error_type(error), classify(error))
        self._end_span(span, outcome)

    def _wake(self, node: _Node) -> None:
        if node.slept_at is None:
            return
        slept = time.perf_counter() - node.slept_at
        node.slept_at = None
        node.backoff_s += slept
        self._backoff_s += slept
        self._all.sleeping.dec(self.graph, node.label)
        self._all.backoff.inc(self.graph, node.label, by=slept)

    # Retried calls.

    def _call_started(self, seen: CallAttemptStarted) -> None:
        calls = self._calls_around(seen.visit, seen.node_attempt)
        if calls is None:
            return
        attributes = {
            **(self.attributes if seen.visit is None else self.node_attributes(seen.visit)),
            "sereno.call.name": seen.call,
            "sereno.call.id": seen.call_id,
            "sereno.attempt.number": seen.attempt,
            "sereno.attempt.layer": "call",
        }
        sleep = calls.sleeping.get(seen.call_id)
        if sleep is not None:
            waited = time.perf_counter() - sleep.since
            attributes["sereno.attempt.wait_before_s"] = round(waited, 6)
        span = self._all.tracing.start(
            f"attempt {seen.call}", parent=self.around(), attributes=attributes
        )
        if not self.lines(seen, span_id=_hex(span)):
            self._all.tracing.discard(span)
            return
        self._wake_call(calls, seen.call_id)
        call = calls.open[seen.call_id] = _Call(seen.call, span, seen.attempt)
        call.enter()

    def _call_ended(self, seen: CallAttemptEnded) -> None:
        calls = self._calls_around(seen.visit, seen.node_attempt)
        call = calls.open.get(seen.call_id) if calls is not None else None
        if calls is None or call is None:
            return
        call.leave()
        if seen.outcome == "retried":
            call.failure = seen
        else:
            self.lines(seen)
            del calls.open[seen.call_id]
            self._end_call(seen.visit, call, seen.outcome, seen.error)

    def _call_retrying(self, seen: CallRetrying) -> None:
        calls = self._calls_around(seen.visit, seen.node_attempt)
        call = calls.open.get(seen.call_id) if calls is not None else None
        if calls is None or call is None or call.failure is None:
            return
        if not self.lines(seen, span_id=_hex(call.span)):
            return
        call.span.set_attribute("sereno.attempt.backoff_s", seen.retry_in_s)
        del calls.open[seen.call_id]
        self._end_call(seen.visit, call, "retried", seen.error)
        calls.sleeping[seen.call_id] = _Sleep(seen.call, seen.attempt + 1, seen.retry_in_s)
        self._all.calls_sleeping.inc(self.graph, seen.call)

    def _calls_around(self, visit: Visit | None, number: int | None) -> _Retries | None:
        """The calls of the attempt that a call is in; None when that one is over."""
        if visit is None:
            return self._loose
        node = self._nodes.get(visit.task)
        attempt = node.attempt if node is not None else None
        if attempt is None or attempt.number != number:
            return None
        return attempt.calls

    def _end_call(
        self,
        visit: Visit | None,
        call: _Call,
        outcome: AttemptOutcome,
        error: BaseException | None = None,
    ) -> None:
        everything, span = self._all, call.span
        which = "first" if call.number == 1 else "retry"
        everything.call_attempts.inc(self.graph, call.name, which, outcome)
        duration = time.perf_counter() - call.began
        everything.call_duration.observe(duration, self.graph, call.name)
        self._finish(call, outcome)
        if outcome in _FAILED:
            everything.call_failures.inc(self.graph, call.name, classify(error))
            node = visit.label if visit is not None else None
            self._raised(
                call,
                outcome,
                error,
                node=node,
                call=call.name,
                attempt=call.number,
                layer="call",
            )
        self._end_span(span, outcome)

    def _wake_call(self, calls: _Retries, call_id: str) -> None:
        if (sleep := calls.sleeping.pop(call_id, None)) is not None:
            self._all.calls_sleeping.dec(self.graph, sleep.name)
            slept = time.perf_counter() - sleep.since
            self._all.call_backoff.inc(self.graph, sleep.name, by=slept)

    def _end_calls(self, calls: _Retries, outcome: AttemptOutcome = "cancelled") -> None:
        """A call's back-off and its attempt end with the attempt around them at the latest."""
        for call_id in list(calls.sleeping):
            self._wake_call(calls, call_id)
        while calls.open:
            _, call = calls.open.popitem()
            self._end_call(None, call, outcome)

    # Ends.

    @property
    def _reason(self) -> str:
        return self.stopping or "sibling_failed"

    def _finish(self, attempt: _Inside, outcome: AttemptOutcome) -> None:
        attempt.outcome = outcome
        self._spend(attempt.spent, attempt)
        self._spend(attempt.held, attempt, held=True)
        span = attempt.span
        span.set_attribute("sereno.attempt.outcome", outcome)
        span.set_attribute("sereno.attempt.will_retry", outcome == "retried")
        if outcome == "cancelled":
            span.set_attribute("sereno.cancel.reason", self._reason)

    def _end_span(self, span: Span, outcome: str) -> None:
        """What is lost is told by the process that goes on with the run."""
        if outcome == "lost":
            self._all.tracing.discard(span)
        else:
            span.end()

    def _raised(
        self, inside: _Inside, outcome: str, error: BaseException | None, **fields: object
    ) -> None:
        """An attempt failed: on its span, and in the log.

        A model or a tool inside of it may own the exception, and has no record to show it.
        """
        everything = self._all
        if error is None:  # a result, not an exception, asked for the retry
            return
        self.set_error(inside.span, error)
        message, innermost = self.message(error), self._innermost(inside, error)
        fields = {
            **self._where,
            **_ids_of_span(inside.span),
            **fields,
            "outcome": outcome,
            "error_class": classify(error),
            "error_type": error_type(error),
        }
        if message is not None:
            fields["error"] = message
        log = everything.log
        # Of a retried one `node.retrying`, or `call.retrying`, is the warning.
        tell = log.info if outcome == "retried" else log.warning
        tell(
            "Attempt failed",
            event_type="attempt.failed",
            exc_info=error if innermost and message is not None else None,
            **fields,
        )
        if outcome == "exhausted":
            log.warning("Retries exhausted", event_type="retry.exhausted", **fields)

    def _innermost(self, attempt: _Inside, error: BaseException) -> bool:
        """Whether no attempt inside of this one raised the same; from now on this one has."""
        try:
            told = error.__dict__.get(_TOLD_OF)
            if told is not None and told[0] == id(self) and attempt.began <= told[1]:
                return False
            error.__dict__[_TOLD_OF] = (id(self), attempt.began)
        except Exception:  # an exception's own methods may do anything
            pass
        return True

    @property
    def line_ids(self) -> dict[str, str]:
        """`trace_id` and `span_id` for lines that no attempt caused."""
        return {"trace_id": self.ids[0], "span_id": self.ids[1]} if self.ids is not None else {}

    def set_error(self, span: Span, error: BaseException) -> bool:
        """End a span's operation in an error; whether the span owns it (`tracing.set_error`)."""
        return set_error(span, error, messages=self.message(error) is not None)

    def message(self, error: BaseException) -> str | None:
        """What spans and records may show of an exception's message: a validation's quotes the
        input."""
        if not self._all.exception_messages or classify(error) == "validation":
            return None
        return error_text(error, 500)

    @property
    def _where(self) -> dict[str, object]:
        return {"run_id": self.run_id, "thread_id": self.thread_id, "graph": self.graph}

    def _close(self, outcome: str) -> None:
        """End what is still open; nothing counts from now on."""
        with self._lock:
            self._closed = True
            attempt: AttemptOutcome = "lost" if outcome == "lost" else "cancelled"
            node_outcome = outcome if outcome in ("lost", "drained") else "cancelled"
            for node in list(self._nodes.values()):
                if node.attempt is not None:
                    self._end_calls(node.attempt.calls, attempt)
                    self._end_attempt(node, node.attempt, attempt)
                self._end_node(node, node_outcome)
            self._end_calls(self._loose, attempt)
        if self._claimed:
            self._claimed = False
            self._all.runs_active.dec(self.graph)
            if self._all.open.get(self.run_id) is self:
                del self._all.open[self.run_id]


_TOLD: dict[type, Callable[[Segment, Any], None]] = {
    AttemptStarted: Segment._attempt_started,
    AttemptEnded: Segment._attempt_ended,
    NodeRetrying: Segment._node_retrying,
    NodeEnded: Segment._node_ended,
    CallAttemptStarted: Segment._call_started,
    CallAttemptEnded: Segment._call_ended,
    CallRetrying: Segment._call_retrying,
}


def _hex(span: Span) -> str | None:
    ids = ids_of(span.get_span_context())
    return ids[1] if ids is not None else None


def _ids_of_span(span: Span) -> dict[str, object]:
    ids = ids_of(span.get_span_context())
    return {"trace_id": ids[0], "span_id": ids[1]} if ids is not None else {}


def _failed(span: Span, type: str, error_class: str) -> None:
    """A span's operation failed, and the exception belongs to a span inside of it."""
    span.set_status(Status(StatusCode.ERROR, type))
    span.set_attributes({"error.type": type, "sereno.error.class": error_class})
