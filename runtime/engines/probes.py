"""What of an engine is asked for now and then: its backlog, and the size of its store."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from runtime.engines.base import Engine
from telemetry.probes import Gauge, Probes

__all__ = ["register"]


def register(probes: Probes, engine: Engine, *, graphs: Collection[str], queue_max: int) -> None:
    """Have the gauges of an engine kept fresh; those of served graphs are there from the start."""

    async def queue() -> Mapping[Gauge, float]:
        seen = await engine.statistics()
        values: dict[Gauge, float] = {
            ("queue_depth",): seen.pending,
            ("queue_capacity",): queue_max,
            ("queue_oldest_seconds",): seen.oldest_pending_s or 0.0,
        }
        for graph in {*graphs, *seen.waiting}:
            waiting = seen.waiting.get(graph)
            values["runs_waiting_interrupt", graph] = waiting.runs if waiting else 0
            values["interrupt_oldest_seconds", graph] = waiting.oldest_s if waiting else 0.0
        return values

    async def storage() -> Mapping[Gauge, float]:
        return {("storage_bytes", part): size for part, size in (await engine.sizes()).items()}

    probes.register("queue", queue)
    probes.register("storage", storage)
