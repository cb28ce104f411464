"""Runs, logs and checkpoints in one SQLite file, held by one process.

`sqlite:///./sereno.db` keeps every promise when the process dies at any instant;
`?sync=full` also through a loss of power, at one fsync a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import aiosqlite
import structlog
from langgraph.checkpoint.base import BaseCheckpointSaver

from runtime.engines.base import (
    BATCH_BYTES,
    NOT_A_RESULT,
    Checkpointed,
    Statistics,
    Tails,
    Waiting,
    check_claim,
    check_lines,
    check_submit,
    lets_go,
    span_attributes,
    turning_point,
)
from runtime.engines.sqlite.saver import FencedSaver
from runtime.engines.sqlite.writer import Connection, Writer, storage_errors
from runtime.errors import BadSetting, EngineLocked, LeaseLost, StorageFailed, UnknownRun
from runtime.events import STATUS, Event
from runtime.model import Lease, NewRun, Renewal, Run, RunQuery, RunStatus, StoredLine
from telemetry.storage import StorageObserver

__all__ = ["SqliteEngine"]

SCHEMA_VERSION = "1"
#: Bytes written to see whether the store can be: some pages, as a row of a page may always fit.
PROBE_BYTES = 16 * 1024
_COLUMNS = (
    "run_id, thread_id, graph, graph_digest, request, status, epoch, lease_owner, lease_until, "
    "crashes, deadline, cancel_reason, applied, last_seq, terminal, created_at, updated_at, "
    "started_at, ended_at"
)
_SELECT = f"SELECT {_COLUMNS} FROM runs"

_log = structlog.get_logger("runtime")


class SqliteEngine:
    """See `runtime.engines.base.Engine`."""

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.time,
        serde: Any = None,
        wait_lock: bool = False,
        lock: bool = True,
        telemetry: StorageObserver | None = None,
        **_: object,
    ) -> None:
        self._path, self._synchronous = _parse(url)
        # SQLite's own clock is the host's, too.
        self._clock = clock
        self._serde = serde
        self._wait_lock = wait_lock
        self._lock = _FileLock(self._path.with_name(self._path.name + ".lock")) if lock else None
        self._telemetry = telemetry or StorageObserver()
        self._stack = contextlib.AsyncExitStack()
        #: Why the store could not be written when that was last asked.
        self._trouble: str | None = None
        self.log_id = ""
        self.tails = Tails()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            if self._lock is not None:
                await self._lock.acquire(wait=self._wait_lock)
                stack.callback(self._lock.release)
            schema = files(__package__).joinpath("schema.sql").read_text("utf-8")
            self._writer = Writer(
                self._path,
                synchronous=self._synchronous,
                schema=schema,
                telemetry=self._telemetry,
            )
            stack.push_async_callback(self._writer.close)
            try:
                await self._writer.open()
            except sqlite3.Error as exc:
                raise StorageFailed(f"{self._path}: {exc}") from exc
            self.log_id = await self._writer.call(self._adopt)
            self._reader = await self._open_reader(stack)
            # Savers leave statements open between two calls, and may only see each other's past.
            self._saver_reader = await self._open_reader(stack)
            self._saver_lock = asyncio.Lock()
            self._stack = stack.pop_all()
        return self

    async def _open_reader(self, stack: contextlib.AsyncExitStack) -> aiosqlite.Connection:
        reader = await stack.enter_async_context(aiosqlite.connect(self._path))
        await reader.execute_fetchall("PRAGMA query_only=ON")
        return reader

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def _adopt(self, db: Connection) -> str:
        """The holder of the lock voids the leases of those who held it before."""
        db.execute(
            "INSERT OR IGNORE INTO meta VALUES ('log_id', ?), ('schema', ?)",
            (uuid.uuid4().hex, SCHEMA_VERSION),
        )
        columns = {row[1] for row in db.execute("PRAGMA table_info(writes)")}
        if "task_path" not in columns:  # a file of an older saver
            db.execute("ALTER TABLE writes ADD COLUMN task_path TEXT NOT NULL DEFAULT ''")
        meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
        if meta["schema"] != SCHEMA_VERSION:
            raise StorageFailed(
                f"{self._path} has schema {meta['schema']}, this version reads {SCHEMA_VERSION}"
            )
        if self._lock is not None:
            db.execute(
                "UPDATE runs SET lease_until = MIN(lease_until, ?) WHERE terminal IS NULL",
                (self._clock(),),
            )
        self._opened = os.stat(self._path)
        return str(meta["log_id"])

    async def submit(self, new: NewRun, queued: Event) -> Run:
        request = json.dumps(new.request, ensure_ascii=True)

        def insert(db: Connection) -> Run:
            active = db.execute(
                f"{_SELECT} WHERE tenant = 'default' AND thread_id = ? AND terminal IS NULL",
                (new.thread_id,),
            ).fetchone()
            check_submit(new.thread_id, _run(active) if active else None)
            check_lines(new.run_id, 0, 0, [queued])
            # The newest run of a thread is the last one submitted, also when the clock is set back.
            newest = db.execute(
                "SELECT max(created_at) FROM runs WHERE tenant = 'default' AND thread_id = ?",
                (new.thread_id,),
            ).fetchone()[0]
            now = max(self._clock(), (newest or 0.0) + 1e-6)
            db.execute(
                "INSERT INTO runs (run_id, thread_id, graph, graph_digest, request, status, "
                "deadline, last_seq, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    new.run_id,
                    new.thread_id,
                    new.graph,
                    new.graph_digest,
                    request,
                    RunStatus.PENDING,
                    new.deadline,
                    queued.seq,
                    now,
                    now,
                ),
            )
            _insert(db, new.run_id, [queued])
            return Run.pending(new, now=now, last_seq=queued.seq)

        return await self._writer.call(insert, self._publish(new.run_id, [queued]))

    async def get(self, run_id: str) -> Run:
        rows = await self._fetch(f"{_SELECT} WHERE run_id = ?", (run_id,))
        if not rows:
            raise UnknownRun(run_id)
        return _run(rows[0])

    async def search(self, query: RunQuery) -> Sequence[Run]:
        where: dict[str, object] = {
            "status = ?": query.status,
            "graph = ?": query.graph,
            "thread_id = ?": query.thread_id,
            "updated_at > ?": query.updated_after,
        }
        clauses = [clause for clause, value in where.items() if value is not None]
        values: list[object] = [value for value in where.values() if value is not None]
        if query.cursor is not None:
            clauses.append("(created_at, run_id) < (?, ?)")
            values += query.cursor
        condition = f" WHERE {' AND '.join(clauses)}" if clauses else ""
        rows = await self._fetch(
            f"{_SELECT}{condition} ORDER BY created_at DESC, run_id DESC LIMIT ?",
            (*values, query.limit),
        )
        return [_run(row) for row in rows]

    async def position(self, run: Run) -> int:
        rows = await self._fetch(
            "SELECT count(*) FROM runs WHERE status = 'pending' AND (created_at, run_id) < (?, ?)",
            (run.created_at, run.run_id),
        )
        return int(rows[0][0])

    async def claimable(self, limit: int) -> Sequence[Run]:
        rows = await self._fetch(
            f"{_SELECT} WHERE terminal IS NULL AND (lease_owner IS NULL OR lease_until <= ?) "
            "ORDER BY created_at, run_id LIMIT ?",
            (self._clock(), limit),
        )
        return [_run(row) for row in rows]

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
        def take(db: Connection) -> Lease:
            now = self._clock()
            holder = db.execute(
                "SELECT run_id FROM runs WHERE tenant = 'default' AND thread_id = ? "
                "AND terminal IS NULL AND epoch > 0",
                (run.thread_id,),
            ).fetchone()
            check_claim(run, _current(db, run.run_id), holder[0] if holder else None, now)
            check_lines(run.run_id, run.epoch, run.last_seq, [event])
            db.execute(
                "UPDATE runs SET epoch = epoch + 1, lease_owner = ?, lease_until = ?, "
                "crashes = crashes + ?, started_at = coalesce(started_at, ?) WHERE run_id = ?",
                (owner, now + lease_s, int(crashed), now, run.run_id),
            )
            self._write(db, run.run_id, [event])
            for task in forget:
                for table in ("checkpoints", "writes"):
                    db.execute(
                        f"DELETE FROM {table} WHERE thread_id = ? AND instr(checkpoint_ns, ?) > 0",
                        (run.thread_id, f":{task}"),
                    )
            return Lease(
                run_id=run.run_id, thread_id=run.thread_id, epoch=run.epoch + 1, owner=owner
            )

        return await self._writer.call(take, self._publish(run.run_id, [event]))

    def renew(self, leases: Sequence[Lease], lease_s: float) -> dict[str, Renewal]:
        def extend(db: Connection) -> tuple[dict[str, Renewal], int]:
            until = self._clock() + lease_s
            learnt, taken = {}, 0
            for lease in leases:
                held = db.execute(
                    "UPDATE runs SET lease_until = ? WHERE run_id = ? AND epoch = ? "
                    "AND lease_owner = ? RETURNING cancel_reason",
                    (until, lease.run_id, lease.epoch, lease.owner),
                ).fetchone()
                learnt[lease.run_id] = Renewal(
                    held=held is not None, cancel_reason=held[0] if held else None
                )
                if held is None:  # another epoch has it, or the run let go of it
                    later = "SELECT count(*) FROM runs WHERE run_id = ? AND epoch > ?"
                    taken += db.execute(later, (lease.run_id, lease.epoch)).fetchone()[0]
            return learnt, taken

        try:
            learnt, taken = self._writer.call_blocking(extend)
        except StorageFailed:
            self._telemetry.not_renewed(len(leases))
            raise
        if taken:
            self._telemetry.not_renewed(taken)
        return learnt

    def append(self, lease: Lease, events: Sequence[Event]) -> asyncio.Future[None]:
        def add(db: Connection) -> None:
            standing = self._fence(db, lease)
            check_lines(lease.run_id, lease.epoch, standing.last_seq, events)
            self._write(db, lease.run_id, events)

        publish = self._publish(lease.run_id, events)

        def done(error: BaseException | None) -> None:
            publish(error)
            if isinstance(error, LeaseLost):
                self._telemetry.fenced("event", len(events))

        return self._writer.call(add, done)

    async def append_unclaimed(self, run: Run, events: Sequence[Event]) -> Run:
        def add(db: Connection) -> Run:
            check_claim(run, _current(db, run.run_id), None, self._clock())
            check_lines(run.run_id, run.epoch, run.last_seq, events)
            self._write(db, run.run_id, events)
            current = _current(db, run.run_id)
            assert current is not None
            return current

        return await self._writer.call(add, self._publish(run.run_id, events))

    async def request_cancel(self, run_id: str, reason: str) -> Run:
        def wish(db: Connection) -> Run:
            db.execute(
                "UPDATE runs SET cancel_reason = ?, updated_at = ? "
                "WHERE run_id = ? AND terminal IS NULL AND cancel_reason IS NULL",
                (reason, self._clock(), run_id),
            )
            run = _current(db, run_id)
            if run is None:
                raise UnknownRun(run_id)
            return run

        return await self._writer.call(wish)

    async def read(self, run_id: str, after: int, limit: int = 1000) -> Sequence[StoredLine]:
        rows = await self._fetch(
            "SELECT seq, type, body FROM (SELECT seq, type, body, "
            "sum(length(body)) OVER (ORDER BY seq) - length(body) AS before FROM run_events "
            "WHERE run_id = ? AND seq > ? ORDER BY seq LIMIT ?) WHERE before < ?",
            (run_id, after, limit, BATCH_BYTES),
        )
        return [StoredLine(seq=seq, type=type, body=body) for seq, type, body in rows]

    async def data(self, run_id: str, seq: int, member: str) -> bytes | None:
        rows = await self._fetch(
            "SELECT body FROM run_data WHERE run_id = ? AND seq = ? AND member = ?",
            (run_id, seq, member),
        )
        return rows[0][0] if rows else None

    def checkpointer(
        self, lease: Lease | None, *, before_write: Callable[[str | None], None] | None = None
    ) -> BaseCheckpointSaver[Any]:
        def fence(lease: Lease, db: Connection, progress: bool) -> None:
            if self._fence(db, lease).settled:
                return
            db.execute(
                "UPDATE runs SET applied = 1, crashes = CASE WHEN ? THEN 0 ELSE crashes END "
                "WHERE run_id = ?",
                (progress, lease.run_id),
            )
            db.known.pop(lease.run_id)

        return FencedSaver(
            self._saver_reader,
            self._writer,
            lock=self._saver_lock,
            serde=self._serde,
            fence=partial(fence, lease) if lease is not None else None,
            before_write=before_write,
            # A thread that is called after its first run had none before.
            new_thread=lease.thread_id
            if lease is not None and lease.epoch == 1 and lease.thread_id == lease.run_id
            else None,
            telemetry=self._telemetry,
            run=span_attributes(lease),
        )

    async def checkpointed(self, thread_id: str) -> Checkpointed:
        marks = ", ".join("?" * len(NOT_A_RESULT))
        # A result is worth nothing without the checkpoint that it belongs to.
        stored = await self._fetch(
            "SELECT DISTINCT task_id FROM writes "
            "JOIN checkpoints USING (thread_id, checkpoint_ns, checkpoint_id) "
            f"WHERE thread_id = ? AND channel NOT IN ({marks})",
            (thread_id, *NOT_A_RESULT),
        )
        latest = await self._fetch(
            "SELECT checkpoint_ns, max(checkpoint_id), metadata FROM checkpoints "
            "WHERE thread_id = ? GROUP BY checkpoint_ns",
            (thread_id,),
        )
        return Checkpointed(
            {task for (task,) in stored},
            {ns: (newest, json.loads(metadata or "{}")) for ns, newest, metadata in latest},
        )

    async def writable(self) -> bool:
        def touch(db: Connection) -> None:
            self._check_ours()
            now = str(self._clock()).ljust(PROBE_BYTES)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('written_at', ?)", (now,))

        trouble = None
        try:
            await self._writer.call(touch)
        except StorageFailed as exc:
            trouble = str(exc)
        if trouble is not None and trouble != self._trouble:
            _log.warning("Store cannot be written", error=trouble)
        self._trouble = trouble
        return trouble is None

    def _check_ours(self) -> None:
        """What is written shall be found by whoever opens the path next. Raises StorageFailed."""
        try:
            there = os.path.samestat(os.stat(self._path), self._opened)
        except OSError as exc:
            raise StorageFailed(f"{self._path}: {exc.strerror}") from exc
        if not there:
            raise StorageFailed(f"{self._path}: the file was replaced")
        if self._lock is not None:
            self._lock.keep()

    async def statistics(self) -> Statistics:
        ((pending, oldest),) = await self._fetch(
            "SELECT count(*), min(created_at) FROM runs WHERE status = 'pending'", ()
        )
        waiting = await self._fetch(
            "SELECT graph, count(*), min(since) FROM waiting GROUP BY graph", ()
        )
        now = self._clock()
        return Statistics(
            pending=pending,
            oldest_pending_s=now - oldest if oldest is not None else None,
            waiting={
                graph: Waiting(runs=runs, oldest_s=now - since) for graph, runs, since in waiting
            },
        )

    async def sizes(self) -> Mapping[str, int]:
        try:
            return _sizes(self._path)
        except OSError as exc:
            raise StorageFailed(f"{self._path}: {exc.strerror}") from exc

    async def _fetch(self, statement: str, values: Sequence[object]) -> list[Any]:
        try:
            with storage_errors():
                return list(await self._reader.execute_fetchall(statement, values))
        except ValueError as exc:  # the connection is closed
            raise StorageFailed(str(exc)) from exc

    @staticmethod
    def _fence(db: Connection, lease: Lease) -> _Standing:
        """How a run stands, if the lease may write. Raises LeaseLost. See check_append.

        Looked up once a transaction: whatever changes epoch or holder forgets it.
        """
        standing: _Standing | None = db.known.get(lease.run_id)
        if standing is None:
            row = db.execute(
                "SELECT epoch, lease_owner, last_seq, applied AND crashes = 0 FROM runs "
                "WHERE run_id = ?",
                (lease.run_id,),
            ).fetchone()
            standing = db.known[lease.run_id] = _Standing(*row) if row else _NOBODY
        if (standing.epoch, standing.owner) != (lease.epoch, lease.owner):
            raise LeaseLost(lease.run_id, lease.epoch)
        return standing

    def _write(self, db: Connection, run_id: str, events: Sequence[Event]) -> None:
        """Lines and what they make of the row, in one transaction."""
        _insert(db, run_id, events)
        now, last = self._clock(), events[-1].seq
        turn = turning_point(events)
        standing: _Standing | None = db.known.pop(run_id, None)
        if turn is None:
            db.execute(
                "UPDATE runs SET last_seq = ?, updated_at = ? WHERE run_id = ?", (last, now, run_id)
            )
            if standing is not None:
                db.known[run_id] = standing._replace(last_seq=last)
            return
        let_go = lets_go(turn)
        db.execute(
            "UPDATE runs SET last_seq = ?, updated_at = ?, status = ?, terminal = ?, ended_at = ?, "
            "lease_owner = CASE WHEN ? THEN NULL ELSE lease_owner END, "
            "lease_until = CASE WHEN ? THEN NULL ELSE lease_until END WHERE run_id = ?",
            (
                last,
                now,
                STATUS[turn.type],
                turn.seq if turn.terminal else None,
                now if turn.terminal else None,
                let_go,
                let_go,
                run_id,
            ),
        )

    def _publish(
        self, run_id: str, events: Sequence[Event]
    ) -> Callable[[BaseException | None], None]:
        def done(error: BaseException | None) -> None:
            if error is None:
                self.tails.publish(run_id, events)

        return done


class _Standing(NamedTuple):
    """What the fence needs of a row."""

    epoch: int
    owner: str | None
    last_seq: int
    #: Whether a checkpoint write has nothing to add to the row.
    settled: int


_NOBODY = _Standing(-1, None, 0, 0)


class _FileLock:
    """An exclusive lock of the operating system, let go when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    async def acquire(self, *, wait: bool) -> None:
        """Raises EngineLocked when another process has it and `wait` is off."""
        file = self._open()
        try:
            while not self._take(file):
                if _locked(file):  # a file without a name: the holder has made another one
                    file, old = self._open(), file
                    os.close(old)
                    continue
                if not wait:
                    raise EngineLocked(
                        f"{self._path}: process {self._holder() or '?'} owns this store; stop it, "
                        "use another SERENO_ENGINE, or start with --wait-lock"
                    )
                await asyncio.sleep(0.1)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        os.register_at_fork(after_in_child=self.release)  # a child would hold it on

    def keep(self) -> None:
        """Take the lock again if its file was removed: the next opener would make a new one.

        Raises StorageFailed when that has happened.
        """
        assert self._file is not None
        if self._named(self._file):
            return
        file = self._open()
        try:
            if not self._take(file):
                raise StorageFailed(f"{self._path}: process {self._holder()} has taken this store")
        except BaseException:
            os.close(file)
            raise
        os.close(self._file)
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as exc:
            raise StorageFailed(f"{self._path}: {exc.strerror}") from exc

    def _take(self, file: int) -> bool:
        """Whether the file is locked by us now and has its name; our process id is in it then."""
        try:
            if not (_locked(file) and self._named(file)):
                return False
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            raise StorageFailed(f"{self._path}: {exc.strerror}") from exc
        return True

    def _named(self, file: int) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._path.read_text("ascii", "replace").strip()[:32]
        return ""


