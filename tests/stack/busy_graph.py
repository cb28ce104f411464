"""Graphs that move all that the dashboards show: retries, a cache, a model, a tool, a question."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.config import get_stream_writer
from langgraph.graph import START, StateGraph
from langgraph.types import CachePolicy, RetryPolicy, interrupt
from tenacity import retry, stop_after_attempt, wait_fixed
from typing_extensions import TypedDict

SOON = RetryPolicy(initial_interval=0.2, backoff_factor=1.0, jitter=False, max_attempts=2)


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    fail: bool


class Opaque:
    """What JSON cannot hold."""


class Parrot(BaseChatModel):
    """Streams two words, and tells what they cost."""

    @property
    def _llm_type(self) -> str:
        return "parrot"

    async def _astream(self, *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
        yield ChatGenerationChunk(message=AIMessageChunk("two "))
        usage: Any = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}
        yield ChatGenerationChunk(message=AIMessageChunk("words", usage_metadata=usage))

    def _generate(self, *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("two words"))])


@tool
async def weigh(thing: str) -> str:
    """Weigh a thing."""
    return f"{len(thing)} kg"


_calls = {"node": 0, "call": 0}


def every_other_time(name: str) -> None:
    _calls[name] += 1
    if _calls[name] % 2:
        raise ConnectionError("try again")


async def flaky(state: State) -> State:
    every_other_time("node")
    return {"log": ["flaky"]}


@retry(stop=stop_after_attempt(3), wait=wait_fixed(0.2), reraise=True)
async def dial() -> None:
    every_other_time("call")


async def calls(state: State) -> State:
    await dial()
    return {"log": ["calls"]}


async def speaks(state: State) -> State:
    await Parrot().ainvoke("how heavy is a parrot?")
    await weigh.ainvoke({"thing": "parrot"})
    return {"log": ["speaks"]}


async def dear(state: State) -> State:
    return {"log": ["dear"]}


async def blocks(state: State) -> State:
    get_stream_writer()({"value": Opaque()})
    time.sleep(0.4)  # noqa: ASYNC251 -- that is the point
    return {"log": ["blocks"]}


def in_a_thread(state: State) -> State:
    if state.get("fail"):
        raise ValueError("as it was told")
    return {"log": ["in_a_thread"]}


async def ask(state: State) -> State:
    await asyncio.sleep(0.2)
    return {"log": [interrupt("go on?")]}


def _busy() -> Any:
    builder = StateGraph(State)
    builder.add_node(flaky, retry_policy=SOON)
    builder.add_node(calls)
    builder.add_node(speaks)
    builder.add_node(dear, cache_policy=CachePolicy(key_func=lambda state: "the same"))
    builder.add_node(blocks)
    builder.add_node(in_a_thread)
    builder.add_node(ask)
    names = ("flaky", "calls", "speaks", "dear", "blocks", "in_a_thread", "ask")
    for before, after in zip((START, *names), names, strict=False):
        builder.add_edge(before, after)
    return builder.compile(cache=InMemoryCache())


busy = _busy()
