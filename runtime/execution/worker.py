"""Claims runs, gives each a runner, keeps their leases, and brings them to a stop.

One worker per process. The heartbeat has a thread of its own, so a node that blocks the event loop
does not cost its neighbours their leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import structlog
from opentelemetry.trace import Link, SpanContext

from runtime.engines.base import Checkpointed, Engine
from runtime.errors import (
    Draining,
    LeaseLost,
    QueueFull,
    StorageFailed,
    ThreadBusy,
    ThreadHeld,
    UnknownGraph,
)
from runtime.events import Event, Sealer
from runtime.execution.feed import Feed, Limits
from runtime.execution.history import History, begun_anew, superseded
from runtime.execution.runner import Outcome, Runner, Stop
from runtime.graphs import Graphs, LoadedGraph
from runtime.model import Lease, NewRun, Run, RunStatus
from runtime.settings import Settings
from telemetry.contract import classify, error_type
from telemetry.encoding import JsonEncoder
from telemetry.langgraph import current_attempt
from telemetry.lost import Lost, LostNode
from telemetry.metrics import Metrics
from telemetry.observations import Visit
from telemetry.segments import Segment, Segments, current_segment
from telemetry.tracing import Tracing, ids_of, read_traceparent

__all__ = ["NodeExecutor", "Worker"]

#: A run that crashed this often runs alone; a crash while alone fails it.
SUSPECT = 2
#: Seconds between looks for runs that nobody has announced.
SWEEP_S = 1.0


class Worker:
    """Executes the runs of one engine in this process. An async context manager."""

    def __init__(
        self,
        engine: Engine,
        graphs: Graphs,
        settings: Settings,
        *,
        encoder: JsonEncoder | None = None,
        clock: Callable[[], float] = time.time,
        segments: Segments | None = None,
    ) -> None:
        self.owner = uuid.uuid4().hex
        self.encoder = encoder or JsonEncoder()
        self.draining = False
        #: Lines of ended runs that were refused, for telemetry.
        self.fenced_events = 0
        self._engine = engine
        self._graphs = graphs
        self._settings = settings
        self._clock = clock
        self._segments = segments or Segments(Metrics(), Tracing())
        self._rejected = self._segments.metrics["runs_rejected_total"]
        self._log = structlog.get_logger("runtime")
        self._runners: dict[str, Runner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._announced: dict[str, Run] = {}
        self._claiming: set[str] = set()
        #: Run id → its graph, which is not served, and when that was seen first.
        self._missing: dict[str, tuple[str, float]] = {}
        self._swallowers: dict[str, tuple[str, str]] = {}
        self._cancelled_early: dict[str, str] = {}
        self._solo: str | None = None
        self._swept_at = 0.0
        #: Whether the last sweep left runs behind.
        self._more = False
        self._wake = asyncio.Event()
        self._stopped = threading.Event()
        self._executor = NodeExecutor(settings.executor_threads)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._loop = loop
        loop.set_default_executor(self._executor)
        loop.set_task_factory(_task)
        self._claimer = asyncio.create_task(self._claim_forever(), name="sereno-claimer")
        self._heart = threading.Thread(target=self._beat, name="sereno-heartbeat", daemon=True)
        self._heart.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._let_go()
        self._claimer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._claimer
        self._stopped.set()
        await _in_thread(self._heart.join)
        self._loop.set_task_factory(None)

    # What the API asks for.

    async def submit(self, new: NewRun, queued_data: Mapping[str, Any]) -> Run:
        """Commit a new run and wake the claimer.

        Raises Draining, QueueFull, ThreadHeld, ThreadBusy, StorageFailed.
        """
        if self.draining:
            self._rejected.inc(new.graph, "draining")
            raise Draining()
        if len(self._announced) >= self._settings.queue_max:
            self._rejected.inc(new.graph, "queue_full")
            raise QueueFull(self._settings.queue_max)
        if (held := self.held(new.thread_id)) is not None:
            raise ThreadHeld(new.thread_id, *held)
        sealer = Sealer(new.run_id, new.thread_id, self.encoder, line_max=self._settings.line_max)
        asked = ids_of(read_traceparent(new.request.get("traceparent")))
        ids = {"trace_id": asked[0], "span_id": asked[1]} if asked is not None else {}
        queued = sealer.seal(
            "run.queued", seq=1, epoch=0, ts=self._clock(), data=queued_data, where=ids
        )
        try:
            run = await self._engine.submit(new, queued)
        except StorageFailed:
            self._rejected.inc(new.graph, "storage")
            raise
        trigger = str(queued_data.get("trigger", "api"))
        self._log.info(
            "Run queued",
            event_type="run.queued",
            **ids,
            run_id=run.run_id,
            thread_id=run.thread_id,
            graph=run.graph,
            trigger=trigger,
        )
        self._segments.queued(run.graph, trigger)
        self._announced[run.run_id] = run
        self._wake.set()
        return run

    async def cancel(self, run_id: str, reason: str) -> Run:
        """Ask a run to end. Ends a run that nobody executes at once. Raises UnknownRun."""
        run = await self._engine.request_cancel(run_id, reason)
        if run.terminal is not None:
            return run
        if (runner := self._runners.get(run_id)) is not None:
            runner.stop(Stop("cancel", run.cancel_reason or reason))
        elif run_id in self._claiming:
            self._cancelled_early[run_id] = run.cancel_reason or reason
        else:
            return await self._end_unclaimed(
                run,
                Outcome("run.cancelled", {"status": "cancelled", "reason": run.cancel_reason}),
            )
        return run

    async def drain(self) -> None:
        """Claim nothing more; give what runs until the end of its superstep, then let it go."""
        if not self.draining:
            self._log.info("Draining", runs=len(self._runners))
        await self._let_go()

    async def _let_go(self) -> None:
        """Drain without a word: a start that failed has nothing to tell of."""
        if not self.draining:
            self.draining = True
            for runner in self._runners.values():
                runner.stop(Stop("drain"))
            self._engine.tails.wake()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def open_nodes(self, run_id: str) -> Sequence[str]:
        """Nodes of a run that execute here now."""
        runner = self._runners.get(run_id)
        return runner.feed.open_nodes if runner is not None else ()

    @property
    def missing_graphs(self) -> Sequence[str]:
        """Graphs that runs wait for and that are not served."""
        return sorted({graph for graph, _ in self._missing.values()})

    @property
    def abandoned(self) -> int:
        """Sync nodes of ended runs that are still running in their threads."""
        return self._executor.abandoned() + len(self._swallowers)

    def watch(self, metrics: Metrics) -> None:
        """Have the gauges of slots, threads and runs read at scrape time."""
        self._executor.watch(metrics)
        metrics["slots"].watch(lambda: len(self._runners), "busy")
        metrics["slots"].watch(lambda: self._settings.slots - len(self._runners), "free")
        for graph in self._graphs.names():
            metrics["runs_detached"].watch(partial(self._detached, graph), graph)
            metrics["nodes_abandoned"].watch(partial(self._executor.abandoned, graph), graph)

    def _detached(self, graph: str) -> int:
        """Runs that go on without a reader."""
        watched = self._engine.tails.watched
        runs = [runner.run for runner in list(self._runners.values())]
        return sum(run.graph == graph and not watched(run.run_id) for run in runs)

    # Claiming.

    async def _claim_forever(self) -> None:
        while not self.draining:
            self._wake.clear()
            try:
                await self._claim_all()
            except StorageFailed as exc:
                self._log.warning("Store cannot be read", error=str(exc))
            except Exception:
                self._log.exception("Claiming failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), SWEEP_S)

    async def _claim_all(self) -> None:
        swept = await self._sweep()
        for run in [*self._announced.values(), *(swept or ())]:
            if self.draining:
                return
            if swept is None and self._busy():
                return  # what has expired meanwhile is seen with the next sweep
            if run.run_id in self._runners or run.run_id in self._claiming:
                continue
            expired = run.deadline is not None and run.deadline <= self._clock()
            if not expired and run.cancel_reason is None and self._waits_for_graph(run):
                continue
            suspect = run.crashes + _crashed(run) >= SUSPECT
            # A suspect runs alone, once the others are done.
            if not expired and (self._busy() or (suspect and (self._runners or self._claiming))):
                continue
            self._announced.pop(run.run_id, None)
            self._claiming.add(run.run_id)
            if suspect:
                self._solo = run.run_id
            task = asyncio.create_task(self._take(run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _sweep(self) -> Sequence[Run] | None:
        """Runs that nobody announced here: from before a restart, or with an expired lease.

        None when it is not time to look.
        """
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S and not (self._more and not self._busy()):
            return None
        self._swept_at = now
        # Those that wait for a graph must not hide the others.
        limit = 2 * self._settings.slots + len(self._missing)
        found = await self._engine.claimable(limit)
        self._more = len(found) == limit
        return [run for run in found if run.run_id not in self._announced]

    def _busy(self) -> bool:
        if self._solo is not None:
            runner = self._runners.get(self._solo)
            if runner is None or not runner.feed.progressed:
                return True
        return len(self._runners) + len(self._claiming) >= self._settings.slots

    async def _take(self, run: Run) -> None:
        """Claim one run and execute it; whatever happens, its slot comes free."""
        try:
            await self._execute(run)
        except (LeaseLost, ThreadBusy) as exc:
            self._log.info("Run not claimed", run_id=run.run_id, why=str(exc))
        except StorageFailed as exc:
            self._log.error("Run let go: the store failed", run_id=run.run_id, error=str(exc))
        except Exception:
            self._log.exception("Run let go", run_id=run.run_id)
        finally:
            self._claiming.discard(run.run_id)
            self._cancelled_early.pop(run.run_id, None)
            self._runners.pop(run.run_id, None)
            if self._solo == run.run_id:
                self._solo = None
            self._wake.set()

    async def _execute(self, run: Run) -> None:
        if run.cancel_reason is not None:
            data = {"status": "cancelled", "reason": run.cancel_reason}
            await self._end_unclaimed(run, Outcome("run.cancelled", data))
            return
        remaining = run.deadline - self._clock() if run.deadline is not None else None
        if remaining is not None and remaining <= 0:
            await self._end_unclaimed(run, _DEADLINE)
            return
        if run.crashes >= SUSPECT and _crashed(run):
            await self._end_unclaimed(run, _MAX_ATTEMPTS)
            return
        graph = await self._graph(run)
        if graph is None:
            return
        claim = await self._prepare(run, graph)
        segment = claim.segment
        try:
            lease = await self._engine.claim(
                run,
                claim.event,
                owner=self.owner,
                lease_s=self._settings.lease_s,
                crashed=_crashed(run),
                forget=claim.anew,
            )
            self._claimed(run, claim)
            runner = self._runner(run, lease, graph, claim, remaining)
            try:
                outcome = await self._drive(run, runner)
            except (LeaseLost, StorageFailed):
                raise
            except Exception as exc:
                self._log.exception("Run failed inside Sereno", run_id=run.run_id)
                outcome = await self._end_broken(runner, claim, exc)
        except BaseException:
            segment.discard()
            raise
        if outcome is None:
            segment.discard()
        else:
            self._tell(run, outcome, segment, claim.history)

    def _claimed(self, run: Run, claim: _Claim) -> None:
        segment, first = claim.segment, run.epoch == 0
        self._log.info(
            "Run started" if first else "Run recovered",
            event_type=claim.event.type,
            **segment.line_ids,
            run_id=run.run_id,
            thread_id=run.thread_id,
            graph=run.graph,
            epoch=segment.epoch,
            seq=claim.event.seq,
            **({} if first else {"reason": _why_again(run)}),
        )
        segment.claimed(waited_s=claim.event.ts - run.created_at if first else None)
        if _crashed(run):
            segment.follows(claim.lost, recovered=True)

    async def _drive(self, run: Run, runner: Runner) -> Outcome | None:
        self._runners[run.run_id] = runner
        self._claiming.discard(run.run_id)
        if (reason := self._cancelled_early.pop(run.run_id, None)) is not None:
            runner.stop(Stop("cancel", reason))
        if self.draining:
            runner.stop(Stop("drain"))
        try:
            with runner.segment.entered():
                return await runner.execute()
        finally:
            self._executor.abandon(run.run_id)
            self._abandon(run, runner)

    async def _end_broken(self, runner: Runner, claim: _Claim, exc: Exception) -> Outcome:
        """A fault of ours ends the run: left alone it would be taken for a crash, and repeated."""
        error = {"code": "internal", "error_class": classify(exc), "error_type": error_type(exc)}
        numbers = claim.history.statistics(self._clock())
        data = {"final": True, "status": "error", "error": error, **numbers}
        await runner.feed.end("run.failed", data)
        return Outcome("run.failed", data)

    def _abandon(self, run: Run, runner: Runner) -> None:
        """A coroutine that swallows its cancellation holds its thread until it returns."""
        self.fenced_events += (dropped := runner.feed.dropped)
        self._segments.metrics["fenced_writes_total"].inc("event", by=dropped)
        drive = runner.drive
        if drive is None or drive.done():
            return
        self._swallowers[run.run_id] = (run.thread_id, runner.stuck or "?")
        drive.add_done_callback(lambda _: self._swallowers.pop(run.run_id, None))

    def held(self, thread_id: str) -> tuple[str, str] | None:
        """(run id, node) of an ended run that still executes on the thread."""
        for runner in self._runners.values():
            if runner.run.thread_id == thread_id and runner.stuck is not None:
                return runner.run.run_id, runner.stuck
        for run_id, (thread, node) in self._swallowers.items():
            if thread == thread_id:
                return run_id, node
        return self._executor.holder(thread_id)

    def _waits_for_graph(self, run: Run) -> bool:
        """Whether the run's graph is not served, and may still come."""
        if run.graph in self._graphs.names():
            return False
        now = time.monotonic()
        _, since = self._missing.setdefault(run.run_id, (run.graph, now))
        return now - since <= self._settings.graph_wait_s

    async def _graph(self, run: Run) -> LoadedGraph | None:
        """The run's graph; a run whose graph did not come in time fails."""
        try:
            return self._graphs.get(run.graph)
        except UnknownGraph as exc:
            error = {
                "code": "graph_unavailable",
                "error_class": "other",
                "error_type": "UnknownGraph",
                "detail": str(exc),
            }
            await self._end_unclaimed(
                run, Outcome("run.failed", {"status": "error", "error": error})
            )
            return None

    async def _prepare(self, run: Run, graph: LoadedGraph) -> _Claim:
        """The first line of the next epoch, from what log and checkpoints say."""
        sealer = Sealer.of(run, self.encoder, line_max=self._settings.line_max)
        now = self._clock()
        lost = None
        if run.epoch == 0:
            history, anew = History(), set()
            history.add("run.queued", 1, run.created_at, {})
            data: dict[str, Any] = {}
            type = "run.started"
            changed = run.request.get("resumes_digest") not in (None, graph.digest)
        else:
            history = History.read(await self._log_of(run))
            type = "run.recovered"
            held = await self._engine.checkpointed(run.thread_id)
            lost = _lost(run, history)
            anew = begun_anew(history, held)
            data = _recovery(run, history, held)
            changed = run.graph_digest != graph.digest
        if changed:
            data["graph_changed"] = True
        segment = self._segment(run, run.epoch + 1, history, now, graph.digest)
        ids, seq = segment.line_ids, run.last_seq + 1
        event = sealer.seal(type, seq=seq, epoch=run.epoch + 1, ts=now, data=data, where=ids)
        history.add(type, seq, now, data, ids)
        return _Claim(
            event=event, sealer=sealer, history=history, anew=anew, segment=segment, lost=lost
        )

    def _segment(
        self, run: Run, epoch: int, history: History, now: float, version: str = ""
    ) -> Segment:
        """The run's next segment: in the trace of the request that asked for the run."""
        return self._segments.begin(
            run_id=run.run_id,
            thread_id=run.thread_id,
            graph=run.graph,
            epoch=epoch,
            trigger=_trigger(run, first=run.epoch == 0),
            version=version,
            parent=read_traceparent(run.request.get("traceparent")),
            trace_id=int(history.trace_id, 16) if history.trace_id else None,
            links=_links(run, _context(history.trace_id, history.segment_span_id)),
            start=now,
        )

    async def _log_of(self, run: Run) -> list[Any]:
        lines: list[Any] = []
        while batch := await self._engine.read(run.run_id, len(lines)):
            lines.extend(batch)
        return lines

    def _runner(
        self,
        run: Run,
        lease: Lease,
        graph: LoadedGraph,
        claim: _Claim,
        remaining: float | None,
    ) -> Runner:
        feed = Feed(
            engine=self._engine,
            lease=lease,
            sealer=claim.sealer,
            encoder=self.encoder,
            history=claim.history,
            segment=claim.segment,
            modes=frozenset(run.modes),
            limits=Limits(
                events=self._settings.run_max_events,
                log_bytes=self._settings.run_max_log_bytes,
                unwritten=self._settings.run_max_unwritten,
            ),
            token_s=self._settings.token_ms / 1000,
            failed=lambda error: runner.stop(Stop.after(error)),
            expose_errors=self._settings.expose_errors,
            clock=self._clock,
        )
        runner = Runner(
            engine=self._engine,
            settings=self._settings,
            graph=graph,
            run=run,
            lease=lease,
            history=claim.history,
            segment=claim.segment,
            feed=feed,
            deadline_in=remaining,
        )
        return runner

    async def _end_unclaimed(self, run: Run, outcome: Outcome) -> Run:
        """A terminal line for a run that nobody executes."""
        self._announced.pop(run.run_id, None)
        self._missing.pop(run.run_id, None)
        history = History.read(await self._log_of(run))
        now = self._clock()
        lost = _lost(run, history)
        data = {"final": True, **outcome.data, **history.statistics(now)}
        segment = self._segment(run, run.epoch, history, now)
        segment.stopping = "api" if run.cancel_reason is not None else None
        sealer = Sealer.of(run, self.encoder, line_max=self._settings.line_max)
        event = sealer.seal(
            outcome.type,
            seq=run.last_seq + 1,
            epoch=run.epoch,
            ts=now,
            data=data,
            where=segment.line_ids,
        )
        try:
            ended = await self._engine.append_unclaimed(run, [event])
        except LeaseLost:
            segment.discard()
            return await self._engine.get(run.run_id)
        except BaseException:
            segment.discard()
            raise
        if _crashed(run):
            segment.follows(lost, recovered=False)
        self._tell(ended, Outcome(outcome.type, data), segment, history)
        return ended

    def _tell(self, run: Run, outcome: Outcome, segment: Segment, history: History) -> None:
        data = outcome.data
        error = data.get("error") or {}
        bad = data.get("status") in ("error", "timeout")
        took = {"duration_ms": data.get("duration_ms")} if "status" in data else {}
        log = self._log.warning if bad else self._log.info
        log(
            _SAID[outcome.type],
            event_type=outcome.type,
            **segment.line_ids,
            run_id=run.run_id,
            thread_id=run.thread_id,
            graph=run.graph,
            status=data.get("status", "pending"),
            **took,
            **{name: error[name] for name in _ERROR_FIELDS if name in error},
        )
        segment.end(data, had_output=history.first_output_s is not None)

    # Leases.

    def _beat(self) -> None:
        while not self._stopped.wait(self._settings.lease_heartbeat_s):
            runners = list(self._runners.values())
            if not runners:
                continue
            try:
                learnt = self._engine.renew(
                    [runner.lease for runner in runners], self._settings.lease_s
                )
            except Exception as exc:
                self._log.warning("Lease renewal failed", error=str(exc))
                continue
            for runner in runners:
                renewal = learnt[runner.lease.run_id]
                if not renewal.held:
                    stop = Stop("lost")
                elif renewal.cancel_reason is not None:
                    stop = Stop("cancel", renewal.cancel_reason)
                else:
                    continue
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(runner.stop, stop)


