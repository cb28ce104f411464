"""Executes one claimed run: drives the graph, and turns every way it can end into a last line."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from langgraph._internal._serde import apply_checkpointer_allowlist
from langgraph.errors import GraphRecursionError
from langgraph.pregel._loop import PregelLoop
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import RunControl, Runtime
from langgraph.types import Command

from runtime.engines.base import Engine
from runtime.engines.serde import StateTypeBlocked
from runtime.errors import LeaseLost, LogLimit, StorageFailed
from runtime.execution.feed import Feed
from runtime.execution.history import History
from runtime.graphs import LoadedGraph
from runtime.model import Lease, Run
from runtime.settings import Settings
from telemetry.contract import classify, error_text, error_type
from telemetry.segments import Segment

__all__ = ["Outcome", "Runner", "Stop", "mend_langgraph"]

StopKind = Literal["cancel", "deadline", "drain", "lost", "limit", "storage", "internal"]

#: How often a drain looks whether it waits for anything, in seconds.
_LOOK_S = 0.2

#: What telemetry says of a stop; a client's own words are for the line.
_CANCEL_REASONS: Mapping[StopKind, str] = {
    "cancel": "api",
    "deadline": "deadline",
    "drain": "shutdown",
}
#: Keys of a client's config that are ours or LangGraph's to set.
RESERVED = ("__", "checkpoint_", "thread_id", "run_id", "sereno_")


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run is to end before it is done."""

    kind: StopKind
    reason: str = ""
    error: BaseException | None = None

    @classmethod
    def after(cls, error: BaseException) -> Stop:
        """What a failed write means for its run."""
        kinds: dict[type[BaseException], StopKind] = {
            LeaseLost: "lost",
            StorageFailed: "storage",
            LogLimit: "limit",
        }
        return cls(kinds.get(type(error), "internal"), error=error)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last line of an epoch."""

    type: str
    data: Mapping[str, Any]


class Runner:
    """One execution of one run in one epoch. `execute` returns when its last line is committed."""

    def __init__(
        self,
        *,
        engine: Engine,
        settings: Settings,
        graph: LoadedGraph,
        run: Run,
        lease: Lease,
        history: History,
        segment: Segment,
        feed: Feed,
        deadline_in: float | None,
    ) -> None:
        self.run = run
        self.lease = lease
        self.feed = feed
        self.segment = segment
        segment.lines = feed.observe
        self._engine = engine
        self._settings = settings
        self._graph = graph
        self._history = history
        self._deadline_in = deadline_in
        #: The task that drives the graph.
        self.drive: asyncio.Task[None] | None = None
        #: A node that did not stop when it was told to.
        self.stuck: str | None = None
        self._control = RunControl()
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._output: Any = None
        self._next: Sequence[str] = ()
        self._log = structlog.get_logger("runtime").bind(
            **segment.line_ids, run_id=run.run_id, thread_id=run.thread_id, graph=run.graph
        )

    def stop(self, stop: Stop) -> None:
        """Ask the run to end; the first reason counts. For the event loop only."""
        if not self._stop.done():
            self._stop.set_result(stop)
            self.segment.stopping = _CANCEL_REASONS.get(stop.kind)
            self.feed.draining = stop.kind == "drain"

    async def execute(self) -> Outcome | None:
        """Run to the end of this epoch. None when the lease was lost: another one writes."""
        drive = asyncio.create_task(self._drive(), name=f"run {self.run.run_id}")
        self.drive = drive
        timeout = self._deadline_in
        waited: set[asyncio.Future[Any]] = {drive, self._stop}
        await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not drive.done():
            if not self._stop.done():
                self.stop(Stop("deadline"))
            await self._halt(drive, self._stop.result())
            if not drive.done():
                self.stuck = next(iter(self.feed.open_nodes), "?")
        outcome = self._outcome(drive)
        if outcome is None:
            self.feed.close()
            return None
        return await self._finish(outcome)

    async def _halt(self, drive: asyncio.Task[None], stop: Stop) -> None:
        """Bring the graph to a stop: at the superstep's end for a drain, at once for the rest.

        A drain is asked for in any case: a node that swallows its cancellation would otherwise
        let the next one run.
        """
        self._control.request_drain(stop.kind)
        if stop.kind == "drain":
            await self._patience(drive)
        if not drive.done():
            drive.cancel()
            await asyncio.wait({drive}, timeout=self._settings.cancel_grace_s)

    async def _patience(self, drive: asyncio.Task[None]) -> None:
        """Wait for the superstep's end, unless all that is open sleeps for longer than we may."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.drain_s
        while not drive.done() and (left := until - clock()) > 0:
            wakes_at = self._history.wakes_at
            if wakes_at is not None and wakes_at - self.feed.now() >= left:
                return
            await asyncio.wait({drive}, timeout=min(left, _LOOK_S))

    async def _drive(self) -> None:
        """The graph from its input to its end."""
        request = self.run.request
        modes: Any = self.feed.modes
        saver = self._engine.checkpointer(self.lease, before_write=self.feed.before_checkpoint)
        client = request.get("config") or {}
        config: Any = {
            "configurable": {
                **_allowed(client.get("configurable")),
                "thread_id": self.run.thread_id,
                "__pregel_checkpointer": saver,
                "__pregel_stream": StreamProtocol(self.feed, modes),
                "__pregel_runtime": Runtime(),
            },
            "metadata": {
                **_allowed(client.get("metadata")),
                **_allowed(request.get("metadata")),
                "sereno_run": self.run.run_id,
                "sereno_epoch": self.lease.epoch,
            },
            "tags": list(client.get("tags") or ()),
            "recursion_limit": client.get("recursion_limit") or self._settings.recursion_limit,
        }
        if client.get("max_concurrency"):
            config["max_concurrency"] = client["max_concurrency"]
        async with self._graph.open(config) as graph:
            value = await self._input(graph, config)
            if value is None or isinstance(value, Command):
                allowed = getattr(graph, "_serde_allowlist", None)
                reader = apply_checkpointer_allowlist(saver, allowed)
                _check_pending_nodes(graph, await reader.aget_tuple(_place(config)))
            if value is _STOP_HERE:
                self.feed.interrupted = True
            else:
                await self._stream(graph, value, config)
            if self.feed.interrupted:
                state = await graph.aget_state(_place(config))
                self._next = state.next

    async def _stream(self, graph: Any, value: Any, config: dict[str, Any]) -> None:
        context = self.run.request.get("context")
        # No mode: the feed in the config is the stream, and has all parts before this loop turns.
        parts = graph.astream(
            value,
            config,
            context=context,
            stream_mode=[],
            control=self._control,
            durability=self.run.request.get("durability") or self._settings.durability,
        )
        async with contextlib.aclosing(parts):
            async for _ in parts:
                pass
        self._output = _shown(self.feed.output, graph.output_channels)

    async def _input(self, graph: Any, config: dict[str, Any]) -> Any:
        """What to send: the request in the first epoch, else what the checkpoints leave to do."""
        request = self.run.request
        if self.lease.epoch == 1:
            return _sent(request)
        state = await graph.aget_state(_place(config))
        if ((state.metadata or {}).get("sereno_run")) == self.run.run_id:
            if self._at_breakpoint(graph, state):
                return _STOP_HERE
            return None
        if self.run.applied and (command := request.get("command")) is not None:
            resume = command.get("resume")
            if resume is None or not await self._still_pending(graph, config, resume):
                return None
            config["configurable"]["__pregel_strict_resume"] = True
            return Command(resume=resume)
        return _sent(request)

    async def _still_pending(self, graph: Any, config: dict[str, Any], resume: Any) -> bool:
        """Whether the answers of this run still wait to be taken: sent again when taken, they
        would answer the human's next question."""
        if not isinstance(resume, dict):
            return False
        state = await graph.aget_state(_place(config))
        return set(resume) <= {interrupt.id for interrupt in state.interrupts}

    def _at_breakpoint(self, graph: Any, state: Any) -> bool:
        """`astream(None)` would run the guarded node without approval."""
        if not state.next:
            return False
        before, after = graph.interrupt_before_nodes, graph.interrupt_after_nodes
        if before == "*" or after == "*":
            return True
        step = (state.metadata or {}).get("step")
        just_ran = {
            record.node
            for record in self._history.tasks.values()
            if not record.path and record.step == step
        }
        return bool(set(before) & set(state.next) or set(after) & just_ran)

    # How it ended.

    def _outcome(self, drive: asyncio.Task[None]) -> Outcome | None:
        stop = self._stop.result() if self._stop.done() else None
        if not drive.done():  # it does not stop: its writes are refused from now on
            assert stop is not None
            return self._stopped(stop)
        if drive.cancelled():
            return self._stopped(stop or Stop("internal", error=asyncio.CancelledError()))
        error = drive.exception()
        if isinstance(error, (LeaseLost, StorageFailed, LogLimit)) and stop is None:
            stop = Stop.after(error)
        if stop is not None and (error is not None or stop.kind in ("lost", "limit", "storage")):
            return self._stopped(stop)
        if error is None:
            return self._interrupted() if self.feed.interrupted else self._success()
        return self._failed(error)

    def _success(self) -> Outcome:
        return Outcome("run.completed", {"status": "success", "output": self._output})

    def _interrupted(self) -> Outcome:
        return Outcome(
            "run.interrupted",
            {
                "status": "interrupted",
                "interrupts": list(self.feed.interrupts.values()),
                "next": list(self._next),
            },
        )

    def _failed(self, error: BaseException) -> Outcome:
        code, node = "internal", self.feed.failure
        if node is not None and node.error is not error:
            node = None  # two failed at once
        if isinstance(error, GraphRecursionError):
            code = "recursion_limit"
        elif isinstance(error, GraphChanged):
            code = "graph_changed"
        elif isinstance(error, StateTypeBlocked):
            code = error.code
        elif self.feed.failure is not None or isinstance(error, TimeoutError):
            code = "node_error"
        return self._error(code, error, node if code == "node_error" else None)

    def _error(self, code: str, error: BaseException, node: Any = None) -> Outcome:
        described: dict[str, Any] = {
            "code": code,
            "error_class": classify(error),
            "error_type": error_type(error),
        }
        if node is not None:
            described |= {"node": node.visit.node, "task": node.visit.task}
        if self._settings.expose_errors:
            described["detail"] = error_text(error)
        if node is None:  # else its attempt has told of it
            shown = self.segment.message(error) is not None
            self._log.warning(
                "Run failing",
                code=code,
                error_class=described["error_class"],
                error_type=described["error_type"],
                exc_info=error if shown else None,
            )
        return Outcome("run.failed", {"status": "error", "error": described})

    def _stopped(self, stop: Stop) -> Outcome | None:
        if stop.kind == "lost":
            return None
        if stop.kind == "cancel":
            return Outcome("run.cancelled", {"status": "cancelled", "reason": stop.reason})
        if stop.kind == "drain":
            return Outcome("run.requeued", {"reason": "drain"})
        if stop.kind == "deadline":
            error = {"code": "deadline", "error_class": "timeout", "error_type": "DeadlineExceeded"}
            return Outcome("run.timed_out", {"status": "timeout", "error": error})
        code = {"limit": "log_limit", "storage": "storage"}.get(stop.kind, "internal")
        return self._error(code, stop.error or RuntimeError(stop.reason))

    async def _finish(self, outcome: Outcome) -> Outcome | None:
        data = dict(outcome.data)
        self.feed.sweep()
        if outcome.type != "run.requeued":
            data = {"final": True, **data, **self._history.statistics(self.feed.now())}
        for pause in (0.2, 0.5, 1.0, 2.0, None):
            try:
                await self.feed.end(outcome.type, data)
                break
            except LeaseLost:
                return None
            except StorageFailed:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        return Outcome(outcome.type, data)


