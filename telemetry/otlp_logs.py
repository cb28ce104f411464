"""Sends the log lines to an OTLP collector as well, for whoever asks for it.

The collector's address and the rest are OpenTelemetry's own settings (`OTEL_EXPORTER_OTLP_*`, with
`OTEL_EXPORTER_OTLP_LOGS_*` for logs alone, and `OTEL_BLRP_*`). A record holds what the line holds:

    msg, level, time, event   body, severity, timestamp, event name
    trace_id, span_id         those of the record
    name                      instrumentation scope
    exception                 exception.type, exception.message, exception.stacktrace
    all else                  attributes, called as in the line

What is logged while lines are sent, and what OpenTelemetry says of itself, stays on stdout: it
would make the next batch, and so on for ever.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from opentelemetry import trace
from opentelemetry._logs import LogRecord, NoOpLogger, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider, LogRecordLimits, ReadableLogRecord
from opentelemetry.sdk._logs.export import (
    BatchLogRecordProcessor,
    LogRecordExporter,
    LogRecordExportResult,
)
from opentelemetry.sdk.environment_variables import (
    OTEL_BLRP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BLRP_MAX_QUEUE_SIZE,
    OTEL_BLRP_SCHEDULE_DELAY,
    OTEL_EXPORTER_OTLP_LOGS_TIMEOUT,
    OTEL_EXPORTER_OTLP_TIMEOUT,
)
from opentelemetry.sdk.resources import Resource

from telemetry.environment import number
from telemetry.selfwatch import Selfwatch

__all__ = ["OtlpLogs"]

_TIMEOUT = 3.0  # the SDK's own is 10 s, longer than a shutdown may take
_QUEUE_MAX = 2048
_BATCH = 512
_DELAY_MS = 1_000
_LONGEST = 16_000
_LARGEST = 2**63 - 1
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)

_SEVERITIES = {
    "DEBUG": SeverityNumber.DEBUG,
    "INFO": SeverityNumber.INFO,
    "WARNING": SeverityNumber.WARN,
    "ERROR": SeverityNumber.ERROR,
    "CRITICAL": SeverityNumber.FATAL,
}
_EXCEPTION = {
    "type": "exception.type",
    "message": "exception.message",
    "stack": "exception.stacktrace",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class OtlpLogs:
    """A sink for `Logs.attach()`, with a provider of its own that is never the global one."""

    name = "otlp"

    def __init__(
        self,
        resource: Resource,
        *,
        exporter: LogRecordExporter | None = None,
        selfwatch: Selfwatch | None = None,
        queue_max: int | None = None,
    ) -> None:
        self._queue_max = queue_max or number(OTEL_BLRP_MAX_QUEUE_SIZE, _QUEUE_MAX)
        self._selfwatch = selfwatch or Selfwatch()
        self._exporter = _Counting(exporter or _otlp(), self._exported)
        self._provider = LoggerProvider(
            resource,
            shutdown_on_exit=False,  # close() is bounded, the SDK's handler is not
            log_record_limits=LogRecordLimits(max_log_record_attributes=LogRecordLimits.UNSET),
        )
        self._provider.add_log_record_processor(
            BatchLogRecordProcessor(
                self._exporter,
                schedule_delay_millis=number(OTEL_BLRP_SCHEDULE_DELAY, _DELAY_MS),
                max_export_batch_size=min(
                    number(OTEL_BLRP_MAX_EXPORT_BATCH_SIZE, _BATCH), self._queue_max
                ),
                export_timeout_millis=0,  # which it reads, and never uses
                max_queue_size=self._queue_max,
            )
        )
        logging.getLogger(OTLPLogExporter.__module__).addFilter(_not_given_up)
        self._off = isinstance(self._provider.get_logger(__name__), NoOpLogger)
        self._lost: Callable[[int], None] = lambda records: None
        self._closed = False
        self._taken = 0

    @property
    def exported(self) -> int:
        """Records that the collector took."""
        return self._exporter.delivered

    def attached(self, lost: Callable[[int], None]) -> None:
        self._lost = lost

    def takes(self, logger: str) -> bool:
        return not (self._off or _work.depth or logger.startswith("opentelemetry"))

    def write(self, lines: bytes) -> int | None:
        """Take as many lines as there is room for; the writer keeps the rest, and counts it."""
        if self._closed:
            raise ValueError("the sink is closed")
        size = 0
        with _work:
            for line in lines.splitlines(keepends=True):
                # Were it full, the SDK would drop what it has, and say so with each record.
                if self._taken - self._exporter.done >= self._queue_max:
                    break
                self._emit(line)
                size += len(line)
        return size or None

    def flush(self) -> None:
        """Nothing to do: batches leave by themselves."""

    def finish(self) -> None:
        """Send what was taken. The SDK waits for as long as its exporter tries."""
        with _work:
            self._provider.shutdown()

    def close(self) -> None:
        """Give up what is not delivered."""
        if self._closed:
            return
        self._closed = True
        self._exporter.shutdown()
        if left := self._taken - self._exporter.done:
            self._fail(left, "shutdown")

    def _exported(self, records: int, reason: str) -> None:
        if reason:
            self._fail(records, reason)
        else:
            self._selfwatch.exported("logs", records)

    def _fail(self, records: int, reason: str) -> None:
        self._lost(records)
        self._selfwatch.lost("logs", "failed", records, reason=reason)

    def _emit(self, line: bytes) -> None:
        try:
            fields = orjson.loads(line)
            logger = self._provider.get_logger(fields.pop("name"))
            record = _record(fields)
        except Exception:  # no line of ours
            self._lost(1)
            return
        self._taken += 1
        logger.emit(record)


class _Work(threading.local):
    """What the current thread does here, so that its own log lines can be told from others."""

    depth = 0
    exporter: _Counting | None = None

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *exc: object) -> None:
        self.depth -= 1


_work = _Work()


def _not_given_up(record: logging.LogRecord) -> bool:
    """Whether an exporter may complain: one that was given up would, where logs are closed."""
    return _work.exporter is None or not _work.exporter.over


class _Counting(LogRecordExporter):
    """Counts what an exporter delivers until it is shut down, which may be while it exports."""

    def __init__(self, exporter: LogRecordExporter, exported: Callable[[int, str], None]) -> None:
        self._exporter = exporter
        self._exported = exported
        self._shutdown = threading.Lock()
        self.delivered = 0
        self.done = 0

    @property
    def over(self) -> bool:
        return self._shutdown.locked()

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        result, reason = LogRecordExportResult.FAILURE, "export failed"
        if self.over:
            return result
        with _work:
            _work.exporter = self
            try:
                result = self._exporter.export(batch)
            except Exception as exc:  # the SDK would log its stack, for each batch
                reason = type(exc).__name__
            finally:
                _work.exporter = None
            if self.over:  # this batch was given up
                return result
            if result is LogRecordExportResult.SUCCESS:
                self.delivered += len(batch)
                reason = ""
            self.done += len(batch)
            self._exported(len(batch), reason)
        return result

    def shutdown(self) -> None:
        if self._shutdown.acquire(blocking=False):
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _otlp() -> LogRecordExporter:
    timeouts = (OTEL_EXPORTER_OTLP_LOGS_TIMEOUT, OTEL_EXPORTER_OTLP_TIMEOUT)
    given = any(os.environ.get(name) for name in timeouts)
    return OTLPLogExporter(timeout=None if given else _TIMEOUT)


def _record(fields: dict[str, Any]) -> LogRecord:
    """The record of a line's fields, which are used up."""
    del fields["ts"]
    level, event = fields.pop("level"), fields.pop("event", None)
    exception = fields.get("exception")
    if type(exception) is dict and "stack" in exception:
        del fields["exception"]
        fields |= {_EXCEPTION[key]: value for key, value in exception.items()}
    time = datetime.fromisoformat(fields.pop("time"))
    return LogRecord(
        timestamp=(time - _EPOCH) // timedelta(microseconds=1) * 1000,
        context=_context(fields),
        severity_text=level,
        severity_number=_SEVERITIES[level],
        body=_fit(fields.pop("msg")),
        event_name=None if event is None else str(event),
        attributes=_fit(fields),
    )


def _context(fields: dict[str, Any]) -> Context:
    """Where the line was logged; ids that are none of OpenTelemetry's stay attributes."""
    context = trace.INVALID_SPAN_CONTEXT
    try:
        ids = int(fields["trace_id"], 16), int(fields["span_id"], 16)
        context = trace.SpanContext(*ids, is_remote=False, trace_flags=_SAMPLED)
    except (KeyError, TypeError, ValueError):
        pass
    if context.is_valid:
        del fields["trace_id"], fields["span_id"]
    return trace.set_span_in_context(trace.NonRecordingSpan(context), Context())


def _fit(value: Any) -> Any:
    """A value as OTLP can hold it: text of a bounded length, integers of 64 bits with a sign."""
    if type(value) is str:
        return value[:_LONGEST]
    if type(value) is int and value > _LARGEST:
        return str(value)
    if type(value) is list:
        return [_fit(item) for item in value]
    if type(value) is dict:
        return {key: _fit(item) for key, item in value.items()}
    return value
