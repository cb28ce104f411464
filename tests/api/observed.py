"""All that servers in this process tell: spans, metrics and log lines, gathered over several."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import orjson
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from signals import samples

from runtime.app import create_app
from runtime.engines.base import Engine
from runtime.engines.memory import MemoryEngine
from runtime.settings import Settings
from telemetry import logs
from telemetry.contract import Profile, check_metrics
from telemetry.setup import Telemetry, TelemetryConfig, log_ids

from .harness import Server, Stream

__all__ = ["Observed", "Observer"]


class Observer:
    """Watches the servers that it starts, one after the other."""

    def __init__(self, output: io.BytesIO | None = None) -> None:
        self.telemetries: list[Telemetry] = []
        #: By method.
        self.requests: Counter[str] = Counter()
        #: What the contract says of the metrics of each server before it closed, by profile.
        self.verdicts: list[dict[Profile, list[str]]] = []
        self._exporters: list[InMemorySpanExporter] = []
        self._output = output or io.BytesIO()

    @contextmanager
    def logging(self, *, level: str = "DEBUG", **options: Any) -> Iterator[None]:
        """Keep the log lines of the block; they are all there when it is left."""
        with logs.configure(
            level=level,
            stream=self._output,
            constants={"service": "sereno", "version": "0", "worker": "1"},
            identify=log_ids,
            **options,
        ):
            yield

    @asynccontextmanager
    async def serving(
        self, source: Path, *, store: Engine | None = None, **settings: Any
    ) -> AsyncIterator[Observed]:
        """A server; what it has opened is closed when the block is left."""
        told = {"engine": "memory://", "drain_s": 0.0, "cancel_grace_s": 1.0, **settings}
        app = create_app(Settings(**told), [source], engine=store)
        lifespan = app.router.lifespan_context(app)
        # What a server begins with is seen as well: runs that another one has left.
        with patch("runtime.app.Telemetry", partial(self._observed, store)):
            await lifespan.__aenter__()
        try:
            observed = Observed(app, self, self.telemetries[-1])
            yield observed
            registry = observed.telemetry.metrics.registry
            self.verdicts.append({p: check_metrics(registry, p) for p in get_args(Profile)})
        finally:
            await lifespan.__aexit__(None, None, None)

    def _observed(self, store: Engine | None, config: TelemetryConfig) -> Telemetry:
        telemetry, exporter = Telemetry(config), InMemorySpanExporter()
        telemetry.tracing.add(SimpleSpanProcessor(exporter))
        self.telemetries.append(telemetry)
        self._exporters.append(exporter)
        if isinstance(store, MemoryEngine):
            store.telemetry = telemetry.storage
        return telemetry

    # What they told.

    @cached_property
    def spans(self) -> Sequence[ReadableSpan]:
        """Those that have ended when they are first asked for."""
        return [s for exporter in self._exporters for s in exporter.get_finished_spans()]

    @property
    def written(self) -> bytes:
        """The log as it was written."""
        return self._output.getvalue()

    @cached_property
    def records(self) -> Sequence[Mapping[str, Any]]:
        return [orjson.loads(line) for line in self.written.splitlines()]

    def events(self, name: str) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record.get("event") == name]

    @property
    def registries(self) -> Sequence[CollectorRegistry]:
        return [telemetry.metrics.registry for telemetry in self.telemetries]

    def samples(self, name: str) -> Counter[tuple[str, ...]]:
        """A family's samples, added up over all servers."""
        return samples(self.registries, name)

    def live(self) -> int:
        return sum(telemetry.tracing.live() for telemetry in self.telemetries)


class Observed(Server):
    """A server whose requests are counted."""

    def __init__(self, app: Any, observer: Observer, telemetry: Telemetry) -> None:
        super().__init__(app)
        self.telemetry = telemetry
        self._observer = observer
        self._open: set[Stream] = set()

    async def open(self, method: str, path: str, **more: Any) -> Stream:
        self._observer.requests[f"{method} {path}"] += 1
        stream = await super().open(method, path, **more)
        self._open.add(stream)
        stream.task.add_done_callback(lambda _: self._open.discard(stream))
        return stream

    async def quiet(self) -> None:
        """Wait until all requests are answered."""
        while self._open:
            await asyncio.wait({stream.task for stream in self._open})
