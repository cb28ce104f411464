"""One thread owns the file: what is posted to it leaves in order, in batched transactions."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import SerenoError, StorageFailed

__all__ = ["Writer"]

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

#: Operations of one transaction at most.
BATCH = 256


class _Posted:
    """An operation, and who is told of its result."""

    __slots__ = ("done", "error", "future", "loop", "operation", "result")

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


class Writer(threading.Thread):
    """First in, first out. An operation that fails fails alone, never its batch.

    An operation is called with the connection inside a transaction. It raises a SerenoError only
    before its first change; whatever else it raises undoes its changes. It may be called twice.
    """

    def __init__(self, path: Path, *, synchronous: str, schema: str) -> None:
        super().__init__(name="sereno-writer", daemon=True)
        self._path = path
        self._synchronous = synchronous
        self._schema = schema
        self._inbox: queue.SimpleQueue[_Posted | None] = queue.SimpleQueue()
        self._opened: ThreadFuture[None] = ThreadFuture()

    def open(self) -> None:
        """Start the thread and wait until the schema is there. Raises sqlite3.Error."""
        self.start()
        self._opened.result()

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
        self._inbox.put(_Posted(operation, loop, future, done))
        return future

    def post(self, operation: Operation[Any], done: Callable[[BaseException | None], None]) -> None:
        """Post an operation that nobody waits for: what is posted later commits later."""
        self._inbox.put(_Posted(operation, asyncio.get_running_loop(), None, done))

    def call_blocking(self, operation: Operation[T]) -> T:
        """For threads: wait until the operation is committed."""
        future: ThreadFuture[T] = ThreadFuture()
        self._inbox.put(_Posted(operation, None, future, None))
        return future.result()

    def close(self) -> None:
        """Commit what was posted, and end the thread."""
        self._inbox.put(None)
        self.join()

    def run(self) -> None:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, timeout=10)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={self._synchronous}")
            db.executescript(self._schema)
        except BaseException as exc:
            self._opened.set_exception(exc)
            return
        self._opened.set_result(None)
        with contextlib.closing(db):
            while (first := self._inbox.get()) is not None:
                batch, last = [first], False
                with contextlib.suppress(queue.Empty):
                    while len(batch) < BATCH:
                        posted = self._inbox.get_nowait()
                        if posted is None:
                            last = True
                            break
                        batch.append(posted)
                self._commit(db, batch)
                _deliver(batch)
                if last:
                    return

    def _commit(self, db: sqlite3.Connection, batch: list[_Posted]) -> None:
        """All in one transaction; when one of them breaks it, each in its own."""
        if not self._try(db, batch) and len(batch) > 1:
            for posted in batch:
                self._try(db, [posted])

    @staticmethod
    def _try(db: sqlite3.Connection, batch: list[_Posted]) -> bool:
        try:
            db.execute("BEGIN IMMEDIATE")
            for posted in batch:
                posted.error = None
                try:
                    posted.result = posted.operation(db)
                except SerenoError as exc:
                    posted.error = exc
            db.execute("COMMIT")
        except Exception as exc:
            error = StorageFailed(str(exc)) if isinstance(exc, sqlite3.Error) else exc
            for posted in batch:
                posted.error = error
            if db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            return False
        return True


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
