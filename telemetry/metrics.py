"""Prometheus instruments for a given registry, rendered off the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

__all__ = ["Metrics"]


class Metrics:
    """The process's own numbers, and those of its runs."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sereno-metrics")
        self.runs_started = Counter(
            "sereno_runs_started_total",
            "Runs that were committed, by what asked for them.",
            ["graph", "trigger"],
            registry=self.registry,
        )
        self.runs_finished = Counter(
            "sereno_runs_finished_total",
            "Runs that ended, by outcome.",
            ["graph", "outcome"],
            registry=self.registry,
        )
        self.runs_active = Gauge(
            "sereno_runs_active",
            "Runs that execute now.",
            ["graph"],
            registry=self.registry,
        )

    def graph(self, name: str) -> None:
        """Begin a graph's series at 0, so that a first increase is seen as one."""
        for trigger in ("api", "resume"):
            self.runs_started.labels(name, trigger)
        for outcome in ("success", "error", "timeout", "interrupted", "cancelled"):
            self.runs_finished.labels(name, outcome)
        self.runs_active.labels(name)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition that a scraper accepts, and its content type."""
        encoder, media_type = choose_encoder(accept)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, encoder, self.registry), media_type

    def close(self) -> None:
        """End the rendering thread."""
        self._threads.shutdown(wait=False)
