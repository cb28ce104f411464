"""Graphs whose nodes tell that they were entered, and wait as long as a test holds them.

Entering a node appends `thread node` to the file `marks`; while `hold/<thread>.<node>` exists, the
node waits. Both are in the server's folder.
"""

from __future__ import annotations

import asyncio
import operator
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import httpx2
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy, Send, interrupt
from tenacity import retry, stop_after_attempt
from typing_extensions import TypedDict

FOLDER = Path.cwd()


class State(TypedDict, total=False):
    seen: Annotated[list[str], operator.add]
    item: int
    size: int
    pad: str
    url: str


def mark(config: RunnableConfig, node: str) -> Path:
    thread = config["configurable"]["thread_id"]
    with (FOLDER / "marks").open("a") as marks:
        marks.write(f"{thread} {node}\n")
    return FOLDER / "hold" / f"{thread}.{node}"


async def enter(config: RunnableConfig, node: str) -> None:
    hold = mark(config, node)
    while hold.exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def enter_in_thread(config: RunnableConfig, node: str) -> None:
    hold = mark(config, node)
    while hold.exists():
        time.sleep(0.01)


async def say(text: str) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage(text)]))
    await model.ainvoke("go on")


# a → b → c: tokens, custom values, a retry.


async def a(state: State, config: RunnableConfig) -> State:
    await say("first words of the chain")
    await enter(config, "a")
    return {"seen": ["a"]}


async def b(state: State, config: RunnableConfig) -> State:
    write = get_stream_writer()
    write({"part": 1})
    await enter(config, "b")
    write({"part": 2})
    await say("second words")
    return {"seen": ["b"]}


async def c(state: State, config: RunnableConfig, runtime: Runtime[None]) -> State:
    info = runtime.execution_info
    assert info is not None
    get_stream_writer()({"try": "c"})
    await enter(config, f"c{info.node_attempt}")
    if info.node_attempt == 1:
        raise ConnectionError("not yet")
    return {"seen": ["c"]}


patient = RetryPolicy(initial_interval=0.01, jitter=False)
chain = (
    StateGraph(State)
    .add_node("a", a)
    .add_node("b", b)
    .add_node("c", c, retry_policy=patient)
    .add_edge(START, "a")
    .add_edge("a", "b")
    .add_edge("b", "c")
    .add_edge("c", END)
    .compile()
)


# split → 3 × work (one of them in a thread) → join.


def split(state: State) -> list[Send]:
    return [Send("work" if item else "thread_work", {"item": item}) for item in range(3)]


async def plan(state: State, config: RunnableConfig) -> State:
    await enter(config, "plan")
    return {"seen": ["plan"]}


async def work(state: State, config: RunnableConfig) -> State:
    get_stream_writer()({"item": state["item"]})
    await say(f"words of item {state['item']}")
    await enter(config, f"work{state['item']}")
    return {"seen": [f"work{state['item']}"]}


def thread_work(state: State, config: RunnableConfig) -> State:
    get_stream_writer()({"item": state["item"]})
    enter_in_thread(config, "work0")
    return {"seen": ["work0"]}


async def join(state: State, config: RunnableConfig) -> State:
    await enter(config, "join")
    return {"seen": ["join"]}


fanout = (
    StateGraph(State)
    .add_node(plan)
    .add_node(work)
    .add_node(thread_work)
    .add_node(join)
    .add_edge(START, "plan")
    .add_conditional_edges("plan", split, ["work", "thread_work"])
    .add_edge(["work", "thread_work"], "join")
    .compile()
)


# before → sub(one → two) → after.


async def one(state: State, config: RunnableConfig) -> State:
    get_stream_writer()("from one")
    await enter(config, "one")
    return {"seen": ["one"]}


async def two(state: State, config: RunnableConfig) -> State:
    await say("words of an inner node")
    await enter(config, "two")
    return {"seen": ["two"]}


async def before(state: State, config: RunnableConfig) -> State:
    await enter(config, "before")
    return {"seen": ["before"]}


def after(state: State, config: RunnableConfig) -> State:
    enter_in_thread(config, "after")
    return {"seen": ["after"]}


class Inner(TypedDict, total=False):
    seen: Annotated[list[str], operator.add]


sub = (
    StateGraph(Inner)
    .add_node(one)
    .add_node(two)
    .add_edge(START, "one")
    .add_edge("one", "two")
    .compile()
)
nested = (
    StateGraph(State)
    .add_node(before)
    .add_node("sub", sub)
    .add_node(after)
    .add_edge(START, "before")
    .add_edge("before", "sub")
    .add_edge("sub", "after")
    .compile()
)


# prepare → ask (twice) → finish.


async def prepare(state: State, config: RunnableConfig) -> State:
    await enter(config, "prepare")
    return {"seen": ["prepare"]}


