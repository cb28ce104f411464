"""`python -m benchmarks.telemetry [--rounds N] [--only PART …]`: what telemetry costs.

Three parts. `servers`: sereno with spans off, on, exported, and exported to nobody, in turn.
`seam`: a graph in this process, bare and observed. `scrape`: the event loop while it is scraped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import scrape, seam
from benchmarks.client import burst
from benchmarks.figures import Ratio, table
from benchmarks.graphs import EVENTS, NODES
from benchmarks.processes import (
    cpu_seconds,
    forget_settings,
    free_port,
    machine,
    running,
    serving,
)

PARTS = ("servers", "seam", "scrape")
KINDS = ("off", "on", "exporting", "dead")
#: Round by round: each kind comes right after each other one once, and of any two each comes first
#: in half of the rounds.
ORDERS = (
    ("off", "on", "dead", "exporting"),
    ("on", "exporting", "off", "dead"),
    ("exporting", "dead", "on", "off"),
    ("dead", "off", "exporting", "on"),
)
#: Of which pairs the ratios are printed, the first to the second.
PAIRS = (
    ("on", "off"),
    ("exporting", "off"),
    ("dead", "off"),
    ("exporting", "on"),
    ("dead", "on"),
)
CONCURRENCY = 16
#: Spans wait so long at most, that most of them are exported during the burst that they are of; the
#: rest shall be gone, and its CPU be counted, before the next burst begins.
DELAY_MS, SETTLE_S = 1_000, 1.2
#: The longest that a burst may take.
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    port: int
    process: psutil.Process


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.telemetry", description=__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--runs", type=int, default=160, help="runs of a burst of chain")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    arguments = parser.parse_args()
    forget_settings()
    print(machine())
    if "servers" in arguments.only:
        _servers(arguments.rounds, arguments.runs)
    if "seam" in arguments.only:
        seam.measure(2 * arguments.rounds)
    if "scrape" in arguments.only:
        scrape.measure(5 * arguments.rounds)


def _servers(rounds: int, runs: int) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))  # held, so that nobody else begins to listen there
        sink = free_port()
        stack.enter_context(running("-m", "benchmarks.sink", str(sink)))
        servers: dict[str, _Server] = {}
        for kind, environment in _environments(sink, nobody.getsockname()[1]).items():
            port, process = stack.enter_context(serving("sereno", folder / kind, environment))
            servers[kind] = _Server(port=port, process=process)
        asyncio.run(_measure(servers, rounds, runs))


def _environments(sink: int, nobody: int) -> Mapping[str, Mapping[str, str]]:
    def exported(port: int) -> Mapping[str, str]:
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_BSP_SCHEDULE_DELAY": str(DELAY_MS),
        }

    return {
        "off": {"OTEL_SDK_DISABLED": "true"},
        "on": {},
        "exporting": exported(sink),
        "dead": exported(nobody),
    }


async def _measure(servers: Mapping[str, _Server], rounds: int, runs: int) -> None:
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for server in servers.values():  # to warm up
        for graph in ("chain", "events"):
            await burst(server.port, graph, runs=runs, concurrency=CONCURRENCY)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for graph in ("chain", "events"):
            for kind in ORDERS[number % len(ORDERS)]:
                for name, value in (await _burst(servers[kind], graph, runs)).items():
                    figures[name, kind].append(value)
    names = list(dict.fromkeys(name for name, _ in figures))
    rows = [[name, *(statistics.median(figures[name, k]) for k in KINDS)] for name in names]
    rows.append(["RSS at the end (MiB)", *(_rss(servers[kind]) for kind in KINDS)])
    table(
        [f"at {CONCURRENCY}, medians of {rounds}", *KINDS],
        [[name, *(f"{value:.1f}" for value in values)] for name, *values in rows],
    )
    table(
        [f"{rounds} pairs: median (quartiles)", *names],
        [
            [f"{first} / {second}", *(_ratio(figures, name, first, second) for name in names)]
            for first, second in PAIRS
        ],
    )
    _spans(servers)


def _ratio(
    figures: Mapping[tuple[str, str], list[float]], name: str, first: str, second: str
) -> Ratio:
    return Ratio.of(list(zip(figures[name, first], figures[name, second], strict=True)))


def _rss(server: _Server) -> float:
    return server.process.memory_info().rss / 2**20


async def _burst(server: _Server, graph: str, runs: int) -> dict[str, float]:
    if graph == "events":
        runs *= 2  # they take half as long, and make few spans
    begun = cpu_seconds(server.process)
    async with asyncio.timeout(PATIENCE_S):
        done = await burst(server.port, graph, runs=runs, concurrency=CONCURRENCY)
    await asyncio.sleep(SETTLE_S)
    cpu = cpu_seconds(server.process) - begun
    if graph == "chain":
        return {
            "chain (runs/s)": done.runs / done.seconds,
            "chain (CPU µs a node)": cpu / (done.runs * NODES) * 1e6,
        }
    return {
        "events (events/s)": done.runs * EVENTS / done.seconds,
        "events (CPU ms a run)": cpu / done.runs * 1e3,
    }


def _spans(servers: Mapping[str, _Server]) -> None:
    """What became of the spans, as the servers count them: whether each was what it is called."""
    results = ("exported", "failed", "dropped_queue_full")
    rows: list[list[object]] = []
    for kind, server in servers.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            text = answer.read().decode()
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
        name = 'sereno_telemetry_spans_total{{result="{}"}}'
        rows.append([kind, *(f"{float(samples[name.format(x)]):.0f}" for x in results)])
    table(["spans", *(result.replace("_", " ") for result in results)], rows)


if __name__ == "__main__":
    main()
