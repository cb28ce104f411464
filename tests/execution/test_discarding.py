"""Whatever fails and is done again: a reader that discards as it is told ends with the output of a
run in which nothing failed."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
import tenacity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.config import get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy, Send, interrupt
from reader import Reader
from run_lines import Clock, Line, Lines, check_one, run, serving, until
from small_graphs import Fault, Speaker, State, always, beside, chain
from tenacity import AsyncRetrying, retry, stop_after_attempt

from runtime.engines.memory import MemoryEngine, Store
from runtime.errors import LeaseLost
from runtime.events import Event, Sealer
from runtime.model import Lease

INPUT = {"x": 1, "log": []}
TEN = RetryPolicy(initial_interval=0, jitter=False, max_attempts=10, retry_on=always)
RETRIED = {"retry_policy": TEN}
TWICE = [(0, 1), (3, 2)]


async def asleep(seconds: float) -> None:
    """A back-off that takes no time."""


def within(at: Callable[[int], None]) -> Callable[[int], None]:
    """A fault of a model: place 1 is before its third word."""

    def fault(word: int) -> None:
        if word == 2:
            at(1)

    return fault


class Plan:
    """Which calls fail, and where: name → the place (0 to 3) of each failure, in turn."""

    def __init__(self, faults: dict[str, Sequence[int]] | None = None) -> None:
        self.left = {name: list(places) for name, places in (faults or {}).items()}

    def begin(self, name: str) -> Callable[[int], None]:
        """One call of `name`; what is returned is called at each place."""
        left = self.left.get(name)
        where = left.pop(0) if left else None

        def at(place: int) -> None:
            if place == where:
                raise Fault(f"{name} at {place}")

        return at

    def node(self, name: str) -> Any:
        """Writes, speaks, writes again."""

        async def body(state: State) -> State:
            at, write = self.begin(name), get_stream_writer()
            at(0)
            write(f"{name} begins")
            await Speaker(text=f"{name} says something", fault=within(at)).ainvoke("hi")
            at(2)
            write(f"{name} ends")
            at(3)
            return {"log": [name]}

        return body

    def call(self, name: str) -> Any:
        """A retried call of a model, to be awaited."""

        @retry(stop=stop_after_attempt(10), sleep=asleep, reraise=True)
        async def speak() -> Any:
            at = self.begin(name)
            at(0)
            answer = await Speaker(text=f"{name} answers something", fault=within(at)).ainvoke("hi")
            at(2)
            return answer

        return speak


# Each layer that calls again.


def retried_node(plan: Plan) -> Any:
    return chain(("A", plan.node("A"), RETRIED), ("B", plan.node("B"), RETRIED))


def parallel_nodes(plan: Plan) -> Any:
    return beside(*((name, plan.node(name), RETRIED) for name in "AB"))


def subgraph_under_a_retry(plan: Plan) -> Any:
    return chain(("SUB", chain(("A", plan.node("A")), ("B", plan.node("B"))), RETRIED))


def parallel_subgraph_under_a_retry(plan: Plan) -> Any:
    return chain(("SUB", beside(("A", plan.node("A")), ("B", plan.node("B"))), RETRIED))


def subgraph_in_a_function(plan: Plan) -> Any:
    sub = chain(("A", plan.node("A")), ("B", plan.node("B")))

    async def calls(state: State) -> State:
        get_stream_writer()("calls")
        found = await sub.ainvoke(INPUT)
        return {"log": found["log"]}

    return chain(("OUT", calls, RETRIED))


def retries_in_retries(plan: Plan) -> Any:
    """An inner node is retried, and so is the subgraph around it."""
    sub = chain(("A", plan.node("A"), RETRIED), ("B", plan.node("B")))
    return chain(("SUB", sub, RETRIED))


def calls_side_by_side(plan: Plan) -> Any:
    async def calls(state: State) -> State:
        await asyncio.gather(plan.call("A")(), plan.call("B")())
        return {"log": ["done"]}

    return chain(("N", calls))


def a_call_in_a_retried_node(plan: Plan) -> Any:
    async def calls(state: State) -> State:
        await plan.call("A")()
        at = plan.begin("B")
        at(0)
        get_stream_writer()("called")
        at(3)
        return {"log": ["done"]}

    return chain(("N", calls, RETRIED))


def calls_in_calls(plan: Plan) -> Any:
    async def calls(state: State) -> State:
        async for attempt in AsyncRetrying(stop=stop_after_attempt(10), sleep=asleep, reraise=True):
            with attempt:
                await plan.call("A")()
                plan.begin("B")(0)
        return {"log": ["done"]}

    return chain(("N", calls))


LAYERS = [
    retried_node,
    parallel_nodes,
    subgraph_under_a_retry,
    parallel_subgraph_under_a_retry,
    subgraph_in_a_function,
    retries_in_retries,
    calls_side_by_side,
    a_call_in_a_retried_node,
    calls_in_calls,
]


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("failing", ["A", "B", "both"])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (3,), (1, 2), (3, 1)], ids=str)
async def test_what_failed_is_discarded(make: Any, failing: str, places: Sequence[int]) -> None:
    faults = {name: places for name in "AB" if failing in (name, "both")}
    smooth = await run(make(Plan()), INPUT)
    rough = await run(make(Plan(faults)), INPUT)

    assert Reader(rough.all).output == Reader(smooth.all).output
    assert rough.last["type"] == "run.completed"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    make=st.sampled_from(LAYERS),
    faults=st.fixed_dictionaries({name: st.lists(st.integers(0, 3), max_size=3) for name in "AB"}),
)
def test_any_plan_of_failures_gives_the_undisturbed_output(
    make: Any, faults: dict[str, list[int]]
) -> None:
    async def both() -> tuple[Lines, Lines]:
        return await run(make(Plan()), INPUT), await run(make(Plan(faults)), INPUT)

    smooth, rough = asyncio.run(both())

    assert Reader(rough.all).output == Reader(smooth.all).output


async def test_only_the_call_that_is_repeated_loses_its_message() -> None:
    lines = await run(calls_side_by_side(Plan({"A": [1]})), INPUT)

    retrying = lines.one("call.retrying")
    (superseded,) = retrying["data"]["message_ids"]
    assert superseded in {line["data"]["message_id"] for line in lines.of("token")}
    assert superseded not in Reader(lines.all).messages
    assert len(Reader(lines.all).messages) == 2


# The retries of an issue: a node that fails twice, and in it a call that fails twice.


async def test_retry_lines_are_in_order_and_before_their_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []
    seal, sleep = Sealer.seal, asyncio.sleep

    def sealed(self: Sealer, type: str, **kwargs: Any) -> Event:
        happened.append(type)
        return seal(self, type, **kwargs)

    async def slept(seconds: float, *_: Any) -> None:
        if seconds:
            happened.append(f"sleep {seconds:g}")
        await sleep(0)

    monkeypatch.setattr(Sealer, "seal", sealed)
    monkeypatch.setattr(asyncio, "sleep", slept)
    plan = Plan({"call": [1, 1], "node": [3, 3]})

    async def node(state: State) -> State:
        at = plan.begin("node")

        @retry(stop=stop_after_attempt(4), wait=tenacity.wait_incrementing(5, 5), reraise=True)
        async def call() -> None:
            fail = plan.begin("call")
            await Speaker(text="one two three", fault=within(fail)).ainvoke("hi")

        await call()
        at(3)
        return {"log": ["done"]}

    policy = RetryPolicy(
        initial_interval=7, backoff_factor=3, jitter=False, max_attempts=3, retry_on=Fault
    )
    lines = await run(chain(("N", node, {"retry_policy": policy})), INPUT, stream=["messages"])

    assert [word for word in happened if word not in ("token", "message")] == [
        "run.queued",
        "run.started",
        "node.started",
        "call.retrying",
        "sleep 5",
        "call.retrying",
        "sleep 10",
        "node.retrying",
        "sleep 7",
        "node.started",
        "node.retrying",
        "sleep 21",
        "node.started",
        "node.completed",
        "run.completed",
    ]
    starts = [line["seq"] for line in lines.of("node.started")]
    assert [
        (line["attempt"], line["data"]["retry_in_ms"], line["data"]["discard_from"])
        for line in lines.of("node.retrying")
    ] == [(1, 7000.0, starts[0]), (2, 21000.0, starts[1])]
    assert {line["data"]["max_attempts"] for line in lines.of("node.retrying")} == {3}
    calls = lines.of("call.retrying")
    assert [
        (line["attempt"], line["data"]["attempt"], line["data"]["retry_in_ms"]) for line in calls
    ] == [(1, 1, 5000.0), (1, 2, 10000.0)]
    assert len({line["data"]["message_ids"][0] for line in calls}) == 2
    assert {line["data"]["error_type"] for line in calls} == {"Fault"}
    assert calls[0]["data"]["call"].endswith("node.<locals>.call")
    assert lines.last["data"]["retries"] == 4
    assert [text for _, text in Reader(lines.all).messages.values()] == ["one two three"]


async def test_a_message_with_an_id_of_its_own_comes_again_after_a_retry() -> None:
    """The same id in both attempts: the first one's tokens go, the second one's stay."""
    plan = Plan({"A": [1]})

    async def node(state: State) -> State:
        at = plan.begin("A")
        answer = await Speaker(text="one two three", fault=within(at), id="mine").ainvoke("hi")
        return {"log": [answer]}

    lines = await run(chain(("A", node, RETRIED)), INPUT)

    assert Reader(lines.all).messages == {"mine": ("A", "one two three")}


# Crashes.


class Dying(MemoryEngine):
    """Takes that many writes of lines and checkpoints, and none after: its process has died."""

    def __init__(self, *, writes: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.left = writes
        self.taken = 0

    @property
    def dead(self) -> bool:
        return self.left is not None and self.taken >= self.left

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        if self.dead:
            refused = asyncio.get_running_loop().create_future()
            refused.set_exception(LeaseLost(lease.run_id, lease.epoch))
            return refused
        self.taken += 1
        return super().append(lease, events)

    def checkpoint_written(self, lease: Lease, *, progress: bool) -> None:
        if self.dead:
            raise LeaseLost(lease.run_id, lease.epoch)
        self.taken += 1
        super().checkpoint_written(lease, progress=progress)


async def crashing(graph: Any, kills: Sequence[int], **request: Any) -> tuple[list[Line], int]:
    """Run a graph in one process after the other; each but the last dies after that many writes.

    The lines, and how many writes the last process took.
    """
    store, clock = Store(), Clock()
    for writes in (*kills, None):
        engine = Dying(writes=writes, store=store, clock=clock)
        async with serving(graph, engine=engine, clock=clock) as server:
            if not store.runs:
                await server.submit(INPUT, **request)
            (run_id,) = store.runs
            await until(functools.partial(over, engine, store, run_id))
        clock.now += 3600
        if store.runs[run_id].terminal is not None:
            break
    return [orjson.loads(line.body) for line in store.lines[run_id]], engine.taken


def over(engine: Dying, store: Store, run_id: str) -> bool:
    return engine.dead or store.runs[run_id].terminal is not None


def one_after_the_other(plan: Plan) -> Any:
    return chain(("A", plan.node("A")), ("B", plan.node("B")))


def side_by_side(plan: Plan) -> Any:
    return beside(("A", plan.node("A")), ("B", plan.node("B")))


def sends(plan: Plan) -> Any:
    builder = StateGraph(State)

    async def worker(state: State) -> State:
        return await plan.node(f"W{state['x']}")(state)  # type: ignore[no-any-return]

    builder.add_node("W", worker)
    builder.add_conditional_edges(START, lambda _: [Send("W", {"x": i}) for i in range(3)])
    return builder.compile()


def subgraph(plan: Plan) -> Any:
    sub = chain(("A", plan.node("A")), ("B", plan.node("B")))
    return chain(("SUB", sub), ("C", plan.node("C")))


def subgraphs_in_a_function(plan: Plan) -> Any:
    """The second of them has no checkpoint yet when the first one's last is there."""
    first = chain(("A", plan.node("A")), ("B", plan.node("B")))
    second = chain(("C", plan.node("C")), ("D", plan.node("D")))

    async def calls(state: State) -> State:
        await first.ainvoke(INPUT)
        await second.ainvoke(INPUT)
        return {"log": ["done"]}

    return chain(("OUT", calls))


