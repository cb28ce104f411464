"""Whatever way code is called in a run, its spans are where they belong, and all signals agree.

Each scenario runs through a worker, and in a task of a caller of its own, where LangGraph calls
a node in the caller's context: nothing may stay behind there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, get_current_span
from run_lines import Line, Lines, Server, check_one, check_seen, serving, until
from scenario_graphs import (
    INPUT,
    SCENARIOS,
    SYNC,
    THRICE,
    Probe,
    Scenario,
    call_of,
    node,
    one,
    sync_node,
)
from signals import GAUGES, Signals, Tree, attribute, check_signals, hex_id
from small_graphs import THREE, Failing, Fault, State, beside, chain
from tenacity import AsyncRetrying, Retrying, stop_after_attempt, wait_fixed

from runtime.errors import LeaseLost
from telemetry.contract import classify, error_type
from telemetry.genai import GenAi
from telemetry.langgraph import current_attempt, listen
from telemetry.segments import Segment, Segments
from telemetry.setup import identify
from telemetry.tenacity import open_calls
from telemetry.tracing import Tracing


class Observed(Signals):
    """All signals, as in a server, and a probe."""

    def __init__(self) -> None:
        super().__init__()
        processor = SimpleSpanProcessor(self._exporter)
        self.tracing = Tracing(processors=[processor], enabled=True, identify=identify)
        witness = GenAi(self.tracing, self.metrics)
        self.segments = Segments(self.metrics, self.tracing, witness=witness)
        self._tracer = self.tracing.provider.get_tracer("probe")
        #: Spans that belong to no run.
        self.strangers: set[str] = set()

    def probe(self, name: str) -> None:
        with self._tracer.start_as_current_span(f"probe:{name}"):
            pass

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return [span for span in super().spans if span.name not in self.strangers]


@asynccontextmanager
async def observing(
    observed: Observed, graph: Any, **settings: Any
) -> AsyncIterator[tuple[Server, list[Any]]]:
    """A server of a graph, whose signals are recorded and whose spans have the times of a clock."""
    seen: list[Any] = []
    with listen(seen.append), observed.recording():
        async with serving(graph, signals=observed, clock=time.time, **settings) as server:
            yield server, seen


async def by_a_worker(
    observed: Observed, made: Scenario, *, only_its_own: bool = True
) -> list[Line]:
    """`only_its_own`: nothing is seen in the process that does not belong to the run."""
    all_lines: list[Line] = []
    async with observing(observed, made.graph) as (server, seen):
        for value in made.inputs:
            seen.clear()
            if isinstance(value, Command):
                submitted = await server.submit(None, command={"resume": value.resume})
            else:
                submitted = await server.submit(value)
            if made.cancel_when is not None:
                await until(partial(made.cancel_when, observed.metrics))
                await server.worker.cancel(submitted.run_id, "enough")
            lines = Lines(await server.lines(submitted), list(seen))
            check_one(lines)
            if only_its_own:
                assert not server.worker.fenced_events
                check_seen(lines)
            all_lines += lines.all
    check_signals(observed, all_lines)
    return all_lines


_runs = itertools.count(1)


@contextmanager
def segment_of(observed: Observed) -> Iterator[Segment]:
    """A segment without a worker; whatever it runs must leave the context as it was."""
    segment = observed.segments.begin(
        run_id=f"direct-{next(_runs)}", thread_id="thread", graph="graph", epoch=1, trigger="api"
    )
    segment.claimed(waited_s=None)
    data: dict[str, Any] = {"status": "success"}
    with segment.entered():
        try:
            yield segment
        except asyncio.CancelledError:
            data = {"status": "cancelled"}
        except Exception as exc:
            data = {
                "status": "error",
                "error": {"error_type": error_type(exc), "error_class": classify(exc)},
            }
        assert get_current_span() is segment.span
        assert current_attempt.get() is None
        assert open_calls.get() == ()
    if segment.stopping == "interrupted":
        data = {"status": "interrupted"}
    segment.end(data, had_output=True)


async def by_a_caller(observed: Observed, made: Scenario, *, sync: bool = False) -> None:
    saver = InMemorySaver()
    config = {"configurable": {"thread_id": "thread", "__pregel_checkpointer": saver}}
    before = get_current_span()

    async def drive(value: Any) -> None:
        with segment_of(observed) as segment:
            if sync:
                result = made.graph.invoke(value, config)
            else:
                result = await made.graph.ainvoke(value, config)
            if isinstance(result, dict) and "__interrupt__" in result:
                segment.stopping = "interrupted"

    for value in made.inputs:
        if made.cancel_when is None:
            await drive(value)
            continue
        driven = asyncio.create_task(drive(value))
        await until(partial(made.cancel_when, observed.metrics))
        driven.cancel()
        await driven

    assert get_current_span() is before
    check_nothing_open(observed)


def check_nothing_open(observed: Observed) -> None:
    assert observed.tracing.live() == 0
    for gauge in GAUGES:
        assert not observed.samples(gauge), f"{gauge} did not return to 0"


# What spans say.


def words(span: ReadableSpan) -> str:
    """A span in the words of `scenario_graphs`."""
    kind = span.name.split()[0]
    if span.name.startswith("probe:"):
        said = f". {span.name.removeprefix('probe:')}"
    elif kind == "run":
        said = f"run {attribute(span, 'run.outcome')}"
    elif kind == "node":
        said = f"{span.name} {attribute(span, 'node.outcome')}"
    elif kind == "attempt":
        said = f"{span.name} {attribute(span, 'attempt.number')} "
        said += str(attribute(span, "attempt.outcome"))
    else:
        said = span.name
    failed = (span.attributes or {}).get("error.type")
    assert span.status.status_code is (StatusCode.UNSET if failed is None else StatusCode.ERROR)
    told = [event.attributes["exception.type"] for event in span.events]
    assert [name.rpartition(".")[2] for name in told] == [failed] * len(told)
    return " ".join([said, *([failed + "*" * len(told)] if failed else [])])


def forest(spans: Sequence[ReadableSpan], *, ordered: bool = True) -> list[str]:
    """The trees of all runs, oldest first."""
    tree = Tree(spans)

    def drawn(span: ReadableSpan) -> str:
        children = [child for child in tree.spans if tree.parent(child) is span]
        children.sort(key=lambda child: child.start_time)
        below = [textwrap.indent(drawn(child), "  ") for child in children]
        return "\n".join([words(span), *(below if ordered else sorted(below))])

    roots = [span for span in tree.spans if tree.parent(span) is None]
    return [drawn(span) for span in sorted(roots, key=lambda span: span.start_time)]


def unordered(tree: str) -> str:
    """A tree whose siblings are in the order of their text."""
    blocks: list[list[str]] = []
    head, *lines = tree.strip().splitlines()
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line[0] == " ":
            blocks[-1].append(line)
        else:
            blocks.append([line])
    below = [textwrap.indent(unordered("\n".join(block)), "  ") for block in blocks]
    return "\n".join([head, *sorted(below)])


def check_places(observed: Observed, *, outlives: frozenset[str] = frozenset()) -> None:
    """What holds for the spans of any run."""
    tree = Tree(observed.spans)
    traces: dict[int, str] = {}
    for span in tree.spans:
        run_id = attribute(span, "run.id")
        assert traces.setdefault(span.context.trace_id, run_id) == run_id
        parent = tree.parent(span)
        if span.name.startswith("run "):
            assert span.parent is None
            continue
        assert parent is not None, f"{span.name} is an orphan"
        assert parent.start_time <= span.start_time, f"{span.name} starts before {parent.name}"
        if span.name not in outlives:
            assert span.end_time <= parent.end_time, f"{span.name} ends after {parent.name}"
        kind, around = span.name.split()[0], parent.name.split()[0]
        if kind == "node":
            assert around in ("run", "attempt", "execute_tool")
        elif kind == "attempt" and attribute(span, "attempt.layer") == "node":
            assert around == "node"
        else:
            assert around in ("attempt", "chat", "execute_tool"), f"{span.name} in {parent.name}"
    assert len(set(traces.values())) == len(traces), "a run has two traces"
    check_numbers(tree)


def check_numbers(tree: Tree) -> None:
    """Attempts are numbered from 1, do not overlap, and all but the last say that one follows."""
    operations: dict[Any, list[ReadableSpan]] = {}
    for span in tree.named("attempt"):
        key = attribute(span, "call.id") or span.parent.span_id
        operations.setdefault(key, []).append(span)
    for spans in operations.values():
        spans.sort(key=lambda span: attribute(span, "attempt.number"))
        assert [attribute(span, "attempt.number") for span in spans] == [*range(1, len(spans) + 1)]
        for before, after in itertools.pairwise(spans):
            assert attribute(before, "attempt.will_retry")
            assert attribute(before, "attempt.outcome") == "retried"
            waited = attribute(after, "attempt.wait_before_s")
            assert attribute(before, "attempt.backoff_s") <= waited + 0.001
            gap = (after.start_time - before.end_time) / 1e9
            assert 0 <= gap < waited + 0.1
            assert waited < gap + 0.1
        assert attribute(spans[0], "attempt.wait_before_s") is None
        last = spans[-1]
        # A back-off may be cut short.
        assert attribute(last, "attempt.will_retry") == (
            attribute(last, "attempt.outcome") == "retried"
        )


def check_forest(observed: Observed, made: Scenario) -> None:
    check_places(observed, outlives=made.outlives)
    expected = [tree.strip() for tree in made.trees]
    if not made.ordered:
        expected = [unordered(tree) for tree in expected]
    assert forest(observed.spans, ordered=made.ordered) == expected


def check_records(observed: Observed) -> None:
    """Each failed attempt has a record of its own; the innermost one's shows the exception, which
    is on its span, or on that of a model in it."""
    tree = Tree(observed.spans)
    owners = set()
    for span in tree.spans:
        if span.events:
            attempt: ReadableSpan | None = span
            while attempt is not None and attribute(attempt, "attempt.layer") is None:
                attempt = tree.parent(attempt)
            assert attempt is not None
            owners.add(hex_id(attempt))
    failed = {
        hex_id(span): (
            span.attributes["error.type"],
            hex_id(span) in owners,
            attribute(span, "attempt.layer"),
            attribute(span, "attempt.number"),
        )
        for span in tree.named("attempt")
        if "error.type" in span.attributes
    }
    records = [r for r in observed.records if r.get("event_type") == "attempt.failed"]
    assert len(records) == len(failed)
    assert {
        record["span_id"]: (
            record["error_type"],
            record["exc_info"] is not None,
            record["layer"],
            record["attempt"],
        )
        for record in records
    } == failed
    for record in records:  # of two records about one failure one warns
        assert record["log_level"] == ("info" if record["outcome"] == "retried" else "warning")


every_scenario = pytest.mark.parametrize("name", sorted(SCENARIOS))


@every_scenario
async def test_spans_of_a_workers_run(name: str) -> None:
    observed = Observed()
    made = SCENARIOS[name](observed.probe)

    await by_a_worker(observed, made)

    check_forest(observed, made)
    check_records(observed)


@every_scenario
async def test_spans_in_the_task_of_a_caller(name: str) -> None:
    observed = Observed()
    made = SCENARIOS[name](observed.probe)

    await by_a_caller(observed, made)

    check_forest(observed, made)


@pytest.mark.parametrize("name", sorted(SYNC))
async def test_spans_of_a_synchronous_invoke(name: str) -> None:
    observed = Observed()
    made = SCENARIOS[name](observed.probe)

    await by_a_caller(observed, made, sync=True)

    check_forest(observed, made)


# What retries say of themselves.


def attempts(observed: Observed, layer: str) -> list[ReadableSpan]:
    spans = Tree(observed.spans).attempts(layer)
    return sorted(spans, key=lambda span: span.start_time)


def said(spans: Sequence[ReadableSpan], name: str) -> list[Any]:
    return [attribute(span, f"attempt.{name}") for span in spans]


async def test_attempts_tell_what_their_back_off_was_planned_and_measured() -> None:
    observed = Observed()
    await by_a_worker(observed, SCENARIOS["retried"](observed.probe))

    spans = attempts(observed, "node")
    assert said(spans, "number") == [1, 2, 3]
    assert said(spans, "will_retry") == [True, True, False]
    assert said(spans, "max") == [3, 3, None]
    assert said(spans, "backoff_s") == [0.001, 0.002, None]
    assert said(spans, "jitter_ms") == [0, 0, None]
    first, *waits = said(spans, "wait_before_s")
    assert first is None
    assert waits[0] >= 0.001
    assert waits[1] >= 0.002
    tree = Tree(observed.spans)
    (node,), (segment,) = tree.named("node"), tree.named("run")
    assert attribute(node, "node.attempts") == attribute(segment, "run.attempts") == 3
    slept = attribute(node, "node.backoff_s")
    assert slept == attribute(segment, "run.backoff_s") == pytest.approx(sum(waits), abs=0.05)
    counted = observed.samples("node_backoff_seconds_total")
    assert counted["graph", "F"] == pytest.approx(slept, abs=1e-5)


async def test_the_jitter_is_told_apart_from_the_planned_back_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("langgraph.pregel._retry.random.uniform", lambda low, high: 0.005)
    observed = Observed()
    policy = THREE._replace(jitter=True)
    graph = chain(("F", node(observed.probe, "f", Failing(1)), {"retry_policy": policy}))
    await by_a_worker(observed, Scenario(graph=graph, trees=[]))

    first, second = attempts(observed, "node")
    assert said([first], "backoff_s") == [0.001]
    assert said([first], "jitter_ms") == [1000]
    assert attribute(second, "attempt.wait_before_s") >= 0.006


@pytest.mark.parametrize(
    ("options", "most"), [pytest.param({}, None, id="none"), ({"retry_policy": THREE}, 3)]
)
async def test_an_attempt_tells_the_maximum_of_the_policy_that_matched(
    options: Any, most: int | None
) -> None:
    observed = Observed()
    graph = chain(("F", node(observed.probe, "f", Failing(9)), options))
    await by_a_worker(observed, Scenario(graph=graph, trees=[]))

    last = attempts(observed, "node")[-1]
    assert attribute(last, "attempt.max") == most
    assert attribute(last, "attempt.outcome") == ("failed" if most is None else "exhausted")


async def test_attempts_of_a_call_tell_their_back_off_and_are_one_operation() -> None:
    observed = Observed()
    await by_a_worker(observed, SCENARIOS["decorated"](observed.probe))

    spans = attempts(observed, "call")
    assert said(spans, "number") == [1, 2, 3]
    assert said(spans, "will_retry") == [True, True, False]
    assert said(spans, "backoff_s") == [0.001, 0.001, None]
    assert {attribute(span, "call.name") for span in spans} == {"call"}
    assert len({attribute(span, "call.id") for span in spans}) == 1
    first, *waits = said(spans, "wait_before_s")
    assert first is None
    assert min(waits) >= 0.001
    counted = observed.samples("call_backoff_seconds_total")
    assert counted["graph", "call"] == pytest.approx(sum(waits), abs=0.05)


async def test_an_attempt_that_timed_out_ends_when_that_is_seen() -> None:
    observed = Observed()
    made = SCENARIOS["body_that_outlasts_its_timeout"](observed.probe)
    await by_a_worker(observed, made)

    first, second = attempts(observed, "node")
    (late,) = [span for span in observed.spans if span.name == "probe:late"]
    assert late.parent.span_id == first.context.span_id
    assert first.end_time <= second.start_time <= late.start_time
    assert (first.end_time - first.start_time) / 1e9 >= 0.02
    assert attribute(first, "error.class") == "timeout"


async def test_what_is_unfinished_says_who_sleeps_and_for_how_long() -> None:
    asleep = asyncio.Event()

    async def sleep(_: float) -> None:
        asleep.set()
        await asyncio.Event().wait()

    async def fails() -> None:
        raise Fault

    async def waits() -> None:
        await asyncio.Event().wait()

    async def calls(state: State) -> State:
        again = AsyncRetrying(sleep=sleep, wait=wait_fixed(60), stop=stop_after_attempt(3))
        others = [again.copy()(waits) for _ in range(11)]
        await asyncio.gather(*others, again(fails))
        return {}

    async def fails_itself(state: State) -> State:
        raise Fault

    later = RetryPolicy(initial_interval=60, max_interval=60, jitter=False, retry_on=Fault)
    graph = beside(("A", calls), ("B", fails_itself, {"retry_policy": later}))
    observed = Observed()
    async with observing(observed, graph) as (server, _):
        submitted = await server.submit(INPUT)
        await asleep.wait()
        await server.lines(submitted, until=lambda line: line["type"] == "node.retrying")
        (run,) = observed.segments.live()["runs"]
        await server.worker.cancel(submitted.run_id, "enough")
        await server.lines(submitted)
    nodes = {node.pop("node"): node for node in run["nodes"]}

    assert "calls" not in run
    assert (nodes["A"]["attempt"], nodes["A"]["state"]) == (1, "running")
    assert "retry_in_s" not in nodes["A"]
    first, *others = nodes["A"]["calls"]
    assert 50 < first.pop("retry_in_s") <= 60
    assert first.pop("call").endswith("fails")
    assert first == {"attempt": 2, "state": "retrying"}
    assert [(call["attempt"], call["state"]) for call in others] == [(1, "running")] * 9
    assert nodes["A"]["calls_not_shown"] == 2
    assert (nodes["B"]["attempt"], nodes["B"]["state"]) == (2, "retrying")
    assert 50 < nodes["B"]["retry_in_s"] <= 60
    assert "calls" not in nodes["B"]


@pytest.mark.parametrize(
    ("name", "reason"), [("cancelled", "api"), ("sibling_that_fails", "sibling_failed")]
)
async def test_what_is_cancelled_says_why(name: str, reason: str) -> None:
    observed = Observed()
    await by_a_worker(observed, SCENARIOS[name](observed.probe))

    stopped = [
        span
        for span in observed.spans
        if "cancelled" in (attribute(span, "attempt.outcome"), attribute(span, "node.outcome"))
    ]
    assert stopped
    assert {attribute(span, "cancel.reason") for span in stopped} == {reason}


async def test_a_cancelled_run_has_no_drained_nodes() -> None:
    """A cancel drains as well, for nodes that do not let themselves be cancelled."""
    observed = Observed()
    inside = asyncio.Event()

    async def ignores(state: State) -> State:
        observed.probe("i")
        inside.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return {"log": ["i"]}

    inner = chain(("I", ignores), ("J", node(observed.probe, "j")))
    tree = """
