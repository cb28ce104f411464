"""The seam with LangGraph: sees every attempt of every node, at any depth, in an unchanged graph.

LangGraph calls a node by `_runner.arun_with_retry(task, …)`, which calls `task.proc` once for each
attempt. `install()` wraps that function and puts a `_Proxy` in the place of `task.proc`. What is
seen goes to the context's listener. What a task wrote goes into the stream that LangGraph carries
in the task's config, ahead of LangGraph's own part: that one names the node only, and of two
`Send` tasks, one out of the cache, it does not say which. The end of a superstep goes there too:
LangGraph emits nothing when the state is as before.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import structlog
from langgraph._internal._config import patch_configurable
from langgraph.constants import TAG_HIDDEN
from langgraph.errors import GraphBubbleUp, GraphDrained, GraphInterrupt, ParentCommand
from langgraph.pregel import _retry, _runner
from langgraph.pregel._io import map_output_updates
from langgraph.pregel._loop import PregelLoop
from langgraph.types import RetryPolicy

from telemetry.observations import (
    ATTEMPTS,
    AttemptEnded,
    AttemptOutcome,
    AttemptStarted,
    Custom,
    Listener,
    NodeEnded,
    NodeOutcome,
    NodeRetrying,
    NodeWrote,
    Observation,
    SuperstepEnded,
    Visit,
    current_listener,
)

__all__ = [
    "Attempt",
    "SeamMismatch",
    "current_attempt",
    "install",
    "listen",
    "notify",
    "uninstall",
    "visit_of",
]

_CONF = "configurable"
_STREAM = "__pregel_stream"
_RUNTIME = "__pregel_runtime"

#: What we patch, and the parameters that it must have: anything else is a LangGraph we do not know.
_EXPECTED = {
    (_runner, "arun_with_retry"): ("task", "retry_policy", "stream", "configurable"),
    (_runner, "run_with_retry"): ("task", "retry_policy", "configurable"),
    (_retry, "_arun_with_timeout"): ("task", "config", "timeout", "attempt_ctx", "stream"),
    (_retry, "_should_retry_on"): ("retry_policy", "exc"),
    (PregelLoop, "output_writes"): ("self", "task_id", "writes", "cached"),
    (PregelLoop, "after_tick"): ("self",),
}
#: Fourth part of the path of a task that LangGraph makes to handle another task's error.
_HANDLER = "node_error_handler"

_listeners: list[Listener] = []
#: Verdicts on retries that LangGraph has yet to ask for, by policy and exception.
_judged: dict[tuple[int, int], tuple[BaseException, bool]] = {}
_installed: list[tuple[object, str, object]] = []
_install_lock = threading.Lock()
_log = structlog.get_logger("telemetry")


class SeamMismatch(RuntimeError):
    """LangGraph's functions are not those that we know how to observe."""


class Attempt:
    """The attempt that the current code runs in: who it is, where LangGraph's stream goes, and who
    is told of it."""

    __slots__ = ("listener", "number", "stream", "visit")

    def __init__(self, visit: Visit, number: int, stream: Any, listener: Listener | None) -> None:
        self.visit = visit
        self.number = number
        self.stream = stream
        self.listener = listener


#: Follows asyncio tasks and `to_thread`; a raw `threading.Thread` loses it.
current_attempt: ContextVar[Attempt | None] = ContextVar("sereno_attempt", default=None)


