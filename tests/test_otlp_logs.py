"""What an OTLP collector gets of the log lines, and what becomes of those it does not get."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry._logs import SeverityNumber, get_logger_provider
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from structlog.testing import capture_logs

from telemetry import logs
from telemetry.otlp_logs import OtlpLogs

LOG = structlog.get_logger("runtime")
THIRD = logging.getLogger("third")
NOON = 1_770_987_302.123456
SPAN = trace.SpanContext(0xA1, 0xB2, is_remote=False, trace_flags=trace.TraceFlags(1))


class Collector(LogRecordExporter):
    """Keeps what it is sent; `act` decides what else happens."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.records: list[ReadableLogRecord] = []
        self.act = act
        self.calls = 0

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        self.calls += 1
        if self.act() is False:
            return LogRecordExportResult.FAILURE
        self.records += batch
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class Watch:
    """What the selfwatch is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.first = threading.Event()

    def exported(self, signal: str, count: int) -> None:
        self.told.append((signal, count))

    def lost(self, signal: str, loss: str, count: int = 1, *, reason: str = "") -> None:
        self.told.append((signal, loss, count, reason))
        self.first.set()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "10")
    yield
    logs.reset()
    deadline = time.monotonic() + 10
    for thread in threading.enumerate():
        if thread.name.startswith(("sereno-logs", "OtelBatch")):
            thread.join(deadline - time.monotonic())
            assert not thread.is_alive(), thread.name


class Sent:
    """Logs that go to a collector as well; reading closes them."""

    def __init__(
        self, collector: Collector | None = None, *, level: str = "INFO", **options: Any
    ) -> None:
        self.collector = collector or Collector()
        self.watch = Watch()
        self.stdout = io.BytesIO()
        self.logs = logs.configure(level=level, stream=self.stdout, clock=lambda: NOON)
        self.sink = OtlpLogs(
            Resource({"service.name": "sereno"}),
            exporter=self.collector,
            selfwatch=self.watch,  # type: ignore[arg-type]
            **options,
        )
        self.logs.attach(self.sink)

    def records(self) -> list[Any]:
        self.logs.close()
        return [record.log_record for record in self.collector.records]


# What a record is


def test_a_record_holds_what_the_line_holds() -> None:
    sent = Sent()
    with trace.use_span(trace.NonRecordingSpan(SPAN)):
        LOG.warning("Node retrying", event_type="node.retrying", run_id="r", attempt=2, ids=[1])
    (record,) = sent.records()
    (readable,) = sent.collector.records

    assert record.body == "Node retrying"
    assert (record.severity_text, record.severity_number) == ("WARNING", SeverityNumber.WARN)
    assert record.timestamp == 1_770_987_302_123_456_000
    assert record.event_name == "node.retrying"
    assert (record.trace_id, record.span_id, record.trace_flags) == (0xA1, 0xB2, 1)
    assert dict(record.attributes) == {
        "trace_kept": "true",
        "run_id": "r",
        "attempt": 2,
        "ids": (1,),
    }
    assert readable.instrumentation_scope is not None
    assert readable.instrumentation_scope.name == "runtime"
    assert dict(readable.resource.attributes) == {"service.name": "sereno"}


def test_records_of_the_standard_library_come_too() -> None:
    sent = Sent()
    THIRD.error("%d of %s", 1, "two", extra={"graph": "g"})
    (record,) = sent.records()

    assert record.body == "1 of two"
    assert record.severity_number == SeverityNumber.ERROR
    assert dict(record.attributes) == {"graph": "g"}
    assert (record.trace_id, record.span_id, record.event_name) == (0, 0, None)


def test_an_exception_is_called_as_opentelemetry_calls_it() -> None:
    sent = Sent()
    LOG.error("Failed", exc_info=ValueError("no"))
    LOG.error("Failed", exception="own")
    first, second = sent.records()

    assert first.attributes["exception.type"] == "ValueError"
    assert first.attributes["exception.message"] == "no"
    assert first.attributes["exception.stacktrace"] == "ValueError: no\n"
    assert dict(second.attributes) == {"exception": "own"}


@pytest.mark.parametrize(
    ("level", "severity"),
    [("DEBUG", 5), ("INFO", 9), ("WARNING", 13), ("ERROR", 17), ("CRITICAL", 21)],
)
def test_a_level_is_a_severity(level: str, severity: int) -> None:
    sent = Sent(level="DEBUG")
    THIRD.log(logging.getLevelNamesMapping()[level], "x")
    (record,) = sent.records()

    assert (record.severity_text, record.severity_number.value) == (level, severity)


@pytest.mark.parametrize(
    ("value", "held"),
    [
        pytest.param(2**64 - 1, str(2**64 - 1), id="unsigned integer"),
        pytest.param(
            {"a": [2**63, None, {"b": -1}]}, {"a": (str(2**63), None, {"b": -1})}, id="deep"
        ),
        pytest.param("x" * 20_000, "x" * 16_000, id="long text"),
        pytest.param([1, "two", 3.0, None], (1, "two", 3.0, None), id="mixed list"),
        pytest.param({}, {}, id="empty"),
        pytest.param(float("nan"), None, id="nan"),
        pytest.param("\x1b[31m\ud800", "\x1b[31m\ufffd", id="odd text"),
    ],
)
def test_every_value_of_a_line_can_be_sent(value: object, held: object) -> None:
    sent = Sent()
    LOG.info("x", value=value)
    (record,) = sent.records()

    assert record.attributes["value"] == held
    encoded = encode_logs(sent.collector.records).resource_logs[0].scope_logs[0].log_records[0]
    assert [attribute.key for attribute in encoded.attributes] == ["value"]


def test_a_line_may_have_many_fields() -> None:
    sent = Sent()
    LOG.info("x", **{f"key_{number}": number for number in range(500)})
    (record,) = sent.records()

    assert len(record.attributes) == 500


@pytest.mark.parametrize("ids", [{"trace_id": "x", "span_id": "b2"}, {"trace_id": 5}])
def test_ids_of_somebody_elses_stay_attributes(ids: dict[str, Any]) -> None:
    sent = Sent()
    LOG.info("x", **ids)
    (record,) = sent.records()

    assert record.trace_id == record.span_id == 0
    assert dict(record.attributes) == {**ids, "trace_kept": "true"}


def test_nobody_else_finds_the_provider() -> None:
    before = get_logger_provider()
    Sent().records()

    assert get_logger_provider() is before


def test_nothing_is_made_where_opentelemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    sent = Sent()
    LOG.info("x")

    assert sent.records() == []
    assert sent.logs.losses == {}
    assert b'"x"' in sent.stdout.getvalue()


def test_the_collector_is_where_the_standard_variables_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs.invalid/v1/logs")
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "600")
    sink = OtlpLogs(Resource({}))
    exporter: Any = sink._exporter._exporter
    sink.finish()

    assert exporter._endpoint == "http://logs.invalid/v1/logs"
    assert exporter._client._timeout == 3
    assert sink._queue_max == 600


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        pytest.param("OTEL_BLRP_MAX_QUEUE_SIZE", "100", 0, id="smaller than a batch"),
        pytest.param("OTEL_BLRP_MAX_QUEUE_SIZE", "-1", 1, id="queue"),
        pytest.param("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "many", 1, id="batch"),
        pytest.param("OTEL_BLRP_SCHEDULE_DELAY", "-1", 1, id="delay"),
    ],
)
def test_a_number_that_the_sdk_would_refuse_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: int
) -> None:
    monkeypatch.setenv(variable, value)
    with capture_logs() as records:
        OtlpLogs(Resource({})).finish()

    assert [record["variable"] for record in records] == [variable] * told


# What is not sent


def test_what_is_logged_while_lines_are_sent_is_not_sent() -> None:
    def act() -> None:
        for name in ("urllib3.connectionpool", "requests", "opentelemetry.exporter", "own"):
            logging.getLogger(name).warning("while sending")
        LOG.warning("while sending")

    sent = Sent(Collector(act))
    LOG.info("x")
    bodies = [record.body for record in sent.records()]

    assert bodies == ["x"]
    assert sent.collector.calls == 1
    assert sent.stdout.getvalue().count(b"while sending") == 5
    assert sent.logs.losses == {}


def test_what_others_log_in_the_meantime_is_sent() -> None:
    sending, logged = threading.Event(), threading.Event()

    def act() -> None:
        sending.set()
        assert logged.wait(10)

    sent = Sent(Collector(act))
    LOG.info("first")
    assert sending.wait(10)
    logging.getLogger("urllib3").warning("of a node")
    logged.set()

    assert [record.body for record in sent.records()] == ["first", "of a node"]


def test_what_opentelemetry_says_of_itself_is_not_sent() -> None:
    sent = Sent()
    logging.getLogger("opentelemetry.sdk.trace").warning("a queue is full")
    LOG.info("x")

    assert [record.body for record in sent.records()] == ["x"]
    assert b"a queue is full" in sent.stdout.getvalue()


def test_an_exporter_that_raises_with_every_batch_does_not_feed_itself() -> None:
    calls = threading.Semaphore(0)

    def act() -> None:
        calls.release()
        THIRD.error("it fails")
        raise RuntimeError("it fails")

    sent = Sent(Collector(act))
    for number in range(3):
        LOG.info("x", number=number)
        assert calls.acquire(timeout=10)
    sent.logs.close()

    assert sent.collector.calls == 3
    assert sent.stdout.getvalue().count(b"it fails") == 3
    assert sent.logs.losses == {"otlp": 3}
    assert sent.watch.told == [("logs", "failed", 1, "RuntimeError")] * 3


def test_batches_that_are_refused_are_counted_and_the_next_is_sent() -> None:
    answers = iter([False, None])
    sent = Sent(Collector(lambda: next(answers)))
    LOG.info("refused")
    assert sent.watch.first.wait(10)
    LOG.info("sent")

    assert [record.body for record in sent.records()] == ["sent"]
    assert sent.sink.exported == 1
    assert sent.logs.losses == {"otlp": 1}
    assert sent.watch.told == [("logs", "failed", 1, "export failed"), ("logs", 1)]


def test_a_line_that_is_none_of_ours_is_counted() -> None:
    sent = Sent()
    line = b'{"half a line\n'

    assert sent.sink.write(line) == len(line)
    assert sent.records() == []
    assert sent.logs.losses == {"otlp": 1}


# A collector that does not answer


class Stuck(Collector):
    """Takes a batch and keeps it until it is let go."""

    def __init__(self) -> None:
        super().__init__(self._wait)
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def _wait(self) -> None:
        self.reached.set()
        assert self.let_go.wait(10)


def test_a_collector_that_hangs_holds_up_neither_stdout_nor_the_end() -> None:
    collector = Stuck()
    sent = Sent(collector)
    LOG.info("x")
    assert collector.reached.wait(10)
    for _ in range(50):
        LOG.info("y")
    begun = time.monotonic()
    sent.logs.close(timeout=0.2)
    took = time.monotonic() - begun
    collector.let_go.set()

    assert took < 5
    assert len(sent.stdout.getvalue().splitlines()) == 51
    assert sent.logs.losses == {"otlp": 51}
    assert sent.watch.told == [("logs", "failed", 51, "shutdown")]
    assert sent.sink.exported == 0


def test_what_waits_is_bounded_and_what_has_no_room_is_counted() -> None:
    collector = Stuck()
    sent = Sent(collector, queue_max=512)
    LOG.info("x")
    assert collector.reached.wait(10)
    for _ in range(20_000):
        LOG.info("x")
    sent.logs.close(timeout=0.2)
    collector.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "sereno-logs-otlp":
            thread.join(10)

    assert sent.logs.losses["otlp"] == 20_001
    assert sent.watch.told == [("logs", "failed", 512, "shutdown")]


def test_what_a_batch_left_behind_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "3600000")
    sent = Sent()
    for _ in range(2_000):
        LOG.info("x")

    assert len(sent.records()) == 2_000
    assert sent.logs.losses == {}


def test_many_threads_log_and_nothing_is_lost_or_doubled() -> None:
    sent = Sent()

    def work(thread: int) -> None:
        for number in range(500):
            LOG.info("x", thread=thread, number=number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [(r.attributes["thread"], r.attributes["number"]) for r in sent.records()]

    assert len(seen) == len(set(seen)) == 4_000
    assert sent.logs.losses == {}