run cancelled
  node SUB cancelled
    attempt SUB 1 cancelled
      node I success
        attempt I 1 success
          . i"""
    made = Scenario(
        graph=chain(("SUB", inner)), trees=[tree], cancel_when=lambda _: inside.is_set()
    )
    await by_a_worker(observed, made, only_its_own=False)

    check_forest(observed, made)


@pytest.mark.parametrize(
    "patient",
    [
        pytest.param(True, id="at the superstep's end"),
        pytest.param(
            False,
            id="at once",
        ),
    ],
)
async def test_what_a_drain_stops_is_drained(patient: bool) -> None:
    """It goes on in another process: no line says that it has ended."""
    observed = Observed()
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def waits(state: State) -> State:
        inside.set()
        await go_on.wait()
        return {"log": ["i"]}

    inner = chain(("I", waits), ("J", node(observed.probe, "j")))
    async with observing(observed, chain(("SUB", inner)), drain_s=20 if patient else 0) as (
        server,
        _,
    ):
        submitted = await server.submit(INPUT)
        await inside.wait()
        draining = asyncio.create_task(server.worker.drain())
        await until(lambda: server.worker.draining)
        if patient:
            go_on.set()
        lines = await server.lines(submitted, until=lambda line: line["type"] == "run.requeued")
        await draining
        check_signals(observed, lines)

    how = "success" if patient else "drained"
    tree = f"""
