"""Looks at a running Sereno from outside: its API, and what arrives of its telemetry elsewhere.

It runs in compose.smoke.yml and nowhere else, in a container of Sereno's own image. It knows the
runtime by port 8009, Prometheus by its API, and the collector by the files that it writes; of the
code it imports the telemetry contract, as the list of what was promised.

Each check says one line, `ok` or `FAIL`, and all are made, whatever fails. The exit code is 1 when
any failed. With names as arguments it makes only the checks that have them.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from telemetry import contract

API = os.environ.get("SMOKE_API", "http://runtime:8009")
PROMETHEUS = os.environ.get("SMOKE_PROMETHEUS", "http://prometheus:9090")
#: What the runtime wrote to stdout, and what the collector exported.
SEEN = Path(os.environ.get("SMOKE_SEEN", "/seen"))
#: Seconds that anything may take to arrive elsewhere.
PATIENCE_S = float(os.environ.get("SMOKE_PATIENCE_S", "30"))
NDJSON = "application/x-ndjson"

TERMINAL = {"run.completed", "run.failed", "run.cancelled", "run.timed_out", "run.interrupted"}
#: Node lines that end an attempt, and the outcome of it.
ENDS = {"node.completed": "success", "node.retrying": "retried", "node.interrupted": "interrupted"}
#: Lines that are log records of the same name; `node.started` is one at DEBUG.
LOGGED = {event.name for event in contract.LOG_EVENTS if event.level != "DEBUG"}
TS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

T = TypeVar("T")
#: A metric's name, without the prefix, and its labels in the order of their names.
Series = tuple[str, tuple[tuple[str, str], ...]]


class Wrong(Exception):
    """Why a check fails."""


def need(fact: object, otherwise: str) -> None:
    if not fact:
        raise Wrong(otherwise)


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(url: str, body: object = None, **headers: str) -> Answer:
    """One request: a POST when there is a body. HTTP errors raise."""
    with urlopen(_request(url, body, headers), timeout=PATIENCE_S) as reply:
        return Answer(status=reply.status, headers=dict(reply.headers), body=reply.read())


def _request(url: str, body: object, headers: Mapping[str, str]) -> Request:
    data = None if body is None else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(url, data, {"Content-Type": "application/json", **given})


def until(probe: Callable[[], T], seconds: float = PATIENCE_S) -> T:
    """What `probe` returns as soon as it does not raise Wrong; its last Wrong when time is up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return probe()
        except (Wrong, OSError):
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What was read of a run."""

    headers: Mapping[str, str]
    #: As they came, each with its newline.
    raw: Sequence[bytes]
    lines: Sequence[Mapping[str, Any]]

    @property
    def stored(self) -> list[Mapping[str, Any]]:
        return [line for line in self.lines if "seq" in line]

    @property
    def run_id(self) -> str:
        return self.headers["x-run-id"]

    @property
    def trace_id(self) -> str:
        return self.headers["x-trace-id"]

    def of(self, *types: str) -> list[Mapping[str, Any]]:
        return [line for line in self.lines if line["type"] in types]


def stream(path: str, body: object = None, *, up_to: str = "") -> Stream:
    """Read a stream to its end, or hang up after the first line of a type."""
    raw: list[bytes] = []
    lines: list[Mapping[str, Any]] = []
    headers = {"Accept": NDJSON}
    with urlopen(_request(API + path, body, headers), timeout=PATIENCE_S) as reply:
        for line in reply:
            raw.append(line)
            lines.append(json.loads(line))
            if lines[-1]["type"] == up_to:
                break
        got = {name.lower(): value for name, value in reply.headers.items()}
    return Stream(headers=got, raw=raw, lines=lines)


def metrics() -> dict[Series, float]:
    """All samples of our metrics, as the API shows them."""
    samples = {}
    for line in ask(f"{API}/metrics").body.decode().splitlines():
        if line.startswith(contract.PREFIX) and (found := SAMPLE.fullmatch(line)):
            name, labels, value = found.groups()
            key = (name.removeprefix(contract.PREFIX), tuple(sorted(LABEL.findall(labels or ""))))
            samples[key] = float(value)
    return samples


def query(promql: str) -> float:
    """The one value of a Prometheus query."""
    reply = ask(f"{PROMETHEUS}/api/v1/query?{urlencode({'query': promql})}").json()
    result = reply["data"]["result"]
    need(len(result) == 1, f"Prometheus has {len(result)} series for {promql}")
    return float(result[0]["value"][1])


def written(name: str) -> Iterator[Any]:
    """The JSON lines of a file, but the one that is still being written."""
    with suppress(FileNotFoundError):
        for line in (SEEN / name).read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A span or a log record that the collector passed on."""

    trace_id: str
    span_id: str
    parent_id: str
    #: Of a span its name, of a record its event.
    name: str
    attributes: Mapping[str, str]
    resource: Mapping[str, str]


