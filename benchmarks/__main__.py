"""`python -m benchmarks [--rounds N]`: runs, events, first lines and memory, as ratios.

Servers are measured in turn, round by round, so that a busy machine disturbs all alike; figures are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.client import burst, first_lines, open_stream
from benchmarks.graphs import EVENTS
from benchmarks.processes import cpu_seconds, machine, serving
from benchmarks.servers import KINDS

CONCURRENCY = (1, 16, 64)
STREAMS = 200
#: Runs of a burst by concurrency: some seconds each.
RUNS = {1: 40, 16: 160, 64: 256}
#: What a node's first line looks like in each kind of stream.
NODE_MARKS = (b'"type":"node.started"', b'"type":"updates"')


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports = {
            kind: stack.enter_context(serving(kind, Path(folder) / kind))
            for kind in arguments.kinds
        }
        figures = asyncio.run(_measure(ports, arguments.rounds))
    _print(figures, arguments.kinds)


async def _measure(
    ports: dict[str, tuple[int, psutil.Process]], rounds: int
) -> dict[tuple[str, str], float]:
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind, (port, process) in ports.items():
        samples["idle RSS (MiB)", kind].append(process.memory_info().rss / 2**20)
        await burst(port, "chain", runs=20, concurrency=4)
        await burst(port, "events", runs=10, concurrency=4)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for concurrency in CONCURRENCY:
            for graph in ("chain", "events"):
                for kind, (port, process) in ports.items():
                    cpu = cpu_seconds(process)
                    done = await burst(port, graph, runs=RUNS[concurrency], concurrency=concurrency)
                    rate = done.runs / done.seconds
                    samples[f"{graph} at {concurrency} (runs/s)", kind].append(rate)
                    if graph == "events":
                        samples[f"events at {concurrency} (events/s)", kind].append(rate * EVENTS)
                    if concurrency == 16:
                        spent = (cpu_seconds(process) - cpu) / done.runs * 1e3
                        samples[f"{graph} at 16 (CPU ms a run)", kind].append(spent)
        for kind, (port, _) in ports.items():
            for _ in range(10):
                first, node = await first_lines(port, "chain", NODE_MARKS)
                samples["first line (ms)", kind].append(first * 1e3)
                samples["first node line (ms)", kind].append(node * 1e3)
    for kind, (port, process) in ports.items():
        before = process.memory_info().rss
        writers = [await open_stream(port, "idle") for _ in range(STREAMS)]
        grown = (process.memory_info().rss - before) / STREAMS / 2**10
        samples["RSS per open stream (KiB)", kind].append(grown)
        for writer in writers:
            writer.close()
    return {key: statistics.median(values) for key, values in samples.items()}


def _print(figures: dict[tuple[str, str], float], kinds: list[str]) -> None:
    rows = list(dict.fromkeys(name for name, _ in figures))
    others = [kind for kind in kinds if kind != "sereno"]
    heads = [*kinds, *(f"sereno / {kind}" for kind in others)]
    print(f"\n| figure | {' | '.join(heads)} |")
    print(f"|---|{'---:|' * len(heads)}")
    for row in rows:
        cells = [f"{figures[row, kind]:.1f}" for kind in kinds]
        for kind in others:
            base = figures[row, kind]
            cells.append(f"{figures[row, 'sereno'] / base:.2f}×" if base > 0 else "")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