run drained
  node SUB drained
    attempt SUB 1 cancelled
      node I {how}
        attempt I 1 {how.replace("drained", "cancelled")}"""
    check_forest(observed, Scenario(graph=None, trees=[tree]))
    stopped = [span for span in observed.spans if words(span).endswith(("drained", "cancelled"))]
    assert {attribute(span, "cancel.reason") for span in stopped} == {"shutdown"}


# Code that is not where it was.


async def test_a_thread_of_the_nodes_own_loses_its_context_and_harms_nothing() -> None:
    observed = Observed()
    observed.strangers = {"probe:thread"}
    inner = chain(("I", sync_node(lambda _: None, "i")))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            observed.probe("thread")
            Retrying(**THRICE)(lambda: None)
            inner.invoke({"log": []})
        except BaseException as exc:
            errors.append(exc)

    async def body(state: State) -> State:
        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(thread.join)
        observed.probe("after")
        return {"log": ["f"]}

    made = Scenario(graph=chain(("F", body)), trees=[one("F", ". after")])
    await by_a_worker(observed, made, only_its_own=False)

    assert not errors
    check_forest(observed, made)


async def test_a_task_that_outlives_its_attempt_is_refused() -> None:
    """Its probes still find their place; its calls are of no attempt any more."""
    observed = Observed()
    over, done = asyncio.Event(), asyncio.Event()
    kept: list[asyncio.Task[None]] = []

    async def work() -> None:
        await over.wait()
        observed.probe("late")
        _, call = call_of(lambda _: None)
        await AsyncRetrying(**THRICE)(call)
        done.set()

    async def first(state: State) -> State:
        kept.append(asyncio.create_task(work()))
        return {"log": ["first"]}

    async def second(state: State) -> State:
        over.set()
        await done.wait()
        return {"log": ["second"]}

    made = Scenario(
        graph=chain(("A", first), ("B", second)),
        trees=[
            """
