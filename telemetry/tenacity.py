"""The seam with tenacity: sees every attempt of every retried call, however it was decorated.

All forms of tenacity (`@retry`, `Retrying()(f)`, `for attempt in Retrying()`, their async twins,
LangChain's `with_retry()`) ask one method, `iter(retry_state)`, what is next: call, sleep, return
or raise. `install()` wraps it on the type, so functions decorated earlier are seen too. An attempt
starts when that method says so and ends when it has judged the outcome, hence in the caller's own
context. What a loop leaves unjudged (`break`, `return`) ends when the loop is left.

Name a call by setting `sereno_call` on the function before it is decorated.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import structlog
import tenacity
from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from tenacity import AsyncRetrying, AttemptManager, BaseRetrying, DoAttempt, DoSleep, RetryCallState

from telemetry.langgraph import SeamMismatch, current_attempt, notify
from telemetry.names import Names
from telemetry.observations import (
    AttemptOutcome,
    CallAttemptEnded,
    CallAttemptStarted,
    CallRetrying,
    Observation,
    current_listener,
)

__all__ = [
    "MAX_CALLS",
    "install",
    "open_calls",
    "uninstall",
    "was_cancelled",
]

#: Distinct names of calls in this process; the call is a metric label.
MAX_CALLS = 100

_OPERATION = "_sereno_operation"

#: What we patch or read, and its parameters: anything else is a tenacity that we do not know.
_EXPECTED: dict[tuple[type, str], tuple[str, ...]] = {
    (BaseRetrying, "iter"): ("self", "retry_state"),
    (AsyncRetrying, "iter"): ("self", "retry_state"),
    (BaseRetrying, "__iter__"): ("self",),
    (AsyncRetrying, "__aiter__"): ("self",),
    (AsyncRetrying, "__anext__"): ("self",),
    (RetryCallState, "__init__"): ("self", "retry_object", "fn", "args", "kwargs"),
    (RetryCallState, "prepare_for_next_attempt"): ("self",),
    (AttemptManager, "__init__"): ("self", "retry_state"),
}
#: The members of tenacity's verdict on an attempt that we read; versions of it have others besides.
_VERDICT = {"is_explicit_retry", "retry_run_result", "stop_run_result"}

_installed: list[tuple[type, str, object]] = []
_install_lock = threading.Lock()
_names = Names(MAX_CALLS)
_log = structlog.get_logger("telemetry")

#: `call_id` of each retried call around the current code, outermost first: a retry of any of them
#: discards what is made here. In a back-off the call is not among them.
open_calls: ContextVar[tuple[str, ...]] = ContextVar("sereno_calls", default=())


def install(*, guard: bool = True) -> None:
    """Observe tenacity in this process from now on. Idempotent.

    With `guard`, LangGraph's control flow (an interrupt, a command to the parent, a drain) passes
    through every retry; tenacity alone takes it for an error and calls again. Raises SeamMismatch,
    and changes nothing, when a method has other parameters than we know.
    """
    with _install_lock:
        if _installed:
            return
        for (owner, name), expected in _EXPECTED.items():
            function = vars(owner).get(name)
            found = tuple(inspect.signature(function).parameters) if function else None
            if found != expected:
                raise SeamMismatch(
                    f"tenacity.{owner.__name__}.{name} takes {found}, expected {expected}: "
                    "install a tenacity of the version in requirements.lock"
                )
        if missing := _VERDICT.difference(inspect.signature(tenacity.IterState).parameters):
            raise SeamMismatch(f"tenacity.IterState has no {', '.join(sorted(missing))}")
        _patch(BaseRetrying, "iter", _observed_sync(BaseRetrying.iter, guard))
        _patch(AsyncRetrying, "iter", _observed_async(AsyncRetrying.iter, guard))
        _patch(BaseRetrying, "__iter__", _observed_loop(BaseRetrying.__iter__))
        _patch(AsyncRetrying, "__aiter__", _observed_async_loop(AsyncRetrying.__aiter__))


def uninstall() -> None:
    """Put tenacity's own methods back."""
    with _install_lock:
        while _installed:
            owner, name, original = _installed.pop()
            setattr(owner, name, original)
    _names.clear()


def _patch(owner: type, name: str, value: object) -> None:
    _installed.append((owner, name, vars(owner)[name]))
    setattr(owner, name, value)


