"""What telemetry itself loses: as metrics, and as one pair of records for each outage."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import structlog

from telemetry.contract import Part
from telemetry.metrics import Metrics

__all__ = ["Loss", "Queue", "Selfwatch", "Signal"]

Signal = Literal["traces", "logs"]
_SIGNALS: tuple[Signal, ...] = get_args(Signal)
#: Ways to lose what was to be exported, as `telemetry_spans_total` calls them.
Loss = Literal["failed", "dropped_queue_full", "dropped_budget"]

#: Between two records of trouble: those of one that goes on, and those of one that comes and goes.
PAUSE_S = 300.0

_log = structlog.get_logger("telemetry")


class Queue(Protocol):
    """What waits to be exported."""

    capacity: int

    def __len__(self) -> int: ...


@dataclass(slots=True)
class _Health:
    """How the export of one signal goes."""

    #: Unix seconds of the last success; NaN before the first.
    succeeded: float = math.nan
    #: When it began to fail; None while it does not.
    since: float | None = None
    #: Lost since the last record about it.
    failed: int = 0
    dropped: int = 0
    #: When trouble was last told of, and whether that was about the outage of now.
    told: float = -math.inf
    telling: bool = False


class Selfwatch:
    """Counts what is exported and what is lost. Never raises; any thread may call it."""

    def __init__(
        self,
        metrics: Metrics | None = None,
        *,
        clock: Callable[[], float] = time.time,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._health: dict[Signal, _Health] = {}
        self._internal = -math.inf
        for signal in _SIGNALS:
            self._health[signal] = _Health()
            if metrics is not None:
                metrics["telemetry_last_export_success_timestamp_seconds"].watch(
                    partial(self.last_success, signal), signal
                )

    def last_success(self, signal: Signal) -> float:
        """Unix seconds of the last export that succeeded; NaN before the first."""
        return self._health[signal].succeeded

    def watch(self, live: Callable[[], int], queue: Queue | None) -> None:
        """Read the gauges of spans from these from now on."""
        if self._metrics is None:
            return
        self._metrics["telemetry_live_spans"].watch(live)
        self._metrics["telemetry_span_queue"].watch(lambda: 0 if queue is None else len(queue))
        self._metrics["telemetry_span_queue_capacity"].set(0 if queue is None else queue.capacity)

    def exported(self, signal: Signal, count: int) -> None:
        """So many left the process."""
        self._count(signal, "exported", count)
        now = self._clock()
        health = self._health[signal]
        with self._lock:
            health.succeeded = now
            since, telling = health.since, health.telling
            failed, dropped = health.failed, health.dropped
            health.since, health.telling = None, False
            if telling:
                health.failed = health.dropped = 0
        if telling and since is not None:
            _log.info(
                "Telemetry is exported again",
                event_type="telemetry.recovered",
                signal=signal,
                outage_s=round(now - since, 3),
                failed=failed,
                dropped=dropped,
            )

    def lost(self, signal: Signal, loss: Loss, count: int = 1, *, reason: str = "") -> None:
        """So many were thrown away."""
        self._count(signal, loss, count)
        if loss == "dropped_budget":  # meant
            return
        now = self._clock()
        health = self._health[signal]
        with self._lock:
            if health.since is None:
                health.since = now
            if loss == "failed":
                health.failed += count
            else:
                health.dropped += count
            if now - health.told < self._pause_s:
                return
            health.told, health.telling = now, True
            since, failed, dropped = health.since, health.failed, health.dropped
            health.failed = health.dropped = 0
        _log.warning(
            "Telemetry is lost",
            event_type="telemetry.degraded",
            signal=signal,
            reason=reason,
            outage_s=round(now - since, 3),
            failed=failed,
            dropped=dropped,
        )

    def internal_error(self, part: Part, where: str) -> None:
        """A mistake of ours, or of a processor that somebody added. Call it in the `except`."""
        if self._metrics is not None:
            self._metrics["telemetry_internal_errors_total"].inc(part)
        now = self._clock()
        with self._lock:
            if now - self._internal < self._pause_s:
                return
            self._internal = now
        _log.error("Telemetry failed inside", part=part, where=where, exc_info=True)

    def _count(self, signal: Signal, result: str, count: int) -> None:
        if self._metrics is not None and signal == "traces":
            self._metrics["telemetry_spans_total"].inc(result, by=count)