run success
  node A success
    attempt A 1 success
      . late
  node B success
    attempt B 1 success"""
        ],
        outlives=frozenset(["probe:late"]),
    )
    await by_a_worker(observed, made, only_its_own=False)

    await kept[0]
    check_forest(observed, made)


async def test_a_task_that_outlives_its_run_is_refused() -> None:
    observed = Observed()
    inner = chain(("I", node(lambda _: None, "i", Failing(1)), {"retry_policy": THREE}))
    over = asyncio.Event()
    kept: list[asyncio.Task[None]] = []

    async def work() -> None:
        await over.wait()
        _, call = call_of(lambda _: None)
        await AsyncRetrying(**THRICE)(call)
        await inner.ainvoke({"log": []})

    async def body(state: State) -> State:
        kept.append(asyncio.create_task(work()))
        return {"log": ["f"]}

    made = Scenario(graph=chain(("F", body)), trees=[one("F")])
    async with observing(observed, made.graph) as (server, _):
        lines = await server.execute(INPUT)
        over.set()
        with pytest.raises(LeaseLost):
            await kept[0]
        check_one(Lines(lines))
        check_signals(observed, lines)

    check_forest(observed, made)


async def test_a_thread_that_outlives_its_cancelled_run_is_refused() -> None:
    observed = Observed()
    observed.strangers = {"probe:late"}
    inside, over, done = threading.Event(), threading.Event(), threading.Event()

    def body(state: State) -> State:
        inside.set()
        over.wait(20)
        observed.probe("late")
        _, call = call_of(lambda _: None)
        Retrying(**THRICE)(call)
        done.set()
        return {"log": ["f"]}

    tree = """
