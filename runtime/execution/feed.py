"""Makes the lines of one run out of what LangGraph and the seam emit, in their order.

The feed *is* the stream in LangGraph's config: it is called when a part is emitted, not when a
generator is read. So a line is posted before the checkpoint of what it tells, in subgraphs too,
and LangGraph keeps its fast path.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import orjson
import structlog
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk
from langgraph.pregel._messages import StreamMessagesHandler

from runtime.engines.base import Engine
from runtime.errors import LogLimit
from runtime.events import Event, Sealer
from runtime.execution.history import History
from runtime.model import Lease
from telemetry.contract import classify, error_type
from telemetry.encoding import JsonEncoder
from telemetry.observations import (
    ATTEMPTS,
    AttemptStarted,
    CallAttemptEnded,
    CallAttemptStarted,
    CallRetrying,
    Custom,
    NodeEnded,
    NodeRetrying,
    Visit,
)

__all__ = ["Feed", "Limits", "MessageTap"]

_INTERRUPT = "__interrupt__"


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
    """Called with LangGraph's stream parts `(namespace, mode, data)`, from any thread.

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
        self._recorded = modes
        self._limits = limits
        self._token_s = token_s
        self._failed = failed
        self._expose_errors = expose_errors
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._log = structlog.get_logger("runtime").bind(
            run_id=lease.run_id, thread_id=lease.thread_id
        )

        self.modes = {"tasks", "updates", ATTEMPTS} | (modes & {"values", "custom", "messages"})
        #: Interrupts by id, as they stand in the terminal line.
        self.interrupts: dict[str, dict[str, Any]] = {}
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
        self._pending: list[Event] = []
        self._last: Event | None = None
        self._posting = 0
        self._unwritten = 0
        #: Parts on their way from other threads.
        self._crossing = 0
        self._crossing_lock = threading.Lock()
        #: Whether who writes now waits for room by itself.
        self._patient = False
        self._bytes = 0
        self._flush_due = False
        self._wheres: dict[str, tuple[Visit, int, dict[str, Any]]] = {}
        self._scheduled_visits: dict[str, Visit] = {}
        self._ended_here: dict[str, NodeEnded] = {}
        self._update: Any = None
        self._root_step = 0
        self._superstep: list[str] = []
        self._earlier = dict(history.tasks)
        self._entered = not history.has_values
        self._tokens: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
        self._token_timer: asyncio.TimerHandle | None = None
        self._seen: dict[str, Visit] = {}
        self._calls: dict[str, dict[str, None]] = {}

    # What LangGraph calls.

    def __call__(self, part: tuple[Any, str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self._part(part)
            return
        if part[1] == "custom":
            # The node may change the value after it wrote it.
            custom: Custom = part[2]
            value = orjson.loads(self._encoder.encode(custom.value))
            part = (
                part[0],
                part[1],
                Custom(visit=custom.visit, attempt=custom.attempt, value=value),
            )
        # A thread may wait until its lines are written; the loop must not.
        while self._unwritten + self._crossing >= self._limits.unwritten and not self._closed:
            time.sleep(0.002)
        with self._crossing_lock:
            self._crossing += 1
        self._loop.call_soon_threadsafe(self._crossed, part)

    def _crossed(self, part: tuple[Any, str, Any]) -> None:
        with self._crossing_lock:
            self._crossing -= 1
        self._patient = True
        self._part(part)
        self._patient = False

    def _part(self, part: tuple[Any, str, Any]) -> None:
        if self._closed:
            self.dropped += 1
            return
        ns, mode, data = part
        try:
            if mode == ATTEMPTS:
                self._observed(data)
            elif mode == "updates":
                self._update = data
                if _INTERRUPT in data and not ns:
                    self.interrupted = True
                elif (data.get("__metadata__") or {}).get("cached"):
                    self._cached(ns, data)
            elif mode == "tasks":
                if "result" in data:
                    self._result(data)
                else:
                    self._scheduled(ns, data)
            elif mode == "custom":
                self._custom(data)
            elif mode == "values" and not ns:
                self._values(data)
            elif mode == "token":
                self._token(*data)
            elif mode == "message":
                self._message(*data)
        except Exception as exc:
            self._log.exception("Feed failed", mode=mode)
            self._fail(exc)

    # Nodes and attempts.

    def _observed(self, seen: Any) -> None:
        if isinstance(seen, AttemptStarted):
            visit = seen.visit
            self._scheduled_visits.pop(visit.task, None)
            if not visit.path:
                self._root_step = visit.step
            self._line("node.started", {}, self._where(visit, seen.attempt))
        elif isinstance(seen, NodeRetrying):
            self._retrying(seen)
        elif isinstance(seen, NodeEnded):
            self._node_ended(seen)
        elif isinstance(seen, CallAttemptStarted):
            self._calls[seen.call_id] = {}
        elif isinstance(seen, CallRetrying):
            self._call_retrying(seen)
        elif isinstance(seen, CallAttemptEnded) and seen.outcome != "retried":
            self._calls.pop(seen.call_id, None)

    def _retrying(self, seen: NodeRetrying) -> None:
        record = self._history.tasks.get(seen.visit.task)
        self._forget(seen.visit.task)
        self._line(
            "node.retrying",
            {
                **self._error(seen.error),
                "retry_in_ms": round(seen.retry_in_s * 1000, 1),
                "jitter_ms": round(seen.jitter_s * 1000, 1),
                "max_attempts": seen.max_attempts,
                "discard_from": record.attempt_seq if record else self._history.last_seq + 1,
            },
            self._where(seen.visit, seen.attempt),
        )

    def _node_ended(self, seen: NodeEnded) -> None:
        where = self._where(seen.visit, seen.attempts)
        numbers = {"attempts": seen.attempts, "duration_ms": round(seen.duration_s * 1000, 1)}
        if seen.outcome == "success":
            # Its result follows; a command to the parent graph has none.
            self._ended_here[seen.visit.task] = seen
        elif seen.outcome == "interrupted":
            self._line("node.interrupted", numbers, where)
        elif seen.outcome == "cancelled" and not self.draining:
            self._line("node.cancelled", numbers, where)
        elif seen.outcome == "error":
            assert seen.error is not None
            self.failure = seen
            self._line("node.failed", {**self._error(seen.error), **numbers}, where)

    def _result(self, data: Mapping[str, Any]) -> None:
        """A task's writes are known: with them its end."""
        for interrupt in data["interrupts"]:
            self.interrupts.setdefault(interrupt["id"], {**interrupt, "task": data["id"]})
        ended = self._ended_here.pop(data["id"], None)
        update, self._update = self._update, None
        if ended is None:
            return
        self._completed(ended, (update or {}).get(data["name"]))

    def _completed(self, ended: NodeEnded, update: Any) -> None:
        data: dict[str, Any] = {"update": update} if "updates" in self._recorded else {}
        data["attempts"] = ended.attempts
        data["duration_ms"] = round(ended.duration_s * 1000, 1)
        self._output_messages(ended.visit, ended.attempts, update)
        if not ended.visit.path:
            self._superstep.append(ended.visit.node)
        self._line("node.completed", data, self._where(ended.visit, ended.attempts))

    def _scheduled(self, ns: Any, data: Mapping[str, Any]) -> None:
        """Messages that come in are not output of the node that hands them on."""
        if "messages" in self._recorded:
            for message in _messages_in(data.get("input")):
                if message.id is not None:
                    self._seen.setdefault(message.id, _NOBODY)
        visit = Visit(
            task=data["id"],
            node=data["name"],
            ns=tuple(_names(ns)),
            path=tuple(_ids(ns)),
            step=-1,
        )
        self._scheduled_visits[visit.task] = visit

    def _cached(self, ns: Any, data: Mapping[str, Any]) -> None:
        """A result that no call made: from the cache, or from before a crash."""
        update, self._update = self._update, None
        for node in update:
            if node == "__metadata__":
                continue
            path = tuple(_ids(ns))
            for visit in self._scheduled_visits.values():
                if visit.node == node and visit.path == path:
                    del self._scheduled_visits[visit.task]
                    self._reapplied(visit, update[node])
                    break

    def _reapplied(self, visit: Visit, update: Any) -> None:
        earlier = self._earlier.get(visit.task)
        if not visit.path:
            self._superstep.append(visit.node)
        if earlier is not None and not earlier.open:
            return
        step = earlier.step if earlier is not None else self._step_of(visit)
        where = {**_where_of(visit), "step": step}
        data: dict[str, Any] = {"update": update} if "updates" in self._recorded else {}
        data |= {"recovered": True} if earlier is not None else {"cached": True}
        self._line("node.completed", {**data, "attempts": 0, "duration_ms": 0.0}, where)

    def _step_of(self, visit: Visit) -> int:
        return self._root_step + 1 if not visit.path else 0

    # What is inside a node.

    def _call_retrying(self, seen: CallRetrying) -> None:
        made = self._calls.pop(seen.call_id, {})
        self._flush_tokens()
        for message_id in made:
            self._seen.pop(message_id, None)
        if seen.visit is None:
            return
        error = self._error(seen.error) if seen.error is not None else {"error_class": "other"}
        self._line(
            "call.retrying",
            {
                "call": seen.call,
                "attempt": seen.attempt,
                **error,
                "retry_in_ms": round(seen.retry_in_s * 1000, 1),
                "message_ids": list(made),
            },
            self._where(seen.visit, seen.node_attempt or 1),
        )

    def _custom(self, custom: Custom) -> None:
        self._line("custom", {"value": custom.value}, self._where(custom.visit, custom.attempt))

    def _token(self, task: str, call_ids: tuple[str, ...], message_id: str, text: str) -> None:
        known = self._wheres.get(task)
        if known is None:
            return
        visit, _, where = known
        self._message_made(message_id, visit, call_ids)
        if message_id not in self._tokens:
            self._tokens[message_id] = (where, [])
        self._tokens[message_id][1].append(text)
        if self._token_timer is None:
            self._token_timer = self._loop.call_later(self._token_s, self._flush_tokens)

    def _message(self, task: str, call_ids: tuple[str, ...], message: BaseMessage) -> None:
        known = self._wheres.get(task)
        if known is None or message.id is None:
            return
        visit, _, where = known
        self._message_made(message.id, visit, call_ids)
        self._line("message", _message_data(message), where)

    def _output_messages(self, visit: Visit, attempt: int, update: Any) -> None:
        """Messages that a node returned and that no model streamed."""
        if "messages" not in self._recorded:
            return
        for message in _messages_in(update):
            if message.id is None or message.id in self._seen:
                continue
            self._seen[message.id] = visit
            self._line("message", _message_data(message), self._where(visit, attempt))

    def _message_made(self, message_id: str, visit: Visit, call_ids: tuple[str, ...]) -> None:
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
        if not self._entered:
            # After a crash LangGraph begins with the state that the log has already.
            self._entered = True
            if not self._superstep:
                return
        self._entered = True
        nodes, self._superstep = self._superstep, []
        where = {"step": self._root_step} if nodes else {"step": 0}
        self._line("values", {"values": values, "nodes": nodes}, where)

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
            described["detail"] = str(error)[:2000]
        return described

    def _line(
        self, type: str, data: Mapping[str, Any], where: Mapping[str, Any] | None = None
    ) -> None:
        if self._tokens:
            self._flush_tokens()
        self._add(type, data, where)

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
    ) -> None:
        seq, ts = self._history.last_seq + 1, self._clock()
        if seq > self._limits.events or self._bytes > self._limits.log_bytes:
            self._fail(LogLimit(f"more than {self._limits.events} lines or too many bytes"))
            return
        event = self._sealer.seal(
            type, seq=seq, epoch=self._lease.epoch, ts=ts, data=data, where=where
        )
        self._history.add(type, seq, ts, data, where)
        self._bytes += event.size
        self._pending.append(event)
        self._unwritten += 1
        if self._unwritten > self._limits.unwritten and not self._patient:
            self._fail(LogLimit(f"more than {self._limits.unwritten} lines are not written yet"))
            return
        if not self._posting and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Post what is pending: what is posted later commits later."""
        self._flush_due = False
        if self._tokens and self._token_s == 0:
            self._flush_tokens()
        if not self._pending:
            return
        events, self._pending = self._pending, []
        self._posting += 1
        posted = self._engine.append(self._lease, events)
        posted.add_done_callback(lambda future: self._written(future, len(events)))

    def before_checkpoint(self, progress: bool) -> None:
        """A checkpoint is never durable before the lines of what it contains."""
        self.progressed = self.progressed or progress
        self._flush_tokens()
        self.flush()

    def _written(self, future: asyncio.Future[None], count: int) -> None:
        self._posting -= 1
        self._unwritten -= count
        if (error := future.exception()) is not None:
            self._fail(error)
        elif self._pending and not self._posting:
            self.flush()

    def _fail(self, error: BaseException) -> None:
        if not self._closed:
            self.close()
            self._failed(error)

    # The end.

    def sweep(self) -> None:
        """End what is still open: nothing may be left unsaid before a terminal line."""
        for ended in list(self._ended_here.values()):
            self._completed(ended, None)
        self._ended_here.clear()
        if self.draining:
            return
        for record in list(self._history.tasks.values()):
            if record.open and record.task in self._wheres:
                _, attempt, where = self._wheres[record.task]
                self._line("node.cancelled", {"attempts": attempt, "duration_ms": 0.0}, where)

    @property
    def open_nodes(self) -> list[str]:
        """Nodes that have begun and not ended."""
        return sorted({task.node for task in self._history.tasks.values() if task.open})

    def now(self) -> float:
        """Unix seconds by the clock that stamps the lines."""
        return self._clock()

    def close(self) -> None:
        """Take no more parts: what still comes is dropped and counted."""
        self._flush_tokens()
        self._closed = True

    async def end(self, type: str, data: Mapping[str, Any]) -> None:
        """The last line of this epoch, committed. Raises LeaseLost or StorageFailed.

        May be called again after StorageFailed: nothing of it was written.
        """
        self.close()
        if self._last is None:
            now, seq = self._clock(), self._history.last_seq + 1
            self._last = self._sealer.seal(
                type, seq=seq, epoch=self._lease.epoch, ts=now, data=data
            )
            self._history.add(type, seq, now, data)
        await self._engine.append(self._lease, [*self._pending, self._last])


class MessageTap(StreamMessagesHandler):
    """LangChain's callback for what chat models stream: parts `token` and `message` for the feed.

    Subclasses LangGraph's own handler so that LangGraph knows it for one.
    """

    ignore_chain = True

    def __init__(self, feed: Feed, open_calls: Callable[[], tuple[str, ...]]) -> None:
        super().__init__(feed, True)
        self._feed = feed
        self._open_calls = open_calls
        self._tasks: dict[UUID, str] = {}

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: UUID, **kw: Any
    ) -> Any:
        super().on_chat_model_start(serialized, messages, run_id=run_id, **kw)
        if (meta := self.metadata.get(run_id)) is not None:
            self._tasks[run_id] = _task_of(meta[1].get("langgraph_checkpoint_ns"))

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, run_id: UUID, **kw: Any) -> Any:
        task = self._tasks.get(run_id)
        if task is None or not isinstance(chunk, ChatGenerationChunk):
            return
        text, message_id = str(chunk.message.text), chunk.message.id
        if text and message_id:
            self._feed(((), "token", (task, self._open_calls(), message_id, text)))

    def on_llm_end(self, response: Any, *, run_id: UUID, **kw: Any) -> Any:
        self.metadata.pop(run_id, None)
        task = self._tasks.pop(run_id, None)
        if task is None or not response.generations or not response.generations[0]:
            return
        message = getattr(response.generations[0][0], "message", None)
        if message is not None:
            self._feed(((), "message", (task, self._open_calls(), message)))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kw: Any) -> Any:
        self.metadata.pop(run_id, None)
        self._tasks.pop(run_id, None)


_NOBODY = Visit(task="", node="", ns=(), path=(), step=0)


def _task_of(namespace: str | None) -> str:
    segments = [part for part in (namespace or "").split("|") if part and not part.isdigit()]
    return segments[-1].partition(":")[2] if segments else ""


def _names(ns: Any) -> list[str]:
    return [part.partition(":")[0] for part in ns if not part.isdigit()]


def _ids(ns: Any) -> list[str]:
    return [part.partition(":")[2] for part in ns if not part.isdigit()]


def _where_of(visit: Visit) -> dict[str, Any]:
    return {
        "node": visit.node,
        "ns": list(visit.ns),
        "path": list(visit.path),
        "task": visit.task,
    }


def _messages_in(value: Any) -> list[BaseMessage]:
    """Messages in a node's input or update: itself, its values, and their items."""
    if isinstance(value, BaseMessage):
        return [value]
    if isinstance(value, dict):
        values = list(value.values())
    elif isinstance(value, (list, tuple)):
        values = list(value)
    else:
        values = list(vars(value).values()) if hasattr(value, "__dict__") else []
    found: list[BaseMessage] = []
    for item in values:
        if isinstance(item, BaseMessage):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(inner for inner in item if isinstance(inner, BaseMessage))
    return found


def _message_data(message: BaseMessage) -> dict[str, Any]:
    data: dict[str, Any] = {
        "message_id": message.id,
        "role": message.type,
        "text": str(message.text),
    }
    for name in ("name", "tool_calls", "tool_call_id"):
        if value := getattr(message, name, None):
            data[name] = value
    if not isinstance(message.content, str):
        data["content"] = message.content
    if usage := getattr(message, "usage_metadata", None):
        data["usage"] = usage
    return data