def subgraphs_at_once(plan: Plan) -> Any:
    subs = [chain((a, plan.node(a)), (b, plan.node(b))) for a, b in ("AB", "CD")]

    async def calls(state: State) -> State:
        await asyncio.gather(*(sub.ainvoke(INPUT) for sub in subs))
        return {"log": ["done"]}

    return chain(("OUT", calls))


def functional(plan: Plan) -> Any:
    @task
    async def step(name: str) -> str:
        await plan.node(name)(INPUT)
        return name

    @entrypoint()
    async def graph(_: Any) -> Any:
        return [*await asyncio.gather(step("A"), step("B")), await step("C")]

    return graph


def handled(plan: Plan) -> Any:
    async def fails(state: State) -> State:
        get_stream_writer()("fails")
        raise Fault

    return chain(("F", fails, {"error_handler": plan.node("H")}), ("B", plan.node("B")))


CRASHED: list[Any] = [
    one_after_the_other,
    side_by_side,
    sends,
    subgraph,
    subgraphs_in_a_function,
    subgraphs_at_once,
    functional,
    handled,
    retried_node,
    calls_side_by_side,
]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("make", CRASHED, ids=lambda make: make.__name__)
async def test_a_crash_at_any_write_leaves_the_undisturbed_output(
    make: Any, durability: str
) -> None:
    await crash_everywhere(lambda: make(Plan()), lambda: make(Plan()), durability=durability)