@dataclass(frozen=True, slots=True)
class _Claim:
    event: Event
    sealer: Sealer
    history: History
    #: Tasks whose subgraphs' checkpoints are discarded.
    anew: Collection[str]
    segment: Segment
    #: The segment before, when its process died.
    lost: Lost | None


class NodeExited(RuntimeError):
    """A node asked for the end of the process that it shares with others."""


def _task(loop: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
    """No task of a run may end the loop: asyncio lets SystemExit and KeyboardInterrupt out."""
    context = more.get("context")
    run = current_segment.get() if context is None else context.get(current_segment)
    return asyncio.Task(coro if run is None else _KeptIn(coro), loop=loop, **more)


class _KeptIn(Coroutine[Any, Any, Any]):
    __slots__ = ("_coro",)

    def __init__(self, coro: Any) -> None:
        self._coro = coro

    def send(self, value: Any) -> Any:
        try:
            return self._coro.send(value)
        except (SystemExit, KeyboardInterrupt) as exc:
            raise NodeExited(f"{type(exc).__name__} inside a graph") from exc

    def throw(self, *error: Any) -> Any:
        try:
            return self._coro.throw(*error)
        except (SystemExit, KeyboardInterrupt) as exc:
            raise NodeExited(f"{type(exc).__name__} inside a graph") from exc

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        return self._coro.__await__()


class NodeExecutor(ThreadPoolExecutor):
    """The threads of sync nodes; knows whose function runs in which, since none can be stopped."""

    def __init__(self, threads: int) -> None:
        super().__init__(max_workers=threads, thread_name_prefix="sereno-node")
        #: Whose function a future is, and its node.
        self._running: dict[Future[Any], tuple[Segment, str]] = {}
        self._ended: set[str] = set()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        owner, attempt = current_segment.get(), current_attempt.get()
        if owner is not None and attempt is not None:
            self._running[future] = (owner, attempt.visit.node)
            future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[Any]) -> None:
        run_id = self._running.pop(future)[0].run_id
        if all(owner.run_id != run_id for owner, _ in list(self._running.values())):
            self._ended.discard(run_id)

    def abandon(self, run_id: str) -> None:
        """The run has ended; what it left behind holds its thread until it returns."""
        if any(owner.run_id == run_id for owner, _ in list(self._running.values())):
            self._ended.add(run_id)

    def holder(self, thread_id: str) -> tuple[str, str] | None:
        """(run id, node) of an ended run whose function still runs on the thread."""
        for owner, node in list(self._running.values()):
            if owner.thread_id == thread_id and owner.run_id in self._ended:
                return owner.run_id, node
        return None

    def abandoned(self, graph: str | None = None) -> int:
        """Functions of ended runs that still run, of one graph or of all."""
        return sum(
            owner.run_id in self._ended and graph in (None, owner.graph)
            for owner, _ in list(self._running.values())
        )

    def watch(self, metrics: Metrics) -> None:
        """Have its gauges read at scrape time."""
        metrics["executor_threads"].watch(lambda: len(self._threads))
        metrics["executor_queue"].watch(self._work_queue.qsize)


