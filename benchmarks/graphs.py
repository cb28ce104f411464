"""The two graphs that are measured: many small steps, and one step that says much."""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated

from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

NODES = 10
EVENTS = 200


class State(TypedDict, total=False):
    n: int
    log: Annotated[list[str], operator.add]


def _chain() -> StateGraph[State]:
    builder, previous = StateGraph(State), START
    for index in range(NODES):
        name = f"n{index}"

        async def node(state: State, name: str = name) -> State:
            return {"n": state.get("n", 0) + 1, "log": [name]}

        builder.add_node(name, node)
        builder.add_edge(previous, name)
        previous = name
    builder.add_edge(previous, END)
    return builder


async def _emit(state: State) -> State:
    write = get_stream_writer()
    for index in range(EVENTS):
        write({"index": index, "text": "some progress that a node reports"})
        if index % 10 == 9:
            await asyncio.sleep(0)  # as a node does that gets its progress from elsewhere
    return {"n": EVENTS}


async def _wait(state: State) -> State:
    await asyncio.sleep(3600)
    return {}


chain = _chain()
events = StateGraph(State).add_node("emit", _emit).add_edge(START, "emit").add_edge("emit", END)
idle = StateGraph(State).add_node("wait", _wait).add_edge(START, "wait").add_edge("wait", END)
