"""A real Prometheus and a real Alertmanager watch a real server fail, tell it, and tell its end.

They run with the rules and the routes that are shipped; only the windows are shorter, by 60.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from server import PATIENCE, Server, until

from .programs import ROOT, Programs, answer, programs

DASHBOARDS = ROOT / "dashboards"
FASTER = 60
#: Runs of a wave.
RUNS = 12

GRAPHS = '''
"""A graph that depends on something, which is down as long as there is a file `outage`."""

from pathlib import Path

from langgraph.graph import END, START, StateGraph
from langgraph.types import RetryPolicy
from typing_extensions import TypedDict


class State(TypedDict, total=False):
    seen: str


async def fetch(state: State) -> State:
    if Path("outage").exists():
        raise ConnectionError("it is down")
    return {"seen": "fetch"}


patient = RetryPolicy(initial_interval=3, backoff_factor=1, max_attempts=3, jitter=False)
flaky = (
    StateGraph(State)
    .add_node("fetch", fetch, retry_policy=patient)
    .add_edge(START, "fetch")
    .add_edge("fetch", END)
    .compile()
)
'''


class Sink:
    """A webhook that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sink.told += [(self.path, alert) for alert in body["alerts"]]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def heard(self, where: str, status: str, **labels: str) -> list[dict[str, Any]]:
        """Alerts with this status and these labels that came to a path."""
        return [
            alert
            for path, alert in self.told
            if path == where
            and alert["status"] == status
            and labels.items() <= alert["labels"].items()
        ]


def faster(text: str) -> str:
    """The same rules or routes with every window and pause shorter."""
    units = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

    def shorter(found: re.Match[str]) -> str:
        before, number, unit = found.groups()
        return f"{before}{max(1, int(number) * units[unit] // FASTER)}ms"

    return re.sub(
        r"(\[|\bfor: |\boffset |\w*interval: |group_wait: )(\d+)([smhd])\b", shorter, text
    )


