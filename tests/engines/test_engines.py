"""What every engine of the table promises; the fixtures open each of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import engine_kit as kit
import pytest
from engine_kit import LEASE_S, Bench, Clock, claim, claimed, line, lines, log_of, submitted
from langgraph.types import Command
from pydantic import BaseModel

from runtime import engines
from runtime.engines import base
from runtime.engines.base import (
    Engine,
    Statistics,
    Tails,
    Waiting,
    check_claim,
    check_submit,
    follow,
)
from runtime.engines.serde import StateTypeBlocked, StrictSerializer
from runtime.errors import BadSetting, LeaseLost, StorageFailed, ThreadBusy, UnknownRun
from runtime.events import STATUS, TERMINAL_TYPES
from runtime.model import RunQuery, RunStatus


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(BadSetting, match=r"postgres://x'.*memory://, sqlite://"):
        engines.create("postgres://x")


class TestSubmit:
    async def test_a_run_is_pending_with_its_first_line(self, engine: Engine, clock: Clock) -> None:
        run = await submitted(engine, request={"input": [1, "é"]}, deadline=1234.5)

        assert run == await engine.get("r1")
        assert (run.status, run.epoch, run.last_seq) == (RunStatus.PENDING, 0, 1)
        assert (run.request, run.deadline) == ({"input": [1, "é"]}, 1234.5)
        assert run.created_at == run.updated_at == clock.now
        assert (run.lease_owner, run.terminal, run.started_at, run.ended_at) == (None,) * 4
        assert await log_of(engine) == kit.stored([line(1, "run.queued", epoch=0)])

    async def test_an_unknown_run_is_an_error(self, engine: Engine) -> None:
        with pytest.raises(UnknownRun):
            await engine.get("r1")
        with pytest.raises(UnknownRun):
            await engine.request_cancel("r1", "why")

        assert list(await engine.read("r1", 0)) == []

    @pytest.mark.parametrize("state", ["pending", "running", "requeued", "crashed"])
    async def test_any_open_run_has_the_thread(
        self, engine: Engine, clock: Clock, state: str
    ) -> None:
        run = await submitted(engine)
        if state != "pending":
            lease = await claim(engine, run)
        if state == "requeued":
            await engine.append(lease, [line(3, "run.requeued")])
        if state == "crashed":
            clock.pass_by(LEASE_S + 1)

        with pytest.raises(ThreadBusy) as busy:
            await submitted(engine, "r2")

        assert busy.value.active_run == "r1"
        with pytest.raises(UnknownRun):
            await engine.get("r2")

    async def test_an_ended_run_leaves_its_thread(self, engine: Engine) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [line(3, "run.completed")])

        assert (await submitted(engine, "r2")).thread_id == "t1"

    async def test_a_run_id_is_taken_once(self, engine: Engine) -> None:
        lease = await claimed(engine)

        with pytest.raises(StorageFailed):
            await submitted(engine, "r1", "t2")
        await engine.append(lease, [line(3)])

        assert [stored.seq for stored in await log_of(engine)] == [1, 2, 3]

    async def test_of_many_at_once_on_a_thread_one_wins(self, engine: Engine) -> None:
        posted = [asyncio.ensure_future(submitted(engine, f"r{n}")) for n in range(20)]
        done = await asyncio.gather(*posted, return_exceptions=True)

        assert [type(result).__name__ for result in done].count("Run") == 1
        assert sum(isinstance(result, ThreadBusy) for result in done) == 19


class TestSearch:
    @pytest.fixture
    async def five(self, engine: Engine, clock: Clock) -> Engine:
        """r0…r4, one a second; r3 and r4 have the same time, r1 runs, r2 has ended."""
        for n in range(5):
            await submitted(engine, f"r{n}", f"t{n}", graph="even" if n % 2 == 0 else "odd")
            clock.pass_by(1 if n < 3 else 0)
        await claim(engine, "r1")
        lease = await claim(engine, "r2")
        clock.pass_by(10)
        await engine.append(lease, [line(3, "run.failed")])
        return engine

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            pytest.param(RunQuery(), "43210", id="all"),
            pytest.param(RunQuery(status="running"), "1", id="status"),
            pytest.param(RunQuery(status="pending"), "430", id="pending"),
            pytest.param(RunQuery(graph="even"), "420", id="graph"),
            pytest.param(RunQuery(thread_id="t3"), "3", id="thread"),
            pytest.param(RunQuery(updated_after=1005.0), "2", id="updated_after"),
            pytest.param(RunQuery(graph="even", status="pending"), "40", id="both"),
            pytest.param(RunQuery(graph="none"), "", id="none"),
            pytest.param(RunQuery(limit=2), "43", id="limit"),
        ],
    )
    async def test_filters_narrow_and_the_newest_comes_first(
        self, five: Engine, query: RunQuery, found: str
    ) -> None:
        assert "".join(run.run_id[1] for run in await five.search(query)) == found

    @pytest.mark.parametrize("limit", [1, 2, 3])
    async def test_pages_are_one_list(self, five: Engine, limit: int) -> None:
        seen: list[str] = []
        cursor = None
        while page := await five.search(RunQuery(limit=limit, cursor=cursor)):
            seen += [run.run_id for run in page]
            cursor = (page[-1].created_at, page[-1].run_id)

        assert seen == ["r4", "r3", "r2", "r1", "r0"]

    async def test_statistics_tell_how_many_wait_and_how_long(self, five: Engine) -> None:
        assert await five.statistics() == Statistics(pending=3, oldest_pending_s=13.0)

    async def test_of_an_empty_store_they_say_nothing_is_old(self, engine: Engine) -> None:
        assert await engine.statistics() == Statistics(pending=0)

    async def test_a_place_in_the_queue_counts_the_older_ones(self, five: Engine) -> None:
        places = [await five.position(await five.get(f"r{n}")) for n in range(5)]

        assert places == [0, 1, 1, 1, 2]  # r1 runs, r2 has ended

    async def test_statistics_tell_who_waits_for_a_human(
        self, engine: Engine, clock: Clock
    ) -> None:
        async def interrupt(run_id: str, thread_id: str, graph: str) -> None:
            lease = await claim(engine, await submitted(engine, run_id, thread_id, graph=graph))
            await engine.append(lease, [line(3), line(4, "run.interrupted")])
            clock.pass_by(10)

        await interrupt("r1", "t1", "a")
        await interrupt("r2", "t2", "a")
        await interrupt("r3", "t3", "b")
        waiting = (await engine.statistics()).waiting
        assert waiting == {"a": Waiting(runs=2, oldest_s=30), "b": Waiting(runs=1, oldest_s=10)}

        await submitted(engine, "r4", "t1", graph="a")  # answered, though not executed yet
        waiting = (await engine.statistics()).waiting
        assert waiting == {"a": Waiting(runs=1, oldest_s=20), "b": Waiting(runs=1, oldest_s=10)}

        lease = await claim(engine, "r4")
        await engine.append(lease, [line(3, "run.interrupted")])  # and asks once more
        assert (await engine.statistics()).waiting["a"] == Waiting(runs=2, oldest_s=20)

        await interrupt("r5", "t2", "a")
        assert (await engine.statistics()).waiting["a"] == Waiting(runs=2, oldest_s=10)
        run = await submitted(engine, "r6", "t3", graph="b")
        await engine.append_unclaimed(run, [line(2, "run.cancelled", epoch=0)])
        assert set((await engine.statistics()).waiting) == {"a"}

    async def test_claimable_is_what_nobody_may_write_for_oldest_first(
        self, five: Engine, clock: Clock
    ) -> None:
        assert [run.run_id for run in await five.claimable(10)] == ["r0", "r3", "r4"]
        assert [run.run_id for run in await five.claimable(2)] == ["r0", "r3"]

        clock.pass_by(LEASE_S)

        assert [run.run_id for run in await five.claimable(10)] == ["r0", "r1", "r3", "r4"]


class TestClaim:
    async def test_it_raises_the_epoch_and_writes_its_first_line(
        self, engine: Engine, clock: Clock
    ) -> None:
        run = await submitted(engine)
        clock.pass_by(5)
        lease = await claim(engine, run)

        run = await engine.get("r1")
        assert (lease.epoch, lease.thread_id, lease.owner) == (1, "t1", "w1")
        assert (run.epoch, run.last_seq, run.status) == (1, 2, RunStatus.RUNNING)
        assert (run.lease_owner, run.lease_until) == ("w1", clock.now + LEASE_S)
        assert run.started_at == run.updated_at == clock.now
        assert [stored.type for stored in await log_of(engine)] == ["run.queued", "run.started"]

    async def test_a_run_that_moved_on_is_not_claimed(self, engine: Engine, clock: Clock) -> None:
        seen = await submitted(engine)
        await claim(engine, seen)

        for _ in range(2):  # while the lease is held, and when it has expired
            with pytest.raises(LeaseLost):
                await claim(engine, seen, owner="w2")
            clock.pass_by(LEASE_S)

        assert (await engine.get("r1")).lease_owner == "w1"
        assert len(await log_of(engine)) == 2

    async def test_a_held_run_is_not_claimed(self, engine: Engine) -> None:
        await claimed(engine)

        with pytest.raises(LeaseLost):
            await claim(engine, "r1", owner="w2")

    async def test_a_log_that_went_on_is_not_claimed(self, engine: Engine, clock: Clock) -> None:
        lease = await claimed(engine)
        clock.pass_by(LEASE_S)
        seen = await engine.get("r1")
        await engine.append(lease, [line(3)])

        with pytest.raises(LeaseLost):
            await claim(engine, seen, owner="w2")

    async def test_an_ended_run_is_not_claimed(self, engine: Engine) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [line(3, "run.completed")])

        with pytest.raises(LeaseLost):
            await claim(engine, "r1", owner="w2")

    async def test_a_first_line_that_does_not_follow_is_refused(self, engine: Engine) -> None:
        run = await submitted(engine)

        with pytest.raises(LeaseLost):
            await engine.claim(
                run, line(3, "run.started"), owner="w1", lease_s=LEASE_S, crashed=False
            )

        assert await engine.get("r1") == run

    async def test_of_many_claims_at_once_one_wins(self, engine: Engine) -> None:
        run = await submitted(engine)
        posted = [asyncio.ensure_future(claim(engine, run, owner=f"w{n}")) for n in range(10)]
        done = await asyncio.gather(*posted, return_exceptions=True)

        assert sum(isinstance(result, LeaseLost) for result in done) == 9
        assert (await engine.get("r1")).epoch == 1

    async def test_the_start_is_that_of_the_first_claim(self, engine: Engine, clock: Clock) -> None:
        await claimed(engine)
        clock.pass_by(LEASE_S)
        lease = await claim(engine, "r1", owner="w2", crashed=True)

        run = await engine.get("r1")
        assert lease.epoch == run.epoch == 2
        assert run.started_at == 1000.0

    async def test_another_holder_of_the_thread_is_named(self, engine: Engine) -> None:
        """Two open runs on a thread cannot be made by `submit`: the decision alone."""
        run = await submitted(engine)

        with pytest.raises(ThreadBusy, match="r0"):
            check_claim(run, run, "r0", 0.0)
        with pytest.raises(ThreadBusy, match="r1"):
            check_submit("t1", run)
        check_claim(run, run, "r1", 0.0)
        check_submit("t1", None)


class TestAppend:
    async def test_lines_come_back_as_they_were(self, engine: Engine, clock: Clock) -> None:
        lease = await claimed(engine)
        clock.pass_by(3)
        await engine.append(lease, lines(3, 5))

        assert (await log_of(engine))[2:] == kit.stored(lines(3, 5))
        run = await engine.get("r1")
        assert (run.last_seq, run.updated_at, run.status) == (7, clock.now, RunStatus.RUNNING)

    @pytest.mark.parametrize("first", [1, 2, 4, 9])
    async def test_a_line_that_does_not_follow_is_refused(self, engine: Engine, first: int) -> None:
        lease = await claimed(engine)

        with pytest.raises(LeaseLost):
            await engine.append(lease, [line(first)])

        assert len(await log_of(engine)) == 2

    @pytest.mark.parametrize(
        "events",
        [
            pytest.param([line(3), line(5)], id="gap"),
            pytest.param([line(3), line(3)], id="twice"),
            pytest.param([line(3, "run.completed"), line(4)], id="after-the-end"),
            pytest.param([line(3, "run.requeued"), line(4)], id="after-the-lease-was-given-back"),
        ],
    )
    async def test_a_batch_that_would_break_the_log_is_refused_whole(
        self, engine: Engine, events: Any
    ) -> None:
        lease = await claimed(engine)
        before = await engine.get("r1")

        with pytest.raises(LeaseLost):
            await engine.append(lease, events)

        assert await engine.get("r1") == before
        assert len(await log_of(engine)) == 2

    async def test_an_older_epoch_cannot_write(self, engine: Engine, clock: Clock) -> None:
        old = await claimed(engine)
        clock.pass_by(LEASE_S)
        new = await claim(engine, "r1", owner="w2")

        with pytest.raises(LeaseLost):
            await engine.append(old, [line(4)])
        await engine.append(new, [line(4, epoch=2)])

        assert len(await log_of(engine)) == 4

    @pytest.mark.parametrize("type", TERMINAL_TYPES)
    async def test_nothing_follows_a_terminal_line(
        self, engine: Engine, clock: Clock, type: str
    ) -> None:
        lease = await claimed(engine)
        clock.pass_by(3)
        await engine.append(lease, [line(3), line(4, type)])

        for event in (line(5), line(5, type)):
            with pytest.raises(LeaseLost):
                await engine.append(lease, [event])
        run = await engine.get("r1")
        with pytest.raises(LeaseLost):
            await engine.append_unclaimed(run, [line(5, type)])

        assert (run.status, run.terminal, run.ended_at) == (STATUS[type], 4, clock.now)
        assert (run.lease_owner, run.lease_until) == (None, None)
        assert run.status.ended
        assert len(await log_of(engine)) == 4

    @pytest.mark.parametrize(
        ("types", "status"),
        [
            pytest.param(["custom", "token"], RunStatus.RUNNING, id="no-change"),
            pytest.param(["custom", "run.requeued"], RunStatus.PENDING, id="requeued"),
            pytest.param(["token", "custom", "run.interrupted"], RunStatus.INTERRUPTED, id="end"),
        ],
    )
    async def test_the_status_is_read_off_the_last_line(
        self, engine: Engine, types: list[str], status: RunStatus
    ) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [line(seq, type) for seq, type in enumerate(types, 3)])

        assert (await engine.get("r1")).status is status

    async def test_a_line_takes_no_time_to_post_and_waits_for_nobody(self, engine: Engine) -> None:
        lease = await claimed(engine)
        posted = [engine.append(lease, [line(seq)]) for seq in range(3, 203)]
        done: list[int] = []
        for seq, future in enumerate(posted, 3):
            future.add_done_callback(lambda _, seq=seq: done.append(seq))
        await asyncio.gather(*posted)

        assert done == list(range(3, 203))
        assert [stored.seq for stored in await log_of(engine)] == list(range(1, 203))

    async def test_a_refused_operation_fails_alone(self, engine: Engine, clock: Clock) -> None:
        leases = [await claimed(engine, f"r{n}", f"t{n}") for n in range(4)]
        posted = []
        for seq in range(3, 43):
            for lease in leases:
                stale = lease.run_id == "r1" and seq == 20
                posted.append(engine.append(lease, [line(1 if stale else seq)]))
        done = await asyncio.gather(*posted, return_exceptions=True)

        # One is stale, and those after it do not follow any more.
        assert [isinstance(result, LeaseLost) for result in done].count(True) == 43 - 20
        for lease in leases:
            whole = 19 if lease.run_id == "r1" else 42
            seqs = [stored.seq for stored in await log_of(engine, lease.run_id)]
            assert seqs == list(range(1, whole + 1))

    async def test_large_members_are_kept_beside_the_line(self, engine: Engine) -> None:
        lease = await claimed(engine)
        data = (("output", b"x" * 2_000_000), ("é", b"\x00\xff"))
        await engine.append(lease, [line(3, data=data), line(4)])

        assert await engine.data("r1", 3, "output") == b"x" * 2_000_000
        assert await engine.data("r1", 3, "é") == b"\x00\xff"
        assert await engine.data("r1", 3, "none") is None
        assert await engine.data("r1", 4, "output") is None
        assert await engine.data("r2", 3, "output") is None

    async def test_a_refused_line_leaves_no_members(self, engine: Engine) -> None:
        lease = await claimed(engine)

        with pytest.raises(LeaseLost):
            await engine.append(lease, [line(9, data=(("output", b"x"),))])

        assert await engine.data("r1", 9, "output") is None


class TestUnclaimed:
    async def test_a_run_that_nobody_executes_can_be_ended(self, engine: Engine) -> None:
        run = await submitted(engine)
        ended = await engine.append_unclaimed(run, [line(2, "run.cancelled", epoch=0)])

        assert ended == await engine.get("r1")
        assert (ended.status, ended.terminal, ended.epoch) == (RunStatus.CANCELLED, 2, 0)

    async def test_not_while_it_is_held(self, engine: Engine, clock: Clock) -> None:
        await claimed(engine)
        run = await engine.get("r1")

        with pytest.raises(LeaseLost):
            await engine.append_unclaimed(run, [line(3, "run.failed")])
        clock.pass_by(LEASE_S)

        ended = await engine.append_unclaimed(run, [line(3, "run.failed")])
        assert ended.status is RunStatus.ERROR

    async def test_not_when_it_has_moved_on(self, engine: Engine) -> None:
        run = await submitted(engine)
        lease = await claim(engine, run)
        await engine.append(lease, [line(3, "run.requeued")])

        with pytest.raises(LeaseLost):
            await engine.append_unclaimed(run, [line(2, "run.cancelled")])
        with pytest.raises(LeaseLost):
            await engine.append_unclaimed(await engine.get("r1"), [line(9, "run.cancelled")])

        assert len(await log_of(engine)) == 3


class TestLease:
    async def test_requeue_gives_the_lease_back_and_holds_the_thread(self, engine: Engine) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [line(3, "run.requeued")])

        run = await engine.get("r1")
        assert (run.lease_owner, run.lease_until, run.terminal) == (None, None, None)
        assert (run.status, run.epoch) == (RunStatus.PENDING, 1)
        assert [found.run_id for found in await engine.claimable(5)] == ["r1"]
        with pytest.raises(ThreadBusy):
            await submitted(engine, "r2")
        assert (await claim(engine, run, owner="w2")).epoch == 2

    async def test_who_gave_a_run_back_cannot_write_for_it(self, engine: Engine) -> None:
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        await engine.append(lease, [line(3, "run.requeued")])

        with pytest.raises(LeaseLost):
            await engine.append(lease, [line(4)])
        with pytest.raises(LeaseLost):
            await kit.put(saver, "c1")
        assert not engine_renew(engine, lease).held

    async def test_a_renewed_lease_lasts_from_now(self, engine: Engine, clock: Clock) -> None:
        lease = await claimed(engine)
        clock.pass_by(20)
        renewal = await asyncio.to_thread(engine_renew, engine, lease)

        assert (renewal.held, renewal.cancel_reason) == (True, None)
        assert (await engine.get("r1")).lease_until == clock.now + LEASE_S

    async def test_renewing_tells_what_is_lost_and_what_to_stop(
        self, engine: Engine, clock: Clock
    ) -> None:
        lost = await claimed(engine, "r1", "t1")
        ended = await claimed(engine, "r2", "t2")
        stop = await claimed(engine, "r3", "t3")
        clock.pass_by(LEASE_S)
        new = await claim(engine, "r1", owner="w2")
        await engine.append(ended, [line(3, "run.completed")])
        await engine.request_cancel("r3", "enough")
        await engine.request_cancel("r1", "enough")

        leases = [lost, ended, stop]
        learnt = await asyncio.to_thread(engine.renew, leases, LEASE_S)

        assert {run_id: (r.held, r.cancel_reason) for run_id, r in learnt.items()} == {
            "r1": (False, None),
            "r2": (False, None),
            "r3": (True, "enough"),
        }
        assert engine_renew(engine, new).cancel_reason == "enough"

    async def test_the_first_reason_of_a_cancel_stays(self, engine: Engine) -> None:
        await submitted(engine)
        first = await engine.request_cancel("r1", "first")
        second = await engine.request_cancel("r1", "second")
        lease = await claim(engine, "r1")

        assert first.cancel_reason == second.cancel_reason == "first"
        assert (await engine.get("r1")).cancel_reason == "first"
        await engine.append(lease, [line(3, "run.completed")])

    async def test_an_ended_run_takes_no_cancel(self, engine: Engine) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [line(3, "run.completed")])

        assert (await engine.request_cancel("r1", "late")).cancel_reason is None

    async def test_a_cancel_and_a_heartbeat_do_not_undo_each_other(
        self, engine: Engine, clock: Clock
    ) -> None:
        runs = [await claimed(engine, f"r{n}", f"t{n}") for n in range(20)]
        clock.pass_by(7)
        beats = [asyncio.to_thread(engine.renew, runs, LEASE_S) for _ in range(5)]
        wishes = [engine.request_cancel(lease.run_id, "stop") for lease in runs]
        await asyncio.gather(*beats, *wishes)

        for lease in runs:
            run = await engine.get(lease.run_id)
            assert (run.cancel_reason, run.lease_until) == ("stop", clock.now + LEASE_S)


class TestTwoInstances:
    """A holder is frozen past its lease, another one takes over, the first comes back."""

    async def test_every_write_of_the_first_fails(self, bench: Bench) -> None:
        frozen, other = await bench.open(), await bench.open()
        old = await claimed(frozen)
        saver = frozen.checkpointer(old)
        place = await kit.put(saver, "c1")
        bench.clock.pass_by(LEASE_S + 1)
        new = await claim(other, "r1", owner="w2", crashed=True)

        with pytest.raises(LeaseLost):
            await frozen.append(old, [line(3)])
        with pytest.raises(LeaseLost):
            await frozen.append(old, [line(4)])
        with pytest.raises(LeaseLost):
            await kit.put(saver, "c2")
        with pytest.raises(LeaseLost):
            await _put_writes(saver, place)
        assert not engine_renew(frozen, old).held

        await other.append(new, [line(4, "run.completed", epoch=2)])
        read = await other.checkpointer(None).aget_tuple(kit.config_of(None, new))
        assert read is not None
        assert read.checkpoint["id"] == "c1"
        assert not read.pending_writes
        assert [stored.seq for stored in await log_of(frozen)] == [1, 2, 3, 4]

    async def test_only_one_of_both_claims(self, bench: Bench) -> None:
        first, second = await bench.open(), await bench.open()
        run = await submitted(first)
        done = await asyncio.gather(
            *(claim(engine, run, owner=str(n)) for n in range(5) for engine in (first, second)),
            return_exceptions=True,
        )

        assert sum(isinstance(result, LeaseLost) for result in done) == 9

    async def test_both_are_the_same_log(self, bench: Bench) -> None:
        first, second = await bench.open(), await bench.open()
        await claimed(first)

        assert first.log_id == second.log_id != ""
        assert await log_of(first) == await log_of(second)

    async def test_a_watcher_of_one_is_not_confused_by_lines_of_the_other(
        self, bench: Bench
    ) -> None:
        first, second = await bench.open(), await bench.open()
        old = await claimed(first)
        watcher = asyncio.ensure_future(kit.followed(first, "r1", 0))
        await kit.spin()
        await first.append(old, [line(3)])
        bench.clock.pass_by(LEASE_S)
        new = await claim(second, "r1", owner="w2")
        await second.append(new, lines(5, 3, epoch=2))
        await second.append(new, [line(8, "run.requeued", epoch=2)])
        again = await claim(first, "r1", owner="w1")
        await first.append(again, [line(10, "run.completed", epoch=3)])

        assert await watcher == await log_of(first)
        assert len(await watcher) == 10


class TestCrashes:
    async def test_a_crash_counts_until_a_new_root_checkpoint(
        self, engine: Engine, clock: Clock
    ) -> None:
        await claimed(engine)
        for epoch in (2, 3):
            clock.pass_by(LEASE_S)
            lease = await claim(engine, "r1", owner=f"w{epoch}", crashed=True)
        assert (await engine.get("r1")).crashes == 2

        saver = engine.checkpointer(lease)
        place = await kit.put(saver, "c1", ns="inner:1")
        await saver.aput_writes(place, [("n", 1)], "task")
        assert (await engine.get("r1")).crashes == 2

        await kit.put(saver, "c1")
        assert (await engine.get("r1")).crashes == 0

    async def test_a_claim_after_a_drain_counts_nothing(self, engine: Engine) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [line(3, "run.requeued")])
        await claim(engine, "r1")

        assert (await engine.get("r1")).crashes == 0

    async def test_a_claim_keeps_what_was_learnt_since_the_run_was_read(
        self, engine: Engine, clock: Clock
    ) -> None:
        lease = await claimed(engine)
        clock.pass_by(LEASE_S)
        seen = await engine.get("r1")
        await kit.put(engine.checkpointer(lease), "c1")
        await engine.request_cancel("r1", "stop")
        await claim(engine, seen, owner="w2", crashed=True)

        run = await engine.get("r1")
        assert (run.applied, run.crashes, run.cancel_reason) == (True, 1, "stop")

    @pytest.mark.parametrize("how", ["checkpoint", "writes"])
    async def test_applied_is_the_first_write_of_the_run(self, engine: Engine, how: str) -> None:
        lease = await claimed(engine)
        assert not (await engine.get("r1")).applied

        saver = engine.checkpointer(lease)
        if how == "checkpoint":
            await kit.put(saver, "c1", ns="inner:1")
        else:
            place = {"configurable": {"thread_id": "t1", "checkpoint_ns": "", "checkpoint_id": "0"}}
            await saver.aput_writes(place, [("__resume__", 1)], "task")
            await saver.aget_tuple(place)

        assert (await engine.get("r1")).applied


class TestRead:
    @pytest.mark.parametrize(
        ("after", "limit", "seqs"),
        [
            (0, 1000, range(1, 11)),
            (3, 1000, range(4, 11)),
            (0, 4, range(1, 5)),
            (7, 2, range(8, 10)),
            (10, 5, range(0)),
            (99, 5, range(0)),
        ],
    )
    async def test_it_is_what_comes_after_at_most_so_many(
        self, engine: Engine, after: int, limit: int, seqs: range
    ) -> None:
        lease = await claimed(engine)
        await engine.append(lease, lines(3, 8))

        read = await engine.read("r1", after, limit)

        assert [stored.seq for stored in read] == list(seqs)

    async def test_a_run_reads_its_own_lines_only(self, engine: Engine) -> None:
        await claimed(engine)
        await claimed(engine, "r2", "t2")

        assert len(await log_of(engine, "r2")) == 2


class TestFollow:
    async def test_replay_and_live_are_the_same_lines_for_everyone(self, engine: Engine) -> None:
        lease = await claimed(engine)
        watchers = [asyncio.ensure_future(kit.followed(engine, "r1", 0)) for _ in range(10)]
        for seq in range(3, 30):
            if seq % 5 == 0:  # some come in the middle
                watchers.append(asyncio.ensure_future(kit.followed(engine, "r1", 0)))
            await engine.append(lease, [line(seq)])
        await engine.append(lease, [line(30, "run.completed")])
        seen = await asyncio.gather(*watchers)
        seen.append(await kit.followed(engine, "r1", 0))

        whole = await log_of(engine)
        assert len(whole) == 30
        assert all(got == whole for got in seen)

    async def test_every_cut_goes_on_where_it_was_cut(self, engine: Engine) -> None:
        lease = await claimed(engine)
        await engine.append(lease, [*lines(3, 6), line(9, "run.completed")])

        whole = await log_of(engine)
        for k in range(len(whole) + 1):
            assert whole[:k] + await kit.followed(engine, "r1", k) == whole
            assert whole[:k] + list(await engine.read("r1", k)) == whole

    async def test_it_ends_behind_the_terminal_line_while_others_still_watch(
        self, engine: Engine
    ) -> None:
        lease = await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 0)) as batches:
            await anext(batches)
            await engine.append(lease, [line(3, "run.completed")])

            assert await kit.followed(engine, "r1", 3) == []
            assert [stored.seq for stored in await kit.followed(engine, "r1", 2)] == [3]

    async def test_an_unknown_run_is_an_error(self, engine: Engine) -> None:
        with pytest.raises(UnknownRun):
            await kit.followed(engine, "r9", 0)

    async def test_who_falls_off_the_ring_reads_on_from_the_log(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "RING", 4)
        lease = await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 0)) as batches:
            seen = list(await anext(batches))
            await engine.append(lease, lines(3, 50))
            await engine.append(lease, [line(53, "run.completed")])
            seen += [stored async for batch in batches for stored in batch]

        assert [stored.seq for stored in seen] == list(range(1, 54))

    async def test_the_ring_is_bounded_in_bytes(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "RING_BYTES", 500)
        lease = await claimed(engine)
        with engine.tails.watch("r1") as tail:
            watcher = asyncio.ensure_future(kit.followed(engine, "r1", 0))
            for seq in range(3, 100):
                await engine.append(lease, [line(seq)])
                assert sum(len(kept.body) for kept in tail.lines) == tail.size <= 500
            await engine.append(lease, [line(100, "run.completed")])

            assert len(await watcher) == 100

    async def test_silence_ticks_with_empty_batches(self, engine: Engine) -> None:
        lease = await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 2, tick=0.001)) as batches:
            assert [await anext(batches) for _ in range(5)] == [()] * 5
            await engine.append(lease, [line(3)])
            got = await _more(batches)

        assert [stored.seq for stored in got] == [3]

    async def test_a_tick_leaves_nothing_behind(self, engine: Engine) -> None:
        lease = await claimed(engine)
        with engine.tails.watch("r1") as tail:
            async with contextlib.aclosing(follow(engine, "r1", 2, tick=0.001)) as batches:
                for _ in range(5):
                    await anext(batches)
                assert not tail.waiters
            assert tail.watchers == 1
        await engine.append(lease, [line(3, "run.completed")])
        with engine.tails.watch("r1") as fresh:
            assert fresh is not tail

    async def test_wake_lets_every_watcher_look_around(self, engine: Engine) -> None:
        await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 2)) as batches:
            assert await anext(batches) == ()
            waiting = asyncio.ensure_future(anext(batches))
            await kit.spin()
            assert not waiting.done()
            engine.tails.wake()

            assert await waiting == ()

    async def test_a_wake_is_not_missed_by_who_was_not_waiting_yet(self, engine: Engine) -> None:
        await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 2)) as batches:
            assert await anext(batches) == ()
            engine.tails.wake()  # while the reader is busy with what it got

            assert await asyncio.wait_for(anext(batches), 5) == ()

    async def test_a_line_is_not_missed_by_who_was_not_waiting_yet(self, engine: Engine) -> None:
        lease = await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 2)) as batches:
            assert await anext(batches) == ()
            await engine.append(lease, [line(3)])

            assert [stored.seq for stored in await asyncio.wait_for(_more(batches), 5)] == [3]

    async def test_a_line_is_not_missed_between_the_read_and_the_wait(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease = await claimed(engine)
        engine.tails = Tails()  # the run began before a restart
        read = engine.read

        async def late(run_id: str, after: int, limit: int = 1000) -> Any:
            found = await read(run_id, after, limit)
            if after == 2 and not found:
                monkeypatch.setattr(engine, "read", read)
                await engine.append(lease, [line(3, "run.completed")])
            return found

        monkeypatch.setattr(engine, "read", late)
        seen = await asyncio.wait_for(kit.followed(engine, "r1", 0), 5)

        assert [stored.seq for stored in seen] == [1, 2, 3]

    async def test_nothing_is_seen_before_it_is_committed(self, engine: Engine) -> None:
        lease = await claimed(engine)
        async with contextlib.aclosing(follow(engine, "r1", 2)) as batches:
            await anext(batches)
            for seq in range(3, 40):
                posted = engine.append(lease, [line(seq)])
                (got,) = await _more(batches)
                assert [s.seq for s in await engine.read("r1", seq - 1)] == [got.seq] == [seq]
                await posted


class TestCheckpointer:
    async def test_a_graph_runs_and_its_checkpoints_tell_what_is_done(self, engine: Engine) -> None:
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        config = kit.config_of(saver, lease)
        result = await kit.graph_of(pause=True).ainvoke({"seen": ["in"]}, config)
        held = await engine.checkpointed("t1")

        assert "__interrupt__" in result
        state = await saver.aget_tuple(kit.config_of(None, lease))
        assert state is not None
        # An interrupt is no result; all that came before it is.
        waiting = {task for task, channel, _ in state.pending_writes if channel == "__interrupt__"}
        assert len(waiting) == 1
        assert held.stored
        assert not held.stored & waiting
        (inner,) = [ns for ns in held.steps if ns]
        assert inner.startswith("inner:")
        assert held.steps == {"": 2, inner: 1}
        assert (held.checkpoint_id, held.run_id) == (state.checkpoint["id"], "r1")
        assert inner.partition(":")[2] in held.stored

    async def test_another_run_goes_on_with_the_thread(self, engine: Engine) -> None:
        lease = await claimed(engine)
        graph = kit.graph_of(pause=True)
        await graph.ainvoke({"seen": []}, kit.config_of(engine.checkpointer(lease), lease))
        await engine.append(lease, [line(3, "run.interrupted")])
        lease = await claimed(engine, "r2")
        config = kit.config_of(engine.checkpointer(lease), lease)
        result = await graph.ainvoke(Command(resume="yes"), config)

        assert result["seen"][-1] == "yes"
        held = await engine.checkpointed("t1")
        assert held.run_id == "r2"
        history = [item async for item in engine.checkpointer(None).alist(_thread())]
        assert history[0].checkpoint["id"] == held.checkpoint_id

    async def test_an_untouched_thread_holds_nothing(self, engine: Engine) -> None:
        held = await engine.checkpointed("t9")

        assert (held.stored, held.steps, held.checkpoint_id, held.run_id) == (set(), {}, None, None)

    async def test_a_read_sees_what_was_posted_before_it(self, engine: Engine) -> None:
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        place = await kit.put(saver, "c1")
        for n in range(50):
            await saver.aput_writes(place, [("n", n)], f"task{n:02}")
            read = await saver.aget_tuple(place)
            assert read is not None
            assert len(read.pending_writes) == n + 1
        await saver.aput_writes(place, [("n", 50)], "task50")
        (listed,) = [item async for item in saver.alist(_thread())]

        assert [value for _, _, value in listed.pending_writes] == list(range(51))

    async def test_reads_are_not_held_up_by_a_history_that_is_read_slowly(
        self, engine: Engine
    ) -> None:
        """SQLite keeps a connection's view of the database as long as a statement is open."""
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        for n in range(200):
            await kit.put(saver, f"c{n:03}")
        history = engine.checkpointer(None).alist(_thread())
        assert (await anext(history)).checkpoint["id"] == "c199"

        await engine.append(lease, [line(3)])
        assert len(await log_of(engine)) == 3
        await kit.put(saver, "c200")
        read = await engine.checkpointer(None).aget_tuple(_thread())
        assert read is not None
        assert read.checkpoint["id"] == "c200"
        await history.aclose()  # type: ignore[attr-defined]

    async def test_every_reader_sees_its_own_write_among_many(self, engine: Engine) -> None:
        """Many savers read at once on one connection: none may pin the others' past."""

        async def one(n: int) -> None:
            lease = await claimed(engine, f"r{n}", f"t{n}")
            saver = engine.checkpointer(lease)
            for step in range(15):
                await kit.put(saver, f"c{step:02}", thread_id=lease.thread_id, step=step)
                read = await saver.aget_tuple(_thread(lease.thread_id))
                assert read is not None
                assert read.checkpoint["id"] == f"c{step:02}"
                await engine.append(lease, [line(3 + step)])
                assert (await engine.get(lease.run_id)).last_seq == 3 + step

        await asyncio.gather(*(one(n) for n in range(12)))

    async def test_before_write_comes_before_each_write(self, engine: Engine) -> None:
        lease = await claimed(engine)
        calls: list[str | None] = []
        saver = engine.checkpointer(lease, before_write=calls.append)
        place = await kit.put(saver, "c1")
        await saver.aput_writes(place, [("n", 1)], "task")
        await kit.put(saver, "c1", ns="inner:1")
        await saver.aget_tuple(place)

        assert calls == ["c1", None, None]

    async def test_lines_posted_by_before_write_go_first(self, bench: Bench) -> None:
        """Killed at any instant, a checkpoint is never there without the lines of what it holds."""
        engine = await bench.open()
        lease = await claimed(engine)
        posted: list[asyncio.Future[None]] = []

        def post(checkpoint_id: str | None) -> None:
            posted.append(engine.append(lease, [line(3 + len(posted))]))

        saver = engine.checkpointer(lease, before_write=post)
        for n in range(20):
            await kit.put(saver, f"c{n:02}")
            assert posted[n].done()
            assert len(await log_of(engine)) == 3 + n

    async def test_a_graph_tells_progress_for_the_root_only(self, engine: Engine) -> None:
        lease = await claimed(engine)
        calls: list[str | None] = []
        saver = engine.checkpointer(lease, before_write=calls.append)
        await kit.graph_of().ainvoke({"seen": []}, kit.config_of(saver, lease))
        history = [item async for item in engine.checkpointer(None).alist(_thread(ns=""))]

        told = [checkpoint_id for checkpoint_id in calls if checkpoint_id is not None]
        assert told[::-1] == [item.checkpoint["id"] for item in history]
        assert len(told) == 5
        assert calls.count(None) > 5

    async def test_a_saver_without_a_lease_only_reads(self, engine: Engine) -> None:
        lease = await claimed(engine)
        place = await kit.put(engine.checkpointer(lease), "c1")
        reader = engine.checkpointer(None)

        with pytest.raises(RuntimeError, match="only reads"):
            await kit.put(reader, "c2")
        with pytest.raises(RuntimeError, match="only reads"):
            await reader.aput_writes(place, [("n", 1)], "task")
        read = await reader.aget_tuple(_thread())
        assert read is not None
        assert read.checkpoint["id"] == "c1"

    async def test_an_ended_run_writes_no_checkpoint(self, engine: Engine) -> None:
        lease = await claimed(engine)
        saver = engine.checkpointer(lease)
        await engine.append(lease, [line(3, "run.cancelled")])

        with pytest.raises(LeaseLost):
            await kit.put(saver, "c1")

        assert (await engine.checkpointed("t1")).checkpoint_id is None

    async def test_a_sync_node_may_run_a_graph_of_its_own(self, engine: Engine) -> None:
        """Its saver is then called from the node's thread; the lines still belong to the loop."""
        lease = await claimed(engine)
        threads: list[int] = []
        inner = kit.StateGraph(kit.State)
        inner.add_node("deep", lambda state: {"seen": ["deep"]})
        inner.add_edge(kit.START, "deep")
        compiled: Any = inner.compile(checkpointer=True)
        outer = kit.StateGraph(kit.State)
        outer.add_node("call", lambda state: compiled.invoke(state))
        outer.add_edge(kit.START, "call")

        def before_write(checkpoint_id: str | None) -> None:
            threads.append(threading.get_ident())

        saver = engine.checkpointer(lease, before_write=before_write)
        result = await outer.compile().ainvoke({"seen": []}, kit.config_of(saver, lease))

        assert result["seen"] == ["deep"]
        assert set(threads) == {threading.get_ident()}
        assert any((await engine.checkpointed("t1")).steps)


