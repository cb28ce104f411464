"""A graph's drawing: boxes, arrows, and what is inside of a box when it is asked for."""

from __future__ import annotations

import asyncio
import json
import re
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Serving
from .harness import Server, problem

GRAPHS = """
    import threading
    from sys import _getframe as _caller
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


    class Unopenable(type(nested)):
        def get_subgraphs(self, *args, **kwargs):
            if _caller(1).f_code.co_name == "_parts":  # not while it is loaded
                raise SystemExit("secret")
            return super().get_subgraphs(*args, **kwargs)


    closed = deep(0)
    closed.__class__ = Unopenable


    class Slow(type(nested)):
        def get_graph(self, *args, **kwargs):
            calls.append(kwargs["xray"])
            begun.set()
            assert gate.wait(10)
            if kwargs["xray"] == failing:
                raise RuntimeError
            return super().get_graph(*args, **kwargs)


    calls, failing = [], None
    begun, gate = threading.Event(), threading.Event()
    slow = deep(1)
    slow.__class__ = Slow


    def around(name, *inner):
        plan = StateGraph(State)
        plan.add_node("step", step)
        plan.add_node(name, inner[0] if inner else step)
        plan.add_edge(START, "step")
        plan.add_edge("step", name)
        plan.add_edge(name, END)
        return plan.compile()


    same = around("step2", around("step2", around("end", around('say "hi" #1'))))
"""


NAMES = ("nested", "made", "chooses", "broken", "closed", "slow", "same")


@pytest.fixture
async def drawn(serve: Serving, tmp_path: Path) -> AsyncIterator[Server]:
    (tmp_path / "drawn.py").write_text(textwrap.dedent(GRAPHS))
    config = {"graphs": {name: f"./drawn.py:{name}" for name in NAMES}}
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
    assert answer.body.decode() == textwrap.dedent("""\
        graph TD;
        \tn0(["start"]);
        \tn1("before");
        \tn2(["end"]);
        \tsubgraph s0["inner"]
        \t\tn3("before");
        \t\tn4[["inner"]];
        \tend
        \tn0 --> n1;
        \tn1 --> n3;
        \tn4 --> n2;
        \tn3 --> n4;
    """)


async def test_mermaid_tells_a_condition_from_a_step(drawn: Server) -> None:
    answer = await drawn.get("/v1/graphs/chooses/drawing", params={"format": "mermaid"})
    lines = [line.strip() for line in answer.body.decode().splitlines()]
    ids = {name: id for id, name in re.findall(r'(n\d+)\("(\w+)"', "\n".join(lines))}

    assert f'{ids["choose"]} -.->|"more"| {ids["other"]};' in lines
    assert f"{ids['other']} --> {ids['choose']};" in lines


@pytest.mark.parametrize("xray", [0, 1, 2, 3, 9])
async def test_mermaid_takes_names_that_are_used_twice_or_mean_something_to_it(
    drawn: Server, xray: int
) -> None:
    params = {"format": "mermaid", "xray": xray}
    text = (await drawn.get("/v1/graphs/same/drawing", params=params)).body.decode()
    body = (await drawn.get("/v1/graphs/same/drawing", params={"xray": xray})).json()
    frames = re.findall(r"^\t+subgraph (\w+)\[(.*)\]$", text, re.MULTILINE)

    assert [name for _, name in frames] == ['"step2"', '"step2"', '"end"'][:xray]
    assert len({id for id, _ in frames}) == len(frames) == text.count("\tend\n")
    boxes = re.findall(r"^\t+(n\d+)[(\[]+\"", text, re.MULTILINE)
    assert len(set(boxes)) == len(boxes) == len(body["nodes"])
    assert text.count("-->") == len(body["edges"])
    if xray > 2:
        assert '("say #34;hi#34; #35;1");' in text


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
    assert known == list(NAMES)


@pytest.mark.parametrize("format", ["json", "mermaid"])
@pytest.mark.parametrize(("name", "cause"), [("broken", "RuntimeError"), ("closed", "SystemExit")])
async def test_a_graph_that_cannot_be_drawn_says_so(
    drawn: Server, name: str, cause: str, format: str
) -> None:
    answer = await drawn.get(f"/v1/graphs/{name}/drawing", params={"format": format})

    detail = problem(answer, 404, "drawing_not_found")["detail"]
    assert detail == f"graph {name!r} cannot be drawn: {cause}"


@pytest.fixture
def slow(drawn: Server) -> Iterator[dict[str, Any]]:
    """What the graph that is slow to draw knows of; its gate is shut."""
    graph: Any = drawn.services.graphs.get("slow").graph
    module: dict[str, Any] = type(graph).get_graph.__globals__
    yield module
    module["gate"].set()


async def test_a_drawing_is_made_once_and_takes_no_thread_of_the_nodes(
    drawn: Server, slow: dict[str, Any]
) -> None:
    formats = ["json", "mermaid"] * 40
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        asked = [
            group.create_task(drawn.get("/v1/graphs/slow/drawing", params={"format": format}))
            for format in formats
        ]
        await asyncio.to_thread(slow["begun"].wait)
        impatient = asked.pop()
        impatient.cancel()
        await asyncio.to_thread(int)  # as a node that is not async runs
        assert not any(task.done() for task in asked)
        slow["gate"].set()
    answers = [task.result() for task in asked]
    answers.append(await drawn.get("/v1/graphs/slow/drawing"))

    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 2
    assert slow["calls"] == [0]


async def test_what_could_not_be_drawn_is_tried_again(drawn: Server, slow: dict[str, Any]) -> None:
    slow["gate"].set()
    slow["failing"] = 1
    first = await drawn.get("/v1/graphs/slow/drawing", params={"xray": 1})
    slow["failing"] = None
    second = await drawn.get("/v1/graphs/slow/drawing", params={"xray": 1})

    assert (first.status, second.status) == (404, 200)
    assert slow["calls"] == [1, 1]
