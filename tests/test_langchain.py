"""What chat models say inside a node reaches the stream of the attempt around them, and a witness
is told of each call of a model or a tool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tenacity
from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import (
    FakeMessagesListChatModel,
    GenericFakeChatModel,
)
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool, tool
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import Runtime
from opentelemetry import context as otel_context
from pydantic import ValidationError
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


PATCHED = [
    (CallbackManager, "on_chat_model_start"),
    (AsyncCallbackManager, "on_chat_model_start"),
    *[
        (BaseChatModel, name)
        for name in (
            "_generate_with_cache",
            "_agenerate_with_cache",
            "stream",
            "astream",
            "_iter_v2_events",
            "_aiter_v2_events",
        )
    ],
    (BaseTool, "run"),
    (BaseTool, "arun"),
]


@pytest.mark.parametrize(
    ("owner", "name"), [pytest.param(*it, id=f"{it[0].__name__}.{it[1]}") for it in PATCHED]
)
def test_unknown_parameters_are_refused_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    langchain.uninstall()
    monkeypatch.setattr(owner, name, lambda self, other: None)
    before = [getattr(*it) for it in PATCHED]

    with pytest.raises(langgraph.SeamMismatch, match=f"{owner.__name__}.{name}"):
        langchain.install()

    assert [getattr(*it) for it in PATCHED] == before


def test_what_is_patched_is_put_back() -> None:
    patched = [getattr(*it) for it in PATCHED]
    langchain.install()
    assert [getattr(*it) for it in PATCHED] == patched

    langchain.uninstall()
    originals = [getattr(*it) for it in PATCHED]
    langchain.install()

    assert not set(originals) & set(patched)
    assert [getattr(*it).__wrapped__ for it in PATCHED] == originals


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


class Seen:
    """A witness that notes what it is told."""

    def __init__(self, *, fails: str = "") -> None:
        self.told: list[Any] = []
        self.fails = fails
        self.context = otel_context.set_value("seen", self)

    def chat(self, provider: str, model: str | None) -> Any:
        self.tell("chat", provider, model)
        return Chat(self)

    def tool(self, name: str, call_id: str | None) -> Any:
        self.tell("tool", name, call_id)
        return Tool(self)

    def tell(self, what: str, *details: Any) -> None:
        self.told.append((what, *details))
        if what == self.fails:
            raise RuntimeError("a broken witness")


class Chat:
    def __init__(self, seen: Seen) -> None:
        self.seen, self.context = seen, seen.context

    def first_chunk(self) -> None:
        self.seen.tell("first chunk")

    def ended(self, answer: langchain.Answer, error: BaseException | None) -> None:
        self.seen.tell("ended", type(error))


class Tool:
    def __init__(self, seen: Seen) -> None:
        self.seen, self.context = seen, seen.context

    def ended(self, error: BaseException | None, *, failed: bool = False) -> None:
        self.seen.tell("ended", type(error), failed)


@tool
def double(x: int) -> int:
    """Double."""
    assert otel_context.get_value("seen") is not None
    return 2 * x


@tool
async def adouble(x: int) -> int:
    """Double."""
    return double.func(x)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("node", [ainvoke, astream, invoke, stream])
async def test_a_witness_is_told_the_life_of_a_model_call(node: Any) -> None:
    seen = Seen()
    before = otel_context.get_current()
    with langchain.listen(seen):
        result = node({})
        text = (await result if asyncio.iscoroutine(result) else result)["text"]

    streams = node in (astream, stream)
    assert text == "hello big world"
    assert seen.told == [
        ("chat", "genericfakechatmodel", None),
        *[("first chunk",)] * streams,
        ("ended", type(None)),
    ]
    assert otel_context.get_current() == before
    assert langchain.current_witness.get() is None


@pytest.mark.parametrize("fails", ["chat", "tool", "first chunk", "ended"])
async def test_a_witness_that_fails_harms_nobody(fails: str) -> None:
    with langchain.listen(Seen(fails=fails)), otel_attached("seen"):
        for node in (ainvoke, astream, invoke, stream):
            result = node({})
            text = (await result if asyncio.iscoroutine(result) else result)["text"]
            assert text == "hello big world"
        assert double.invoke({"x": 2}) == await adouble.ainvoke({"x": 2}) == 4


async def test_a_witness_is_told_the_life_of_a_tool_call() -> None:
    seen = Seen()
    with langchain.listen(seen):
        call = {"name": "double", "args": {"x": 2}, "id": "c1", "type": "tool_call"}
        assert double.invoke(call).content == "4"
        assert await double.ainvoke({"x": 3}) == await adouble.ainvoke({"x": 3}) == 6
        with pytest.raises(ValidationError):
            double.invoke({"x": "two"})

    ended = ("ended", type(None), False)
    assert seen.told == [
        *[("tool", "double", "c1"), ended],
        *[("tool", "double", None), ended],
        *[("tool", "adouble", None), ended],
        *[("tool", "double", None), ("ended", ValidationError, False)],
    ]


async def test_the_choices_of_one_answer_are_counted_once() -> None:
    class Choices(FakeMessagesListChatModel):
        def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
            usage: Any = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
            reasons = ("stop", "length")
            return ChatResult(
                generations=[
                    ChatGeneration(
                        message=AIMessage("a", usage_metadata=usage),
                        generation_info={"finish_reason": reason},
                    )
                    for reason in reasons
                ]
            )

    answers: list[langchain.Answer] = []
    seen = Seen()
    with langchain.listen(seen), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chat, "ended", lambda self, answer, error: answers.append(answer))
        await Choices(responses=[]).ainvoke("hi")

    (answer,) = answers
    assert (answer.input_tokens, answer.output_tokens) == (3, 4)
    assert answer.finish_reasons == ("stop", "length")


async def test_a_stream_that_nobody_reads_has_not_begun() -> None:
    seen = Seen()
    with langchain.listen(seen):
        chunks, achunks = model("hi").stream("hi"), model("hi").astream("hi")
        chunks.close()  # type: ignore[attr-defined]
        await achunks.aclose()  # type: ignore[attr-defined]

    assert seen.told == []


@contextmanager
def otel_attached(key: str) -> Iterator[None]:
    token = otel_context.attach(otel_context.set_value(key, True))
    try:
        yield
    finally:
        otel_context.detach(token)
