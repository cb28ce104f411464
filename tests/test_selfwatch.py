"""An outage of the export is told once when it begins, now and then while it goes on, and once at
its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def watch(metrics: Metrics, clock: Clock) -> Selfwatch:
    return Selfwatch(metrics, clock=clock, pause_s=300)


@pytest.fixture
def said() -> Iterator[Callable[[], list[MutableMapping[str, Any]]]]:
    """The records since it was asked last."""
    with capture_logs() as logs:

        def taken() -> list[MutableMapping[str, Any]]:
            found = logs[:]
            logs.clear()
            return found

        yield taken


Said = Callable[[], list[MutableMapping[str, Any]]]


def test_exports_and_losses_are_counted_by_what_became_of_them(
    watch: Selfwatch, metrics: Metrics, clock: Clock
) -> None:
    watch.exported("traces", 3)
    watch.lost("traces", "failed", 5)
    watch.lost("traces", "dropped_queue_full")
    watch.lost("traces", "dropped_budget", 2)
    watch.exported("logs", 100)

    family = metrics["telemetry_spans_total"]
    assert family.value("exported") == 3
    assert family.value("failed") == 5
    assert family.value("dropped_queue_full") == 1
    assert family.value("dropped_budget") == 2


def test_the_last_success_is_unknown_before_the_first(
    watch: Selfwatch, metrics: Metrics, clock: Clock
) -> None:
    family = metrics["telemetry_last_export_success_timestamp_seconds"]
    assert math.isnan(family.value("traces"))

    watch.lost("traces", "failed")
    assert math.isnan(family.value("traces"))
    watch.exported("traces", 1)
    assert family.value("traces") == clock.now
    assert math.isnan(family.value("logs"))


def test_an_outage_is_one_pair_of_records(watch: Selfwatch, clock: Clock, said: Said) -> None:
    watch.lost("traces", "failed", 512, reason="HTTP 503")
    for _ in range(50):
        clock.now += 5
        watch.lost("traces", "failed", 10, reason="HTTP 503")
        watch.lost("traces", "dropped_queue_full", reason="queue_full")
    watch.exported("traces", 512)
    watch.exported("traces", 512)

    degraded, recovered = said()
    assert degraded == {
        "event": "Telemetry is lost",
        "event_type": "telemetry.degraded",
        "log_level": "warning",
        "signal": "traces",
        "reason": "HTTP 503",
        "outage_s": 0.0,
        "failed": 512,
        "dropped": 0,
    }
    assert recovered == {
        "event": "Telemetry is exported again",
        "event_type": "telemetry.recovered",
        "log_level": "info",
        "signal": "traces",
        "outage_s": 250.0,
        "failed": 500,
        "dropped": 50,
    }


def test_a_long_outage_is_told_every_five_minutes(
    watch: Selfwatch, clock: Clock, said: Said
) -> None:
    for _ in range(121):
        watch.lost("traces", "failed", 10, reason="ConnectionError")
        clock.now += 5

    told = [(record["outage_s"], record["failed"]) for record in said()]
    assert told == [(0, 10), (300, 600), (600, 600)]


def test_an_outage_that_comes_and_goes_is_told_no_oftener(
    watch: Selfwatch, clock: Clock, said: Said
) -> None:
    for _ in range(60):  # ten minutes
        watch.lost("traces", "failed", 1)
        clock.now += 5
        watch.exported("traces", 1)
        clock.now += 5

    told = [record["event_type"].partition(".")[2] for record in said()]
    assert told == ["degraded", "recovered"] * 2


def test_signals_have_outages_of_their_own(watch: Selfwatch, said: Said) -> None:
    watch.lost("traces", "failed")
    watch.lost("logs", "failed")
    watch.exported("traces", 1)

    told = [(record["event_type"], record["signal"]) for record in said()]
    assert told == [
        ("telemetry.degraded", "traces"),
        ("telemetry.degraded", "logs"),
        ("telemetry.recovered", "traces"),
    ]


def test_a_budget_is_no_outage(watch: Selfwatch, said: Said) -> None:
    watch.lost("traces", "dropped_budget", 1000)

    assert said() == []


def test_without_metrics_it_still_tells(clock: Clock, said: Said) -> None:
    watch = Selfwatch(clock=clock)
    watch.watch(lambda: 0, None)
    watch.lost("traces", "failed")
    watch.internal_error("tracing", "here")

    assert [record["log_level"] for record in said()] == ["warning", "error"]
