"""Nothing is lost on the way to a collector without being counted, and nothing waits for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from structlog.testing import capture_logs

from telemetry.exporting import Exporting
from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch

#: For what is over at once or never.
PATIENCE = 30.0


class Collector(SpanExporter):
    """Takes spans while it is open; what it answers can be chosen."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Event()
        self.answer: SpanExportResult | Exception = SpanExportResult.SUCCESS
        self.names: list[str] = []
        self.batches: list[int] = []
        self.ended = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        assert self.open.wait(PATIENCE)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is SpanExportResult.SUCCESS:
            self.batches.append(len(spans))
            self.names += [one.name for one in spans]
        return self.answer

    def shutdown(self) -> None:
        self.ended = True

    def close(self) -> None:
        """From now on it never answers."""
        self.open.clear()
        self.asked.clear()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.open.set()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def exporting(collector: Collector, metrics: Metrics, **more: float) -> Exporting:
    made = Exporting(collector, Selfwatch(metrics), **{"delay_s": 3600, **more})  # type: ignore[arg-type]
    Selfwatch(metrics).watch(lambda: 0, made)
    return made


def counts(metrics: Metrics) -> dict[str, float]:
    family = metrics["telemetry_spans_total"]
    results = ("exported", "failed", "dropped_queue_full")
    return {result: family.value(result) for result in results}


def spans(count: int, first: int = 0) -> Iterator[ReadableSpan]:
    return (span(f"s{number}") for number in range(first, first + count))


def span(name: str) -> ReadableSpan:
    return ReadableSpan(name, resource=Resource.get_empty())


def test_a_full_batch_leaves_at_once_and_the_rest_at_the_end(
    collector: Collector, metrics: Metrics
) -> None:
    exporter = exporting(collector, metrics, batch=10)
    collector.asked.clear()
    for one in spans(25):
        exporter.on_end(one)
    assert collector.asked.wait(PATIENCE)
    exporter.shutdown()

    assert collector.batches == [10, 10, 5]
    assert collector.names == [f"s{number}" for number in range(25)]
    assert counts(metrics) == {"exported": 25, "failed": 0, "dropped_queue_full": 0}
    assert collector.ended


def test_what_does_not_fill_a_batch_leaves_after_a_while(
    collector: Collector, metrics: Metrics
) -> None:
    collector.asked.clear()
    exporter = exporting(collector, metrics, batch=10, delay_s=0.01)
    exporter.on_end(span("s"))

    assert collector.asked.wait(PATIENCE)
    exporter.shutdown()
    assert collector.names == ["s"]


def test_a_flush_sends_what_waits(collector: Collector, metrics: Metrics) -> None:
    exporter = exporting(collector, metrics, batch=10)
    for one in spans(3):
        exporter.on_end(one)

    assert exporter.force_flush()
    assert collector.names == ["s0", "s1", "s2"]
    collector.close()
    exporter.on_end(span("s3"))
    assert not exporter.force_flush(timeout_millis=10)


def test_a_burst_into_a_full_queue_loses_the_oldest_and_counts_them_exactly(
    collector: Collector, metrics: Metrics
) -> None:
    exporter = exporting(collector, metrics, capacity=2048)
    collector.close()
    for one in spans(512):
        exporter.on_end(one)
    assert collector.asked.wait(PATIENCE)  # the first batch is in its hand
    for one in spans(5000, 512):
        exporter.on_end(one)

    assert counts(metrics)["dropped_queue_full"] == 5000 - 2048
    assert metrics["telemetry_span_queue"].value() == 2048
    assert metrics["telemetry_span_queue_capacity"].value() == 2048
    collector.open.set()
    exporter.shutdown()
    newest = range(5512 - 2048, 5512)
    assert collector.names == [f"s{number}" for number in (*range(512), *newest)]
    assert counts(metrics) == {"exported": 2560, "failed": 0, "dropped_queue_full": 2952}


def test_spans_of_many_threads_are_counted_exactly(collector: Collector, metrics: Metrics) -> None:
    exporter = exporting(collector, metrics, capacity=64, batch=16)

    def end_many(_: int) -> None:
        for one in spans(500):
            exporter.on_end(one)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(end_many, range(8)))
    exporter.shutdown()

    counted = counts(metrics)
    assert counted["exported"] == len(collector.names)
    assert sum(counted.values()) == 8 * 500


@pytest.mark.parametrize(
    "answer", [SpanExportResult.FAILURE, RuntimeError("no")], ids=["refused", "raised"]
)
def test_what_is_not_taken_is_counted(
    collector: Collector, metrics: Metrics, answer: SpanExportResult | Exception
) -> None:
    collector.answer = answer
    exporter = exporting(collector, metrics, batch=10)
    for one in spans(10):
        exporter.on_end(one)
    assert exporter.force_flush()
    collector.answer = SpanExportResult.SUCCESS
    for one in spans(10):
        exporter.on_end(one)
    exporter.shutdown()

    assert counts(metrics) == {"exported": 10, "failed": 10, "dropped_queue_full": 0}


def test_a_shutdown_waits_so_long_and_counts_what_is_left(
    collector: Collector, metrics: Metrics
) -> None:
    exporter = exporting(collector, metrics, batch=10)
    collector.close()
    for one in spans(25):
        exporter.on_end(one)
    assert collector.asked.wait(PATIENCE)
    began = time.monotonic()
    exporter.shutdown(0.1)
    exporter.shutdown(0.1)
    exporter.on_end(span("late"))

    assert time.monotonic() - began < 5
    assert counts(metrics) == {"exported": 0, "failed": 26, "dropped_queue_full": 0}
    collector.open.set()  # an answer after all is not counted again
    exporter._thread.join(PATIENCE)
    assert sum(counts(metrics).values()) == 26


def test_a_shutdown_asks_a_collector_that_refuses_once_only(
    collector: Collector, metrics: Metrics
) -> None:
    exporter = exporting(collector, metrics, batch=10)
    collector.close()
    for one in spans(100):
        exporter.on_end(one)
    assert collector.asked.wait(PATIENCE)
    collector.answer = SpanExportResult.FAILURE
    threading.Timer(0.05, collector.open.set).start()
    exporter.shutdown()

    assert counts(metrics) == {"exported": 0, "failed": 100, "dropped_queue_full": 0}


def test_the_queue_is_as_the_operator_says(
    monkeypatch: pytest.MonkeyPatch, collector: Collector, metrics: Metrics
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "512")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "many")
    with capture_logs() as logs:
        exporter = Exporting(collector, Selfwatch(metrics))

    assert exporter.capacity == 100
    assert [log["variable"] for log in logs] == ["OTEL_BSP_SCHEDULE_DELAY"]
    for one in spans(100):  # a batch is never larger than the queue
        exporter.on_end(one)
    assert collector.asked.wait(PATIENCE)
    exporter.shutdown()
    assert collector.batches == [100]
