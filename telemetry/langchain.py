"""The seam with LangChain: model calls and tool calls inside a node, and what models say there.

LangChain tells callbacks, and a callback that is inherited from the graph's config costs every node
that never calls a model; one that attaches a context never gets it back. So we listen in two ways:

- The stream of an attempt hears a model token by token through a callback that joins as the call
  begins, and only when that stream wants messages. Parts that go into it, for the root graph's
  reader:

      (path, "token",   (task, attempt, calls, message_id, text))
      (path, "message", (task, attempt, calls, message))

  `calls` are the ids of the tenacity operations around the model call, outermost first.

- The context's `Witness` is told of each model call and tool call around its body, whose current
  OpenTelemetry context is the one that the witness makes. A model that streams is a generator: the
  context is current while it works, and not while its caller holds a chunk.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

import structlog
from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, CallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import ToolMessage
from langchain_core.messages.ai import UsageMetadata, add_usage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tools import BaseTool
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from langgraph.constants import TAG_NOSTREAM
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from telemetry.langgraph import Attempt, SeamMismatch, current_attempt
from telemetry.tenacity import open_calls

__all__ = [
    "MESSAGE",
    "TOKEN",
    "Answer",
    "ChatCall",
    "ToolCall",
    "Witness",
    "current_witness",
    "install",
    "listen",
    "uninstall",
]

#: The modes of these parts; LangGraph's own streams have neither.
TOKEN, MESSAGE = "token", "message"

_START = "on_chat_model_start"
_START_TAKES = ("self", "serialized", "messages", "run_id", "kwargs")
_GENERATE_TAKES = ("self", "messages", "stop", "run_manager", "kwargs")
_STREAM_TAKES = ("self", "input", "config", "stop", "kwargs")
_EVENTS_TAKE = ("self", "messages", "run_manager", "stream", "stop", "kwargs")
_RUN_TAKES = (
    *("self", "tool_input", "verbose", "start_color", "color", "callbacks", "tags", "metadata"),
    *("run_name", "run_id", "config", "tool_call_id", "kwargs"),
)
#: What we patch or call, and its parameters: anything else is a LangChain that we do not know.
_EXPECTED: dict[tuple[type, str], tuple[str, ...]] = {
    (CallbackManager, _START): _START_TAKES,
    (AsyncCallbackManager, _START): _START_TAKES,
    (BaseChatModel, "_generate_with_cache"): _GENERATE_TAKES,
    (BaseChatModel, "_agenerate_with_cache"): _GENERATE_TAKES,
    (BaseChatModel, "stream"): _STREAM_TAKES,
    (BaseChatModel, "astream"): _STREAM_TAKES,
    (BaseChatModel, "_iter_v2_events"): _EVENTS_TAKE,
    (BaseChatModel, "_aiter_v2_events"): _EVENTS_TAKE,
    (BaseChatModel, "_should_stream"): ("self", "async_api", "run_manager", "kwargs"),
    (BaseChatModel, "_get_ls_params"): ("self", "stop", "kwargs"),
    (BaseTool, "run"): _RUN_TAKES,
    (BaseTool, "arun"): _RUN_TAKES,
}

_installed: list[tuple[type, str, object]] = []
_lock = threading.Lock()
_log = structlog.get_logger("telemetry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said about its answer, never the answer: whole, or as far as it came."""

    #: The model that answered, by its own word.
    model: str | None = None
    finish_reasons: tuple[str, ...] = ()
    #: Cached ones are among the input tokens, and reasoning is among the output tokens.
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    #: No model was called: it comes out of LangChain's cache.
    cached: bool = False


class ChatCall(Protocol):
    """What a witness makes of one call of a chat model."""

    @property
    def context(self) -> Context:
        """Current while the model works."""
        ...

    def first_chunk(self) -> None:
        """A model that streams has begun to answer."""

    def ended(self, answer: Answer, error: BaseException | None) -> None:
        """It is over, once. A caller that leaves a stream half read is a GeneratorExit."""


class ToolCall(Protocol):
    """What a witness makes of one call of a tool."""

    @property
    def context(self) -> Context:
        """Current in the tool's body."""
        ...

    def ended(self, error: BaseException | None, *, failed: bool = False) -> None:
        """It is over, once; `failed` when the tool itself made its error into a message."""


class Witness(Protocol):
    """Who is told. None: this call is not to be seen."""

    def chat(self, provider: str, model: str | None) -> ChatCall | None:
        """A chat model is about to be called."""

    def tool(self, name: str, call_id: str | None) -> ToolCall | None:
        """A tool is about to be called."""


