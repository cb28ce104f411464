"""Gauges of what must be asked for: when nobody answers they are NaN, and say so."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from telemetry.contract import error_text, error_type
from telemetry.metrics import Metrics

__all__ = ["Gauge", "Probes", "Read"]

#: A gauge's name and its labels.
Gauge = tuple[str, ...]
#: Answers with what some gauges are now.
Read = Callable[[], Awaitable[Mapping[Gauge, float]]]

#: An answer counts for this many periods: then nobody asks any more, or nobody gets an answer.
_PERIODS = 3


class Probes:
    """Asks in the background and keeps the last answers; scrapes only read those.

    A scrape may come while the event loop is stuck: so each value is judged by its age when it is
    read, and not when it was to be asked for.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        every_s: float = 5.0,
        timeout_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._probes: dict[str, _Probe] = {}

    def register(self, name: str, read: Read) -> None:
        """Ask `read` from now on. What an answer leaves out is unknown."""
        probe = _Probe(name, read, self._clock, _PERIODS * self._every_s + self._timeout_s)
        self._probes[name] = probe
        self._metrics["probe_up"].watch(probe.up, name)
        self._metrics["probe_age_seconds"].watch(probe.age, name)

    async def run_forever(self) -> None:
        """Keep the answers of all that is registered fresh, until cancelled."""
        await asyncio.gather(*map(self._keep_asking, self._probes.values()))

    async def refresh(self) -> None:
        """Ask everybody once, side by side."""
        await asyncio.gather(*map(self._ask, self._probes.values()))

    async def _keep_asking(self, probe: _Probe) -> None:
        while True:
            await self._ask(probe)
            # Many processes shall not ask one store at the same moments.
            await asyncio.sleep(self._every_s * random.uniform(0.8, 1.2))

    async def _ask(self, probe: _Probe) -> None:
        failure = None
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await probe.read()
            for gauge in answer.keys() - probe.values.keys():
                name, *labels = gauge
                self._metrics[name].watch(probe.reader(gauge), *labels)
            probe.learn(answer)
        except TimeoutError:
            failure = f"no answer within {self._timeout_s} s"
        except Exception as exc:
            failure = f"{error_type(exc)}: {error_text(exc)}"
        probe.tell(failure)


class _Probe:
    """Somebody to ask, and what was last answered. The methods that tell are for any thread."""

    def __init__(self, name: str, read: Read, clock: Callable[[], float], lasts_s: float) -> None:
        self.name = name
        self.read = read
        #: All gauges that it ever told of.
        self.values: dict[Gauge, float] = {}
        self._clock = clock
        self._lasts_s = lasts_s
        self._learnt_at = -math.inf
        self._failure: str | None = "not asked yet"
        self._log = structlog.get_logger("telemetry")

    def learn(self, answer: Mapping[Gauge, float]) -> None:
        self.values = {**dict.fromkeys(self.values, math.nan), **answer}
        self._learnt_at = self._clock()

    def tell(self, failure: str | None) -> None:
        """Say how it went: a record when that changes."""
        before, self._failure = self._failure, failure
        if failure is not None and failure != before:
            self._log.warning("Probe failed", probe=self.name, error=failure)

    def up(self) -> float:
        """1 when the values are good."""
        return float(self._failure is None and self.age() <= self._lasts_s)

    def age(self) -> float:
        """Seconds since the last good answer; NaN before the first."""
        age = self._clock() - self._learnt_at
        return age if age < math.inf else math.nan

    def reader(self, gauge: Gauge) -> Callable[[], float]:
        """What a scrape calls."""
        return lambda: self.values[gauge] if self.up() else math.nan