def alertmanager(real: Programs, sink: Sink) -> str:
    """Start one with our routes and inhibitions, whose receivers are paths of the sink."""
    shipped = (DASHBOARDS / "alertmanager/alertmanager.yml").read_text()
    config = yaml.safe_load(faster(shipped))
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"{sink.url}/{receiver['name']}"}]
    file = real.folder / "alertmanager.yml"
    file.write_text(yaml.safe_dump(config))
    address = real.ports.at("alertmanager", 9093)
    started = real.start(
        "alertmanager",
        f"--config.file={file}",
        f"--storage.path={real.folder / 'alertmanager'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    )
    until(lambda: answer(f"http://{address}/-/ready"), f"it is ready: {started.log}")
    return address


def prometheus(real: Programs, target: str, alerts_to: str) -> str:
    """Start one with our rules that scrapes a server."""
    for name in ("rules.yml", "alerts.yml"):
        (real.folder / name).write_text(faster((DASHBOARDS / "prometheus" / name).read_text()))
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yml", "alerts.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alerts_to]}]}]},
        "scrape_configs": [{"job_name": "sereno", "static_configs": [{"targets": [target]}]}],
    }
    file = real.folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = real.ports.at("prometheus", 9090)
    started = real.start(
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={real.folder / 'prometheus'}",
        f"--web.listen-address={address}",
        # 2.42 would wait for a minute before it says again what nobody heard.
        "--rules.alert.resend-delay=1s",
        "--log.level=warn",
    )
    until(lambda: answer(f"http://{address}/-/ready"), f"it is ready: {started.log}")
    return address


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with the graph, in the middle of an outage."""
    folder = tmp_path / "server"
    with Server(folder, None, "--config", "langgraph.json", SERENO_DRAIN_S="1") as made:
        (folder / "graphs.py").write_text(GRAPHS)
        (folder / "langgraph.json").write_text('{"graphs": {"flaky": "./graphs.py:flaky"}}')
        (folder / "outage").touch()
        yield made.start()


def test_a_storm_and_a_burn_are_told_and_their_end_too(server: Server, real: Programs) -> None:
    with Sink() as sink:
        alerts = alertmanager(real, sink)
        metrics = prometheus(real, server.admin.removeprefix("http://"), alerts)
        until(lambda: sink.heard("/watchdog", "firing", alertname="Watchdog"), "the watchdog")
        told = {alert["labels"]["alertname"] for _, alert in sink.told}
        assert not told & {"RetryStorm", "RunSuccessBurn"}

        with waves(server):
            until(lambda: sink.heard("/page", "firing", alertname="RetryStorm"), "a storm")
            until(lambda: sink.heard("/page", "firing", alertname="RunSuccessBurn"), "a burn")
            (server.folder / "outage").unlink()
            until(lambda: sink.heard("/page", "resolved", alertname="RetryStorm"), "calm")
            recovered = partial(sink.heard, "/page", "resolved", alertname="RunSuccessBurn")
            until(recovered, "recovery", 2 * PATIENCE)  # the windows of 6 h and 30 m take 30 s

        storm = sink.heard("/page", "firing", alertname="RetryStorm", graph="flaky")[0]
        assert storm["annotations"]["summary"].startswith("flaky keeps retrying")
        assert storm["annotations"]["runbook_url"] == "docs/runbooks/RetryStorm.md"
        assert sink.heard("/page", "firing", alertname="RunSuccessBurn", slo="run-success")
        assert not sink.heard("/page", "firing", alertname="RuntimeDown")
        groups = answer(f"http://{metrics}/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert [rule for rule in rules if rule["health"] != "ok"] == []
        assert len(rules) > 50


#: Of these, `job` is another one in each case.
DOWN = {"alertname": "RuntimeDown", "job": "sereno", "instance": "a:9009", "severity": "page"}
LAG = {"alertname": "LoopStall", "job": "sereno", "instance": "a:9009", "severity": "ticket"}
BURN = {"alertname": "RunSuccessBurn", "job": "sereno", "slo": "run-success"}
COLLECTOR = {"instance": "c:8888", "severity": "ticket"}
FAILING = {"alertname": "CollectorExportFailing", "exporter": "otlp_grpc/traces"} | COLLECTOR


@pytest.mark.parametrize(
    ("cause", "effect", "silent"),
    [
        pytest.param(DOWN, LAG, True, id="down-silences-its-instance"),
        pytest.param(DOWN, LAG | {"instance": "b:9009"}, False, id="not-another-instance"),
        pytest.param(DOWN, BURN | {"severity": "page"}, False, id="not-the-users"),
        pytest.param(
            DOWN,
            {"alertname": "MetricsAbsent", "job": "sereno", "severity": "page"},
            True,
            id="down-explains-absence",
        ),
        pytest.param(
            BURN | {"severity": "page"}, BURN | {"severity": "ticket"}, True, id="page-over-ticket"
        ),
        pytest.param(
            BURN | {"severity": "page"},
            {"alertname": "FirstOutputSlow", "job": "sereno", "slo": "first-output"}
            | {"severity": "ticket"},
            False,
            id="not-another-slo",
        ),
        pytest.param(
            {"alertname": "RunStuck", "job": "sereno", "instance": "a:9009", "graph": "g"},
            {"alertname": "StreamStalled", "job": "sereno", "instance": "a:9009", "graph": "g"},
            True,
            id="stuck-over-silent",
        ),
        pytest.param(
            {"alertname": "RetryStorm", "job": "sereno", "graph": "g", "severity": "page"},
            {"alertname": "RetriesExhausted", "job": "sereno", "graph": "g", "node": "n"},
            True,
            id="storm-over-exhaustion",
        ),
        pytest.param(
            FAILING, FAILING | {"alertname": "CollectorQueueFilling"}, True, id="why-it-fills"
        ),
        pytest.param(
            FAILING,
            FAILING | {"alertname": "CollectorQueueFilling", "exporter": "otlp_http/logs"},
            False,
            id="not-another-exporter",
        ),
        pytest.param(
            {"alertname": "CollectorDown"} | COLLECTOR, FAILING, True, id="collector-down"
        ),
        pytest.param(
            DOWN, {"alertname": "Watchdog", "severity": "none"}, False, id="never-the-watchdog"
        ),
    ],
)
def test_what_says_it_already_silences_the_rest(
    watcher: str, cause: dict[str, str], effect: dict[str, str], silent: bool
) -> None:
    case = {"job": f"{cause} {effect}"}  # nothing is silenced across jobs
    cause, effect = cause | case, effect | case
    url = f"http://{watcher}/api/v2/alerts"
    ends = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    posted = httpx2.post(
        url,
        json=[{"labels": labels, "endsAt": ends} for labels in (cause, effect)],
        trust_env=False,
    )
    assert posted.is_success, posted.text

    def status() -> Any:
        for alert in answer(url):
            if alert["labels"] == effect and alert["status"]["state"] != "unprocessed":
                return alert["status"]
        return None

    assert bool(until(status, "it is processed")["inhibitedBy"]) == silent


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An Alertmanager for all cases."""
    with Sink() as sink, programs(tmp_path_factory.mktemp("watcher")) as real:
        yield alertmanager(real, sink)


@contextmanager
def waves(server: Server) -> Iterator[None]:
    """Some runs start every second."""
    over = threading.Event()

    def start() -> None:
        with httpx2.Client(timeout=PATIENCE, trust_env=False) as http:
            while not over.wait(1):
                for _ in range(RUNS):
                    http.post(f"{server.url}/v1/runs", json={"graph": "flaky", "input": {}})

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)
