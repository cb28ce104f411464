"""Who may start on a store, and what a server says when it cannot start."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from lines import recoveries, violations
from server import HERE, Server, Zygote, until


def beside(server: Server, zygote: Zygote | None, **env: str) -> Server:
    """Another server in the same folder."""
    other = Server(server.folder, zygote, **env)
    other.log_name = "other"
    return other


def opened(server: Server, name: str) -> bool:
    """Whether a process has a file open."""
    files = Path(f"/proc/{server.pid}/fd").iterdir()
    with contextlib.suppress(FileNotFoundError):
        return any(file.readlink().name == name for file in files)
    return False


def test_a_second_process_says_who_owns_the_store(server: Server) -> None:
    with beside(server, None) as other:
        other.launch()

        assert other.wait() == 1
        assert f"process {server.pid} owns this store" in other.output
        assert "--wait-lock" in other.output
        assert "Traceback" not in other.output
    assert server.get("/health").status_code == 200


def test_a_waiting_process_takes_over_when_the_first_dies(server: Server, zygote: Zygote) -> None:
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    server.entered("t", "b")
    with beside(server, zygote) as other:
        other.launch("--wait-lock")
        until(lambda: opened(other, "s.db.lock"), "it waits")
        assert not other.logged("Serving")
        server.release("t", "b")
        server.hold("t", "c1")
        server.entered("t", "c1")
        server.kill()
        other.wait_ready()
        other.release("t", "c1")
        lines = other.lines(run_id)

        assert violations(lines) == []
        assert recoveries(lines)[0]["reason"] == "crash"
        assert lines[-1]["type"] == "run.completed"
        assert other.code is None


def test_a_waiting_process_can_be_stopped(server: Server, zygote: Zygote) -> None:
    with beside(server, zygote) as other:
        other.launch("--wait-lock")
        until(lambda: opened(other, "s.db.lock"), "it waits")
        other.term()

        other.wait(10)
    assert server.get("/health").status_code == 200


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with one graph that loads and one that does not."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(HERE / "graphs.py", folder / "good.py")
    (folder / "bad.py").write_text("import nothing_of_this_name\n\ngraph = None\n")
    graphs = {"good": "./good.py:chain", "bad": "./bad.py:graph"}
    (folder / "langgraph.json").write_text(json.dumps({"graphs": graphs}))
    return folder


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "script"])
def test_a_graph_that_does_not_load_is_named_with_its_cause(
    serving: Callable[..., Server], project: Path, forked: bool
) -> None:
    server = serving("--config", str(project / "langgraph.json"), forked=forked).launch()

    assert server.wait() == 1
    for word in ("bad", "./bad.py:graph", "langgraph.json", "ModuleNotFoundError", "nothing_of"):
        assert word in server.output
    assert "Serving" not in server.output
    assert "Traceback" not in server.output


def test_a_lenient_server_serves_the_other_graphs(
    serving: Callable[..., Server], project: Path
) -> None:
    server = serving("--config", str(project / "langgraph.json")).start("--lenient")

    assert [graph["name"] for graph in server.get("/v1/graphs").json()["graphs"]] == ["good"]
    assert server.lines(server.submit("good", "t"))[-1]["type"] == "run.completed"
    assert server.post("/v1/runs", graph="bad", input={}).status_code == 404
    assert server.logged("graph not served", graph="bad")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("--host", "0.0.0.0"), ("SERENO_HOST", "--insecure"), id="open host"),
        pytest.param(("--port", "70000"), ("SERENO_PORT", "70000"), id="port"),
        pytest.param(("--engine", "mysql://x"), ("SERENO_ENGINE", "mysql"), id="engine"),
        pytest.param(("--engine", "sqlite:///"), ("SERENO_ENGINE", "no path"), id="no path"),
        pytest.param(("--config", "no.json"), ("no.json",), id="no config"),
        pytest.param(("--log-level", "LOUD"), ("LOUD",), id="log level"),
    ],
)
def test_a_bad_option_is_named_without_a_traceback(
    serving: Callable[..., Server], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    server = serving().launch(*arguments)

    assert server.wait() == 1
    for word in words:
        assert word in server.output
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_PROPAGATORS", "nonsense"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "x"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "not-a-url"),
    ],
)
def test_a_variable_of_opentelemetry_that_cannot_be_read_is_told_and_ignored(
    serving: Callable[..., Server], variable: str, value: str
) -> None:
    server = serving(forked=False, **{variable: value}).start()

    assert server.lines(server.submit("short", "t"))[-1]["type"] == "run.completed"
    (told,) = server.logged("Variable ignored")
    assert (told["variable"], told["value"]) == (variable, value)
    assert told["remedy"]
    assert "Traceback" not in server.output


def test_an_open_host_is_served_with_insecure(serving: Callable[..., Server]) -> None:
    server = serving().start("--host", "0.0.0.0", "--insecure")

    assert server.get("/health").status_code == 200
    assert server.get("/info").json()["insecure"] is True


def test_a_port_that_is_taken_is_named(serving: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serving().launch("--port", str(port))

        assert server.wait() == 1
        assert str(port) in server.output
        assert "Traceback" not in server.output


def test_an_admin_port_that_is_taken_is_named_with_its_remedy(
    server: Server, serving: Callable[..., Server]
) -> None:
    taken = server.admin.rpartition(":")[2]
    other = serving(SERENO_ADMIN_PORT=taken).launch()

    assert other.wait() == 1
    last = other.output.splitlines()[-1]
    assert last.startswith(f"sereno: SERENO_ADMIN_PORT: cannot listen on 127.0.0.1:{taken}: ")
    assert last.endswith("; choose another with --admin-port, or a free one with --admin-port 0")
    assert "Traceback" not in other.output
    assert not other.logged("Draining")  # nothing had begun

    other.start("--admin-port", "0")
    assert other.scrape()


def test_a_store_that_is_no_database_is_named(serving: Callable[..., Server]) -> None:
    server = serving()
    (server.folder / "s.db").write_bytes(b"this is not a database at all" * 100)
    server.launch()

    assert server.wait() == 1
    assert "s.db" in server.output
    assert "Traceback" not in server.output


def test_the_store_in_a_folder_that_is_not_there_is_made(serving: Callable[..., Server]) -> None:
    server = serving().start("--engine", "sqlite:///./deep/down/runs.db")

    assert server.lines(server.submit("chain", "t"))[-1]["type"] == "run.completed"
    assert (server.folder / "deep/down/runs.db").exists()
