"""What only the SQLite engine promises: one file, one holder, and a disk that may fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiosqlite
import engine_kit as kit
import pytest
from engine_kit import LEASE_S, Clock, claim, claimed, line, log_of, submitted
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import use_span
from structlog.testing import capture_logs

from runtime.engines.base import Waiting
from runtime.engines.sqlite import engine as sqlite_engine
from runtime.engines.sqlite import writer as sqlite_writer
from runtime.engines.sqlite.engine import SqliteEngine
from runtime.errors import BadSetting, EngineLocked, LeaseLost, StorageFailed, ThreadBusy
from runtime.model import RunStatus
from telemetry.metrics import Metrics
from telemetry.storage import StorageTelemetry
from telemetry.tracing import Tracing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sereno.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@contextlib.contextmanager
def busy(engine: SqliteEngine) -> Iterator[None]:
    """The writer is busy, so that what is posted meanwhile becomes one batch."""
    free = threading.Event()
    engine._writer.call(lambda db: free.wait(10))
    try:
        yield
    finally:
        free.set()


async def pragma(engine: SqliteEngine, statement: str) -> Any:
    return await engine._writer.call(lambda db: db.execute(f"PRAGMA {statement}").fetchone())


class TestLock:
    async def test_a_second_opener_learns_who_has_the_file(self, url: str, path: Path) -> None:
        async with SqliteEngine(url):
            with pytest.raises(EngineLocked) as locked:
                await SqliteEngine(url).__aenter__()

        assert str(os.getpid()) in str(locked.value)
        assert f"{path}.lock" in str(locked.value)
        assert "--wait-lock" in str(locked.value)

    async def test_another_name_of_the_file_is_the_same_file(self, url: str, path: Path) -> None:
        other = path.with_name("other.db")
        async with SqliteEngine(url):
            other.symlink_to(path)
            with pytest.raises(EngineLocked):
                await SqliteEngine(f"sqlite:///{other}").__aenter__()

    async def test_who_waits_gets_it_when_the_first_lets_go(self, url: str) -> None:
        first = await SqliteEngine(url).__aenter__()
        await submitted(first)
        second = SqliteEngine(url, wait_lock=True)
        opening = asyncio.ensure_future(second.__aenter__())
        await kit.spin()
        assert not opening.done()
        await first.__aexit__(None, None, None)
        await asyncio.wait_for(opening, 10)

        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(second)
            assert (await second.get("r1")).status is RunStatus.PENDING

    async def test_who_gives_up_waiting_leaves_nothing(self, url: str) -> None:
        async with SqliteEngine(url):
            before = len(os.listdir("/proc/self/fd"))
            opening = asyncio.ensure_future(SqliteEngine(url, wait_lock=True).__aenter__())
            await kit.spin()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

            assert len(os.listdir("/proc/self/fd")) == before

    async def test_a_lock_whose_file_was_removed_is_taken_again(self, url: str, path: Path) -> None:
        lock = path.with_name("sereno.db.lock")
        async with SqliteEngine(url) as engine:
            lock.unlink()
            assert await engine.writable()
            with pytest.raises(EngineLocked, match=str(os.getpid())):
                await SqliteEngine(url).__aenter__()
            assert await engine.writable()

        async with SqliteEngine(url):
            pass

    async def test_who_waits_is_not_let_in_by_the_loss_of_the_name(
        self, url: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: asyncio.Queue[int] = asyncio.Queue()
        loop, plain = asyncio.get_running_loop(), sqlite_engine._locked

        def locked(file: int) -> bool:
            loop.call_soon_threadsafe(looks.put_nowait, file)
            return plain(file)

        async def looked() -> None:
            for _ in range(4):
                await looks.get()

        monkeypatch.setattr(sqlite_engine, "_locked", locked)
        async with SqliteEngine(url) as engine:
            opening = asyncio.ensure_future(SqliteEngine(url, wait_lock=True).__aenter__())
            await looked()
            path.with_name("sereno.db.lock").unlink()
            await looked()
            assert not opening.done()
            assert await engine.writable()
            await looked()
            assert not opening.done()

        await (await asyncio.wait_for(opening, 10)).__aexit__(None, None, None)
        assert path.with_name("sereno.db.lock").read_text() == f"{os.getpid()}\n"

    async def test_who_lost_the_store_to_another_says_so(self, url: str, path: Path) -> None:
        async with SqliteEngine(url) as engine:
            path.with_name("sereno.db.lock").unlink()
            async with SqliteEngine(url):
                with capture_logs() as records:
                    assert not await engine.writable()
                    assert not await engine.writable()

        assert [record["event"] for record in records] == ["Store cannot be written"]
        assert "has taken this store" in records[0]["error"]

    async def test_a_failed_opening_lets_go(self, url: str, path: Path) -> None:
        await asyncio.to_thread(path.write_bytes, b"this is not a database" * 100)
        for _ in range(2):
            with pytest.raises(StorageFailed, match=r"sereno\.db: file is not a database"):
                await SqliteEngine(url).__aenter__()

    async def test_an_opening_that_is_given_up_ends_its_thread(self, url: str) -> None:
        opening = asyncio.ensure_future(SqliteEngine(url).__aenter__())
        await kit.spin(3)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await opening).__aexit__(None, None, None)

        assert "sereno-writer" not in {thread.name for thread in threading.enumerate()}
        async with SqliteEngine(url) as engine:
            assert await engine.writable()


class TestReopening:
    async def test_it_keeps_everything_and_voids_leases(self, url: str) -> None:
        clock = Clock()
        async with SqliteEngine(url, clock=clock) as engine:
            log_id = engine.log_id
            ended = await claimed(engine, "r1", "t1")
            await engine.append(ended, [line(3, "run.completed", data=(("output", b"big"),))])
            held = await claimed(engine, "r2", "t2")
            await kit.put(engine.checkpointer(held), "c1", thread_id="t2")
            await engine.request_cancel("r2", "stop")
            await submitted(engine, "r3", "t3")
            before = [await engine.get(run_id) for run_id in ("r1", "r2", "r3")]
            logs = [await log_of(engine, run_id) for run_id in ("r1", "r2", "r3")]

        async with SqliteEngine(url, clock=clock) as engine:
            after = [await engine.get(run_id) for run_id in ("r1", "r2", "r3")]
            assert [after[0], after[2]] == [before[0], before[2]]
            assert after[1] == replace(before[1], lease_until=clock.now)
            assert [await log_of(engine, run_id) for run_id in ("r1", "r2", "r3")] == logs
            assert await engine.data("r1", 3, "output") == b"big"
            assert engine.log_id == log_id
            assert [run.run_id for run in await engine.claimable(5)] == ["r2", "r3"]
            assert after[1].lease_owner == "w1"  # it crashed: nobody gave it back
            with pytest.raises(ThreadBusy):
                await submitted(engine, "r4", "t2")
            assert (await claim(engine, after[1], owner="w2", crashed=True)).epoch == 2
            read = await engine.checkpointer(None).aget_tuple(_thread("t2"))
            assert read is not None
            assert read.checkpoint["id"] == "c1"

    async def test_only_the_holder_voids_leases(self, url: str) -> None:
        async with SqliteEngine(url) as engine:
            lease = await claimed(engine)
            before = await engine.get("r1")
            async with SqliteEngine(url, lock=False):
                pass
            assert await engine.get("r1") == before
            await engine.append(lease, [line(3)])

    async def test_another_file_is_another_log(self, url: str, tmp_path: Path) -> None:
        async with SqliteEngine(url) as one, SqliteEngine(f"sqlite:///{tmp_path / 'b.db'}") as two:
            assert one.log_id != two.log_id

    async def test_a_file_of_another_version_is_refused(self, url: str, path: Path) -> None:
        async with SqliteEngine(url):
            pass
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")

        with pytest.raises(StorageFailed, match="schema 99, this version reads 1"):
            await SqliteEngine(url).__aenter__()


class TestUrl:
    @pytest.mark.parametrize(
        "url",
        [
            "sqlite://",
            "sqlite:///",
            "sqlite://sereno.db",
            "sqlite://./sereno.db",
            "sqlite:///:memory:",
            "sqlite:///a.db?sync=off",
            "sqlite:///a.db?sync=",
            "sqlite:///a.db?sync=full&cache=1",
            "sqlite:///a.db?mode=ro",
            "sqlite:///a#b.db",
        ],
    )
    def test_what_cannot_be_used_says_what_can(self, url: str) -> None:
        with pytest.raises(BadSetting, match=r"SERENO_ENGINE: .*sqlite:///|\?sync"):
            SqliteEngine(url)

    @pytest.mark.parametrize(
        "form", ["sqlite:///./x.db", "sqlite:///x.db", "sqlite:///new/dir/x.db"]
    )
    async def test_a_relative_path_is_below_the_working_directory(
        self, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        async with SqliteEngine(form) as engine:
            assert await engine.writable()

        assert (tmp_path / form.removeprefix("sqlite:///")).exists()

    async def test_an_absolute_path_has_four_slashes(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/abs.db"
        assert url.startswith("sqlite:////")
        async with SqliteEngine(url):
            assert (tmp_path / "abs.db").exists()

    @pytest.mark.parametrize(("query", "value"), [("", 1), ("?sync=normal", 1), ("?sync=full", 2)])
    async def test_sync_is_what_was_asked_for(self, url: str, query: str, value: int) -> None:
        async with SqliteEngine(url + query) as engine:
            assert await pragma(engine, "synchronous") == (value,)
            assert await pragma(engine, "journal_mode") == ("wal",)

    async def test_a_path_that_cannot_be_opened_says_which(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "directory.db").mkdir()

        with pytest.raises(StorageFailed, match=r"file/x\.db\.lock"):
            await SqliteEngine(f"sqlite:///{tmp_path}/file/x.db").__aenter__()
        with pytest.raises(StorageFailed, match=r"directory\.db: unable to open"):
            await SqliteEngine(f"sqlite:///{tmp_path}/directory.db").__aenter__()


class TestLibraryFiles:
    """The checkpoint tables are those of LangGraph's own saver, either way."""

    async def test_we_read_what_the_library_wrote(self, url: str, path: Path) -> None:
        graph = kit.graph_of()
        async with AsyncSqliteSaver.from_conn_string(str(path)) as theirs:
            config = {"configurable": {"thread_id": "t1", "__pregel_checkpointer": theirs}}
            await graph.ainvoke({"seen": []}, config)
            there = await _history(theirs)

        async with SqliteEngine(url) as engine:
            assert await _history(engine.checkpointer(None)) == there
            assert (await engine.checkpointed("t1")).run_id is None
            assert (await engine.checkpointed("t1")).steps[""] == 3
            config = kit.config_of(engine.checkpointer(lease := await claimed(engine)), lease)
            again = await graph.ainvoke({"seen": ["again"]}, config)
        assert again["seen"][:5] == ["first", "first", "deep", "last", "again"]

    async def test_the_library_reads_what_we_wrote(self, url: str, path: Path) -> None:
        async with SqliteEngine(url) as engine:
            lease = await claimed(engine)
            saver = engine.checkpointer(lease)
            await kit.graph_of(pause=True).ainvoke({"seen": []}, kit.config_of(saver, lease))
            ours = await _history(saver)

        async with AsyncSqliteSaver.from_conn_string(str(path)) as theirs:
            assert await _history(theirs) == ours
            assert len(ours) > 4

    async def test_a_file_of_an_old_saver_gets_its_missing_column(
        self, url: str, path: Path
    ) -> None:
        async with AsyncSqliteSaver.from_conn_string(str(path)) as theirs:
            await theirs.setup()
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("ALTER TABLE writes DROP COLUMN task_path")
            db.execute(
                "INSERT INTO checkpoints VALUES ('t1', '', 'c0', NULL, 'msgpack', x'80', NULL)"
            )

        async with SqliteEngine(url) as engine:
            assert (await engine.checkpointed("t1")).checkpoint_id == "c0"
            saver = engine.checkpointer(await claimed(engine))
            place = await kit.put(saver, "c1")
            await saver.aput_writes(place, [("n", 1)], "task", "path")
            read = await saver.aget_tuple(place)
        assert read is not None
        assert read.pending_writes == [("task", "n", 1)]


