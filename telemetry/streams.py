"""Counts what one stream of lines delivers, and says how it went when it ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

import structlog

from telemetry.contract import CloseReason, StreamKind
from telemetry.http import Exchange, harmless
from telemetry.metrics import Metrics

__all__ = ["Line", "StreamWatch"]

#: What a reader waits for.
OUTPUT_TYPES = frozenset(("token", "message", "custom", "node.completed"))

_log = structlog.get_logger("api")


class Line(Protocol):
    """A stored line, encoded: its time stands near the beginning."""

    @property
    def seq(self) -> int: ...
    @property
    def type(self) -> str: ...
    @property
    def body(self) -> bytes: ...


class StreamWatch:
    """One stream, told of each write. The costs are per write, but for counting line types.

    Gap and lag are those of lines that were stored after the stream was opened, by the time that
    is written in them: what a replay delivers was late before anybody asked. The gap is between the
    last line of one write and the first of the next, so a slow client does not make it longer; the
    lag is that of the first line of a write, which waited longest, until the client took it.
    """

    def __init__(
        self,
        metrics: Metrics,
        exchange: Exchange,
        *,
        kind: StreamKind,
        run_id: str,
        thread_id: str,
        from_seq: int,
        last_seq: int,
        slow_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`from_seq` is the reader's cursor, `last_seq` the last line that is stored already. A
        write that takes longer than `slow_s` is worth a record."""
        self._metrics = metrics
        self._types = metrics["stream_events_total"]
        self._sizes = metrics["stream_bytes_total"]
        self._blocking = metrics["stream_send_blocked_seconds_total"]
        self._lag = metrics["stream_delivery_lag_seconds"]
        self._gap = metrics["stream_gap_seconds"]
        self._exchange = exchange
        self._kind = kind
        self._ids = {"kind": kind, "run_id": run_id, "thread_id": thread_id}
        self._from = self._seq = from_seq
        self._replayed = last_seq
        self._slow_s = slow_s
        self._clock = clock
        self._began = clock()
        self._events = self._bytes = 0
        self._first_output_s: float | None = None
        self._max_gap_s: float | None = None
        self._last_ts: float | None = None
        self._slow = False

    @harmless
    def opened(self) -> None:
        """The response begins."""
        self._exchange.streams = True
        self._exchange.span.set_attribute("sereno.stream", True)
        self._metrics["streams_active"].inc(self._kind)
        if self._kind == "resume":
            self._metrics["stream_resumes_total"].inc("complete")
        _log.info("Stream opened", event_type="stream.opened", **self._ids, from_seq=self._from)

    @harmless
    def wrote(
        self,
        lines: Sequence[Line],
        unstored: Sequence[str],
        *,
        seq: int,
        size: int,
        blocked_s: float,
    ) -> None:
        """The client took a write: stored lines, types of others, and where it is now."""
        self._blocked(blocked_s)
        self._seq = seq
        self._bytes += size
        self._sizes.inc(self._kind, by=size)
        types = [*unstored, *(line.type for line in lines)]
        counted: dict[str, int] = Counter(types) if len(types) > 1 else dict.fromkeys(types, 1)
        for type, count in counted.items():
            self._types.inc(type, by=count)
        if not lines:
            return
        self._events += len(lines)
        now = self._clock()
        if self._first_output_s is None and not OUTPUT_TYPES.isdisjoint(counted):
            self._first_output_s = now - self._began
        last = _time_of(lines[-1])
        if lines[-1].seq > self._replayed:
            live = next(line for line in lines if line.seq > self._replayed)
            self._live(last if live is lines[-1] else _time_of(live), now)
        self._last_ts = last

    def _live(self, first: float, now: float) -> None:
        self._lag.observe(max(0.0, now - first), self._kind)
        if self._last_ts is not None:
            gap = max(0.0, first - self._last_ts)
            self._gap.observe(gap, self._kind)
            self._max_gap_s = max(gap, self._max_gap_s or 0.0)

    @harmless
    def refused(self, blocked_s: float) -> None:
        """The client did not take a write."""
        self._blocked(blocked_s)

    def _blocked(self, seconds: float) -> None:
        self._blocking.inc(by=seconds)
        if seconds >= self._slow_s and not self._slow:
            self._slow = True
            _log.info(
                "Stream slow",
                event_type="stream.slow",
                **self._ids,
                last_seq=self._seq,
                blocked_s=round(seconds, 3),
            )

    @harmless
    def closing(self, reason: CloseReason) -> None:
        """Before the last byte, with which the request's span ends; and when there is none."""
        self._exchange.close_reason = reason
        if self._exchange.span.is_recording():
            statistics = {"close_reason": reason, **self._statistics()}
            self._exchange.span.set_attributes(
                {f"sereno.stream.{name}": value for name, value in statistics.items()}
            )

    @harmless
    def closed(self, reason: CloseReason) -> None:
        """It is over."""
        self.closing(reason)
        self._metrics["streams_active"].dec(self._kind)
        self._metrics["streams_closed_total"].inc(reason)
        _log.info(
            "Stream closed",
            event_type="stream.closed",
            **self._ids,
            reason=reason,
            **self._statistics(),
        )

    def _statistics(self) -> dict[str, int | float]:
        times = {"first_output_s": self._first_output_s, "max_gap_s": self._max_gap_s}
        return {
            "events": self._events,
            "bytes": self._bytes,
            "from_seq": self._from,
            "last_seq": self._seq,
            **{name: round(value, 6) for name, value in times.items() if value is not None},
        }

    def broke(self, where: str) -> None:
        """Note a mistake of telemetry's."""
        self._exchange.broke(where)


def _time_of(line: Line) -> float:
    """When a line was written, as it says itself: `{"v":1,"seq":7,"ts":"…`."""
    start = line.body.index(b'"ts":"', 0, 64) + 6
    return datetime.fromisoformat(line.body[start : start + 24].decode()).timestamp()
