"""Every query of every panel, asked of a real Prometheus that scrapes a real server with traffic.

And of a real Loki and a real Jaeger, where both are; elsewhere a second collector stands for them.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server import Server, until

from dashboards.src.queries import Query, dashboards, filled, queries

from .programs import Programs, answer, find

HERE = Path(__file__).parent
PATIENCE = 120.0

#: Board, panel, query: why it may be without data after the traffic of this test.
EMPTY: dict[tuple[str, int, str], str] = {
    ("sereno-overview", 20, "A"): "no alert but the Watchdog fires when all is well",
    ("sereno-telemetry", 8, "C"): "no family runs out of room for labels",
    ("sereno-telemetry", 15, "D"): "the collector counts failures from the first one on",
}
QUERIES = tuple(queries())
STORES = ("jaeger", "loki")

#: A collector where Jaeger and Loki would be.
SINK = """
receivers:
  otlp:
    protocols:
      grpc: {{endpoint: "{traces}"}}
      http: {{endpoint: "{logs}", logs_url_path: /otlp/v1/logs}}
exporters:
  debug: {{}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines:
    traces: {{receivers: [otlp], exporters: [debug]}}
    logs: {{receivers: [otlp], exporters: [debug]}}
"""


def of(source: str) -> list[Any]:
    """Its queries as parameters."""
    return [
        pytest.param(query, id=f"{query.board}-{query.panel}{query.reference}")
        for query in QUERIES
        if query.source == source
    ]


class Hurried(Programs):
    """Rules of every group are evaluated each second, and scrapes are a second apart."""

    @staticmethod
    def hurried(text: str) -> str:
        return re.sub(r"interval: .*", "interval: 1s", text)


class Stack:
    """The programs, and a server of graphs that move everything."""

    def __init__(self, programs: Programs, server: Server) -> None:
        self.programs = programs
        self.server = server

    def traffic(self, number: int) -> None:
        """A run that asks and is answered, one that fails, readers that come and go, a probe."""
        asked = self._stream("/v1/runs", graph="busy", thread_id=f"t{number}", input={})
        assert asked[-1]["type"] == "run.interrupted", asked[-1]
        done = self._stream(f"/v1/threads/t{number}/resume", resume="yes")
        assert done[-1]["type"] == "run.completed", done[-1]
        failed = self._stream("/v1/runs", graph="busy", input={"fail": True})
        assert failed[-1]["type"] == "run.failed", failed[-1]
        self.server.raw(done[0]["run_id"], after=1)
        self._leave()
        self.server.get("/v1/runs")
        self.server.get("/health")

    def _leave(self) -> None:
        """A reader that does not wait for the end of its run."""
        wanted = {"accept": "application/x-ndjson"}
        path, body = self.server.url + "/v1/runs", {"graph": "busy", "input": {"fail": True}}
        with self.server.http.stream("POST", path, json=body, headers=wanted) as got:
            next(got.iter_lines())

    def _stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        wanted = {"accept": "application/x-ndjson"}
        got = self.server.http.post(self.server.url + path, json=body, headers=wanted)
        return [json.loads(line) for line in got.text.splitlines()]

    def ask(self, path: str, **params: str | float) -> Any:
        """What Prometheus says; it has to understand."""
        said = answer(f"{self.programs.url('prometheus')}/api/v1/{path}", **params)
        assert said is not None, f"refused: {params}"
        return said["data"]

    def values(self, query: Query) -> list[float]:
        """The numbers that a panel would draw."""
        now = time.time()
        if query.instant:  # over a time with traffic in it
            expr = filled(query.expr, "5m")
            found = [[s["value"]] for s in self.ask("query", query=expr, time=now)["result"]]
        else:
            expr = filled(query.expr, "10s")
            span = {"start": now - 900, "end": now, "step": 5}
            found = [s["values"] for s in self.ask("query_range", query=expr, **span)["result"]]
        return [float(v) for values in found for _, v in values if not math.isnan(float(v))]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """With enough traffic for every panel, or for as long as patience lasts."""
    folder = tmp_path_factory.mktemp("stack")
    with ExitStack() as ends:
        programs = Hurried(folder)
        ends.callback(programs.close)
        if all(map(here, STORES)):
            for store in STORES:
                programs.up(store)
        else:
            sink = folder / "sink.yaml"
            at = programs.ports.at
            sink.write_text(SINK.format(traces=at("jaeger", 4317), logs=at("loki", 3100)))
            programs.start("otel-collector", "--config", str(sink))
        programs.up("otel-collector", OTELCOL_FLUSH_INTERVAL="3s")
        config = folder / "langgraph.json"
        config.write_text(json.dumps({"graphs": {"busy": f"{HERE / 'busy_graph.py'}:busy"}}))
        server = Server(
            folder,
            None,
            *("--config", str(config)),
            SERENO_ADMIN_PORT=programs.ports.at("runtime", 9009).rsplit(":", 1)[1],
            SERENO_OTLP_LOGS="1",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{programs.ports.at('otel-collector', 4318)}",
            OTEL_BSP_SCHEDULE_DELAY="200",
            OTEL_BLRP_SCHEDULE_DELAY="200",
        )
        ends.enter_context(server).start()
        programs.up("prometheus")
        made = Stack(programs, server)
        wanted = [
            query
            for query in QUERIES
            if query.source == "prometheus"
            and (query.board, query.panel, query.reference) not in EMPTY
        ]
        deadline = time.monotonic() + PATIENCE
        number = 0
        while wanted and time.monotonic() < deadline:
            made.traffic(number)
            number += 1
            if number % 5 == 0:
                wanted = [query for query in wanted if not made.values(query)]
        yield made


def need_stores() -> None:
    for store in STORES:
        find(store)


def here(program: str) -> bool:
    try:
        return bool(find(program))
    except pytest.skip.Exception:
        return False


@pytest.mark.parametrize("query", of("prometheus"))
def test_a_panel_has_data(stack: Stack, query: Query) -> None:
    found = stack.values(query)  # an expression that Prometheus does not take fails here

    if not found:
        reason = EMPTY.get((query.board, query.panel, query.reference))
        assert reason, f"no data: {query.title}: {query.expr}"


@pytest.mark.parametrize(
    "query", [param for param in of("prometheus") if param.values[0].exemplars]
)
def test_a_panel_has_exemplars_that_name_a_trace(stack: Stack, query: Query) -> None:
    now = time.time()
    asked = {"query": filled(query.expr, "10s"), "start": now - 600, "end": now}
    found = [
        exemplar
        for series in stack.ask("query_exemplars", **asked)
        for exemplar in series["exemplars"]
    ]

    assert found
    assert all(re.fullmatch("[0-9a-f]{32}", exemplar["labels"]["trace_id"]) for exemplar in found)


@pytest.mark.parametrize("query", of("loki"))
def test_a_panel_has_lines(stack: Stack, query: Query) -> None:
    need_stores()
    path = f"{stack.programs.url('loki')}/loki/api/v1/query_range"

    assert answer(path, query=filled(query.expr)) is not None
    until(lambda: answer(path, query=filled(query.expr))["data"]["result"], "there are lines")


@pytest.mark.parametrize("query", of("jaeger"))
def test_a_panel_has_traces(stack: Stack, query: Query) -> None:
    need_stores()
    key, value = query.expr.split("=")
    asked = {"service": "sereno", "tags": json.dumps({key: value}), "limit": 20}
    path = f"{stack.programs.url('jaeger', 16686)}/api/traces"

    until(lambda: answer(path, **asked)["data"], "there are traces")


@pytest.mark.parametrize("board", dashboards().values(), ids=lambda board: str(board["uid"]))
def test_annotations_are_taken(stack: Stack, board: dict[str, Any]) -> None:
    for annotation in board["annotations"]["list"]:
        stack.ask("query", query=filled(annotation["expr"]))


@pytest.mark.parametrize("board", dashboards().values(), ids=lambda board: str(board["uid"]))
def test_variables_have_values_to_choose_from(stack: Stack, board: dict[str, Any]) -> None:
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]

            assert stack.ask(f"label/{label}/values", **{"match[]": filled(series)})


def test_what_may_be_empty_is_there() -> None:
    assert EMPTY.keys() <= {(query.board, query.panel, query.reference) for query in queries()}