def _locked(file: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of the files; to ask takes no time, as they are open."""
    wal = path.with_name(path.name + "-wal")
    return {
        "db": path.stat().st_size,
        "wal": wal.stat().st_size if wal.exists() else 0,
    }


def _parse(url: str) -> tuple[Path, str]:
    parts = urlsplit(url)
    path = parts.path.removeprefix("/")
    if parts.netloc or parts.fragment or not path or path == ":memory:":
        raise BadSetting(
            f"SERENO_ENGINE: {url!r} has no path; use sqlite:///./relative.db or "
            "sqlite:////absolute.db"
        )
    query = parse_qs(parts.query, keep_blank_values=True)
    synchronous = query.pop("sync", ["normal"])[-1]
    if synchronous not in ("normal", "full") or query:
        raise BadSetting(f"SERENO_ENGINE: {url!r}: only ?sync=normal and ?sync=full are known")
    return Path(path).resolve(), synchronous


def _insert(db: Connection, run_id: str, events: Sequence[Event]) -> None:
    db.executemany(
        "INSERT INTO run_events VALUES (?, ?, ?, ?, ?, ?)",
        [(run_id, e.seq, e.epoch, e.type, e.ts, e.body) for e in events],
    )
    for event in events:
        for member, value in event.data:
            db.execute(
                "INSERT INTO run_data VALUES (?, ?, ?, ?)", (run_id, event.seq, member, value)
            )


def _current(db: Connection, run_id: str) -> Run | None:
    row = db.execute(f"{_SELECT} WHERE run_id = ?", (run_id,)).fetchone()
    return _run(row) if row else None


def _run(row: Sequence[Any]) -> Run:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    values["request"] = json.loads(values["request"])
    values["status"] = RunStatus(values["status"])
    values["applied"] = bool(values["applied"])
    return Run(**values)
