"""The seam with LangChain: what chat models say inside a node, token by token.

LangChain tells callbacks, and a callback that is inherited from the graph's config costs every node
that never calls a model. So ours joins at the last moment: when a model call begins, and only when
the stream of the attempt around it wants messages.

Parts that go into the stream, for the root graph's reader:

    (path, "token",   (task, attempt, calls, message_id, text))
    (path, "message", (task, attempt, calls, message))

`calls` are the ids of the tenacity operations around the model call, outermost first.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, CallbackManager
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from langgraph.constants import TAG_NOSTREAM

from telemetry.langgraph import Attempt, SeamMismatch, current_attempt
from telemetry.tenacity import open_calls

__all__ = ["MESSAGE", "TOKEN", "install", "uninstall"]

#: The modes of these parts; LangGraph's own streams have neither.
TOKEN, MESSAGE = "token", "message"
_START = "on_chat_model_start"
_PARAMETERS = ("self", "serialized", "messages", "run_id", "kwargs")

_installed: list[tuple[Any, Any]] = []
_lock = threading.Lock()


def install() -> None:
    """Listen to chat models in this process from now on. Idempotent.

    Raises SeamMismatch, and changes nothing, when LangChain has other parameters than we know.
    """
    with _lock:
        if _installed:
            return
        for owner in (CallbackManager, AsyncCallbackManager):
            found = tuple(inspect.signature(getattr(owner, _START)).parameters)
            if found != _PARAMETERS:
                raise SeamMismatch(
                    f"{owner.__name__}.{_START} takes {found}, expected {_PARAMETERS}: "
                    "install langchain-core of the version in requirements.lock"
                )
        for owner in (CallbackManager, AsyncCallbackManager):
            original = getattr(owner, _START)
            _installed.append((owner, original))
            setattr(owner, _START, _joined(original))


def uninstall() -> None:
    """Put LangChain's own methods back."""
    with _lock:
        while _installed:
            owner, original = _installed.pop()
            setattr(owner, _START, original)


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
