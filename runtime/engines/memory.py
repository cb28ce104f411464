"""The engine that keeps all in this process: for tests, `run --local`, and as the reference."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver

from runtime.engines.base import (
    NOT_A_RESULT,
    Checkpointed,
    Statistics,
    Tails,
    Waiting,
    check_append,
    check_claim,
    check_lines,
    check_submit,
    lets_go,
    span_attributes,
    turning_point,
    void,
)
from runtime.errors import LeaseLost, StorageFailed, UnknownRun
from runtime.events import STATUS, Event
from runtime.model import Lease, NewRun, Renewal, Run, RunQuery, RunStatus, StoredLine
from telemetry.storage import Op, Operation, StorageObserver

__all__ = ["MemoryEngine", "Store"]


@dataclass
class Store:
    """What several engines over one memory share."""

    runs: dict[str, Run] = field(default_factory=dict)
    lines: dict[str, list[StoredLine]] = field(default_factory=dict)
    data: dict[tuple[str, int, str], bytes] = field(default_factory=dict)
    saver: InMemorySaver = field(default_factory=InMemorySaver)
    lock: threading.RLock = field(default_factory=threading.RLock)
    log_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class MemoryEngine:
    """See `runtime.engines.base.Engine`. Nothing survives the process."""

    def __init__(
        self,
        url: str = "memory://",
        *,
        store: Store | None = None,
        clock: Callable[[], float] = time.time,
        serde: Any = None,
        telemetry: StorageObserver | None = None,
        **_: object,
    ) -> None:
        self._store = store or Store()
        self._clock = clock
        if serde is not None:
            self._store.saver.serde = serde
        self.telemetry = telemetry or StorageObserver()
        self.log_id = self._store.log_id
        self.tails = Tails()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def submit(self, new: NewRun, queued: Event) -> Run:
        with self._store.lock:
            if new.run_id in self._store.runs:
                raise StorageFailed(f"run {new.run_id!r} is there already")
            check_submit(new.thread_id, self._active(new.thread_id))
            check_lines(new.run_id, 0, 0, [queued])
            newest = [
                r.created_at for r in self._store.runs.values() if r.thread_id == new.thread_id
            ]
            now = max(self._clock(), max(newest, default=0.0) + 1e-6)
            run = Run.pending(new, now=now)
            self._store.lines[new.run_id] = []
            return self._write(run, [queued])

    async def get(self, run_id: str) -> Run:
        try:
            return self._store.runs[run_id]
        except KeyError:
            raise UnknownRun(run_id) from None

    async def search(self, query: RunQuery) -> Sequence[Run]:
        with self._store.lock:
            runs = sorted(
                self._store.runs.values(), key=lambda r: (r.created_at, r.run_id), reverse=True
            )
        return [run for run in runs if _matches(run, query)][: query.limit]

    async def position(self, run: Run) -> int:
        place = run.created_at, run.run_id
        with self._store.lock:
            return sum(
                r.status is RunStatus.PENDING and (r.created_at, r.run_id) < place
                for r in self._store.runs.values()
            )

    async def claimable(self, limit: int) -> Sequence[Run]:
        now = self._clock()
        with self._store.lock:
            runs = [r for r in self._store.runs.values() if r.terminal is None and void(r, now)]
        return sorted(runs, key=lambda r: (r.created_at, r.run_id))[:limit]

    async def claim(
        self,
        run: Run,
        event: Event,
        *,
        owner: str,
        lease_s: float,
        crashed: bool,
        forget: Collection[str] = (),
    ) -> Lease:
        with self._store.lock:
            now, current = self._clock(), self._store.runs.get(run.run_id)
            check_claim(run, current, self._holder(run.thread_id), now)
            check_lines(run.run_id, run.epoch, run.last_seq, [event])
            assert current is not None
            claimed = replace(
                current,
                epoch=run.epoch + 1,
                lease_owner=owner,
                lease_until=now + lease_s,
                crashes=current.crashes + crashed,
                started_at=current.started_at or now,
            )
            self._write(claimed, [event])
            self._forget(run.thread_id, forget)
        return Lease(run_id=run.run_id, thread_id=run.thread_id, epoch=claimed.epoch, owner=owner)

    def _forget(self, thread_id: str, tasks: Collection[str]) -> None:
        """Drop the checkpoints of the graphs that these tasks called."""
        saver = self._store.saver
        for ns in list(saver.storage.get(thread_id, {})):
            if any(f":{task}" in ns for task in tasks):
                del saver.storage[thread_id][ns]
                for key in [key for key in saver.writes if key[:2] == (thread_id, ns)]:
                    del saver.writes[key]

    def renew(self, leases: Sequence[Lease], lease_s: float) -> dict[str, Renewal]:
        learnt, taken = {}, 0
        with self._store.lock:
            until = self._clock() + lease_s
            for lease in leases:
                run = self._store.runs.get(lease.run_id)
                if run is None or (run.epoch, run.lease_owner) != (lease.epoch, lease.owner):
                    learnt[lease.run_id] = Renewal(held=False)
                    taken += run is not None and run.epoch > lease.epoch
                    continue
                self._store.runs[run.run_id] = replace(run, lease_until=until)
                learnt[lease.run_id] = Renewal(held=True, cancel_reason=run.cancel_reason)
        if taken:
            self.telemetry.not_renewed(taken)
        return learnt

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        try:
            with self._store.lock:
                run = self._store.runs.get(lease.run_id)
                check_append(run, lease)
                assert run is not None
                check_lines(run.run_id, run.epoch, run.last_seq, events)
                self._write(run, events)
        except LeaseLost as exc:
            self.telemetry.fenced("event", len(events))
            future.set_exception(exc)
        else:
            future.set_result(None)
        return future

    async def append_unclaimed(self, run: Run, events: Sequence[Event]) -> Run:
        with self._store.lock:
            check_claim(run, self._store.runs.get(run.run_id), None, self._clock())
            check_lines(run.run_id, run.epoch, run.last_seq, events)
            return self._write(self._store.runs[run.run_id], events)

    async def request_cancel(self, run_id: str, reason: str) -> Run:
        with self._store.lock:
            run = await self.get(run_id)
            if run.terminal is None and run.cancel_reason is None:
                run = self._store.runs[run_id] = replace(
                    run, cancel_reason=reason, updated_at=self._clock()
                )
            return run

    async def read(self, run_id: str, after: int, limit: int = 1000) -> Sequence[StoredLine]:
        return self._store.lines.get(run_id, [])[after : after + limit]

    async def data(self, run_id: str, seq: int, member: str) -> bytes | None:
        return self._store.data.get((run_id, seq, member))

    def checkpointer(
        self, lease: Lease | None, *, before_write: Callable[[str | None], None] | None = None
    ) -> BaseCheckpointSaver[Any]:
        return _FencedSaver(self, lease, before_write)

    async def checkpointed(self, thread_id: str) -> Checkpointed:
        saver = self._store.saver
        stored = {
            task
            for (thread, ns, checkpoint), writes in saver.writes.items()
            if thread == thread_id and checkpoint in saver.storage[thread][ns]
            for (task, _), (_, channel, _, _) in writes.items()
            if channel not in NOT_A_RESULT
        }
        latest = {}
        for ns, checkpoints in saver.storage.get(thread_id, {}).items():
            if checkpoints:
                newest = max(checkpoints)
                latest[ns] = (newest, saver.serde.loads_typed(checkpoints[newest][1]))
        return Checkpointed(stored, latest)

    async def writable(self) -> bool:
        return True

    async def statistics(self) -> Statistics:
        with self._store.lock:
            runs = list(self._store.runs.values())
        now = self._clock()
        pending = [run.created_at for run in runs if run.status is RunStatus.PENDING]
        last = {run.thread_id: run for run in sorted(runs, key=lambda r: r.created_at)}
        since: dict[str, list[float]] = {}
        for run in last.values():
            if run.status is RunStatus.INTERRUPTED:
                assert run.ended_at is not None
                since.setdefault(run.graph, []).append(run.ended_at)
        return Statistics(
            pending=len(pending),
            oldest_pending_s=now - min(pending) if pending else None,
            waiting={
                graph: Waiting(runs=len(times), oldest_s=now - min(times))
                for graph, times in since.items()
            },
        )

    async def sizes(self) -> Mapping[str, int]:
        return {}

    def _active(self, thread_id: str) -> Run | None:
        for run in self._store.runs.values():
            if run.thread_id == thread_id and run.terminal is None:
                return run
        return None

    def _holder(self, thread_id: str) -> str | None:
        active = self._active(thread_id)
        return active.run_id if active is not None and active.epoch > 0 else None

    def _write(self, run: Run, events: Sequence[Event]) -> Run:
        """Lines and what they make of the row, as one step."""
        begun = time.perf_counter()
        lines = self._store.lines[run.run_id]
        for event in events:
            lines.append(StoredLine(seq=event.seq, type=event.type, body=event.body))
            for member, value in event.data:
                self._store.data[run.run_id, event.seq, member] = value
        now = self._clock()
        run = replace(run, last_seq=len(lines), updated_at=now)
        if (turn := turning_point(events)) is not None:
            run = replace(run, status=STATUS[turn.type])
            if lets_go(turn):
                run = replace(run, lease_owner=None, lease_until=None)
            if turn.terminal:
                run = replace(run, terminal=turn.seq, ended_at=now)
        self._store.runs[run.run_id] = run
        self.telemetry.committed(time.perf_counter() - begun, failed=False)
        self.tails.publish(run.run_id, events)
        return run

    def checkpoint_written(self, lease: Lease, *, progress: bool) -> None:
        """The fence of the saver; a new checkpoint of the root is progress after a crash."""
        with self._store.lock:
            run = self._store.runs.get(lease.run_id)
            check_append(run, lease)
            assert run is not None
            self._store.runs[run.run_id] = replace(
                run, applied=True, crashes=0 if progress else run.crashes
            )


class _FencedSaver(InMemorySaver):
    """LangGraph's saver over the shared store; writes need the lease."""

    def __init__(
        self,
        engine: MemoryEngine,
        lease: Lease | None,
        before_write: Callable[[str | None], None] | None,
    ) -> None:
        saver = engine._store.saver
        super().__init__(serde=saver.serde)
        self.storage, self.writes, self.blobs = saver.storage, saver.writes, saver.blobs
        self._engine = engine
        self._lease = lease
        self._before_write = before_write
        self._run = span_attributes(lease)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def get_tuple(self, config: Any) -> Any:
        if threading.get_ident() == self._thread:
            # The graph's writes would wait for this loop, which waits for the graph.
            raise asyncio.InvalidStateError(
                "a graph called by `invoke` blocks the event loop: use `await graph.ainvoke(…)`"
            )
        return super().get_tuple(config)

    async def aget_tuple(self, config: Any) -> Any:
        with self._operation("get"):
            return super().get_tuple(config)

    async def alist(
        self, config: Any, *, filter: Any = None, before: Any = None, limit: int | None = None
    ) -> AsyncIterator[CheckpointTuple]:
        with self._operation("list"):
            items = list(super().list(config, filter=filter, before=before, limit=limit))
        for item in items:
            yield item

    async def aget_delta_channel_history(self, *, config: Any, channels: Any) -> Any:
        with self._operation("get"):
            return super().get_delta_channel_history(config=config, channels=channels)

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        if threading.get_ident() != self._thread:  # a graph that a sync node calls
            return asyncio.run_coroutine_threadsafe(
                self.aput(config, checkpoint, metadata, new_versions), self._loop
            ).result()
        with self._operation("put"):
            root = not config["configurable"].get("checkpoint_ns")
            self._fence(checkpoint["id"] if root else None)
            return super().put(config, checkpoint, metadata, new_versions)

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        if threading.get_ident() != self._thread:
            return asyncio.run_coroutine_threadsafe(
                self.aput_writes(config, writes, task_id, task_path), self._loop
            ).result()
        with self._operation("put"):
            self._fence(None)
            super().put_writes(config, writes, task_id, task_path)

    def _operation(self, op: Op) -> Operation:
        return self._engine.telemetry.checkpoint(op, "memory", self._run)

    def _fence(self, checkpoint_id: str | None) -> None:
        if self._lease is None:
            raise RuntimeError("this saver has no lease: it only reads")
        if self._before_write is not None:
            self._before_write(checkpoint_id)
        self._engine.checkpoint_written(self._lease, progress=checkpoint_id is not None)


def _matches(run: Run, query: RunQuery) -> bool:
    return (
        (query.status is None or run.status == query.status)
        and (query.graph is None or run.graph == query.graph)
        and (query.thread_id is None or run.thread_id == query.thread_id)
        and (query.updated_after is None or run.updated_at > query.updated_after)
        and (query.cursor is None or (run.created_at, run.run_id) < query.cursor)
    )
