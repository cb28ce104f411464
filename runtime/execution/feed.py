"""Makes the lines of one run out of what LangGraph and the seam emit, in their order.

The feed *is* the stream in LangGraph's config: it is called when a part is emitted, not when a
generator is read. So a line is posted before the checkpoint of what it tells, in subgraphs too,
and LangGraph keeps its fast path.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from uuid import uuid4

import orjson
import structlog
from langchain_core.messages import BaseMessage

from runtime.engines.base import Engine
from runtime.errors import LeaseLost, LogLimit, StorageFailed
from runtime.events import OUTPUT_TYPES, Event, Sealer
from runtime.execution.history import History
from runtime.model import Lease
from telemetry.contract import classify, error_text, error_type
from telemetry.encoding import JsonEncoder
from telemetry.langchain import MESSAGE, TOKEN
from telemetry.observations import (
    ATTEMPTS,
    AttemptStarted,
    CallAttemptEnded,
    CallAttemptStarted,
    CallRetrying,
    Custom,
    NodeEnded,
    NodeRetrying,
    NodeWrote,
    Observation,
    SuperstepEnded,
    Visit,
)
from telemetry.segments import Segment

__all__ = ["Feed", "Limits"]

_INTERRUPT = "__interrupt__"
#: Lines that have a twin in the log: its level and message.
_RECORDS = {
    "node.started": ("debug", "Node started"),
    "node.retrying": ("warning", "Node retrying"),
    "call.retrying": ("warning", "Call retrying"),
    "node.completed": ("info", "Node completed"),
    "node.failed": ("warning", "Node failed"),
    "node.interrupted": ("info", "Node interrupted"),
    "node.cancelled": ("info", "Node cancelled"),
}
#: What such a record takes over, from where the line is from and from its data.
_RECORD_IDS = ("trace_id", "span_id", "attempt", "task")
_RECORD_DATA = (
    "call",
    "attempt",
    "attempts",
    "duration_ms",
    "cached",
    "recovered",
    "error_class",
    "error_type",
    "retry_in_ms",
)
#: The longest that a line waits for others to be posted with, in seconds.
FLUSH_S = 0.002


class Limits:
    """Budgets of one run."""

    def __init__(
        self,
        *,
        events: int = 100_000,
        log_bytes: int = 256 * 1024 * 1024,
        unwritten: int = 10_000,
    ) -> None:
        self.events = events
        self.log_bytes = log_bytes
        self.unwritten = unwritten


class Feed:
    """Called with LangGraph's stream parts `(namespace, mode, data)`, from any thread, and by the
    seam, through the segment, with what it observes.

    Everything else is for the event loop. `failed` is called once when lines cannot be written.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        lease: Lease,
        sealer: Sealer,
        encoder: JsonEncoder,
        history: History,
        segment: Segment,
        modes: frozenset[str],
        limits: Limits,
        token_s: float,
        failed: Callable[[BaseException], None],
        expose_errors: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._lease = lease
        self._sealer = sealer
        self._encoder = encoder
        self._history = history
        self._segment = segment
        #: `trace_id` and `span_id` of lines that no attempt caused; nothing when tracing is off.
        self._ids: dict[str, Any] = segment.line_ids
        self._recorded = modes
        self._limits = limits
        self._token_s = token_s
        self._failed = failed
        self._expose_errors = expose_errors
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._log = structlog.get_logger("runtime").bind(
            run_id=lease.run_id, thread_id=lease.thread_id, graph=segment.graph
        )

        self.modes = {"tasks", "updates", "values", ATTEMPTS} | (modes & {"custom"})
        if "messages" in modes:
            self.modes |= {TOKEN, MESSAGE}
        #: The root graph's latest state, as its output schema shows it.
        self.output: Any = None
        #: Whether the graph asked to stop for a human, or met a static breakpoint.
        self.interrupted = False
        #: The visit whose failure the run may end with.
        self.failure: NodeEnded | None = None
        #: Lines that came after the end, from what could not be stopped.
        self.dropped = 0
        #: Whether this epoch has posted a checkpoint of the root graph.
        self.progressed = False
        #: While the process drains, a task that is stopped is not over.
        self.draining = False

        self._closed = False
        #: Parts from other threads, in their order, until the loop takes them; after the last
        #: look into it nothing is put in.
        self._crossing: deque[tuple[Any, str, Any]] = deque()
        self._crossing_lock = threading.Lock()
        self._shut = False
        self._pending: list[Event] = []
        #: Batches that are posted and not yet committed, oldest first.
        self._posted: dict[asyncio.Future[None], list[Event]] = {}
        #: What could not be written, and why: all that was posted behind it could not either.
        self._unposted: list[Event] = []
        self._broken: BaseException | None = None
        self._last: Event | None = None
        self._unwritten = 0
        #: Whether who writes now waits for room by itself.
        self._patient = False
        self._bytes = history.log_bytes
        self._flush_due = False
        self._wheres: dict[str, tuple[Visit, int, dict[str, Any]]] = {}
        self._ended_here: dict[str, NodeEnded] = {}
        #: Interrupts by id; which of them the root graph waits for.
        self._interrupts: dict[str, dict[str, Any]] = {}
        self._waited_for: list[str] = []
        self._root_step = 0
        #: The nodes of the root's superstep that are done.
        self._superstep: list[str] = []
        self._tokens: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
        self._token_timer: asyncio.TimerHandle | None = None
        self._seen: dict[str, Visit] = {}
        self._calls: dict[str, dict[str, None]] = {}

    # What LangGraph calls.

    def __call__(self, part: tuple[Any, str, Any]) -> None:
        ns, mode, data = part
        if ns and mode in ("updates", "values"):
            return
        if threading.get_ident() == self._thread:
            self._take_crossing()
            self._part(part)
            return
        if self._closed:
            self.dropped += 1
            return
        part = (ns, mode, self._kept(mode, data))
        # A thread may wait until its lines are written; the loop must not, so half is for the loop.
        room = (self._limits.unwritten + 1) // 2
        while self._unwritten + len(self._crossing) >= room and not self._closed:
            time.sleep(0.002)
        self._cross(part)

    def observe(
        self, seen: Observation, *, span_id: str | None = None, node_span_id: str | None = None
    ) -> bool:
        """What the seam saw, from any thread. False: it came too late, and no line tells of it."""
        part = ((), ATTEMPTS, _Observed(seen, span_id, node_span_id))
        if threading.get_ident() != self._thread:
            return self._cross(part)
        self._take_crossing()
        self._part(part)
        return not self._closed

    def _kept(self, mode: str, data: Any) -> Any:
        """What a thread hands over: its node may change the value before the loop encodes it."""
        if mode == "custom":
            return Custom(visit=data.visit, attempt=data.attempt, value=self._copied(data.value))
        if mode == MESSAGE:
            task, attempt, calls, message = data
            return task, attempt, calls, self._copied(_message_data(message))
        if mode == "tasks":
            return _Task.of(data, self._copied)
        if isinstance(data, NodeWrote):
            result = self._result_of(data)
            return replace(
                result,
                update=self._copied(result.update),
                messages=self._copied(result.messages),
            )
        return data

    def _copied(self, value: Any) -> Any:
        return orjson.loads(self._encoder.encode(value))

    def _cross(self, part: tuple[Any, str, Any]) -> bool:
        with self._crossing_lock:
            if self._shut:
                self.dropped += 1
                return False
            self._crossing.append(part)
            first = len(self._crossing) == 1
        if first:
            self._loop.call_soon_threadsafe(self._take_crossing)
        return True

    def _take_crossing(self) -> None:
        if not self._crossing:
            return
        with self._crossing_lock:
            parts, self._crossing = self._crossing, deque()
        self._patient = True
        for part in parts:
            self._part(part)
        self._patient = False

    def _part(self, part: tuple[Any, str, Any]) -> None:
        if self._closed:
            self.dropped += 1
            return
        _, mode, data = part
        try:
            if mode == ATTEMPTS:
                self._observed(data)
            elif mode == "updates":
                if _INTERRUPT in data:
                    self.interrupted = True
                    self._waited_for += [interrupt.id for interrupt in data[_INTERRUPT]]
            elif mode == "tasks":
                self._task(data if isinstance(data, _Task) else _Task.of(data))
            elif mode == "custom":
                self._custom(data)
            elif mode == "values":
                self.output = data
                if "values" in self._recorded:
                    self._values(data)
            elif mode == TOKEN:
                self._token(*data)
            elif mode == MESSAGE:
                task, attempt, calls, message = data
                # From this thread it comes as it is, from others copied already.
                described = _message_data(message) if hasattr(message, "content") else message
                self._message(task, attempt, calls, described)
        except Exception as exc:
            self._log.exception("Feed failed", mode=mode)
            self._fail(exc)

    # Nodes and attempts.

    def _observed(self, data: Any) -> None:
        if isinstance(data, NodeWrote):
            self._wrote(self._result_of(data))
        elif isinstance(data, _Result):
            self._wrote(data)
        elif isinstance(data, SuperstepEnded):
            self._superstep_ended()
        else:
            self._told(data)

    def _told(self, told: _Observed) -> None:
        seen = told.seen
        if isinstance(seen, AttemptStarted):
            self._started(seen, told)
        elif isinstance(seen, NodeRetrying):
            self._retrying(seen)
        elif isinstance(seen, NodeEnded):
            self._node_ended(seen)
        elif isinstance(seen, CallAttemptStarted):
            self._calls[seen.call_id] = {}
        elif isinstance(seen, CallRetrying):
            self._call_retrying(seen, told.span_id)
        elif isinstance(seen, CallAttemptEnded):
            self._calls.pop(seen.call_id, None)

    def _started(self, seen: AttemptStarted, told: _Observed) -> None:
        visit = seen.visit
        self._visited(visit)
        ids = {**self._ids, "span_id": told.span_id} if self._ids else {}
        where = {**_where_of(visit), "attempt": seen.attempt, "step": visit.step, **ids}
        self._wheres[visit.task] = (visit, seen.attempt, where)
        data = {"node_span_id": told.node_span_id} if told.node_span_id is not None else {}
        self._line("node.started", data, where)

    def _visited(self, visit: Visit) -> None:
        """The root graph may have gone on to its next superstep."""
        if not visit.path and visit.step != self._root_step:
            self._root_step = visit.step
            self.failure = None

    def _retrying(self, seen: NodeRetrying) -> None:
        self._forget(seen.visit.task)
        error, pause = self._error(seen.error), round(seen.retry_in_s * 1000, 1)
        self._line(
            "node.retrying",
            {
                **error,
                "retry_in_ms": pause,
                "jitter_ms": round(seen.jitter_s * 1000, 1),
                "max_attempts": seen.max_attempts,
                "discard_from": self._history.superseded_from(seen.visit.task),
            },
            self._where(seen.visit, seen.attempt),
            seen.error,
        )

    def _node_ended(self, seen: NodeEnded) -> None:
        where = self._where(seen.visit, seen.attempts)
        numbers = {"attempts": seen.attempts, "duration_ms": round(seen.duration_s * 1000, 1)}
        # What ended inside of it by a command to it has no result of its own.
        for inner in [e for e in self._ended_here.values() if seen.visit.task in e.visit.path]:
            self._completed(inner, _Result(visit=inner.visit, cached=False))
        if seen.outcome == "success":
            # Its result follows.
            self._ended_here[seen.visit.task] = seen
            if self.failure is not None and seen.visit.task in self.failure.visit.path:
                self.failure = None
        elif seen.outcome == "interrupted":
            self._line("node.interrupted", numbers, where)
        elif seen.outcome == "cancelled" and not self.draining:
            self._line("node.cancelled", numbers, where)
        elif seen.outcome == "error":
            assert seen.error is not None
            # An error passes through the nodes around the one that it is from.
            if self.failure is None or self.failure.error is not seen.error:
                self.failure = seen
            data = {**self._error(seen.error), **numbers}
            self._line("node.failed", data, where, seen.error)

    def _task(self, task: _Task) -> None:
        # Messages that come in are not output of the node that hands them on.
        if "messages" in self._recorded:
            for message_id in task.message_ids:
                self._seen.setdefault(message_id, _NOBODY)
        for interrupt in task.interrupts:
            self._interrupts.setdefault(interrupt["id"], {**interrupt, "task": task.id})

    def _result_of(self, wrote: NodeWrote) -> _Result:
        return _Result(
            visit=wrote.visit,
            cached=wrote.cached,
            update=wrote.update if "updates" in self._recorded else None,
            messages=[_message_data(message) for message in _named(_messages_in(wrote.update))]
            if "messages" in self._recorded
            else (),
        )

    def _wrote(self, result: _Result) -> None:
        """A task's writes are known: with them its end."""
        task = result.visit.task
        if (ended := self._ended_here.get(task)) is not None:
            self._completed(ended, result)
        elif result.cached:
            self._reapplied(result)

    def _completed(self, ended: NodeEnded, result: _Result) -> None:
        visit = ended.visit
        self._ended_here.pop(visit.task, None)
        if not visit.path:
            self._superstep.append(visit.node)
        numbers = {"attempts": ended.attempts, "duration_ms": round(ended.duration_s * 1000, 1)}
        self._end_line(result, numbers, self._where(visit, ended.attempts))

    def _reapplied(self, result: _Result) -> None:
        """A result that no call made: from the cache, or from before a crash."""
        visit = result.visit
        self._visited(visit)
        if not visit.path:
            self._superstep.append(visit.node)
        earlier = self._history.tasks.get(visit.task)
        if earlier is not None and not earlier.open:
            return
        numbers = {
            ("cached" if earlier is None else "recovered"): True,
            "attempts": 0,
            "duration_ms": 0.0,
        }
        self._end_line(result, numbers, {**_where_of(visit), "step": visit.step, **self._ids})
        self._segment.reapplied(visit.label, cached="cached" in numbers)

    def _end_line(
        self, result: _Result, numbers: Mapping[str, Any], where: Mapping[str, Any]
    ) -> None:
        """`node.completed`, after the messages that the node returned and no model streamed."""
        for message in result.messages:
            if message["message_id"] not in self._seen:
                self._seen[message["message_id"]] = result.visit
                self._line("message", message, where)
        update = {"update": result.update} if "updates" in self._recorded else {}
        self._line("node.completed", {**update, **numbers}, where)

    @property
    def interrupts(self) -> dict[str, dict[str, Any]]:
        """What the root graph waits for, by interrupt id, as it stands in the terminal line."""
        return {key: self._interrupts[key] for key in self._waited_for if key in self._interrupts}

    # What is inside a node.

    def _call_retrying(self, seen: CallRetrying, span_id: str | None) -> None:
        made = self._calls.pop(seen.call_id, {})
        self._flush_tokens()
        for message_id in made:
            self._seen.pop(message_id, None)
        error = self._error(seen.error) if seen.error is not None else {"error_class": "other"}
        where = self._where(seen.visit, seen.node_attempt or 1) if seen.visit else self._ids
        self._line(
            "call.retrying",
            {
                "call": seen.call,
                "attempt": seen.attempt,
                **error,
                "retry_in_ms": round(seen.retry_in_s * 1000, 1),
                "message_ids": list(made),
            },
            {**where, "span_id": span_id} if self._ids else where,
            seen.error,
        )

    def _custom(self, custom: Custom) -> None:
        if (known := self._current(custom.visit.task, custom.attempt)) is not None:
            self._line("custom", {"value": custom.value}, known[1])

    def _token(
        self, task: str, attempt: int | None, call_ids: Sequence[str], message_id: str, text: str
    ) -> None:
        known = self._current(task, attempt)
        if known is None:
            return
        visit, where = known
        self._message_made(message_id, visit, call_ids)
        if message_id not in self._tokens:
            self._tokens[message_id] = (where, [])
        self._tokens[message_id][1].append(text)
        if self._token_timer is None:
            self._token_timer = self._loop.call_later(self._token_s, self._flush_tokens)

    def _message(
        self, task: str, attempt: int | None, call_ids: Sequence[str], message: Mapping[str, Any]
    ) -> None:
        known = self._current(task, attempt)
        if known is None:
            return
        visit, where = known
        self._message_made(message["message_id"], visit, call_ids)
        self._line("message", message, where)

    def _current(self, task: str, attempt: int | None) -> tuple[Visit, dict[str, Any]] | None:
        """Where a task is, unless the attempt is superseded: its body may go on all the same."""
        record, known = self._history.tasks.get(task), self._wheres.get(task)
        if record is None or known is None or record.wakes_at is not None:
            return None
        visit, latest, where = known
        return (visit, where) if attempt in (None, latest) else None

    def _message_made(self, message_id: str, visit: Visit, call_ids: Sequence[str]) -> None:
        self._seen[message_id] = visit
        for call_id in call_ids:
            if call_id in self._calls:
                self._calls[call_id][message_id] = None

    def _forget(self, task: str) -> None:
        """The output of a failed attempt is superseded: the same message may come again."""
        self._flush_tokens()
        for message_id, visit in list(self._seen.items()):
            if visit.task == task or task in visit.path:
                del self._seen[message_id]

    # State.

    def _values(self, values: Any) -> None:
        if self.interrupted or (isinstance(values, dict) and _INTERRUPT in values):
            return
        self._values_line(values)

    def _values_line(self, values: Any) -> None:
        nodes, self._superstep = self._superstep, []
        step, said = (self._root_step if nodes else 0), self._history.values_step
        # After a crash LangGraph tells states that the log has already.
        if said is None or (nodes and step > said):
            self._line("values", {"values": values, "nodes": nodes}, {"step": step, **self._ids})

    def _superstep_ended(self) -> None:
        """LangGraph says nothing of the state when a superstep did not change it."""
        if self._superstep and "values" in self._recorded:
            self._values_line(self.output)
        self._superstep.clear()

    # Lines.

    def _where(self, visit: Visit, attempt: int) -> dict[str, Any]:
        known = self._wheres.get(visit.task)
        if known is not None and known[1] == attempt:
            return known[2]
        where = {**_where_of(visit), "attempt": attempt, "step": visit.step}
        self._wheres[visit.task] = (visit, attempt, where)
        return where

    def _error(self, error: BaseException) -> dict[str, Any]:
        described = {"error_class": classify(error), "error_type": error_type(error)}
        if self._expose_errors:
            described["detail"] = error_text(error)
        return described

    def _line(
        self,
        type: str,
        data: Mapping[str, Any],
        where: Mapping[str, Any],
        error: BaseException | None = None,
    ) -> None:
        if self._tokens:
            self._flush_tokens()
        if self._add(type, data, where) and type in _RECORDS:
            self._record(type, data, where, error)

    def _record(
        self,
        type: str,
        data: Mapping[str, Any],
        where: Mapping[str, Any],
        error: BaseException | None,
    ) -> None:
        """The line's twin in the log; a message is for who is on call, not for the client."""
        level, text = _RECORDS[type]
        fields = {name: where[name] for name in _RECORD_IDS if name in where}
        if "node" in where:
            fields["node"] = "/".join((*where["ns"], where["node"]))
        fields |= {name: data[name] for name in _RECORD_DATA if name in data}
        fields["seq"] = self._history.last_seq
        if error is not None and (message := self._segment.message(error)) is not None:
            fields["error"] = message
        getattr(self._log, level)(text, event_type=type, **fields)

    def _flush_tokens(self) -> None:
        if self._token_timer is not None:
            self._token_timer.cancel()
            self._token_timer = None
        tokens, self._tokens = self._tokens, {}
        if self._closed:
            return
        for message_id, (where, texts) in tokens.items():
            self._add("token", {"message_id": message_id, "text": "".join(texts)}, where)

    def _add(
        self, type: str, data: Mapping[str, Any], where: Mapping[str, Any] | None = None
    ) -> bool:
        seq, ts = self._history.last_seq + 1, self._clock()
        if seq > self._limits.events or self._bytes > self._limits.log_bytes:
            self._fail(LogLimit(f"more than {self._limits.events} lines or too many bytes"))
            return False
        event = self._sealer.seal(
            type, seq=seq, epoch=self._lease.epoch, ts=ts, data=data, where=where
        )
        first_output = type in OUTPUT_TYPES and self._history.first_output_s is None
        self._history.add(type, seq, ts, data, where)
        if first_output and (waited := self._history.first_output_s) is not None:
            self._segment.first_output(waited)
        self._segment.last_line = time.monotonic()
        self._bytes += event.size
        self._pending.append(event)
        self._unwritten += 1
        if (
            self._unwritten > self._limits.unwritten
            and not self._patient
            and type in ("custom", "token", "message")
        ):
            self._fail(LogLimit(f"more than {self._limits.unwritten} lines are not written yet"))
            return True
        if not self._posted and not self._flush_due:
            self._flush_due = True
            # A checkpoint's write mostly comes first, and takes the lines with it.
            self._loop.call_later(FLUSH_S, self.flush)
        return True

    def flush(self) -> None:
        """Post what is pending: what is posted later commits later."""
        self._flush_due = False
        if self._tokens and self._token_s == 0:
            self._flush_tokens()
        if not self._pending or self._broken is not None or self._last is not None:
            return  # what is left goes with the last line
        events, self._pending = self._pending, []
        posted = self._engine.append(self._lease, events)
        self._posted[posted] = events
        posted.add_done_callback(self._written)

    def before_checkpoint(self, checkpoint_id: str | None) -> None:
        """A checkpoint is never durable before the lines of what it contains. The id is given for
        a new one of the root graph."""
        if checkpoint_id is not None:
            self.progressed = True
            self._segment.checkpoint_id = checkpoint_id
        self._flush_tokens()
        self.flush()

    def _written(self, future: asyncio.Future[None]) -> None:
        events = self._posted.pop(future)
        self._unwritten -= len(events)
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is not None:
            self._unposted += events
            self._broken = self._broken or error
            self._fail(error)
        elif self._pending and not self._posted:
            self.flush()

    def _fail(self, error: BaseException) -> None:
        if not self._closed:
            self.close()
            self._failed(error)

    # The end.

    def sweep(self) -> None:
        """End what is still open: nothing may be left unsaid before a terminal line."""
        self._take_last()
        for ended in list(self._ended_here.values()):
            self._completed(ended, _Result(visit=ended.visit, cached=False))
        if self.draining:
            return
        now = self._clock()
        for record in list(self._history.tasks.values()):
            if record.open and record.task in self._wheres:
                _, attempt, where = self._wheres[record.task]
                numbers = {
                    "attempts": attempt,
                    "duration_ms": round(max(0.0, now - record.since) * 1000, 1),
                }
                self._line("node.cancelled", numbers, where)

    @property
    def open_nodes(self) -> list[str]:
        """Nodes that have begun and not ended."""
        return sorted({task.node for task in self._history.tasks.values() if task.open})

    def now(self) -> float:
        """Unix seconds by the clock that stamps the lines."""
        return self._clock()

    def close(self) -> None:
        """Take no more parts: what still comes is dropped and counted."""
        self._take_last()
        self._flush_tokens()
        self._closed = True

    def _take_last(self) -> None:
        with self._crossing_lock:
            self._shut = True
        self._take_crossing()

    async def end(self, type: str, data: Mapping[str, Any]) -> None:
        """The last line of this epoch, committed. Raises LeaseLost or StorageFailed.

        May be called again after StorageFailed: nothing of it was written.
        """
        self.close()
        if self._last is None:
            now, seq = self._clock(), self._history.last_seq + 1
            self._last = self._sealer.seal(
                type, seq=seq, epoch=self._lease.epoch, ts=now, data=data, where=self._ids
            )
            self._history.add(type, seq, now, data, self._ids)
        broken = self._broken
        if broken is not None and self._posted:
            await asyncio.wait(self._posted)
        try:
            await self._engine.append(self._lease, [*self._unposted, *self._pending, self._last])
        except LeaseLost:
            if self._posted:
                await asyncio.wait(self._posted)
            # Perhaps it was only refused for the lines before it that could not be written.
            if broken is None and isinstance(self._broken, StorageFailed):
                raise self._broken from None
            raise


