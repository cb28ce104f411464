"""A graph to be watched: its first draft fails after it was said, and a person approves the second.

While `hold/<thread>.<name>` exists in the server's folder, a node waits, as in tests/process.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import CachePolicy, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

FOLDER = Path.cwd()
#: Long enough to be seen, short enough to be waited for.
BACK_OFF_S = 2.0


class Wish(TypedDict):
    topic: str


class Tale(Wish, total=False):
    length: int
    mood: Literal["calm", "wild"]
    with_title: bool
    draft: str
    published: bool


async def held(config: RunnableConfig, name: str) -> None:
    hold = FOLDER / "hold" / f"{config['configurable']['thread_id']}.{name}"
    while hold.exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def think(state: Tale, config: RunnableConfig) -> Tale:
    get_stream_writer()({"message": f"a story about {state['topic']}"})
    await held(config, "think")
    return {"topic": state["topic"]}


async def draft(state: Tale, config: RunnableConfig, runtime: Runtime[None]) -> Tale:
    info = runtime.execution_info
    assert info is not None
    attempt = info.node_attempt
    words = "a stormy start" if attempt == 1 else "a calm ending"
    model = GenericFakeChatModel(messages=iter([AIMessage(words)]))
    said = await model.ainvoke("go on")
    await held(config, f"draft{attempt}")
    if attempt == 1:
        raise ConnectionError("the muse is away")
    return {"topic": state["topic"], "draft": str(said.text)}


async def approve(state: Tale) -> Tale:
    answer = interrupt({"question": "Shall it be published?", "draft": state["draft"]})
    return {"topic": state["topic"], "published": answer == "yes"}


story = (
    StateGraph(Tale)
    .add_node("think", think)
    .add_node("draft", draft, retry_policy=RetryPolicy(initial_interval=BACK_OFF_S, jitter=False))
    .add_node("approve", approve)
    .add_edge(START, "think")
    .add_edge("think", "draft")
    .add_edge("draft", "approve")
    .add_edge("approve", END)
    .compile()
)


# desk: team(sketch → library(look_up → read) for every item → edit) → proof.


class Work(TypedDict, total=False):
    item: int
    items: int


def failing(config: RunnableConfig, name: str) -> None:
    """Fails while `hold/<thread>.<name>` exists."""
    if (FOLDER / "hold" / f"{config['configurable']['thread_id']}.{name}").exists():
        raise ConnectionError("not now")


async def sketch(state: Work, config: RunnableConfig) -> Work:
    await held(config, "sketch")
    return {"items": state.get("items", 1)}


async def look_up(state: Work, config: RunnableConfig) -> Work:
    get_stream_writer()({"message": f"looks up {state['item']}"})
    await held(config, f"look_up{state['item']}")
    return {}


async def read(state: Work, config: RunnableConfig) -> Work:
    await held(config, f"read{state['item']}")
    return {}


async def edit(state: Work, config: RunnableConfig) -> Work:
    await held(config, "edit")
    failing(config, "edit_fails")
    return {}


async def proof(state: Work, config: RunnableConfig) -> Work:
    await held(config, "proof")
    failing(config, "proof_fails")
    return {}


def every_item(state: Work) -> list[Send]:
    return [Send("library", {"item": item}) for item in range(state["items"])]


class Book(TypedDict, total=False):
    """What one visit of the library works on; nothing of it goes back."""

    item: int


class Nothing(TypedDict, total=False):
    found: int


library = (
    StateGraph(Book, output_schema=Nothing)
    .add_sequence([look_up, read])
    .add_edge(START, "look_up")
    .compile()
)
team = (
    StateGraph(Work)
    .add_node("sketch", sketch)
    .add_node("library", library)
    .add_node("edit", edit)
    .add_edge(START, "sketch")
    .add_conditional_edges("sketch", every_item, ["library"])
    .add_edge("library", "edit")
    .compile()
)
patient = RetryPolicy(
    initial_interval=BACK_OFF_S, backoff_factor=1.0, max_attempts=20, jitter=False
)
desk = (
    StateGraph(Work)
    .add_node("team", team, retry_policy=patient)
    .add_node("proof", proof)
    .add_edge(START, "team")
    .add_edge("team", "proof")
    .compile()
)


# remembering: its first node is cached; its second makes as many letters as it is told.


class Letters(TypedDict, total=False):
    size: int
    text: str


async def count(state: Letters) -> Letters:
    return {"size": state["size"]}


async def spell(state: Letters) -> Letters:
    text = "ab" * (state["size"] // 2)
    get_stream_writer()(text)
    model = GenericFakeChatModel(messages=iter([AIMessage(text)]))
    await model.ainvoke("go on")
    return {"text": text}


remembering = (
    StateGraph(Letters)
    .add_node("count", count, cache_policy=CachePolicy())
    .add_node("spell", spell)
    .add_edge(START, "count")
    .add_edge("count", "spell")
    .compile(cache=InMemoryCache())
)


# Sixty visits, one after the other.


async def again(state: Work, config: RunnableConfig) -> Work:
    await held(config, f"again{state.get('items', 0)}")
    return {"items": state.get("items", 0) + 1}


walking = (
    StateGraph(Work)
    .add_node("again", again)
    .add_edge(START, "again")
    .add_conditional_edges("again", lambda state: "again" if state["items"] < 60 else END)
    .compile()
)


class Undrawable(type(story)):  # type: ignore[misc]
    """LangGraph runs a graph's own functions to draw it, and those may fail."""

    def get_graph(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("not to be drawn")


undrawn = StateGraph(Work).add_node("team", team).add_edge(START, "team").compile()
undrawn.__class__ = Undrawable