class TestBatches:
    @pytest.fixture
    async def engine(self, url: str) -> Any:
        async with SqliteEngine(url) as engine:
            yield engine

    async def test_a_refused_operation_never_fails_its_batch(self, engine: SqliteEngine) -> None:
        leases = [await claimed(engine, f"r{n}", f"t{n}") for n in range(20)]
        with busy(engine):
            posted = [
                engine.append(lease, [line(9 if n == 7 else 3)]) for n, lease in enumerate(leases)
            ]
        done = await asyncio.gather(*posted, return_exceptions=True)

        assert [n for n, result in enumerate(done) if result is not None] == [7]
        assert isinstance(done[7], LeaseLost)
        assert [len(await log_of(engine, f"r{n}")) for n in (6, 7, 8)] == [3, 2, 3]

    @pytest.mark.parametrize(
        ("breaks", "error"),
        [
            pytest.param(lambda db: db.execute("NONSENSE"), StorageFailed, id="sqlite"),
            pytest.param(lambda db: 1 / 0, ZeroDivisionError, id="other"),
        ],
    )
    async def test_a_broken_operation_never_fails_its_batch(
        self, engine: SqliteEngine, breaks: Callable[[Any], Any], error: type[Exception]
    ) -> None:
        """The whole batch is undone and each is tried alone, in order."""
        lease = await claimed(engine)
        with busy(engine):
            before = [engine.append(lease, [line(seq)]) for seq in range(3, 8)]
            broken = engine._writer.call(breaks)
            after = [engine.append(lease, [line(seq)]) for seq in range(8, 13)]
        done = await asyncio.gather(*before, broken, *after, return_exceptions=True)

        assert isinstance(done[5], error)
        assert done[:5] == done[6:] == [None] * 5
        assert [stored.seq for stored in await log_of(engine)] == list(range(1, 13))

    async def test_a_refusal_in_a_broken_batch_stays_a_refusal(self, engine: SqliteEngine) -> None:
        lease = await claimed(engine)
        with busy(engine):
            stale = engine.append(lease, [line(2)])
            broken = engine._writer.call(lambda db: db.execute("NONSENSE"))
            fine = engine.append(lease, [line(3)])
        done = await asyncio.gather(stale, broken, fine, return_exceptions=True)

        assert [type(result) for result in done] == [LeaseLost, StorageFailed, type(None)]

    async def test_a_batch_is_one_transaction(self, engine: SqliteEngine) -> None:
        lease = await claimed(engine)
        async with aiosqlite.connect(engine._path) as other:

            async def version() -> int:
                ((seen,),) = await other.execute_fetchall("PRAGMA data_version")
                return int(seen)

            first = await version()
            with busy(engine):
                posted = [engine.append(lease, [line(seq)]) for seq in range(3, 203)]
                assert await version() == first
            await asyncio.gather(*posted)

            assert await other.execute_fetchall("SELECT last_seq FROM runs") == [(202,)]
            assert await version() == first + 1

    async def test_a_caller_that_has_gone_fails_nobody(self, engine: SqliteEngine) -> None:
        lease = await claimed(engine)
        with busy(engine):
            gone = engine.append(lease, [line(3)])
            stays = engine.append(lease, [line(4)])
            gone.cancel()
        await stays

        assert len(await log_of(engine)) == 4


