"""The seam alone: what it sees of plain LangGraph graphs, and that these do not notice it."""

from __future__ import annotations

import asyncio
import operator
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any

import pytest
import tenacity
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import NodeTimeoutError
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.pregel import _retry, _runner
from langgraph.pregel._loop import PregelLoop
from langgraph.runtime import RunControl
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from structlog.testing import capture_logs
from typing_extensions import TypedDict

from telemetry import langgraph as seam
from telemetry.langgraph import SeamMismatch, current_attempt, install, listen, uninstall
from telemetry.observations import (
    AttemptEnded,
    AttemptStarted,
    NodeEnded,
    NodeRetrying,
    Observation,
)


class State(TypedDict, total=False):
    x: int
    log: Annotated[list[Any], operator.add]


class Fault(Exception):
    pass


INPUT: Any = {"x": 1, "log": []}
FAST = RetryPolicy(
    initial_interval=0.001,
    backoff_factor=2,
    jitter=False,
    max_attempts=3,
    retry_on=lambda _: True,
)


class Seen:
    """Observations in order, as words, and where each node body found itself to be."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.inside: list[tuple[str, int]] = []

    def __call__(self, seen: Observation) -> None:
        self.all.append(seen)

    def here(self) -> None:
        """Called by a body: which attempt is this?"""
        attempt = current_attempt.get()
        assert attempt is not None
        self.inside.append((attempt.visit.node, attempt.number))

    @property
    def words(self) -> list[str]:
        words = []
        for seen in self.all:
            match seen:
                case AttemptStarted():
                    words.append(f"{seen.visit.node} {seen.attempt} starts")
                case AttemptEnded():
                    words.append(f"{seen.visit.node} {seen.attempt} {seen.outcome}")
                case NodeRetrying():
                    words.append(f"{seen.visit.node} {seen.attempt} retrying")
                case NodeEnded():
                    words.append(f"{seen.visit.node} ends: {seen.outcome} after {seen.attempts}")
        return words

    def check(self) -> None:
        """Each attempt ends once and each visit once, with its number of attempts."""
        starts = [(s.visit, s.attempt) for s in self.all if isinstance(s, AttemptStarted)]
        ends = [(s.visit, s.attempt) for s in self.all if isinstance(s, AttemptEnded)]
        nodes = {s.visit: s.attempts for s in self.all if isinstance(s, NodeEnded)}
        assert len(set(starts)) == len(starts)
        assert sorted(starts, key=repr) == sorted(ends, key=repr)
        assert len(nodes) == sum(isinstance(s, NodeEnded) for s in self.all)
        assert nodes == {
            visit: max(number for other, number in starts if other == visit) for visit, _ in starts
        }


@pytest.fixture
def seen() -> Iterator[Seen]:
    install()
    seen = Seen()
    try:
        with listen(seen):
            yield seen
    finally:
        uninstall()
    assert current_attempt.get() is None
    seen.check()


def chain(*nodes: Any, **compiled: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for name, body, *options in nodes:
        builder.add_node(name, body, **(options[0] if options else {}))
        builder.add_edge(before, name)
        before = name
    return builder.compile(**compiled)


def once(*names: str) -> list[str]:
    """The words of nodes that run one after the other and succeed at once."""
    return [
        word
        for name in names
        for word in (f"{name} 1 starts", f"{name} 1 success", f"{name} ends: success after 1")
    ]


def retried_twice(name: str) -> list[str]:
    return [
        *(
            word
            for number in (1, 2)
            for word in (
                f"{name} {number} starts",
                f"{name} {number} retried",
                f"{name} {number} retrying",
            )
        ),
        f"{name} 3 starts",
        f"{name} 3 success",
        f"{name} ends: success after 3",
    ]


def body(seen: Seen, *, fails: int = 0, error: type[BaseException] = Fault) -> Any:
    left = [error] * fails

    async def node(state: Any) -> Any:
        seen.here()
        if left:
            raise left.pop()
        return {"log": ["done"]}

    return node


def sync_body(seen: Seen, *, fails: int = 0) -> Any:
    left = [Fault] * fails

    def node(state: Any) -> Any:
        seen.here()
        if left:
            raise left.pop()
        return {"log": ["done"]}

    return node


# The scenarios of LANGGRAPH.md §1: graph, and what is to be seen.


def an_async_node(seen: Seen) -> Any:
    return chain(("A", body(seen))), once("A")


def a_sync_node(seen: Seen) -> Any:
    return chain(("A", sync_body(seen))), once("A")


def a_subgraph_as_a_node(seen: Seen) -> Any:
    graph = chain(("SUB", chain(("a", body(seen)))))
    return graph, ["SUB 1 starts", *once("a"), *once("SUB")[1:]]


def a_graph_in_a_function(seen: Seen) -> Any:
    sub = chain(("a", body(seen)))

    async def outer(state: State) -> Any:
        found = await sub.ainvoke(INPUT)
        seen.here()
        return found

    return chain(("OUT", outer)), ["OUT 1 starts", *once("a"), *once("OUT")[1:]]


def a_sync_graph_in_a_function(seen: Seen) -> Any:
    sub = chain(("a", sync_body(seen)))
    graph = chain(("OUT", lambda state: sub.invoke(INPUT)))
    return graph, ["OUT 1 starts", *once("a"), *once("OUT")[1:]]


def a_functional_graph(seen: Seen) -> Any:
    @task
    async def one(x: int) -> int:
        seen.here()
        return x

    @task
    def two(x: int) -> int:
        seen.here()
        return x

    @entrypoint()
    async def graph(_: Any) -> int:
        return await one(1) + await two(2)

    return graph, ["graph 1 starts", *once("one", "two"), *once("graph")[1:]]


def a_retried_node(seen: Seen) -> Any:
    return chain(("F", body(seen, fails=2), {"retry_policy": FAST})), retried_twice("F")


def a_retried_sync_node(seen: Seen) -> Any:
    return chain(("F", sync_body(seen, fails=2), {"retry_policy": FAST})), retried_twice("F")


def tenacity_in_a_node(seen: Seen) -> Any:
    inner = body(seen, fails=2)
    call = tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())(inner)

    async def node(state: State) -> Any:
        return await call(state)

    return chain(("F", node)), once("F")


def a_command(seen: Seen) -> Any:
    async def route(state: State) -> Command[str]:
        return Command(goto="G")

    builder = StateGraph(State)
    builder.add_node("F", route, destinations=("G",))
    builder.add_node("G", body(seen))
    builder.add_edge(START, "F")
    return builder.compile(), once("F", "G")


def a_command_to_the_parent(seen: Seen) -> Any:
    async def up(state: State) -> Command[str]:
        return Command(graph=Command.PARENT, goto="G")

    builder = StateGraph(State)
    builder.add_node("SUB", chain(("a", up)), destinations=("G",))
    builder.add_node("G", body(seen))
    builder.add_edge(START, "SUB")
    return builder.compile(), ["SUB 1 starts", *once("a"), *once("SUB")[1:], *once("G")]


def a_timed_out_node(seen: Seen) -> Any:
    calls: list[None] = []

    async def node(state: State) -> Any:
        calls.append(None)
        if len(calls) == 1:
            await asyncio.Event().wait()
        seen.here()
        return {"log": ["done"]}

    return chain(("F", node, {"timeout": 0.01, "retry_policy": FAST})), [
        "F 1 starts",
        "F 1 retried",
        "F 1 retrying",
        "F 2 starts",
        "F 2 success",
        "F ends: success after 2",
    ]


def a_deferred_node(seen: Seen) -> Any:
    builder = StateGraph(State)
    builder.add_node("A", body(seen))
    builder.add_node("D", sync_body(seen), defer=True)
    builder.add_edge(START, "A")
    builder.add_edge(START, "D")
    return builder.compile(), once("A", "D")


def an_error_handler(seen: Seen) -> Any:
    graph = chain(("F", body(seen, fails=1), {"error_handler": body(seen)}))
    return graph, [
        "F 1 starts",
        "F 1 failed",
        "F ends: error after 1",
        *once("__error_handler__F"),
    ]


@pytest.mark.parametrize(
    "scenario",
    [
        an_async_node,
        a_sync_node,
        a_subgraph_as_a_node,
        a_graph_in_a_function,
        a_sync_graph_in_a_function,
        a_functional_graph,
        a_retried_node,
        a_retried_sync_node,
        tenacity_in_a_node,
        a_command,
        a_command_to_the_parent,
        a_timed_out_node,
        a_deferred_node,
        an_error_handler,
    ],
    ids=lambda scenario: scenario.__name__,
)
@pytest.mark.parametrize("saver", [False, True], ids=["", "with a saver"])
async def test_each_attempt_of_each_node_is_seen(
    scenario: Callable[[Seen], Any], saver: bool, seen: Seen
) -> None:
    graph, expected = scenario(seen)
    if saver:
        graph.checkpointer = InMemorySaver()
    await graph.ainvoke(INPUT, {"configurable": {"thread_id": str(uuid.uuid4())}})

    assert seen.words == expected
    starts = {(s.visit.node, s.attempt) for s in seen.all if isinstance(s, AttemptStarted)}
    assert seen.inside
    assert set(seen.inside) <= starts


@pytest.mark.parametrize(
    "scenario",
    [a_sync_node, a_sync_graph_in_a_function, a_retried_sync_node],
    ids=lambda scenario: scenario.__name__,
)
def test_a_graph_that_is_invoked_without_a_loop_is_seen_too(
    scenario: Callable[[Seen], Any], seen: Seen
) -> None:
    graph, expected = scenario(seen)
    graph.invoke(INPUT)

    assert seen.words == expected


async def test_each_send_is_a_visit(seen: Seen) -> None:
    builder = StateGraph(State)
    builder.add_node("W", body(seen))
    builder.add_conditional_edges(START, lambda _: [Send("W", {"x": i}) for i in range(3)])
    await builder.compile().ainvoke(INPUT)

    assert sorted(seen.words) == sorted(once("W", "W", "W"))
    assert len({s.visit for s in seen.all}) == 3


async def test_parallel_branches_are_in_their_own_attempts(seen: Seen) -> None:
    barrier = asyncio.Barrier(2)

    async def node(state: State) -> Any:
        await barrier.wait()
        seen.here()
        await barrier.wait()
        seen.here()
        return {}

    builder = StateGraph(State)
    for name in "AB":
        builder.add_node(name, node)
        builder.add_edge(START, name)
    await builder.compile().ainvoke(INPUT)

    assert sorted(seen.inside) == [("A", 1), ("A", 1), ("B", 1), ("B", 1)]


async def test_tools_run_in_their_nodes_attempt(seen: Seen) -> None:
    @tool
    async def in_the_loop(q: str) -> str:
        """A tool."""
        seen.here()
        return q

    @tool
    def in_a_thread(q: str) -> str:
        """A tool."""
        seen.here()
        return q

    builder = StateGraph(MessagesState)
    builder.add_node("tools", ToolNode([in_the_loop, in_a_thread]))
    builder.add_edge(START, "tools")
    calls = [
        {"name": name, "args": {"q": "q"}, "id": name} for name in ("in_the_loop", "in_a_thread")
    ]
    await builder.compile().ainvoke({"messages": [AIMessage("", tool_calls=calls)]})

    assert seen.inside == [("tools", 1), ("tools", 1)]
    assert seen.words == once("tools")


async def test_an_interrupt_is_an_outcome_and_the_answer_a_new_visit(seen: Seen) -> None:
    async def asks(state: State) -> Any:
        return {"log": [interrupt("?")]}

    graph = chain(("A", asks), checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "t"}}
    await graph.ainvoke(INPUT, config)
    interrupted = list(seen.all)
    seen.all.clear()
    await graph.ainvoke(Command(resume="!"), config)

    assert [type(s).__name__ for s in interrupted] == [
        "AttemptStarted",
        "AttemptEnded",
        "NodeEnded",
    ]
    assert (interrupted[1].outcome, interrupted[2].outcome) == ("interrupted", "interrupted")
    assert interrupted[1].error is None
    assert seen.words == once("A")
    assert seen.all[0].visit == interrupted[0].visit


async def test_a_cached_node_is_not_seen(seen: Seen) -> None:
    graph = chain(("A", body(seen), {"cache_policy": CachePolicy()}), cache=InMemoryCache())
    await graph.ainvoke(INPUT)
    await graph.ainvoke(INPUT)

    assert seen.words == once("A")


async def cancelled(call: Awaitable[Any], seen: Seen, word: str) -> None:
    running = asyncio.ensure_future(call)
    while word not in seen.words:  # noqa: ASYNC110
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside another"])
async def test_a_cancelled_node_is_cancelled(others: int, seen: Seen) -> None:
    async def waits(state: State) -> Any:
        await asyncio.Event().wait()

    builder = StateGraph(State)
    for name in "AB"[: 1 + others]:
        builder.add_node(name, waits, retry_policy=FAST)
        builder.add_edge(START, name)
    await cancelled(builder.compile().ainvoke(INPUT), seen, f"{'AB'[others]} 1 starts")

    assert {s.outcome for s in seen.all if isinstance(s, AttemptEnded | NodeEnded)} == {"cancelled"}


async def test_a_back_off_that_is_cancelled_leaves_the_attempt_retried(seen: Seen) -> None:
    policy = RetryPolicy(initial_interval=3600, max_interval=3600, jitter=False, retry_on=Fault)
    graph = chain(("F", body(seen, fails=9), {"retry_policy": policy}))
    await cancelled(graph.ainvoke(INPUT), seen, "F 1 retrying")

    assert seen.words == [
        "F 1 starts",
        "F 1 retried",
        "F 1 retrying",
        "F ends: cancelled after 1",
    ]


async def test_a_superstep_that_times_out_cancels_its_nodes(seen: Seen) -> None:
    async def waits(state: State) -> Any:
        await asyncio.Event().wait()

    graph = chain(("A", waits))
    graph.step_timeout = 0.01
    with pytest.raises(TimeoutError):
        await graph.ainvoke(INPUT)

    assert seen.words == ["A 1 starts", "A 1 cancelled", "A ends: cancelled after 1"]


async def test_a_node_timeout_without_a_policy_is_a_failure(seen: Seen) -> None:
    async def waits(state: State) -> Any:
        await asyncio.Event().wait()

    with pytest.raises(NodeTimeoutError):
        await chain(("A", waits, {"timeout": 0.01})).ainvoke(INPUT)

    assert seen.words == ["A 1 starts", "A 1 failed", "A ends: error after 1"]
    assert isinstance(seen.all[1].error, NodeTimeoutError)


async def test_a_drain_is_neither_an_error_nor_a_success(seen: Seen) -> None:
    control = RunControl()

    async def first(state: State) -> Any:
        control.request_drain("shutdown")
        return {}

    sub = chain(("a", first), ("b", body(seen)))
    with pytest.raises(Exception, match="shutdown"):
        await chain(("SUB", sub)).ainvoke(INPUT, control=control)

    assert seen.words == [
        "SUB 1 starts",
        *once("a"),
        "SUB 1 cancelled",
        "SUB ends: drained after 1",
    ]


@pytest.mark.parametrize("fails", [3, 1], ids=["used up", "none matches"])
async def test_exhausted_and_failed_are_told_apart(fails: int, seen: Seen) -> None:
    policy = FAST if fails == 3 else RetryPolicy(retry_on=ConnectionError)
    with pytest.raises(Fault):
        await chain(("F", body(seen, fails=9), {"retry_policy": policy})).ainvoke(INPUT)

    outcome = "exhausted" if fails == 3 else "failed"
    assert seen.words[-2:] == [f"F {fails} {outcome}", f"F ends: error after {fails}"]


async def test_the_numbers_of_a_retry_are_those_of_the_policy(seen: Seen) -> None:
    policy = RetryPolicy(
        initial_interval=0.001, backoff_factor=5, max_interval=0.003, jitter=False, retry_on=Fault
    )
    await chain(("F", body(seen, fails=2), {"retry_policy": policy})).ainvoke(INPUT)

    retries = [s for s in seen.all if isinstance(s, NodeRetrying)]
    assert [(s.retry_in_s, s.jitter_s, s.max_attempts) for s in retries] == [
        (0.001, 0.0, 3),
        (0.003, 0.0, 3),
    ]


async def test_a_policy_that_raises_fails_the_node_as_without_us(seen: Seen) -> None:
    def broken(error: Exception) -> bool:
        raise RuntimeError("broken policy")

    graph = chain(("F", body(seen, fails=1), {"retry_policy": RetryPolicy(retry_on=broken)}))
    with pytest.raises(RuntimeError, match="broken policy"):
        await graph.ainvoke(INPUT)

    assert seen.words == ["F 1 starts", "F 1 failed", "F ends: error after 1"]


async def test_a_visit_says_where_it_is(seen: Seen) -> None:
    inner = chain(("a", body(seen)), ("b", body(seen)))
    await chain(("A", body(seen)), ("SUB", chain(("MID", inner)))).ainvoke(INPUT)

    visits = {s.visit.node: s.visit for s in seen.all}
    assert visits["A"].path == visits["A"].ns == ()
    assert visits["b"].ns == ("SUB", "MID")
    assert visits["b"].path == (visits["SUB"].task, visits["MID"].task)
    assert (visits["SUB"].step, visits["a"].step, visits["b"].step) == (2, 1, 2)


async def test_twenty_runs_at_once_do_not_mix(seen: Seen) -> None:
    graph = chain(("A", body(seen)), ("B", sync_body(seen)))
    await asyncio.gather(*(graph.ainvoke(INPUT) for _ in range(20)))

    assert sorted(seen.words) == sorted(once("A", "B") * 20)
    assert len({s.visit.task for s in seen.all}) == 40


async def test_older_event_protocols_are_seen(seen: Seen) -> None:
    async def node(state: State) -> Any:
        return {"log": ["done"]}

    graph = chain(("A", node))
    async for _ in graph.astream_events(INPUT, version="v2"):
        pass

    assert [word for word in seen.words if "starts" not in word] == once("A")[1:]


# Installing.


def patched() -> dict[str, Any]:
    return {
        "arun": _runner.arun_with_retry,  # type: ignore[attr-defined]
        "run": _runner.run_with_retry,  # type: ignore[attr-defined]
        "timeout": _retry._arun_with_timeout,
        "writes": PregelLoop.output_writes,
        "superstep": PregelLoop.after_tick,
    }


def test_installing_twice_is_installing_once_and_uninstalling_restores() -> None:
    before = patched()
    install()
    once_installed = patched()
    install()
    twice_installed = patched()
    uninstall()

    assert all(before[name] is not once_installed[name] for name in before)
    assert twice_installed == once_installed
    assert patched() == before


@pytest.mark.parametrize(
    ("owner", "name"), list(seam._EXPECTED), ids=[name for _, name in seam._EXPECTED]
)
@pytest.mark.parametrize("gone", [False, True], ids=["other parameters", "gone"])
def test_a_langgraph_that_we_do_not_know_is_refused_and_left_alone(
    owner: Any, name: str, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gone:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, lambda other: None)
    before = {key: getattr(*key, None) for key in seam._EXPECTED}

    with pytest.raises(SeamMismatch, match=name):
        install()
    assert {key: getattr(*key, None) for key in seam._EXPECTED} == before


async def test_an_uninstalled_seam_sees_nothing() -> None:
    install()
    uninstall()
    seen = Seen()
    with listen(seen):
        await chain(("A", lambda state: {"log": []})).ainvoke(INPUT)

    assert seen.all == []


async def test_listeners_that_raise_never_disturb_a_run(seen: Seen) -> None:
    def broken(_: Observation) -> None:
        raise RuntimeError("broken listener")

    after = Seen()
    graph = chain(("F", body(seen, fails=2), {"retry_policy": FAST}))
    with capture_logs() as logs, listen(broken), listen(after):
        found = await graph.ainvoke(INPUT)

    assert found["log"] == ["done"]
    assert seen.words == after.words == retried_twice("F")
    assert {entry["event"] for entry in logs} == {"Listener failed"}
