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
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy, interrupt
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
