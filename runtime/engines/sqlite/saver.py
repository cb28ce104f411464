"""LangGraph's SQLite saver, with its writes going through the one writer and fenced by a lease."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiosqlite
from langgraph.checkpoint.base import WRITES_IDX_MAP, CheckpointTuple, get_checkpoint_metadata
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from runtime.engines.sqlite.writer import Connection, Writer, storage_errors
from telemetry.storage import Op, Operation, StorageObserver

__all__ = ["Fence", "FencedSaver"]

Fence = Callable[[sqlite3.Connection, bool], None]

_PUT = """
INSERT OR REPLACE INTO checkpoints
    (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_PUT_WRITES = """
INSERT OR {how} INTO writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, value)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


class FencedSaver(AsyncSqliteSaver):
    """Reads are the library's; what it writes, it posts.

    `fence(db, progress)` is called in the transaction of each write and raises LeaseLost;
    `progress` says that this is a new checkpoint of the root graph. Without it nothing is written.

    `lock` belongs to the connection: while a statement is open, all others on it see the database
    as it was when that one began.

    `run` is what the spans of its operations say of the run.
    """

    def __init__(
        self,
        conn: aiosqlite.Connection,
        writer: Writer,
        *,
        lock: asyncio.Lock,
        serde: Any = None,
        fence: Fence | None = None,
        before_write: Callable[[str | None], None] | None = None,
        new_thread: str | None = None,
        telemetry: StorageObserver | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(conn, serde=serde)
        self.is_setup = True  # the engine's schema has the tables
        self.lock = lock
        self._writer = writer
        self._fence = fence
        self._before_write = before_write
        self._posted = _Posted()
        #: A thread that holds nothing but what this saver writes.
        self._new_thread = new_thread
        self._telemetry = telemetry or StorageObserver()
        self._run = run or {}

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        with self._operation("put") as operation:
            return await self._put(operation, config, checkpoint, metadata)

    async def _put(self, operation: Operation, config: Any, checkpoint: Any, metadata: Any) -> Any:
        place = config["configurable"]
        kind, blob = self.serde.dumps_typed(checkpoint)
        described = json.dumps(get_checkpoint_metadata(config, metadata), ensure_ascii=False)
        row = (
            str(place["thread_id"]),
            place["checkpoint_ns"],
            checkpoint["id"],
            place.get("checkpoint_id"),
            kind,
            blob,
            described.encode("utf-8", "ignore"),
        )
        progress = not place["checkpoint_ns"]
        fence = self._allowed(checkpoint["id"] if progress else None)

        def put(db: Connection) -> None:
            fence(db, progress)
            db.execute(_PUT, row)

        operation.posted = True
        await self._writer.call(put, operation.end)
        return {
            "configurable": {
                "thread_id": place["thread_id"],
                "checkpoint_ns": place["checkpoint_ns"],
                "checkpoint_id": checkpoint["id"],
            }
        }

    async def aput_writes(
        self, config: Any, writes: Any, task_id: str, task_path: str = ""
    ) -> None:
        """Does not wait for its commit: the next `aput` commits after it."""
        with self._operation("put") as operation:
            self._put_writes(operation, config, writes, task_id, task_path)

    def _put_writes(
        self, operation: Operation, config: Any, writes: Any, task_id: str, task_path: str
    ) -> None:
        place = config["configurable"]
        how = "REPLACE" if all(channel in WRITES_IDX_MAP for channel, _ in writes) else "IGNORE"
        statement = _PUT_WRITES.format(how=how)
        rows = [
            (
                str(place["thread_id"]),
                str(place["checkpoint_ns"]),
                str(place["checkpoint_id"]),
                task_id,
                task_path,
                WRITES_IDX_MAP.get(channel, index),
                channel,
                *self.serde.dumps_typed(value),
            )
            for index, (channel, value) in enumerate(writes)
        ]
        fence = self._allowed(None)

        def put(db: Connection) -> None:
            fence(db, False)
            db.executemany(statement, rows)

        def written(error: BaseException | None) -> None:
            self._posted.written(error)
            operation.end(error)

        self._posted.count += 1
        operation.posted = True
        self._writer.post(put, written)

    async def adelete_thread(self, thread_id: str) -> None:
        def delete(db: Connection) -> None:
            for table in ("checkpoints", "writes"):
                db.execute(f"DELETE FROM {table} WHERE thread_id = ?", (str(thread_id),))

        await self._writer.call(delete)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        if not self._posted.ever and config["configurable"]["thread_id"] == self._new_thread:
            return None
        with self._operation("get"), storage_errors():
            await self._settle()
            return await super().aget_tuple(config)

    async def alist(
        self, config: Any, *, filter: Any = None, before: Any = None, limit: int | None = None
    ) -> AsyncIterator[CheckpointTuple]:
        found = super().alist(config, filter=filter, before=before, limit=limit)
        with self._operation("list"), storage_errors():
            await self._settle()
            items = [item async for item in found]  # the lock is not held while others think
        for item in items:
            yield item

    async def aget_delta_channel_history(self, *, config: Any, channels: Any) -> Any:
        with self._operation("get"), storage_errors():
            await self._settle()
            return await super().aget_delta_channel_history(config=config, channels=channels)

    def _operation(self, op: Op) -> Operation:
        return self._telemetry.checkpoint(op, "sqlite", self._run)

    def _allowed(self, checkpoint_id: str | None) -> Fence:
        """The fence of a write that may be posted now: of a checkpoint of the root graph, or of
        anything else."""
        if self._fence is None:
            raise RuntimeError("this saver has no lease: it only reads")
        if self._before_write is not None:
            self._before_write(checkpoint_id)
        if self._posted.failure is not None:
            raise self._posted.failure
        self._posted.ever = True
        return self._fence

    async def _settle(self) -> None:
        """A read sees what was posted before it, or fails as that did."""
        if self._posted.count:
            await self._writer.call(_nothing)
        if self._posted.failure is not None:
            raise self._posted.failure


class _Posted:
    """Writes that nobody waited for. LangGraph copies savers: all copies share this."""

    def __init__(self) -> None:
        self.count = 0
        self.ever = False
        self.failure: BaseException | None = None

    def written(self, error: BaseException | None) -> None:
        self.count -= 1
        if error is not None:
            self.failure = error


def _nothing(db: Connection) -> None:
    return None
