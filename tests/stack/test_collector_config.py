"""otel-collector.yaml, as a real collector runs it between a real Sereno and another collector.

The other one stands for whoever stores traces and logs, and writes down what arrives.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from lines import violations
from server import Server, until

from . import graphs
from .programs import ROOT, Program, Programs, answer, find, programs

CONFIG, SAMPLING = ROOT / "otel-collector.yaml", ROOT / "otel-collector.sampling.yaml"
GRAPHS = ("--config", str(Path(__file__).with_name("langgraph.json")))
NDJSON = {"Accept": "application/x-ndjson"}

STORE = """
receivers:
  otlp:
    protocols:
      grpc: {endpoint: "%(grpc)s"}
      http: {endpoint: "%(http)s", logs_url_path: /otlp/v1/logs}
exporters:
  file/traces: {path: "%(folder)s/traces", flush_interval: 100ms}
  file/logs: {path: "%(folder)s/logs", flush_interval: 100ms}
service:
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], exporters: [file/traces]}
    logs: {receivers: [otlp], exporters: [file/logs]}
"""


class Store:
    """A collector in the place of Jaeger and Loki, and what it received."""

    def __init__(self, real: Programs) -> None:
        self._real = real
        self._folder = real.folder / "store"
        self._folder.mkdir()

    def start(self) -> Program:
        ports = {
            "grpc": self._real.ports.at("jaeger", 4317),
            "http": self._real.ports.at("loki", 3100),
        }
        config = self._folder / "store.yaml"
        config.write_text(STORE % {**ports, "folder": self._folder})
        program = self._real.start("otel-collector", "--config", str(config))
        until(lambda: "Everything is ready" in program.output, "the store is ready")
        return program

    def spans(self) -> list[dict[str, Any]]:
        """In the order in which they came; each with its attributes and its resource's by name."""
        return [
            {**span, "said": named(span), "resource": named(group["resource"])}
            for group in self._groups("traces", "resourceSpans")
            for scope in group["scopeSpans"]
            for span in scope["spans"]
        ]

    def trace(self, trace_id: str) -> list[dict[str, Any]]:
        return [span for span in self.spans() if span["traceId"] == trace_id]

    def records(self, trace_id: str) -> list[dict[str, Any]]:
        """Log records of a trace."""
        return [
            record
            for group in self._groups("logs", "resourceLogs")
            for scope in group["scopeLogs"]
            for record in scope["logRecords"]
            if record.get("traceId") == trace_id
        ]

    def _groups(self, file: str, key: str) -> Iterator[Any]:
        path = self._folder / file
        for line in path.read_text().split("\n")[:-1] if path.exists() else ():
            yield from json.loads(line).get(key, ())


def named(thing: Mapping[str, Any]) -> dict[str, Any]:
    return {a["key"]: next(iter(a["value"].values()), None) for a in thing.get("attributes", ())}


def serve(stack: ExitStack, real: Programs, **env: str) -> Server:
    """A real Sereno that sends what it has to the collector."""
    server = Server(
        real.folder / f"server-{uuid4().hex[:6]}",
        None,
        *GRAPHS,
        OTEL_EXPORTER_OTLP_ENDPOINT=real.url("otel-collector", 4318),
        OTEL_BSP_SCHEDULE_DELAY="50",
        OTEL_BLRP_SCHEDULE_DELAY="50",
        SERENO_OTLP_LOGS="1",
        **env,
    )
    return stack.enter_context(server).start()


def stream(server: Server, graph: str, **headers: str) -> list[dict[str, Any]]:
    """Run a graph as a stream, to its end; the lines."""
    answered = server.http.post(
        f"{server.url}/v1/runs",
        json={"graph": graph, "thread_id": uuid4().hex, "input": {"seen": []}},
        headers=NDJSON | headers,
    )
    assert answered.status_code == 200, answered.text
    return [line for line in map(json.loads, answered.text.splitlines()) if "seq" in line]


def exported(server: Server, result: str = "exported") -> int:
    return int(server.metric("sereno_telemetry_spans_total", result=result))


def settled(server: Server) -> None:
    """Wait until nothing waits for its export."""

    def idle() -> bool:
        live = server.metric("sereno_telemetry_live_spans")
        return not live and not server.metric("sereno_telemetry_span_queue")

    until(idle, "all spans are exported")


def post_spans(url: str, *spans: Mapping[str, Any], service: str = "neighbour") -> int:
    """Spans of another service, by OTLP; the status of the answer."""
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    body = {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(spans)}]}]}
    return httpx2.post(f"{url}/v1/traces", json=body, trust_env=False, timeout=30).status_code


