from __future__ import annotations

import runtime.tools as named
from langgraph.graph import END, START, StateGraph
from runtime.tools import greet

import runtime
from agent.state import Greeting, State
from runtime import tools as taken


def hello(state: State) -> State:
    return {"greeting": Greeting(greet(state["name"]))}


async def later(state: State) -> State:
    import runtime.lazy
    from runtime.lazy import shout

    return {
        "tools": [
            runtime.__doc__ or "",
            runtime.lazy.shout("plain"),
            shout("from"),
            named.greet("named"),
            taken.greet("taken"),
        ]
    }


assert runtime.tools is named

builder = StateGraph(State)
builder.add_node("hello", hello)
builder.add_node("later", later)
builder.add_edge(START, "hello")
builder.add_edge("hello", "later")
builder.add_edge("later", END)
graph = builder.compile()
