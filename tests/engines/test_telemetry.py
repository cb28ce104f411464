"""What every engine of the table tells of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import engine_kit as kit
import pytest
from engine_kit import LEASE_S, Bench, claim, claimed, line, lines, submitted
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import use_span

from runtime.engines import probes as engine_probes
from runtime.engines.base import Engine
from runtime.engines.serde import StrictSerializer
from runtime.errors import LeaseLost
from telemetry.metrics import Metrics
from telemetry.probes import Probes
from telemetry.storage import StorageTelemetry
from telemetry.tracing import Tracing


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = Metrics()
    yield metrics
    metrics.close()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = Tracing(processors=[SimpleSpanProcessor(exporter)])
    yield tracing
    tracing.close()


@pytest.fixture
async def engine(bench: Bench, metrics: Metrics, tracing: Tracing) -> Engine:
    return await watched(bench, metrics, tracing, slow_s=60)


async def watched(bench: Bench, metrics: Metrics, tracing: Tracing, *, slow_s: float) -> Engine:
    telemetry = StorageTelemetry(metrics, tracing, slow_s=slow_s)
    return await bench.open(telemetry=telemetry, serde=StrictSerializer())


def scheme(engine: Engine) -> str:
    return type(engine).__name__.removesuffix("Engine").lower()


def checkpoints(metrics: Metrics, engine: Engine) -> Mapping[str, float]:
    family = metrics["checkpoint_duration_seconds"]
    return {op: family.value(op, scheme(engine)) for op in ("put", "get", "list")}


async def test_each_commit_of_lines_is_timed(engine: Engine, metrics: Metrics) -> None:
    lease = await claimed(engine)
    before = metrics["log_commit_seconds"].value("success")
    for seq in range(3, 6):
        await engine.append(lease, [line(seq)])

    assert metrics["log_commit_seconds"].value("success") == before + 3
    assert metrics["log_commit_seconds"].value("error") == 0


async def test_refused_lines_are_counted_and_their_commit_is_no_error(
    engine: Engine, metrics: Metrics
) -> None:
    lease = await claimed(engine)
    await engine.append(lease, [line(3, "run.completed")])
    with pytest.raises(LeaseLost):
        await engine.append(lease, lines(4, 3))

    assert metrics["fenced_writes_total"].value("event") == 3
    assert metrics["fenced_writes_total"].value("checkpoint") == 0
    assert metrics["log_commit_seconds"].value("error") == 0


async def test_a_lost_race_is_no_fenced_write(engine: Engine, metrics: Metrics) -> None:
    seen = await submitted(engine)
    await claim(engine, seen)
    with pytest.raises(LeaseLost):
        await claim(engine, seen)
    with pytest.raises(LeaseLost):
        await engine.append_unclaimed(seen, [line(2, "run.cancelled", epoch=0)])

    assert metrics["fenced_writes_total"].value("event") == 0


async def test_a_lease_that_another_epoch_took_is_counted_and_one_given_back_is_not(
    engine: Engine, metrics: Metrics, bench: Bench
) -> None:
    kept, given, taken = [await claimed(engine, f"r{n}", f"t{n}") for n in range(3)]
    await engine.append(given, [line(3, "run.completed")])
    bench.clock.pass_by(LEASE_S)
    await asyncio.to_thread(engine.renew, [kept], LEASE_S)
    await claim(engine, "r2", owner="w2", crashed=True)
    learnt = await asyncio.to_thread(engine.renew, [kept, given, taken], LEASE_S)

    assert [learnt[f"r{n}"].held for n in range(3)] == [True, False, False]
    assert metrics["lease_renew_failures_total"].value() == 1


async def test_what_a_graph_does_with_checkpoints_is_counted_in_time_and_bytes(
    engine: Engine, metrics: Metrics, exporter: InMemorySpanExporter
) -> None:
    lease = await claimed(engine)
    saver = engine.checkpointer(lease)
    await kit.graph_of().ainvoke({"seen": []}, kit.config_of(saver, lease))
    thread = {"configurable": {"thread_id": "t1"}}
    history = [item async for item in saver.alist(thread)]
    latest = await saver.aget_tuple(thread)

    assert latest is not None
    counted = checkpoints(metrics, engine)
    assert counted["put"] >= len(history)
    assert counted["get"] >= 1
    assert counted["list"] == 1
    family = metrics["checkpoint_bytes"]
    assert family.value("put", scheme(engine)) == counted["put"]
    assert family.value("list", scheme(engine)) == 1
    assert exporter.get_finished_spans() == ()


async def test_the_bytes_are_those_of_the_state(engine: Engine, metrics: Metrics) -> None:
    saver = engine.checkpointer(await claimed(engine))
    checkpoint, metadata = kit.checkpoint("c1")
    checkpoint["channel_values"] = {"n": "x" * 100_000}
    place = {"configurable": {"thread_id": "t1", "checkpoint_ns": ""}}
    await saver.aput(place, checkpoint, metadata, {"n": 1})
    await saver.aget_tuple({"configurable": {"thread_id": "t1"}})
    body = metrics.render_now("")[0].decode()

    for op in ("put", "get"):
        labels = f'{{backend="{scheme(engine)}",op="{op}"}}'
        sums = [row for row in body.splitlines() if f"checkpoint_bytes_sum{labels}" in row]
        assert 100_000 < float(sums[0].split()[-1]) < 101_000


async def test_a_fenced_checkpoint_is_counted_and_has_no_span(
    engine: Engine, metrics: Metrics, exporter: InMemorySpanExporter
) -> None:
    lease = await claimed(engine)
    saver = engine.checkpointer(lease)
    await engine.append(lease, [line(3, "run.cancelled")])
    with pytest.raises(LeaseLost):
        await kit.put(saver, "c1")

    assert metrics["fenced_writes_total"].value("checkpoint") == 1
    assert exporter.get_finished_spans() == ()


async def test_slow_ones_have_spans_below_whoever_called(
    bench: Bench, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    engine = await watched(bench, metrics, tracing, slow_s=0.0)
    lease = await claimed(engine)
    saver = engine.checkpointer(lease)
    node = tracing.start("node n")
    with use_span(node, end_on_exit=True):
        place = await kit.put(saver, "c1")
        await saver.aput_writes(place, [("n", 1)], "task")
        await saver.aget_tuple(place)
        async for _ in saver.alist(place):
            pass

    spans = [span for span in exporter.get_finished_spans() if span.name != "node n"]
    assert [span.name for span in spans] == [
        "checkpoint put",
        "checkpoint put",
        "checkpoint get",
        "checkpoint list",
    ]
    assert [span.parent for span in spans] == [node.get_span_context()] * 4
    for span in spans:
        assert span.attributes is not None
        assert span.attributes["sereno.run.id"] == "r1"
        assert span.attributes["sereno.thread.id"] == "t1"
        assert span.attributes["sereno.run.epoch"] == 1
        size = span.attributes["sereno.checkpoint.bytes"]
        assert isinstance(size, int)
        assert size > 0


async def test_probes_tell_backlog_and_who_waits(
    engine: Engine, metrics: Metrics, bench: Bench
) -> None:
    lease = await claimed(engine, "r1", "t1", owner="w1")
    await engine.append(lease, [line(3, "run.interrupted")])
    await submitted(engine, "r2", "t2")
    bench.clock.pass_by(7)
    probes = Probes(metrics)
    engine_probes.register(probes, engine, graphs=["g", "other"], queue_max=100)
    await probes.refresh()

    assert metrics["probe_up"].value("queue") == metrics["probe_up"].value("storage") == 1
    assert metrics["queue_depth"].value() == 1
    assert metrics["queue_capacity"].value() == 100
    assert metrics["queue_oldest_seconds"].value() == 7
    assert metrics["runs_waiting_interrupt"].value("g") == 1
    assert metrics["interrupt_oldest_seconds"].value("g") == 7
    assert metrics["runs_waiting_interrupt"].value("other") == 0
    assert metrics["interrupt_oldest_seconds"].value("other") == 0
    assert (metrics["storage_bytes"].value("db") > 0) == (scheme(engine) == "sqlite")