run cancelled
  node F cancelled
    attempt F 1 cancelled"""
    made = Scenario(graph=chain(("F", body)), trees=[tree])
    async with observing(observed, made.graph) as (server, _):
        submitted = await server.submit(INPUT)
        await until(inside.is_set)
        await server.worker.cancel(submitted.run_id, "enough")
        lines = await server.lines(submitted)
        over.set()
        await until(done.is_set)
        check_one(Lines(lines))
        check_signals(observed, lines)

    check_forest(observed, made)


# Spans of others.


class Stranger:
    """A user's tracer provider, that is not ours."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self._provider.get_tracer("theirs")

    @property
    def span(self) -> ReadableSpan:
        (span,) = self._exporter.get_finished_spans()
        return span


async def test_a_users_own_span_is_below_the_attempt_and_around_what_it_calls() -> None:
    observed, stranger = Observed(), Stranger()
    inner = chain(("I", node(observed.probe, "i")))

    async def body(state: State) -> State:
        with stranger.tracer.start_as_current_span("theirs"):
            observed.probe("inside")
            await inner.ainvoke({"log": []})
        observed.probe("after")
        return {"log": ["f"]}

    async with observing(observed, chain(("F", body))) as (server, _):
        await server.execute(INPUT)

    spans = {span.name: span for span in observed.spans}
    theirs, attempt = stranger.span, spans["attempt F"]
    assert theirs.context.trace_id == attempt.context.trace_id
    assert theirs.parent.span_id == attempt.context.span_id
    assert spans["probe:inside"].parent.span_id == theirs.context.span_id
    assert spans["node I"].parent.span_id == theirs.context.span_id
    assert spans["probe:i"].parent.span_id == spans["attempt I"].context.span_id
    assert spans["probe:after"].parent.span_id == attempt.context.span_id


