"""LangGraph projects that were not written for Sereno, and some that change under their runs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lines import violations
from server import Server, until

OWN_RUNTIME = Path(__file__).parent.parent / "graphs" / "own_runtime"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """As `langgraph new` makes it: src/agent/graph.py, an .env, a package called `runtime`."""
    folder = tmp_path / "template"
    write(
        folder,
        src__agent__graph_py="""
            from dataclasses import dataclass
            import os
            from langchain_core.runnables import RunnableConfig
            from langgraph.graph import StateGraph
            from langgraph.types import interrupt
            from runtime.words import shout

            @dataclass
            class State:
                changeme: str = "example"
                approved: bool = False

            async def call_model(state: State, config: RunnableConfig) -> dict:
                return {"changeme": shout(os.environ["TEMPLATE_GREETING"] + " " + state.changeme)}

            def approve(state: State) -> dict:
                from runtime.late import value
                return {"approved": interrupt({"ok?": state.changeme}) and value}

            graph = (
                StateGraph(State)
                .add_node(call_model)
                .add_node(approve)
                .add_edge("__start__", "call_model")
                .add_edge("call_model", "approve")
                .compile(name="New Graph")
            )
            """,
        src__runtime__words_py="def shout(text): return text.upper()\n",
        src__runtime__late_py="value = True\n",
    )
    (folder / "src/agent/__init__.py").write_text("from agent.graph import graph\n")
    (folder / "src/runtime/__init__.py").write_text('"""Not Sereno\'s."""\n')
    (folder / ".env").write_text('TEMPLATE_GREETING="hello"\n')
    config: dict[str, Any] = {
        "$schema": "https://langgra.ph/schema.json",
        "dependencies": ["."],
        "graphs": {"agent": "./src/agent/graph.py:graph"},
        "env": ".env",
        "image_distro": "wolfi",
    }
    (folder / "langgraph.json").write_text(json.dumps(config))
    return folder


def test_a_project_from_the_template_is_served_unchanged(
    serving: Callable[..., Server], template: Path
) -> None:
    """Over a restart while it waits for a human."""
    before = {path: path.read_bytes() for path in template.rglob("*") if path.is_file()}
    server = serving("--config", str(template), forked=False).start()
    run_id = server.submit("agent", "t", input={"changeme": "you"})
    lines = server.lines(run_id)

    assert lines[-1]["type"] == "run.interrupted"
    assert lines[-1]["data"]["interrupts"][0]["value"] == {"ok?": "HELLO YOU"}
    server.kill()
    server.start()
    lines = server.lines(server.resume("t", True))
    assert violations(lines) == []
    assert lines[-1]["data"]["output"] == {"changeme": "HELLO YOU", "approved": True}
    after = {path: path.read_bytes() for path in before}
    assert before == after


def test_a_project_with_its_own_runtime_is_served(serving: Callable[..., Server]) -> None:
    server = serving("--config", str(OWN_RUNTIME)).start()
    name = server.get("/v1/graphs").json()["graphs"][0]["name"]
    lines = server.lines(server.submit(name, "t", input={"name": "you"}))

    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["data"]["output"]["tools"][3] == "Good day, named!"


def test_a_langgraph_json_is_found_in_the_folder(
    serving: Callable[..., Server], template: Path
) -> None:
    server = serving()
    server.folder, server.sources = template, ()
    server.start()

    assert [graph["name"] for graph in server.get("/v1/graphs").json()["graphs"]] == ["agent"]


CHANGING = """
    import pathlib, time
    from typing_extensions import TypedDict
    from langgraph.graph import START, StateGraph

    class State(TypedDict, total=False):
        x: int

    async def first(state): return {{"x": 1}}

    async def {second}(state):
        import asyncio
        while pathlib.Path("hold/{second}").exists():
            await asyncio.sleep(0.01)
        return {{"x": 2}}

    graph = StateGraph(State).add_sequence([first, {second}]).add_edge(START, "first").compile()
"""


