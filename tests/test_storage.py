"""What storage tells: commits, refusals, and checkpoints that were slow or failed."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, use_span
from structlog.testing import capture_logs

from telemetry.metrics import Metrics
from telemetry.storage import StorageObserver, StorageTelemetry, weigh
from telemetry.tracing import Tracing

RUN = {"sereno.run.id": "r1", "sereno.thread.id": "t1", "sereno.run.epoch": 2}


class Lost(Exception):
    code = "lease_lost"


@pytest.fixture
def metrics() -> Any:
    metrics = Metrics()
    yield metrics
    metrics.close()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Any:
    tracing = Tracing(processors=[SimpleSpanProcessor(exporter)])
    yield tracing
    tracing.close()


def told(exporter: InMemorySpanExporter) -> list[Any]:
    return [span for span in exporter.get_finished_spans() if span.name.startswith("checkpoint")]


def test_the_twin_does_nothing() -> None:
    observer = StorageObserver()
    observer.committed(1.0, failed=True)
    observer.fenced("event")
    observer.not_renewed(1)
    with observer.checkpoint("put", "sqlite", RUN) as operation:
        weigh(10)
        operation.posted = True
    operation.end()


class FakeTimer:
    """Goes off when a test calls it."""

    daemon = started = cancelled = False

    def __init__(self, wait: float, call: Any) -> None:
        self.wait, self.call = wait, call

    def start(self) -> None:
        self.started = True

    def cancel(self) -> None:
        self.cancelled = True


class Timers:
    def __init__(self) -> None:
        self.made: list[FakeTimer] = []

    def __call__(self, wait: float, call: Any) -> Any:
        self.made.append(FakeTimer(wait, call))
        return self.made[-1]


def test_commits_and_refusals_are_counted(metrics: Metrics) -> None:
    telemetry = StorageTelemetry(metrics)
    telemetry.committed(0.001, failed=False)
    telemetry.committed(0.001, failed=True)
    telemetry.committed(0.001, failed=True)
    telemetry.fenced("event", 3)
    telemetry.not_renewed(2)

    assert metrics["log_commit_seconds"].value("success") == 1
    assert metrics["log_commit_seconds"].value("error") == 2
    assert metrics["fenced_writes_total"].value("event") == 3
    assert metrics["lease_renew_failures_total"].value() == 2


class TestCheckpoints:
    def test_a_quick_one_is_counted_and_leaves_no_span(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
    ) -> None:
        telemetry = StorageTelemetry(metrics, tracing, slow_s=60)
        with capture_logs() as records, telemetry.checkpoint("get", "sqlite", RUN):
            weigh(100)
            weigh(200)
        weigh(1_000)  # belongs to nothing

        assert metrics["checkpoint_duration_seconds"].value("get", "sqlite") == 1
        assert metrics["checkpoint_bytes"].value("get", "sqlite") == 1
        body = metrics.render_now("")[0].decode()
        assert 'sereno_checkpoint_bytes_sum{backend="sqlite",op="get"} 300.0' in body
        assert told(exporter) == []
        assert records == []

    def test_a_slow_one_has_a_span_below_what_was_current_and_a_record(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
    ) -> None:
        telemetry = StorageTelemetry(
            metrics, tracing, slow_s=0.0, identify=lambda: {"sereno.graph.name": "g"}
        )
        node = tracing.start("node n")
        with (
            capture_logs() as records,
            use_span(node, end_on_exit=True),
            telemetry.checkpoint("put", "sqlite", RUN),
        ):
            weigh(300)

        (span,) = told(exporter)
        assert (span.name, span.kind) == ("checkpoint put", SpanKind.CLIENT)
        assert span.parent == node.get_span_context()
        assert span.context.trace_id == node.get_span_context().trace_id
        assert dict(span.attributes) == {
            **RUN,
            "sereno.graph.name": "g",
            "db.system.name": "sqlite",
            "sereno.checkpoint.bytes": 300,
        }
        assert span.status.status_code is StatusCode.UNSET
        assert 0 <= span.end_time - span.start_time < 5e9
        (record,) = records
        assert record.pop("duration_s") == record.pop("longest_s") >= 0
        assert record == {
            "event": "Checkpoint slow",
            "log_level": "warning",
            "event_type": "checkpoint.slow",
            "op": "put",
            "bytes": 300,
            "count": 1,
            "run_id": "r1",
            "thread_id": "t1",
        }

    def test_a_failed_one_has_a_span_with_its_error(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
    ) -> None:
        telemetry = StorageTelemetry(metrics, tracing, slow_s=60)
        with (
            capture_logs() as records,
            pytest.raises(OSError, match="full"),
            telemetry.checkpoint("list", "memory", {}),
        ):
            raise OSError(errno.ENOSPC, "full")

        (span,) = told(exporter)
        assert span.parent is None
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "OSError"
        assert span.attributes["sereno.error.class"] == "storage"
        assert span.attributes["db.system.name"] == "sereno.memory"
        assert metrics["checkpoint_duration_seconds"].value("list", "memory") == 1
        assert metrics["checkpoint_bytes"].value("list", "memory") == 0
        assert records == []

    def test_a_refused_one_is_counted_as_such_and_is_no_failure(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
    ) -> None:
        telemetry = StorageTelemetry(metrics, tracing)
        with pytest.raises(Lost), telemetry.checkpoint("put", "sqlite", RUN):
            raise Lost

        assert metrics["fenced_writes_total"].value("checkpoint") == 1
        assert told(exporter) == []

    async def test_a_posted_one_ends_when_that_is_told_and_only_once(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
    ) -> None:
        telemetry = StorageTelemetry(metrics, tracing, slow_s=0.0)
        node = tracing.start("node n")
        with use_span(node, end_on_exit=True), telemetry.checkpoint("put", "sqlite", RUN) as put:
            put.posted = True
        assert metrics["checkpoint_duration_seconds"].value("put", "sqlite") == 0

        await asyncio.to_thread(put.end)
        put.end()

        assert metrics["checkpoint_duration_seconds"].value("put", "sqlite") == 1
        (span,) = told(exporter)
        assert span.parent == node.get_span_context()

    @pytest.mark.parametrize("posted", [False, True])
    def test_who_gives_up_has_not_failed(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter, posted: bool
    ) -> None:
        telemetry = StorageTelemetry(metrics, tracing, slow_s=60)
        operation = telemetry.checkpoint("put", "sqlite", RUN)
        operation.posted = posted
        with pytest.raises(asyncio.CancelledError), operation:
            raise asyncio.CancelledError

        counted = metrics["checkpoint_duration_seconds"].value("put", "sqlite")
        assert counted == (0 if posted else 1)
        operation.end()
        assert metrics["checkpoint_duration_seconds"].value("put", "sqlite") == 1
        assert told(exporter) == []

    def test_a_fault_of_telemetry_is_counted_and_harms_nobody(self, metrics: Metrics) -> None:
        def identify() -> Any:
            raise RuntimeError("not today")

        tracing = Tracing()
        with StorageTelemetry(metrics, tracing, slow_s=0.0, identify=identify).checkpoint(
            "put", "sqlite", RUN
        ):
            pass

        assert metrics["telemetry_internal_errors_total"].value("storage") == 1
        tracing.close()

    def test_a_stall_that_makes_many_slow_is_told_once_and_counted(
        self, metrics: Metrics, tracing: Tracing, exporter: InMemorySpanExporter
    ) -> None:
        now = 1_000.0
        telemetry = StorageTelemetry(
            metrics,
            tracing,
            slow_s=0.0,
            pause_s=60,
            clock=lambda: now,
            timer=Timers(),
        )

        def put() -> None:
            with telemetry.checkpoint("put", "sqlite", RUN):
                pass

        with capture_logs() as records:
            for _ in range(50):
                put()
            now += 59
            put()
            assert [record["count"] for record in records] == [1]
            now += 1
            put()
            put()

        assert [record["count"] for record in records] == [1, 51]
        assert records[1]["longest_s"] >= records[1]["duration_s"]
        assert metrics["checkpoint_duration_seconds"].value("put", "sqlite") == 53
        assert len(told(exporter)) == 53

    def test_the_rest_of_a_stall_is_told_when_no_other_follows(self, metrics: Metrics) -> None:
        now, timers = 1_000.0, Timers()
        telemetry = StorageTelemetry(
            metrics, slow_s=0.0, pause_s=60, clock=lambda: now, timer=timers
        )

        def put(run: str) -> None:
            with telemetry.checkpoint("put", "sqlite", {"sereno.run.id": run}):
                pass

        with capture_logs() as records:
            put("first")
            now += 20
            put("second")
            put("third")
            (timer,) = timers.made
            assert (timer.wait, timer.daemon, timer.started) == (40.0, True, True)
            assert len(records) == 1
            now += 40
            timer.call()
            assert [record["count"] for record in records] == [1, 2]
            timer.call()
            now += 60
            put("later")  # nothing is held back any more
            put("last")
            assert [record["count"] for record in records] == [1, 2, 1]
            telemetry.close()
            put("after")

        assert records[1]["run_id"] in ("second", "third")
        assert records[1]["duration_s"] == records[1]["longest_s"]
        assert [record["count"] for record in records] == [1, 2, 1, 1]
        assert len(timers.made) == 2
        assert timers.made[1].cancelled

    def test_without_tracing_the_record_is_still_there(self, metrics: Metrics) -> None:
        with (
            capture_logs() as records,
            StorageTelemetry(metrics, slow_s=0.0).checkpoint("get", "sqlite", RUN),
        ):
            pass

        assert [record["event_type"] for record in records] == ["checkpoint.slow"]
