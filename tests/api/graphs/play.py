"""Graphs that wait for the test, ask, fail, or say much."""

from __future__ import annotations

import asyncio
import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict


class Stage:
    """Where a test and the nodes of its graphs meet. Fresh for each test."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._arrived: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._open: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.seen: dict[str, Any] = {}

    async def enter(self, gate: str) -> None:
        """For nodes: say that one is here, and wait to be let through."""
        self._arrived[gate].set()
        await self._open[gate].wait()

    async def arrival(self, gate: str) -> None:
        """For tests: a node has come to the gate."""
        async with asyncio.timeout(10):
            await self._arrived[gate].wait()

    def open(self, *gates: str) -> None:
        for gate in gates:
            self._open[gate].set()


stage = Stage()


class Free(TypedDict, total=False):
    """A state that requires nothing."""

    n: int
    log: Annotated[list[str], operator.add]
    text: str


class Needs(TypedDict):
    topic: str
    tone: str


# gated: two steps, each waits for its gate.


async def first(state: Free) -> Free:
    await stage.enter("first")
    return {"log": ["first"]}


async def second(state: Free) -> Free:
    await stage.enter("second")
    return {"log": ["second"]}


def _line(*nodes: Any, state: Any = Free, **compiling: Any) -> Any:
    builder = StateGraph(state)
    names = [node.__name__ for node in nodes]
    for name, node in zip(names, nodes, strict=True):
        builder.add_node(name, node)
    for one, other in zip([START, *names], [*names, END], strict=True):
        builder.add_edge(one, other)
    return builder.compile(**compiling)


gated = _line(first, second)


# free: one step at once.


async def count(state: Free) -> Free:
    return {"n": state.get("n", 0) + 1, "log": ["count"]}


free = _line(count)


# needs: an input with two required fields.


async def write(state: Needs) -> dict[str, Any]:
    return {"topic": state["topic"].upper()}


needs = _line(write, state=Needs)


# ask, ask_two, stops: they wait for a human.


async def ask(state: Free) -> Free:
    return {"log": [f"answer={interrupt({'question': 'go on?'})}"]}


async def ask_fully(state: Free) -> Free:
    schema = {"type": "object", "properties": {"approve": {"type": "boolean"}}}
    return {"log": [f"answer={interrupt('go on?', response_schema=schema)}"]}


async def ask_left(state: Free) -> Free:
    return {"log": [f"left={interrupt('left?')}"]}


async def ask_right(state: Free) -> Free:
    return {"log": [f"right={interrupt('right?')}"]}


asks = _line(ask)
asks_fully = _line(ask_fully)
stops = _line(count, ask, interrupt_before=["count"])


def _two() -> Any:
    builder = StateGraph(Free)
    for node in (ask_left, ask_right):
        builder.add_node(node.__name__, node)
        builder.add_edge(START, node.__name__)
    return builder.compile()


asks_two = _two()


# fails, endless.


async def fail(state: Free) -> Free:
    raise ValueError("the password is hunter2")


async def again(state: Free) -> Free:
    return {"n": state.get("n", 0) + 1}


fails = _line(fail)


def _endless() -> Any:
    builder = StateGraph(Free)
    builder.add_node("again", again)
    builder.add_edge(START, "again")
    builder.add_edge("again", "again")
    return builder.compile()


endless = _endless()


# big, odd, burst, talks: what lines hold.


async def grow(state: Free) -> Free:
    return {"text": "x" * state["n"]}


async def speak(state: Free) -> Free:
    return {"text": "a\u2028b\u2029c\u0085d é 雪"}


async def burst(state: Free) -> Free:
    write = get_stream_writer()
    for i in range(state["n"]):
        write({"i": i, "pad": "x" * 200})
    await stage.enter("burst")
    return {"log": ["burst"]}


async def talk(state: MessagesState) -> dict[str, Any]:
    return {"messages": [AIMessage("hello", id="m-1")]}


grows = _line(grow)
odd = _line(speak)
bursts = _line(burst)
talks = _line(talk, state=MessagesState)


# looks: what of a request reaches a graph.


class Place(TypedDict, total=False):
    city: str


async def look(state: Free, config: RunnableConfig, runtime: Runtime[Place]) -> Free:
    stage.seen["configurable"] = config["configurable"]
    stage.seen["metadata"] = config["metadata"]
    stage.seen["tags"] = config["tags"]
    stage.seen["recursion_limit"] = config["recursion_limit"]
    stage.seen["context"] = runtime.context
    return {}


def _looks() -> Any:
    builder = StateGraph(Free, context_schema=Place)
    builder.add_node("look", look)
    builder.add_edge(START, "look")
    return builder.compile()


looks = _looks()


# hides: part of its state is not its output.


class Shown(TypedDict, total=False):
    n: int


async def hide(state: Free) -> Free:
    return {"n": 1, "text": "private"}


def _hides() -> Any:
    builder = StateGraph(Free, output_schema=Shown)
    builder.add_node("hide", hide)
    builder.add_edge(START, "hide")
    return builder.compile()


hides = _hides()


# typed: its input is a pydantic model.


class Order(BaseModel):
    item: str
    amount: int = 1


async def order(state: Order) -> dict[str, Any]:
    return {"amount": state.amount + 1}


typed = _line(order, state=Order)

# holds: a class of its own in its state; keeps: a node that does not stop when it is told.


@dataclass
class Thing:
    size: int


class Holding(TypedDict, total=False):
    thing: Thing


async def hold(state: Holding) -> Holding:
    return {"thing": Thing(3)}


async def keep(state: Free) -> Free:
    while True:
        try:
            await stage.enter("keep")
            return {}
        except asyncio.CancelledError:
            stage.seen["told"] = True


holds = _line(hold, state=Holding)
keeps = _line(keep)

NAMES = (
    "gated free needs asks asks_fully asks_two stops fails endless grows odd bursts talks looks"
    " hides typed holds keeps"
).split()
