"""Two hundred runs at once in which everything goes wrong that can: spans, metrics, lines and log
records tell the same of them, and tell all that the contract promises."""

from __future__ import annotations

import asyncio
import io
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind
from run_lines import Lines, check_one
from signals import attribute, check_signals, label

from runtime.engines.memory import MemoryEngine, Store
from runtime.events import TERMINAL_TYPES
from runtime.model import Lease
from telemetry.contract import Profile, check_logs, check_spans
from telemetry.exporting import Exporting
from telemetry.heartbeats import Heartbeats

from .chaos_graphs import graph_file, script
from .harness import NDJSON, Stream
from .observed import Observed, Observer

Line = dict[str, Any]
Words = Mapping[str, Sequence[str]]

SEED = 4
RUNS = 200
#: Runs that have ended when the first server is told to go.
BEFORE_DRAIN = 90


@dataclass(frozen=True)
class Kind:
    """A way for a run to go."""

    graph: str
    #: How it may end.
    ends: frozenset[str]
    script: Callable[[random.Random], Words] = lambda chance: {}
    input: Callable[[random.Random], Any] = lambda chance: {"n": 1}
    #: Cancel it at the first line of this type, or when it is submitted.
    cancel_at: str | None = None
    #: Whether a human answers, once for each question.
    answers: bool = False
    deadline_s: float | None = None
    #: Whether it goes on until the drain, and ends with the second server.
    outlasts: bool = False


def kind(graph: str, ends: str, **more: Any) -> Kind:
    return Kind(graph, frozenset(ends.split()), **more)


def failing(*names: str, fatal: float = 0.0) -> Callable[[random.Random], Words]:
    """Each of these fails up to three times, or for good."""

    def words(chance: random.Random) -> Words:
        found = {name: ["fail"] * chance.choice((0, 0, 0, 1, 1, 2, 3)) for name in names}
        if chance.random() < fatal:
            found[chance.choice(names)].append("fatal")
        return found

    return words


def parked(name: str, word: str = "park") -> Callable[[random.Random], Words]:
    return lambda chance: {name: [word]}


KINDS = (
    kind(
        "retried",
        "success error",
        script=failing("first", "look_up", "calls", "reckon", "calls_in_thread", fatal=0.2),
    ),
    kind("retried", "error", script=lambda chance: {"look_up": ["fail", "fatal"]}),
    kind("retried", "success", script=lambda chance: {"reckon": ["fail", "fail"]}),
    kind("nested", "success error", script=failing("early", "by_function", fatal=0.2)),
    kind(
        "fanned",
        "success error",
        script=failing("work-0", "work-1", "work-2", "work-3", fatal=0.3),
        input=lambda chance: {"n": chance.randint(1, 4)},
    ),
    kind("asks", "success error", script=failing("ask"), answers=True),
    kind("asks", "interrupted"),
    kind(
        "timed",
        "success error",
        script=lambda chance: {"brief": ["park"] * chance.randint(0, 3)},
    ),
    kind("cached", "success", input=lambda chance: {"n": chance.randint(1, 9)}),
    kind("commands", "success error", script=failing("jump")),
    kind(
        "steps",
        "success error",
        script=failing("step-0", "step-1", fatal=0.2),
        input=lambda chance: {"n": chance.randint(0, 3)},
    ),
    kind("speaks", "success error", script=failing("model", "weigh")),
    kind("patient", "cancelled", script=parked("sleeps", "fail"), cancel_at="node.retrying"),
    kind("patient", "cancelled", script=parked("dial", "fail"), cancel_at="call.retrying"),
    kind("held", "cancelled", script=parked("hold"), cancel_at="node.started"),
    kind("held", "cancelled success", cancel_at="run.queued"),
    kind("held", "timeout", script=parked("hold"), deadline_s=0.05),
    kind("held", "success", script=parked("hold"), outlasts=True),
    kind("patient", "success", script=parked("sleeps", "fail"), outlasts=True),
    kind("patient", "success", script=parked("dial", "fail"), outlasts=True),
    kind(
        "fanned",
        "success",
        script=parked("work-1"),
        input=lambda chance: {"n": 3},
        outlasts=True,
    ),
    kind("nested", "success", script=parked("early"), outlasts=True),
)