class Money(BaseModel):
    amount: int


class TestTypes:
    async def test_a_type_that_is_not_allowed_is_an_error(self, bench: Bench) -> None:
        engine = await bench.open(serde=StrictSerializer(allowed_msgpack_modules=None))
        saver = engine.checkpointer(await claimed(engine))
        place = await kit.put(saver, "c1")
        await saver.aput_writes(place, [("n", Money(amount=3))], "task")

        with pytest.raises(StateTypeBlocked, match=r"SERENO_SERDE_ALLOW=\S+:Money") as blocked:
            await saver.aget_tuple(place)
        assert blocked.value.code == "state_type_blocked"

        allowed = saver.with_allowlist([(Money.__module__, "Money")])
        read = await allowed.aget_tuple(place)
        assert read is not None
        assert read.pending_writes == [("task", "n", Money(amount=3))]

    def test_a_blocked_type_of_one_value_is_forgotten_by_the_next(self) -> None:
        serde = StrictSerializer(allowed_msgpack_modules=None)
        blocked, plain = serde.dumps_typed([Money(amount=1)]), serde.dumps_typed([1])

        for _ in range(2):
            with pytest.raises(StateTypeBlocked):
                serde.loads_typed(blocked)
            assert serde.loads_typed(plain) == [1]

    @pytest.mark.parametrize("allow", ["Money", "module:", "a:B,c"])
    def test_what_is_allowed_is_named_module_and_class(self, allow: str) -> None:
        with pytest.raises(BadSetting, match="module:Class"):
            StrictSerializer.allowing(allow)

    @pytest.mark.parametrize("allow", ["", " , ", "decimal:Decimal, uuid:UUID"])
    def test_allowing_makes_a_serializer_of_its_own_kind(self, allow: str) -> None:
        assert type(StrictSerializer.allowing(allow)) is StrictSerializer


