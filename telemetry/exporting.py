"""Sends ended spans to a collector: a bounded queue, a thread that empties it, and exact counts.

The SDK's own batch processor does not do here: it counts what it drops without a lock, takes up to
30 s to shut down, and does not tell what was left. As there, the oldest span is dropped when the
queue is full: a parent ends after its children, and what is newest is worth most after an outage.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_TIMEOUT,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_TIMEOUT,
)
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from telemetry.environment import number
from telemetry.selfwatch import Selfwatch

__all__ = ["Exporting", "otlp_exporter"]

OTEL_TRACES_EXPORTER = "OTEL_TRACES_EXPORTER"  # of the SDK's configurator, which we do not use
#: Spans that wait; a burst of many runs fits.
CAPACITY = 16_384
#: Spans of one request; that many are sent at once, fewer after a while.
BATCH = 512
DELAY_MS = 5_000
#: For one batch, its retries included. The SDK's 10 s would hold up a shutdown.
TIMEOUT_S = 3.0


class Exporting(SpanProcessor):
    """Hands spans to an exporter, in its own thread."""

    def __init__(
        self,
        exporter: SpanExporter,
        selfwatch: Selfwatch,
        *,
        capacity: int | None = None,
        batch: int | None = None,
        delay_s: float | None = None,
    ) -> None:
        """What is not given is as the OTEL_BSP_* variables say."""
        self.capacity = capacity or number(OTEL_BSP_MAX_QUEUE_SIZE, CAPACITY)
        wanted = batch or number(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, BATCH)
        self._batch = min(wanted, self.capacity)
        self._delay_s = delay_s or number(OTEL_BSP_SCHEDULE_DELAY, DELAY_MS) / 1000
        self._exporter = exporter
        self._selfwatch = selfwatch
        self._queue: deque[ReadableSpan] = deque()
        self._changed = threading.Condition()
        #: Spans that the exporter has now.
        self._in_hand = 0
        self._flushing = False
        self._closing = False
        self._gave_up = False
        self._thread = threading.Thread(target=self._work, name="sereno-spans", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Spans that wait."""
        return len(self._queue)

    def on_end(self, span: ReadableSpan) -> None:
        with self._changed:
            late = self._closing
            full = not late and len(self._queue) >= self.capacity
            if full:
                self._queue.popleft()
            if not late:
                self._queue.append(span)
                if len(self._queue) >= self._batch:
                    self._changed.notify_all()
        if late:
            self._selfwatch.lost("traces", "failed", reason="shutdown")
        elif full:
            self._selfwatch.lost("traces", "dropped_queue_full", reason="queue_full")

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits now; False when that takes longer."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(
                lambda: not self._queue and not self._in_hand, timeout_millis / 1000
            )
            self._flushing = False
        return done

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Send what is left, and count as failed what is not gone after `timeout_s`."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._exporter.shutdown()  # ends a retry
        with self._changed:
            self._gave_up = True
            left = len(self._queue) + self._in_hand
            self._queue.clear()
        if left:
            self._selfwatch.lost("traces", "failed", left, reason="shutdown")

    def _work(self) -> None:
        with suppress_instrumentation():
            while (batch := self._next()) and self._send(batch):
                pass

    def _next(self) -> list[ReadableSpan]:
        """A batch as soon as it is full, or what there is after a while; nothing at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(self._due, self._delay_s)
                if self._queue and not self._gave_up:
                    count = self._in_hand = min(len(self._queue), self._batch)
                    return [self._queue.popleft() for _ in range(count)]
                if self._closing:
                    return []

    def _due(self) -> bool:
        if self._closing or len(self._queue) >= self._batch:
            return True
        return self._flushing and bool(self._queue)

    def _send(self, batch: list[ReadableSpan]) -> bool:
        """Whether to go on: a collector that is not there holds up a shutdown once only."""
        try:
            sent = self._exporter.export(batch) is SpanExportResult.SUCCESS
            reason = getattr(self._exporter, "reason", "")
        except Exception as exc:
            sent, reason = False, type(exc).__name__
        with self._changed:
            if self._gave_up:
                return False  # counted already
            go_on = sent or not self._closing
            self._in_hand = 0
            self._changed.notify_all()
        if sent:
            self._selfwatch.exported("traces", len(batch))
        else:
            self._selfwatch.lost("traces", "failed", len(batch), reason=reason or "export failed")
        return go_on


def otlp_exporter() -> SpanExporter | None:
    """An exporter over HTTP as the OTEL_* variables say; None when they name no endpoint."""
    wanted = os.environ.get(OTEL_TRACES_EXPORTER, "").strip().lower() or "otlp"
    endpoints = (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT)
    if "otlp" not in [name.strip() for name in wanted.split(",")]:
        return None
    return _Otlp() if any(os.environ.get(name) for name in endpoints) else None


class _Otlp(OTLPSpanExporter):
    """The SDK's exporter, which also says why it failed."""

    def __init__(self) -> None:
        self._session = _Session()
        timeouts = (OTEL_EXPORTER_OTLP_TRACES_TIMEOUT, OTEL_EXPORTER_OTLP_TIMEOUT)
        given = any(os.environ.get(name) for name in timeouts)
        super().__init__(session=self._session, timeout=None if given else TIMEOUT_S)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._session.outcome = ""  # what fails before a request has none
        return super().export(spans)

    @property
    def reason(self) -> str:
        """What came of the last request: an HTTP status or the class of an error."""
        return self._session.outcome


class _Session(requests.Session):
    outcome = ""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        self.outcome = ""
        try:
            response = super().request(*args, **kwargs)
        except Exception as exc:
            self.outcome = type(exc).__name__
            raise
        self.outcome = f"HTTP {response.status_code}"
        return response
