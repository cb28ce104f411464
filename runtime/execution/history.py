"""What a run's log says so far, folded line by line: its statistics, and the state of each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from runtime.engines.base import Checkpointed
from runtime.events import NODE_END_TYPES, OUTPUT_TYPES
from runtime.model import StoredLine

__all__ = ["History", "TaskRecord", "begun_anew", "superseded"]


@dataclass(slots=True)
class TaskRecord:
    """One task as the log knows it, in its latest life."""

    task: str
    node: str
    ns: Sequence[str]
    path: Sequence[str]
    step: int
    #: seq of the first line of this life; of the current attempt.
    first_seq: int
    attempt_seq: int
    attempt: int
    #: Unix seconds of those two lines.
    since: float
    attempt_since: float
    #: Hex ids of the node's span and of the latest attempt's; None without tracing.
    node_span_id: str | None = None
    span_id: str | None = None
    open: bool = True
    #: When its next attempt is to begin, in unix seconds; None while none is waited for.
    wakes_at: float | None = None

    @property
    def namespace(self) -> str:
        """The checkpoint namespace of the graph that the task belongs to."""
        return "|".join(f"{n}:{t}" for n, t in zip(self.ns, self.path, strict=True))


class History:
    """The fold. Live lines are added as they are made, stored ones as they are read."""

    def __init__(self) -> None:
        self.last_seq = 0
        #: Bytes of the stored lines.
        self.log_bytes = 0
        self.tasks: dict[str, TaskRecord] = {}
        #: The superstep of the last `values` line that counts.
        self.values_step: int | None = None
        #: Hex ids: of the trace, of the span that asked for the run, of the latest segment's.
        self.trace_id: str | None = None
        self.root_span_id: str | None = None
        self.segment_span_id: str | None = None
        #: Of the segment before that one.
        self.previous_span_id: str | None = None
        #: When the latest segment began, in unix seconds.
        self.segment_since = 0.0
        self._queued_at: float | None = None
        self._started_at: float | None = None
        self._first_output_at: float | None = None
        self._last_at: float | None = None
        self._max_gap = 0.0
        self._nodes = 0
        self._attempts = 0
        self._retries = 0
        self._backoff = 0.0
        self._asleep: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    @classmethod
    def read(cls, lines: Iterable[StoredLine]) -> History:
        """Fold stored lines."""
        history = cls()
        for stored in lines:
            line = orjson.loads(stored.body)
            ts = datetime.fromisoformat(line["ts"]).timestamp()
            history.add(line["type"], line["seq"], ts, line.get("data") or {}, line)
            history.log_bytes += len(stored.body)
        return history

    def add(
        self,
        type: str,
        seq: int,
        ts: float,
        data: Mapping[str, Any],
        where: Mapping[str, Any] | None = None,
    ) -> None:
        """Fold one line; `where` has node, ns, path, task, attempt, step of a node's line, and the
        ids of its span."""
        self.last_seq = seq
        if self._last_at is not None:
            self._max_gap = max(self._max_gap, ts - self._last_at)
        self._last_at = ts
        if self._first_output_at is None and type in OUTPUT_TYPES:
            self._first_output_at = ts
        if type == "node.started":
            assert where is not None
            self._started(seq, ts, where, data)
        elif type == "node.retrying":
            assert where is not None
            self._retries += 1
            self._asleep[where["task"]] = ts
            if (record := self.tasks.get(where["task"])) is not None:
                record.wakes_at = ts + data["retry_in_ms"] / 1000
        elif type in NODE_END_TYPES:
            assert where is not None
            self._nodes += 1
            self._ended(seq, ts, where)
        elif type == "call.retrying":
            self._retries += 1
        elif type == "message":
            for name, count in (data.get("usage") or {}).items():
                if name in ("input_tokens", "output_tokens") and isinstance(count, int):
                    kind = name.removesuffix("_tokens")
                    self._tokens[kind] = self._tokens.get(kind, 0) + count
        elif type == "values":
            assert where is not None
            self.values_step = where["step"]
        elif type == "run.queued":
            self._queued_at = ts
            if where is not None:
                self.trace_id, self.root_span_id = where.get("trace_id"), where.get("span_id")
        elif type == "run.started":
            self._started_at = ts
            self._segment_began(ts, where)
        elif type == "run.recovered":
            self._recovered(data)
            self._segment_began(ts, where)

    def _segment_began(self, ts: float, where: Mapping[str, Any] | None) -> None:
        self.segment_since = ts
        self.previous_span_id = self.segment_span_id
        if where is not None:
            self.trace_id, self.segment_span_id = where.get("trace_id"), where.get("span_id")

    def _started(
        self, seq: int, ts: float, where: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        self._attempts += 1
        task = where["task"]
        self._wake(task, ts)
        record = self.tasks.get(task)
        if record is not None and record.open:
            record.attempt, record.attempt_seq = where["attempt"], seq
            record.attempt_since, record.span_id = ts, where.get("span_id")
            record.wakes_at = None
            return
        self.tasks[task] = TaskRecord(
            task=task,
            node=where["node"],
            ns=where["ns"],
            path=where["path"],
            step=where["step"],
            first_seq=seq,
            attempt_seq=seq,
            attempt=where["attempt"],
            since=ts,
            attempt_since=ts,
            node_span_id=data.get("node_span_id"),
            span_id=where.get("span_id"),
        )

    def _ended(self, seq: int, ts: float, where: Mapping[str, Any]) -> None:
        task = where["task"]
        self._wake(task, ts)
        if (record := self.tasks.get(task)) is not None:
            record.open = False
        else:  # cached: never started
            self.tasks[task] = TaskRecord(
                task=task,
                node=where["node"],
                ns=where["ns"],
                path=where["path"],
                step=where["step"],
                first_seq=seq,
                attempt_seq=seq,
                attempt=0,
                since=ts,
                attempt_since=ts,
                open=False,
            )

    def _wake(self, task: str, ts: float) -> None:
        if (asleep := self._asleep.pop(task, None)) is not None:
            self._backoff += ts - asleep

    def _recovered(self, data: Mapping[str, Any]) -> None:
        self._asleep.clear()
        for lost in data.get("lost") or ():
            record = self.tasks.pop(lost["task"], None)
            # A superstep that is repeated says its values again.
            if record is not None and not record.path and self.values_step is not None:
                self.values_step = max(0, min(self.values_step, record.step - 1))

    @property
    def wakes_at(self) -> float | None:
        """When the first of the open nodes goes on, in unix seconds; None unless all sleep.

        A node around one that sleeps may have work or a time limit of its own: it is awake.
        """
        opened = [record.wakes_at for record in self.tasks.values() if record.open]
        asleep = [wakes_at for wakes_at in opened if wakes_at is not None]
        return min(asleep) if asleep and len(asleep) == len(opened) else None

    @property
    def first_output_s(self) -> float | None:
        """Seconds from `run.queued` to the first line that a client waits for; None before it."""
        if self._first_output_at is None or self._queued_at is None:
            return None
        return max(0.0, self._first_output_at - self._queued_at)

    def superseded_from(self, task: str) -> int:
        """The first seq of what a retry of a task repeats: its attempt, and what was kept of its
        graphs from before a crash."""
        record = self.tasks.get(task)
        if record is None:
            return self.last_seq + 1
        kept = [
            inner.first_seq
            for inner in self.tasks.values()
            if task in inner.path and inner.first_seq < record.first_seq
        ]
        return min([record.attempt_seq, *kept])

    def statistics(self, now: float) -> dict[str, Any]:
        """The numbers of a terminal line; what does not apply is absent."""
        started = self._started_at
        numbers: dict[str, Any] = {
            "duration_ms": _ms(now - started) if started is not None else None,
            "queue_ms": _ms(started - self._queued_at)
            if started is not None and self._queued_at is not None
            else None,
            "backoff_ms": _ms(self._backoff + sum(now - ts for ts in self._asleep.values())),
            "nodes": self._nodes,
            "attempts": self._attempts,
            "retries": self._retries,
            "tokens": self._tokens or None,
            "first_output_ms": _ms(self._first_output_at - self._queued_at)
            if self._first_output_at is not None and self._queued_at is not None
            else None,
            "max_gap_ms": _ms(
                max(self._max_gap, now - self._last_at if self._last_at is not None else 0.0)
            ),
        }
        return {name: value for name, value in numbers.items() if value is not None}


def superseded(history: History, held: Checkpointed) -> list[TaskRecord]:
    """The tasks that will run again because no checkpoint holds them, oldest first."""
    is_held, anew = _holder(history, held), begun_anew(history, held)
    return sorted(
        (
            record
            for record in history.tasks.values()
            if not is_held(record) or not anew.isdisjoint(record.path)
        ),
        key=lambda record: record.first_seq,
    )


def begun_anew(history: History, held: Checkpointed) -> set[str]:
    """Tasks that will run again and that a retry had begun anew: what their graphs wrote before it
    is discarded, so the graphs must begin anew as well.

    LangGraph counts a task's graphs over its attempts, and begins to count again in a new process:
    it would go on from a checkpoint of the first attempt.
    """
    is_held = _holder(history, held)
    return {
        record.task
        for record in history.tasks.values()
        if (record.attempt > 1 or record.wakes_at is not None) and not is_held(record)
    }


def _holder(history: History, held: Checkpointed) -> Callable[[TaskRecord], bool]:
    """Tells whether a task is held: when its result is stored, when its graph has a checkpoint of
    its superstep, or when a call around it is held. Of one that is open there is no such
    checkpoint: its end would stand in the log before it.
    """
    # Of several graphs that one task calls, all but the first have a number in their namespace,
    # which lines do not tell: what one has a checkpoint of says nothing of the others.
    several = {plain for ns in held.steps if (plain := _without_numbers(ns)) != ns}

    def has_checkpoint(record: TaskRecord) -> bool:
        namespace = record.namespace
        return (
            not record.open
            and namespace not in several
            and held.steps.get(namespace, -2) >= record.step
        )

    def is_held(record: TaskRecord) -> bool:
        return (
            (record.task in held.stored and not record.node.startswith(_HANDLERS))
            or has_checkpoint(record)
            or any(
                caller in held.stored
                or ((around := history.tasks.get(caller)) is not None and is_held(around))
                for caller in record.path
            )
        )

    return is_held


#: Nodes that LangGraph makes to handle errors. It runs them again though their result is stored.
_HANDLERS = ("__error_handler__", "__default_error_handler__")


def _without_numbers(namespace: str) -> str:
    return "|".join(part for part in namespace.split("|") if not part.isdigit())


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 1)
