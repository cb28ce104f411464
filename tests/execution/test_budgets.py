"""What a run may write, and what becomes of it when its lines cannot be written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from langgraph.config import get_stream_writer
from run_lines import Lines, check_one, run, serving
from small_graphs import Speaker, State, chain

from runtime.engines.memory import MemoryEngine
from runtime.errors import StorageFailed
from runtime.events import Event
from runtime.model import Lease

INPUT = {"x": 1, "log": []}
LIMIT = {
    "code": "log_limit",
    "error_class": "other",
    "error_type": "LogLimit",
}


def writing(times: int, value: Any = "value") -> Any:
    async def node(state: State) -> State:
        write = get_stream_writer()
        for number in range(times):
            write((number, value))
        await asyncio.sleep(0)
        return {"log": ["done"]}

    return node


def writing_in_a_thread(times: int, value: Any = "value") -> Any:
    def node(state: State) -> State:
        write = get_stream_writer()
        for number in range(times):
            write((number, value))
        return {"log": ["done"]}

    return node


class Slow(MemoryEngine):
    """Says a while later that lines are written; knows how many it has not said it of."""

    def __init__(self) -> None:
        super().__init__()
        self.open = 0
        self.most = 0

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        written = super().append(lease, events)
        self.open += len(events)
        self.most = max(self.most, self.open)

        def tell(turns: int) -> None:
            if turns:
                loop.call_soon(tell, turns - 1)
                return
            self.open -= len(events)
            if (error := written.exception()) is not None:
                told.set_exception(error)
            else:
                told.set_result(None)

        tell(20)
        return told


class Refusing(Slow):
    """Refuses the lines that come when a node is done for the first time."""

    refused = 0

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        if not self.refused and any(event.type == "node.completed" for event in events):
            self.refused += 1
            future = asyncio.get_running_loop().create_future()
            future.set_exception(StorageFailed("disk is full"))
            return future
        return super().append(lease, events)


async def test_a_run_with_too_many_lines_fails_and_its_log_stays_readable() -> None:
    lines = await run(chain(("A", writing(100))), INPUT, settings={"run_max_events": 20})

    assert lines.last["seq"] == 21
    assert lines.last["data"]["error"] == LIMIT
    assert [line["data"]["value"][0] for line in lines.of("custom")] == list(range(16))


async def test_tokens_count_as_lines() -> None:
    async def speaks(state: State) -> State:
        for _ in range(10):
            await Speaker().ainvoke("hi")
        return {}

    lines = await run(chain(("A", speaks)), INPUT, settings={"run_max_events": 10})

    assert lines.last["data"]["error"] == LIMIT
    assert lines.last["seq"] == 11


async def test_a_run_with_too_many_bytes_fails() -> None:
    graph = chain(("A", writing(100, "x" * 1000)))
    lines = await run(graph, INPUT, settings={"run_max_log_bytes": 10_000})

    assert lines.last["data"]["error"] == LIMIT
    assert len(lines.of("custom")) < 12


async def test_an_async_node_that_writes_faster_than_the_store_fails_its_run() -> None:
    settings = {"run_max_unwritten": 10, "engine": Slow()}
    lines = await run(chain(("A", writing(100))), INPUT, settings=settings)

    assert lines.last["data"]["error"] == LIMIT


async def test_a_sync_node_waits_for_the_store_and_its_run_succeeds() -> None:
    engine = Slow()
    settings = {"run_max_unwritten": 10, "engine": engine}
    lines = await run(chain(("A", writing_in_a_thread(100))), INPUT, settings=settings)

    assert lines.last["type"] == "run.completed"
    assert [line["data"]["value"][0] for line in lines.of("custom")] == list(range(100))
    assert engine.most <= 10


async def test_a_thread_that_waits_for_a_run_that_has_ended_goes_on() -> None:
    left = threading.Event()

    def node(state: State) -> State:
        write = get_stream_writer()
        for number in range(1000):
            write(number)
        left.set()
        return {}

    settings = {"run_max_events": 20, "run_max_unwritten": 5, "cancel_grace_s": 0}
    async with serving(chain(("A", node)), engine=Slow(), **settings) as server:
        lines = Lines(await server.execute(INPUT))
        await asyncio.to_thread(left.wait)
    check_one(lines)

    assert lines.last["data"]["error"] == LIMIT


async def test_lines_that_the_store_refused_are_written_with_the_last_one() -> None:
    """The lines behind a refused batch are refused as well: they would leave a gap."""
    engine = Refusing()
    graph = chain(("A", writing(3)), ("B", writing(3)))
    lines = await run(graph, INPUT, settings={"engine": engine})

    assert engine.refused == 1
    assert lines.last["data"]["error"]["code"] == "storage"
    assert lines.last["data"]["error"]["error_type"] == "StorageFailed"
    assert lines.one("node.completed", "A")


async def test_a_run_that_the_store_fails_at_its_end_still_ends() -> None:
    class AtTheEnd(Slow):
        refused = 0

        def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
            if not self.refused and events[-1].type == "run.completed":
                self.refused += 1
                future = asyncio.get_running_loop().create_future()
                future.set_exception(StorageFailed("disk is full"))
                return future
            return super().append(lease, events)

    lines = await run(chain(("A", writing(1))), INPUT, settings={"engine": AtTheEnd()})

    assert lines.last["type"] == "run.completed"
