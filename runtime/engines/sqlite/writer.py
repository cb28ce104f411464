"""One thread owns the file: what is posted to it leaves in order, in batched transactions."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future as ThreadFuture
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import SerenoError, StorageFailed
from telemetry.storage import StorageObserver

__all__ = ["Connection", "Writer", "storage_errors"]

T = TypeVar("T")


class Connection(sqlite3.Connection):
    """The connection that writes, and what is known within its current transaction."""

    #: For whoever wants to look up a thing once; empty when a transaction begins.
    known: dict[str, Any]


Operation = Callable[[Connection], T]

#: Operations of one transaction at most.
BATCH = 256
#: Seconds to wait for another process that holds the database.
BUSY_S = 10.0


class _Posted:
    """An operation, and who is told of its result."""

    __slots__ = ("done", "error", "future", "loop", "operation", "result", "since")

    def __init__(
        self,
        operation: Operation[Any],
        loop: asyncio.AbstractEventLoop | None,
        future: asyncio.Future[Any] | ThreadFuture[Any] | None,
        done: Callable[[BaseException | None], None] | None,
    ) -> None:
        self.operation = operation
        self.loop = loop
        self.future = future
        self.done = done
        self.result: Any = None
        self.error: BaseException | None = None
        self.since = time.perf_counter()


class Writer(threading.Thread):
    """First in, first out. An operation that fails fails alone, never its batch.

    An operation is called with the connection inside a transaction. It raises a SerenoError only
    before its first change; whatever else it raises undoes its changes. It may be called twice.
    """

    def __init__(
        self,
        path: Path,
        *,
        synchronous: str,
        schema: str,
        telemetry: StorageObserver | None = None,
    ) -> None:
        super().__init__(name="sereno-writer", daemon=True)
        self._path = path
        self._synchronous = synchronous
        self._schema = schema
        self._telemetry = telemetry or StorageObserver()
        self._inbox: queue.SimpleQueue[list[_Posted] | None] = queue.SimpleQueue()
        #: Posted in this turn of the loop.
        self._outbox: list[_Posted] = []
        self._gate = threading.Lock()
        self._closed = False
        self._opened: ThreadFuture[None] = ThreadFuture()
        self._ended: ThreadFuture[None] = ThreadFuture()
        for future in (self._opened, self._ended):
            future.set_running_or_notify_cancel()  # who waits may be cancelled, they may not

    async def open(self) -> None:
        """Start the thread and wait until the schema is there. Raises sqlite3.Error."""
        self.start()
        await asyncio.wrap_future(self._opened)

    def call(
        self,
        operation: Operation[T],
        done: Callable[[BaseException | None], None] | None = None,
    ) -> asyncio.Future[T]:
        """Post an operation; the future has its result once it is committed.

        `done` is called on the loop just before, in the order of commits.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._gather(loop, _Posted(operation, loop, future, done))
        return future

    def post(self, operation: Operation[Any], done: Callable[[BaseException | None], None]) -> None:
        """Post an operation that nobody waits for: what is posted later commits later."""
        loop = asyncio.get_running_loop()
        self._gather(loop, _Posted(operation, loop, None, done))

    def call_blocking(self, operation: Operation[T]) -> T:
        """For threads: wait until the operation is committed."""
        future: ThreadFuture[T] = ThreadFuture()
        self._put([_Posted(operation, None, future, None)])
        return future.result()

    async def close(self) -> None:
        """Commit what was posted, and end the thread. What is posted later fails."""
        with self._gate:
            self._closed = True
            self._inbox.put(None)
        if self.ident is not None:
            await asyncio.wrap_future(self._ended)
            self.join()

    def _gather(self, loop: asyncio.AbstractEventLoop, posted: _Posted) -> None:
        """One hand-over per turn of the loop: to wake the thread costs more than a row."""
        self._outbox.append(posted)
        if len(self._outbox) == 1:
            loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._put(outbox)

    def _put(self, posted: list[_Posted]) -> None:
        with self._gate:
            if not self._closed:
                self._inbox.put(posted)
                return
        for late in posted:
            late.error = StorageFailed("it is closed")
        _deliver(posted)

    def run(self) -> None:
        try:
            with contextlib.closing(self._connect()) as db:
                self._opened.set_result(None)
                last = False
                while not last:
                    batch, last = self._take()
                    self._commit(db, batch)
                    if batch:
                        self._telemetry.committed(
                            time.perf_counter() - batch[0].since, failed=any(map(_broke, batch))
                        )
                    _deliver(batch)
        except BaseException as exc:
            if self._opened.done():
                raise
            self._opened.set_exception(exc)
        finally:
            self._ended.set_result(None)

    def _connect(self) -> Connection:
        db = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_S, factory=Connection)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={self._synchronous}")
            db.executescript(self._schema)
        except BaseException:
            db.close()
            raise
        return db

    def _take(self) -> tuple[list[_Posted], bool]:
        """What has been posted, and whether it was the last."""
        batch: list[_Posted] = []
        posted = self._inbox.get()
        with contextlib.suppress(queue.Empty):
            while posted is not None:
                batch.extend(posted)
                if len(batch) >= BATCH:
                    return batch, False
                posted = self._inbox.get_nowait()
            return batch, True
        return batch, False

    def _commit(self, db: Connection, batch: list[_Posted]) -> None:
        """All in one transaction; when one of them breaks it, each in its own."""
        if batch and not self._try(db, batch) and len(batch) > 1:
            for posted in batch:
                self._try(db, [posted])

    @staticmethod
    def _try(db: Connection, batch: list[_Posted]) -> bool:
        """One transaction. Whether it is done with: False when one of the operations broke it."""
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as exc:  # whoever tries next would wait as long
            for posted in batch:
                posted.error = StorageFailed(str(exc))
            return True
        db.known = {}
        try:
            for posted in batch:
                posted.error = None
                try:
                    posted.result = posted.operation(db)
                except SerenoError as exc:
                    posted.error = exc
            db.execute("COMMIT")
        except Exception as exc:
            error: BaseException = exc
            if isinstance(exc, sqlite3.Error):
                error = StorageFailed(str(exc))
                error.__cause__ = exc
            for posted in batch:
                posted.error = error
            if db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            return False
        return True


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as exc:
        raise StorageFailed(str(exc)) from exc


def _broke(posted: _Posted) -> bool:
    """Whether an operation failed: one that was refused did what it is for."""
    error = posted.error
    return error is not None and (
        isinstance(error, StorageFailed) or not isinstance(error, SerenoError)
    )


def _deliver(batch: list[_Posted]) -> None:
    """One wake-up per loop and batch: futures and wake-ups cost more than rows."""
    loops: dict[asyncio.AbstractEventLoop, list[_Posted]] = {}
    for posted in batch:
        if posted.loop is not None:
            loops.setdefault(posted.loop, []).append(posted)
        elif isinstance(posted.future, ThreadFuture):
            if posted.error is not None:
                posted.future.set_exception(posted.error)
            else:
                posted.future.set_result(posted.result)
    for loop, mine in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, mine)


def _resolve(batch: list[_Posted]) -> None:
    for posted in batch:
        if posted.done is not None:
            posted.done(posted.error)
        future = posted.future
        if isinstance(future, asyncio.Future) and not future.done():
            if posted.error is not None:
                future.set_exception(posted.error)
            else:
                future.set_result(posted.result)