def a_span(name: str, kind: int, **said: str) -> dict[str, Any]:
    now = time.time_ns()
    return {
        "traceId": uuid4().hex,
        "spanId": uuid4().hex[:16],
        "name": name,
        "kind": kind,
        "startTimeUnixNano": str(now - 1_000_000),
        "endTimeUnixNano": str(now),
        "attributes": [{"key": k, "value": {"stringValue": v}} for k, v in said.items()],
    }


SERVER, CLIENT = 2, 3


@pytest.fixture(scope="module")
def store(real: Programs) -> Store:
    made = Store(real)
    made.start()
    return made


@pytest.fixture(scope="module")
def collector(real: Programs, store: Store) -> str:
    """Where our collector takes OTLP over HTTP."""
    real.up("otel-collector", OTELCOL_FLUSH_INTERVAL="4s", DEPLOYMENT_ENVIRONMENT="here")
    return real.url("otel-collector", 4318)


@pytest.fixture(scope="module")
def server(real: Programs, collector: str) -> Iterator[Server]:
    with ExitStack() as stack:
        yield serve(stack, real, SERENO_TRACE_TRUST="parent")


# --- the files ------------------------------------------------------------------------------------


def validate(folder: Path, *configs: Path) -> subprocess.CompletedProcess[str]:
    args = [argument for config in configs for argument in ("--config", str(config))]
    return subprocess.run(
        [find("otel-collector"), "validate", *args],
        env={"OTELCOL_QUEUE_DIR": str(folder / "queue")},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("configs", [(CONFIG,), (CONFIG, SAMPLING)], ids=["alone", "sampling"])
def test_the_collector_finds_the_files_valid(tmp_path: Path, configs: tuple[Path, ...]) -> None:
    result = validate(tmp_path, *configs)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "key", ["check_interval", "metrics_expiration", "queue_size", "enable_open_metrics"]
)
def test_a_misspelt_key_is_found(tmp_path: Path, key: str) -> None:
    text = CONFIG.read_text()
    assert f"{key}:" in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(f"{key}:", f"{key}z:"))
    assert validate(tmp_path, broken).returncode != 0


# --- traces and logs ------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["plain", "retrying", "leaking"])
def test_a_run_arrives_whole(server: Server, store: Store, graph: str) -> None:
    lines = stream(server, graph)
    trace_id, run_id = lines[0]["trace_id"], lines[0]["run_id"]
    settled(server)

    told = server.get(f"/v1/runs/{run_id}/trace").json()["resourceSpans"]
    known = {
        (span["spanId"], span.get("parentSpanId", ""), span["name"])
        for group in told
        for scope in group["scopeSpans"]
        for span in scope["spans"]
        if span["traceId"] == trace_id  # a reader's request has a trace of its own
    }
    assert len(known) >= 4

    def arrived() -> set[tuple[str, str, str]]:
        spans = store.trace(trace_id)
        return {(s["spanId"], s.get("parentSpanId", ""), s["name"]) for s in spans}

    until(lambda: arrived() >= known, f"the {len(known)} spans of the run arrive")
    spans = store.trace(trace_id)
    ids = {span["spanId"] for span in spans}
    roots = [span["name"] for span in spans if span.get("parentSpanId", "") not in ids]
    assert roots == ["POST /v1/runs"]
    assert len(spans) == len(ids)
    assert {span["resource"]["deployment.environment.name"] for span in spans} == {"here"}
    end = (lines[-1]["type"], lines[-1]["span_id"])
    until(
        lambda: end in {(r.get("eventName"), r["spanId"]) for r in store.records(trace_id)},
        "so does the record of its end",
    )
    # Loki keeps attributes, and not the event's name.
    records = [record for record in store.records(trace_id) if "eventName" in record]
    assert {named(r)["event"] == r["eventName"] for r in records} == {True}