async def crash_everywhere(
    smooth: Callable[[], Any], rough: Callable[[], Any], **request: Any
) -> None:
    lines, _ = await crashing(smooth(), [], **request)
    expected = Reader(lines).output
    _, writes = await crashing(rough(), [], **request)
    for kill in range(writes):
        lines, _ = await crashing(rough(), [kill], **request)

        assert lines[-1]["type"] == "run.completed", kill
        assert Reader(lines).output == expected, kill
        check_one(Lines(lines))


async def test_a_crash_in_a_second_attempt_of_a_subgraph() -> None:
    def graph(plan: Plan) -> Any:
        sub = chain(*((name, plan.node(name)) for name in "ABC"))
        return chain(("SUB", sub, RETRIED))

    await crash_everywhere(lambda: graph(Plan()), lambda: graph(Plan({"B": [1]})))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    make=st.sampled_from([retried_node, parallel_nodes, calls_side_by_side, subgraphs_at_once]),
    faults=st.fixed_dictionaries({name: st.lists(st.integers(0, 3), max_size=2) for name in "AB"}),
    kills=st.lists(st.integers(0, 30), max_size=2),
)
def test_failures_and_crashes_together_leave_the_undisturbed_output(
    make: Any, faults: dict[str, list[int]], kills: list[int]
) -> None:
    faults = {} if make is subgraphs_at_once else faults

    async def both() -> tuple[list[Line], list[Line]]:
        smooth, _ = await crashing(make(Plan()), [])
        rough, _ = await crashing(make(Plan(faults)), kills)
        return smooth, rough

    smooth, rough = asyncio.run(both())

    assert Reader(rough).output == Reader(smooth).output
    check_one(Lines(rough))


