"""Puts the parts of telemetry together, and takes them down in a bounded time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor, HTTPXClientInstrumentor
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import SpanContext

from telemetry import IGNORED, logs
from telemetry.admin import Admin
from telemetry.genai import GenAi
from telemetry.health import Liveness
from telemetry.heartbeats import Heartbeats
from telemetry.http import use_stable_names
from telemetry.langgraph import current_attempt
from telemetry.loopwatch import LoopWatch
from telemetry.metrics import Metrics
from telemetry.otlp_logs import OtlpLogs
from telemetry.recorder import Recorder
from telemetry.segments import Segments, current_segment
from telemetry.selfwatch import Selfwatch
from telemetry.storage import StorageTelemetry
from telemetry.tracing import Tracing

__all__ = ["CLOSE_S", "Telemetry", "TelemetryConfig", "identify", "log_ids"]

#: Seconds that the last export may take.
CLOSE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What telemetry can be told; exporters read the standard OTEL_* variables besides."""

    version: str = "0"
    #: Label combinations of one metric; further ones fold into `__overflow__`.
    max_series: int = 2_000
    #: The dialect of chat and tool spans.
    semconv: Literal["genai", "none"] = "genai"
    #: Models that metrics tell apart.
    models: tuple[str, ...] = ()
    #: Whether outbound requests of httpx are spans.
    instrument_httpx: bool = True
    #: Whether exceptions show their messages in spans and records.
    exception_messages: bool = True
    #: Finished spans that can be read without a backend.
    recorder_spans: int = 20_000
    #: Whether log records are exported by OTLP as well.
    otlp_logs: bool = False
    #: Seconds of a blocked event loop that are reported.
    loop_stall_s: float = 0.25
    #: Seconds between two records of a run that goes on.
    run_heartbeat_s: float = 15.0


class Telemetry:
    """The parts, made in the process that they are to see: after any fork.

    Left, it exports what it still has, for `CLOSE_S` at most. `loopwatch` is to be entered once
    the server is up: to load graphs blocks the loop.
    """

    def __init__(self, config: TelemetryConfig | None = None) -> None:
        self.config = config = config or TelemetryConfig()
        for variable in IGNORED:
            variable.tell()
        self.metrics = Metrics(max_series=config.max_series)
        self.recorder = Recorder(config.recorder_spans)
        self.selfwatch = Selfwatch(self.metrics)
        resource = {"service.version": config.version}
        self.tracing = Tracing(
            resource=resource,
            processors=[self.recorder],
            identify=identify,
            selfwatch=self.selfwatch,
            exception_messages=config.exception_messages,
        )
        self.segments = Segments(
            self.metrics,
            self.tracing,
            witness=GenAi(self.tracing, self.metrics, semconv=config.semconv, models=config.models),
            exception_messages=config.exception_messages,
        )
        self.storage = StorageTelemetry(self.metrics, self.tracing, identify=identify)
        self.loopwatch = LoopWatch(self.metrics, stall_s=config.loop_stall_s)
        self.liveness = Liveness(self.loopwatch.age)
        self.admin = Admin(self.metrics, alive=self.liveness.checks, live=self.segments.live)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self.metrics.close)
            stack.callback(self.storage.close)
            stack.push_async_callback(self._export)
            if self.config.instrument_httpx:
                use_stable_names()
                for client in (HTTPXClientInstrumentor(), HTTPX2ClientInstrumentor()):
                    client.instrument(
                        tracer_provider=self.tracing.provider, meter_provider=NoOpMeterProvider()
                    )
                    stack.callback(client.uninstrument)
            self.tracing.make_global()
            if (lines := logs.current()) is not None:
                lost = self.metrics["telemetry_log_dropped_total"]
                lines.watch(lambda sink, count: lost.inc(sink, by=count))
                if self.config.otlp_logs:
                    sink = OtlpLogs(self.tracing.resource, selfwatch=self.selfwatch)
                    lines.attach(sink)
            heartbeats = Heartbeats(
                self.segments.live, self.metrics, every_s=self.config.run_heartbeat_s
            )
            stack.enter_context(heartbeats)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _export(self) -> None:
        """In a thread of its own: those of the default executor are for nodes."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def close() -> None:
            self.tracing.close(CLOSE_S)
            loop.call_soon_threadsafe(done.set_result, None)

        threading.Thread(target=close, name="sereno-telemetry-close", daemon=True).start()
        await done

    def run_context(self, run_id: str) -> SpanContext | None:
        """The span of a run's latest segment; None when it is not known here any more."""
        if (segment := self.segments.open.get(run_id)) is not None:
            return segment.context
        recorded = self.recorder.run(run_id, ())
        segments = [
            span
            for span in (recorded.spans if recorded is not None else ())
            if "sereno.run.trigger" in (span.attributes or {})
        ]
        return segments[-1].context if segments else None


def identify() -> Mapping[str, Any]:
    """The attributes of the run and the node around the current code."""
    segment, attempt = current_segment.get(), current_attempt.get()
    if segment is None:
        return {}
    return segment.attributes if attempt is None else segment.node_attributes(attempt.visit)


def log_ids() -> Mapping[str, object]:
    """The same, as log records spell it."""
    segment, attempt = current_segment.get(), current_attempt.get()
    if segment is None:
        return {}
    ids: dict[str, object] = {
        "run_id": segment.run_id,
        "thread_id": segment.thread_id,
        "graph": segment.graph,
    }
    if attempt is not None:
        ids |= {"node": attempt.visit.label, "attempt": attempt.number}
    return ids
