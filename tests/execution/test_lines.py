"""Every kind of line, in its place: who caused it, in which attempt, and what it says.

`run()` checks for each of these runs what must hold for all of them, see `run_lines.check`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.config import get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, TimeoutPolicy, interrupt
from run_lines import Lines, check_one, run, serving
from small_graphs import (
    THREE,
    Failing,
    Fault,
    Speaker,
    State,
    beside,
    chain,
    writes,
    writes_in_a_thread,
)
from typing_extensions import TypedDict

from runtime.engines.memory import MemoryEngine
from runtime.engines.sqlite.engine import SqliteEngine
from runtime.events import TERMINAL_TYPES, Event
from runtime.execution.feed import FLUSH_S
from runtime.model import MODES, Lease
from telemetry.metrics import Metrics
from telemetry.storage import StorageTelemetry

INPUT = {"x": 1, "log": []}


class Chat(TypedDict):
    messages: Annotated[list[BaseMessage], add_messages]


def talk(*nodes: tuple[str, Any]) -> Any:
    builder = StateGraph(Chat)
    before = START
    for name, node in nodes:
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder.compile()


# Nodes.


@pytest.mark.parametrize("make", [writes, writes_in_a_thread], ids=["async", "sync"])
async def test_a_node_starts_writes_and_completes(make: Any) -> None:
    lines = await run(chain(("A", make("hello"))), INPUT)

    assert lines.words == [
        "run.queued",
        "run.started",
        "values",
        "node.started A 1",
        "custom A 1",
        "node.completed A 1",
        "values",
        "run.completed",
    ]
    started, custom, completed = lines.all[3:6]
    for line in (started, custom, completed):
        assert (line["ns"], line["path"], line["step"]) == ([], [], 1)
        assert line["task"] == started["task"]
    assert set(started["data"]) == {"node_span_id"}
    assert custom["data"] == {"value": "hello"}
    assert completed["data"]["update"] == {"log": ["hello"]}
    assert completed["data"]["attempts"] == 1
    assert lines.last["data"]["output"] == {"x": 1, "log": ["hello"]}


async def test_nodes_one_after_the_other_are_in_supersteps_of_their_own() -> None:
    lines = await run(chain(("A", writes("a")), ("B", writes_in_a_thread("b"))), INPUT)

    assert [(line["node"], line["step"]) for line in lines.of("node.started")] == [
        ("A", 1),
        ("B", 2),
    ]


async def test_parallel_branches_interleave_and_keep_their_tasks_apart() -> None:
    barrier = asyncio.Barrier(2)

    def node(name: str) -> Any:
        async def body(state: State) -> State:
            for word in ("first", "second"):
                await barrier.wait()
                get_stream_writer()(f"{name} {word}")
            return {"log": [name]}

        return body

    lines = await run(beside(("A", node("A")), ("B", node("B"))), INPUT)

    customs = lines.of("custom")
    assert sorted(line["data"]["value"] for line in customs[:2]) == ["A first", "B first"]
    assert sorted(line["data"]["value"] for line in customs[2:]) == ["A second", "B second"]
    for line in customs:
        assert line["data"]["value"].startswith(line["node"])
        assert line["task"] == lines.one("node.started", line["node"])["task"]
    assert lines.of("values")[-1]["data"]["nodes"] == [
        line["node"] for line in lines.of("node.completed")
    ]


async def test_each_send_is_a_task_of_its_own() -> None:
    async def worker(state: State) -> State:
        get_stream_writer()(state["x"])
        return {"log": [state["x"]]}

    builder = StateGraph(State)
    builder.add_node("W", worker)
    builder.add_conditional_edges(START, lambda _: [Send("W", {"x": i}) for i in range(3)])
    lines = await run(builder.compile(), INPUT)

    values = {line["task"]: line["data"]["value"] for line in lines.of("custom")}
    updates = {line["task"]: line["data"]["update"] for line in lines.of("node.completed")}
    assert sorted(values.values()) == [0, 1, 2]
    assert updates == {task: {"log": [value]} for task, value in values.items()}
    assert lines.of("values")[-1]["data"]["nodes"] == ["W", "W", "W"]


async def test_a_deferred_node_runs_when_the_others_are_done() -> None:
    builder = StateGraph(State)
    builder.add_node("A", writes("a"))
    builder.add_node("B", writes("b"))
    builder.add_node("D", writes("d"), defer=True)
    builder.add_edge(START, "A")
    builder.add_edge(START, "D")
    builder.add_edge("A", "B")
    lines = await run(builder.compile(), INPUT)

    assert [line["node"] for line in lines.of("node.completed")] == ["A", "B", "D"]
    assert lines.one("node.started", "D")["step"] == 3


async def test_a_command_says_where_to_go_and_updates() -> None:
    async def route(state: State) -> Command[str]:
        return Command(goto="G", update={"log": ["routed"]})

    builder = StateGraph(State)
    builder.add_node("F", route, destinations=("G",))
    builder.add_node("G", writes("g"))
    builder.add_edge(START, "F")
    lines = await run(builder.compile(), INPUT)

    assert lines.one("node.completed", "F")["data"]["update"] == {"log": ["routed"]}
    assert [line["node"] for line in lines.of("node.started")] == ["F", "G"]


async def test_a_command_to_the_parent_completes_both() -> None:
    async def up(state: State) -> Command[str]:
        return Command(graph=Command.PARENT, goto="G", update={"log": ["up"]})

    builder = StateGraph(State)
    builder.add_node("SUB", chain(("inner", up)), destinations=("G",))
    builder.add_node("G", writes("g"))
    builder.add_edge(START, "SUB")
    lines = await run(builder.compile(), INPUT)

    assert [(line["node"], line["data"]["update"]) for line in lines.of("node.completed")] == [
        ("inner", None),
        ("SUB", {"log": ["up"]}),
        ("G", {"log": ["g"]}),
    ]


async def test_an_error_handler_is_a_node_beside_the_one_that_failed() -> None:
    async def fails(state: State) -> State:
        raise Fault("no")

    graph = chain(("F", fails, {"error_handler": writes("handled")}), ("B", writes("b")))
    lines = await run(graph, INPUT)

    assert lines.inner[1:5] == [
        "node.started F 1",
        "node.failed F 1",
        "node.started __error_handler__F 1",
        "custom __error_handler__F 1",
    ]
    handler = lines.one("node.started", "__error_handler__F")
    assert (handler["path"], handler["step"]) == ([], lines.one("node.started", "F")["step"])
    assert lines.last["type"] == "run.completed"


async def test_a_failure_that_was_handled_is_not_the_one_of_the_run() -> None:
    async def fails(state: State) -> State:
        raise Fault

    async def conflicts(state: State) -> State:
        return {"x": 5}

    builder = StateGraph(State)
    builder.add_node("F", fails, error_handler=writes("handled"))
    builder.add_node("A", conflicts)
    builder.add_node("B", conflicts)
    builder.add_edge(START, "F")
    builder.add_edge("F", "A")
    builder.add_edge("F", "B")
    builder.add_edge("__error_handler__F", "A")
    builder.add_edge("__error_handler__F", "B")
    lines = await run(builder.compile(), INPUT)

    assert lines.last["data"]["error"] == {
        "code": "internal",
        "error_class": "validation",
        "error_type": "InvalidUpdateError",
    }


# Graphs in graphs.


def in_a_function(sub: Any) -> Any:
    async def node(state: State) -> Any:
        return await sub.ainvoke({"x": 2, "log": []})

    return node


def in_a_sync_function(sub: Any) -> Any:
    def node(state: State) -> Any:
        return sub.invoke({"x": 2, "log": []})

    return node


@pytest.mark.parametrize(
    ("put", "inner"),
    [
        pytest.param(lambda sub: sub, writes, id="as a node"),
        pytest.param(in_a_function, writes, id="in a function"),
        pytest.param(in_a_sync_function, writes_in_a_thread, id="in a sync function"),
    ],
)
async def test_an_inner_node_names_the_calls_around_it(put: Any, inner: Any) -> None:
    sub = chain(("a", inner("a")), ("b", inner("b")))
    lines = await run(chain(("OUT", put(sub))), INPUT)

    caller = lines.one("node.started", "OUT")
    for line in (*lines.of("node.", node="a"), *lines.of("custom", node="a")):
        assert (line["ns"], line["path"], line["step"]) == (["OUT"], [caller["task"]], 1)
    assert lines.one("node.started", "b")["step"] == 2
    assert [line["node"] for line in lines.of("node.completed")] == ["a", "b", "OUT"]
    assert [line["data"]["nodes"] for line in lines.of("values")] == [[], ["OUT"]]


async def test_two_parallel_calls_of_one_subgraph_are_told_apart_by_task() -> None:
    barrier = asyncio.Barrier(2)

    async def inner(state: State) -> State:
        await barrier.wait()
        get_stream_writer()(state["x"])
        return {"log": [state["x"]]}

    sub = chain(("a", inner), ("b", inner))

    async def both(state: State) -> State:
        found = await asyncio.gather(
            sub.ainvoke({"x": 1, "log": []}), sub.ainvoke({"x": 2, "log": []})
        )
        return {"log": [state["log"] for state in found]}

    lines = await run(chain(("OUT", both)), INPUT)

    customs = {line["task"]: line["data"]["value"] for line in lines.of("custom")}
    updates = {
        line["task"]: line["data"]["update"]["log"]
        for line in lines.of("node.completed")
        if line["ns"] == ["OUT"]
    }
    assert sorted(customs.values()) == [1, 1, 2, 2]
    assert updates == {task: [value] for task, value in customs.items()}


async def test_parallel_sync_graphs_in_threads_keep_their_updates_apart() -> None:
    """Two threads may be between the parts of one update at the same time."""
    barrier = threading.Barrier(8, timeout=20)

    def inner(state: State) -> State:
        barrier.wait()
        return {"log": [state["x"]]}

    builder = StateGraph(State)
    builder.add_node("W", inner)
    builder.add_conditional_edges(
        START, lambda state: [Send("W", {"x": state["x"] + i}) for i in range(4)]
    )
    sub = builder.compile()

    def caller(x: int) -> Any:
        def node(state: State) -> State:
            return {"log": sub.invoke({"x": x, "log": []})["log"]}

        return node

    graph = beside(("A", caller(0)), ("B", caller(10)))
    lines = await run(graph, INPUT, settings={"executor_threads": 32})

    found = sorted(
        (line["ns"][0], line["data"]["update"]["log"][0])
        for line in lines.of("node.completed", node="W")
    )
    assert found == [("A", i) for i in range(4)] + [("B", 10 + i) for i in range(4)]


async def test_a_functional_graph_has_a_node_for_each_call_of_a_task() -> None:
    @task
    async def double(x: int) -> int:
        get_stream_writer()(x)
        return 2 * x

    @task
    def add(x: int, y: int) -> int:
        return x + y

    @entrypoint()
    async def graph(x: int) -> dict[str, int]:
        one, two = await asyncio.gather(double(x), double(x + 1))
        return {"sum": await add(one, two)}

    lines = await run(graph, 1)

    outer = lines.one("node.started", "graph")
    assert [(line["node"], line["data"]["update"]) for line in lines.of("node.completed")] == [
        ("double", 2),
        ("double", 4),
        ("add", 6),
        ("graph", {"sum": 6}),
    ]
    for line in lines.of("node.", node="add"):
        assert (line["ns"], line["path"]) == (["graph"], [outer["task"]])
    assert [line["data"] for line in lines.of("values")] == [
        {"values": {"sum": 6}, "nodes": ["graph"]}
    ]


async def test_a_sync_functional_graph_runs_its_tasks_in_threads() -> None:
    @task
    def double(x: int) -> int:
        return 2 * x

    @entrypoint()
    def graph(x: int) -> int:
        return double(x).result() + 1

    lines = await run(graph, 4)

    assert [(line["node"], line["data"]["update"]) for line in lines.of("node.completed")] == [
        ("double", 8),
        ("graph", 9),
    ]


# Cached results.


async def test_a_cached_node_only_completes() -> None:
    graph = chain(("A", writes("a"), {"cache_policy": CachePolicy()}), cache=InMemoryCache())
    first = await run(graph, INPUT)
    second = await run(graph, INPUT)

    assert first.of("node.started")
    (line,) = second.of("node.", "custom")
    assert line["type"] == "node.completed"
    assert line["data"] == {
        "update": {"log": ["a"]},
        "cached": True,
        "attempts": 0,
        "duration_ms": 0.0,
    }
    assert line["step"] == 1
    assert second.of("values")[-1] == second.of("values")[-1] | {"step": 1}
    assert second.of("values")[-1]["data"]["nodes"] == ["A"]


async def test_of_several_sends_just_those_in_the_cache_are_cached() -> None:
    async def worker(state: State) -> State:
        return {"log": [state["x"]]}

    builder = StateGraph(State)
    builder.add_node("W", worker, cache_policy=CachePolicy())
    builder.add_conditional_edges(
        START, lambda state: [Send("W", {"x": i}) for i in range(4) if i & state["x"] or i == 0]
    )
    graph = builder.compile(cache=InMemoryCache())
    await run(graph, {"x": 2, "log": []})  # 0 2 3
    lines = await run(graph, {"x": 3, "log": []})  # 0 1 2 3

    cached = [line for line in lines.of("node.completed") if line["data"].get("cached")]
    assert [line["data"]["update"] for line in cached] == [{"log": [0]}, {"log": [2]}, {"log": [3]}]
    assert len(lines.of("node.started")) == 1
    assert len({line["task"] for line in lines.of("node.completed")}) == 4


async def test_a_cached_node_in_a_subgraph_has_its_step_and_its_place() -> None:
    sub = chain(
        ("a", writes("a")),
        ("b", writes("b"), {"cache_policy": CachePolicy()}),
        cache=InMemoryCache(),
    )
    graph = chain(("SUB", sub))
    await run(graph, INPUT)
    lines = await run(graph, INPUT)

    line = lines.one("node.completed", "b")
    assert line["data"]["cached"] is True
    assert (line["ns"], line["path"]) == (["SUB"], [lines.one("node.started", "SUB")["task"]])
    assert line["step"] == 2


async def test_the_message_of_a_cached_node_is_output_all_the_same() -> None:
    async def says(state: Chat) -> Any:
        return {"messages": [AIMessage("from the cache", id="m")]}

    builder = StateGraph(Chat)
    builder.add_node("A", says, cache_policy=CachePolicy(key_func=lambda _: "key"))
    builder.add_edge(START, "A")
    graph = builder.compile(cache=InMemoryCache())
    await run(graph, {"messages": [HumanMessage("hi")]})
    lines = await run(graph, {"messages": [HumanMessage("hi")]})

    assert lines.one("node.completed")["data"]["cached"] is True
    message = lines.one("message")
    assert message["data"]["text"] == "from the cache"
    assert "attempt" not in message


# Messages.


async def test_a_model_streams_tokens_and_its_message_comes_once() -> None:
    async def speaks(state: Chat) -> Any:
        return {"messages": [await Speaker().ainvoke(state["messages"])]}

    lines = await run(talk(("A", speaks)), {"messages": [HumanMessage("hi")]})

    assert "".join(line["data"]["text"] for line in lines.of("token")) == "one two three"
    message = lines.one("message")["data"]
    assert message["text"] == "one two three"
    assert message["role"] == "ai"
    assert message["usage"]["output_tokens"] == 3
    assert {line["data"]["message_id"] for line in lines.of("token")} == {message["message_id"]}
    assert lines.last["data"]["tokens"] == {"input": 2, "output": 3}
    assert lines.last["data"]["first_output_ms"] > 0


async def test_a_model_streams_from_a_sync_node_too() -> None:
    def speaks(state: Chat) -> Any:
        return {"messages": [Speaker().invoke(state["messages"])]}

    lines = await run(talk(("A", speaks)), {"messages": [HumanMessage("hi")]})

    assert "".join(line["data"]["text"] for line in lines.of("token")) == "one two three"
    assert lines.one("message")["data"]["text"] == "one two three"


async def test_tokens_are_joined_over_a_while() -> None:
    async def speaks(state: Chat) -> Any:
        return {"messages": [await Speaker().ainvoke(state["messages"])]}

    graph = talk(("A", speaks))
    lines = await run(graph, {"messages": [HumanMessage("hi")]}, settings={"token_ms": 60_000})

    assert lines.one("token")["data"]["text"] == "one two three"


async def test_messages_that_come_in_are_not_output_and_those_returned_are() -> None:
    async def says(state: Chat) -> Any:
        return {"messages": [*state["messages"], AIMessage("said", id="new")]}

    graph = talk(("A", says), ("B", says))
    lines = await run(graph, {"messages": [HumanMessage("hi", id="old")]})

    (message,) = lines.of("message")
    assert (message["node"], message["data"]["message_id"]) == ("A", "new")


async def test_messages_of_several_commands_are_found() -> None:
    async def says(state: Chat) -> Any:
        return [
            Command(update={"messages": [AIMessage("one", id="1")]}),
            Command(update={"messages": [AIMessage("two", id="2")]}),
        ]

    lines = await run(talk(("A", says)), {"messages": [HumanMessage("hi")]})

    assert [line["data"]["text"] for line in lines.of("message")] == ["one", "two"]


def tool_calls(*names: str) -> list[Any]:
    return [{"name": name, "args": {"q": name}, "id": f"call {name}"} for name in names]


async def test_tools_answer_with_messages() -> None:
    @tool
    async def search(q: str) -> str:
        """Search."""
        get_stream_writer()(q)
        return f"found {q}"

    @tool
    def count(q: str) -> str:
        """Count."""
        return f"counted {q}"

    graph = talk(("tools", ToolNode([search, count])))
    asked = AIMessage("", tool_calls=tool_calls("search", "count"))
    lines = await run(graph, {"messages": [asked]})

    assert [line["data"]["text"] for line in lines.of("message")] == [
        "found search",
        "counted count",
    ]
    assert lines.of("message")[0]["data"]["tool_call_id"] == "call search"
    assert lines.one("custom")["data"] == {"value": "search"}
    assert lines.one("custom")["node"] == "tools"


class Scripted(Speaker):
    """Asks for these tools, one list of calls after the other, and is done."""

    answers: list[Any]
    text: str = "done"

    async def _astream(self, *args: Any, **kwargs: Any) -> Any:
        if calls := self.answers.pop(0):
            yield ChatGenerationChunk(message=AIMessageChunk("", tool_calls=calls))
            return
        async for chunk in super()._astream(*args, **kwargs):
            yield chunk


async def test_an_agent_speaks_calls_its_tool_and_speaks_again() -> None:
    @tool
    async def search(q: str) -> str:
        """Search."""
        return "found"

    graph = create_agent(Scripted(answers=[tool_calls("search"), []]), [search])
    lines = await run(graph, {"messages": [HumanMessage("hi")]})

    assert [
        (line["node"], line["data"]["role"], line["data"]["text"]) for line in lines.of("message")
    ] == [
        ("model", "ai", ""),
        ("tools", "tool", "found"),
        ("model", "ai", "done"),
    ]
    assert lines.of("message")[0]["data"]["tool_calls"][0]["name"] == "search"


# Retries by LangGraph.


@pytest.mark.parametrize("colour", ["async", "sync"])
async def test_a_retried_node_has_a_line_for_each_attempt(colour: str) -> None:
    fails = Failing(2)

    async def in_the_loop(state: State) -> State:
        get_stream_writer()(fails.calls)
        fails()
        return {"log": ["done"]}

    def in_a_thread(state: State) -> State:
        get_stream_writer()(fails.calls)
        fails()
        return {"log": ["done"]}

    node = in_the_loop if colour == "async" else in_a_thread
    lines = await run(chain(("F", node, {"retry_policy": THREE})), INPUT)

    assert lines.inner[1:-1] == [
        "node.started F 1",
        "custom F 1",
        "node.retrying F 1",
        "node.started F 2",
        "custom F 2",
        "node.retrying F 2",
        "node.started F 3",
        "custom F 3",
        "node.completed F 3",
    ]
    assert [line["data"] for line in lines.of("node.retrying")] == [
        {
            "error_class": "other",
            "error_type": "Fault",
            "retry_in_ms": pause,
            "jitter_ms": 0.0,
            "max_attempts": 3,
            "discard_from": started["seq"],
        }
        for pause, started in zip((1.0, 2.0), lines.of("node.started"), strict=False)
    ]
    assert lines.one("node.completed")["data"]["attempts"] == 3
    assert lines.one("node.completed")["data"]["duration_ms"] >= 3
    assert lines.last["data"]["backoff_ms"] > 0


async def test_a_policy_that_is_used_up_fails_the_node_and_the_run() -> None:
    fails = Failing(9)

    async def node(state: State) -> State:
        fails()
        return {}

    lines = await run(chain(("F", node, {"retry_policy": THREE})), INPUT)

    assert lines.inner[-2:] == ["node.started F 3", "node.failed F 3"]
    failed = lines.one("node.failed")
    assert failed["data"]["attempts"] == 3
    assert lines.last["data"]["error"] == {
        "code": "node_error",
        "error_class": "other",
        "error_type": "Fault",
        "node": "F",
        "task": failed["task"],
    }


async def test_an_error_that_no_policy_matches_is_not_retried() -> None:
    async def node(state: State) -> State:
        raise Fault

    policy = RetryPolicy(retry_on=ConnectionError, jitter=False)
    lines = await run(chain(("F", node, {"retry_policy": policy})), INPUT)

    assert lines.inner[1:] == ["node.started F 1", "node.failed F 1"]


async def test_the_maximum_is_that_of_the_policy_that_matched() -> None:
    fails = Failing(1, ConnectionError)

    async def node(state: State) -> State:
        fails()
        return {}

    policies = [
        RetryPolicy(retry_on=Fault, max_attempts=9),
        RetryPolicy(retry_on=ConnectionError, max_attempts=2, initial_interval=0, jitter=False),
    ]
    lines = await run(chain(("F", node, {"retry_policy": policies})), INPUT)

    assert lines.one("node.retrying")["data"]["max_attempts"] == 2
    assert lines.one("node.retrying")["data"]["error_class"] == "connection"


async def test_a_node_that_takes_too_long_is_called_again() -> None:
    calls = []

    async def node(state: State) -> State:
        calls.append(None)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return {"log": ["done"]}

    options = {"timeout": TimeoutPolicy(run_timeout=0.01), "retry_policy": THREE}
    lines = await run(chain(("F", node, options)), INPUT)

    assert lines.inner[1:-1] == [
        "node.started F 1",
        "node.retrying F 1",
        "node.started F 2",
        "node.completed F 2",
    ]
    retrying = lines.one("node.retrying")["data"]
    assert (retrying["error_class"], retrying["error_type"]) == ("timeout", "NodeTimeoutError")


async def test_what_a_timed_out_body_still_writes_is_not_the_next_attempts() -> None:
    second, late = asyncio.Event(), asyncio.Event()
    calls = []

    async def node(state: State) -> State:
        write = get_stream_writer()
        calls.append(None)
        if len(calls) == 2:
            second.set()
            await late.wait()
            await Speaker(text="right").ainvoke("hi")
            return {"log": ["done"]}
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await second.wait()
            write("late")
            await Speaker(text="late").ainvoke("hi")
            late.set()
            raise
        raise AssertionError

    options = {"timeout": 0.5, "retry_policy": THREE}
    lines = await run(chain(("F", node, options)), INPUT)

    assert lines.of("custom") == []
    assert [line["data"]["text"] for line in lines.of("message")] == ["right"]
    assert lines.last["type"] == "run.completed"


async def test_a_superstep_that_takes_too_long_fails_the_run() -> None:
    async def node(state: State) -> State:
        await asyncio.Event().wait()
        return {}

    graph = chain(("F", node))
    graph.step_timeout = 0.01
    lines = await run(graph, INPUT)

    assert lines.inner[1:] == ["node.started F 1", "node.cancelled F 1"]
    error = lines.last["data"]["error"]
    assert (error["code"], error["error_class"]) == ("node_error", "timeout")


# Failures.


@pytest.mark.parametrize("colour", ["async", "sync"])
async def test_a_node_that_cancels_itself_has_failed(colour: str) -> None:
    async def in_the_loop(state: State) -> State:
        raise asyncio.CancelledError

    def in_a_thread(state: State) -> State:
        raise asyncio.CancelledError

    lines = await run(chain(("F", in_the_loop if colour == "async" else in_a_thread)), INPUT)

    assert lines.inner[1:] == ["node.started F 1", "node.failed F 1"]
    assert lines.last["data"]["error"]["error_type"] == "NodeCancelledError"


async def test_a_failing_node_cancels_its_siblings() -> None:
    async def fails(state: State) -> State:
        raise Fault

    async def waits(state: State) -> State:
        await asyncio.Event().wait()
        return {}

    lines = await run(beside(("W", waits), ("F", fails)), INPUT)

    assert lines.one("node.cancelled")["node"] == "W"
    assert lines.one("node.failed")["node"] == "F"
    assert lines.last["data"]["error"]["node"] == "F"


async def test_the_run_names_the_innermost_node_that_failed() -> None:
    async def fails(state: State) -> State:
        raise Fault

    lines = await run(chain(("SUB", chain(("inner", fails)))), INPUT)

    assert [line["node"] for line in lines.of("node.failed")] == ["inner", "SUB"]
    assert lines.last["data"]["error"]["node"] == "inner"
    assert lines.last["data"]["error"]["task"] == lines.of("node.failed")[0]["task"]


async def test_a_failure_that_its_caller_has_caught_is_not_the_one_of_the_run() -> None:
    async def fails(state: State) -> State:
        raise Fault

    sub = chain(("inner", fails))

    async def catches(state: State) -> State:
        with pytest.raises(Fault):
            await sub.ainvoke(INPUT)
        raise ConnectionError

    lines = await run(chain(("OUT", catches)), INPUT)

    assert lines.last["data"]["error"]["node"] == "OUT"
    assert lines.last["data"]["error"]["error_class"] == "connection"


async def test_messages_of_errors_stay_here_unless_they_are_exposed() -> None:
    fails = Failing(9, lambda: Fault("the password is hunter2"))

    async def node(state: State) -> State:
        fails()
        return {}

    graph = chain(("F", node, {"retry_policy": THREE}))
    hidden = await run(graph, INPUT)
    shown = await run(graph, INPUT, settings={"expose_errors": True})

    assert "hunter2" not in repr(hidden.all)
    assert lines_with_detail(hidden) == []
    assert lines_with_detail(shown) == ["node.retrying", "node.retrying", "node.failed"]
    assert shown.last["data"]["error"]["detail"].startswith("the password")


def lines_with_detail(lines: Lines) -> Sequence[str]:
    return [line["type"] for line in lines.all if "detail" in line["data"]]


async def test_too_many_supersteps_end_the_run_with_a_code() -> None:
    builder = StateGraph(State)
    builder.add_node("A", writes("a"))
    builder.add_edge(START, "A")
    builder.add_edge("A", "A")
    lines = await run(builder.compile(), INPUT, config={"recursion_limit": 3})

    assert lines.last["data"]["error"] == {
        "code": "recursion_limit",
        "error_class": "recursion_limit",
        "error_type": "GraphRecursionError",
    }
    assert len(lines.of("node.completed")) == 3


# Interrupts.


async def ask(state: State) -> State:
    return {"log": [interrupt({"question": state.get("x")})]}


async def test_an_interrupt_ends_the_run_with_its_question() -> None:
    lines = await run(chain(("A", ask), ("B", writes("b"))), INPUT)

    assert lines.inner[1:] == ["node.started A 1", "node.interrupted A 1"]
    data = lines.last["data"]
    assert data["next"] == ["A"]
    (question,) = data["interrupts"]
    assert set(question) == {"id", "value", "response_schema", "task"}
    assert question["value"] == {"question": 1}
    assert question["task"] == lines.one("node.started")["task"]


async def test_two_parallel_interrupts_are_both_asked() -> None:
    graph = beside(("A", ask), ("B", ask), ("C", writes("c")))
    lines = await run(graph, INPUT)

    tasks = {line["task"] for line in lines.of("node.interrupted")}
    interrupts = lines.last["data"]["interrupts"]
    assert {question["task"] for question in interrupts} == tasks
    assert len({question["id"] for question in interrupts}) == 2
    assert lines.one("node.completed")["node"] == "C"
    assert len(lines.of("values")) == 1


@pytest.mark.parametrize(
    "put",
    [
        pytest.param(lambda sub: sub, id="as a node"),
        pytest.param(in_a_function, id="in a function"),
    ],
)
async def test_an_interrupt_in_a_subgraph_is_its_inner_tasks(put: Any) -> None:
    lines = await run(chain(("OUT", put(chain(("inner", ask))))), INPUT)

    assert [line["node"] for line in lines.of("node.interrupted")] == ["inner", "OUT"]
    (question,) = lines.last["data"]["interrupts"]
    assert question["task"] == lines.one("node.started", "inner")["task"]
    assert lines.last["data"]["next"] == ["OUT"]


async def test_an_interrupt_that_a_node_has_swallowed_is_not_asked() -> None:
    sub = chain(("inner", ask))

    async def swallows(state: State) -> State:
        try:
            await sub.ainvoke({"x": 7, "log": []})
        except Exception:
            return {"log": ["swallowed"]}
        return {}

    lines = await run(chain(("A", swallows), ("B", ask)), INPUT)

    (question,) = lines.last["data"]["interrupts"]
    assert question["value"] == {"question": 1}


async def test_an_answer_goes_on_in_a_new_run() -> None:
    async with serving(chain(("A", ask), ("B", writes("b")))) as server:
        first = await server.execute(INPUT)
        (question,) = first[-1]["data"]["interrupts"]
        second = Lines(
            await server.execute(None, command={"resume": {question["id"]: "answer"}}),
        )

    check_one(second)
    assert second.inner[1:] == [
        "node.started A 1",
        "node.completed A 1",
        "values",
        "node.started B 1",
        "custom B 1",
        "node.completed B 1",
        "values",
    ]
    assert second.one("node.started", "A")["task"] == question["task"]
    assert second.last["data"]["output"]["log"] == ["answer", "b"]


async def test_one_of_two_answers_asks_the_other_again() -> None:
    async with serving(beside(("A", ask), ("B", ask))) as server:
        first = await server.execute(INPUT)
        one, other = first[-1]["data"]["interrupts"]
        second = await server.execute(None, command={"resume": {one["id"]: "yes"}})

    assert [question["id"] for question in second[-1]["data"]["interrupts"]] == [other["id"]]


@pytest.mark.parametrize(
    ("where", "ran"),
    [
        pytest.param({"interrupt_before": ["B"]}, ["A"], id="before"),
        pytest.param({"interrupt_after": ["A"]}, ["A"], id="after"),
        pytest.param({"interrupt_before": ["A"]}, [], id="before the first"),
    ],
)
async def test_a_static_breakpoint_stops_and_an_empty_input_goes_on(
    where: dict[str, Any], ran: list[str]
) -> None:
    async with serving(chain(("A", writes("a")), ("B", writes("b")), **where)) as server:
        first = Lines(await server.execute(INPUT))
        second = Lines(await server.execute(None))
    check_one(first)
    check_one(second)

    assert first.last["type"] == "run.interrupted"
    assert first.last["data"]["interrupts"] == []
    assert [line["node"] for line in first.of("node.completed")] == ran
    assert len(first.of("values")) == 1 + len(ran)
    assert second.last["type"] == "run.completed"
    assert second.last["data"]["output"]["log"] == ["a", "b"]


# Cancellation.


async def test_a_cancelled_node_says_so() -> None:
    async def waits(state: State) -> State:
        await asyncio.Event().wait()
        return {}

    async with serving(chain(("A", waits))) as server:
        submitted = await server.submit(INPUT)
        await server.lines(submitted, until=lambda line: line["type"] == "node.started")
        await server.worker.cancel(submitted.run_id, "enough")
        lines = Lines(await server.lines(submitted))
    check_one(lines)

    assert lines.inner[1:] == ["node.started A 1", "node.cancelled A 1"]
    assert lines.last["data"]["reason"] == "enough"


async def test_a_node_that_is_cancelled_in_its_back_off_ends_with_the_attempt_that_failed() -> None:
    async def fails(state: State) -> State:
        raise Fault

    forever = RetryPolicy(initial_interval=3600, jitter=False, retry_on=Fault, max_interval=3600)
    async with serving(chain(("A", fails, {"retry_policy": forever}))) as server:
        submitted = await server.submit(INPUT)
        await server.lines(submitted, until=lambda line: line["type"] == "node.retrying")
        await server.worker.cancel(submitted.run_id, "enough")
        lines = Lines(await server.lines(submitted))
    check_one(lines)

    assert lines.inner[1:] == ["node.started A 1", "node.retrying A 1", "node.cancelled A 1"]
    assert lines.one("node.retrying")["data"]["retry_in_ms"] == 3_600_000
    assert lines.last["data"]["retries"] == 1


class Unhurried:
    """An engine that says of a run's last lines only after every timer of the feed that they are
    written."""

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        written: asyncio.Future[None] = super().append(lease, events)  # type: ignore[misc]
        if events[-1].type not in TERMINAL_TYPES:
            return written

        async def told() -> None:
            await asyncio.sleep(2 * FLUSH_S)
            await written

        return asyncio.ensure_future(told())


class UnhurriedMemory(Unhurried, MemoryEngine): ...


class UnhurriedSqlite(Unhurried, SqliteEngine): ...


@pytest.mark.parametrize("engine", [UnhurriedMemory, UnhurriedSqlite])
@pytest.mark.parametrize("last", ["run.cancelled", "run.timed_out"])
async def test_the_last_lines_of_a_run_that_is_stopped_are_posted_once(
    tmp_path: Path, engine: Any, last: str
) -> None:
    """What is posted behind its last line has no lease any more, and counts as fenced."""

    async def waits(state: State) -> State:
        await asyncio.Event().wait()
        return {}

    metrics = Metrics()
    store = engine(f"sqlite:///{tmp_path}/s.db", telemetry=StorageTelemetry(metrics))
    async with serving(chain(("A", waits)), engine=store, clock=time.time) as server:
        soon = time.time() + 0.5 if last == "run.timed_out" else None
        submitted = await server.submit(INPUT, deadline=soon)
        await server.lines(submitted, until=lambda line: line["type"] == "node.started")
        if soon is None:
            await server.worker.cancel(submitted.run_id, "enough")
        lines = Lines(await server.lines(submitted))
    check_one(lines)

    assert lines.words[-2:] == ["node.cancelled A 1", last]
    assert metrics["fenced_writes_total"].value("event") == 0


async def test_a_sync_node_that_cannot_be_stopped_is_cancelled_and_its_lines_are_dropped() -> None:
    release, wrote = threading.Event(), threading.Event()

    def node(state: State) -> State:
        write = get_stream_writer()
        write("before")
        release.wait(20)
        write("after")
        wrote.set()
        return {"log": ["done"]}

    async with serving(chain(("A", node)), cancel_grace_s=0) as server:
        submitted = await server.submit(INPUT)
        await server.lines(submitted, until=lambda line: line["type"] == "custom")
        await server.worker.cancel(submitted.run_id, "enough")
        lines = Lines(await server.lines(submitted))
        release.set()
        await asyncio.to_thread(wrote.wait)
    check_one(lines)

    assert [line["data"]["value"] for line in lines.of("custom")] == ["before"]
    cancelled = lines.one("node.cancelled")
    assert cancelled["data"]["duration_ms"] > 0


# Modes.


@pytest.mark.parametrize("without", MODES)
async def test_what_is_not_recorded_is_not_there(without: str) -> None:
    async def speaks(state: Chat) -> Any:
        get_stream_writer()("custom")
        return {"messages": [await Speaker().ainvoke("hi"), AIMessage("more", id="m")]}

    modes = [mode for mode in MODES if mode != without]
    lines = await run(talk(("A", speaks)), {"messages": []}, stream=modes)

    found = {line["type"] for line in lines.all}
    of = {"messages": {"token", "message"}, "custom": {"custom"}, "values": {"values"}}
    lifecycle = {"run.queued", "run.started", "node.started", "node.completed", "run.completed"}
    assert found == lifecycle.union(*(of.get(mode, set()) for mode in modes))
    assert ("update" in lines.one("node.completed")["data"]) == (without != "updates")
    assert lines.last["data"]["output"]["messages"][0]["content"] == "one two three"


async def test_values_come_after_the_input_and_after_each_superstep() -> None:
    async def nothing(state: State) -> None:
        return None

    sub = chain(("inner", writes("inner")))
    lines = await run(
        chain(("A", writes("a")), ("N", nothing), ("SUB", sub), ("L", nothing)), INPUT
    )

    assert [(line["step"], line["data"]["nodes"]) for line in lines.of("values")] == [
        (0, []),
        (1, ["A"]),
        (2, ["N"]),
        (3, ["SUB"]),
        (4, ["L"]),
    ]
    states = [line["data"]["values"]["log"] for line in lines.of("values")]
    assert states == [[], ["a"], ["a"], ["a", "a", "inner"], ["a", "a", "inner"]]


async def test_a_superstep_whose_writes_conflict_has_no_values() -> None:
    async def conflicts(state: State) -> State:
        return {"x": 5}

    lines = await run(beside(("A", conflicts), ("B", conflicts)), INPUT)

    assert len(lines.of("values")) == 1
    assert lines.last["data"]["error"]["error_type"] == "InvalidUpdateError"


async def test_a_value_that_is_changed_after_it_was_written_stays_as_it_was() -> None:
    async def in_the_loop(state: State) -> State:
        value = {"n": [1]}
        get_stream_writer()(value)
        value["n"].append(2)
        return {"log": [value]}

    def in_a_thread(state: State) -> State:
        value = {"n": [1]}
        get_stream_writer()(value)
        value["n"].append(2)
        return {"log": [value]}

    lines = await run(chain(("A", in_the_loop), ("B", in_a_thread)), INPUT)

    assert [line["data"]["value"] for line in lines.of("custom")] == [{"n": [1]}, {"n": [1]}]


async def test_an_update_that_a_thread_changes_later_stays_as_it_was() -> None:
    """The loop is busy while a graph in a thread goes on with what its node has returned."""
    made: list[dict[str, Any]] = []

    def inner(state: State) -> State:
        made.append({"n": [1]})
        return {"log": [made[-1]]}

    sub = chain(("inner", inner), checkpointer=False)  # so that it does not wait for the loop

    def calls(state: State) -> State:
        held, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            go_on.wait(20)

        loop.call_soon_threadsafe(hold)
        held.wait(20)
        try:
            sub.invoke({"x": 1, "log": []})
            made[-1]["n"].append(2)
        finally:
            go_on.set()
        return {"log": []}

    loop = asyncio.get_running_loop()
    lines = await run(chain(("OUT", calls)), INPUT, durability="async")

    assert lines.one("node.completed", "inner")["data"]["update"] == {"log": [{"n": [1]}]}