async def ask(state: State, config: RunnableConfig) -> State:
    await enter(config, "ask")
    first = interrupt({"question": 1})
    second = interrupt({"question": 2})
    return {"seen": [f"ask:{first}:{second}"]}


async def finish(state: State, config: RunnableConfig) -> State:
    await enter(config, "finish")
    return {"seen": ["finish"]}


asking = (
    StateGraph(State)
    .add_node(prepare)
    .add_node(ask)
    .add_node(finish)
    .add_edge(START, "prepare")
    .add_edge("prepare", "ask")
    .add_edge("ask", "finish")
    .compile()
)


# prepare → (breakpoint) ask_nobody → finish.


async def dangerous(state: State, config: RunnableConfig) -> State:
    await enter(config, "dangerous")
    return {"seen": ["dangerous"]}


def _guarded(**breakpoints: list[str]) -> Any:
    return (
        StateGraph(State)
        .add_node(prepare)
        .add_node(dangerous)
        .add_node(finish)
        .add_edge(START, "prepare")
        .add_edge("prepare", "dangerous")
        .add_edge("dangerous", "finish")
        .compile(**breakpoints)  # type: ignore[arg-type]
    )


guarded = _guarded(interrupt_before=["dangerous"])
guarded_after = _guarded(interrupt_after=["prepare"])


# Its node writes down the key that it would give to a payment; then it fails, and asks.


async def pay(state: State, config: RunnableConfig, runtime: Runtime[None]) -> State:
    info = runtime.execution_info
    assert info is not None
    mark(config, f"key {info.task_id}")
    await enter(config, f"pay{info.node_attempt}")
    if info.node_attempt == 1:
        raise ConnectionError("not yet")
    return {"seen": [f"pay:{interrupt('how much?')}"]}


paying = (
    StateGraph(State)
    .add_node(prepare)
    .add_node(pay, retry_policy=patient)
    .add_edge(START, "prepare")
    .add_edge("prepare", "pay")
    .compile()
)


# Nodes that misbehave.


def _single(node: Any, *more: Any) -> Any:
    builder = StateGraph(State).add_sequence([node, *more])
    return builder.add_edge(START, node.__name__).compile()


async def freeze(state: State, config: RunnableConfig) -> State:
    await enter(config, "freeze")
    time.sleep(5)  # noqa: ASYNC251
    return {"seen": ["freeze"]}


async def die(state: State, config: RunnableConfig) -> State:
    await enter(config, "die")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


async def swallow(state: State, config: RunnableConfig) -> State:
    hold = mark(config, "swallow")
    while hold.exists():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            mark(config, "swallowed")
    return {"seen": ["swallow"]}


def block(state: State, config: RunnableConfig) -> State:
    enter_in_thread(config, "block")
    mark(config, "unblocked")
    return {"seen": ["block"]}


async def large(state: State, config: RunnableConfig) -> State:
    await enter(config, "large")
    write = get_stream_writer()
    for number in range(20):
        write({"number": number, "pad": "x" * state.get("size", 1000)})
        await asyncio.sleep(0)
    return {"seen": ["large"], "pad": "y" * state.get("size", 1000)}


async def many(state: State, config: RunnableConfig) -> State:
    write = get_stream_writer()
    await enter(config, "many")
    for number in range(state.get("size", 1000)):
        write(number)
        if number % 50 == 0:
            await asyncio.sleep(0.002)
    return {"seen": ["many"]}


short = _single(prepare, finish)
freezing = _single(freeze, finish)
deadly = _single(die)
careful_then_deadly = _single(prepare, finish, die)
swallowing = _single(swallow, finish)
blocking = _single(block, finish)
growing = _single(large, finish)
talkative = _single(many)


# Nodes that ask others: the first with a retried call, the second in a thread.


async def fetch(state: State) -> State:
    url = state["url"]

    @retry(stop=stop_after_attempt(3))
    async def look_up() -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            (await http.get(f"{url}/look-up")).raise_for_status()

    await look_up()
    return {"seen": ["fetch"]}


def fetch_in_thread(state: State) -> State:
    with httpx2.Client(trust_env=False) as http:
        http.get(f"{state['url']}/in-thread").raise_for_status()
    return {"seen": ["fetch_in_thread"]}


calling = _single(fetch, fetch_in_thread)


# A node that fails as long as a test holds it, and then waits for very long.


async def tire(state: State, config: RunnableConfig) -> State:
    if mark(config, "tire").exists():
        raise ConnectionError("not now")
    return {"seen": ["tire"]}


tiring = (
    StateGraph(State)
    .add_node(prepare)
    .add_node("tire", tire, retry_policy=RetryPolicy(initial_interval=3600, jitter=False))
    .add_edge(START, "prepare")
    .add_edge("prepare", "tire")
    .compile()
)
