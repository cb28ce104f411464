"""Everything of compose.yml but Grafana, as real programs with the files that compose mounts.

One run is followed through it as somebody at Grafana would: the addresses and the jumps are those
of the data sources that Grafana is given.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from server import Server, until

from .programs import ROOT, Programs, answer

EXAMPLES = [ROOT / "examples" / name / "langgraph.json" for name in ("screening", "research")]
NDJSON = {"Accept": "application/x-ndjson"}
SOURCES = ROOT / "dashboards/provisioning/datasources/sereno.yaml"


@dataclass(frozen=True, slots=True)
class Run:
    run_id: str
    trace_id: str
    #: Its spans as Sereno knows them, by id.
    spans: dict[str, str]


@pytest.fixture(scope="module")
def sources(real: Programs) -> dict[str, dict[str, Any]]:
    """Grafana's data sources by uid, at the addresses of this machine."""
    # `$$` stands for a `$` there.
    text = real.ports.adapt(SOURCES.read_text()).replace("$$", "$")
    return {source["uid"]: source for source in yaml.safe_load(text)["datasources"]}


@pytest.fixture(scope="module")
def alertmanager(real: Programs) -> str:
    real.up("alertmanager")
    return real.url("alertmanager")


@pytest.fixture(scope="module")
def prometheus(real: Programs, alertmanager: str) -> Callable[[str], list[dict[str, Any]]]:
    """Prometheus's answers to queries."""
    real.up("prometheus")

    def query(expr: str) -> list[dict[str, Any]]:
        url = f"{real.url('prometheus')}/api/v1/query"
        found: list[dict[str, Any]] = answer(url, query=expr)["data"]["result"]
        return found

    return query


@pytest.fixture(scope="module")
def jaeger(real: Programs, sources: dict[str, dict[str, Any]]) -> Callable[[str], dict[str, str]]:
    """Names of a trace's spans by id, as Jaeger has them."""
    real.up("jaeger")

    def trace(trace_id: str) -> dict[str, str]:
        found = answer(f"{sources['jaeger']['url']}/api/traces/{trace_id}")
        traces = found["data"] if found else []
        return {s["spanID"]: s["operationName"] for t in traces for s in t["spans"]}

    return trace


@pytest.fixture(scope="module")
def loki(
    real: Programs, sources: dict[str, dict[str, Any]]
) -> Callable[[str], list[tuple[dict[str, str], str]]]:
    """Lines that answer a query, each with its labels."""
    real.up("loki")

    def lines(expr: str) -> list[tuple[dict[str, str], str]]:
        start = f"{time.time() - 3600:.0f}"
        url = f"{sources['loki']['url']}/loki/api/v1/query_range"
        found = answer(url, query=expr, start=start, limit=1000)
        streams = found["data"]["result"] if found else []
        return [(stream["stream"], value[1]) for stream in streams for value in stream["values"]]

    return lines


@pytest.fixture(scope="module")
def server(real: Programs) -> Iterator[Server]:
    """Sereno with its examples, and what compose.yml tells it."""
    real.up("otel-collector", OTELCOL_FLUSH_INTERVAL="4s")
    configs = [argument for path in EXAMPLES for argument in ("--config", str(path))]
    env = real.environment("runtime") | {
        "SERENO_ADMIN_PORT": real.ports.at("runtime", 9009).rsplit(":", 1)[1],
        "EXAMPLES_PACE": "0",
    }
    with Server(real.folder / "server", None, *configs, **env) as made:
        yield made.start()


@pytest.fixture(scope="module")
def run(server: Server, prometheus: object) -> Run:
    """A run of the screening, which retries calls to a service that is not reliable.

    Prometheus is there before it: the collector shows an exemplar until its next flush only.
    """
    answered = server.http.post(
        f"{server.url}/v1/runs",
        json={"graph": "screening", "input": {"job": "backend-engineer"}},
        headers=NDJSON,
    )
    lines = [line for line in map(json.loads, answered.text.splitlines()) if "seq" in line]
    assert lines[-1]["type"] == "run.completed", lines[-1]
    run_id, trace_id = lines[0]["run_id"], lines[0]["trace_id"]

    def spans() -> dict[str, str]:
        told = server.get(f"/v1/runs/{run_id}/trace").json()["resourceSpans"]
        return {
            span["spanId"]: span["name"]
            for group in told
            for scope in group["scopeSpans"]
            for span in scope["spans"]
            if span["traceId"] == trace_id  # a reader's request has a trace of its own
        }

    until(lambda: "POST /v1/runs" in spans().values(), "the request's span has ended")
    return Run(run_id, trace_id, spans())


def test_a_run_is_in_jaeger_by_its_trace_id(
    run: Run, jaeger: Callable[[str], dict[str, str]]
) -> None:
    until(lambda: run.spans.items() <= jaeger(run.trace_id).items(), "its spans are in Jaeger")
    names = set(run.spans.values())
    assert {"POST /v1/runs", "run screening"} <= names
    assert any(name.startswith("attempt ") for name in names)