def exported(file: str, batches: str, scopes: str, things: str) -> list[Exported]:
    return [
        Exported(
            trace_id=thing.get("traceId", ""),
            span_id=thing.get("spanId", ""),
            parent_id=thing.get("parentSpanId", ""),
            name=thing.get("name") or thing.get("eventName", ""),
            attributes=_attributes(thing),
            resource=_attributes(batch.get("resource", {})),
        )
        for line in written(file)
        for batch in line.get(batches, ())
        for scope in batch.get(scopes, ())
        for thing in scope.get(things, ())
    ]


def spans() -> list[Exported]:
    return exported("traces.jsonl", "resourceSpans", "scopeSpans", "spans")


def records() -> list[Exported]:
    return exported("logs.jsonl", "resourceLogs", "scopeLogs", "logRecords")


def _attributes(thing: Mapping[str, Any]) -> dict[str, str]:
    pairs = ((pair["key"], pair["value"]) for pair in thing.get("attributes", ()))
    return {key: str(next(iter(value.values()), "")) for key, value in pairs}


# --- what is looked at ----------------------------------------------------------------------------


class Scene:
    """The runs that several checks speak of; each begins with the first check that asks for it."""

    def __init__(self) -> None:
        self.before = metrics()

    @cached_property
    def research(self) -> Stream:
        """A node that its own policy retries twice, a subgraph, tokens; ends with a question."""
        question = {"question": "How do fallo and error end?"}
        body = {"graph": "research", "input": question, "thread_id": "smoke-research"}
        return stream("/v1/runs", body)

    @cached_property
    def screening(self) -> Stream:
        """Calls that tenacity retries; ends with success."""
        return stream("/v1/runs", {"graph": "screening", "input": {}, "thread_id": "smoke-calls"})

    @property
    def both(self) -> dict[str, Stream]:
        return {"research": self.research, "screening": self.screening}


CHECKS: dict[str, tuple[str, Callable[[Scene], None]]] = {}