async def test_a_users_own_trace_does_not_take_the_runs_spans_with_it() -> None:
    observed, stranger = Observed(), Stranger()
    inner = chain(("I", node(observed.probe, "i")))
    acall, _ = call_of(lambda _: None)

    async def body(state: State) -> State:
        with stranger.tracer.start_as_current_span("theirs", context=Context()):
            await inner.ainvoke({"log": []})
            await AsyncRetrying(**THRICE)(acall)
        observed.probe("after")
        return {"log": ["f"]}

    tree = one(
        "F",
        "node I success",
        "  attempt I 1 success",
        "    . i",
        "attempt call 1 retried Fault*",
        "attempt call 2 retried Fault*",
        "attempt call 3 success",
        ". after",
    )
    made = Scenario(graph=chain(("F", body)), trees=[tree])
    await by_a_worker(observed, made)

    assert stranger.span.parent is None
    check_forest(observed, made)


# The caller's context.


async def test_breaking_out_of_a_stream_leaves_nothing_behind() -> None:
    observed = Observed()
    graph = chain(("A", node(observed.probe, "a")), ("B", node(observed.probe, "b")))
    with segment_of(observed):
        async with aclosing(graph.astream(INPUT, stream_mode="tasks")) as parts:
            async for _ in parts:
                break

    check_nothing_open(observed)
    check_places(observed)


