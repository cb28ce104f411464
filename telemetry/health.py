"""Named checks that others register, and probes read: a probe never does the work itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

__all__ = ["Checks", "Liveness"]

#: Answers None when all is well, else why not.
Check = Callable[[], Awaitable[str | None]]


class Checks:
    """Runs registered checks in the background and keeps the last answer of each."""

    def __init__(self, *, every_s: float = 5.0, timeout_s: float = 3.0) -> None:
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._checks: dict[str, Check] = {}
        self._last: dict[str, tuple[str | None, float, float]] = {}
        self._started = False

    def register(self, name: str, check: Check) -> None:
        """Add a check; readiness needs all of them."""
        self._checks[name] = check

    def start(self) -> None:
        """Say that start-up is over."""
        self._started = True

    async def run_forever(self) -> None:
        """Keep the answers fresh, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._every_s)

    async def refresh(self) -> None:
        """Ask every check once."""
        for name, check in self._checks.items():
            begun = time.monotonic()
            failure: str | None = f"no answer within {self._timeout_s} s"
            with contextlib.suppress(TimeoutError):
                try:
                    failure = await asyncio.wait_for(check(), self._timeout_s)
                except TimeoutError:
                    raise
                except Exception as exc:
                    failure = f"{type(exc).__name__}: {exc}"
            self._last[name] = (failure, time.monotonic(), time.monotonic() - begun)

    def started(self) -> list[dict[str, object]]:
        """The one check of start-up."""
        return [{"name": "started", "status": "pass" if self._started else "fail"}]

    def ready(self) -> list[dict[str, object]]:
        """Start-up and the last known answers: `{name, status, age_s, latency_ms, output?}`."""
        results = self.started()
        now = time.monotonic()
        for name in self._checks:
            failure, at, took = self._last.get(name, ("not checked yet", now, 0.0))
            result: dict[str, object] = {
                "name": name,
                "status": "pass" if failure is None else "fail",
                "age_s": round(now - at, 3),
                "latency_ms": round(took * 1000, 3),
            }
            if failure is not None:
                result["output"] = failure
            results.append(result)
        return results


class Liveness:
    """What `/livez` asks: does the loop turn, and has nobody given up? For any thread.

    `age` is the time since the loop last turned, NaN when nobody watches. Dependencies are not
    asked: a restart does not bring back a database.
    """

    def __init__(self, age: Callable[[], float], *, limit_s: float = 10.0) -> None:
        self._age = age
        self._limit_s = limit_s
        self._fatal: dict[str, str] = {}

    def fail(self, name: str, why: str) -> None:
        """Say that only a restart helps."""
        self._fatal[name] = why

    def checks(self) -> list[dict[str, object]]:
        """`{name, status, age_s, output?}` of the loop, and every reason to restart."""
        age = self._age()
        turns: dict[str, object] = {"name": "event_loop", "status": "pass", "age_s": round(age, 3)}
        if age > self._limit_s:
            turns |= {"status": "fail", "output": f"it has not turned for {age:.1f} s"}
        checks = [turns]
        for name, why in self._fatal.copy().items():
            checks.append({"name": name, "status": "fail", "output": why})
        return checks
