"""A late loop is measured, and what blocks it is named; a process that did not run is not."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy
from structlog.testing import capture_logs
from typing_extensions import TypedDict

from telemetry import langgraph as seam
from telemetry import loopwatch
from telemetry.health import Liveness
from telemetry.heartbeats import Heartbeats, heartbeat_records
from telemetry.loopwatch import LoopWatch, Place, _Peaks, _Pulse, _Watchdog
from telemetry.metrics import Metrics
from telemetry.segments import Segments
from telemetry.tracing import Tracing

#: Generous: others may be using the machine.
PATIENCE = 30.0

Records = list[Any]


def stalls(records: Records) -> Records:
    return [record for record in records if record.get("event_type") == "loop.stalled"]


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = Metrics()
    yield metrics
    metrics.close()


@pytest.fixture
def records() -> Iterator[Records]:
    with capture_logs() as records:
        yield records


class Looks:
    """A watchdog whose clocks stand still until they are moved."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.now = self.cpu = 100.0
        self.pulse = _Pulse()
        self.pulse.beat = self.now
        self.place = Place(graph="g", node="n", file="f.py", line=1, function="body")
        self.watchdog = _Watchdog(
            self.pulse, metrics, lambda: self.place, stall_s=0.25, period_s=0.05
        )
        self.pause = self.watchdog.look(self.now, self.cpu)

    def turn(self) -> None:
        """The loop turns now."""
        if self.now - self.pulse.beat > 0.3:
            self.pulse.gap = (self.pulse.beat, self.now)
        self.pulse.beat = self.now

    def look(self, *, overslept: float = 0.0, cpu: float = 0.0, turned: bool = False) -> None:
        """The watchdog is called as late as that, and the process has computed for so long."""
        self.now += self.pause + overslept
        self.cpu += cpu
        if turned:
            self.turn()
        self.pause = self.watchdog.look(self.now, self.cpu)

    def block(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.look()

    @property
    def stalls(self) -> float:
        return self.metrics["event_loop_stalls_total"].value("g", "n")


@pytest.fixture
def looks(metrics: Metrics) -> Looks:
    return Looks(metrics)


def test_a_loop_that_turns_is_looked_at_now_and_then(looks: Looks, records: Records) -> None:
    for _ in range(100):
        looks.look(turned=True)

        assert looks.pause == pytest.approx(0.3)
    assert looks.watchdog._stall is None
    assert records == []


def test_a_stall_is_told_once_when_it_is_over(looks: Looks, records: Records) -> None:
    looks.block(1.0)
    assert records == []
    looks.turn()
    lasted = looks.now - 100.0 - 0.05
    looks.look(turned=True)
    looks.look(turned=True)

    (record,) = records
    assert record["event_type"] == "loop.stalled"
    assert record["log_level"] == "warning"
    assert record["blocked_s"] == pytest.approx(lasted, abs=0.001)
    assert (record["graph"], record["node"]) == ("g", "n")
    assert (record["file"], record["line"], record["function"]) == ("f.py", 1, "body")
    assert record["ongoing"] is False
    assert record["samples"] == record["samples_here"] > 10
    assert looks.stalls == 1


def test_a_stall_that_goes_on_is_told_after_each_doubling(looks: Looks, records: Records) -> None:
    looks.block(45.0)
    looks.look(turned=True)

    assert [record["ongoing"] for record in records] == [True, True, True, True, False]
    told = [record["blocked_s"] for record in records]
    assert told == [pytest.approx(seconds, rel=0.05) for seconds in (5, 10, 20, 40, 45)]
    assert looks.stalls == 1


@pytest.mark.parametrize("turned_first", [False, True])
def test_a_suspended_process_is_not_a_stall(
    looks: Looks, records: Records, turned_first: bool
) -> None:
    looks.look(overslept=60.0, cpu=0.01, turned=turned_first)
    looks.look(turned=True)

    assert looks.watchdog._stall is None
    assert records == []


def test_a_turn_before_the_suspension_makes_it_no_stall_either(
    looks: Looks, records: Records
) -> None:
    looks.now += 0.1
    looks.turn()
    looks.now -= 0.1
    looks.look(overslept=60.0, cpu=0.01)
    looks.look(turned=True)

    assert looks.watchdog._stall is None
    assert records == []


def test_a_suspension_in_a_stall_does_not_make_it_longer(looks: Looks, records: Records) -> None:
    looks.block(0.5)
    looks.look(overslept=60.0)
    looks.block(0.5)
    looks.look(overslept=60.0, turned=True)

    (record,) = records
    assert 0.9 < record["blocked_s"] < 1.3


def test_who_does_not_let_go_of_the_interpreter_blocks_the_loop(
    looks: Looks, records: Records
) -> None:
    """The watchdog could not run either, but the process did compute."""
    looks.look(overslept=3.0, cpu=3.0)
    looks.look(turned=True)

    (record,) = records
    assert record["blocked_s"] > 3.0
    assert looks.stalls == 1


def test_the_place_of_most_samples_is_named(looks: Looks, records: Records) -> None:
    looks.block(0.4)
    looks.place = Place(graph="g", node="other", file="f.py", line=2, function="other")
    looks.block(1.0)
    looks.look(turned=True)

    assert records[0]["node"] == "other"
    assert 0 < records[0]["samples_here"] < records[0]["samples"]
    assert looks.metrics["event_loop_stalls_total"].value("g", "other") == 1
    assert looks.stalls == 0


def test_many_places_of_one_stall_are_not_all_kept(looks: Looks, records: Records) -> None:
    for number in range(1_000):
        looks.place = Place(node=str(number))
        looks.look()
    stall = looks.watchdog._stall
    assert stall is not None

    assert stall.samples > 900
    assert len(stall.places) == loopwatch._PLACES


def test_the_highest_lag_is_that_of_the_last_minute() -> None:
    peaks = _Peaks()
    for second in range(200):
        peaks.add(float(second), 7.0 if second == 100 else 0.001)

        assert peaks.highest(float(second)) == (7.0 if 100 <= second < 165 else 0.001)


def test_a_silent_minute_has_no_highest_lag() -> None:
    peaks = _Peaks()
    peaks.add(10.0, 7.0)

    assert peaks.highest(1_000.0) == 0.0


# On real loops. A body blocks until it was told of, which is at once here.


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    with asyncio.Runner(loop_factory=request.param) as runner:

        def run(work: Any) -> Any:
            return runner.run(work)

        yield run


@pytest.fixture
def told(records: Records, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Blocks the thread until a stall has been told."""
    monkeypatch.setattr(loopwatch, "_TOLD_AFTER_S", 0.0)

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE
        while not stalls(records):
            assert time.monotonic() < deadline, "no stall was told"
            time.sleep(0.01)

    return wait


@pytest.fixture
def observed() -> Iterator[None]:
    seam.install()
    yield
    seam.uninstall()


@contextlib.asynccontextmanager
async def a_run(metrics: Metrics) -> AsyncIterator[None]:
    """A watched loop, and the segment of a run around the code."""
    tracing = Tracing()
    segment = Segments(metrics, tracing).begin(
        run_id="r1", thread_id="t1", graph="screening", epoch=1, trigger="api"
    )
    async with LoopWatch(metrics, stall_s=0.05, period_s=0.01):
        with segment.entered():
            yield
        segment.discard()
    tracing.close()


class State(TypedDict, total=False):
    x: int


INPUT: Any = {"x": 1}


def graph_of(body: Any, name: str = "slow", **options: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node(name, body, **options)
    builder.add_edge(START, name)
    return builder.compile()


def lines_of(function: Any) -> range:
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


@pytest.mark.usefixtures("observed")
def test_a_blocking_node_is_named_with_its_line(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    async def body(state: State) -> State:
        await asyncio.sleep(0)
        told()
        return {}

    async def work() -> None:
        async with a_run(metrics):
            await graph_of(body).ainvoke(INPUT)

    run(work())

    first, last = records
    for record in records:
        assert (record["run_id"], record["thread_id"]) == ("r1", "t1")
        assert (record["graph"], record["node"], record["attempt"]) == ("screening", "slow", 1)
        assert len(record["trace_id"]) == 32
        assert record["file"] == __file__
        assert record["line"] in lines_of(told)
        assert record["function"].endswith("wait")
        assert "in test_a_blocking_node_is_named_with_its_line.<locals>.body" in record["stack"]
    assert (first["ongoing"], last["ongoing"]) == (True, False)
    assert metrics["event_loop_stalls_total"].value("screening", "slow") == 1
    assert metrics["event_loop_lag_max_seconds"].value() >= 0.05


@pytest.mark.usefixtures("observed")
def test_the_line_is_that_of_own_code_and_not_of_a_library(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    waiting = threading.Event()

    async def body(state: State) -> State:
        threading.Thread(target=lambda: (told(), waiting.set())).start()
        waiting.wait(PATIENCE)
        return {}

    async def work() -> None:
        async with a_run(metrics):
            await graph_of(body).ainvoke(INPUT)

    run(work())

    assert records[0]["function"].endswith("<locals>.body")
    assert records[0]["line"] in lines_of(body)
    assert "threading.py" in records[0]["stack"].splitlines()[-1]


@pytest.mark.usefixtures("observed")
def test_the_innermost_node_and_its_attempt_are_named(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    calls = []

    async def body(state: State) -> State:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError
        told()
        return {}

    policy = RetryPolicy(initial_interval=0.001, jitter=False)
    inner = graph_of(body, "inner", retry_policy=policy)

    async def work() -> None:
        async with a_run(metrics):
            await graph_of(inner, "outer").ainvoke(INPUT)

    run(work())

    assert stalls(records)[0]["node"] == "outer/inner"
    assert stalls(records)[0]["attempt"] == 2


@pytest.mark.usefixtures("observed")
def test_a_task_that_a_node_made_is_the_nodes(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    async def child() -> None:
        told()

    async def body(state: State) -> State:
        await asyncio.gather(asyncio.sleep(0), asyncio.create_task(child()))
        return {}

    async def work() -> None:
        async with a_run(metrics):
            await graph_of(body).ainvoke(INPUT)

    run(work())

    assert records[0]["node"] == "slow"


@pytest.mark.usefixtures("observed")
def test_a_sync_graph_inside_of_a_node_is_seen(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    def blocking(state: State) -> State:
        told()
        return {}

    inner = graph_of(blocking, "inner")

    async def body(state: State) -> State:
        inner.invoke(INPUT)
        return {}

    async def work() -> None:
        async with a_run(metrics):
            await graph_of(body).ainvoke(INPUT)

    run(work())

    assert records[0]["node"] == "slow/inner"


@pytest.mark.usefixtures("observed")
def test_parallel_nodes_are_told_apart(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    async def waiting(state: State) -> None:
        await asyncio.sleep(0.001)

    async def blocking(state: State) -> None:
        await asyncio.sleep(0)
        told()

    builder = StateGraph(State)
    for name, body in (("a", waiting), ("b", blocking), ("c", waiting)):
        builder.add_node(name, body)
        builder.add_edge(START, name)

    async def work() -> None:
        async with a_run(metrics):
            await builder.compile().ainvoke(INPUT)

    run(work())

    assert records[0]["node"] == "b"


def test_code_of_no_node_is_named_by_its_line(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    async def work() -> None:
        async with LoopWatch(metrics, stall_s=0.05, period_s=0.01):
            told()
            await asyncio.sleep(0.02)

    run(work())

    assert (records[0]["graph"], records[0]["node"]) == ("", "")
    assert not {"run_id", "attempt"} & set(records[0])
    assert records[0]["file"] == __file__
    assert metrics["event_loop_stalls_total"].value("", "") == 1


def test_a_callback_of_no_task_is_shown_by_its_stack(
    run: Any, metrics: Metrics, records: Records, told: Callable[[], None]
) -> None:
    async def work() -> None:
        async with LoopWatch(metrics, stall_s=0.05, period_s=0.01):
            asyncio.get_running_loop().call_soon(told)
            await asyncio.sleep(0.02)

    run(work())

    assert records[0]["node"] == ""
    assert records[0]["file"] == __file__
    assert records[0]["line"] in lines_of(told)


async def test_figures_are_there_while_it_is_watched(metrics: Metrics) -> None:
    assert math.isnan(metrics["event_loop_heartbeat_age_seconds"].value())
    async with LoopWatch(metrics, period_s=0.001):
        await a_turn(metrics)

        assert 0 <= metrics["event_loop_heartbeat_age_seconds"].value() < PATIENCE
        assert 0 <= metrics["event_loop_lag_max_seconds"].value() < PATIENCE
        assert metrics["event_loop_tasks"].value() == len(asyncio.all_tasks())
        assert threads("sereno-loopwatch") == 1
    assert math.isnan(metrics["event_loop_heartbeat_age_seconds"].value())
    assert threads("sereno-loopwatch") == 0


async def test_without_a_limit_nobody_watches_and_lag_is_measured(metrics: Metrics) -> None:
    async with LoopWatch(metrics, stall_s=0, period_s=0.001):
        assert threads("sereno-loopwatch") == 0
        await a_turn(metrics)


async def a_turn(metrics: Metrics) -> None:
    while not metrics["event_loop_lag_seconds"].value():  # noqa: ASYNC110
        await asyncio.sleep(0)


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def block() -> None:
    time.sleep(0.1)


def test_a_blocked_loop_is_as_late_as_it_is(run: Any, metrics: Metrics) -> None:
    """Read by another thread meanwhile, as a scrape does."""
    seen: dict[str, float] = {}

    def read() -> None:
        seen["max"] = metrics["event_loop_lag_max_seconds"].value()
        seen["age"] = metrics["event_loop_heartbeat_age_seconds"].value()

    async def work() -> None:
        async with LoopWatch(metrics, stall_s=0, period_s=0.01):
            block()
            reader = threading.Thread(target=read)
            reader.start()
            reader.join()

    run(work())

    assert seen["age"] >= 0.1
    assert seen["max"] >= 0.09


def test_the_process_lives_while_its_loop_turns_and_nobody_gave_up() -> None:
    age = 9.0
    liveness = Liveness(lambda: age)
    assert liveness.checks() == [{"name": "event_loop", "status": "pass", "age_s": 9.0}]

    age = 11.0
    (check,) = liveness.checks()
    assert check["status"] == "fail"
    assert check["output"] == "it has not turned for 11.0 s"

    age = math.nan
    liveness.fail("store", "the file is gone")
    turning, store = liveness.checks()
    assert turning["status"] == "pass"
    assert store == {"name": "store", "status": "fail", "output": "the file is gone"}


def a_live_run(run_id: str, age_s: float, *nodes: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "thread_id": "t",
        "graph": "g",
        "age_s": age_s,
        "silence_s": 1.0,
        "nodes": list(nodes),
    }


def a_live_node(node: str, age_s: float) -> dict[str, Any]:
    return {"node": node, "attempt": 1, "age_s": age_s, "state": "running"}


def test_a_run_that_goes_on_is_recorded_with_its_nodes(metrics: Metrics, records: Records) -> None:
    old = a_live_run("old", 60.0, a_live_node("call", 59.0))
    live = {"runs": [a_live_run("new", 14.9), old]}
    Heartbeats(lambda: live, metrics).beat()

    assert records == [
        {"event": "Run goes on", "event_type": "run.heartbeat", "log_level": "info", **old}
    ]


def test_of_many_runs_and_nodes_the_oldest_are_recorded() -> None:
    nodes = [a_live_node(str(number), float(number)) for number in range(50)]
    runs = [a_live_run(str(number), 100.0 + number, *nodes) for number in range(500)]
    found = list(heartbeat_records({"runs": runs}, most=100))

    assert len(found) == 100
    assert [record["run_id"] for record in found[:2]] == ["499", "498"]
    assert [record.get("runs_not_shown") for record in found] == [None] * 99 + [400]
    assert [node["node"] for node in found[0]["nodes"]] == [str(n) for n in range(49, 29, -1)]
    assert found[0]["nodes_not_shown"] == 30


def test_records_come_while_the_loop_is_blocked(metrics: Metrics, records: Records) -> None:
    live = {"runs": [a_live_run("old", 60.0)]}
    with Heartbeats(lambda: live, metrics, every_s=0.001):
        deadline = time.monotonic() + PATIENCE
        while not records:
            assert time.monotonic() < deadline

    assert records[0]["run_id"] == "old"
    assert threads("sereno-heartbeats") == 0


def test_what_cannot_be_read_is_counted(metrics: Metrics) -> None:
    asked = threading.Event()

    def live() -> Any:
        asked.set()
        raise KeyError("runs")

    with Heartbeats(live, metrics, every_s=0.001):
        assert asked.wait(PATIENCE)
    assert metrics["telemetry_internal_errors_total"].value("loopwatch") >= 1
