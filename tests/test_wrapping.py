"""Wrapped graphs: what is seen of them without the seam; the user's graph stays as it is."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_seam as seam
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphDrained
from langgraph.graph import START, StateGraph
from langgraph.pregel import Pregel
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import Runtime
from langgraph.types import CachePolicy, RetryPolicy, Send
from structlog.testing import capture_logs
from test_seam import FAST, INPUT, Fault, Seen, State, body, cancelled, chain, once, retried_twice

from telemetry import wrapping
from telemetry.langgraph import current_attempt
from telemetry.observations import (
    ATTEMPTS,
    AttemptEnded,
    AttemptStarted,
    NodeEnded,
    NodeWrote,
    current_listener,
)
from telemetry.wrapping import wrap


@pytest.fixture
def seen() -> Iterator[Seen]:
    seen = Seen()
    token = current_listener.set(seen)
    yield seen
    current_listener.reset(token)
    assert current_attempt.get() is None
    seen.check()


def config() -> Any:
    return {"configurable": {"thread_id": str(uuid.uuid4())}}


@pytest.mark.parametrize(
    "scenario",
    [
        seam.an_async_node,
        seam.a_sync_node,
        seam.a_subgraph_as_a_node,
        seam.a_retried_node,
        seam.a_retried_sync_node,
        seam.tenacity_in_a_node,
        seam.a_command,
        seam.a_command_to_the_parent,
        seam.a_timed_out_node,
        seam.a_deferred_node,
        seam.an_error_handler,
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
    await wrap(graph).ainvoke(INPUT, config())

    assert seen.words == expected
    starts = {(s.visit.node, s.attempt) for s in seen.all if isinstance(s, AttemptStarted)}
    assert set(seen.inside) <= starts


@pytest.mark.parametrize(
    "scenario", [seam.a_graph_in_a_function, seam.a_functional_graph], ids=lambda s: s.__name__
)
async def test_what_a_function_calls_is_part_of_its_node(
    scenario: Callable[[Seen], Any], seen: Seen
) -> None:
    graph, _ = scenario(seen)
    await wrap(graph).ainvoke(INPUT, config())

    (name,) = {s.visit.node for s in seen.all}
    assert seen.words == once(name)
    assert set(seen.inside) == {(name, 1)}


async def test_the_users_graph_is_as_it_was(seen: Seen) -> None:
    sub = chain(("a", lambda state: {"log": ["a"]}))
    graph = chain(("A", lambda state: {"log": ["A"]}), ("SUB", sub))
    before = {name: dict(vars(node)) for name, node in (graph.nodes | sub.nodes).items()}
    outer, inner = dict(vars(graph)), dict(vars(sub))
    ours = wrap(graph)
    await ours.ainvoke(INPUT)
    observed = seen.words
    await graph.ainvoke(INPUT)

    assert seen.words == observed
    assert vars(graph) == outer
    assert vars(sub) == inner
    for name, node in (graph.nodes | sub.nodes).items():
        cached = ("node", "flat_writers", "input_cache_key")
        assert {k: v for k, v in vars(node).items() if k not in cached} == {
            k: v for k, v in before[name].items() if k not in cached
        }
        assert not isinstance(vars(node).get("node"), wrapping._Proc)


async def test_a_wrapped_graph_describes_itself_as_before(seen: Seen) -> None:
    sub = chain(("a", body(seen)))
    graph = chain(("A", body(seen)), ("SUB", sub), ("AGAIN", sub))
    ours = wrap(graph)

    assert isinstance(ours, type(graph))
    assert ours.get_input_jsonschema() == graph.get_input_jsonschema()
    assert [name for name, _ in ours.get_subgraphs()] == ["SUB", "AGAIN"]
    assert len({id(found) for _, found in ours.get_subgraphs()}) == 1
    assert all(found is not sub for _, found in ours.get_subgraphs())
    assert ours.get_graph().to_json() == graph.get_graph().to_json()


async def test_a_subgraph_used_twice_is_two_places(seen: Seen) -> None:
    sub = chain(("a", body(seen)))
    await wrap(chain(("ONE", sub), ("TWO", sub))).ainvoke(INPUT)

    ends = [s.visit.label for s in seen.all if isinstance(s, NodeEnded)]
    assert ends == ["ONE/a", "ONE", "TWO/a", "TWO"]


async def test_runs_at_once_of_one_wrapped_graph_do_not_mix(seen: Seen) -> None:
    graph = wrap(chain(("A", body(seen)), ("B", body(seen))))
    await asyncio.gather(*(graph.ainvoke(INPUT) for _ in range(20)))

    assert sorted(seen.words) == sorted(once("A", "B") * 20)
    assert len({s.visit.task for s in seen.all}) == 40


async def test_the_policy_of_the_graph_holds_for_its_nodes(seen: Seen) -> None:
    graph = chain(("F", body(seen, fails=2)))
    graph.retry_policy = (FAST,)
    await wrap(graph).ainvoke(INPUT)

    assert seen.words == retried_twice("F")


@pytest.mark.parametrize(
    ("retry_on", "outcome"),
    [(Fault, "exhausted"), ((Fault, KeyError), "exhausted"), ((KeyError,), "failed")],
    ids=["type", "types", "others"],
)
async def test_a_policy_is_found_as_langgraph_finds_it(
    retry_on: Any, outcome: str, seen: Seen
) -> None:
    policy = RetryPolicy(initial_interval=0, jitter=False, max_attempts=2, retry_on=retry_on)
    with pytest.raises(Fault):
        await wrap(chain(("F", body(seen, fails=9), {"retry_policy": policy}))).ainvoke(INPUT)

    (*_, last) = [s for s in seen.all if isinstance(s, AttemptEnded)]
    assert last.outcome == outcome
    assert last.max_attempts == (2 if outcome == "exhausted" else None)
    assert seen.all[-1].outcome == "error"


async def test_a_policy_that_breaks_fails_the_node(seen: Seen) -> None:
    def broken(_: Exception) -> bool:
        raise RuntimeError("broken policy")

    graph = chain(("F", body(seen, fails=1), {"retry_policy": RetryPolicy(retry_on=broken)}))
    with pytest.raises(RuntimeError, match="broken policy"):
        await wrap(graph).ainvoke(INPUT)

    assert seen.words == ["F 1 starts", "F 1 failed", "F ends: error after 1"]


async def test_a_back_off_that_is_cancelled_leaves_the_attempt_retried(seen: Seen) -> None:
    policy = RetryPolicy(initial_interval=3600, max_interval=3600, jitter=False, retry_on=Fault)
    graph = wrap(chain(("F", body(seen, fails=9), {"retry_policy": policy})))
    await cancelled(graph.ainvoke(INPUT), seen, "F 1 retrying")

    assert seen.words == [
        "F 1 starts",
        "F 1 retried",
        "F 1 retrying",
        "F ends: cancelled after 1",
    ]


async def test_a_drained_node_says_so(seen: Seen) -> None:
    async def drains(state: State) -> State:
        raise GraphDrained("enough")

    with pytest.raises(GraphDrained):
        await wrap(chain(("A", drains))).ainvoke(INPUT)

    assert seen.words == ["A 1 starts", "A 1 cancelled", "A ends: drained after 1"]


async def test_a_timeout_that_langgraph_does_not_tell_of_is_told_with_the_next_attempt(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapping, "_TIMED", "__another_name")
    graph, expected = seam.a_timed_out_node(seen)
    await wrap(graph).ainvoke(INPUT)

    assert seen.words == expected


async def test_a_last_timeout_that_langgraph_does_not_tell_of_is_told_with_the_result(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def waits(state: State) -> State:
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(wrapping, "_TIMED", "__another_name")
    with pytest.raises(Exception, match="run timeout"):
        await wrap(chain(("A", waits, {"timeout": 0.01}))).ainvoke(INPUT)

    assert seen.words == ["A 1 starts", "A 1 failed", "A ends: error after 1"]


async def test_attempts_are_counted_when_langgraph_does_not(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapping, "_RUNTIME", "__another_name")
    await wrap(chain(("F", body(seen, fails=2), {"retry_policy": FAST}))).ainvoke(
        INPUT, streamed([])
    )

    assert seen.words == retried_twice("F")


def streamed(parts: list[Any], *modes: str) -> Any:
    """A config whose stream gets parts of these modes."""
    stream = StreamProtocol(parts.append, {*modes})  # type: ignore[arg-type]
    return {"configurable": {"__pregel_stream": stream, "__pregel_runtime": Runtime()}}


async def test_a_stream_gets_the_modes_that_it_wants_and_the_results(seen: Seen) -> None:
    parts: list[Any] = []
    graph = wrap(chain(("A", body(seen)), ("SUB", chain(("a", body(seen))))))
    await graph.ainvoke(INPUT, streamed(parts, "tasks", ATTEMPTS))

    assert {mode for _, mode, _ in parts} == {"tasks", ATTEMPTS}
    assert [data["name"] for _, mode, data in parts if mode == "tasks"] == [
        *("A", "A"),
        *("SUB", "a", "a", "SUB"),
    ]
    wrote = [data for _, _, data in parts if isinstance(data, NodeWrote)]
    assert [(told.visit.label, told.update, told.cached) for told in wrote] == [
        ("A", {"log": ["done"]}, False),
        ("SUB/a", {"log": ["done"]}, False),
        ("SUB", {"x": 1, "log": ["done", "done"]}, False),
    ]


async def test_of_several_sends_those_are_cached_that_nobody_is_called_for(seen: Seen) -> None:
    async def worker(state: Any) -> Any:
        return {"log": [state["x"]]}

    builder = StateGraph(State)
    builder.add_node("W", worker, cache_policy=CachePolicy())
    builder.add_conditional_edges(
        START, lambda state: [Send("W", {"x": i}) for i in range(4) if i & state["x"] or i == 0]
    )
    graph = wrap(builder.compile(cache=InMemoryCache()))
    await graph.ainvoke({"x": 2, "log": []})  # 0 2 3
    parts: list[Any] = []
    await graph.ainvoke({"x": 3, "log": []}, streamed(parts, ATTEMPTS))  # 0 1 2 3

    wrote = [data for _, _, data in parts if isinstance(data, NodeWrote)]
    assert sorted((told.update["log"], told.cached) for told in wrote) == [
        ([0], True),
        ([1], False),
        ([2], True),
        ([3], True),
    ]
    assert len({told.visit.task for told in wrote}) == 4


async def test_a_part_that_cannot_be_read_does_not_disturb_the_run(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any) -> Any:
        raise KeyError("id")

    graph = wrap(chain(("A", lambda state: {"log": ["done"]})))
    monkeypatch.setattr(wrapping, "_visit", breaks)
    with capture_logs() as logs:
        found = await graph.ainvoke(INPUT)

    assert found["log"] == ["done"]
    assert {entry["event"] for entry in logs} == {"A part of LangGraph's stream could not be read"}


async def test_a_node_of_a_wrapped_graph_that_is_called_by_itself_is_not_seen(seen: Seen) -> None:
    graph: Pregel[Any, Any, Any, Any] = wrap(chain(("SUB", chain(("a", lambda _: {"log": ["x"]})))))
    sub: Any = graph.nodes["SUB"].bound

    assert (await sub.ainvoke(INPUT))["log"] == ["x"]
    assert seen.all == []


async def test_older_event_protocols_still_work(seen: Seen) -> None:
    graph = wrap(chain(("A", lambda state: {"log": ["done"]})))
    ends = [
        event["data"]
        async for event in graph.astream_events(INPUT, version="v2")
        if event["event"] == "on_chain_end" and event["name"] == "A"
    ]

    assert ends[0]["output"] == {"log": ["done"]}
