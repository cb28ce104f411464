"""A gauge that must be asked for: fresh, or NaN."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from telemetry.metrics import Metrics
from telemetry.probes import Gauge, Probes


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """Whoever is asked: answers, fails or says nothing at all."""

    def __init__(self, **values: float) -> None:
        self.answer: Mapping[Gauge, float] = {(name,): value for name, value in values.items()}
        self.failure: Exception | None = None
        self.silent = False
        self.times = 0

    async def __call__(self) -> Mapping[Gauge, float]:
        self.times += 1
        if self.failure is not None:
            raise self.failure
        if self.silent:
            await asyncio.Event().wait()
        return self.answer


@pytest.fixture
def metrics() -> Any:
    metrics = Metrics()
    yield metrics
    metrics.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def probes(metrics: Metrics, clock: Clock) -> Probes:
    return Probes(metrics, every_s=5.0, timeout_s=0.01, clock=clock)


async def test_what_is_answered_is_what_is_scraped(metrics: Metrics, probes: Probes) -> None:
    probes.register("queue", Asked(queue_depth=3, queue_capacity=10))
    await probes.refresh()
    body = (await metrics.render(""))[0].decode()

    assert "sereno_queue_depth 3.0\n" in body
    assert "sereno_queue_capacity 10.0\n" in body
    assert 'sereno_probe_up{probe="queue"} 1.0\n' in body
    assert 'sereno_probe_age_seconds{probe="queue"} 0.0\n' in body


async def test_a_gauge_may_have_labels(metrics: Metrics, probes: Probes) -> None:
    asked = Asked()
    asked.answer = {("storage_bytes", "db"): 4096, ("storage_bytes", "wal"): 0}
    probes.register("storage", asked)
    await probes.refresh()

    assert metrics["storage_bytes"].value("db") == 4096
    assert metrics["storage_bytes"].value("wal") == 0


async def test_before_the_first_answer_nothing_is_known(metrics: Metrics, probes: Probes) -> None:
    probes.register("queue", Asked(queue_depth=3))

    assert math.isnan(metrics["queue_depth"].value())
    assert metrics["probe_up"].value("queue") == 0
    assert math.isnan(metrics["probe_age_seconds"].value("queue"))


@pytest.mark.parametrize("how", ["failure", "silence"])
async def test_who_does_not_answer_leaves_nan_and_not_the_last_value(
    metrics: Metrics, probes: Probes, clock: Clock, how: str
) -> None:
    asked, other = Asked(queue_depth=3), Asked(executor_queue=1)
    probes.register("queue", asked)
    probes.register("executor", other)
    await probes.refresh()
    clock.now += 5
    asked.silent = how == "silence"
    asked.failure = OSError("disk I/O error") if how == "failure" else None
    with capture_logs() as records:
        for _ in range(3):
            await probes.refresh()

    assert math.isnan(metrics["queue_depth"].value())
    assert metrics["probe_up"].value("queue") == 0
    assert metrics["probe_age_seconds"].value("queue") == 5
    assert (metrics["executor_queue"].value(), metrics["probe_up"].value("executor")) == (1, 1)
    assert [record["probe"] for record in records] == ["queue"]  # told once
    expected = "OSError: disk I/O error" if how == "failure" else "no answer within 0.01 s"
    assert records[0]["error"] == expected

    asked.silent, asked.failure = False, None
    await probes.refresh()

    assert metrics["queue_depth"].value() == 3
    assert metrics["probe_up"].value("queue") == 1
    assert metrics["probe_age_seconds"].value("queue") == 0


async def test_a_value_grows_old_while_nobody_can_ask(
    metrics: Metrics, probes: Probes, clock: Clock
) -> None:
    """The event loop may be stuck when the scrape comes."""
    probes.register("queue", Asked(queue_depth=3))
    await probes.refresh()
    clock.now += 10
    assert metrics["queue_depth"].value() == 3
    clock.now += 10

    assert math.isnan(metrics["queue_depth"].value())
    assert metrics["probe_up"].value("queue") == 0
    assert metrics["probe_age_seconds"].value("queue") == 20


async def test_what_an_answer_leaves_out_is_unknown(metrics: Metrics, probes: Probes) -> None:
    asked = Asked(queue_depth=3, queue_capacity=10)
    probes.register("queue", asked)
    await probes.refresh()
    asked.answer = {("queue_depth",): 4}
    await probes.refresh()

    assert metrics["queue_depth"].value() == 4
    assert math.isnan(metrics["queue_capacity"].value())
    assert metrics["probe_up"].value("queue") == 1


async def test_it_asks_again_and_again_and_one_that_hangs_delays_nobody(metrics: Metrics) -> None:
    probes = Probes(metrics, every_s=0.0, timeout_s=30.0)
    asked, hangs = Asked(queue_depth=3), Asked()
    hangs.silent = True
    probes.register("queue", asked)
    probes.register("storage", hangs)
    task = asyncio.create_task(probes.run_forever())
    for _ in range(50):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert asked.times > 5
    assert hangs.times == 1
    assert metrics["queue_depth"].value() == 3
