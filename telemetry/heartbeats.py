"""Says every few seconds, in the log, which runs go on and which nodes they are in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from telemetry.metrics import Metrics

__all__ = ["Heartbeats", "heartbeat_records"]

#: Nodes that one record shows, the oldest.
_NODES = 20

_log = structlog.get_logger("telemetry")


def heartbeat_records(
    live: Mapping[str, Any], *, older_than_s: float = 15.0, most: int = 100
) -> Iterator[dict[str, Any]]:
    """A record for each run that is open for longer, the oldest first.

    Of more than `most` runs the last record says how many are not shown (`runs_not_shown`), of
    many open nodes each record (`nodes_not_shown`).
    """
    runs = [run for run in live["runs"] if run["age_s"] >= older_than_s]
    runs.sort(key=_age, reverse=True)
    for number, run in enumerate(runs[:most], 1):
        nodes = sorted(run["nodes"], key=_age, reverse=True)
        record = {**run, "nodes": nodes[:_NODES]}
        if len(nodes) > _NODES:
            record["nodes_not_shown"] = len(nodes) - _NODES
        if number == most < len(runs):
            record["runs_not_shown"] = len(runs) - most
        yield record


class Heartbeats:
    """Logs the records, as long as it is entered, from a thread: a blocked loop is silent too."""

    def __init__(
        self,
        live: Callable[[], Mapping[str, Any]],
        metrics: Metrics,
        *,
        every_s: float = 15.0,
        most: int = 100,
    ) -> None:
        self._live = live
        self._errors = metrics["telemetry_internal_errors_total"]
        self._every_s = every_s
        self._most = most
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sereno-heartbeats", daemon=True)

    def __enter__(self) -> Heartbeats:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leaving.set()
        self._thread.join(0.5)

    def beat(self) -> None:
        """Log what goes on now."""
        for record in heartbeat_records(self._live(), older_than_s=self._every_s, most=self._most):
            _log.info("Run goes on", event_type="run.heartbeat", **record)

    def _run(self) -> None:
        while not self._leaving.wait(self._every_s):
            try:
                self.beat()
            except Exception:
                self._errors.inc("loopwatch")


def _age(thing: Mapping[str, Any]) -> float:
    age: float = thing["age_s"]
    return age
