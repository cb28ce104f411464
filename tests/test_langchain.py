"""What chat models say inside a node reaches the stream of the attempt around them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import tenacity
from langchain_core.callbacks import CallbackManager
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import Runtime
from typing_extensions import TypedDict

from telemetry import langchain, langgraph
from telemetry import tenacity as retries


class State(TypedDict, total=False):
    text: str


@pytest.fixture(autouse=True)
def seams() -> Iterator[None]:
    for seam in (langgraph, retries, langchain):
        seam.install()
    yield
    for seam in (langchain, retries, langgraph):
        seam.uninstall()


def model(*texts: str) -> GenericFakeChatModel:
    return GenericFakeChatModel(messages=iter([AIMessage(text) for text in texts]))


async def parts_of(node: Any, modes: set[str]) -> list[tuple[str, Any]]:
    """The token and message parts of a graph of one node."""
    graph = StateGraph(State).add_node("say", node).add_edge(START, "say").add_edge("say", END)
    seen: list[tuple[str, Any]] = []
    config: Any = {
        "configurable": {
            "__pregel_stream": StreamProtocol(lambda p: seen.append((p[1], p[2])), modes),
            "__pregel_runtime": Runtime(),
        }
    }
    async for _ in graph.compile().astream({}, config, stream_mode=[]):
        pass
    return [part for part in seen if part[0] in ("token", "message")]


async def ainvoke(state: State) -> State:
    return {"text": str((await model("hello big world").ainvoke("hi")).text)}


async def astream(state: State) -> State:
    return {"text": "".join([str(c.text) async for c in model("hello big world").astream("hi")])}


def invoke(state: State) -> State:
    return {"text": str(model("hello big world").invoke("hi").text)}


def stream(state: State) -> State:
    return {"text": "".join(str(c.text) for c in model("hello big world").stream("hi"))}


@pytest.mark.parametrize(
    "node", [pytest.param(n, id=n.__name__) for n in (ainvoke, astream, invoke, stream)]
)
async def test_tokens_and_the_whole_message_are_seen_however_a_model_is_called(node: Any) -> None:
    parts = await parts_of(node, {"attempts", "token", "message"})

    tokens = [data for kind, data in parts if kind == "token"]
    (message,) = [data[3] for kind, data in parts if kind == "message"]
    assert "".join(text for *_, text in tokens) == "hello big world" == message.text
    assert {data[3] for data in tokens} == {message.id}
    assert parts[-1][0] == "message"


async def test_a_stream_that_wants_no_messages_is_left_alone() -> None:
    assert await parts_of(ainvoke, {"attempts", "updates"}) == []


async def test_a_model_tagged_nostream_is_not_heard() -> None:
    async def quiet(state: State) -> State:
        await model("secret").with_config(tags=["nostream"]).ainvoke("hi")
        return {}

    assert await parts_of(quiet, {"attempts", "token", "message"}) == []


async def test_the_operations_around_a_model_call_are_named() -> None:
    @tenacity.retry(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none())
    async def ask() -> None:
        await model("one").ainvoke("hi")

    async def node(state: State) -> State:
        await ask()
        await model("two").ainvoke("hi")
        return {}

    parts = await parts_of(node, {"attempts", "token", "message"})

    calls = {data[-1].text: data[2] for kind, data in parts if kind == "message"}
    assert len(calls["one"]) == 1
    assert calls["two"] == ()


async def test_concurrent_models_do_not_hear_each_other() -> None:
    async def node(state: State) -> State:
        await asyncio.gather(*[model(f"model {i} speaks").ainvoke("hi") for i in range(5)])
        return {}

    parts = await parts_of(node, {"attempts", "token", "message"})

    texts: dict[str, str] = {}
    for kind, data in parts:
        if kind == "token":
            texts[data[3]] = texts.get(data[3], "") + data[4]
    assert sorted(texts.values()) == [f"model {i} speaks" for i in range(5)]


async def test_a_model_outside_of_any_node_is_nobodys_business() -> None:
    assert (await model("alone").ainvoke("hi")).text == "alone"


def test_unknown_parameters_are_refused_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    langchain.uninstall()
    monkeypatch.setattr(CallbackManager, "on_chat_model_start", lambda self, other: None)
    before = CallbackManager.on_chat_model_start

    with pytest.raises(langgraph.SeamMismatch, match="CallbackManager"):
        langchain.install()

    assert CallbackManager.on_chat_model_start is before


async def test_somebody_elses_stream_gets_what_langgraph_sends() -> None:
    async def node(state: State) -> State:
        get_stream_writer()({"mine": 1})
        return {"text": str((await model("two words").ainvoke("hi")).text)}

    inner = StateGraph(State).add_node("say", node).add_edge(START, "say").compile()
    graph = StateGraph(State).add_node("sub", inner).add_edge(START, "sub").compile()
    parts = graph.astream({}, stream_mode=["messages", "custom"], subgraphs=True)
    seen = [(mode, data) async for _, mode, data in parts]

    assert [data for mode, data in seen if mode == "custom"] == [{"mine": 1}]
    assert {mode for mode, _ in seen} == {"messages", "custom"}
    assert "".join(str(data[0].text) for mode, data in seen if mode == "messages") == "two words"