def test_a_secret_is_masked_wherever_it_hides(server: Server, store: Store) -> None:
    trace_id = stream(server, "leaking")[0]["trace_id"]
    settled(server)

    def careless() -> list[dict[str, Any]]:
        return [span for span in store.trace(trace_id) if span["name"] == "careless"]

    span = until(careless, "the careless span arrives")[0]
    told = {"attempt.failed", "run.failed"}
    until(
        lambda: told <= {record.get("eventName") for record in store.records(trace_id)},
        "and the records",
    )
    said = span["said"]
    assert said["note"] == "call with **** please"
    assert said["jwt"] == said["db.password"] == "****"
    assert said["http.request.header.authorization"] == "****"
    assert said["mail"] == "to ****"
    assert "fine" in json.dumps(said["tags"])
    assert said["gen_ai.usage.input_tokens"] == "12"
    assert span["status"]["message"].startswith("AuthError: ****")
    everything = json.dumps([store.trace(trace_id), store.records(trace_id)])
    assert "careless" in everything
    hidden = [graphs.KEY, graphs.BEARER, graphs.JWT, graphs.MAIL, graphs.PASSWORD]
    assert [secret for secret in hidden if secret in everything] == []
    # What looks like one and is none: the run's id is untouched.
    assert all("****" not in str(s["said"].get("sereno.run.id", "")) for s in store.trace(trace_id))


def test_probes_are_dropped_and_what_looks_like_one_is_not(collector: str, store: Store) -> None:
    probes = ["/health", "/livez", "/ready", "/readyz", "/startupz", "/metrics"]
    others = ["/healthy-food", "/v1/health", "/readyzz"]
    spans = [a_span(f"GET {path}", SERVER, **{"url.path": path}) for path in probes + others]
    spans.append(a_span("GET /health of another", CLIENT, **{"url.path": "/health"}))
    assert post_spans(collector, *spans) == 200
    wanted = sorted([f"GET {path}" for path in others] + ["GET /health of another"])
    sent = {span["traceId"] for span in spans}

    def kept() -> list[str]:
        return sorted(s["name"] for s in store.spans() if s["traceId"] in sent)

    until(lambda: len(kept()) >= len(wanted), "what is no probe arrives")
    assert kept() == wanted


# --- metrics --------------------------------------------------------------------------------------


