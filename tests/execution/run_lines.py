"""Runs any compiled graph through a worker on the memory engine, and checks what it wrote.

`run()` gives the lines of one run, parsed, and checks on the way what must hold for every run.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from signals import Signals, check_signals

import telemetry.langchain
import telemetry.langgraph
import telemetry.tenacity
from runtime.engines.base import Engine, follow
from runtime.engines.memory import MemoryEngine, Store
from runtime.errors import UnknownGraph
from runtime.events import NODE_END_TYPES, TERMINAL_TYPES
from runtime.execution.worker import Worker
from runtime.graphs import LoadedGraph
from runtime.model import MODES, NewRun, Run
from runtime.settings import Settings
from telemetry.langgraph import listen
from telemetry.observations import (
    AttemptEnded,
    AttemptStarted,
    CallRetrying,
    NodeEnded,
    NodeRetrying,
    Observation,
)

#: The ids of the span that a line is from.
SPAN = {"trace_id", "span_id"}
#: Members of every line; those of a line that a node caused.
ENVELOPE = ("v", "seq", "ts", "type", "run_id", "thread_id", "epoch", "data")
NODE_MEMBERS = {"node", "ns", "path", "task", "attempt", "step"}
OF_A_NODE = {
    "node.started",
    "node.retrying",
    *NODE_END_TYPES,
    "call.retrying",
    "token",
    "message",
    "custom",
}
STATUS_OF = {
    "run.completed": "success",
    "run.failed": "error",
    "run.cancelled": "cancelled",
    "run.timed_out": "timeout",
    "run.interrupted": "interrupted",
}

Line = dict[str, Any]


class Clock:
    """Unix seconds that go on a millisecond each time they are asked for."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now = round(self.now + 0.001, 3)
        return self.now


@dataclass
class Lines:
    """The lines of one run, and what the seam told while it ran."""

    all: list[Line]
    seen: list[Observation] = field(default_factory=list)

    def of(self, *types: str, node: str | None = None) -> list[Line]:
        """The lines of these types (`node.` means all of a kind), in order."""

        def wanted(type: str) -> bool:
            return any(type == t or (t[-1] == "." and type.startswith(t)) for t in types)

        return [
            line
            for line in self.all
            if wanted(line["type"]) and (node is None or line.get("node") == node)
        ]

    def one(self, type: str, node: str | None = None) -> Line:
        (line,) = self.of(type, node=node)
        return line

    @property
    def last(self) -> Line:
        return self.all[-1]

    @property
    def words(self) -> list[str]:
        """What happened, in short: `node.started A 1`."""
        return [
            " ".join(str(line[part]) for part in ("type", "node", "attempt") if part in line)
            for line in self.all
        ]

    @property
    def inner(self) -> list[str]:
        """The words without the first two lines and the last."""
        return self.words[2:-1]


class Served:
    """Graphs as the worker asks for them."""

    def __init__(self, graphs: Mapping[str, Any]) -> None:
        self._graphs = {
            name: LoadedGraph(
                name=name,
                source="a test",
                description=None,
                default_input=None,
                digest="digest",
                nodes=tuple(graph.nodes),
                interrupt_before=(),
                interrupt_after=(),
                graph=graph,
                factory=None,
            )
            for name, graph in graphs.items()
        }

    def get(self, name: str) -> LoadedGraph:
        try:
            return self._graphs[name]
        except KeyError:
            raise UnknownGraph(name, self.names()) from None

    def names(self) -> tuple[str, ...]:
        return tuple(self._graphs)

    def __iter__(self) -> Any:
        return iter(self._graphs.values())


class Server:
    """A worker with one graph, as long as it is entered."""

    _ids = itertools.count(1)

    def __init__(self, engine: Engine, worker: Worker) -> None:
        self.engine = engine
        self.worker = worker

    async def submit(
        self,
        input: Any = None,
        *,
        thread: str = "thread",
        stream: Sequence[str] = MODES,
        deadline: float | None = None,
        **request: Any,
    ) -> Run:
        body = {"input": input, "stream": list(stream), **request}
        new = NewRun(
            run_id=f"run-{next(self._ids)}",
            thread_id=thread,
            graph="graph",
            graph_digest="digest",
            request=body,
            deadline=deadline,
        )
        return await self.worker.submit(new, {"graph": "graph", "trigger": "api"})

    async def lines(self, run: Run, *, until: Callable[[Line], bool] | None = None) -> list[Line]:
        """The run's lines to the last one, or to the first for which `until` holds."""
        found: list[Line] = []
        async for batch in follow(self.engine, run.run_id, 0):
            for stored in batch:
                line = orjson.loads(stored.body)
                assert stored.seq == line["seq"]
                assert stored.type == line["type"]
                found.append(line)
                if until is not None and until(line):
                    return found
        return found

    async def execute(self, input: Any = None, **request: Any) -> list[Line]:
        return await self.lines(await self.submit(input, **request))


