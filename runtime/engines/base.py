"""The narrow waist: what an engine promises, and the decisions that every engine takes alike.

An engine queues runs, gives leases, keeps logs and checkpoints; it knows no HTTP and no nodes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from langgraph.checkpoint.base import WRITES_IDX_MAP, BaseCheckpointSaver

from runtime.errors import CursorAhead, LeaseLost, ThreadBusy
from runtime.events import STATUS, TERMINAL_TYPES, Event
from runtime.model import Lease, NewRun, Renewal, Run, RunQuery, StoredLine

__all__ = [
    "Checkpointed",
    "Engine",
    "Statistics",
    "Tails",
    "Waiting",
    "check_append",
    "check_claim",
    "check_cursor",
    "check_lines",
    "check_submit",
    "follow",
    "lets_go",
    "span_attributes",
    "turning_point",
    "void",
]

#: Channels of a task's stored writes that are not its result.
NOT_A_RESULT = tuple(WRITES_IDX_MAP)
#: Types of lines that give their epoch's lease back.
LETTING_GO = frozenset((*TERMINAL_TYPES, "run.requeued"))
#: Lines, and their bytes, that a tail keeps for its watchers; older ones are read from the log.
RING = 1024
RING_BYTES = 16 * 1024 * 1024
#: Lines that a watcher is given at a time.
BATCH = 256
#: A batch ends with the line that reaches this size.
BATCH_BYTES = 1024 * 1024


class Engine(Protocol):
    """Queue, leases, event log and checkpoints of runs. An async context manager.

    Every method may raise StorageFailed. Times are unix seconds by the store's clock.
    """

    #: Names the log: a client that sends it back learns when the log is another one.
    log_id: str
    tails: Tails

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def submit(self, new: NewRun, queued: Event) -> Run:
        """Insert a pending run with its first line, committed. Raises ThreadBusy."""
        ...

    async def get(self, run_id: str) -> Run:
        """Raises UnknownRun."""
        ...

    async def search(self, query: RunQuery) -> Sequence[Run]:
        """Runs, newest first."""
        ...

    async def position(self, run: Run) -> int:
        """How many pending runs are older than this one."""
        ...

    async def claimable(self, limit: int) -> Sequence[Run]:
        """Runs without a terminal line and without a valid lease, oldest first."""
        ...

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
        """Take a run as it was read: raises its epoch and appends its first line of that epoch.

        Checkpoints of the graphs that the tasks in `forget` called are dropped.

        `crashed` counts a crash. Raises LeaseLost when the run has moved on, ThreadBusy when
        another claimed run has the thread.
        """
        ...

    def renew(self, leases: Sequence[Lease], lease_s: float) -> dict[str, Renewal]:
        """Extend leases; run id → what was learnt. Blocks; for a thread, never for the loop."""
        ...

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        """Add lines, and with the last status-changing one the run's status, in one transaction.

        Returns at once; the future is done when they are committed. Lines leave in the order of
        the calls. Fails with LeaseLost when the lease's epoch is not the run's any more, or has
        given it back.
        """
        ...

    async def append_unclaimed(self, run: Run, events: Sequence[Event]) -> Run:
        """Add lines to a run that nobody executes, as it was read. Raises LeaseLost."""
        ...

    async def request_cancel(self, run_id: str, reason: str) -> Run:
        """Store the wish; the first reason stays. The run as it is now."""
        ...

    async def read(self, run_id: str, after: int, limit: int = 1000) -> Sequence[StoredLine]:
        """Committed lines with seq > after, in order, `limit` at most."""
        ...

    async def data(self, run_id: str, seq: int, member: str) -> bytes | None:
        """A member that was too large for its line, encoded; None when there is none."""
        ...

    def checkpointer(
        self, lease: Lease | None, *, before_write: Callable[[str | None], None] | None = None
    ) -> BaseCheckpointSaver[Any]:
        """A LangGraph saver whose writes are fenced by the lease; without one it only reads.

        A write raises LeaseLost when the lease is lost, RuntimeError when there is none.

        `before_write(checkpoint_id)` is called before each write is posted, so that lines go
        first; the id is that of a new checkpoint of the root graph, None for any other write.
        """
        ...

    async def checkpointed(self, thread_id: str) -> Checkpointed:
        """What the checkpoints of a thread hold, to tell what must run again."""
        ...

    async def writable(self) -> bool:
        """Whether the store takes a write of some pages right now, and is still ours."""
        ...

    async def statistics(self) -> Statistics:
        """Who waits. Cheap, however many runs have ended."""
        ...

    async def sizes(self) -> Mapping[str, int]:
        """Bytes of each part of the store; none when it is not stored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Runs that were interrupted and are the last of their thread: nobody has answered yet."""

    runs: int
    #: Seconds since the first of these interrupts.
    oldest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Who waits right now: for a slot, or for a human."""

    pending: int
    #: Seconds since the oldest of them was submitted; None without any.
    oldest_pending_s: float | None = None
    #: For a human, by graph.
    waiting: Mapping[str, Waiting] = field(default_factory=dict)