def test_prometheus_has_span_metrics_a_service_graph_and_exemplars(
    real: Programs, collector: str, server: Server
) -> None:
    real.up("prometheus")
    url = real.url("prometheus")

    def query(expr: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = answer(f"{url}/api/v1/query", query=expr)["data"]["result"]
        return found

    def appears(expr: str) -> dict[str, Any]:
        result: dict[str, Any] = until(lambda: query(expr), f"{expr} has a value")[0]
        return result

    # A caller whose own span says that it called: one edge of the service graph.
    traces = set()

    def call_it() -> None:
        call = a_span("POST", CLIENT)
        traces.add(call["traceId"])
        lines = stream(server, "retrying", traceparent=f"00-{call['traceId']}-{call['spanId']}-01")
        assert lines[0]["trace_id"] == call["traceId"]
        assert post_spans(collector, call, service="web") == 200

    for _ in range(3):
        call_it()
    settled(server)

    calls = 'traces_span_metrics_calls_total{span_name="run retrying"}'
    series = appears(f"{calls} >= 3")["metric"]
    assert (series["service_name"], series["sereno_graph_name"]) == ("sereno", "retrying")
    # honor_labels: the job is the sender's. No label is new with each start of anybody.
    assert series["job"] == "sereno"
    assert series["instance"] == real.ports.at("otel-collector", 8889)
    assert not {"collector_instance_id", "otel_scope_name"} & series.keys()
    attempt = appears('traces_span_metrics_calls_total{span_name="attempt insist"}')
    assert attempt["metric"]["sereno_node_path"] == "insist"
    failed = 'traces_span_metrics_calls_total{span_name="attempt insist",status_code=~".*ERROR"}'
    appears(f"{failed} >= 3")
    appears(
        "histogram_quantile(0.95, sum by (le) ("
        'traces_span_metrics_duration_seconds_bucket{service_name="sereno"})) > 0'
    )
    edge = appears('traces_service_graph_request_total{client="web",server="sereno"}')
    assert edge["value"][1] == "3"
    assert query('traces_span_metrics_calls_total{span_name=~"GET /(livez|readyz|metrics)"}') == []
    appears("otelcol_receiver_accepted_spans_total")
    appears("otelcol_process_memory_rss_bytes")

    def exemplars() -> set[str]:
        call_it()  # the collector forgets them with each flush, whether they were scraped or not
        found = answer(
            f"{url}/api/v1/query_exemplars",
            query='traces_span_metrics_duration_seconds_bucket{span_name="run retrying"}',
            start=time.time() - 600,
            end=time.time() + 60,
        )
        return {e["labels"]["trace_id"] for s in found["data"] for e in s["exemplars"]}

    until(lambda: exemplars() & traces, "an exemplar leads to a trace of ours")


# --- when things break ----------------------------------------------------------------------------


def test_kill_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    with programs(tmp_path) as real, ExitStack() as stack:
        store = Store(real)
        collector = real.up("otel-collector")
        server = serve(stack, real)
        blob = "x" * 4000
        large = [a_span("large", CLIENT, blob=blob) for _ in range(1500)]
        for begin in range(0, len(large), 250):
            assert post_spans(real.url("otel-collector", 4318), *large[begin : begin + 250]) == 200
        for _ in range(2):
            # Killed while runs go on and the store is away: what it was sent and had not yet
            # answered is sent again by Sereno, and may be there twice.
            for _ in range(10):
                assert violations(stream(server, "retrying")) == []
            collector.kill()
            assert violations(stream(server, "leaking")) == []
            collector = real.up("otel-collector")
        for _ in range(5):
            stream(server, "plain")
        settled(server)
        accepted = exported(server)
        collector.kill()
        collector = real.up("otel-collector")
        store.start()

        def distinct() -> set[str]:
            return {s["spanId"] for s in store.spans() if s["resource"]["service.name"] == "sereno"}

        until(lambda: len(distinct()) >= accepted, f"{accepted} spans arrive", 90)
        # 6 MB at once, in messages that receivers take.
        ids = {span["spanId"] for span in large}
        until(lambda: ids <= {s["spanId"] for s in store.spans()}, "so do the large ones")
        assert exported(server, "dropped_queue_full") == 0
        twice = Counter(span["spanId"] for span in store.spans())
        assert not [span for span in large if twice[span["spanId"]] != 1]


@pytest.mark.parametrize("trouble", ["frozen", "dead"])
def test_sereno_does_not_notice(tmp_path: Path, trouble: str) -> None:
    """Streams beside a collector that never answers, and beside none: as whole and as fast."""
    with programs(tmp_path) as real, ExitStack() as stack:
        collector = real.up("otel-collector")
        watched, alone = serve(stack, real), serve(stack, real)
        alone.term()
        alone.wait()
        alone.start(OTEL_EXPORTER_OTLP_ENDPOINT="", SERENO_OTLP_LOGS="0")
        for server in (watched, alone):
            stream(server, "retrying")
        if trouble == "frozen":
            collector.signal(signal.SIGSTOP)
        else:
            collector.kill()
        took: dict[Server, list[float]] = {watched: [], alone: []}
        for _ in range(25):
            for server, times in took.items():
                begun = time.perf_counter()
                lines = stream(server, "retrying")
                times.append(time.perf_counter() - begun)
                assert violations(lines) == []
                assert lines[-1]["type"] == "run.completed"
        with_it, without = (statistics.median(times) for times in took.values())
        assert with_it < 1.5 * without + 0.05, f"{with_it:.3f} s against {without:.3f} s"
        assert watched.ready() == {}
        watched.term()
        assert watched.wait() == 0


# --- sampling -------------------------------------------------------------------------------------


def test_sampling_keeps_what_failed_or_retried_and_counts_the_rest(tmp_path: Path) -> None:
    with programs(tmp_path) as real, ExitStack() as stack:
        store = Store(real)
        store.start()
        collector = real.up(
            "otel-collector",
            f"--config={SAMPLING}",
            SAMPLING_WAIT_AFTER_ROOT="2s",
            SAMPLING_PERCENT="0",
            OTELCOL_FLUSH_INTERVAL="2s",
        )
        assert "deprecat" not in collector.output.lower()
        server = serve(stack, real)
        runs = {graph: [stream(server, graph) for _ in range(5)] for graph in ("plain", "retrying")}
        runs["leaking"] = [stream(server, "leaking") for _ in range(5)]
        traces = {graph: {run[0]["trace_id"] for run in found} for graph, found in runs.items()}

        def kept(graph: str) -> int:
            return len(traces[graph] & {span["traceId"] for span in store.spans()})

        until(lambda: kept("leaking") == kept("retrying") == 5, "what failed or retried is kept")
        # Judged in the order of arrival: the plain ones came first.
        assert kept("plain") == 0
        for run in runs["leaking"]:
            ids = {line["span_id"] for line in run}
            assert ids <= {span["spanId"] for span in store.trace(run[0]["trace_id"])}

        def counted() -> bool:
            text = answer(real.url("otel-collector", 8889) + "/metrics") or ""
            return any(
                'span_name="run plain"' in line
                and line.startswith("traces_span_metrics_calls")
                and " 5" in line
                for line in text.splitlines()
            )

        until(counted, "span metrics count the traces that were not kept")
