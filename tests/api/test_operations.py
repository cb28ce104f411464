"""Graphs, health, metrics, and errors as problems."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest

from runtime.engines.memory import MemoryEngine
from runtime.errors import BadSetting, StorageFailed

from .conftest import Serving
from .graphs.play import NAMES, Stage
from .harness import Server, problem, serving

# Graphs.


async def test_graphs_are_listed(server: Server) -> None:
    body = (await server.get("/v1/graphs")).json()

    assert [graph["name"] for graph in body["graphs"]] == [*NAMES, "defaulted"]
    assert body["failures"] == {}


async def test_a_graph_is_described(server: Server) -> None:
    gated = (await server.get("/v1/graphs/gated")).json()
    defaulted = (await server.get("/v1/graphs/defaulted")).json()

    assert gated["description"] == "Two steps that wait."
    assert [name for name in gated["nodes"] if name != "__start__"] == ["first", "second"]
    assert defaulted["default_input"] == {"topic": "cats", "tone": "dry"}
    assert gated["digest"] != defaulted["digest"]


async def test_a_graphs_schemas_are_json_schemas(server: Server) -> None:
    needs = (await server.get("/v1/graphs/needs/schema")).json()
    looks = (await server.get("/v1/graphs/looks/schema")).json()

    assert needs.keys() == {"input", "output", "context"}
    assert sorted(needs["input"]["required"]) == ["tone", "topic"]
    assert needs["context"] is None
    assert "city" in looks["context"]["properties"]


@pytest.mark.parametrize("path", ["", "/schema"])
async def test_an_unknown_graph_is_404_with_the_known_names(server: Server, path: str) -> None:
    told = problem(await server.get(f"/v1/graphs/nope{path}"), 404, "graph_not_found")

    assert told["known"] == [*NAMES, "defaulted"]


# Health.


@pytest.mark.parametrize("path", ["/health", "/healthz"])
async def test_health_is_exactly_the_contract(server: Server, path: str) -> None:
    before = int(time.time())
    answer = await server.get(path)
    body = answer.json()

    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert list(body) == ["status", "ts"]
    assert type(body["ts"]) is int
    assert before <= body["ts"] <= time.time()
    assert answer.body == b'{"status":"ok","ts":%d}' % body["ts"]


async def test_live(server: Server) -> None:
    answer = await server.get("/livez")

    assert (answer.status, answer.body) == (200, b"ok")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/ready", "/readyz"])
async def test_ready_lists_its_checks(server: Server, path: str) -> None:
    answer = await server.get(path)
    checks = {check["name"]: check for check in answer.json()["checks"]}

    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["status"] == "pass"
    assert {"started", "storage", "draining", "graphs"} <= checks.keys()
    assert {"name", "status", "age_s", "latency_ms"} <= checks["storage"].keys()


async def test_health_json_is_given_to_who_asks(server: Server) -> None:
    answer = await server.get("/ready", headers={"Accept": "application/health+json"})

    assert answer.headers["content-type"] == "application/health+json"


async def test_started(server: Server) -> None:
    answer = await server.get("/startupz")

    assert (answer.status, answer.json()["status"]) == (200, "pass")


async def test_a_draining_server_is_not_ready_at_once_but_alive(server: Server) -> None:
    await server.worker.drain()
    answer = await server.get("/ready")
    failed = [check for check in answer.json()["checks"] if check["status"] != "pass"]

    assert answer.status == 503
    assert [check["name"] for check in failed] == ["draining"]
    assert failed[0]["output"] == "the server shuts down"
    assert (await server.get("/health")).status == 200
    assert (await server.get("/livez")).status == 200


class Full(MemoryEngine):
    full = False

    async def writable(self) -> bool:
        return not self.full


async def test_a_store_that_cannot_be_written_is_not_ready(serve: Serving) -> None:
    engine = Full()
    async with serve(engine=engine) as server:
        engine.full = True
        await server.services.checks.refresh()
        failing = await server.get("/readyz")
        engine.full = False
        await server.services.checks.refresh()
        passing = await server.get("/readyz")

    failed = [c["name"] for c in failing.json()["checks"] if c["status"] == "fail"]
    assert (failing.status, failing.json()["status"], failed) == (503, "fail", ["storage"])
    assert passing.status == 200


# Metrics and what the server is.


async def samples(server: Server, accept: str = "") -> dict[str, float]:
    answer = await server.get("/metrics", headers={"Accept": accept})
    lines = answer.body.decode().splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("sereno_runs_")
    }


async def test_metrics_move_with_runs(server: Server, gates: Stage) -> None:
    before = await samples(server)
    await server.ended("free")
    await server.ended("fails")
    await server.ended("asks", thread_id="t")
    await server.wait((await server.post("/v1/threads/t/resume", {"resume": 1})).json()["run_id"])
    await server.start("gated")
    await gates.arrival("first")
    after = await samples(server)

    moved = {name: value - before.get(name, 0) for name, value in after.items()}
    assert {name: value for name, value in moved.items() if value} == {
        'sereno_runs_started_total{graph="free",trigger="api"}': 1,
        'sereno_runs_started_total{graph="fails",trigger="api"}': 1,
        'sereno_runs_started_total{graph="asks",trigger="api"}': 1,
        'sereno_runs_started_total{graph="asks",trigger="resume"}': 1,
        'sereno_runs_started_total{graph="gated",trigger="api"}': 1,
        'sereno_runs_finished_total{graph="free",outcome="success"}': 1,
        'sereno_runs_finished_total{graph="fails",outcome="error"}': 1,
        'sereno_runs_finished_total{graph="asks",outcome="interrupted"}': 1,
        'sereno_runs_finished_total{graph="asks",outcome="success"}': 1,
        'sereno_runs_active{graph="gated"}': 1,
        'sereno_runs_detached{graph="gated"}': 1,
    }
    assert before.keys() == after.keys()


async def test_metrics_are_prometheus_text_or_openmetrics(server: Server) -> None:
    text = await server.get("/metrics")
    opened = await server.get(
        "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
    )

    assert text.headers["content-type"].startswith("text/plain; version=")
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.body.endswith(b"# EOF\n")
    assert not text.body.endswith(b"# EOF\n")
    assert text.headers["cache-control"] == "no-store"


async def test_info(server: Server) -> None:
    info = (await server.get("/info")).json()

    assert (info["name"], info["contract"], info["engine"]) == ("sereno", "1", "memory")
    assert info["graphs"] == [*NAMES, "defaulted"]
    assert info["log_id"] == server.engine.log_id


async def test_a_server_that_others_can_reach_needs_to_be_insecure(serve: Serving) -> None:
    with pytest.raises(BadSetting, match="--insecure"):
        async with serve(host="0.0.0.0"):
            pass
    async with serve(host="0.0.0.0", insecure=True) as server:
        assert (await server.get("/info")).json()["insecure"] is True


# Problems.


@pytest.mark.parametrize(
    "path", ["/nope", "/v1", "/v1/runs/x/traces", "/v1/graphs/free/drawings", "/docs", "/redoc"]
)
async def test_what_is_not_there_is_a_problem(server: Server, path: str) -> None:
    told = problem(await server.get(path), 404, "not_found")

    assert (told["type"], told["title"]) == ("about:blank", "Not Found")


async def test_a_method_that_is_not_allowed_is_a_problem(server: Server) -> None:
    answer = await server.request("DELETE", "/v1/runs")

    assert problem(answer, 405, "method_not_allowed")["title"] == "Method Not Allowed"
    assert answer.headers["allow"] in ("GET", "POST", "GET, POST")


class Broken(MemoryEngine):
    async def search(self, query: Any) -> Any:
        raise RuntimeError("the password is hunter2")


async def test_an_unexpected_error_is_a_problem_that_leaks_nothing(
    serve: Serving, logs: list[Any]
) -> None:
    async with serve(engine=Broken()) as server:
        answer = await server.get("/v1/runs")

    problem(answer, 500, "internal")
    assert b"hunter2" not in answer.body
    assert b"Traceback" not in answer.body
    record = next(record for record in logs if record["event"] == "Request failed")
    assert record["path"] == "/v1/runs"
    assert str(record["exc_info"]) == "the password is hunter2"


async def test_no_header_names_the_client_an_origin(server: Server) -> None:
    """CORS is closed."""
    answer = await server.get("/health", headers={"Origin": "https://evil.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_problem_can_tell_of_what_has_no_utf8(server: Server) -> None:
    answer = await server.get("/v1/graphs/%ED%A0%80", params={})

    problem(answer, 404, "graph_not_found")
    assert orjson.loads(answer.body)


# A store that fails.


class Failing(MemoryEngine):
    async def submit(self, new: Any, queued: Any) -> Any:
        raise StorageFailed("disk full")


async def test_a_run_that_cannot_be_stored_is_503(serve: Serving) -> None:
    async with serve(engine=Failing()) as server:
        answer = await server.post("/v1/runs", {"graph": "free", "input": {}})

    problem(answer, 503, "storage")
    assert answer.headers["retry-after"] == "5"


async def test_a_graph_can_be_given_as_a_file(gates: Stage, tmp_path: Any) -> None:
    file = tmp_path / "agent.py"
    file.write_text(
        "from langgraph.graph import START, StateGraph\n"
        "from typing_extensions import TypedDict\n"
        "class State(TypedDict, total=False):\n    n: int\n"
        "builder = StateGraph(State)\n"
        "builder.add_node('one', lambda state: {'n': 1})\n"
        "builder.add_edge(START, 'one')\n"
        "graph = builder.compile()\n"
    )
    async with serving(f"agent={file}:graph") as server:
        assert (await server.post("/api/run")).json()["output"] == {"n": 1}