#: The messages of records of the last line of an epoch.
_SAID = {
    "run.completed": "Run completed",
    "run.failed": "Run failed",
    "run.cancelled": "Run cancelled",
    "run.timed_out": "Run timed out",
    "run.interrupted": "Run interrupted",
    "run.requeued": "Run requeued",
}
#: What the record of a run's end says of its error.
_ERROR_FIELDS = ("code", "node", "task", "error_class", "error_type")
_DEADLINE = Outcome(
    "run.timed_out",
    {
        "status": "timeout",
        "error": {
            "code": "deadline",
            "error_class": "timeout",
            "error_type": "DeadlineExceeded",
        },
    },
)
_MAX_ATTEMPTS = Outcome(
    "run.failed",
    {
        "status": "error",
        "error": {
            "code": "max_attempts",
            "error_class": "max_attempts",
            "error_type": "MaxAttemptsExceeded",
        },
    },
)


def _recovery(run: Run, history: History, held: Checkpointed) -> dict[str, Any]:
    """What `run.recovered` tells."""
    lost = superseded(history, held)
    return {
        "reason": _why_again(run),
        "from_checkpoint": held.checkpoint_id if held.run_id == run.run_id else None,
        "lost": [
            {"task": record.task, "node": record.node, "attempt": record.attempt} for record in lost
        ],
        "discard_from": min((record.first_seq for record in lost), default=history.last_seq + 1),
    }