def _observed_sync(original: Callable[..., Any], guard: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def iter(self: Any, retry_state: Any) -> Any:
        try:
            if guard and _bubbles(retry_state):
                retry_state.outcome.result()
            do = original(self, retry_state)
        except BaseException as exc:
            _decided(self, retry_state, None, exc)
            raise
        _decided(self, retry_state, do, None)
        return do

    return iter


def _observed_async(
    original: Callable[..., Awaitable[Any]], guard: bool
) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def iter(self: Any, retry_state: Any) -> Any:
        try:
            if guard and _bubbles(retry_state):
                retry_state.outcome.result()
            do = await original(self, retry_state)
        except BaseException as exc:
            _decided(self, retry_state, None, exc)
            raise
        _decided(self, retry_state, do, None)
        return do

    return iter


def _bubbles(state: Any) -> bool:
    return state.outcome is not None and isinstance(state.outcome.exception(), GraphBubbleUp)


def _observed_loop(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(original)
    def __iter__(self: Any) -> Iterator[Any]:
        state = None
        try:
            for attempt in original(self):
                state = attempt.retry_state
                yield attempt
        finally:
            _left(state)

    return __iter__


def _observed_async_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __aiter__(self: Any) -> Any:
        return _AsyncLoop(original(self))

    return __aiter__


class _AsyncLoop:
    """What `async for` holds. It dies as the loop is left; tenacity's own iterator is part of a
    cycle, and an async generator would be closed by a later task."""

    def __init__(self, retrying: Any) -> None:
        self._retrying = retrying
        self._state: Any = None

    def __aiter__(self) -> _AsyncLoop:
        return self

    async def __anext__(self) -> Any:
        attempt = await self._retrying.__anext__()
        self._state = attempt.retry_state
        return attempt

    def __del__(self) -> None:
        _left(self._state)


class _Operation:
    """One retried call over all its attempts; kept on tenacity's state of that call."""

    def __init__(self, state: Any) -> None:
        attempt = current_attempt.get()
        self._listener = current_listener.get()
        node = attempt.visit.node if attempt is not None else None
        self._who: dict[str, Any] = {
            "visit": attempt.visit if attempt is not None else None,
            "node_attempt": attempt.number if attempt is not None else None,
            "call": _names.bounded(_call_name(state, node)),
            "call_id": uuid.uuid4().hex,
        }
        self._calls: tuple[str, ...] = ()
        self._outer: tuple[str, ...] = ()
        self._open: int | None = None
        self._opened = 0.0

    def started(self, number: int) -> None:
        if self._open is not None:  # a loop whose body has no `with attempt:`
            return
        self._open, self._opened = number, time.monotonic()
        self._outer = open_calls.get()
        self._calls = (*self._outer, self._who["call_id"])
        open_calls.set(self._calls)
        self._emit(CallAttemptStarted(**self._who, attempt=number))

    def ended(self, state: Any, outcome: AttemptOutcome, error: BaseException | None) -> None:
        number, self._open = self._open, None
        if number is None:
            return
        if open_calls.get() is self._calls:  # else a loop was left in somebody else's context
            open_calls.set(self._outer)
        # Tenacity's own hooks run between the end of the body and the verdict.
        until = time.monotonic() if state.outcome is None else state.outcome_timestamp
        self._emit(
            CallAttemptEnded(
                **self._who,
                attempt=number,
                outcome=outcome,
                error=error if not isinstance(error, GraphBubbleUp) else None,
                duration_s=max(0.0, until - self._opened),
            )
        )

    def retrying(self, number: int, error: BaseException | None, sleep_s: float) -> None:
        self._emit(CallRetrying(**self._who, attempt=number, error=error, retry_in_s=sleep_s))

    def _emit(self, observation: Observation) -> None:
        notify(observation, self._listener)


def _decided(retrying: Any, state: Any, do: Any, raised: BaseException | None) -> None:
    """Tenacity has said what is next: tell what that makes of the attempt before."""
    try:
        operation: _Operation | None = vars(state).get(_OPERATION)
        if isinstance(do, DoAttempt):
            if operation is None:
                operation = vars(state)[_OPERATION] = _Operation(state)
            operation.started(state.attempt_number)
        elif operation is not None:
            error = state.outcome.exception() if state.outcome is not None else None
            if isinstance(do, DoSleep):
                operation.ended(state, "retried", error)
                operation.retrying(state.attempt_number, error, float(do))
            else:
                verdict = retrying.iter_state
                wanted = verdict.is_explicit_retry or verdict.retry_run_result
                outcome = _outcome(raised, exhausted=wanted and verdict.stop_run_result)
                told = raised if outcome == "cancelled" else error or raised
                operation.ended(state, outcome, told if outcome != "success" else None)
    except Exception:
        _log.warning("A retried call could not be observed", exc_info=True)


def _left(state: Any) -> None:
    """A loop is over; after `break`, `return` or an error beside its `with`, unjudged."""
    try:
        operation: _Operation | None = vars(state).get(_OPERATION) if state is not None else None
        if operation is None:
            return
        if state.outcome is None:
            operation.ended(state, "cancelled", None)
        else:
            error = state.outcome.exception()
            operation.ended(state, _outcome(error, exhausted=False), error)
    except Exception:
        _log.warning("A retried loop could not be observed", exc_info=True)


def _outcome(raised: BaseException | None, *, exhausted: bool) -> AttemptOutcome:
    if isinstance(raised, ParentCommand):
        return "success"
    if isinstance(raised, GraphInterrupt):
        return "interrupted"
    if isinstance(raised, GraphBubbleUp | GeneratorExit) or was_cancelled(raised):
        return "cancelled"
    if exhausted:
        return "exhausted"
    return "success" if raised is None else "failed"


def was_cancelled(raised: BaseException | None) -> bool:
    """Whether somebody asked this task to stop; a body may raise CancelledError on its own."""
    if not isinstance(raised, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # in a thread, which nobody can cancel
        return False
    return task is not None and task.cancelling() > 0


def _call_name(state: Any, node: str | None) -> str:
    function = state.fn
    if function is None:
        given = str(state.retry_object)
        if not given.startswith("<"):  # `<unknown>`; before tenacity 9.2 its repr, with an address
            return given
        return f"{node}:retrying" if node else "retrying"
    while True:
        if isinstance(name := getattr(function, "sereno_call", None), str):
            return name
        if not isinstance(function, functools.partial):
            break
        function = function.func
    if not hasattr(function, "__qualname__"):
        function = type(function)
    module = sys.modules.get(function.__module__)
    # A file that was loaded under a private name says by which one it is known.
    known = getattr(module, "sereno_module", None)
    return f"{known or function.__module__}.{function.__qualname__}"