async def test_older_event_protocols_leave_nothing_behind() -> None:
    observed = Observed()
    graph = chain(("A", node(observed.probe, "a")), ("B", sync_node(observed.probe, "b")))
    with segment_of(observed):
        async for _ in graph.astream_events(INPUT, version="v2"):
            pass

    check_nothing_open(observed)
    nodes = [span.name for span in observed.spans if span.name.startswith(("node", "attempt"))]
    assert nodes == ["attempt A", "node A", "attempt B", "node B"]


async def test_runs_at_the_same_time_keep_their_spans_apart() -> None:
    observed = Observed()
    together = asyncio.Barrier(8)

    async def meets(state: State) -> State:
        await together.wait()
        observed.probe(f"m{state['x']}")
        await together.wait()
        return {"log": ["m"]}

    flaky = {"retry_policy": THREE}
    graph = chain(("M", meets), ("T", sync_node(observed.probe, "t"), flaky))
    async with observing(observed, graph, runs=8) as (server, _):
        submitted = [
            await server.submit({"x": number, "log": []}, thread=f"t{number}")
            for number in range(8)
        ]
        lines = [await server.lines(run) for run in submitted]

    check_signals(observed, [line for of_one in lines for line in of_one])
    check_places(observed)
    tree = """
run success
  node M success
    attempt M 1 success
      . m{}
  node T success
    attempt T 1 success
      . t"""
    assert sorted(forest(observed.spans)) == [tree.strip().format(n) for n in range(8)]


# Any graph.


#: Those with a number fail, or time out, that often.
leaves = st.one_of(
    st.tuples(st.sampled_from(["async", "sync", "interrupt"]), st.just(0)),
    st.tuples(st.sampled_from(["async", "sync", "call", "sync call", "loop"]), st.integers(0, 4)),
    st.tuples(st.just("slow"), st.integers(1, 3)),
)
shapes = st.sampled_from(["chain", "beside", "fan"])