class Stage:
    """The server of now: clients ask for it, and wait while there is none."""

    def __init__(self) -> None:
        self._server: Observed | None = None
        self._changed = asyncio.Condition()
        #: Threads whose runs wait for the second server.
        self.outlasting: set[str] = set()

    async def enter(self, server: Observed | None) -> None:
        async with self._changed:
            self._server = server
            self._changed.notify_all()

    async def server(self, before: Observed | None = None) -> Observed:
        """The server, another one than that before."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._server not in (None, before))
        assert self._server is not None
        return self._server


@dataclass
class Traffic:
    """What happened, and what was told of it."""

    observer: Observer
    lines: list[Line] = field(default_factory=list)
    graph_of: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    ended: int = 0
    #: How many runs each kind of client went away from, by how it did.
    left: Counter[str] = field(default_factory=Counter)


class Client:
    """Submits one run of a kind, watches it, and does to it what the kind wants."""

    def __init__(self, kind: Kind, number: int, stage: Stage, traffic: Traffic) -> None:
        self._kind = kind
        self._thread = f"thread-{number}"
        self._stage = stage
        self._traffic = traffic
        self._chance = random.Random(f"{SEED} {number}")
        #: Where the last stream was opened.
        self._server: Observed | None = None

    async def run(self) -> None:
        kind = self._kind
        script.tell(self._thread, kind.script(self._chance))
        self._stage.outlasting |= {self._thread} if kind.outlasts else set()
        body = {
            "graph": kind.graph,
            "thread_id": self._thread,
            "input": kind.input(self._chance),
            "stream": self._chance.choice((["updates"], ["messages", "custom"], ["values"])),
        }
        if kind.deadline_s is not None:
            body["deadline_s"] = kind.deadline_s
        status = await self._one("/v1/runs", body)
        while kind.answers and status == "interrupted":
            status = await self._one(f"/v1/threads/{self._thread}/resume", {"resume": "yes"})
        assert status in kind.ends, f"{kind.graph} on {self._thread} ended {status}"
        self._traffic.ended += 1

    async def _one(self, path: str, body: Any) -> str:
        """One run to its end: its status."""
        run_id, stream = await self._submitted(path, body)
        self._traffic.graph_of[run_id] = self._kind.graph
        if self._kind.cancel_at == "run.queued":
            await self._cancel(run_id)
        cancelled = False
        async with aclosing(self._followed(run_id, stream)) as lines:
            async for line in lines:
                if line["type"] == self._kind.cancel_at and not cancelled:
                    cancelled = True
                    await self._cancel(run_id)
                status = line["data"].get("status")
        return str(status)

    async def _submitted(self, path: str, body: Any) -> tuple[str, Stream | None]:
        """The run's id, and its first stream when the client asked for one."""
        headers = NDJSON if self._chance.random() < 0.5 else {}
        while True:
            stream = await self._open("POST", path, json=body, headers=headers)
            await stream.chunk()
            if stream.status == 503:
                await stream.end()
                self._traffic.refused += 1
                await self._stage.server(self._server)
                continue
            assert stream.status in (200, 202), stream.raw
            if stream.status == 200:
                return stream.headers["x-run-id"], stream
            await stream.end()
            return orjson.loads(stream.raw)["run_id"], None

    async def _followed(self, run_id: str, stream: Stream | None) -> AsyncIterator[Line]:
        """The run's stored lines once each, through however many streams it takes."""
        after = 0
        leaves = self._chance.choice(("", "", "disconnect", "break_off"))
        patience = self._chance.randint(1, 8)
        while True:
            if stream is None:
                params = {"after": after, "heartbeat": 0}
                path = f"/v1/runs/{run_id}/stream"
                stream = await self._open("GET", path, params=params)
            over = False
            async for line in self._read(stream):
                if line.get("seq", 0) <= after:
                    continue
                after = line["seq"]
                over = line["type"] in TERMINAL_TYPES
                yield line
                if leaves and after >= patience and not over:
                    self._traffic.left[leaves] += 1
                    getattr(stream, leaves)()
                    break
            if over:
                await stream.over()
                return
            if not leaves or after < patience:  # the server went
                await stream.over()
                await self._stage.server(self._server)
            leaves, stream = "", None

    async def _open(self, method: str, path: str, **more: Any) -> Stream:
        self._server = server = await self._stage.server()
        return await server.open(method, path, **more)

    async def _read(self, stream: Stream) -> AsyncIterator[Line]:
        """What a stream delivers, what was read of it already included."""
        seen = 0
        while True:
            *whole, _ = stream.raw.split(b"\n")
            for body in whole[seen:]:
                yield orjson.loads(body)
            seen = len(whole)
            if await stream.chunk() is None:
                return

    async def _cancel(self, run_id: str) -> None:
        server = await self._stage.server()
        answer = await server.post(f"/v1/runs/{run_id}/cancel", {"reason": "enough"})
        assert answer.status in (200, 202), answer.body


