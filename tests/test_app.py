"""Graphs in this process, as `sereno run --local` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from runtime.app import local_stream
from runtime.errors import BadSetting, GraphLoadFailed, InvalidRequest, UnknownGraph
from runtime.settings import Settings, load

GRAPHS = """
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

class State(TypedDict, total=False):
    n: int

async def add(state):
    return {"n": state.get("n", 0) + 1}

inner = StateGraph(State).add_node("add", add).add_edge(START, "add").add_edge("add", END)
alone = inner.compile(checkpointer=False)
without = StateGraph(State).add_node("sub", alone).add_edge(START, "sub").add_edge("sub", END)
plain = inner.compile()

class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")

def leave(state):
    import sys
    sys.exit(3)

async def interrupt(state):
    raise KeyboardInterrupt

async def unspeakable(state):
    raise Unspeakable

def of(node):
    return StateGraph(State).add_node("n", node).add_edge(START, "n").compile()

exits, interrupts, wordless = of(leave), of(interrupt), of(unspeakable)
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "graphs.py").write_text(GRAPHS)
    return str(tmp_path / "graphs.py")


async def run(source: str, graph: str, value: Any = None, **settings: Any) -> list[Any]:
    lines = local_stream(
        Settings(**settings), [f"{graph}={source}:{graph}"], graph, value, None, None
    )
    return [orjson.loads(line) async for line in lines]


async def test_a_graph_runs_in_process_to_its_terminal_line(source: str) -> None:
    lines = await run(source, "plain", {"n": 4})

    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["data"]["output"] == {"n": 5}


async def test_a_subgraph_without_a_checkpointer_runs_under_sync_durability(source: str) -> None:
    lines = await run(source, "without", {"n": 1})

    assert lines[-1]["type"] == "run.completed", lines[-1]


@pytest.mark.parametrize("graph", ["exits", "interrupts", "wordless"])
async def test_no_node_can_end_the_process_or_leave_its_run_without_an_end(
    source: str, graph: str
) -> None:
    lines = await run(source, graph, {"n": 1})

    assert lines[-1]["type"] == "run.failed"
    assert lines[-1]["data"]["error"]["code"] == "node_error"
    assert [line["type"] for line in lines].count("node.failed") == 1


async def test_no_input_is_the_graphs_default(source: str) -> None:
    assert (await run(source, "plain"))[-1]["data"]["output"] == {"n": 1}


async def test_an_unknown_graph_is_named(source: str) -> None:
    with pytest.raises(UnknownGraph, match="known graphs: plain"):
        [
            line
            async for line in local_stream(
                Settings(), [f"plain={source}:plain"], "other", None, None, None
            )
        ]


async def test_a_bad_thread_id_is_named(source: str) -> None:
    with pytest.raises(InvalidRequest, match="thread_id"):
        [
            line
            async for line in local_stream(
                Settings(), [f"plain={source}:plain"], "plain", None, "no spaces", None
            )
        ]


async def test_a_source_that_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphLoadFailed, match=r"missing\.py"):
        await run(str(tmp_path / "missing.py"), "graph")


async def test_a_host_that_others_reach_needs_a_word(source: str) -> None:
    with pytest.raises(BadSetting, match="--insecure"):
        await run(source, "plain", host="0.0.0.0")

    assert (await run(source, "plain", host="0.0.0.0", insecure=True))[-1]["data"]["final"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("SERENO_PORT", "eighty", id="no number"),
        pytest.param("SERENO_SLOTS", "0", id="too small"),
        pytest.param("SERENO_LOG_LEVEL", "LOUD", id="no level"),
        pytest.param("SERENO_DURABILITY", "never", id="no choice"),
    ],
)
def test_a_bad_setting_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(BadSetting, match=f"{name}.*{value}"):
        load()


def test_a_level_may_be_written_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERENO_LOG_LEVEL", "debug")

    assert load().log_level == "DEBUG"
