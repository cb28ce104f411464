"""What a node costs under the seam, against bare LangGraph: one process, no server, no lines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import statistics
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Ratio, spread, table
from benchmarks.graphs import NODES, chain
from telemetry import langchain, langgraph
from telemetry.metrics import Metrics
from telemetry.recorder import Recorder
from telemetry.segments import Segments
from telemetry.setup import identify
from telemetry.tracing import Tracing

__all__ = ["measure"]

#: Runs of a sample: some tenths of a second.
RUNS = 40


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is around a run."""

    name: str
    #: Whether LangGraph is patched at all.
    seam: bool = True
    #: Who listens.
    segments: Segments | None = None
    #: CPU µs per node.
    samples: list[float] = field(default_factory=list)


def measure(rounds: int) -> None:
    """Print CPU per node, of samples that take turns."""
    kinds = [
        _Kind("bare LangGraph", seam=False),
        _Kind("the seam, nobody listens"),
        _Kind("a segment, metrics", segments=_segments(spans=False)),
        _Kind("a segment, metrics and spans", segments=_segments(spans=True)),
    ]
    asyncio.run(_measure(kinds, rounds))
    _check(kinds, (rounds + 1) * RUNS)
    bare, *others = kinds
    rows: list[list[object]] = [[bare.name, f"{statistics.median(bare.samples):.1f}", "", ""]]
    for kind in others:
        pairs = list(zip(kind.samples, bare.samples, strict=True))
        rows.append(
            [
                kind.name,
                f"{statistics.median(kind.samples):.1f}",
                spread([mine - base for mine, base in pairs], "{:+.1f}"),
                Ratio.of(pairs),
            ]
        )
    table(["in process", "CPU µs a node", "more than bare", "to bare"], rows)


async def _measure(kinds: list[_Kind], rounds: int) -> None:
    graph: Any = chain.compile()
    for kind in kinds:
        await _sample(kind, graph)  # to warm up
    for number in range(rounds):
        for kind in kinds if number % 2 else reversed(kinds):
            kind.samples.append(await _sample(kind, graph))


async def _sample(kind: _Kind, graph: Any) -> float:
    for part in (langgraph, langchain):
        part.install() if kind.seam else part.uninstall()
    gc.collect()
    begun = time.thread_time()  # async nodes: all in this thread
    for _ in range(RUNS):
        with _run(kind.segments):
            await graph.ainvoke({"n": 0})
    return (time.thread_time() - begun) / (RUNS * NODES) * 1e6


@contextlib.contextmanager
def _run(segments: Segments | None) -> Iterator[None]:
    if segments is None:
        yield
        return
    segment = segments.begin(
        run_id=uuid.uuid4().hex, thread_id="t", graph="chain", epoch=1, trigger="api"
    )
    segment.claimed(waited_s=0.0)
    with segment.entered():
        yield
    segment.end({"status": "success", "duration_ms": 1}, had_output=True)


def _segments(*, spans: bool) -> Segments:
    metrics = Metrics()
    metrics.graph("chain", [f"n{index}" for index in range(NODES)])
    recorder = Recorder(2_000)  # soon full, as that of a server that has served for a while
    return Segments(metrics, Tracing(processors=[recorder], identify=identify, enabled=spans))


def _check(kinds: list[_Kind], runs: int) -> None:
    """A seam that saw nothing would be a cheap one."""
    for kind in kinds:
        if kind.segments is not None:
            seen = kind.segments.attempts.value("chain", "n0", "first", "success")
            if seen != runs:
                raise RuntimeError(f"{kind.name}: {seen:.0f} of {runs} runs were seen")
