"""The seam for a LangGraph that we do not know: nodes wrapped in a copy of a graph, and its stream.

`wrap(graph)` needs only what a graph is made of. Its nodes are called once for each attempt, which
tells attempts; LangGraph's stream mode `debug` tells tasks, their results and supersteps. What is
seen goes where `telemetry.langgraph` sends it. A body that is cancelled does not know why: by a
timeout, a failure beside it, or with the run. Whatever comes next tells.

It does not see `@task`s and the nodes of graphs that a function calls (both run as part of the node
around them), nor LangGraph's older event protocols.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import structlog
from langgraph.constants import TAG_HIDDEN
from langgraph.errors import (
    GraphBubbleUp,
    GraphDrained,
    GraphInterrupt,
    NodeTimeoutError,
    ParentCommand,
)
from langgraph.pregel import Pregel
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy

from telemetry.langgraph import Attempt, current_attempt, notify, visit_of
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
    SuperstepEnded,
    Visit,
    current_listener,
)

__all__ = ["wrap"]

_CONF = "configurable"
_STREAM = "__pregel_stream"
_RUNTIME = "__pregel_runtime"
_TASK = "__pregel_task_id"
#: LangGraph calls it when a node with a timeout has ended.
_TIMED = "__pregel_timed_attempt_observer"
#: Where nodes find what is known of their run.
_RUN = "__sereno_run"

_Graph = Pregel[Any, Any, Any, Any]
#: A graph's namespace and a node in it.
_Place = tuple[tuple[str, ...], str]

_log = structlog.get_logger("telemetry")


def wrap(graph: _Graph) -> _Graph:
    """A copy of the graph whose runs by `astream` or `ainvoke` are observed."""
    ours = _wrapped(graph, {})
    ours.__class__ = _root(type(graph))
    return ours


@functools.cache
def _root(kind: type[_Graph]) -> type[_Graph]:
    return type(kind.__name__, (_Root, kind), {})


def _wrapped(graph: _Graph, done: dict[int, _Graph]) -> _Graph:
    if (known := done.get(id(graph))) is not None:
        return known
    # `Pregel.copy` forgets which types of the state may be read back.
    ours = done[id(graph)] = copy.copy(graph)
    ours.nodes = {name: _wrapped_node(node, graph, done) for name, node in graph.nodes.items()}
    return ours


def _wrapped_node(node: Any, graph: _Graph, done: dict[int, _Graph]) -> Any:
    if TAG_HIDDEN in (node.tags or ()) or node.node is None:
        return node
    ours = copy.copy(node)
    if isinstance(node.bound, Pregel):
        ours.bound = _wrapped(node.bound, done)
        ours.subgraphs = [ours.bound if sub is node.bound else sub for sub in node.subgraphs]
        del ours.node  # cached; made of `bound`
    # Not `bound`: the key of the cache and the subgraphs are read off that.
    vars(ours)["node"] = _Proc(ours.node, node.retry_policy or graph.retry_policy or ())
    return ours


class _Root(_Graph):
    """The outermost graph: begins and ends what is known of a run."""

    async def astream(self, input: Any, config: Any = None, **options: Any) -> AsyncIterator[Any]:
        run = _Run((config or {}).get(_CONF, {}).get(_STREAM))
        stream: Any = super().astream
        try:
            async with aclosing(stream(input, run.in_(config), **options)) as parts:
                async for part in parts:
                    yield part
        finally:
            run.close()


class _Proc:
    """Stands in for what a node runs; the rest passes through."""

    def __init__(self, proc: Any, policies: Sequence[RetryPolicy]) -> None:
        self._proc = proc
        self._policies = policies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proc, name)

    async def ainvoke(self, value: Any, config: Any = None, **kwargs: Any) -> Any:
        run: _Run | None = config[_CONF].get(_RUN)
        begun = run.begin(config, self._policies) if run is not None else None
        if begun is None:
            return await self._proc.ainvoke(value, config, **kwargs)
        task, attempt, config = begun
        token = current_attempt.set(attempt)
        try:
            result = await self._proc.ainvoke(value, config, **kwargs)
        except BaseException as exc:
            task.raised(attempt, exc)
            raise
        finally:
            current_attempt.reset(token)
        task.returned(attempt)
        return result


class _Task:
    """A visit, from when LangGraph announces it to its result."""

    def __init__(self, visit: Visit, place: _Place) -> None:
        self.visit = visit
        self.place = place
        self._policies: Sequence[RetryPolicy] = ()
        self._listener: Listener | None = None
        self._attempts = 0
        self._open: Attempt | None = None
        self._began = self._opened = 0.0
        self._over = False

    @property
    def idle(self) -> bool:
        """Whether nobody was called for it."""
        return not self._attempts

    def begin(self, config: Any, policies: Sequence[RetryPolicy]) -> Attempt:
        if self._open is not None:  # LangGraph has not told of a timeout
            self._failed(self._timeout(), retried=True)
        now = time.perf_counter()
        if self.idle:
            self._policies, self._listener, self._began = policies, current_listener.get(), now
        info = getattr(config[_CONF].get(_RUNTIME), "execution_info", None)
        number = info.node_attempt if info is not None else self._attempts + 1
        stream = config[_CONF].get(_STREAM)
        attempt = Attempt(self.visit, number, stream, self._listener)
        self._attempts, self._open, self._opened = number, attempt, now
        self._tell(AttemptStarted(visit=self.visit, attempt=number))
        return attempt

    def returned(self, attempt: Attempt) -> None:
        if attempt is self._open:
            self._end_attempt("success")
            self._end("success")

    def raised(self, attempt: Attempt, exc: BaseException) -> None:
        if attempt is not self._open:  # timed out; its body went on for a while
            return
        if isinstance(exc, ParentCommand):
            self.returned(attempt)
        elif isinstance(exc, GraphInterrupt):
            self._end_attempt("interrupted")
            self._end("interrupted")
        elif isinstance(exc, GraphBubbleUp):
            self._end_attempt("cancelled")
            self._end("drained" if isinstance(exc, GraphDrained) else "error", exc)
        elif not isinstance(exc, asyncio.CancelledError) or not _asked_to_stop():
            self._failed(exc)

    def timed_out(self, number: int) -> None:
        if self._open is not None and self._open.number == number:
            self._failed(self._timeout())

    def ended(self, error: BaseException | None) -> None:
        """LangGraph says that it is over."""
        if self.idle or self._over:
            return
        if isinstance(error, asyncio.CancelledError):
            if self._open is not None:
                self._end_attempt("cancelled", error)
            self._end("cancelled")
        elif error is not None:
            if self._open is not None:
                self._failed(error, retried=False)
            self._end("error", error)

    def _failed(self, error: BaseException, *, retried: bool | None = None) -> bool:
        """The attempt has failed; whether LangGraph calls the node again."""
        policy = self._policy(error)
        if retried is None:
            retried = policy is not None and self._attempts < policy.max_attempts
        outcome: AttemptOutcome = "failed" if policy is None else "exhausted"
        self._end_attempt("retried" if retried else outcome, error, policy)
        if retried:
            policy = policy or RetryPolicy()
            planned = policy.initial_interval * policy.backoff_factor ** (self._attempts - 1)
            self._tell(
                NodeRetrying(
                    visit=self.visit,
                    attempt=self._attempts,
                    error=error,
                    retry_in_s=min(policy.max_interval, planned),
                    jitter_s=1.0 if policy.jitter else 0.0,
                    max_attempts=policy.max_attempts,
                )
            )
        return retried

    def _policy(self, error: BaseException) -> RetryPolicy | None:
        """The policy that LangGraph finds for an error."""
        if isinstance(error, Exception):
            for policy in self._policies:
                try:
                    if _matches(policy.retry_on, error):
                        return policy
                except Exception:  # LangGraph will meet it too, and fail the node
                    return None
        return None

    def _timeout(self) -> NodeTimeoutError:
        elapsed = time.perf_counter() - self._opened
        return NodeTimeoutError(self.visit.node, elapsed, kind="run", run_timeout=elapsed)

    def _end_attempt(
        self,
        outcome: AttemptOutcome,
        error: BaseException | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._open = None
        self._tell(
            AttemptEnded(
                visit=self.visit,
                attempt=self._attempts,
                outcome=outcome,
                error=error,
                max_attempts=policy.max_attempts if policy is not None else None,
                duration_s=time.perf_counter() - self._opened,
            )
        )

    def _end(self, outcome: NodeOutcome, error: BaseException | None = None) -> None:
        self._over = True
        self._tell(
            NodeEnded(
                visit=self.visit,
                attempts=self._attempts,
                outcome=outcome,
                error=error if outcome == "error" else None,
                duration_s=time.perf_counter() - self._began,
            )
        )

    def _tell(self, observation: Any) -> None:
        notify(observation, self._listener)


class _Run:
    """What LangGraph's stream tells of one run, on its way to whoever wants that stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._tasks: dict[str, _Task] = {}
        #: What a task wrote; LangGraph tells it just ahead of the task's result.
        self._updates: dict[tuple[str, ...], Mapping[str, Any]] = {}
        #: Results that no call made, until it is known whose they are.
        self._unclaimed: dict[_Place, list[Any]] = {}

    def in_(self, config: Any) -> dict[str, Any]:
        """The config for the run."""
        modes: set[Any] = {"debug", "updates"}
        if self._stream is not None:
            modes |= self._stream.modes - {"tasks"}
        return {
            **(config or {}),
            _CONF: {
                _RUNTIME: Runtime(),
                **(config or {}).get(_CONF, {}),
                _STREAM: StreamProtocol(self.part, modes),
                _RUN: self,
                _TIMED: self.timed,
            },
        }

    def begin(
        self, config: Any, policies: Sequence[RetryPolicy]
    ) -> tuple[_Task, Attempt, Any] | None:
        """A node is being called: its task, the attempt and the config for it."""
        try:
            task = self._tasks.get(config[_CONF][_TASK]) or self._unannounced(config)
            attempt = task.begin(config, policies)
            self._claim(task.place)
            if {ATTEMPTS, "custom"} <= getattr(attempt.stream, "modes", set()):
                config = _tagging(config, attempt)
        except Exception:
            _log.warning("A node could not be observed", exc_info=True)
            return None
        return task, attempt, config

    def _unannounced(self, config: Any) -> _Task:
        """LangGraph calls a node's error handler without a word."""
        told = config["metadata"]
        task_id, name = config[_CONF][_TASK], told["langgraph_node"]
        like = SimpleNamespace(id=task_id, name=name, path=told["langgraph_path"], config=config)
        task = self._tasks[task_id] = _Task(visit_of(like), ((), ""))
        return task

    def timed(self, event: Any) -> None:
        """A node with a timeout was called or has ended."""
        if event.error_type == NodeTimeoutError.__name__:
            if (task := self._tasks.get(event.context.task_id)) is not None:
                task.timed_out(event.context.attempt)

    def close(self) -> None:
        """What has no end yet was cancelled, innermost first."""
        for task in reversed(self._tasks.values()):
            task.ended(asyncio.CancelledError())

    def part(self, part: tuple[Any, str, Any]) -> None:
        ns, mode, data = part
        if mode == "debug":
            try:
                self._debug(ns, data["type"], data["step"], data["payload"])
            except Exception:
                _log.warning("A part of LangGraph's stream could not be read", exc_info=True)
            if data["type"] != "checkpoint":
                self._hand_on(ns, "tasks", data["payload"])
        elif mode == "updates":
            self._updated(ns, data)
        self._hand_on(ns, mode, data)

    def _debug(self, ns: tuple[str, ...], type: str, step: int, data: Mapping[str, Any]) -> None:
        if type == "checkpoint":
            if not ns:
                self._hand_on((), ATTEMPTS, SuperstepEnded(step=step))
        elif type == "task":
            visit = _visit(ns, data["id"], data["name"], step)
            self._tasks[data["id"]] = _Task(visit, (ns, data["name"]))
        elif (task := self._tasks.pop(data["id"], None)) is not None:
            updates = self._updates.pop(ns, {})
            task.ended(data["error"])
            if data["name"] in updates and not task.idle:
                self._wrote(task, updates[data["name"]], cached=False)

    def _updated(self, ns: tuple[str, ...], data: Mapping[str, Any]) -> None:
        if not (data.get("__metadata__") or {}).get("cached"):
            self._updates[ns] = data
            return
        for name, update in data.items():
            if name != "__metadata__":
                self._unclaimed.setdefault((ns, name), []).append(update)
                self._claim((ns, name))

    def _claim(self, place: _Place) -> None:
        """Of several `Send`s to a node, those are meant that nobody is called for."""
        if not (found := self._unclaimed.get(place)):
            return
        idle = [task for task in self._tasks.values() if task.idle and task.place == place]
        if len(idle) == len(found):
            del self._unclaimed[place]
            for task, update in zip(idle, found, strict=True):
                del self._tasks[task.visit.task]
                self._wrote(task, update, cached=True)

    def _wrote(self, task: _Task, update: Any, *, cached: bool) -> None:
        wrote = NodeWrote(visit=task.visit, update=update, cached=cached)
        self._hand_on(task.visit.path, ATTEMPTS, wrote)

    def _hand_on(self, ns: tuple[str, ...], mode: str, data: Any) -> None:
        if self._stream is not None and mode in self._stream.modes:
            self._stream((ns, mode, data))


def _tagging(config: Any, attempt: Attempt) -> Any:
    """The config in which custom values say who wrote them."""

    def write(value: Any) -> None:
        custom = Custom(attempt.visit, attempt.number, value)
        attempt.stream((attempt.visit.path, "custom", custom))

    runtime = config[_CONF][_RUNTIME].override(stream_writer=write)
    return {**config, _CONF: {**config[_CONF], _RUNTIME: runtime}}


def _visit(ns: Sequence[str], task: str, node: str, step: int) -> Visit:
    # A number stands between two segments when a task calls several subgraphs: no level of its own.
    segments = [part.partition(":") for part in ns if not part.isdigit()]
    return Visit(
        task=task,
        node=node,
        ns=tuple([name for name, _, _ in segments]),
        path=tuple([task_id for _, _, task_id in segments]),
        step=step,
    )


def _matches(wanted: Any, error: Exception) -> bool:
    if isinstance(wanted, Sequence):
        return isinstance(error, tuple(wanted))
    if isinstance(wanted, type) and issubclass(wanted, Exception):
        return isinstance(error, wanted)
    return bool(wanted(error))


def _asked_to_stop() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