async def chaos(folder: Path) -> Traffic:
    """All runs at once; in the middle the server drains, and another one goes on."""
    observer, stage = Observer(), Stage()
    traffic = Traffic(observer)
    source = graph_file(folder)
    store = Store()
    settings: dict[str, Any] = {
        "slots": RUNS,
        "executor_threads": 8,
        "heartbeat_s": 0.05,
        "token_ms": 0,
    }
    kinds = [KINDS[number % len(KINDS)] for number in range(RUNS)]
    with observer.logging():
        async with asyncio.TaskGroup() as clients:
            engine = MemoryEngine(store=store)
            async with observer.serving(source, store=engine, **settings) as server:
                await stage.enter(server)
                for number, kind in enumerate(kinds):
                    clients.create_task(Client(kind, number, stage, traffic).run())
                while traffic.ended < BEFORE_DRAIN:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                await server.worker.drain()
                await stage.enter(None)
                await server.quiet()
            for thread_id in stage.outlasting:
                script.forget(thread_id)
            engine = MemoryEngine(store=store)
            async with observer.serving(source, store=engine, **settings) as server:
                await stage.enter(server)
                while traffic.ended < RUNS:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                await server.quiet()
                for run_id in traffic.graph_of:
                    stored = await server.engine.read(run_id, 0)
                    traffic.lines += [orjson.loads(line.body) for line in stored]
    return traffic


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    return asyncio.run(chaos(tmp_path_factory.mktemp("chaos")))