def check(says: str) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Make a check of a function, which raises when something is wrong. They run in this order."""

    def add(made: Callable[[Scene], None]) -> Callable[[Scene], None]:
        CHECKS[made.__name__] = (says, made)
        return made

    return add


@check('/health says {"status": "ok", "ts": <now>}, and a second later another now')
def health(_: Scene) -> None:
    seen = []
    for _second in range(2):
        said = ask(f"{API}/health").json()
        need(set(said) == {"status", "ts"}, f"it says {said}")
        need(said["status"] == "ok", f"the status is {said['status']!r}")
        need(type(said["ts"]) is int, f"ts is {said['ts']!r}")
        need(abs(said["ts"] - time.time()) < 5, f"ts is {time.time() - said['ts']:.0f} s old")
        seen.append(said["ts"])
        time.sleep(1.1)
    need(seen[1] > seen[0], f"ts stood still at {seen[0]}")


@check("/ready passes every check")
def ready(_: Scene) -> None:
    said = ask(f"{API}/ready").json()
    failing = [one["name"] for one in said["checks"] if one["status"] != "pass"]
    need(said["status"] == "pass" and not failing, f"it says {said['status']}, failing: {failing}")
    need({"started", "storage", "graphs"} <= {one["name"] for one in said["checks"]}, f"{said}")


@check("every declared metric is there from the start, and no other")
def declared(_: Scene) -> None:
    types = dict(
        re.findall(r"^# TYPE (sereno_\w+) (\w+)$", ask(f"{API}/metrics").body.decode(), re.M)
    )
    promised = {
        contract.PREFIX + metric.name: {"info": "gauge"}.get(metric.type, metric.type)
        for metric in contract.METRICS
    }
    need(promised.keys() <= types.keys(), f"missing: {sorted(promised.keys() - types.keys())}")
    created = {name for name in types if name.endswith("_created")}
    beyond = types.keys() - promised.keys() - created
    need(not beyond, f"undeclared: {sorted(beyond)}")
    wrong = {name: types[name] for name, type_ in promised.items() if types[name] != type_}
    need(not wrong, f"of another type: {wrong}")


@check("a stream has its first line, node lines, retry lines and one terminal line")
def streams(scene: Scene) -> None:
    for graph, run in scene.both.items():
        kind = run.headers["content-type"]
        need(kind == f"{NDJSON}; charset=utf-8", f"{graph}: its content type is {kind}")
        seqs = [line["seq"] for line in run.stored]
        need(seqs == list(range(1, len(seqs) + 1)), f"{graph}: seq has gaps: {seqs}")
        first = run.lines[0]["type"]
        need(first == "run.queued", f"{graph}: the first line is {first}")
        started, completed = run.of("node.started"), run.of("node.completed")
        need(started and completed, f"{graph}: it has no node lines")
        terminal = [line["type"] for line in run.lines if line["type"] in TERMINAL]
        need(len(terminal) == 1, f"{graph}: its terminal lines are {terminal}")
        need(run.lines[-1]["type"] == terminal[0], f"{graph}: something follows {terminal[0]}")
    retries = [(line["node"], line["attempt"]) for line in scene.research.of("node.retrying")]
    need(retries == [("fetch_sources", 1), ("fetch_sources", 2)], f"node.retrying: {retries}")
    calls = Counter(line["data"]["call"] for line in scene.screening.of("call.retrying"))
    need(calls == {"outside.Calendar.book": 3, "outside.Mail.send": 1}, f"call.retrying: {calls}")
    ends = [run.lines[-1]["type"] for run in scene.both.values()]
    need(ends == ["run.interrupted", "run.completed"], f"they end with {ends}")


@check("metrics moved by exactly what the lines say")
def deltas(scene: Scene) -> None:
    wanted = expected(scene.both)
    names = {name for name, _ in wanted}

    def agree() -> None:
        now = metrics()
        moved = {key: now[key] - scene.before.get(key, 0) for key in now}
        got = {key: by for key, by in moved.items() if key[0] in names and by}
        wrong = {key for key in wanted.keys() | got.keys() if got.get(key, 0) != wanted.get(key, 0)}
        need(not wrong, "; ".join(_differs(key, wanted, got) for key in sorted(wrong)[:5]))
        losses = {name for (name, _), by in moved.items() if by and name in MUST_STAY}
        lost = {key: by for key, by in moved.items() if by and key in SPANS_LOST}
        need(not losses and not lost, f"these moved: {sorted(losses)} {lost}")
        held = {name for (name, _), value in now.items() if name in MUST_REST and value}
        need(not held, f"with no run active these are not 0: {sorted(held)}")

    until(agree)


#: Counters that nothing here may move, and gauges that come back to 0.
MUST_STAY = {
    *("run_errors_total", "runs_rejected_total", "runs_lost_total", "runs_recovered_total"),
    *("http_aborted_total", "encoder_fallbacks_total", "lease_renew_failures_total"),
    *("fenced_writes_total", "telemetry_log_dropped_total", "metric_series_dropped_total"),
    "telemetry_internal_errors_total",
}
MUST_REST = {
    *("runs_active", "nodes_active", "node_retries_sleeping", "call_retries_sleeping"),
    *("streams_active", "queue_depth", "telemetry_live_spans"),
}
SPANS_LOST = {
    ("telemetry_spans_total", (("result", result),))
    for result in ("failed", "dropped_queue_full", "dropped_budget")
}


def expected(runs: Mapping[str, Stream]) -> Counter[Series]:
    """What the lines of these runs must have added to metrics."""
    wanted: Counter[Series] = Counter()

    def add(name: str, *, by: int = 1, **labels: str) -> None:
        wanted[name, tuple(sorted(labels.items()))] += by

    for graph, run in runs.items():
        add("runs_started_total", graph=graph, trigger="api")
        status = run.lines[-1]["data"].get("status", "unknown")
        add("runs_finished_total", graph=graph, outcome=status)
        add("run_duration_seconds_count", graph=graph, outcome=status)
        add("run_first_output_seconds_count", graph=graph)
        add("streams_closed_total", reason="complete")
        add("stream_bytes_total", by=sum(map(len, run.raw)), kind="origin")
        for line in run.lines:
            data, type_ = line["data"], line["type"]
            add("stream_events_total", type=type_)
            node = "/".join([*line.get("ns", ()), line.get("node", "")])
            if outcome := ENDS.get(type_):
                at = "first" if line["attempt"] == 1 else "retry"
                add("node_attempts_total", graph=graph, node=node, attempt=at, outcome=outcome)
                add("node_attempt_duration_seconds_count", graph=graph, node=node)
                if type_ != "node.retrying":
                    add("node_duration_seconds_count", graph=graph, node=node)
            if type_ == "node.retrying":
                error = data["error_class"]
                add("node_attempt_failures_total", graph=graph, node=node, error_class=error)
            if type_ == "call.retrying":
                call, error = data["call"], data["error_class"]
                add("call_attempt_failures_total", graph=graph, call=call, error_class=error)
    return wanted


def _differs(key: Series, wanted: Mapping[Series, float], got: Mapping[Series, float]) -> str:
    labels = ",".join(f"{name}={value}" for name, value in key[1])
    return f"{key[0]}{{{labels}}} by {got.get(key, 0):g} and not {wanted.get(key, 0):g}"


@check("a run without a reader goes to its end, and its result can be asked for")
def run(_: Scene) -> None:
    answer = ask(f"{API}/v1/runs", {"graph": "screening", "input": {}})
    need(answer.status == 202, f"the answer is {answer.status}")
    headers = {name.lower(): value for name, value in answer.headers.items()}
    result = ask(f"{API}{headers['location']}/wait?timeout=30").json()
    need(result["status"] == "success", f"it ended with {result['status']}")


@check("a stream that is cut in the middle goes on from its cursor, byte for byte")
def resume(_: Scene) -> None:
    body = {"graph": "screening", "input": {}}
    head = stream("/v1/runs", body, up_to="node.completed")
    state = ask(f"{API}/v1/runs/{head.run_id}").json()["status"]
    need(state == "running", f"the run was {state} already when the stream was cut")
    cursor = head.stored[-1]["seq"]
    tail = stream(f"/v1/runs/{head.run_id}/stream?after={cursor}")
    whole = stream(f"/v1/runs/{head.run_id}/stream")
    need(tail.lines[-1]["type"] in TERMINAL, f"the tail ends with {tail.lines[-1]['type']}")
    need(_stored(head) + _stored(tail) == _stored(whole), "head and tail are not the whole")


def _stored(read: Stream) -> list[bytes]:
    return [raw for raw, line in zip(read.raw, read.lines, strict=True) if "seq" in line]


@check("an answer to the question lets the thread go on to success")
def answered(scene: Scene) -> None:
    need(scene.research.lines[-1]["type"] == "run.interrupted", "nobody was asked")
    after = stream("/v1/threads/smoke-research/resume", {"resume": {"approve": True}})
    need(after.lines[-1]["type"] == "run.completed", f"it ends with {after.lines[-1]['type']}")


@check("GET /api/stream starts a task and ends with a final line")
def task(_: Scene) -> None:
    read = stream("/api/stream?thread_id=smoke-task&graph=screening")
    last = read.lines[-1]
    need(last["type"] == "final" and last["ok"] is True, f"it ends with {last['type']}")
    need([line for line in read.lines if line["type"] == "snapshot"], "it has no snapshots")


@check("a chat streams, calls its tools, and is told of by metrics and spans")
def chat(_: Scene) -> None:
    before = metrics()
    question = {"role": "user", "content": "Where is the parcel of 1002, and what is 3 * 19.95?"}
    run = stream("/v1/runs", {"graph": "assistant", "input": {"messages": [question]}})
    need(run.lines[-1]["type"] == "run.completed", f"it ends with {run.lines[-1]['type']}")
    need(run.of("token"), "it has no token lines")
    said = [line["data"] for line in run.of("message") if line["data"]["role"] == "ai"]
    tools = [call["name"] for message in said for call in message.get("tool_calls", ())]
    need(sorted(tools) == ["calculate", "track_parcel"], f"the tools are {tools}")

    model = (("model", "stand-in"), ("provider", "openai"))
    wanted: dict[Series, float] = {("llm_duration_seconds_count", model): len(said)}
    wanted["llm_first_chunk_seconds_count", model] = len(said)
    for direction in ("input", "output"):
        labels = (("direction", direction), *model, ("result", "kept"))
        spent = sum(message["usage"][f"{direction}_tokens"] for message in said)
        wanted["llm_tokens_total", labels] = spent
    for tool in tools:
        labels = (("graph", "assistant"), ("outcome", "success"), ("tool", tool))
        wanted["tool_duration_seconds_count", labels] = 1

    def told() -> None:
        now = metrics()
        got = {key: now.get(key, 0) - before.get(key, 0) for key in wanted}
        wrong = [_differs(key, wanted, got) for key in wanted if got[key] != wanted[key]]
        need(not wrong, "; ".join(wrong))
        of_run = [one for one in spans() if one.trace_id == run.trace_id]
        chats = [one for one in of_run if one.attributes.get("gen_ai.operation.name") == "chat"]
        models = [one.attributes.get("gen_ai.response.model") for one in chats]
        need(models == ["stand-in"] * len(said), f"the chat spans are of {models}")

    until(told)


@check("the collector exported every span of the runs, in one trace each")
def traces(scene: Scene) -> None:
    def arrived(graph: str, run: Stream) -> None:
        of_trace = {one.span_id: one for one in spans() if one.trace_id == run.trace_id}
        need(of_trace, f"{graph}: nothing of trace {run.trace_id}")
        missing = {line["span_id"] for line in run.stored} - of_trace.keys()
        need(not missing, f"{graph}: {len(missing)} spans that lines name are missing")
        roots = [one.name for one in of_trace.values() if one.parent_id not in of_trace]
        need(roots == ["POST /v1/runs"], f"{graph}: the roots are {roots}")
        segments = [one.attributes for one in of_trace.values() if one.name == f"run {graph}"]
        ids = [attributes["sereno.run.id"] for attributes in segments]
        need(ids == [run.run_id], f"{graph}: its segments are of {ids}")
        tried = [one for one in of_trace.values() if _layer(one) == "node"]
        started = len(run.of("node.started"))
        need(len(tried) == started, f"{graph}: {len(tried)} attempts, {started} node.started lines")
        of_calls = [one for one in of_trace.values() if _layer(one) == "call"]
        retried = [one for one in of_calls if one.attributes["sereno.attempt.outcome"] == "retried"]
        calls = len(run.of("call.retrying"))
        need(len(retried) == calls, f"{graph}: {len(retried)} retried calls, {calls} lines")
        service = {one.resource.get("service.name") for one in of_trace.values()}
        need(service == {"sereno"}, f"{graph}: the spans are of {service}")

    for graph, run in scene.both.items():
        until(partial(arrived, graph, run))


def _layer(span: Exported) -> str:
    return span.attributes.get("sereno.attempt.layer", "")


@check("every line of stdout is a JSON record that begins with ts, level, name, msg")
def stdout(_: Scene) -> None:
    lines = list(written("stdout.jsonl"))
    need(lines, "stdout is empty")
    for line in lines:
        need(list(line)[:4] == ["ts", "level", "name", "msg"], f"one begins with {list(line)[:4]}")
        need(TS.fullmatch(line["ts"]), f"a ts is {line['ts']!r}")
    beyond = [said for said in contract.check_logs(lines) if not said.startswith("never seen")]
    need(not beyond, "; ".join(beyond[:5]))


@check("every line of the runs is a log record with the same trace and span, on stdout and by OTLP")
def logs(scene: Scene) -> None:
    def agree() -> None:
        keys = ("event", "run_id", "trace_id", "span_id")
        said = Counter(tuple(line.get(key) for key in keys) for line in written("stdout.jsonl"))
        sent: Counter[tuple[Any, ...]] = Counter(
            (one.name, one.attributes.get("run_id"), one.trace_id, one.span_id) for one in records()
        )
        for graph, run in scene.both.items():
            wanted: Counter[tuple[Any, ...]] = Counter(
                (line["type"], run.run_id, run.trace_id, line["span_id"])
                for line in run.stored
                if line["type"] in LOGGED
            )
            for where, got in (("stdout", said), ("OTLP", sent)):
                missing = wanted - got
                need(not missing, f"{graph}: not on {where}: {_names(missing)}")

    until(agree)


def _names(lines: Iterable[tuple[Any, ...]]) -> str:
    return ", ".join(sorted({line[0] for line in lines}))


@check("Prometheus has scraped the runtime and the collector, with the run's exemplar")
def scraped(scene: Scene) -> None:
    now = metrics()

    def arrived() -> None:
        for job in ("sereno", "otel-collector", "span-metrics"):
            need(query(f'up{{job="{job}"}}') == 1, f"{job} is down")
        labels = {"graph": "screening", "outcome": "success"}
        there = now["runs_finished_total", tuple(sorted(labels.items()))]
        got = query('sereno_runs_finished_total{graph="screening",outcome="success"}')
        need(got == there, f"it has {got:g} successful runs, and not {there:g}")
        calls = query('sum(traces_span_metrics_calls_total{span_name="run screening"})')
        need(calls >= 1, "no span metrics of the run")

    until(arrived)
    asked = {"query": "sereno_run_duration_seconds_bucket", "start": time.time() - 600}
    reply = ask(
        f"{PROMETHEUS}/api/v1/query_exemplars?{urlencode({**asked, 'end': time.time() + 60})}"
    ).json()
    found = {one["labels"].get("trace_id") for of in reply["data"] for one in of["exemplars"]}
    need(scene.research.trace_id in found, f"the run's trace is not among {len(found)} exemplars")


def main(wanted: Sequence[str]) -> int:
    scene = until(Scene)
    failed = 0
    for name, (says, made) in CHECKS.items():
        if wanted and name not in wanted:
            continue
        begun = time.monotonic()
        try:
            made(scene)
        except Exception as exc:
            failed += 1
            why = str(exc) if isinstance(exc, Wrong) else f"{type(exc).__name__}: {exc}"
            print(f"FAIL {name}: {says}: {why}", flush=True)
        else:
            print(f"ok   {name}: {says} ({time.monotonic() - begun:.1f} s)", flush=True)
    print(f"{failed} of {len(wanted) or len(CHECKS)} checks failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