async def asks(state: State) -> State:
    get_stream_writer()("asks")
    return {"log": [interrupt("?")]}


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(lambda plan: chain(("A", plan.node("A")), ("Q", asks)), id="interrupt"),
        pytest.param(lambda plan: beside(("A", plan.node("A")), ("Q", asks)), id="beside another"),
        pytest.param(lambda plan: chain(("SUB", chain(("Q", asks)))), id="in a subgraph"),
        pytest.param(
            lambda plan: chain(
                ("A", plan.node("A")), ("B", plan.node("B")), interrupt_before=["B"]
            ),
            id="breakpoint before",
        ),
        pytest.param(
            lambda plan: chain(("A", plan.node("A")), ("B", plan.node("B")), interrupt_after=["A"]),
            id="breakpoint after",
        ),
    ],
)
async def test_a_crash_at_any_write_asks_the_same_question(stop: Any, durability: str) -> None:
    smooth, writes = await crashing(stop(Plan()), [], durability=durability)
    questions = [question["value"] for question in smooth[-1]["data"]["interrupts"]]
    for kill in range(writes):
        lines, _ = await crashing(stop(Plan()), [kill], durability=durability)

        data = lines[-1]["data"]
        assert data["status"] == "interrupted", (kill, data)
        assert [question["value"] for question in data["interrupts"]] == questions, kill
        assert data["next"] == smooth[-1]["data"]["next"], kill
        assert Reader(lines).output == Reader(smooth).output, kill
        check_one(Lines(lines))


# Drains.


async def draining(graph: Any, after: int, **request: Any) -> list[Line]:
    """Run a graph in a process that is told to end after that many writes, and in the next one."""
    store, clock = Store(), Clock()
    for writes in (after, None):
        engine = Dying(store=store, clock=clock)
        async with serving(graph, engine=engine, clock=clock) as server:
            if not store.runs:
                await server.submit(INPUT, **request)
            (run_id,) = store.runs
            await until(
                lambda engine=engine, writes=writes, run_id=run_id: (
                    over(engine, store, run_id) or (writes is not None and engine.taken >= writes)
                )
            )
    return [orjson.loads(line.body) for line in store.lines[run_id]]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("make", CRASHED, ids=lambda make: make.__name__)
async def test_a_drain_at_any_write_leaves_the_undisturbed_output(
    make: Any, durability: str
) -> None:
    smooth, writes = await crashing(make(Plan()), [], durability=durability)
    for after in range(writes):
        lines = await draining(make(Plan()), after, durability=durability)

        assert lines[-1]["type"] == "run.completed", after
        assert Reader(lines).output == Reader(smooth).output, after
        check_one(Lines(lines))