class OfRuns:
    """What was told of runs: the spans of requests and of checkpoints are left out."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.samples, self.live = observer.samples, observer.live
        self.spans: Sequence[ReadableSpan] = [
            span
            for span in observer.spans
            if span.kind is not SpanKind.SERVER and not span.name.startswith("checkpoint ")
        ]
        self.records = [{**r, "event_type": r.get("event")} for r in observer.records]


def test_all_signals_agree_on_two_hundred_chaotic_runs(traffic: Traffic) -> None:
    told, lines = OfRuns(traffic.observer), traffic.lines
    for run_id in traffic.graph_of:
        check_one(Lines([line for line in lines if line["run_id"] == run_id]))

    check_signals(told, lines, graph_of=traffic.graph_of)
    check_cut_short(told, lines, traffic.graph_of)


def check_cut_short(told: OfRuns, lines: Sequence[Line], graph_of: Mapping[str, str]) -> None:
    """E3: a retry is a back-off that was not cut short."""
    follows = {
        (x["run_id"], x["epoch"], x["task"], x["attempt"]) for x in of(lines, "node.started")
    }
    slept_through: Counter[tuple[str, str]] = Counter()
    cut_short = 0
    for x in of(lines, "node.retrying"):
        if (x["run_id"], x["epoch"], x["task"], x["attempt"] + 1) in follows:
            slept_through[graph_of[x["run_id"]], label(x)] += 1
        else:
            cut_short += 1
    retries: Counter[tuple[str, str]] = Counter()
    for (graph, node, attempt, _), count in told.samples("node_attempts_total").items():
        if attempt == "retry":
            retries[graph, node] += int(count)

    assert cut_short >= 5, "chaos was too gentle"
    assert retries == slept_through


def test_it_was_chaos(traffic: Traffic) -> None:
    """Whatever the other tests are about did happen."""
    observer, lines = traffic.observer, traffic.lines
    runs = observer.samples("runs_finished_total")
    attempts = observer.samples("node_attempts_total")
    calls = observer.samples("call_attempts_total")
    types = Counter(line["type"] for line in lines)

    assert len(traffic.graph_of) >= RUNS
    assert {outcome for _, outcome in runs} == {
        "success", "error", "timeout", "interrupted", "cancelled"
    }  # fmt: skip
    assert {outcome for *_, outcome in attempts} >= {
        "success", "retried", "exhausted", "failed", "interrupted", "cancelled"
    }  # fmt: skip
    assert {outcome for *_, outcome in calls} >= {
        "success", "retried", "exhausted", "failed", "interrupted"
    }  # fmt: skip
    assert types["run.requeued"] == types["run.recovered"] >= 30
    assert {node.count("/") for _, node, *_ in attempts} >= {0, 1}
    assert {"timeout", "other"} <= {
        error for *_, error in observer.samples("node_attempt_failures_total")
    }
    assert observer.samples("nodes_cached_total")["cached", "dear"] >= 5
    assert min(traffic.left[how] for how in ("disconnect", "break_off")) >= 20


def test_requests_agree_too(traffic: Traffic) -> None:
    observer = traffic.observer
    requests = sum(observer.requests.values())
    spans = [span for span in observer.spans if span.kind is SpanKind.SERVER]
    opened, closed = observer.events("stream.opened"), observer.events("stream.closed")
    reasons = Counter(record["reason"] for record in closed)
    unary = sum(observer.samples("http_request_duration_seconds_count").values())

    assert len(spans) == requests == len(closed) + unary
    assert len(opened) == len(closed)
    assert set(reasons) == {"complete", "client_disconnect", "server_shutdown"}
    assert reasons == summed(observer, "streams_closed_total", 0)
    assert reasons == Counter(
        reason for span in spans if (reason := attribute(span, "stream.close_reason"))
    )
    assert sum(record["events"] for record in closed) == sum(
        count
        for (type,), count in observer.samples("stream_events_total").items()
        if type not in ("caught_up", "heartbeat")
    )
    assert sum(record["bytes"] for record in closed) == sum(
        observer.samples("stream_bytes_total").values()
    )
    assert sum(observer.samples("runs_rejected_total").values()) == traffic.refused
    for gauge in ("streams_active", "http_active_requests"):
        assert not observer.samples(gauge)


# The contract.


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Observer]:
    """What two hundred runs do not do, or not for sure, each once."""

    async def all_of_them() -> Sequence[Observer]:
        return [
            await rare_things(tmp_path_factory.mktemp("rare")),
            await a_lost_lease(tmp_path_factory.mktemp("lost")),
            await a_blocked_log(tmp_path_factory.mktemp("blocked")),
        ]

    return asyncio.run(all_of_them())


class Recovering(SpanExporter):
    """Fails once."""

    def __init__(self) -> None:
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        first, self._failed = not self._failed, True
        return SpanExportResult.FAILURE if first else SpanExportResult.SUCCESS


class Broken(SpanProcessor):
    """Somebody's processor, which fails at its first span."""

    def __init__(self) -> None:
        self._failed = False

    def on_end(self, span: ReadableSpan) -> None:
        if not self._failed:
            self._failed = True
            raise RuntimeError("a mistake of somebody's")


async def rare_things(folder: Path) -> Observer:
    observer = Observer()
    settings = {
        "engine": f"sqlite:///{folder}/runs.db",
        "write_timeout_s": 0.05,
        "loop_stall_s": 0.05,
        "metrics_max_series": 2,
        "cancel_grace_s": 0.2,
    }
    with observer.logging():
        async with observer.serving(graph_file(folder), **settings) as server:
            telemetry = server.telemetry
            exporting = Exporting(Recovering(), telemetry.selfwatch)
            telemetry.tracing.add(exporting)
            telemetry.tracing.add(Broken())
            # Every checkpoint is slow, and a run has room for few spans.
            telemetry.storage._slow_s = 0.0
            telemetry.tracing._spans._budget = 30

            run_id = await server.ended("odd", {"n": 1})
            for _ in range(2):
                assert exporting.force_flush()
                await server.ended("fanned", {"n": 20})
            async with server.stream("GET", f"/v1/runs/{run_id}/stream", window=1) as stream:
                await stream.over()

            script.tell("held", {"hold": ["park"]})
            run_id = await server.start("held", {"n": 1}, thread_id="held")
            await begun(server, run_id, "node.started")
            Heartbeats(telemetry.segments.live, telemetry.metrics, every_s=0.0).beat()
            script.release("held")
            await server.wait(run_id)

            for path in ("/livez", "/metrics", "/nowhere"):
                await server.get(path)
            await server.worker.drain()
            refused = await server.post("/v1/runs", {"graph": "held", "input": {}})
            assert refused.status == 503
    return observer