class Checkpointed:
    """What the checkpoints of a thread hold."""

    def __init__(
        self, stored: set[str], latest: Mapping[str, tuple[str, Mapping[str, Any]]]
    ) -> None:
        #: Task ids with a stored result.
        self.stored = stored
        #: Checkpoint namespace → the step of its latest checkpoint.
        self.steps = {ns: int(metadata.get("step", -2)) for ns, (_, metadata) in latest.items()}
        root = latest.get("")
        #: The root graph's latest checkpoint, and the run that wrote it.
        self.checkpoint_id = root[0] if root else None
        self.run_id = root[1].get("sereno_run") if root else None


# Decisions: taken on a row, without I/O.


def check_submit(thread_id: str, active: Run | None) -> None:
    """Multitask `reject`: any run without a terminal line has the thread."""
    if active is not None:
        raise ThreadBusy(thread_id, active.run_id)


def void(run: Run, now: float) -> bool:
    """Whether nobody may write for this run now."""
    return run.lease_owner is None or run.lease_until is None or run.lease_until <= now


def check_claim(seen: Run, current: Run | None, holder: str | None, now: float) -> None:
    """A claim is for a run as it was read, and only when no other run has its thread."""
    if (
        current is None
        or current.terminal is not None
        or current.epoch != seen.epoch
        or current.last_seq != seen.last_seq
        or not void(current, now)
    ):
        raise LeaseLost(seen.run_id, seen.epoch)
    if holder is not None and holder != seen.run_id:
        raise ThreadBusy(seen.thread_id, holder)


def check_append(run: Run | None, lease: Lease) -> None:
    """The fence: only the current epoch writes, until its run has ended or was given back."""
    if run is None or run.epoch != lease.epoch or run.lease_owner != lease.owner:
        raise LeaseLost(lease.run_id, lease.epoch)


def check_lines(run_id: str, epoch: int, last_seq: int, events: Sequence[Event]) -> None:
    """Lines go on where the log ends, without a gap, and nothing follows what lets go."""
    for seq, event in enumerate(events, last_seq + 1):
        if event.seq != seq or (lets_go(event) and event is not events[-1]):
            raise LeaseLost(run_id, epoch)


def lets_go(event: Event) -> bool:
    """Whether a line gives its epoch's lease back."""
    return event.type in LETTING_GO


def turning_point(events: Iterable[Event]) -> Event | None:
    """The last line that changes the status."""
    last = None
    for event in events:
        if event.type in STATUS:
            last = event
    return last


# Reading: one tail per run, many watchers.