class _Observed(NamedTuple):
    """An observation with the spans that were begun for it."""

    seen: Observation
    span_id: str | None
    node_span_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What came of a task, as lines tell it."""

    visit: Visit
    cached: bool
    update: Any = None
    messages: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class _Task:
    """What a part of mode `tasks` tells: a task is about to run, or what it wrote."""

    id: str
    message_ids: Sequence[str]
    interrupts: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls, data: Mapping[str, Any], copied: Callable[[Any], Any] = lambda value: value
    ) -> _Task:
        interrupts = data.get("interrupts") or ()
        messages = [m.id for m in _messages_in(data.get("input")) if m.id is not None]
        return cls(data["id"], messages, copied(interrupts) if interrupts else ())


_NOBODY = Visit(task="", node="", ns=(), path=(), step=0)


def _where_of(visit: Visit) -> dict[str, Any]:
    return {
        "node": visit.node,
        "ns": list(visit.ns),
        "path": list(visit.path),
        "task": visit.task,
    }


def _messages_in(value: Any) -> list[BaseMessage]:
    """Messages in a node's input or update: itself, its values, and their items."""
    return [message for message in _found_in(value, 3) if message.type != "remove"]


def _named(messages: Iterable[BaseMessage]) -> Iterable[BaseMessage]:
    """Messages that a node has made get their ids now, as in LangGraph's mode `messages`."""
    for message in messages:
        if message.id is None:
            message.id = str(uuid4())
        yield message


def _found_in(value: Any, depth: int) -> Iterable[BaseMessage]:
    if isinstance(value, BaseMessage):
        yield value
        return
    if isinstance(value, dict):
        items: Iterable[Any] = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
    elif depth == 3 and hasattr(value, "__dict__"):
        items = list(vars(value).values())
    else:
        return
    if depth:
        for item in items:
            yield from _found_in(item, depth - 1)


def _message_data(message: BaseMessage) -> dict[str, Any]:
    data: dict[str, Any] = {
        "message_id": message.id,
        "role": message.type,
        "text": str(message.text),
    }
    for name in ("name", "tool_calls", "tool_call_id"):
        if value := getattr(message, name, None):
            data[name] = value
    if getattr(message, "status", None) == "error":  # a tool's, which looks like a success
        data["status"] = "error"
    if not isinstance(message.content, str):
        data["content"] = message.content
    if usage := getattr(message, "usage_metadata", None):
        data["usage"] = usage
    return data