async def a_lost_lease(folder: Path) -> Observer:
    """One server is given up for dead, and another takes its run; then the first one comes back."""
    observer, store = Observer(), Store()
    source = graph_file(folder)
    late = MemoryEngine(store=store, clock=lambda: time.time() + 3600)
    with observer.logging():
        engine = MemoryEngine(store=store)
        async with observer.serving(source, store=engine, lease_heartbeat_s=3600.0) as server:
            script.tell("lost", {"hold": ["park"]})
            run_id = await server.start("held", {"n": 1}, thread_id="lost")
            await begun(server, run_id, "node.started")
            lease = Lease(run_id=run_id, thread_id="lost", epoch=1, owner=server.worker.owner)
            async with observer.serving(source, store=late) as other:
                assert (await other.wait(run_id))["status"] == "success"
            server.engine.renew([lease], 30.0)  # as the heartbeat does
            script.release("lost")
            while server.telemetry.segments.open:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    return observer


class Stuck(io.BytesIO):
    """An output that nobody reads from, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def write(self, lines: Any) -> int:
        self.reached.set()
        self.go.wait(10)
        return super().write(lines)


async def a_blocked_log(folder: Path) -> Observer:
    output = Stuck()
    observer = Observer(output)
    with observer.logging(queue_max=1):
        async with observer.serving(graph_file(folder)) as server:
            await server.ended("held", {"n": 1})
            assert output.reached.wait(10)
            await server.ended("held", {"n": 1})
            output.go.set()
    return observer


async def begun(server: Observed, run_id: str, type: str) -> None:
    """Wait for a run's first line of a type."""
    async with server.stream("GET", f"/v1/runs/{run_id}/stream") as stream:
        await stream.until(type)


#: What no step moves, and why.
NEVER: Mapping[str, str] = {}


@pytest.mark.parametrize("profile", get_args(Profile))
def test_metrics_keep_the_contract(
    traffic: Traffic, steps: Sequence[Observer], profile: Profile
) -> None:
    """Nothing undeclared was counted, and all that is declared was."""
    found = [v[profile] for observer in (traffic.observer, *steps) for v in observer.verdicts]

    assert both_ways(found) == set(NEVER)


@pytest.mark.parametrize("profile", get_args(Profile))
def test_spans_keep_the_contract(
    traffic: Traffic, steps: Sequence[Observer], profile: Profile
) -> None:
    spans = [span for observer in (traffic.observer, *steps) for span in observer.spans]

    assert check_spans(spans, profile) == []


def test_records_keep_the_contract(traffic: Traffic, steps: Sequence[Observer]) -> None:
    records = [record for observer in (traffic.observer, *steps) for record in observer.records]

    assert check_logs(records) == []


def both_ways(verdicts: Sequence[Sequence[str]]) -> set[str]:
    """What was beyond the contract anywhere, and what moved nowhere."""
    never = set.intersection(*({x for x in v if x.startswith("never ")} for v in verdicts))
    return never | {x for v in verdicts for x in v if not x.startswith("never ")}


def of(lines: Iterable[Line], type: str) -> list[Line]:
    return [line for line in lines if line["type"] == type]


def summed(observer: Observer, name: str, position: int) -> Counter[str]:
    """A family's samples, added up over all labels but one."""
    found: Counter[str] = Counter()
    for labels, count in observer.samples(name).items():
        found[labels[position]] += int(count)
    return found
