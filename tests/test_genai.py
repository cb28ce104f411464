"""Model and tool calls of a run: spans under the right attempt, true numbers, and no content."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import pytest
import tenacity
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import (
    FakeMessagesListChatModel,
    GenericFakeChatModel,
)
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import ToolException, tool
from langchain_core.tracers._streaming import _V2StreamingCallbackHandler
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send, interrupt
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanKind,
    StatusCode,
    get_current_span,
    use_span,
)
from structlog.testing import capture_logs
from typing_extensions import TypedDict

from telemetry import langchain, langgraph
from telemetry import tenacity as retries
from telemetry.genai import MAX_NAMES, GenAi
from telemetry.metrics import Metrics
from telemetry.segments import Segments
from telemetry.tracing import Tracing, new_context

SECRET = "canary-7f3a"


class State(TypedDict, total=False):
    messages: Annotated[list[BaseMessage], add_messages]


@pytest.fixture(autouse=True)
def seams() -> Iterator[None]:
    for seam in (langgraph, retries, langchain):
        seam.install()
    yield
    for seam in (langchain, retries, langgraph):
        seam.uninstall()


class Talker(BaseChatModel):
    """Streams word by word, says what it used, and notes which span is current meanwhile."""

    model: str = "talker-1"
    text: str = "hello big world"
    #: Raised by the first calls, one each; None: that call succeeds.
    errors: list[BaseException | None] = []  # noqa: RUF012 - pydantic copies it
    #: After how many words an error is raised.
    after: int = 0
    around: list[int] = []  # noqa: RUF012

    @property
    def _llm_type(self) -> str:
        return "talker"

    def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
        return {"ls_provider": "talker", "ls_model_name": self.model}

    def _error(self) -> BaseException | None:
        self._note()
        return self.errors.pop(0) if self.errors else None

    def _note(self) -> None:
        self.around.append(get_current_span().get_span_context().span_id)

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kw: Any) -> Any:
        if (error := self._error()) is not None:
            raise error
        message = AIMessage(
            self.text,
            usage_metadata={
                "input_tokens": 11,
                "output_tokens": 7,
                "total_tokens": 18,
                "input_token_details": {"cache_read": 5, "cache_creation": 2},
                "output_token_details": {"reasoning": 3},
            },
            response_metadata={"model_name": "talker-1-0406", "finish_reason": "stop"},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return self._generate(*args, **kwargs)


class Streamer(Talker):
    def _chunks(self) -> list[ChatGenerationChunk]:
        words = [AIMessageChunk(word + " ") for word in self.text.split()]
        words[0].usage_metadata = {"input_tokens": 11, "output_tokens": 1, "total_tokens": 12}
        last = AIMessageChunk(
            "",
            usage_metadata={"input_tokens": 0, "output_tokens": 6, "total_tokens": 6},
            response_metadata={"model_name": "talker-1-0406", "finish_reason": "stop"},
        )
        return [ChatGenerationChunk(message=word) for word in (*words, last)]

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        error = self._error()
        for i, chunk in enumerate(self._chunks()):
            if error is not None and i == self.after:
                raise error
            self._note()
            yield chunk

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream():
            await asyncio.sleep(0)
            yield chunk


class Watched:
    """Runs graphs as a worker does, and shows what telemetry made of it."""

    def __init__(self, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.metrics = Metrics()
        self.tracing = Tracing(enabled=True, processors=[SimpleSpanProcessor(self.exporter)])
        self.segments = Segments(self.metrics, self.tracing)
        self.genai = GenAi(self.tracing, self.metrics, **settings)

    @contextmanager
    def segment(self, status: str = "success") -> Iterator[None]:
        segment = self.segments.begin(
            run_id="r1", thread_id="t1", graph="g", epoch=1, trigger="api"
        )
        segment.claimed(waited_s=0.0)
        try:
            with segment.entered(), langchain.listen(self.genai):
                yield
        finally:
            segment.end({"status": status}, had_output=True)

    async def run(self, graph: Any, given: Any = None, config: Any = None) -> Any:
        with self.segment():
            return await graph.ainvoke(given or {"messages": []}, config)

    def spans(self, name: str) -> list[ReadableSpan]:
        """Finished spans whose name begins so, in the order of their start."""
        found = [span for span in self.exporter.get_finished_spans() if span.name.startswith(name)]
        return sorted(found, key=lambda span: span.start_time or 0)

    def parent(self, span: ReadableSpan) -> str:
        assert span.parent is not None
        (parent,) = [
            other.name
            for other in self.exporter.get_finished_spans()
            if other.context is not None and other.context.span_id == span.parent.span_id
        ]
        return parent

    def parents(self, name: str) -> list[int]:
        """Ids of the parents of the spans whose name begins so."""
        return [span.parent.span_id for span in self.spans(name) if span.parent is not None]

    def tokens(
        self,
        direction: str,
        model: str = "other",
        provider: str = "talker",
        *,
        result: str = "kept",
    ) -> float:
        return self.metrics["llm_tokens_total"].value(provider, model, direction, result)

    def tool_calls(self, name: str, outcome: str) -> float:
        return self.metrics["tool_duration_seconds"].value("g", name, outcome)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def graph_of(*nodes: Any, **policy: Any) -> Any:
    """A chain of nodes, called n0, n1, …"""
    graph = StateGraph(State)
    for i, node in enumerate(nodes):
        graph.add_node(f"n{i}", node, **policy)
        graph.add_edge(f"n{i - 1}" if i else START, f"n{i}")
    return graph.compile()


# How a model may be called in a node.


async def ainvoke(model: BaseChatModel) -> None:
    await model.ainvoke("hi")


async def astream(model: BaseChatModel) -> None:
    async for _ in model.astream("hi"):
        pass


async def abatch(model: BaseChatModel) -> None:
    await model.abatch(["hi"])


async def astream_events(model: BaseChatModel) -> None:
    async for _ in model.astream_events("hi", version="v2"):
        pass


async def in_thread(model: BaseChatModel) -> None:
    await asyncio.to_thread(model.invoke, "hi")


def invoke(model: BaseChatModel) -> None:
    model.invoke("hi")


def stream(model: BaseChatModel) -> None:
    for _ in model.stream("hi"):
        pass


def batch(model: BaseChatModel) -> None:
    model.batch(["hi"])


WAYS = [
    pytest.param(way, id=way.__name__)
    for way in (ainvoke, astream, abatch, astream_events, in_thread, invoke, stream, batch)
]


def calling(way: Callable[[BaseChatModel], Any], model: BaseChatModel) -> Any:
    """A node that calls the model so."""
    if asyncio.iscoroutinefunction(way):

        async def anode(state: State) -> State:
            await way(model)
            return {}

        return anode

    def node(state: State) -> State:
        way(model)
        return {}

    return node


@pytest.mark.parametrize("kind", [Talker, Streamer])
@pytest.mark.parametrize("way", WAYS)
async def test_a_model_call_is_one_span_below_its_attempt_and_current_in_the_model(
    watched: Watched, way: Any, kind: type[Talker]
) -> None:
    model = kind()
    await watched.run(graph_of(calling(way, model)))

    (span,) = watched.spans("chat")
    assert span.name == "chat talker-1"
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    assert watched.parent(span) == "attempt n0"
    assert span.context is not None
    assert set(model.around) == {span.context.span_id}
    assert span.attributes is not None
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.provider.name"] == "talker"
    assert span.attributes["gen_ai.request.model"] == "talker-1"
    assert span.attributes["gen_ai.response.model"] == "talker-1-0406"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.attributes["gen_ai.usage.input_tokens"] == 11
    assert span.attributes["gen_ai.usage.output_tokens"] == 7
    assert (watched.tokens("input"), watched.tokens("output")) == (11, 7)
    assert watched.metrics["llm_duration_seconds"].value("talker", "other") == 1
    assert watched.tracing.live() == 0


@pytest.mark.parametrize("way", [ainvoke, astream, invoke, stream])
async def test_the_first_chunk_is_timed_when_a_model_streams(watched: Watched, way: Any) -> None:
    await watched.run(graph_of(calling(way, Streamer())))

    (span,) = watched.spans("chat")
    streams = way in (astream, stream)
    assert ("gen_ai.response.time_to_first_chunk" in (span.attributes or {})) is streams
    assert watched.metrics["llm_first_chunk_seconds"].value("talker", "other") == streams


@pytest.mark.parametrize("way", [ainvoke, invoke])
async def test_a_model_that_streams_to_a_reader_is_timed_too(watched: Watched, way: Any) -> None:
    with watched.segment():
        graph = graph_of(calling(way, Streamer()))
        async for _ in graph.astream({"messages": []}, stream_mode="messages"):
            pass

    (span,) = watched.spans("chat")
    assert (span.attributes or {})["gen_ai.usage.output_tokens"] == 7
    assert watched.metrics["llm_first_chunk_seconds"].value("talker", "other") == 1


async def test_the_parts_of_the_usage_have_the_conventions_names(watched: Watched) -> None:
    await watched.run(graph_of(calling(ainvoke, Talker())))

    (span,) = watched.spans("chat")
    attributes = span.attributes or {}
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 5
    assert attributes["gen_ai.usage.cache_creation.input_tokens"] == 2
    assert attributes["gen_ai.usage.reasoning.output_tokens"] == 3
    assert watched.tokens("cache_read") == 5
    assert watched.tokens("cache_write") == 2
    assert watched.tokens("reasoning") == 3


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: GenericFakeChatModel(messages=iter([AIMessage("hi there")])), id="generic"
        ),
        pytest.param(lambda: FakeMessagesListChatModel(responses=[AIMessage("hi")]), id="list"),
    ],
)
@pytest.mark.parametrize("way", [ainvoke, astream, invoke, stream])
async def test_a_model_that_says_nothing_of_itself_still_has_its_span(
    watched: Watched, model: Any, way: Any
) -> None:
    await watched.run(graph_of(calling(way, model())))

    (span,) = watched.spans("chat")
    assert span.name == "chat"
    assert "gen_ai.usage.input_tokens" not in (span.attributes or {})
    assert watched.tracing.live() == 0


async def test_the_v3_events_of_a_model_are_one_span(watched: Watched) -> None:
    model = Streamer()

    async def node(state: State) -> State:
        events = await model.astream_events("hi", version="v3")
        async for _ in events:
            pass
        return {}

    with pytest.warns(match="beta"):
        await watched.run(graph_of(node))

    (span,) = watched.spans("chat")
    assert watched.parent(span) == "attempt n0"
    assert (span.attributes or {})["gen_ai.usage.output_tokens"] == 7
    assert watched.tracing.live() == 0


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_model_whose_events_a_callback_wants_is_one_span(
    watched: Watched, asynchronous: bool
) -> None:
    class Wants(BaseCallbackHandler, _V2StreamingCallbackHandler):
        pass

    async def node(state: State) -> State:
        if asynchronous:
            await Streamer().ainvoke("hi", {"callbacks": [Wants()]})
        else:
            Streamer().invoke("hi", {"callbacks": [Wants()]})
        return {}

    await watched.run(graph_of(node))

    (span,) = watched.spans("chat")
    assert "gen_ai.response.time_to_first_chunk" in (span.attributes or {})
    assert watched.tokens("output") == 7


async def test_models_that_are_configured_are_told_apart() -> None:
    watched = Watched(models=["talker-1"])
    await watched.run(
        graph_of(calling(ainvoke, Talker()), calling(ainvoke, Talker(model="another")))
    )

    assert watched.tokens("input", "talker-1") == 11
    assert watched.tokens("input", "other") == 11
    assert [span.name for span in watched.spans("chat")] == ["chat talker-1", "chat another"]


async def test_names_of_spans_are_bounded(watched: Watched) -> None:
    async def node(state: State) -> State:
        for i in range(MAX_NAMES + 5):
            await Talker(model=f"model-{i}").ainvoke("hi")
        return {}

    await watched.run(graph_of(node))

    names = {span.name for span in watched.spans("chat")}
    assert len(names) == MAX_NAMES + 1
    assert "chat __overflow__" in names


async def test_without_the_dialect_spans_and_numbers_are_the_same() -> None:
    watched = Watched(semconv="none")

    @tool
    def look(where: str) -> str:
        """Look."""
        return where

    async def node(state: State) -> State:
        await Streamer().ainvoke("hi")
        await look.ainvoke({"where": "here"})
        return {}

    await watched.run(graph_of(node))

    (chat,), (call,) = watched.spans("chat"), watched.spans("execute_tool")
    assert (chat.name, call.name) == ("chat talker-1", "execute_tool look")
    assert not [name for span in (chat, call) for name in span.attributes or {} if "gen_ai" in name]
    assert watched.tokens("input") == 11
    assert watched.tool_calls("look", "success") == 1


async def test_a_call_under_a_span_of_another_trace_stays_in_the_trace_of_its_run(
    watched: Watched,
) -> None:
    async def node(state: State) -> State:
        with use_span(NonRecordingSpan(new_context())):
            await Talker().ainvoke("hi")
        return {}

    await watched.run(graph_of(node))

    (span,) = watched.spans("chat")
    assert watched.parent(span) == "attempt n0"


async def test_outside_of_a_run_nothing_is_seen(watched: Watched) -> None:
    with langchain.listen(watched.genai):
        await graph_of(calling(ainvoke, Talker())).ainvoke({"messages": []})

    assert watched.spans("") == []
    assert watched.tokens("input") == 0


# Retries.


async def test_each_attempt_of_a_node_has_its_own_span(watched: Watched) -> None:
    model = Streamer(errors=[ConnectionError("one"), ConnectionError("two")])
    policy = RetryPolicy(max_attempts=3, initial_interval=0.001, jitter=False)
    await watched.run(graph_of(calling(ainvoke, model), retry_policy=policy))

    chats, attempts = watched.spans("chat"), watched.spans("attempt")
    assert [span.status.status_code.name for span in chats] == ["ERROR", "ERROR", "UNSET"]
    assert [span.parent for span in chats] == [span.context for span in attempts]
    assert (chats[0].attributes or {})["error.type"] == "ConnectionError"
    assert (chats[0].attributes or {})["sereno.error.class"] == "connection"
    assert [len(span.events) for span in (*chats, *attempts)] == [1, 1, 0, 0, 0, 0]
    assert watched.tokens("output") == 7
    assert watched.metrics["llm_duration_seconds"].value("talker", "other") == 3


@pytest.mark.parametrize("way", [ainvoke, invoke])
async def test_each_attempt_of_tenacity_has_its_own_span(watched: Watched, way: Any) -> None:
    model = Talker(errors=[ConnectionError("one"), ConnectionError("two")])
    retry = tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())
    await watched.run(graph_of(calling(retry(way), model)))

    chats = watched.spans("chat")
    assert [span.status.status_code.name for span in chats] == ["ERROR", "ERROR", "UNSET"]
    assert len(set(watched.parents("chat"))) == 3
    assert all("ainvoke" in watched.parent(s) or "invoke" in watched.parent(s) for s in chats)


@pytest.mark.parametrize("way", [ainvoke, invoke])
async def test_each_attempt_of_with_retry_has_its_own_span(watched: Watched, way: Any) -> None:
    model = Streamer(errors=[ConnectionError("one")])
    retried: Any = model.with_retry(wait_exponential_jitter=False)
    await watched.run(graph_of(calling(way, retried)))

    chats = watched.spans("chat")
    assert [span.status.status_code.name for span in chats] == ["ERROR", "UNSET"]
    assert len(set(watched.parents("chat"))) == 2
    assert all(watched.parent(span).startswith("attempt ") for span in chats)
    assert all(watched.parent(span) != "attempt n0" for span in chats)


@pytest.mark.parametrize("way", [astream, stream])
async def test_a_stream_that_breaks_off_is_an_error_and_spends_nothing_twice(
    watched: Watched, way: Any
) -> None:
    model = Streamer(errors=[ConnectionError("broken")], after=2)
    policy = RetryPolicy(max_attempts=2, initial_interval=0.001, jitter=False)
    await watched.run(graph_of(calling(way, model), retry_policy=policy))

    first, second = watched.spans("chat")
    assert first.status.status_code is StatusCode.ERROR
    assert "gen_ai.response.time_to_first_chunk" in (first.attributes or {})
    assert (first.attributes or {})["gen_ai.usage.input_tokens"] == 11
    assert second.status.status_code is StatusCode.UNSET
    assert watched.tokens("input") == 11
    assert watched.tokens("input", result="discarded") == 11
    assert watched.tokens("output", result="discarded") == 1


@pytest.mark.parametrize("what", ["model", "tool", "model in a subgraph"])
async def test_the_record_of_the_attempt_has_the_exception_of_its_model_or_tool(
    watched: Watched, what: str
) -> None:
    """The span of the model or tool has it too, and no record of its own."""

    @tool
    async def broken(x: int) -> str:
        """Break."""
        raise ConnectionError("no")

    async def uses_it(state: State) -> State:
        await broken.ainvoke({"x": 1})
        return {}

    fails = calling(ainvoke, Talker(errors=[ConnectionError("no")]))
    graph = graph_of({"tool": uses_it, "model in a subgraph": graph_of(fails)}.get(what, fails))
    with capture_logs() as records, pytest.raises(ConnectionError):
        await watched.run(graph)

    told = [r["exc_info"] for r in records if r.get("event_type") == "attempt.failed"]
    assert isinstance(told[0], ConnectionError)
    assert told[1:] == [None] * (what == "model in a subgraph")


async def test_tokens_of_a_failed_attempt_of_a_node_are_discarded(watched: Watched) -> None:
    booked: list[float] = []
    answers = iter([ConnectionError("afterwards"), None])

    async def node(state: State) -> State:
        await Talker().ainvoke("hi")
        booked.append(watched.tokens("output") + watched.tokens("output", result="discarded"))
        if (error := next(answers)) is not None:
            raise error
        return {}

    policy = RetryPolicy(max_attempts=2, initial_interval=0.001, jitter=False)
    await watched.run(graph_of(node, retry_policy=policy))

    assert booked == [0, 7]  # what is still open is not booked yet
    assert watched.tokens("output", result="discarded") == 7
    assert watched.tokens("output") == 7


async def test_tokens_are_discarded_with_any_attempt_around_them(watched: Watched) -> None:
    """A call's second attempt succeeds inside of a subgraph whose calling attempt fails."""
    calls = iter([ConnectionError("of the call"), None, None])
    outer = iter([ConnectionError("of the node"), None])

    @tenacity.retry(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none())
    async def ask() -> None:
        await Talker().ainvoke("hi")
        if (error := next(calls)) is not None:
            raise error

    async def inner(state: State) -> State:
        await ask()
        return {}

    async def node(state: State) -> State:
        await graph_of(inner).ainvoke({})
        if (error := next(outer)) is not None:
            raise error
        return {}

    policy = RetryPolicy(max_attempts=2, initial_interval=0.001, jitter=False)
    await watched.run(graph_of(node, retry_policy=policy))

    assert len(watched.spans("chat")) == 3
    assert watched.tokens("input", result="discarded") == 22
    assert watched.tokens("input") == 11