def _lost(run: Run, history: History) -> Lost | None:
    """The spans that the run's last holder could not end; its claim is the log's last one."""
    context = _context(history.trace_id, history.segment_span_id)
    if context is None or not _crashed(run):
        return None
    nodes = []
    for record in history.tasks.values():
        span = _context(history.trace_id, record.node_span_id)
        if span is None or not record.open or record.attempt_since < history.segment_since:
            continue
        caller = history.tasks.get(record.path[-1]) if record.path else None
        nodes.append(
            LostNode(
                visit=Visit(
                    task=record.task,
                    node=record.node,
                    ns=tuple(record.ns),
                    path=tuple(record.path),
                    step=record.step,
                ),
                span=span,
                parent=_context(history.trace_id, caller.span_id) if caller is not None else None,
                since=record.since,
                attempt=record.attempt,
                attempt_span=None
                if record.wakes_at is not None
                else _context(history.trace_id, record.span_id),
                attempt_since=record.attempt_since,
            )
        )
    return Lost(
        context=context,
        parent=_context(history.trace_id, history.root_span_id),
        links=_links(run, _context(history.trace_id, history.previous_span_id)),
        trigger=_trigger(run, first=run.epoch == 1),
        since=history.segment_since,
        until=run.lease_until or history.segment_since,
        nodes=nodes,
    )


def _trigger(run: Run, *, first: bool) -> str:
    trigger: str = run.request.get("trigger", "api") if first else "recovery"
    return trigger


def _links(run: Run, previous: SpanContext | None) -> list[Link]:
    """Where a segment of the run leads: to the one before, and to the run that it answers."""
    links = []
    if previous is not None:
        links.append(Link(previous, {"sereno.link.kind": "previous_segment"}))
    if (resumed := read_traceparent(run.request.get("resume_of"))) is not None:
        links.append(Link(resumed, {"sereno.link.kind": "resume_of"}))
    return links


def _context(trace_id: str | None, span_id: str | None) -> SpanContext | None:
    return read_traceparent(f"00-{trace_id}-{span_id}-01") if trace_id and span_id else None


def _crashed(run: Run) -> bool:
    """Whether the last holder went without letting go."""
    return run.lease_owner is not None and run.status is RunStatus.RUNNING


def _why_again(run: Run) -> str:
    """Why a run that had begun goes on here."""
    return "crash" if _crashed(run) else "drain"


async def _in_thread(function: Callable[[], Any]) -> None:
    """In a thread of its own: the default executor is for nodes."""
    done = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def run() -> None:
        function()
        loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=run, daemon=True).start()
    await done