def test_its_logs_are_in_loki_and_lead_back_to_the_trace(
    run: Run,
    sources: dict[str, dict[str, Any]],
    loki: Callable[[str], list[tuple[dict[str, str], str]]],
    jaeger: Callable[[str], dict[str, str]],
) -> None:
    jump = sources["jaeger"]["jsonData"]["tracesToLogsV2"]
    assert sources[jump["datasourceUid"]]["type"] == "loki"
    expr = jump["query"].replace("${__trace.traceId}", run.trace_id)

    def ended() -> list[dict[str, str]]:
        return [labels for labels, line in loki(expr) if labels.get("run_id") == run.run_id]

    until(ended, f"{expr} has lines of the run")
    field = sources["loki"]["jsonData"]["derivedFields"][0]
    assert field["matcherType"] == "label"
    trace_ids = {labels[field["matcherRegex"]] for labels in ended()}
    assert trace_ids == {run.trace_id}
    assert sources[field["datasourceUid"]]["type"] == "jaeger"
    until(lambda: jaeger(trace_ids.copy().pop()), "the line leads to the trace")


@pytest.mark.parametrize("event", ["run.completed", "call.retrying", "stream.closed"])
def test_loki_finds_a_record_by_its_event(
    run: Run, loki: Callable[[str], list[tuple[dict[str, str], str]]], event: str
) -> None:
    """As runbooks and panels ask for them."""
    expr = f'{{service_name="sereno"}} | event="{event}"'

    until(lambda: any(said["run_id"] == run.run_id for said, _ in loki(expr)), f"{expr} is found")


def test_an_exemplar_leads_to_the_trace(
    real: Programs,
    run: Run,
    sources: dict[str, dict[str, Any]],
    prometheus: Callable[[str], list[dict[str, Any]]],
    jaeger: Callable[[str], dict[str, str]],
) -> None:
    jump = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"][0]
    assert sources[jump["datasourceUid"]]["type"] == "jaeger"

    def exemplars(metric: str) -> set[str]:
        found = answer(
            f"{sources['prometheus']['url']}/api/v1/query_exemplars",
            query=metric,
            start=time.time() - 3600,
            end=time.time() + 60,
        )
        return {e["labels"][jump["name"]] for s in found["data"] for e in s["exemplars"]}

    for metric in (
        'sereno_run_duration_seconds_bucket{graph="screening"}',
        'traces_span_metrics_duration_seconds_bucket{span_name="run screening"}',
    ):
        until(lambda m=metric: run.trace_id in exemplars(m), f"{metric} has its exemplar")  # type: ignore[misc]
    until(lambda: run.spans.items() <= jaeger(run.trace_id).items(), "it leads to the trace")


def test_every_target_is_scraped_and_every_rule_works(
    real: Programs, run: Run, prometheus: Callable[[str], list[dict[str, Any]]]
) -> None:
    jobs = {"sereno", "otel-collector", "span-metrics"}
    until(lambda: {s["metric"]["job"] for s in prometheus("up == 1")} == jobs, "all are scraped")
    until(
        lambda: prometheus(
            'sereno_runs_finished_total{job="sereno",graph="screening",outcome="success"} == 1'
        ),
        "the run is counted",
    )
    until(
        lambda: prometheus('traces_span_metrics_calls_total{span_name="run screening"} == 1'),
        "its span is counted",
    )

    def rules() -> list[dict[str, Any]]:
        found = answer(f"{real.url('prometheus')}/api/v1/rules")
        return [rule for group in found["data"]["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()), "all are evaluated", 90)
    assert [(r["name"], r.get("lastError")) for r in rules() if r["health"] != "ok"] == []
    assert len(rules()) > 20


def test_the_watchdog_fires_and_nothing_else_does(
    alertmanager: str, run: Run, prometheus: Callable[[str], list[dict[str, Any]]]
) -> None:
    def firing() -> set[str]:
        alerts = answer(f"{alertmanager}/api/v2/alerts")
        return {alert["labels"]["alertname"] for alert in alerts}

    # An alert of Prometheus's first moment may get lost; it is sent again after a minute.
    until(lambda: "Watchdog" in firing(), "the watchdog's alert arrives", 100)
    assert firing() == {"Watchdog"}
    assert {a["metric"]["alertname"] for a in prometheus('ALERTS{alertstate="firing"}')} == {
        "Watchdog"
    }


def test_a_backup_made_while_it_runs_serves_again(server: Server, run: Run) -> None:
    """The command of docs/operations.md."""
    text = (ROOT / "docs/operations.md").read_text()
    code = re.search(r'python -c "(.*VACUUM.*)"', text)
    assert code
    here = code[1].replace("/data/sereno.db", "s.db").replace("/data/", "")
    subprocess.run([sys.executable, "-c", here], cwd=server.folder, check=True, timeout=60)
    folder = server.folder.with_name("restored")
    with Server(folder, None, *server.sources) as restored:
        shutil.copy(server.folder / "backup.db", folder / "s.db")
        restored.start()
        assert restored.lines(run.run_id) == server.lines(run.run_id)