#: Who is told of the calls of the current code; follows asyncio tasks, executors and `to_thread`.
current_witness: ContextVar[Witness | None] = ContextVar("sereno_witness", default=None)


@contextmanager
def listen(witness: Witness) -> Iterator[None]:
    """Tell `witness` of the calls of this context, and of tasks that it makes, for the block."""
    token = current_witness.set(witness)
    try:
        yield
    finally:
        current_witness.reset(token)


def install() -> None:
    """Listen to models and tools in this process from now on. Idempotent.

    Raises SeamMismatch, and changes nothing, when LangChain has other parameters than we know.
    """
    with _lock:
        if _installed:
            return
        for (owner, name), expected in _EXPECTED.items():
            function = getattr(owner, name, None)
            found = tuple(inspect.signature(function).parameters) if function else None
            if found != expected:
                raise SeamMismatch(
                    f"{owner.__name__}.{name} takes {found}, expected {expected}: "
                    "install langchain-core of the version in requirements.lock"
                )
        for owner in (CallbackManager, AsyncCallbackManager):
            _patch(owner, _START, _joined)
        _patch(BaseChatModel, "_generate_with_cache", _observed_generate)
        _patch(BaseChatModel, "_agenerate_with_cache", _observed_agenerate)
        _patch(BaseChatModel, "stream", _observed_stream)
        _patch(BaseChatModel, "astream", _observed_astream)
        _patch(BaseChatModel, "_iter_v2_events", _observed_events)
        _patch(BaseChatModel, "_aiter_v2_events", _observed_aevents)
        _patch(BaseTool, "run", _observed_run)
        _patch(BaseTool, "arun", _observed_arun)


def uninstall() -> None:
    """Put LangChain's own methods back."""
    with _lock:
        while _installed:
            owner, name, original = _installed.pop()
            setattr(owner, name, original)


