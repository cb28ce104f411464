"""The assistant and its stand-in, without a socket: OpenAI's own client reads what it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

import httpx2
import pytest
from example_kit import EXAMPLES, load
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import ToolException
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from tenacity import Future, RetryCallState

from runtime.graphs import Graphs

FOLDER = EXAMPLES / "assistant"
BOTH = "¿Dónde está el paquete del pedido 1002, y cuánto son 3 * 19.95?"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLES_PACE", "0")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "STANDIN_FAULTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from load("assistant", monkeypatch)


@pytest.fixture
def standin(example: ModuleType) -> ModuleType:
    module: ModuleType = example.standin
    return module


@pytest.fixture
async def graph(
    example: ModuleType, standin: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """The graph, whose model's client hands its requests to the stand-in's own reply."""
    completions = standin.Completions()

    async def handle(request: httpx2.Request) -> httpx2.Response:
        reply = completions.reply(json.loads(request.content))

        async def parts() -> AsyncIterator[bytes]:
            for part in reply.parts:
                yield part
            if reply.cut:
                raise httpx2.RemoteProtocolError("peer closed connection")

        return httpx2.Response(reply.status, headers=reply.headers, content=parts())

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(handle)) as http:
        monkeypatch.setattr(standin, "url", lambda: "http://stand-in.test/v1")
        monkeypatch.setattr(standin, "client", lambda: http)
        yield example.builder.compile(checkpointer=InMemorySaver())


def thread(name: str = "t-1") -> Any:
    return {"configurable": {"thread_id": name}}


def says(text: str) -> Any:
    return {"messages": [{"role": "user", "content": text}]}


def last(final: Any) -> str:
    return str(final["messages"][-1].text)


class TestGraph:
    async def test_it_is_served_with_a_default_question(self) -> None:
        async with Graphs([FOLDER]) as graphs:
            loaded = graphs.get("assistant")

            assert loaded.default_input == says(BOTH)
            assert set(loaded.schema()["input"]["properties"]) == {"messages"}
            assert loaded.nodes == ("ask", "approve", "tools")

    async def test_no_port_is_opened_before_a_run(self, standin: ModuleType) -> None:
        assert standin._started.cache_info().currsize == 0

    async def test_tools_are_used_side_by_side(self, graph: Any) -> None:
        final = await graph.ainvoke(says(BOTH), thread())

        assert [type(message).__name__ for message in final["messages"]] == [
            "HumanMessage",
            "AIMessage",
            "ToolMessage",
            "ToolMessage",
            "AIMessage",
        ]
        assert last(final).splitlines()[1:] == [
            "- 3 * 19.95 = 59.85",
            "- El paquete ES-7731 está en reparto: llega hoy antes de las 20:00.",
        ]

    async def test_a_thread_is_a_conversation(self, graph: Any) -> None:
        await graph.ainvoke(says("¿Qué hay en el pedido 1003?"), thread())
        final = await graph.ainvoke(says("gracias"), thread())

        assert last(final).endswith("He leído: «gracias».")
        assert len(final["messages"]) == 6

    async def test_usage_comes_with_a_stream(self, graph: Any) -> None:
        parts = [
            chunk
            async for chunk, _ in graph.astream(says("hola"), thread(), stream_mode="messages")
        ]
        whole = sum(parts[1:], parts[0])

        assert len([part for part in parts if part.text]) > 10
        assert whole.usage_metadata["output_tokens"] == len(whole.text.split())

    @pytest.mark.parametrize("fault", ["#429", "#500", "#cut", "#429 #500 #cut", "#slow"])
    async def test_it_gets_over(self, graph: Any, fault: str) -> None:
        plain = await graph.ainvoke(says("hola"), thread("plain"))
        for name in ("first", "second"):  # it fails in the same way each time
            final = await graph.ainvoke(says(f"hola {fault}"), thread(name))

            assert last(final) == last(plain)

    async def test_the_environment_makes_every_question_fail(
        self, graph: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STANDIN_FAULTS", "500 500 cut")
        final = await graph.ainvoke(says(BOTH), thread())

        assert last(final).startswith("Esto es lo que he averiguado")

    @pytest.mark.parametrize("question", ["pedido 9999", "¿Cuánto es 3/0?"])
    async def test_a_tool_that_cannot_says_so_to_the_model(self, graph: Any, question: str) -> None:
        final = await graph.ainvoke(says(question), thread())
        (told,) = (message for message in final["messages"] if isinstance(message, ToolMessage))

        assert told.status == "error"
        assert told.text in ("No hay ningún pedido 9999.", "No sé calcular '3/0'.")
        assert last(final) == told.text


class TestApproval:
    QUESTION = "Devuelve el pedido 1003 y el 1001"

    @pytest.mark.parametrize("answer", [{"approve": True}, True, "Sí"])
    async def test_yes_lets_the_calls_pass(
        self, example: ModuleType, graph: Any, answer: Any
    ) -> None:
        asked = await graph.ainvoke(says(self.QUESTION), thread())
        paid_before = set(sys.modules["shop"].paid_back)
        final = await graph.ainvoke(Command(resume=answer), thread())

        (waiting,) = asked["__interrupt__"]
        assert waiting.value["calls"] == [
            {"name": "refund_order", "args": {"number": 1003}},
            {"name": "refund_order", "args": {"number": 1001}},
        ]
        assert paid_before == set()
        assert sys.modules["shop"].paid_back == {1003, 1001}
        assert "Devueltos 89,90 € del pedido 1003." in last(final)

    @pytest.mark.parametrize("answer", [{"approve": False}, False, "no"])
    async def test_no_is_told_to_the_model(self, graph: Any, answer: Any) -> None:
        await graph.ainvoke(says(self.QUESTION), thread())
        final = await graph.ainvoke(Command(resume=answer), thread())

        assert sys.modules["shop"].paid_back == set()
        assert last(final).count("Una persona ha dicho que no.") == 2

    async def test_what_does_no_harm_passes_after_a_no(
        self, example: ModuleType, graph: Any
    ) -> None:
        calls = [
            {"name": "refund_order", "args": {"number": 1001}, "id": "1", "type": "tool_call"},
            {"name": "calculate", "args": {"expression": "1+1"}, "id": "2", "type": "tool_call"},
        ]
        await graph.aupdate_state(
            thread(), {"messages": [("user", "hola"), AIMessage("", tool_calls=calls)]}, "ask"
        )
        await graph.ainvoke(None, thread())
        final = await graph.ainvoke(Command(resume=False), thread())

        results = {m.tool_call_id: m.text for m in final["messages"] if isinstance(m, ToolMessage)}
        assert results == {"1": "Una persona ha dicho que no.", "2": "1+1 = 2"}

    async def test_an_answer_that_means_nothing_is_asked_for_again(self, graph: Any) -> None:
        await graph.ainvoke(says(self.QUESTION), thread())
        asked = await graph.ainvoke(Command(resume="quizás"), thread())

        assert asked["__interrupt__"][0].value["question"] == "¿Lo hago?"


class TestEndpoint:
    async def test_a_key_alone_means_openai(
        self, example: ModuleType, standin: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        chat = example.model().bound

        assert chat.root_async_client.base_url.host == "api.openai.com"
        assert chat.model_name == "gpt-4.1-mini"
        assert chat.root_async_client.max_retries == 0
        assert standin._started.cache_info().currsize == 0

    async def test_an_address_needs_no_key(
        self, example: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", "http://llm.test/v1")
        monkeypatch.setenv("OPENAI_MODEL", "small")
        chat = example.model().bound

        assert str(chat.root_async_client.base_url) == "http://llm.test/v1/"
        assert chat.model_name == "small"

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            pytest.param({"Retry-After": "2"}, 2.0, id="told"),
            pytest.param({"Retry-After": "3600"}, 60.0, id="too long"),
            pytest.param({"Retry-After": "-1"}, 0.0, id="in the past"),
            pytest.param({"Retry-After": "soon"}, 4.0, id="no number"),
            pytest.param({}, 4.0, id="not told"),
        ],
    )
    def test_a_429_says_when_to_come_back(
        self,
        example: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        headers: dict[str, str],
        seconds: float,
    ) -> None:
        monkeypatch.setattr(example, "PACE", 1.0)
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
        state.attempt_number = 2
        state.outcome = Future(2)
        error = ConnectionError()
        error.response = httpx2.Response(429, headers=headers)  # type: ignore[attr-defined]
        state.outcome.set_exception(error)

        assert example.as_told(state) == seconds


class TestStandIn:
    def test_without_a_stream_it_answers_whole(self, standin: ModuleType) -> None:
        body = {"model": "m", "messages": says("¿Cuánto es 2*3? ¿Y el pedido 1001?")["messages"]}
        reply = standin.Completions().reply(body)
        said = json.loads(reply.parts[0])

        (choice,) = said["choices"]
        assert not reply.streamed
        assert said["object"] == "chat.completion"
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == [
            "calculate",
            "find_order",
        ]

    def test_usage_is_told_only_when_asked_for(self, standin: ModuleType) -> None:
        body = {"model": "m", "stream": True, "messages": says("hola")["messages"]}
        plain = standin.Completions().reply(body)
        asked = standin.Completions().reply(body | {"stream_options": {"include_usage": True}})

        assert b'"usage"' not in b"".join(plain.parts)
        assert b'"total_tokens"' in asked.parts[-2]
        assert plain.parts[-1] == asked.parts[-1] == b"data: [DONE]\n\n"

    def test_faults_come_in_turn_and_then_again(self, standin: ModuleType) -> None:
        completions = standin.Completions()
        question = says("hola #429 #500 #cut")["messages"]
        body = {"model": "m", "stream": True, "messages": question}
        replies = [completions.reply(body) for _ in range(6)]

        assert [reply.status for reply in replies] == [429, 500, 500, 200, 200, 429]
        assert [reply.cut for reply in replies] == [False, False, False, True, False, False]
        assert "Retry-After" in replies[0].headers

    @pytest.mark.parametrize("expression", ["2**9", "__import__('os')", "f(1)", "'a'*9", "1/0", ""])
    async def test_only_sums_are_worked_out(self, example: ModuleType, expression: str) -> None:
        with pytest.raises(ToolException, match="No sé calcular"):
            await sys.modules["tools"].calculate.ainvoke({"expression": expression})