def graphs(nodes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(shapes, st.lists(nodes, min_size=1, max_size=3))


def visits(bodies: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Of a node with this body, and with or without a retry policy."""
    return st.tuples(bodies, st.booleans())


nested = st.recursive(
    visits(leaves),
    lambda nodes: visits(
        st.tuples(st.sampled_from(["subgraph", "function", "thread"]), graphs(nodes))
    ),
    max_leaves=4,
)


def body_of(probe: Probe, kind: str, what: Any) -> Any:
    """What a node of this kind does."""
    if kind in ("subgraph", "function", "thread"):
        return calling_graph(kind, graph_of(probe, what), probe)
    fault = Failing(what)
    if kind in ("async", "sync"):
        return (node if kind == "async" else sync_node)(probe, kind, fault)

    def work() -> None:
        probe(kind)
        fault()

    async def awork() -> None:
        await asyncio.sleep(0)
        work()

    async def asks(state: State) -> Any:
        probe("before")
        return {"log": [interrupt("question")]}

    async def slow(state: State) -> Any:
        try:
            work()
        except Fault:
            await asyncio.Event().wait()
        return {"log": [kind]}

    async def calls(state: State) -> Any:
        await AsyncRetrying(stop=stop_after_attempt(3), reraise=True)(awork)
        probe("after")
        return {"log": [kind]}

    async def loops(state: State) -> Any:
        async for attempt in AsyncRetrying(stop=stop_after_attempt(3)):
            with attempt:
                await awork()
        return {"log": [kind]}

    def calls_in_a_thread(state: State) -> Any:
        Retrying(stop=stop_after_attempt(3))(work)
        return {"log": [kind]}

    return {
        "interrupt": asks,
        "slow": slow,
        "call": calls,
        "loop": loops,
        "sync call": calls_in_a_thread,
    }[kind]


def calling_graph(kind: str, graph: Any, probe: Probe) -> Any:
    async def outer(state: State) -> Any:
        await graph.ainvoke({"x": 0, "log": []})
        probe("after")
        return {"log": ["outer"]}

    def outer_in_a_thread(state: State) -> Any:
        asyncio.run(graph.ainvoke({"x": 0, "log": []}))
        probe("after")
        return {"log": ["outer"]}

    return {"subgraph": graph, "function": outer, "thread": outer_in_a_thread}[kind]


def graph_of(probe: Probe, spec: Any) -> Any:
    shape, specs = spec
    nodes = []
    for number, ((kind, what), retried) in enumerate(specs):
        options: dict[str, Any] = {"retry_policy": THREE} if retried else {}
        if kind == "slow":
            options["timeout"] = 0.01
        nodes.append((f"N{number}", body_of(probe, kind, what), options))
    if shape == "chain":
        return chain(*nodes)
    if shape == "beside":
        return beside(*nodes)
    builder = StateGraph(State)
    for name, what, options in nodes:
        builder.add_node(name, what, **options)
    builder.add_conditional_edges(
        START, lambda _: [Send(name, {"x": 0, "log": []}) for name, *_ in nodes for _ in "ab"]
    )
    return builder.compile()


@given(spec=graphs(nested), cut=st.none() | st.integers(2, 30))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_all_signals_of_any_graph_agree(spec: Any, cut: int | None) -> None:
    """Whatever it does, and whenever it is cancelled."""
    observed = Observed()

    async def act() -> None:
        lines: list[Line] = []

        async def execute(**request: Any) -> None:
            run = await server.submit(request.pop("input", None), **request)
            if cut is not None:
                await server.lines(run, until=lambda line: line["seq"] >= cut)
                await server.worker.cancel(run.run_id, "enough")
            of_one = await server.lines(run)
            check_one(Lines(of_one))
            lines.extend(of_one)

        async with observing(observed, graph_of(observed.probe, spec)) as (server, _):
            await execute(input=INPUT)
            for _ in range(8):
                if lines[-1]["type"] != "run.interrupted":
                    break
                answers = {one["id"]: "answer" for one in lines[-1]["data"]["interrupts"]}
                await execute(command={"resume": answers})
        check_signals(observed, lines)
        # The body of a cancelled node may go on in its thread.
        check_places(observed, outlives=frozenset(span.name for span in observed.spans))

    asyncio.run(act())
