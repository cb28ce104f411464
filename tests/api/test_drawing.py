"""A graph's drawing: boxes, arrows, and what is inside of a box when it is asked for."""

from __future__ import annotations

import json
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Serving
from .harness import Server, problem

GRAPHS = """
    from typing import TypedDict
    from langgraph.graph import END, START, StateGraph


    class State(TypedDict, total=False):
        n: int


    def step(state: State) -> State:
        return {}


    def deep(levels: int):
        inner = step if levels == 0 else deep(levels - 1)
        plan = StateGraph(State)
        plan.add_node("before", step)
        plan.add_node("inner", inner)
        plan.add_edge(START, "before")
        plan.add_edge("before", "inner")
        plan.add_edge("inner", END)
        return plan.compile()


    nested = deep(2)


    def made(config):
        return deep(0)


    def whats_next(state: State) -> str:
        return "more"


    def choosing():
        plan = StateGraph(State)
        plan.add_node("choose", step)
        plan.add_node("other", step)
        plan.add_edge(START, "choose")
        plan.add_conditional_edges("choose", whats_next, {"more": "other", "over": END})
        plan.add_edge("other", "choose")
        return plan.compile()


    chooses = choosing()


    class Undrawable(type(nested)):
        def get_graph(self, *args, **kwargs):
            raise RuntimeError("secret")


    broken = deep(0)
    broken.__class__ = Undrawable
"""


@pytest.fixture
async def drawn(serve: Serving, tmp_path: Path) -> AsyncIterator[Server]:
    (tmp_path / "drawn.py").write_text(textwrap.dedent(GRAPHS))
    names = ("nested", "made", "chooses", "broken")
    config = {"graphs": {name: f"./drawn.py:{name}" for name in names}}
    (tmp_path / "langgraph.json").write_text(json.dumps(config))
    async with serve(source=tmp_path) as server:
        yield server


async def test_a_drawing_has_a_start_an_end_and_the_nodes_between(drawn: Server) -> None:
    answer = await drawn.get("/v1/graphs/nested/drawing")

    assert answer.json() == {
        "graph": "nested",
        "xray": 0,
        "nodes": [
            {"id": "__start__", "label": "start", "kind": "start"},
            {"id": "before", "label": "before", "kind": "node"},
            {"id": "inner", "label": "inner", "kind": "subgraph"},
            {"id": "__end__", "label": "end", "kind": "end"},
        ],
        "edges": [
            {"source": "__start__", "target": "before", "conditional": False},
            {"source": "before", "target": "inner", "conditional": False},
            {"source": "inner", "target": "__end__", "conditional": False},
        ],
    }


@pytest.mark.parametrize(
    ("xray", "inside"),
    [
        pytest.param(1, {"inner:before": "node", "inner:inner": "subgraph"}, id="one level"),
        pytest.param(
            2,
            {
                "inner:before": "node",
                "inner:inner:before": "node",
                "inner:inner:inner": "node",
            },
            id="two levels",
        ),
        pytest.param(
            50,
            {
                "inner:before": "node",
                "inner:inner:before": "node",
                "inner:inner:inner": "node",
            },
            id="deeper than it goes",
        ),
    ],
)
async def test_xray_looks_so_many_levels_into_subgraphs(
    drawn: Server, xray: int, inside: dict[str, str]
) -> None:
    answer = await drawn.get("/v1/graphs/nested/drawing", params={"xray": xray})
    body = answer.json()

    assert body["xray"] == xray
    assert {n["id"]: n["kind"] for n in body["nodes"] if ":" in n["id"]} == inside
    ids = {node["id"] for node in body["nodes"]}
    assert all({edge["source"], edge["target"]} <= ids for edge in body["edges"])


async def test_a_conditional_edge_says_so_and_has_its_label(drawn: Server) -> None:
    edges: list[dict[str, Any]] = (await drawn.get("/v1/graphs/chooses/drawing")).json()["edges"]
    found = {(edge["source"], edge["target"]): edge for edge in edges}

    assert found["choose", "other"]["conditional"] is True
    assert found["choose", "other"]["label"] == "more"
    assert found["choose", "__end__"]["label"] == "over"
    assert found["other", "choose"]["conditional"] is False
    assert "label" not in found["other", "choose"]


async def test_a_graph_from_a_factory_is_drawn(drawn: Server) -> None:
    answer = await drawn.get("/v1/graphs/made/drawing")

    assert [node["id"] for node in answer.json()["nodes"]][1:3] == ["before", "inner"]


async def test_a_drawing_is_mermaid_when_asked_for(drawn: Server) -> None:
    answer = await drawn.get("/v1/graphs/nested/drawing", params={"format": "mermaid", "xray": 1})

    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    text = answer.body.decode()
    assert "graph TD;" in text
    assert "subgraph inner" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", "png"), ("xray", "-1"), ("xray", "deep"), ("xray", "101")],
)
async def test_what_cannot_be_drawn_is_refused_by_name(
    drawn: Server, field: str, value: str
) -> None:
    answer = await drawn.get("/v1/graphs/nested/drawing", params={field: value})

    assert problem(answer, 422, "invalid_request")["field"] == field


async def test_an_unknown_graph_has_no_drawing(drawn: Server) -> None:
    answer = await drawn.get("/v1/graphs/nope/drawing")

    known = problem(answer, 404, "graph_not_found")["known"]
    assert known == ["nested", "made", "chooses", "broken"]


@pytest.mark.parametrize("format", ["json", "mermaid"])
async def test_a_graph_that_cannot_be_drawn_says_so(drawn: Server, format: str) -> None:
    answer = await drawn.get("/v1/graphs/broken/drawing", params={"format": format})

    detail = problem(answer, 404, "drawing_not_found")["detail"]
    assert detail == "graph 'broken' cannot be drawn: RuntimeError"
