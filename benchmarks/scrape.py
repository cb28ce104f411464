"""How late the event loop is while it is scraped, and how long the exposition is.

A server of five graphs with ten nodes each, in this process, with every label value used; another
process scrapes it (`python -m benchmarks.scrape URL COUNT`). A heartbeat on the loop tells its lag,
during scrapes and between them: what is late between them too is not the scrape's.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.routing import APIRoute

from benchmarks.figures import table
from benchmarks.graphs import NODES
from runtime.app import create_app
from runtime.settings import load
from telemetry import contract, logs
from telemetry.admin import AdminListener
from telemetry.metrics import Metrics

__all__ = ["measure"]

GRAPHS = tuple(f"graph{number}" for number in range(5))
#: Of the heartbeat, and between two scrapes, in seconds.
PERIOD, PAUSE = 0.001, 0.2
#: As Prometheus asks.
ACCEPT = "application/openmetrics-text; version=1.0.0"
EXAMPLE = {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7"}
#: What stands for label values that come from elsewhere.
OPEN: Mapping[str, Sequence[str]] = {
    "graph": GRAPHS,
    "node": [f"n{number}" for number in range(NODES)],
    "call": ("tools.search", "tools.fetch"),
    "tool": ("search", "fetch"),
    "provider": ("openai",),
    "model": ("large", "small"),
    "backend": ("sqlite",),
    "part": ("database", "wal"),
}

#: When a scrape began and ended, on the clock that all processes of a machine share.
_Span = tuple[float, float]


def measure(scrapes: int) -> None:
    """Print lag by who is scraped, and lines."""
    logs.configure(level="ERROR")  # that the loop is late is what we are about to say
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure(scrapes))


async def _measure(scrapes: int) -> None:
    here = Path(__file__).parent / "graphs.py"
    with tempfile.TemporaryDirectory() as folder:
        settings = load(engine=f"sqlite:///{folder}/sereno.db", admin_port=0)
        app = create_app(settings, [f"{name}={here}:chain" for name in GRAPHS])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            if serving.done():
                raise RuntimeError("the server did not start")
            await asyncio.sleep(0.01)
        try:
            await _watch(app, server.servers[0].sockets[0].getsockname()[1], scrapes)
        finally:
            server.should_exit = True
            await serving


async def _watch(app: FastAPI, port: int, scrapes: int) -> None:
    telemetry = app.state.telemetry
    lines: list[list[object]] = [["nothing has run", _lines(telemetry.metrics)]]
    for profile in get_args(contract.Profile):
        _use(telemetry.metrics, app, profile)
        lines.append([f"every value of `{profile}` used too", _lines(telemetry.metrics)])
    rows: list[list[object]] = []
    with AdminListener("127.0.0.1", 0, telemetry.admin) as admin:
        for name, at in (("`/metrics` of the API", port), ("`/metrics` of the admin", admin.port)):
            beats: list[_Span] = []
            heart = asyncio.create_task(_beat(beats))
            spans = await _scraped(f"http://127.0.0.1:{at}/metrics", scrapes)
            heart.cancel()
            rows.append([name, *_figures(beats, spans)])
    table(
        [
            f"loop lag (ms), {scrapes} scrapes",
            "worst during a scrape",
            "median of the worst of each scrape",
            "worst between scrapes",
            "a scrape takes",
        ],
        rows,
    )
    table([f"{len(GRAPHS)} graphs × {NODES} nodes", "lines"], lines)


async def _beat(beats: list[_Span]) -> None:
    before = time.monotonic()
    while True:
        await asyncio.sleep(PERIOD)
        now = time.monotonic()
        beats.append((before, now))
        before = now


async def _scraped(url: str, scrapes: int) -> list[_Span]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.scrape", url, str(scrapes)),
        cwd=Path(__file__).parent.parent,
        stdout=asyncio.subprocess.PIPE,
    )
    told, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the scraper failed: {process.returncode}")
    spans = []
    for line in told.decode().splitlines():
        begun, ended = line.split()
        spans.append((float(begun), float(ended)))
    return spans


def _figures(beats: Sequence[_Span], spans: Sequence[_Span]) -> list[str]:
    """A beat belongs to a scrape that it overlaps; those before the first one to none at all."""
    worst = [0.0] * len(spans)
    between = 0.0
    for before, now in beats:
        lag = now - before - PERIOD
        inside = [at for at, (begun, ended) in enumerate(spans) if before < ended and now > begun]
        for at in inside:
            worst[at] = max(worst[at], lag)
        if not inside and spans[0][0] < now < spans[-1][1]:
            between = max(between, lag)
    took = statistics.median(ended - begun for begun, ended in spans)
    return [f"{x * 1e3:.1f}" for x in (max(worst), statistics.median(worst), between, took)]


def _lines(metrics: Metrics) -> int:
    return metrics.render_now("")[0].count(b"\n")


# Every series that a server of these graphs can have.


def _use(metrics: Metrics, app: FastAPI, profile: contract.Profile) -> None:
    for spec in contract.METRICS:
        if spec.profile != profile or spec.later or spec.type == "info":
            continue
        family = metrics[spec.name]
        for labels in _series(spec, app):
            if spec.type == "counter":
                family.inc(*labels, exemplar=EXAMPLE)
            elif spec.type == "gauge":
                family.inc(*labels)
            for bound in (*spec.buckets, math.inf) if spec.type == "histogram" else ():
                family.observe(bound, *labels, exemplar=EXAMPLE)


def _series(spec: contract.Metric, app: FastAPI) -> list[tuple[str, ...]]:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    if spec.name == "http_request_duration_seconds":  # each route has its method
        answers = ("2xx", "4xx")
        asked = [(method, route.path) for route in routes for method in route.methods or ()]
        return [(*ask, answer) for ask in asked for answer in answers]
    choices: list[Any] = []
    for label in spec.labels:
        values = label.values or OPEN.get(label.name, ())
        choices.append([route.path for route in routes] if label.name == "route" else values)
    return list(itertools.product(*choices))


def _scrape(url: str, count: int) -> None:
    request = urllib.request.Request(url, headers={"Accept": ACCEPT})
    for _ in range(count):
        time.sleep(PAUSE)
        begun = time.monotonic()
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()
        print(begun, time.monotonic(), flush=True)


if __name__ == "__main__":
    _scrape(sys.argv[1], int(sys.argv[2]))