@pytest.fixture
def changing(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Writes a project whose second node and graph can have other names."""
    folder = tmp_path / "changing"

    def make(second: str, **graphs: str) -> tuple[str, ...]:
        write(folder, graph_py=CHANGING.format(second=second))
        write(folder, other_py=CHANGING.format(second="other"))
        (folder / "langgraph.json").write_text(json.dumps({"graphs": graphs}))
        return "--config", str(folder)

    return make


def killed_in_second(server: Server) -> str:
    (server.folder / "hold/second").touch()
    run_id = server.start().submit("g", "t", input={})
    server.wait_line(run_id, "node.started", node="second")
    server.kill()
    (server.folder / "hold/second").unlink()
    return run_id


@pytest.mark.parametrize("drained", [False, True], ids=["killed", "drained"])
def test_a_run_whose_pending_node_was_renamed_fails(
    serving: Callable[..., Server], changing: Callable[..., tuple[str, ...]], drained: bool
) -> None:
    server = serving(*changing("second", g="./graph.py:graph"), SERENO_DRAIN_S="0")
    if drained:
        (server.folder / "hold/second").touch()
        run_id = server.start().submit("g", "t", input={})
        server.wait_line(run_id, "node.started", node="second")
        server.term()
        assert server.wait() == 0
    else:
        run_id = killed_in_second(server)
    changing("renamed", g="./graph.py:graph")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.failed"
    assert lines[-1]["data"]["error"]["code"] == "graph_changed"
    assert next(ln for ln in lines if ln["type"] == "run.recovered")["data"]["graph_changed"]


def test_a_run_waits_for_its_graph_and_then_goes_on(
    serving: Callable[..., Server], changing: Callable[..., tuple[str, ...]]
) -> None:
    server = serving(*changing("second", g="./graph.py:graph"))
    run_id = killed_in_second(server)
    changing("second", other="./other.py:graph")
    server.start()

    assert "g" in until(lambda: server.ready().get("graphs"), "readyz names it")
    run = server.get(f"/v1/runs/{run_id}").json()
    assert run["ended_at"] is None
    assert server.lines(server.submit("other", "u", input={}))[-1]["type"] == "run.completed"
    busy = server.post("/v1/runs", graph="other", input={}, thread_id="t")
    assert busy.json()["code"] == "thread_busy"
    server.kill()
    changing("second", g="./graph.py:graph")
    server.start()
    lines = server.lines(run_id)
    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["epoch"] == 2
    until(lambda: not server.ready(), "readyz is green")


def test_a_run_whose_graph_does_not_come_fails_in_the_end(
    serving: Callable[..., Server], changing: Callable[..., tuple[str, ...]]
) -> None:
    server = serving(*changing("second", g="./graph.py:graph"), SERENO_GRAPH_WAIT_S="1")
    run_id = killed_in_second(server)
    changing("second", other="./other.py:graph")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.failed"
    assert lines[-1]["data"]["error"]["code"] == "graph_unavailable"
    until(lambda: not server.ready(), "readyz is green again", 15)


def test_the_wait_for_a_graph_begins_with_the_process_that_misses_it(
    serving: Callable[..., Server], changing: Callable[..., tuple[str, ...]]
) -> None:
    """A long downtime must not fail every run at the first start with a wrong config."""
    server = serving(*changing("second", g="./graph.py:graph"), SERENO_GRAPH_WAIT_S="3")
    run_id = killed_in_second(server)
    changing("second", other="./other.py:graph")
    killed = server.folder / "s.db"
    until(lambda: age(killed) > 3.5, "the downtime was long", 10)
    server.start()
    until(lambda: server.ready().get("graphs"), "readyz names it")

    assert server.get(f"/v1/runs/{run_id}").json()["ended_at"] is None
    assert server.lines(run_id)[-1]["data"]["error"]["code"] == "graph_unavailable"


def test_runs_that_wait_for_their_graph_keep_no_other_from_going_on(
    serving: Callable[..., Server], changing: Callable[..., tuple[str, ...]]
) -> None:
    """They are the oldest, and more than the process looks at in one go."""
    graphs = {"g": "./graph.py:graph", "other": "./other.py:graph"}
    server = serving(*changing("second", **graphs), SERENO_SLOTS="1")
    (server.folder / "hold/second").touch()
    server.start()
    for thread in "tuvw":
        server.submit("g", thread, input={})
    run_id = server.submit("other", "x", input={})
    server.kill()
    changing("second", other="./other.py:graph")
    server.start()

    until(lambda: server.ready().get("graphs"), "readyz names it")
    line = server.wait_line(run_id, "run.completed")
    assert line["epoch"] == 1


def age(file: Path) -> float:
    import time

    return time.time() - max(path.stat().st_mtime for path in file.parent.glob("s.db*"))