@asynccontextmanager
async def serving(
    graph: Any,
    *,
    engine: Engine | None = None,
    store: Store | None = None,
    clock: Callable[[], float] | None = None,
    signals: Signals | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A server of this graph, without a server."""
    clock = clock or Clock()
    telemetry.langgraph.install()
    telemetry.tenacity.install()
    telemetry.langchain.install()
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(engine or MemoryEngine(store=store, clock=clock))
        defaults = {"token_ms": 0, "executor_threads": 8, "cancel_grace_s": 2}
        worker = Worker(
            opened,
            Served({"graph": graph}),  # type: ignore[arg-type]
            Settings(**{**defaults, **settings}),
            clock=clock,
            segments=(signals or Signals()).segments,
        )
        await stack.enter_async_context(worker)
        yield Server(opened, worker)


async def run(
    graph: Any,
    input: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    **request: Any,
) -> Lines:
    """One run of a graph on a thread of its own, checked."""
    seen: list[Observation] = []
    signals = Signals()
    with listen(seen.append), signals.recording():
        async with serving(graph, signals=signals, **(settings or {})) as server:
            lines = Lines(await server.execute(input, **request), seen)
    check(lines, dropped=server.worker.fenced_events)
    check_signals(signals, lines.all)
    return lines


# What must hold for every run.


def check(lines: Lines, *, dropped: int = 0) -> None:
    """STREAM.md §1 and TELEMETRY.md §2.2, for the lines of one whole run."""
    check_one(lines)
    if not dropped:
        check_seen(lines)


def check_one(lines: Lines) -> None:
    """What the lines alone tell."""
    check_envelopes(lines.all)
    check_closed(lines.all)
    check_numbers(lines.all)


def check_envelopes(lines: Sequence[Line]) -> None:
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0]["type"] == "run.queued"
    assert lines[0]["epoch"] == 0
    assert [line["type"] in TERMINAL_TYPES for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len({(line["run_id"], line["thread_id"]) for line in lines}) == 1
    assert [line["epoch"] for line in lines] == sorted(line["epoch"] for line in lines)
    for line in lines:
        where = f"{line}"
        assert set(line) >= set(ENVELOPE), where
        assert line["v"] == 1, where
        assert isinstance(line["data"], dict), where
        assert len(line["ts"]) == len("2026-11-22T22:31:07.412Z"), where
        members = set(line) - set(ENVELOPE)
        assert SPAN <= members or line["type"] == "run.queued", where
        members -= SPAN
        if line["type"] in OF_A_NODE:
            bare = line["data"].get("cached") or line["data"].get("recovered")
            from_store = line["type"] == "message" and "attempt" not in members
            assert members == NODE_MEMBERS - ({"attempt"} if bare or from_store else set()), where
            assert len(line["ns"]) == len(line["path"]), where
            assert line["node"], where
            assert line["task"], where
            assert isinstance(line["step"], int), where
            assert bare or from_store or line["attempt"] >= 1, where
        else:
            assert members == ({"step"} if line["type"] == "values" else set()), where


def check_closed(lines: Sequence[Line]) -> None:
    """Attempts are numbered 1..n and each is closed; a task has one end line in an epoch."""
    epochs = sorted({line["epoch"] for line in lines})
    for epoch in epochs:
        attempts: dict[str, list[int]] = {}
        open_: dict[str, int] = {}
        ended: Counter[str] = Counter()
        lost: set[str] = set()
        for line in lines:
            type, task = line["type"], line.get("task")
            if line["epoch"] == epoch + 1 and type == "run.recovered":
                lost = {entry["task"] for entry in line["data"]["lost"]}
            if line["epoch"] != epoch:
                continue
            if type == "node.started":
                assert task not in ended, f"{line} is after its end"
                assert task not in open_, f"{line} while attempt {open_.get(task)} is open"
                attempts.setdefault(task, []).append(line["attempt"])
                open_[task] = line["attempt"]
            elif type == "node.retrying":
                assert open_.pop(task) == line["attempt"]
                assert line["data"]["discard_from"] <= line["seq"]
            elif type in NODE_END_TYPES:
                open_.pop(task, None)
                ended[task] += 1
                data = line["data"]
                assert data["duration_ms"] >= 0
                if data.get("cached") or data.get("recovered"):
                    assert data["attempts"] == 0
                    assert task not in attempts
                else:
                    assert data["attempts"] == len(attempts[task]) == line["attempt"], f"{line}"
            elif type in ("token", "message", "custom", "call.retrying") and "attempt" in line:
                assert open_.get(task) == line["attempt"], f"{line} is outside of its attempt"
        assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in attempts.values())
        assert set(ended.values()) <= {1}, f"more than one end: {ended}"
        last_epoch = epoch == epochs[-1]
        unended = set(attempts) - set(ended)
        if not last_epoch:
            recovered = {
                line["task"]
                for line in lines
                if line["epoch"] > epoch and line["data"].get("recovered")
            }
            assert unended <= lost | recovered, f"epoch {epoch}: {unended - lost} are not lost"
        elif lines[-1]["type"] in ("run.completed", "run.interrupted"):
            assert not unended, f"never ended: {unended}"
    _check_started_again(lines)


def _check_started_again(lines: Sequence[Line]) -> None:
    """A task starts again in a later epoch only if it is named as lost there."""
    closed: set[str] = set()
    for line in lines:
        if line["type"] == "run.recovered":
            closed -= {entry["task"] for entry in line["data"]["lost"]}
        elif line["type"] == "node.started":
            assert line["task"] not in closed, f"{line} starts again"
        elif line["type"] in NODE_END_TYPES:
            assert line["task"] not in closed, f"{line} ends again"
            closed.add(line["task"])


def check_numbers(lines: Sequence[Line]) -> None:
    """The statistics of the last line are those of the lines before it."""
    types = Counter(line["type"] for line in lines)
    data = lines[-1]["data"]
    assert data["final"] is True
    assert data["status"] == STATUS_OF[lines[-1]["type"]]
    assert data["nodes"] == sum(types[type] for type in NODE_END_TYPES)
    assert data["attempts"] == types["node.started"]
    assert data["retries"] == types["node.retrying"] + types["call.retrying"]
    assert ("output" in data) == (data["status"] == "success")
    assert ("error" in data) == (data["status"] in ("error", "timeout"))
    assert ("reason" in data) == (data["status"] == "cancelled")
    assert ("interrupts" in data) == ("next" in data) == (data["status"] == "interrupted")
    assert data["backoff_ms"] >= 0
    assert data["max_gap_ms"] >= 0


def check_seen(lines: Lines) -> None:
    """E1, E2 and E4: lines say what the seam saw."""

    def told(type: str) -> list[tuple[str, int]]:
        return sorted((line["task"], line["attempt"]) for line in lines.of(type))

    def saw(kind: type) -> list[tuple[str, int]]:
        return sorted((o.visit.task, o.attempt) for o in lines.seen if type(o) is kind)  # type: ignore[union-attr]

    assert told("node.started") == saw(AttemptStarted) == saw(AttemptEnded)
    assert told("node.retrying") == saw(NodeRetrying)
    retried = [o for o in lines.seen if isinstance(o, AttemptEnded) and o.outcome == "retried"]
    assert sorted((o.visit.task, o.attempt) for o in retried) == told("node.retrying")
    calls = [o for o in lines.seen if isinstance(o, CallRetrying) and o.visit is not None]
    assert len(calls) == len(lines.of("call.retrying"))
    ends = {
        "success": "node.completed",
        "error": "node.failed",
        "interrupted": "node.interrupted",
        "cancelled": "node.cancelled",
    }
    expected = sorted(
        (o.visit.task, ends[o.outcome])
        for o in lines.seen
        if isinstance(o, NodeEnded) and o.outcome != "drained"
    )
    assert expected == sorted(
        (line["task"], line["type"]) for line in lines.of(*NODE_END_TYPES) if "attempt" in line
    )


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something holds that has no event."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to hold")