async def test_an_interrupt_discards_no_tokens_of_nodes_that_came_through(
    watched: Watched,
) -> None:
    """The nodes before it in its subgraph do not run again, what the asking one spent it will."""

    async def before(state: State) -> State:
        await Talker().ainvoke("hi")
        return {}

    async def ask(state: State) -> State:
        await Talker().ainvoke("hi")
        interrupt("go on?")
        return {}

    inner = StateGraph(State).add_sequence([before, ask]).add_edge(START, "before").compile()
    outer = StateGraph(State).add_node("inner", inner).add_edge(START, "inner")
    graph = outer.compile(checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    await watched.run(graph, None, config)

    assert watched.tokens("input") == 11
    assert watched.tokens("input", result="discarded") == 11

    await watched.run(graph, Command(resume="yes"), config)

    assert len(watched.spans("chat")) == 3
    assert watched.tokens("input") == 22


async def test_tokens_of_what_ends_after_its_attempt_are_discarded_as_that_was(
    watched: Watched,
) -> None:
    late: list[asyncio.Task[Any]] = []

    async def node(state: State) -> State:
        late.append(asyncio.create_task(Talker().ainvoke("hi")))
        raise ConnectionError("at once")

    with suppress(ConnectionError):
        await watched.run(graph_of(node))
    await asyncio.gather(*late)

    assert watched.tokens("output", result="discarded") == 7
    assert watched.tokens("output") == 0


async def test_fanned_out_calls_hang_below_their_own_attempts(watched: Watched) -> None:
    async def worker(state: State) -> State:
        await asyncio.gather(*[Streamer().ainvoke("hi") for _ in range(2)])
        return {}

    graph = StateGraph(State).add_node("start", lambda state: {}).add_node("worker", worker)
    graph.add_edge(START, "start")
    graph.add_conditional_edges("start", lambda s: [Send("worker", s)] * 3, ["worker"])
    await watched.run(graph.compile())

    parents = watched.parents("chat")
    assert len(parents) == 6
    assert len(set(parents)) == 3
    assert {watched.parent(span) for span in watched.spans("chat")} == {"attempt worker"}


# Agents and tools.


def calls_then(text: str, *calls: tuple[str, dict[str, Any]]) -> Any:
    """A model that asks for tools, and then answers."""
    wanted = [
        {"name": name, "args": args, "id": f"call-{i}", "type": "tool_call"}
        for i, (name, args) in enumerate(calls)
    ]

    class Bound(FakeMessagesListChatModel):
        def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
            return self

    return Bound(responses=[AIMessage("", tool_calls=wanted), AIMessage(text)])


@pytest.mark.parametrize("mode", ["ainvoke", "invoke"])
async def test_an_agent_is_a_tree_of_models_and_tools(watched: Watched, mode: str) -> None:
    around: list[int] = []

    @tool
    def weather(city: str) -> str:
        """Tell the weather."""
        around.append(get_current_span().get_span_context().span_id)
        return f"fine in {city}"

    @tool
    async def clock(city: str) -> str:
        """Tell the time."""
        around.append(get_current_span().get_span_context().span_id)
        return "noon"

    tools: list[Any] = [weather] if mode == "invoke" else [weather, clock]
    agent = create_agent(calls_then("done", *[(t.name, {"city": "Rome"}) for t in tools]), tools)
    with watched.segment():
        given: Any = {"messages": [HumanMessage("hi")]}
        if mode == "invoke":
            await asyncio.to_thread(agent.invoke, given)
        else:
            await agent.ainvoke(given)

    assert [watched.parent(span) for span in watched.spans("chat")] == ["attempt model"] * 2
    calls = watched.spans("execute_tool")
    assert [watched.parent(span) for span in calls] == ["attempt tools"] * len(tools)
    assert {span.name for span in calls} == {f"execute_tool {t.name}" for t in tools}
    assert {span.kind for span in calls} == {SpanKind.INTERNAL}
    assert set(around) == {span.context.span_id for span in calls if span.context}
    assert {(s.attributes or {})["gen_ai.tool.call.id"] for s in calls} == {
        f"call-{i}" for i in range(len(tools))
    }
    assert all(watched.tool_calls(t.name, "success") == 1 for t in tools)
    assert watched.tracing.live() == 0


async def test_a_model_called_by_a_tool_hangs_below_the_tool(watched: Watched) -> None:
    @tool
    async def think(about: str) -> str:
        """Think."""
        return str((await Streamer().ainvoke(about)).text)

    async def node(state: State) -> State:
        await think.ainvoke({"about": "it"})
        return {}

    await watched.run(graph_of(node))

    (chat,) = watched.spans("chat")
    assert watched.parent(chat) == "execute_tool think"


@pytest.mark.parametrize("handled", [False, True])
async def test_a_tool_that_fails_is_an_error_whoever_handles_it(
    watched: Watched, handled: bool
) -> None:
    @tool
    async def broken(x: int) -> str:
        """Break."""
        raise ToolException("no")

    broken.handle_tool_error = handled
    node = ToolNode([broken], handle_tool_errors=True)
    wanted = AIMessage("", tool_calls=[{"name": "broken", "args": {"x": 1}, "id": "c"}])
    result = await watched.run(graph_of(node), {"messages": [wanted]})

    (span,) = watched.spans("execute_tool")
    (attempt,) = watched.spans("attempt")
    assert result["messages"][-1].status == "error"
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["sereno.error.class"] == "tool_error"
    assert (span.attributes or {})["error.type"] == ("_OTHER" if handled else "ToolException")
    assert len(span.events) == (0 if handled else 1)
    assert attempt.status.status_code is StatusCode.UNSET
    assert watched.tool_calls("broken", "error") == 1


async def test_a_tool_that_asks_a_human_is_no_error(watched: Watched) -> None:
    @tool
    def ask(question: str) -> str:
        """Ask."""
        return str(interrupt(question))

    agent = create_agent(
        calls_then("done", ("ask", {"question": "sure?"})), [ask], checkpointer=InMemorySaver()
    )
    config = {"configurable": {"thread_id": "1"}}
    await watched.run(agent, {"messages": [HumanMessage("hi")]}, config)
    await watched.run(agent, Command(resume="yes"), config)

    first, second = watched.spans("execute_tool")
    assert first.status.status_code is second.status.status_code is StatusCode.UNSET
    assert not first.events
    assert watched.tool_calls("ask", "interrupted") == 1
    assert watched.tool_calls("ask", "success") == 1
    assert {s.status.status_code for s in watched.spans("")} == {StatusCode.UNSET}


# Ends that nobody tells.


async def forever(state: State) -> State:
    await asyncio.Event().wait()
    return {}


@tool
async def slow(x: int) -> int:
    """Take some turns of the loop."""
    for _ in range(3):
        await asyncio.sleep(0)
    return x


async def call_tool(model: BaseChatModel) -> None:
    await slow.ainvoke({"x": 1})


@pytest.mark.parametrize("kind", [Talker, Streamer])
@pytest.mark.parametrize("way", [ainvoke, astream, astream_events, call_tool])
async def test_wherever_a_run_is_cancelled_nothing_stays_open(
    watched: Watched, way: Any, kind: type[Talker]
) -> None:
    graph = graph_of(calling(way, kind()))

    async def run() -> None:
        async for _ in graph.astream({"messages": []}, stream_mode=["messages", "updates"]):
            pass

    turns = 0
    seen = 0
    while True:
        with watched.segment("cancelled"):
            task = asyncio.create_task(run())
            for _ in range(turns):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if watched.tracing.live():
            gc.collect()
            await asyncio.sleep(0)

        assert watched.tracing.live() == 0
        spans = watched.spans("chat") + watched.spans("execute_tool")
        assert {span.status.status_code for span in spans} <= {StatusCode.UNSET}
        seen += bool(spans)
        watched.exporter.clear()
        if done:
            break
        turns += 1
    assert turns > 5
    assert seen > 3


async def test_a_stream_that_is_left_half_read_ends_and_is_no_error(watched: Watched) -> None:
    held: list[Any] = []

    async def node(state: State) -> State:
        async for _ in Streamer().astream("hi"):
            break
        for _ in Streamer().stream("hi"):
            break
        held.append(Streamer().astream("never begun"))
        return {}

    await watched.run(graph_of(node))
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0)

    spans = watched.spans("chat")
    assert len(spans) == 2
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}
    assert (watched.tokens("input"), watched.tokens("output")) == (22, 2)
    assert watched.tracing.live() == 0
    await held[0].aclose()