def install() -> None:
    """Observe LangGraph in this process from now on. Idempotent.

    Raises SeamMismatch, and changes nothing, when a function has other parameters than we know.
    """
    with _install_lock:
        if _installed:
            return
        for (owner, name), expected in _EXPECTED.items():
            function = getattr(owner, name, None)
            found = tuple(inspect.signature(function).parameters) if function else None
            if found != expected:
                raise SeamMismatch(
                    f"{getattr(owner, '__name__', owner)}.{name} takes {found}, "
                    f"expected {expected}: install a langgraph of the version in requirements.lock"
                )
        _patch(_runner, "arun_with_retry", _observed_async(_runner.arun_with_retry))  # type: ignore[attr-defined]
        _patch(_runner, "run_with_retry", _observed_sync(_runner.run_with_retry))  # type: ignore[attr-defined]
        _patch(_retry, "_arun_with_timeout", _observed_timeout(_retry._arun_with_timeout))
        _patch(_retry, "_should_retry_on", _judged_once(_retry._should_retry_on))
        _patch(PregelLoop, "output_writes", _observed_writes(PregelLoop.output_writes))
        _patch(PregelLoop, "after_tick", _observed_superstep(PregelLoop.after_tick))


def uninstall() -> None:
    """Put LangGraph's own functions back."""
    with _install_lock:
        while _installed:
            owner, name, original = _installed.pop()
            setattr(owner, name, original)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener` with every observation of this process for the length of the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def notify(observation: Observation, listener: Listener | None) -> None:
    """Hand an observation to its listener and the process's. Telemetry never raises into a run."""
    for told in (listener, *_listeners) if _listeners else (listener,):
        if told is not None:
            try:
                told(observation)
            except BaseException:
                _log.warning("Listener failed", exc_info=True)


def visit_of(task: Any) -> Visit:
    """Where a LangGraph task is, read off its checkpoint namespace `name:id|name:id|…`."""
    config = task.config
    ns = config[_CONF].get("checkpoint_ns") or ""
    # A number stands between two segments when a task calls several subgraphs: no level of its own.
    segments = [part.partition(":") for part in ns.split("|") if part and not part.isdigit()][:-1]
    if _HANDLER in task.path:  # nested below the node that failed, but of the same graph
        segments.pop()
    return Visit(
        task=task.id,
        node=task.name,
        ns=tuple([name for name, _, _ in segments]),
        path=tuple([task_id for _, _, task_id in segments]),
        step=(config.get("metadata") or {}).get("langgraph_step", 0),
    )


def _patch(owner: object, name: str, value: object) -> None:
    _installed.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _hidden(task: Any) -> bool:
    return TAG_HIDDEN in (task.config.get("tags") or ())


def _observed_async(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def arun_with_retry(
        task: Any, retry_policy: Any, stream: bool = False, configurable: Any = None
    ) -> Any:
        if _hidden(task):
            return await original(task, retry_policy, stream, configurable)
        proxy = _Proxy(task, task.retry_policy or retry_policy)
        try:
            result = await original(task, retry_policy, stream, configurable)
        except BaseException as exc:
            proxy.ended(exc)
            raise
        proxy.ended(None)
        return result

    return arun_with_retry


def _observed_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    def run_with_retry(task: Any, retry_policy: Any, configurable: Any = None) -> Any:
        if _hidden(task):
            return original(task, retry_policy, configurable)
        proxy = _Proxy(task, task.retry_policy or retry_policy)
        try:
            result = original(task, retry_policy, configurable)
        except BaseException as exc:
            proxy.ended(exc)
            raise
        proxy.ended(None)
        return result

    return run_with_retry


def _observed_timeout(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A node with a timeout runs in a further task; what ends it first ends the attempt."""

    async def _arun_with_timeout(
        task: Any, config: Any, timeout: Any, attempt_ctx: Any, *, stream: bool
    ) -> Any:
        try:
            return await original(task, config, timeout, attempt_ctx, stream=stream)
        except BaseException as exc:
            if isinstance(task.proc, _Proxy):
                task.proc.attempt_ended(_attempt_number(config), exc)
            raise

    return _arun_with_timeout


def _observed_writes(original: Callable[..., None]) -> Callable[..., None]:
    def output_writes(self: Any, task_id: str, writes: Any, *, cached: bool = False) -> None:
        task, stream = self.tasks.get(task_id), self.stream
        if task is not None and stream is not None and ATTEMPTS in stream.modes:
            # Nothing comes of a hidden task, an error or an interrupt.
            for update in map_output_updates(self.output_keys, [(task, writes)]):
                visit = task.proc.visit if isinstance(task.proc, _Proxy) else visit_of(task)
                wrote = NodeWrote(visit=visit, update=update[task.name], cached=cached)
                stream((visit.path, ATTEMPTS, wrote))
        original(self, task_id, writes, cached=cached)

    return output_writes


def _observed_superstep(original: Callable[..., None]) -> Callable[..., None]:
    def after_tick(self: Any) -> None:
        step, stream = self.step, self.stream
        try:
            original(self)
        except GraphInterrupt:  # a static breakpoint after it
            _superstep_ended(self, stream, step)
            raise
        _superstep_ended(self, stream, step)

    return after_tick


def _superstep_ended(loop: Any, stream: Any, step: int) -> None:
    if not loop.is_nested and stream is not None and ATTEMPTS in stream.modes:
        stream(((), ATTEMPTS, SuperstepEnded(step=step)))


def _judged_once(original: Callable[..., bool]) -> Callable[..., bool]:
    """A user's predicate may count: what we have asked, LangGraph is told."""

    def _should_retry_on(retry_policy: Any, exc: Any) -> bool:
        known = _judged.pop((id(retry_policy), id(exc)), None)
        return known[1] if known is not None else original(retry_policy, exc)

    return _should_retry_on


def _attempt_number(config: Any) -> int:
    info = config[_CONF][_RUNTIME].execution_info
    return info.node_attempt if info is not None else 1


class _Proxy:
    """Stands in for `task.proc` and is called once for each attempt; the rest passes through."""

    def __init__(self, task: Any, policies: Any) -> None:
        self._proc = task.proc
        self._policies: Sequence[RetryPolicy] = policies or ()
        self._listener = current_listener.get()
        self.visit = visit_of(task)
        self._started = time.perf_counter()
        self._attempts = 0
        self._open: Attempt | None = None
        self._opened = 0.0
        self._asked: list[tuple[int, int]] = []
        # PregelExecutableTask is a frozen dataclass.
        object.__setattr__(task, "proc", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proc, name)

    def invoke(self, value: Any, config: Any = None, **kwargs: Any) -> Any:
        attempt, config = self._begin(config)
        token = current_attempt.set(attempt)
        try:
            result = self._proc.invoke(value, config, **kwargs)
        except BaseException as exc:
            self.attempt_ended(attempt.number, exc, in_thread=True)
            raise
        finally:
            current_attempt.reset(token)
        self.attempt_ended(attempt.number, None)
        return result

    async def ainvoke(self, value: Any, config: Any = None, **kwargs: Any) -> Any:
        attempt, config = self._begin(config)
        token = current_attempt.set(attempt)
        try:
            result = await self._proc.ainvoke(value, config, **kwargs)
        except BaseException as exc:
            self.attempt_ended(attempt.number, exc)
            raise
        finally:
            current_attempt.reset(token)
        self.attempt_ended(attempt.number, None)
        return result

    async def astream(self, value: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Only LangGraph's older event protocols call a node this way; no context is kept set
        across a `yield`, so calls inside it are seen without their node."""
        attempt, config = copy_context().run(self._begin, config)
        try:
            async for chunk in self._proc.astream(value, config, **kwargs):
                yield chunk
        except BaseException as exc:
            self.attempt_ended(attempt.number, exc)
            raise
        self.attempt_ended(attempt.number, None)

    def _begin(self, config: Any) -> tuple[Attempt, Any]:
        runtime = config[_CONF][_RUNTIME]
        number = _attempt_number(config)
        # Custom values and calls of an attempt that timed out are to be dropped: LangGraph guards
        # the stream in the attempt's config for that.
        stream = config[_CONF].get(_STREAM)
        attempt = Attempt(self.visit, number, stream, self._listener)
        self._attempts, self._open, self._opened = number, attempt, time.perf_counter()
        self._tell(AttemptStarted(visit=self.visit, attempt=number))
        # Another's stream gets custom values as they are.
        if stream is not None and {ATTEMPTS, "custom"} <= stream.modes:
            visit = self.visit

            def write(value: Any) -> None:
                stream((visit.path, "custom", Custom(visit, number, value)))

            config = patch_configurable(config, {_RUNTIME: runtime.override(stream_writer=write)})
        return attempt, config

    def attempt_ended(
        self, number: int, exc: BaseException | None, *, in_thread: bool = False
    ) -> None:
        """The first to tell ends the attempt: its body, or the timeout around it."""
        if self._open is None or self._open.number != number:
            return
        self._open = None
        policy = self._policy(exc) if _is_failure(exc, in_thread) else None
        retries = policy is not None and number < policy.max_attempts
        self._tell(
            AttemptEnded(
                visit=self.visit,
                attempt=number,
                outcome=_attempt_outcome(exc, policy, retries, in_thread),
                error=exc if not isinstance(exc, GraphBubbleUp) else None,
                max_attempts=policy.max_attempts if policy is not None else None,
                duration_s=time.perf_counter() - self._opened,
            )
        )
        if policy is not None and retries:
            assert isinstance(exc, Exception)
            planned = policy.initial_interval * policy.backoff_factor ** (number - 1)
            self._tell(
                NodeRetrying(
                    visit=self.visit,
                    attempt=number,
                    error=exc,
                    retry_in_s=min(policy.max_interval, planned),
                    jitter_s=1.0 if policy.jitter else 0.0,
                    max_attempts=policy.max_attempts,
                )
            )

    def _policy(self, exc: BaseException | None) -> RetryPolicy | None:
        """The policy that LangGraph (`_retry.py`) finds for an error, None when none matches."""
        if not isinstance(exc, Exception):
            return None
        for policy in self._policies:
            try:
                retries = _retry._should_retry_on(policy, exc)
            except Exception:  # LangGraph will meet it too, and fail the node
                return None
            self._asked.append((id(policy), id(exc)))
            _judged[self._asked[-1]] = (exc, retries)
            if retries:
                return policy
        return None

    def ended(self, exc: BaseException | None) -> None:
        """The visit is over."""
        if self._open is not None:
            self.attempt_ended(self._open.number, exc)
        for key in self._asked:  # of an attempt whose error LangGraph did not come to judge
            _judged.pop(key, None)
        self._tell(
            NodeEnded(
                visit=self.visit,
                attempts=self._attempts,
                outcome=_node_outcome(exc),
                error=exc if _node_outcome(exc) == "error" else None,
                duration_s=time.perf_counter() - self._started,
            )
        )

    def _tell(self, observation: Observation) -> None:
        notify(observation, self._listener)


def _is_failure(exc: BaseException | None, in_thread: bool) -> bool:
    if exc is None or isinstance(exc, GraphBubbleUp):
        return False
    return not isinstance(exc, asyncio.CancelledError) or in_thread or _raised_by_the_body()


def _raised_by_the_body() -> bool:
    """Whether a CancelledError is the node's own doing: nobody asked its task to stop."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() == 0


def _attempt_outcome(
    exc: BaseException | None, policy: RetryPolicy | None, retries: bool, in_thread: bool
) -> AttemptOutcome:
    if exc is None or isinstance(exc, ParentCommand):
        return "success"
    if isinstance(exc, GraphInterrupt):
        return "interrupted"
    if not _is_failure(exc, in_thread):
        return "cancelled"
    if retries:
        return "retried"
    return "exhausted" if policy is not None else "failed"


def _node_outcome(exc: BaseException | None) -> NodeOutcome:
    if exc is None or isinstance(exc, ParentCommand):
        return "success"
    if isinstance(exc, GraphInterrupt):
        return "interrupted"
    if isinstance(exc, GraphDrained):
        return "drained"
    if isinstance(exc, asyncio.CancelledError):
        return "cancelled"
    return "error"
