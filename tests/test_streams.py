"""What a stream's watch makes of lines and times; time is given."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs

from telemetry import http
from telemetry.metrics import Metrics
from telemetry.streams import StreamWatch


class Line(NamedTuple):
    seq: int
    type: str
    body: bytes


class Clock:
    now = 1_795_000_000.0

    def __call__(self) -> float:
        return self.now


def line(seq: int, ts: float, type: str = "custom") -> Line:
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ts)) + f".{round(ts % 1 * 1000):03}Z"
    return Line(seq, type, b'{"v":1,"seq":%d,"ts":"%s","type":"x"}' % (seq, text.encode()))


class Watched:
    """A stream with its metrics and records."""

    def __init__(self, *, kind: Any = "origin", from_seq: int = 0, last_seq: int = 1) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.watch = StreamWatch(
            self.metrics,
            http.current(),
            kind=kind,
            run_id="r",
            thread_id="t",
            from_seq=from_seq,
            last_seq=last_seq,
            slow_s=3.0,
            clock=self.clock,
        )
        self.kind = kind
        self.seq = from_seq

    def write(self, *lines: Line, after: float = 0.0, blocked: float = 0.0) -> None:
        """Lines that were ready so long ago leave, and the client takes them in so long."""
        self.clock.now += after + blocked
        self.seq = lines[-1].seq if lines else self.seq
        self.watch.wrote(lines, (), seq=self.seq, size=10 * len(lines), blocked_s=blocked)

    def observed(self, name: str) -> tuple[float, float]:
        """How many values a histogram has, and their sum."""
        family = self.metrics[name]
        found = {
            sample.name.rpartition("_")[2]: sample.value
            for metric in family.collect()
            for sample in metric.samples
            if sample.labels.get("kind") == self.kind and "le" not in sample.labels
        }
        return found["count"], found["sum"]

    def closed(self, reason: Any = "complete") -> dict[str, Any]:
        with capture_logs() as records:
            self.watch.closed(reason)
        return dict(records[0])


def test_a_slow_graph_makes_a_gap_and_no_lag() -> None:
    stream = Watched()
    start = stream.clock.now
    stream.write(line(1, start))
    stream.write(line(2, start + 40), after=40)
    stream.write(line(3, start + 42), line(4, start + 42), after=2)

    assert stream.observed("stream_gap_seconds") == (2, pytest.approx(42))
    assert stream.observed("stream_delivery_lag_seconds") == (2, pytest.approx(0, abs=1e-3))
    assert stream.closed()["max_gap_s"] == pytest.approx(40)


def test_a_slow_client_makes_lag_and_no_gap() -> None:
    """While it is written to for 8 s, the graph goes on once a second."""
    stream = Watched()
    start = stream.clock.now
    stream.write(line(1, start))
    stream.write(line(2, start), blocked=8)
    stream.write(*(line(n, start + n - 2) for n in range(3, 11)), blocked=0.5)

    assert stream.observed("stream_gap_seconds") == (2, pytest.approx(1))
    assert stream.observed("stream_delivery_lag_seconds") == (2, pytest.approx(8 + 7.5))
    assert stream.metrics["stream_send_blocked_seconds_total"].value() == pytest.approx(8.5)


def test_what_was_stored_before_is_neither_late_nor_a_gap() -> None:
    stream = Watched(kind="join", last_seq=3)
    start = stream.clock.now
    stream.write(line(1, start - 9000), line(2, start - 8000), line(3, start - 5))
    stream.write(line(4, start + 1), after=1)

    assert stream.observed("stream_gap_seconds") == (1, pytest.approx(6))
    assert stream.observed("stream_delivery_lag_seconds") == (1, pytest.approx(0, abs=1e-3))


def test_a_write_of_old_and_new_lines_is_as_late_as_its_first_new_one() -> None:
    stream = Watched(kind="join", last_seq=2)
    start = stream.clock.now
    stream.write(line(1, start - 900), line(2, start - 800), line(3, start - 2), line(4, start))

    assert stream.observed("stream_delivery_lag_seconds") == (1, pytest.approx(2))


def test_heartbeats_are_bytes_and_lines_but_no_times() -> None:
    stream = Watched()
    start = stream.clock.now
    stream.write(line(1, start))
    stream.clock.now += 30
    stream.watch.wrote((), ("heartbeat",), seq=1, size=7, blocked_s=0.0)
    stream.write(line(2, start + 31), after=1)

    assert stream.metrics["stream_events_total"].value("heartbeat") == 1
    assert stream.metrics["stream_bytes_total"].value("origin") == 27
    assert stream.observed("stream_gap_seconds") == (1, pytest.approx(31))
    assert stream.closed()["events"] == 2


@pytest.mark.parametrize("type", ["token", "message", "custom", "node.completed"])
def test_the_first_output_is_what_a_reader_waits_for(type: str) -> None:
    stream = Watched()
    start = stream.clock.now
    stream.write(line(1, start, "run.queued"), line(2, start, "values"))
    assert "first_output_s" not in stream.closed()
    stream.write(line(3, start + 2, type), after=2)
    stream.write(line(4, start + 9, type), after=7)

    assert stream.closed()["first_output_s"] == pytest.approx(2)


def test_a_client_is_called_slow_once() -> None:
    stream = Watched()
    with capture_logs() as records:
        for blocked in (2.9, 3.0, 8.0):
            stream.write(line(1, stream.clock.now), blocked=blocked)

    assert [(record["event_type"], record["blocked_s"]) for record in records] == [
        ("stream.slow", 3.0)
    ]


def test_a_stream_is_active_until_it_is_closed() -> None:
    stream = Watched(kind="resume", from_seq=5, last_seq=9)
    with capture_logs() as records:
        stream.watch.opened()
    active, closed = stream.metrics["streams_active"], stream.metrics["streams_closed_total"]

    assert (active.value("resume"), active.value("join")) == (1, 0)
    assert stream.metrics["stream_resumes_total"].value("complete") == 1
    assert records[0]["from_seq"] == 5
    line = stream.closed("slow_consumer")
    assert active.value("resume") == 0
    assert closed.value("slow_consumer") == 1
    assert (line["kind"], line["reason"], line["last_seq"]) == ("resume", "slow_consumer", 5)


def test_a_line_that_says_no_time_harms_nobody() -> None:
    stream = Watched()
    stream.watch.wrote([Line(2, "custom", b"{}")], (), seq=2, size=3, blocked_s=0.0)

    assert stream.closed()["bytes"] == 3