class Tail:
    """What was committed last for one run, and who waits for more."""

    __slots__ = ("calls", "last", "lines", "living", "size", "waiters", "watchers")

    def __init__(self) -> None:
        self.lines: deque[StoredLine] = deque()
        #: Bytes of `lines`.
        self.size = 0
        #: The seq of the last committed line, 0 before the first one is seen.
        self.last = 0
        #: How often the watchers were called to look around.
        self.calls = 0
        self.watchers = 0
        #: Whether its run began here and has not ended.
        self.living = False
        self.waiters: set[asyncio.Future[None]] = set()

    def add(self, line: StoredLine) -> None:
        """Keep a committed line, and let the oldest go."""
        if line.seq != self.last + 1:  # another engine wrote in between
            self.lines.clear()
            self.size = 0
        self.lines.append(line)
        self.size += len(line.body)
        self.last = line.seq
        while len(self.lines) > RING or self.size > RING_BYTES:
            self.size -= len(self.lines.popleft().body)

    def after(self, seq: int) -> Sequence[StoredLine] | None:
        """A batch of the lines after `seq`; None when only the log can tell."""
        lines = self.lines
        if not lines or lines[0].seq > seq + 1:
            return None
        start = len(lines) - (self.last - seq)
        batch: list[StoredLine] = []
        size = 0
        for i in range(start, min(len(lines), start + BATCH)):
            if size >= BATCH_BYTES:
                break
            batch.append(lines[i])
            size += len(lines[i].body)
        return batch

    async def changed(self, seq: int, calls: int, timeout: float | None) -> None:
        """Wait for a line after `seq`, for a call after the first `calls`, or `timeout` seconds."""
        if self.last > seq or self.calls > calls:
            return
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.add(waiter)
        try:
            await asyncio.wait((waiter,), timeout=timeout)
        finally:
            self.waiters.discard(waiter)

    def wake(self) -> None:
        """Let those go on who wait."""
        waiters, self.waiters = self.waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Tails:
    """The tails of one process, by run. Used from the event loop only."""

    def __init__(self) -> None:
        self._tails: dict[str, Tail] = {}

    def publish(self, run_id: str, events: Sequence[Event]) -> None:
        """Committed lines for those who watch.

        A run that began here is followed from its first line to its last, so that who asked for it
        need not read the log. Another one that nobody watches costs nothing.
        """
        tail = self._tails.get(run_id)
        if tail is None:
            if events[0].seq != 1:
                return
            tail = self._tails[run_id] = Tail()
            tail.living = True
        for event in events:
            tail.add(StoredLine(event.seq, event.type, event.body))
        if events[-1].terminal:
            tail.living = False
            self._let_go(run_id, tail)
        tail.wake()

    def wake(self) -> None:
        """Let every watcher look around: the server shuts down."""
        for tail in list(self._tails.values()):
            tail.calls += 1
            tail.wake()

    @contextmanager
    def watch(self, run_id: str) -> Iterator[Tail]:
        """The run's tail, kept as long as somebody watches."""
        tail = self._tails.setdefault(run_id, Tail())
        tail.watchers += 1
        try:
            yield tail
        finally:
            tail.watchers -= 1
            self._let_go(run_id, tail)

    def watched(self, run_id: str) -> bool:
        """Whether anybody watches; for any thread."""
        tail = self._tails.get(run_id)
        return tail is not None and tail.watchers > 0

    def _let_go(self, run_id: str, tail: Tail) -> None:
        if not tail.watchers and not tail.living:
            del self._tails[run_id]


async def follow(
    engine: Engine, run_id: str, after: int, *, tick: float | None = None
) -> AsyncGenerator[Sequence[StoredLine], None]:
    """Batches of committed lines from `after` on: replay and live are one path.

    Yields an empty batch when it has caught up, and again after every `tick` seconds of silence.
    Ends after the terminal line. A watcher that falls off the ring reads on from the log.
    Raises UnknownRun.
    """
    with engine.tails.watch(run_id) as tail:
        known = tail.living
        while True:
            calls = tail.calls
            batch = tail.after(after)
            if batch is None:
                batch = await engine.read(run_id, after, BATCH)
            if batch:
                after = batch[-1].seq
                yield batch
                if batch[-1].type in TERMINAL_TYPES:
                    return
            elif tail.last <= after:
                if not known:  # perhaps the cursor is that of the terminal line
                    known = True
                    terminal = (await engine.get(run_id)).terminal
                    if terminal is not None and terminal <= after:
                        return
                yield ()
                await tail.changed(after, calls, tick)


def span_attributes(lease: Lease | None) -> Mapping[str, Any]:
    """What a span says of the run that it belongs to."""
    if lease is None:
        return {}
    return {
        "sereno.run.id": lease.run_id,
        "sereno.thread.id": lease.thread_id,
        "sereno.run.epoch": lease.epoch,
    }


def check_cursor(after: int, last_seq: int) -> None:
    """A cursor is a seq that has been seen. Raises CursorAhead."""
    if after > last_seq:
        raise CursorAhead(after, last_seq)
