"""LangGraph's SQLite saver, with its writes going through the one writer and fenced by a lease."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiosqlite
from langgraph.checkpoint.base import WRITES_IDX_MAP, CheckpointTuple, get_checkpoint_metadata
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from runtime.engines.sqlite.writer import Connection, Writer, storage_errors

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
    """

    def __init__(
        self,
        conn: aiosqlite.Connection,
        writer: Writer,
        *,
        lock: asyncio.Lock,
        serde: Any = None,
        fence: Fence | None = None,
        before_write: Callable[[bool], None] | None = None,
        new_thread: str | None = None,
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

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
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
        fence = self._allowed(progress)

        def put(db: Connection) -> None:
            fence(db, progress)
            db.execute(_PUT, row)

        await self._writer.call(put)
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
        fence = self._allowed(False)

        def put(db: Connection) -> None:
            fence(db, False)
            db.executemany(statement, rows)

        self._posted.count += 1
        self._writer.post(put, self._posted.written)

    async def adelete_thread(self, thread_id: str) -> None:
        def delete(db: Connection) -> None:
            for table in ("checkpoints", "writes"):
                db.execute(f"DELETE FROM {table} WHERE thread_id = ?", (str(thread_id),))

        await self._writer.call(delete)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        if not self._posted.ever and config["configurable"]["thread_id"] == self._new_thread:
            return None
        await self._settle()
        with storage_errors():
            return await super().aget_tuple(config)

    async def alist(
        self, config: Any, *, filter: Any = None, before: Any = None, limit: int | None = None
    ) -> AsyncIterator[CheckpointTuple]:
        await self._settle()
        found = super().alist(config, filter=filter, before=before, limit=limit)
        with storage_errors():
            items = [item async for item in found]  # the lock is not held while others think
        for item in items:
            yield item

    async def aget_delta_channel_history(self, *, config: Any, channels: Any) -> Any:
        await self._settle()
        with storage_errors():
            return await super().aget_delta_channel_history(config=config, channels=channels)

    def _allowed(self, progress: bool) -> Fence:
        """The fence of a write that may be posted now."""
        if self._fence is None:
            raise RuntimeError("this saver has no lease: it only reads")
        if self._before_write is not None:
            self._before_write(progress)
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