def mend_langgraph() -> None:
    """A subgraph compiled with `checkpointer=False` fails under durability `sync`: LangGraph waits
    for a save that it never began. Here there is nothing to wait for."""
    setattr(PregelLoop, "_put_checkpoint_fut", _Saved())  # noqa: B010 -- typed as a future


class _Saved:
    def result(self, timeout: float | None = None) -> None:
        return None

    def __await__(self) -> Iterator[Any]:
        return iter(())


class GraphChanged(Exception):
    """The graph was changed under a run: a node that it has to go on with is gone."""


def _check_pending_nodes(graph: Any, saved: Any) -> None:
    """Raises GraphChanged: LangGraph would return as if all were done."""
    if saved is None:
        return
    values = saved.checkpoint.get("channel_values") or {}
    prefix = "branch:to:"
    pending = {name.removeprefix(prefix) for name in values if name.startswith(prefix)}
    pending |= {send.node for send in values.get("__pregel_tasks") or ()}
    if missing := sorted(pending - set(graph.nodes)):
        raise GraphChanged(f"pending node {missing[0]!r} is not in the graph any more")


_STOP_HERE = object()


def _sent(request: Mapping[str, Any]) -> Any:
    command = request.get("command")
    if command is None:
        return request.get("input")
    return Command(
        resume=command.get("resume"), update=command.get("update"), goto=command.get("goto") or ()
    )


def _allowed(client: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (client or {}).items() if not k.startswith(RESERVED)}


def _shown(state: Any, output: str | Sequence[str]) -> Any:
    """The part of a state that the graph's output schema shows."""
    if isinstance(output, str) or not isinstance(state, dict):
        return state
    return {name: value for name, value in state.items() if name in output}


def _place(config: Mapping[str, Any]) -> Any:
    """Where a run's checkpoints are, without its stream."""
    kept = ("thread_id", "__pregel_checkpointer")
    return {"configurable": {k: config["configurable"][k] for k in kept}}
