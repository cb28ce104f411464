"""What the engine tests share: a clock, lines, and how each engine of the table is opened."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from runtime import engines
from runtime.engines.base import Engine, follow
from runtime.engines.memory import Store
from runtime.events import Event
from runtime.model import Lease, NewRun, Run, StoredLine

LEASE_S = 30.0


class Clock:
    """The store's clock: stands still until it is moved."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def _memory(directory: Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    shared = {"store": Store()}
    return "memory://", shared, shared


def _sqlite(directory: Path) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    return f"sqlite:///{directory / 'sereno.db'}", {}, {"lock": False}


#: Scheme → URL, options of the engine that holds the store, options of others over the same store.
OPENERS: Mapping[str, Callable[[Path], tuple[str, Mapping[str, Any], Mapping[str, Any]]]] = {
    "memory": _memory,
    "sqlite": _sqlite,
}


class Bench:
    """A store, and engines over it."""

    def __init__(self, scheme: str, directory: Path, stack: contextlib.AsyncExitStack) -> None:
        self.clock = Clock()
        self._url, self._first, self._others = OPENERS[scheme](directory)
        self._stack = stack
        self._opened = 0

    async def open(self, **options: Any) -> Engine:
        """The first call opens the holder of the store, later ones a second instance over it."""
        given = self._others if self._opened else self._first
        self._opened += 1
        engine = engines.create(self._url, clock=self.clock, **{**given, **options})
        return await self._stack.enter_async_context(engine)


def new_run(run_id: str = "r1", thread_id: str = "t1", **changed: Any) -> NewRun:
    values = {"graph": "g", "graph_digest": "d", "request": {"input": {"n": 1}}, **changed}
    return NewRun(run_id=run_id, thread_id=thread_id, **values)


def line(seq: int, type: str = "custom", *, epoch: int = 1, **rest: Any) -> Event:
    body = json.dumps({"seq": seq, "type": type, "epoch": epoch}).encode()
    return Event(seq=seq, epoch=epoch, type=type, ts=float(seq), body=body, **rest)


def lines(first: int, count: int, *, epoch: int = 1) -> list[Event]:
    return [line(seq, epoch=epoch) for seq in range(first, first + count)]


def stored(events: Sequence[Event]) -> list[StoredLine]:
    return [StoredLine(seq=e.seq, type=e.type, body=e.body) for e in events]


async def submitted(engine: Engine, run_id: str = "r1", thread_id: str = "t1", **new: Any) -> Run:
    return await engine.submit(new_run(run_id, thread_id, **new), line(1, "run.queued", epoch=0))


async def claim(
    engine: Engine, run: Run | str, *, owner: str = "w1", crashed: bool = False
) -> Lease:
    """Claim a run as it is now, or as it was read."""
    seen = await engine.get(run) if isinstance(run, str) else run
    type = "run.started" if seen.epoch == 0 else "run.recovered"
    event = line(seen.last_seq + 1, type, epoch=seen.epoch + 1)
    return await engine.claim(seen, event, owner=owner, lease_s=LEASE_S, crashed=crashed)


async def claimed(
    engine: Engine, run_id: str = "r1", thread_id: str = "t1", *, owner: str = "w1"
) -> Lease:
    """A run that runs: its log has two lines."""
    return await claim(engine, await submitted(engine, run_id, thread_id), owner=owner)


async def log_of(engine: Engine, run_id: str = "r1") -> list[StoredLine]:
    return list(await engine.read(run_id, 0, 10_000))


async def followed(engine: Engine, run_id: str, after: int) -> list[StoredLine]:
    """All that a watcher gets until its stream ends."""
    async with contextlib.aclosing(follow(engine, run_id, after)) as batches:
        return [stored for batch in [list(b) async for b in batches] for stored in batch]


async def spin(times: int = 20) -> None:
    """Let others on the loop go on."""
    for _ in range(times):
        await asyncio.sleep(0)


# A graph, and what LangGraph sends to a saver.


class State(TypedDict):
    seen: Annotated[list[str], lambda a, b: a + b]


def graph_of(*, pause: bool = False) -> Any:
    """outer: first → inner(deep) → last; `last` may ask a human."""

    async def note(name: str) -> dict[str, Any]:
        return {"seen": [name]}

    async def deep(state: State) -> dict[str, Any]:
        return await note("deep")

    async def first(state: State) -> dict[str, Any]:
        return await note("first")

    async def last(state: State) -> dict[str, Any]:
        return await note(interrupt("go on?") if pause else "last")

    inner = StateGraph(State)
    inner.add_node("deep", deep)
    inner.add_edge(START, "deep")
    inner.add_edge("deep", END)
    outer = StateGraph(State)
    outer.add_node("first", first)
    outer.add_node("inner", inner.compile())
    outer.add_node("last", last)
    outer.add_edge(START, "first")
    outer.add_edge("first", "inner")
    outer.add_edge("inner", "last")
    outer.add_edge("last", END)
    return outer.compile()


def config_of(saver: Any, lease: Lease) -> Any:
    return {
        "configurable": {"thread_id": lease.thread_id, "__pregel_checkpointer": saver},
        "metadata": {"sereno_run": lease.run_id, "sereno_epoch": lease.epoch},
    }


def checkpoint(id: str, step: int = 0) -> tuple[Any, Any]:
    """A checkpoint and its metadata; ids sort as they are made."""
    return (
        {
            "v": 2,
            "id": id,
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": {"n": id},
            "channel_versions": {"n": 1},
            "versions_seen": {},
            "updated_channels": None,
        },
        {"source": "loop", "step": step, "parents": {}},
    )


async def put(saver: Any, id: str, *, thread_id: str = "t1", ns: str = "", step: int = 0) -> Any:
    config = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns}}
    return await saver.aput(config, *checkpoint(id, step), {"n": 1})