class TestClosed:
    async def test_a_store_that_is_open_can_be_written(self, engine: Engine) -> None:
        assert await engine.writable()

    async def test_what_is_posted_is_committed_before_it_closes(self, bench: Bench) -> None:
        engine = await bench.open()
        lease = await claimed(engine)
        posted = [engine.append(lease, [line(seq)]) for seq in range(3, 503)]
        other = await bench.open()
        await engine.__aexit__(None, None, None)

        assert all(future.done() for future in posted)
        assert len(await log_of(other)) == 502


async def test_the_newest_run_of_a_thread_is_the_last_one_when_the_clock_is_set_back(
    engine: Engine, clock: Any
) -> None:
    lease = await claimed(engine)
    await engine.append(lease, [line(3, "run.completed")])
    clock.now -= 3600
    await submitted(engine, "r2", "t1")

    (newest,) = await engine.search(RunQuery(thread_id="t1", limit=1))
    assert newest.run_id == "r2"


def engine_renew(engine: Engine, lease: Any) -> Any:
    return engine.renew([lease], LEASE_S)[lease.run_id]


def _thread(thread_id: str = "t1", ns: str | None = None) -> Any:
    place = {"thread_id": thread_id}
    return {"configurable": place if ns is None else {**place, "checkpoint_ns": ns}}


async def _put_writes(saver: Any, place: Any) -> None:
    """Writes may only be posted: the next call tells what became of them."""
    await saver.aput_writes(place, [("n", 1)], "task")
    await saver.aget_tuple(place)


async def _more(batches: Any) -> Any:
    """The next batch that has lines."""
    while not (batch := await anext(batches)):
        pass
    return batch