async def test_what_is_current_while_a_chunk_is_held_is_not_the_model(watched: Watched) -> None:
    current: list[Any] = []

    async def node(state: State) -> State:
        before = get_current_span()
        async for _ in Streamer().astream("hi"):
            current.append(get_current_span() is before)
        for _ in Streamer().stream("hi"):
            current.append(get_current_span() is before)
        current.append(get_current_span() is before)
        return {}

    await watched.run(graph_of(node))

    assert len(current) > 6
    assert all(current)


async def test_a_cancelled_call_inside_of_a_living_attempt_is_no_error(watched: Watched) -> None:
    async def node(state: State) -> State:
        with suppress(TimeoutError):
            await asyncio.wait_for(slow.ainvoke({"x": 1}), 0)
        task = asyncio.create_task(Talker().ainvoke("hi"))
        for _ in range(20):
            await asyncio.sleep(0)
            if watched.tracing.live() > 3:
                task.cancel()
        await asyncio.wait([task])
        return {}

    await watched.run(graph_of(node))

    (chat,) = watched.spans("chat")
    assert chat.status.status_code is StatusCode.UNSET
    assert watched.metrics["llm_duration_seconds"].value("talker", "other") == 0


async def test_a_cached_answer_costs_nothing(watched: Watched) -> None:
    model = Talker(cache=InMemoryCache())
    await watched.run(graph_of(*[calling(ainvoke, model)] * 2))

    assert len(watched.spans("chat")) == 2
    assert watched.tokens("input") == 11
    assert watched.metrics["llm_duration_seconds"].value("talker", "other") == 1


# Privacy.


async def test_nothing_that_is_said_gets_into_a_span_or_a_number(watched: Watched) -> None:
    @tool
    def search(query: str, limit: int) -> str:
        """Search."""
        return f"found {SECRET}"

    wanted = [
        ("search", {"query": SECRET, "limit": 1}),
        ("search", {"query": SECRET, "limit": SECRET}),  # does not validate
    ]
    agent = create_agent(calls_then(SECRET, *wanted), [search], system_prompt=f"You are {SECRET}")

    async def node(state: State) -> State:
        await Streamer(text=f"{SECRET} {SECRET}").ainvoke(SECRET)
        return {}

    await watched.run(agent, {"messages": [HumanMessage(SECRET)]})
    await watched.run(graph_of(node), {"messages": [HumanMessage(SECRET)]})

    exposition, _ = watched.metrics.render_now("application/openmetrics-text")
    assert len(watched.spans("execute_tool")) == 2
    assert watched.tool_calls("search", "error") == 1
    assert not [span.name for span in watched.spans("") if SECRET in span.to_json()]
    assert SECRET not in exposition.decode()