class TestStorage:
    @pytest.fixture
    async def engine(self, url: str) -> Any:
        async with SqliteEngine(url, clock=Clock()) as engine:
            yield engine

    async def test_a_full_disk_loses_nothing_that_was_acknowledged(
        self, engine: SqliteEngine
    ) -> None:
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        place = await kit.put(saver, "c1")
        (pages,) = await pragma(engine, "page_count")
        await pragma(engine, f"max_page_count={pages + 1}")
        big = b"x" * 50_000

        with pytest.raises(StorageFailed, match="full"):
            await submitted(engine, "r2", "t2", request={"input": "x" * 50_000})
        with pytest.raises(StorageFailed, match="full"):
            await engine.append(lease, [line(3, data=(("output", big),))])
        with pytest.raises(StorageFailed, match="full"):
            await saver.aput({"configurable": place["configurable"]}, *_large_checkpoint(), {})
        assert len(await log_of(engine)) == 2
        assert (await engine.get("r1")).last_seq == 2
        assert await engine.data("r1", 3, "output") is None

        await pragma(engine, f"max_page_count={pages + 1000}")
        await engine.append(lease, [line(3, data=(("output", big),))])
        await submitted(engine, "r2", "t2")
        assert await engine.data("r1", 3, "output") == big
        assert await engine.writable()

    async def test_a_write_that_nobody_waited_for_is_told_by_the_next_read(
        self, engine: SqliteEngine
    ) -> None:
        """An interrupt is written like this, and nothing is written after it."""
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        place = await kit.put(saver, "c1")
        (pages,) = await pragma(engine, "page_count")
        await pragma(engine, f"max_page_count={pages}")
        await saver.aput_writes(place, [("__interrupt__", "x" * 50_000)], "task")

        with pytest.raises(StorageFailed, match="full"):
            await saver.aget_tuple(place)
        with pytest.raises(StorageFailed, match="full"):
            await saver.with_allowlist([("a", "B")]).aget_tuple(place)
        with pytest.raises(StorageFailed, match="full"):
            await kit.put(saver, "c2")

    async def test_a_large_line_that_does_not_fit_spares_its_neighbours(
        self, engine: SqliteEngine
    ) -> None:
        leases = [await claimed(engine, f"r{n}", f"t{n}") for n in range(3)]
        (pages,) = await pragma(engine, "page_count")
        await pragma(engine, f"max_page_count={pages + 2}")
        with busy(engine):
            posted = [
                engine.append(lease, [line(3, data=((("m", b"x" * 90_000),) if n == 1 else ()))])
                for n, lease in enumerate(leases)
            ]
        done = await asyncio.gather(*posted, return_exceptions=True)

        assert [type(result) for result in done] == [type(None), StorageFailed, type(None)]

    @pytest.mark.parametrize("replaced", [False, True])
    async def test_a_file_that_nobody_will_find_is_not_writable(
        self, engine: SqliteEngine, path: Path, replaced: bool
    ) -> None:
        """What is written to it ends with the process."""
        os.rename(path, path.with_name("moved.db"))
        if replaced:
            os.mknod(path)

        with capture_logs() as records:
            assert not await engine.writable()
        assert ("replaced" if replaced else "No such file") in records[0]["error"]

        os.replace(path.with_name("moved.db"), path)
        assert await engine.writable()

    async def test_where_only_a_small_write_fits_it_is_not_writable(
        self, engine: SqliteEngine
    ) -> None:
        (pages,) = await pragma(engine, "page_count")
        await pragma(engine, f"max_page_count={pages + 2}")

        assert not await engine.writable()
        assert (await submitted(engine)).last_seq == 1

        await pragma(engine, f"max_page_count={pages + 20}")
        assert await engine.writable()

    async def test_a_store_that_is_read_only_takes_nothing(self, engine: SqliteEngine) -> None:
        await submitted(engine)
        await _outside(engine, lambda db: db.execute("PRAGMA query_only=ON"))

        assert not await engine.writable()
        with pytest.raises(StorageFailed, match="readonly"):
            await submitted(engine, "r2", "t2")
        assert (await engine.get("r1")).last_seq == 1

    async def test_it_takes_runs_again_when_it_can_be_written_again(
        self, engine: SqliteEngine
    ) -> None:
        await submitted(engine)
        refused = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE}

        def authorize(action: int, *_: Any) -> int:
            return sqlite3.SQLITE_DENY if action in refused else sqlite3.SQLITE_OK

        await _outside(engine, lambda db: db.set_authorizer(authorize))
        assert not await engine.writable()
        with pytest.raises(StorageFailed, match="not authorized"):
            await submitted(engine, "r2", "t2")
        with pytest.raises(StorageFailed):
            await claim(engine, "r1")
        with pytest.raises(StorageFailed):
            await engine.request_cancel("r1", "stop")

        refused.clear()
        assert await engine.writable()
        assert (await claim(engine, "r1")).epoch == 1

    async def test_a_database_that_another_process_locks_fails_once_for_all_who_wait(
        self, url: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each alone would wait as long again: 256 of them for three quarters of an hour."""
        monkeypatch.setattr(sqlite_writer, "BUSY_S", 0.05)
        async with SqliteEngine(url) as engine:
            lease = await claimed(engine)
            begun: list[str] = []
            await _outside(engine, lambda db: db.set_trace_callback(begun.append))
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                posted = [engine.append(lease, [line(seq)]) for seq in range(3, 103)]
                done = await asyncio.gather(*posted, return_exceptions=True)
                assert not await engine.writable()
                assert [stored.seq for stored in await log_of(engine)] == [1, 2]
                other.execute("ROLLBACK")

            assert all(isinstance(result, StorageFailed) for result in done)
            assert len(begun) <= 4
            await asyncio.gather(*(engine.append(lease, [line(seq)]) for seq in range(3, 103)))
            assert len(await log_of(engine)) == 102

    async def test_a_reader_that_fails_is_a_storage_failure(self, engine: SqliteEngine) -> None:
        await claimed(engine)
        await engine._writer.call(lambda db: db.execute("ALTER TABLE runs RENAME TO gone"))
        await engine._writer.call(lambda db: db.execute("ALTER TABLE checkpoints RENAME TO gone2"))

        with pytest.raises(StorageFailed, match="no such table"):
            await engine.get("r1")
        with pytest.raises(StorageFailed, match="no such table"):
            await engine.checkpointer(None).aget_tuple(_thread())
        with pytest.raises(StorageFailed, match="no such table"):
            await _history(engine.checkpointer(None))


class TestClosed:
    async def test_what_comes_after_the_end_fails_and_never_hangs(self, url: str) -> None:
        async with SqliteEngine(url) as engine:
            lease = await claimed(engine)
            saver = engine.checkpointer(lease)
            place = await kit.put(saver, "c1")

        async def all_of_it() -> None:
            for call in (
                lambda: engine.append(lease, [line(3)]),
                lambda: submitted(engine, "r2", "t2"),
                lambda: engine.request_cancel("r1", "stop"),
                lambda: engine.get("r1"),
                lambda: engine.read("r1", 0),
                lambda: engine.statistics(),
                lambda: kit.put(saver, "c2"),
            ):
                with pytest.raises(StorageFailed):
                    await call()
            await saver.aput_writes(place, [("n", 1)], "task")
            with pytest.raises(StorageFailed):
                await saver.aget_tuple(place)
            with pytest.raises(StorageFailed):
                await asyncio.to_thread(engine.renew, [lease], LEASE_S)
            assert not await engine.writable()

        await asyncio.wait_for(all_of_it(), 10)

    async def test_it_closes_though_every_thread_of_the_loop_is_taken(self, url: str) -> None:
        """A sync node that never returns has its thread for ever."""
        engine = await SqliteEngine(url).__aenter__()
        loop, free = asyncio.get_running_loop(), threading.Event()
        taken = [loop.run_in_executor(None, free.wait, 20) for _ in range(64)]
        try:
            await asyncio.wait_for(engine.__aexit__(None, None, None), 5)
        finally:
            free.set()
            await asyncio.gather(*taken)

    async def test_it_may_be_closed_twice(self, url: str) -> None:
        engine = await SqliteEngine(url).__aenter__()
        await engine._writer.close()
        await engine.__aexit__(None, None, None)
        await engine.__aexit__(None, None, None)

    def test_a_loop_that_has_closed_is_not_waited_for(self, url: str) -> None:
        """Results that nobody can be told of any more do not stop the writer."""

        async def leave() -> SqliteEngine:
            engine = await SqliteEngine(url, lock=False).__aenter__()
            lease = await claimed(engine)
            await engine._reader.close()
            await engine._saver_reader.close()
            engine.append(lease, [line(3)])
            return engine

        with contextlib.closing(asyncio.new_event_loop()) as loop:
            engine = loop.run_until_complete(leave())

        count = engine._writer.call_blocking(
            lambda db: db.execute("SELECT count(*) FROM run_events").fetchone()
        )
        asyncio.run(engine._writer.close())
        assert count == (3,)
        assert not engine._writer.is_alive()


class TestStatistics:
    async def test_they_cost_nothing_of_what_has_ended(self, url: str, path: Path) -> None:
        """However many runs have ended, only indices of open and waiting ones are read."""
        read: list[str] = []
        async with SqliteEngine(url) as engine:
            run = await submitted(engine)
            await engine._reader.set_trace_callback(read.append)
            await engine.statistics()
            await engine.position(run)
            await engine._reader.set_trace_callback(None)  # type: ignore[arg-type]
            plans = [await engine._fetch(f"EXPLAIN QUERY PLAN {asked}", ()) for asked in read]

        steps = [row[3] for plan in plans for row in plan]
        assert [step for step in steps if " runs" in step or " waiting" in step] == [
            "SEARCH runs USING COVERING INDEX runs_pending (status=?)",
            "SCAN waiting USING COVERING INDEX waiting_since",
            "SEARCH runs USING COVERING INDEX runs_pending "
            "(status=? AND (created_at,run_id)<(?,?))",
        ]

    async def test_a_file_from_before_them_tells_who_waits(self, url: str, path: Path) -> None:
        clock = Clock()
        async with SqliteEngine(url, clock=clock) as engine:
            for run_id, thread in (("r1", "t1"), ("r2", "t2"), ("r3", "t3")):
                lease = await claimed(engine, run_id, thread)
                await engine.append(lease, [line(3, "run.interrupted")])
            await submitted(engine, "r4", "t2")
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("DROP TRIGGER runs_interrupted")
            db.execute("DROP TRIGGER runs_answered")
            db.execute("DROP TABLE waiting")
            db.execute("DELETE FROM meta WHERE key = 'waiting'")
        clock.pass_by(60)

        for _ in range(2):
            async with SqliteEngine(url, clock=clock) as engine:
                waiting = (await engine.statistics()).waiting
                assert waiting == {"g": Waiting(runs=2, oldest_s=60)}

    async def test_its_files_have_sizes(self, url: str, path: Path) -> None:
        async with SqliteEngine(url) as engine:
            await submitted(engine, request={"pad": "x" * 100_000})
            sizes = await engine.sizes()
            os.unlink(path)
            with pytest.raises(StorageFailed, match="No such file"):
                await engine.sizes()

        assert set(sizes) == {"db", "wal"}
        assert sizes["wal"] > 100_000


class TestTelemetry:
    """What each engine tells is in test_telemetry.py; here is what a disk adds."""

    @pytest.fixture
    def metrics(self) -> Iterator[Metrics]:
        metrics = Metrics()
        yield metrics
        metrics.close()

    async def test_a_batch_is_timed_from_its_first_post_and_fails_as_one(
        self, url: str, metrics: Metrics
    ) -> None:
        async with SqliteEngine(url, telemetry=StorageTelemetry(metrics)) as engine:
            lease = await claimed(engine)
            before = metrics["log_commit_seconds"].value("success")
            with busy(engine):
                posted = [engine.append(lease, [line(seq)]) for seq in range(3, 53)]
            await asyncio.gather(*posted)
            assert metrics["log_commit_seconds"].value("success") == before + 1

            with busy(engine):
                broken = engine._writer.call(lambda db: db.execute("NONSENSE"))
                fine = engine.append(lease, [line(53)])
            await asyncio.gather(broken, fine, return_exceptions=True)
            assert metrics["log_commit_seconds"].value("error") == 1

    async def test_a_write_that_nobody_waits_for_may_fail_and_has_a_span(
        self, url: str, metrics: Metrics
    ) -> None:
        exporter = InMemorySpanExporter()
        tracing = Tracing(processors=[SimpleSpanProcessor(exporter)])
        telemetry = StorageTelemetry(metrics, tracing, slow_s=60)
        async with SqliteEngine(url, telemetry=telemetry) as engine:
            saver = engine.checkpointer(await claimed(engine))
            place = await kit.put(saver, "c1")
            await _outside(engine, lambda db: db.execute("ALTER TABLE writes RENAME TO gone"))
            node = tracing.start("node n")
            with use_span(node, end_on_exit=True):
                await saver.aput_writes(place, [("n", 1)], "task")
            with pytest.raises(StorageFailed):
                await saver.aget_tuple(place)
        tracing.close()

        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert spans["checkpoint put"].parent == node.get_span_context()
        assert spans["checkpoint get"].parent is None
        for name in ("checkpoint put", "checkpoint get"):
            attributes = spans[name].attributes
            assert attributes is not None
            assert attributes["error.type"] == "StorageFailed"

    async def test_leases_that_a_failing_store_keeps_are_not_renewed(
        self, url: str, metrics: Metrics
    ) -> None:
        async with SqliteEngine(url, telemetry=StorageTelemetry(metrics)) as engine:
            leases = [await claimed(engine, f"r{n}", f"t{n}") for n in range(3)]
        with pytest.raises(StorageFailed):
            await asyncio.to_thread(engine.renew, leases, LEASE_S)

        assert metrics["lease_renew_failures_total"].value() == 3


def test_the_schema_of_the_checkpoints_is_the_library_s(tmp_path: Path) -> None:
    ours = sqlite3.connect(":memory:")
    schema = Path(sqlite_engine.__file__).with_name("schema.sql").read_text("utf-8")
    ours.executescript(schema)

    async def theirs() -> dict[str, Any]:
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "x.db")) as saver:
            await saver.setup()
            return {
                table: await saver.conn.execute_fetchall(f"PRAGMA table_info({table})")
                for table in ("checkpoints", "writes")
            }

    with contextlib.closing(ours):
        for table, columns in asyncio.run(theirs()).items():
            assert ours.execute(f"PRAGMA table_info({table})").fetchall() == columns


# Helpers.


async def _outside(engine: SqliteEngine, change: Callable[[sqlite3.Connection], Any]) -> None:
    """Change the writer's connection."""
    await engine._writer.call(lambda db: change(db) and None)


async def _history(saver: Any) -> list[Any]:
    return [item async for item in saver.alist(_thread())]


def _thread(thread_id: str = "t1") -> Any:
    return {"configurable": {"thread_id": thread_id}}


def _large_checkpoint() -> tuple[Any, Any]:
    checkpoint, metadata = kit.checkpoint("c9")
    return {**checkpoint, "channel_values": {"n": "x" * 50_000}}, metadata
