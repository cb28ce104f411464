"""What holds in any order of events: logs without gaps, every cut, one epoch at a time."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine_kit as kit
import pytest
from engine_kit import LEASE_S, Bench, claimed, line, lines, submitted
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engines import ENGINES, base
from runtime.engines.base import Engine
from runtime.errors import LeaseLost
from runtime.events import Event
from runtime.model import Lease, Run

every_engine = pytest.mark.parametrize("scheme", sorted(ENGINES))
quick = settings(max_examples=50, deadline=None)

RUNS = 3
ENDS = ("run.completed", "run.failed", "run.interrupted")


def on(scheme: str, act: Callable[[Bench], Awaitable[None]]) -> None:
    """Run one example over a store of its own."""

    async def example() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with contextlib.AsyncExitStack() as stack:
                await act(Bench(scheme, Path(directory), stack))

    asyncio.run(example())


# Any interleaving of appends and reads.

steps = st.lists(
    st.tuples(
        st.integers(0, RUNS - 1),
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 5)),
            st.tuples(st.just("read"), st.integers(0, 30)),
            st.tuples(st.just("watch"), st.floats(0, 1)),
            st.tuples(st.just("settle"), st.integers(0, 3)),
        ),
    ),
    max_size=30,
)


@every_engine
@given(steps=steps, ring=st.integers(1, 8))
@quick
def test_any_interleaving_of_appends_and_reads_is_one_log(
    scheme: str, steps: Sequence[tuple[int, tuple[str, Any]]], ring: int
) -> None:
    async def act(bench: Bench) -> None:
        engine = await bench.open()
        leases = [await claimed(engine, f"r{n}", f"t{n}") for n in range(RUNS)]
        model: list[list[Event]] = [
            [line(1, "run.queued", epoch=0), line(2, "run.started")] for _ in leases
        ]
        posted: list[asyncio.Future[None]] = []
        watchers: list[tuple[int, int, asyncio.Future[Any]]] = []
        for n, (what, how) in steps:
            log, run_id = model[n], f"r{n}"
            if what == "append":
                events = lines(len(log) + 1, how)
                log.extend(events)
                posted.append(engine.append(leases[n], events))
            elif what == "read":
                got = list(await engine.read(run_id, how))
                assert got == kit.stored(log[how : how + len(got)])
            elif what == "watch":
                after = int(how * (await engine.get(run_id)).last_seq)
                watcher = asyncio.ensure_future(kit.followed(engine, run_id, after))
                watchers.append((n, after, watcher))
            elif how:
                await kit.spin(how)
            else:
                await asyncio.gather(*posted)
        for n, lease in enumerate(leases):
            end = line(len(model[n]) + 1, ENDS[n])
            model[n].append(end)
            posted.append(engine.append(lease, [end]))
        await asyncio.gather(*posted)

        for n, after, watcher in watchers:
            assert await asyncio.wait_for(watcher, 10) == kit.stored(model[n])[after:]
        for n, log in enumerate(model):
            whole = kit.stored(log)
            assert [stored.seq for stored in whole] == list(range(1, len(whole) + 1))
            for k in range(len(whole) + 1):
                assert whole[:k] + list(await engine.read(f"r{n}", k)) == whole
                assert whole[:k] + await kit.followed(engine, f"r{n}", k) == whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "RING", ring)
        on(scheme, act)


# Several workers over two instances claim, write, end, requeue and expire in any order.

WORKERS = 3


@dataclass
class Model:
    """A run as it must be."""

    epoch: int = 0
    holder: int | None = None
    until: float = 0.0
    log: list[Event] = field(default_factory=list)
    ended: bool = False
    #: What each worker believes to hold.
    leases: dict[int, Lease] = field(default_factory=dict)
    #: The run as each worker has read it last.
    seen: dict[int, Run] = field(default_factory=dict)

    def may_write(self, worker: int) -> bool:
        lease = self.leases.get(worker)
        return lease is not None and self.holder == worker and lease.epoch == self.epoch

    def may_claim(self, worker: int, now: float) -> bool:
        seen = self.seen[worker]
        return (
            not self.ended
            and (seen.epoch, seen.last_seq) == (self.epoch, len(self.log))
            and (self.holder is None or self.until <= now)
        )


moves = st.lists(
    st.tuples(
        st.integers(0, WORKERS - 1),
        st.integers(0, 1),
        st.sampled_from(
            [
                *("look", "claim", "claim", "append", "append", "append", "stale"),
                *("end", "requeue", "expire", "renew", "checkpoint", "sweep"),
            ]
        ),
    ),
    max_size=40,
)


@every_engine
@given(moves=moves)
@quick
def test_only_the_current_epoch_ever_writes(
    scheme: str, moves: Sequence[tuple[int, int, str]]
) -> None:
    async def act(bench: Bench) -> None:
        instances = [await bench.open(), await bench.open()]
        models = [Model(), Model()]
        for n, model in enumerate(models):
            run = await submitted(instances[0], f"r{n}", f"t{n}")
            model.log.append(line(1, "run.queued", epoch=0))
            model.seen = dict.fromkeys(range(WORKERS), run)
        for worker, n, what in moves:
            await move(bench, instances[worker % 2], models[n], f"r{n}", worker, what)
            await check(instances[(worker + 1) % 2], models[n], f"r{n}")

    on(scheme, act)


async def move(
    bench: Bench, engine: Engine, model: Model, run_id: str, worker: int, what: str
) -> None:
    """One thing that a worker does, and whether it had to be refused."""
    now, next_seq = bench.clock.now, len(model.log) + 1
    lease = model.leases.get(worker)
    if what == "look":
        model.seen[worker] = await engine.get(run_id)
    elif what == "expire":
        bench.clock.pass_by(LEASE_S)
    elif what == "claim":
        seen = model.seen[worker]
        first = "run.recovered" if seen.epoch else "run.started"
        event = line(seen.last_seq + 1, first, epoch=seen.epoch + 1)
        taken = engine.claim(
            seen, event, owner=f"w{worker}", lease_s=LEASE_S, crashed=model.holder is not None
        )
        if not model.may_claim(worker, now):
            with pytest.raises(LeaseLost):
                await taken
            return
        model.leases[worker] = await taken
        model.epoch, model.holder, model.until = model.epoch + 1, worker, now + LEASE_S
        model.log.append(event)
    elif what == "sweep":  # a worker ends a run that nobody holds
        event = line(model.seen[worker].last_seq + 1, "run.failed", epoch=model.epoch)
        ending = engine.append_unclaimed(model.seen[worker], [event])
        if not model.may_claim(worker, now):
            with pytest.raises(LeaseLost):
                await ending
            return
        await ending
        model.log.append(event)
        model.holder, model.ended = None, True
    elif lease is None:
        return
    elif what == "renew":
        learnt = await asyncio.to_thread(engine.renew, [lease], LEASE_S)
        assert learnt[run_id].held == model.may_write(worker)
        if model.may_write(worker):
            model.until = now + LEASE_S
    elif what == "checkpoint":
        put = kit.put(
            engine.checkpointer(lease), f"c{len(model.log):03}", thread_id=lease.thread_id
        )
        if model.may_write(worker):
            await put
        else:
            with pytest.raises(LeaseLost):
                await put
    else:
        types = {"end": "run.completed", "requeue": "run.requeued"}
        events = [line(next_seq, epoch=lease.epoch)]
        if what in types:
            events.append(line(next_seq + 1, types[what], epoch=lease.epoch))
        if what == "stale" or not model.may_write(worker):
            stale = [line(next_seq - 1, epoch=lease.epoch)] if what == "stale" else events
            with pytest.raises(LeaseLost):
                await engine.append(lease, stale)
            return
        await engine.append(lease, events)
        model.log.extend(events)
        if what in types:
            model.holder, model.ended = None, what == "end"


async def check(engine: Engine, model: Model, run_id: str) -> None:
    log, run = list(await engine.read(run_id, 0)), await engine.get(run_id)
    assert log == kit.stored(model.log)
    assert [stored.seq for stored in log] == list(range(1, len(log) + 1))
    assert (run.epoch, run.last_seq) == (model.epoch, len(log))
    assert (run.terminal is not None) == model.ended
    assert (run.lease_owner is None) == (model.holder is None)
    terminal = [event.seq for event in model.log if event.terminal]
    assert terminal == ([len(log)] if model.ended else [])
    epochs = [event.epoch for event in model.log]
    assert epochs == sorted(epochs)