def _patch(owner: type, name: str, observed: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    _installed.append((owner, name, original))
    setattr(owner, name, functools.wraps(original)(observed(original)))


# Model calls.


def _observed_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    def _generate_with_cache(
        self: Any, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Any:
        call = _chat(self, stop, kwargs)
        if call is None:
            return original(self, messages, stop, run_manager, **kwargs)
        with call, _hearing(run_manager, call):
            result = original(self, messages, stop, run_manager, **kwargs)
        call.returned(result)
        return result

    return _generate_with_cache


def _observed_agenerate(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def _agenerate_with_cache(
        self: Any, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Any:
        call = _chat(self, stop, kwargs)
        if call is None:
            return await original(self, messages, stop, run_manager, **kwargs)
        with call, _hearing(run_manager, call):
            result = await original(self, messages, stop, run_manager, **kwargs)
        call.returned(result)
        return result

    return _agenerate_with_cache


def _observed_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def stream(
        self: Any, input: Any, config: Any = None, *, stop: Any = None, **kwargs: Any
    ) -> Any:
        chunks = original(self, input, config, stop=stop, **kwargs)
        if not _streams(self, kwargs, async_api=False):  # then it calls `invoke`
            return chunks
        return _steps(chunks, lambda: _chat(self, stop, kwargs), lambda chunk: chunk)

    return stream


def _observed_astream(original: Callable[..., Any]) -> Callable[..., Any]:
    def astream(
        self: Any, input: Any, config: Any = None, *, stop: Any = None, **kwargs: Any
    ) -> Any:
        chunks = original(self, input, config, stop=stop, **kwargs)
        if not _streams(self, kwargs, async_api=True):
            return chunks
        return _asteps(chunks, lambda: _chat(self, stop, kwargs), lambda chunk: chunk)

    return astream


def _observed_events(original: Callable[..., Any]) -> Callable[..., Any]:
    def _iter_v2_events(
        self: Any, messages: Any, *, run_manager: Any, stream: Any, stop: Any = None, **kwargs: Any
    ) -> Any:
        events = original(
            self, messages, run_manager=run_manager, stream=stream, stop=stop, **kwargs
        )
        if _is_heard(run_manager):  # a part of `_generate_with_cache`
            return events
        return _steps(events, lambda: _chat(self, stop, kwargs), lambda _: stream.output_message)

    return _iter_v2_events


def _observed_aevents(original: Callable[..., Any]) -> Callable[..., Any]:
    def _aiter_v2_events(
        self: Any, messages: Any, *, run_manager: Any, stream: Any, stop: Any = None, **kwargs: Any
    ) -> Any:
        events = original(
            self, messages, run_manager=run_manager, stream=stream, stop=stop, **kwargs
        )
        if _is_heard(run_manager):
            return events
        return _asteps(events, lambda: _chat(self, stop, kwargs), lambda _: stream.output_message)

    return _aiter_v2_events


def _steps(
    chunks: Any, begin: Callable[[], _Chat | None], message: Callable[[Any], Any]
) -> Iterator[Any]:
    """What a model yields. Nothing begins before somebody asks for the first of it."""
    call = begin()
    if call is None:
        yield from chunks
        return
    try:
        while True:
            with call:
                try:
                    chunk = next(chunks)
                except StopIteration:
                    break
            call.yielded(message(chunk))
            yield chunk
        call.ended(None)
    except BaseException as exc:  # or the caller has left
        call.ended(exc)
        raise
    finally:
        chunks.close()


async def _asteps(
    chunks: Any, begin: Callable[[], _Chat | None], message: Callable[[Any], Any]
) -> AsyncIterator[Any]:
    call = begin()
    if call is None:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
        return
    try:
        while True:
            with call:
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    break
            call.yielded(message(chunk))
            yield chunk
        call.ended(None)
    except BaseException as exc:
        call.ended(exc)
        raise
    finally:
        await chunks.aclose()


def _streams(model: Any, kwargs: dict[str, Any], *, async_api: bool) -> bool:
    if current_witness.get() is None:
        return False
    try:
        return bool(model._should_stream(async_api=async_api, **{**kwargs, "stream": True}))
    except Exception:  # LangChain will meet it too
        return False


@contextmanager
def _hearing(run_manager: Any, call: _Chat) -> Iterator[None]:
    """Be told of the first chunk, should the model stream to the callbacks that it has."""
    if run_manager is None:
        yield
        return
    handlers = run_manager.handlers
    run_manager.handlers = [*handlers, _Ear(call)]
    try:
        yield
    finally:
        run_manager.handlers = handlers


def _is_heard(run_manager: Any) -> bool:
    return any(isinstance(handler, _Ear) for handler in run_manager.handlers)


class _Ear(BaseCallbackHandler):
    run_inline = True

    def __init__(self, call: _Chat) -> None:
        self._call = call

    def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        self._call.first_chunk()

    def on_stream_event(self, *args: Any, **kwargs: Any) -> None:
        self._call.first_chunk()


class _Call:
    """A call that a witness sees: `with` makes its context current, and an error ends it."""

    def __init__(self, told: ChatCall | ToolCall) -> None:
        self._context = told.context
        self._token: Any = None
        self._open = True

    def __enter__(self) -> None:
        self._token = otel_context.attach(self._context)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        otel_context.detach(self._token)
        if error is not None:
            self.ended(error)

    def ended(self, error: BaseException | None) -> None:
        """The first to say so ends it. Telemetry never raises into a call."""
        if not self._open:
            return
        self._open = False
        try:
            self._end(error)
        except Exception:
            _log.warning("The end of a call could not be observed", exc_info=True)

    def _end(self, error: BaseException | None) -> None:
        raise NotImplementedError


class _Chat(_Call):
    """Reads what models say of themselves, at no time what they say."""

    def __init__(self, told: ChatCall) -> None:
        super().__init__(told)
        self._told = told
        self._began = False
        self._model: str | None = None
        self._finish_reasons: tuple[str, ...] = ()
        self._usage: UsageMetadata | None = None
        self._last: Any = None

    def first_chunk(self) -> None:
        """The model streams; only the first time counts."""
        if self._began:
            return
        self._began = True
        try:
            self._told.first_chunk()
        except Exception:
            _log.warning("The first chunk of a model could not be observed", exc_info=True)

    def yielded(self, message: Any) -> None:
        """A chunk has come; `message` is what there is of the answer in it, or None."""
        self.first_chunk()
        try:
            if message is not None and message is not self._last:
                self._last = message
                self._read(message)
        except Exception:
            _log.warning("A chunk of a model could not be read", exc_info=True)

    def returned(self, result: Any) -> None:
        """The whole answer is there, and the call is over."""
        try:
            messages = [generation.message for generation in result.generations]
            for message in messages[:1]:  # each of them tells the usage of all
                self._read(message)
            self._finish_reasons = tuple(filter(None, map(_finish_reason, messages)))
        except Exception:
            _log.warning("The answer of a model could not be read", exc_info=True)
        self.ended(None)

    def _read(self, message: Any) -> None:
        if (usage := getattr(message, "usage_metadata", None)) is not None:
            self._usage = add_usage(self._usage, usage) if self._usage else usage
        if metadata := message.response_metadata:
            model = metadata.get("model_name") or metadata.get("model")
            if isinstance(model, str):
                self._model = model
            if reason := _finish_reason(message):
                self._finish_reasons = (reason,)

    def _end(self, error: BaseException | None) -> None:
        self._told.ended(self._answer(), error)

    def _answer(self) -> Answer:
        usage: Any = self._usage or {}
        inputs, outputs = (usage.get(f"{side}_token_details") or {} for side in ("input", "output"))
        return Answer(
            model=self._model,
            finish_reasons=self._finish_reasons,
            input_tokens=usage.get("input_tokens"),
            output_tokens=usage.get("output_tokens"),
            cache_read_tokens=inputs.get("cache_read"),
            cache_write_tokens=inputs.get("cache_creation"),
            reasoning_tokens=outputs.get("reasoning"),
            cached=usage.get("total_cost") == 0,  # what LangChain's cache adds
        )


def _finish_reason(message: Any) -> str | None:
    metadata = message.response_metadata
    for name in ("finish_reason", "stop_reason", "done_reason"):
        if isinstance(reason := metadata.get(name), str):
            return reason
    return None


def _chat(model: Any, stop: Any, kwargs: dict[str, Any]) -> _Chat | None:
    witness = current_witness.get()
    if witness is None:
        return None
    try:
        known = model._get_ls_params(stop=stop, **kwargs)
        told = witness.chat(str(known.get("ls_provider") or "unknown"), known.get("ls_model_name"))
    except Exception:
        _log.warning("The call of a model could not be observed", exc_info=True)
        return None
    return _Chat(told) if told is not None else None


# Tool calls.


def _observed_run(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, tool_call_id: Any = None, **kwargs: Any) -> Any:
        call = _tool(self, tool_call_id)
        if call is None:
            return original(self, *args, tool_call_id=tool_call_id, **kwargs)
        with call:
            output = original(self, *args, tool_call_id=tool_call_id, **kwargs)
        call.returned(output)
        return output

    return run


def _observed_arun(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def arun(self: Any, *args: Any, tool_call_id: Any = None, **kwargs: Any) -> Any:
        call = _tool(self, tool_call_id)
        if call is None:
            return await original(self, *args, tool_call_id=tool_call_id, **kwargs)
        with call:
            output = await original(self, *args, tool_call_id=tool_call_id, **kwargs)
        call.returned(output)
        return output

    return arun


class _Tool(_Call):
    def __init__(self, told: ToolCall) -> None:
        super().__init__(told)
        self._told = told
        self._failed = False

    def returned(self, output: Any) -> None:
        """The tool has an answer, which may be that it failed."""
        self._failed = isinstance(output, ToolMessage) and output.status == "error"
        self.ended(None)

    def _end(self, error: BaseException | None) -> None:
        self._told.ended(error, failed=self._failed)


def _tool(tool: Any, call_id: Any) -> _Tool | None:
    witness = current_witness.get()
    if witness is None:
        return None
    try:
        told = witness.tool(tool.name, call_id if isinstance(call_id, str) else None)
    except Exception:
        _log.warning("The call of a tool could not be observed", exc_info=True)
        return None
    return _Tool(told) if told is not None else None


# The stream of an attempt.


def _joined(original: Any) -> Any:
    def on_chat_model_start(
        self: Any, serialized: Any, messages: Any, run_id: Any = None, **kw: Any
    ) -> Any:
        attempt = current_attempt.get()
        if (
            attempt is not None
            and attempt.stream is not None
            and TOKEN in attempt.stream.modes
            and TAG_NOSTREAM not in self.tags
        ):
            self.add_handler(_Tap(attempt, open_calls.get()), inherit=False)
        return original(self, serialized, messages, run_id, **kw)

    return on_chat_model_start


class _Tap(BaseCallbackHandler, _StreamingCallbackHandler[Any]):
    """Listens to one model call. Being a streaming handler makes the model stream."""

    run_inline = True

    def __init__(self, attempt: Attempt, calls: tuple[str, ...]) -> None:
        self._attempt = attempt
        self._calls = calls

    def tap_output_aiter(self, run_id: UUID, output: Any) -> Any:
        return output

    def tap_output_iter(self, run_id: UUID, output: Any) -> Any:
        return output

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        """Known already: this listens to one call."""

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        if not isinstance(chunk, ChatGenerationChunk):
            return
        text, message_id = str(chunk.message.text), chunk.message.id
        if text and message_id:
            self._emit(TOKEN, message_id, text)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        for generations in response.generations:
            message = getattr(generations[0], "message", None) if generations else None
            if message is not None and message.id is not None:
                self._emit(MESSAGE, message)

    def _emit(self, kind: str, *what: Any) -> None:
        attempt, visit = self._attempt, self._attempt.visit
        attempt.stream((visit.path, kind, (visit.task, attempt.number, self._calls, *what)))
