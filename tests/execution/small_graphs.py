"""Small graphs, and a chat model that says what it is told to, or fails on the way."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langgraph.config import get_stream_writer
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy
from typing_extensions import TypedDict


class State(TypedDict, total=False):
    x: int
    log: Annotated[list[Any], operator.add]


class Fault(Exception):
    """What goes wrong in these graphs."""


def always(error: Exception) -> bool:
    return True


#: Three attempts, one and two milliseconds apart.
THREE = RetryPolicy(
    initial_interval=0.001, backoff_factor=2, jitter=False, max_attempts=3, retry_on=always
)


def chain(*nodes: tuple[str, Any] | tuple[str, Any, dict[str, Any]], **compiled: Any) -> Any:
    """A graph of nodes one after the other; a node is (name, what, options)."""
    builder = StateGraph(State)
    before = START
    for name, what, *options in nodes:
        builder.add_node(name, what, **(options[0] if options else {}))  # type: ignore[arg-type]
        builder.add_edge(before, name)
        before = name
    return builder.compile(**compiled)


def beside(*nodes: tuple[str, Any] | tuple[str, Any, dict[str, Any]], **compiled: Any) -> Any:
    """A graph of nodes side by side."""
    builder = StateGraph(State)
    for name, what, *options in nodes:
        builder.add_node(name, what, **(options[0] if options else {}))  # type: ignore[arg-type]
        builder.add_edge(START, name)
    return builder.compile(**compiled)


def writes(text: Any) -> Callable[[State], Any]:
    """An async node that writes a custom value and adds it to the log."""

    async def node(state: State) -> State:
        get_stream_writer()(text)
        return {"log": [text]}

    return node


def writes_in_a_thread(text: Any) -> Callable[[State], Any]:
    def node(state: State) -> State:
        get_stream_writer()(text)
        return {"log": [text]}

    return node


class Failing:
    """Fails that often before it lets through."""

    def __init__(self, times: int, error: Callable[[], BaseException] = Fault) -> None:
        self.left = times
        self.calls = 0
        self._error = error

    def __call__(self) -> None:
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise self._error()


class Speaker(BaseChatModel):
    """Streams `text` word by word. `fault` is called before each word and may raise."""

    text: str = "one two three"
    fault: Any = None
    #: The id of its messages; LangChain makes one for each call when it is None.
    id: str | None = None

    @property
    def _llm_type(self) -> str:
        return "speaker"

    def _chunks(self) -> Iterator[ChatGenerationChunk]:
        words = self.text.split(" ")
        for number, word in enumerate(words):
            if self.fault is not None:
                self.fault(number)
            content = word if number == len(words) - 1 else word + " "
            yield ChatGenerationChunk(message=AIMessageChunk(content=content, id=self.id))
        usage = {"input_tokens": 2, "output_tokens": len(words), "total_tokens": 2 + len(words)}
        last = AIMessageChunk(content="", id=self.id, usage_metadata=usage)  # type: ignore[arg-type]
        yield ChatGenerationChunk(message=last)

    def _stream(
        self, messages: Sequence[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
    ) -> Iterator[ChatGenerationChunk]:
        yield from self._chunks()

    async def _astream(
        self, messages: Sequence[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._chunks():
            yield chunk

    def _generate(
        self, messages: Sequence[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self.text))])

    def bind_tools(self, *_: Any, **__: Any) -> Any:
        return self
