"""A graph as boxes and arrows, for pages that draw it and light up what runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from threading import Lock, Thread
from typing import Any, NamedTuple

import orjson
from langgraph.constants import END, START

from runtime.errors import NotFound
from runtime.graphs import LoadedGraph

__all__ = ["Drawing", "NotDrawable", "drawing_of"]

#: Between the names of a node and of the subgraphs that it is in; no name may hold it.
INSIDE = ":"


class NotDrawable(NotFound):
    """LangGraph cannot draw this graph."""

    code = "drawing_not_found"

    def __init__(self, name: str, cause: BaseException) -> None:
        super().__init__(f"graph {name!r} cannot be drawn: {type(cause).__name__}")


class Drawing(NamedTuple):
    """One drawing in each of its formats."""

    #: Nodes and edges.
    json: bytes
    #: The same as text for Mermaid.
    mermaid: bytes


async def drawing_of(graph: LoadedGraph, xray: int) -> Drawing:
    """The drawing with subgraphs opened `xray` levels deep. Raises NotDrawable."""
    drawings = graph.kept.setdefault(_Drawings, _Drawings(graph))
    return await asyncio.wrap_future(drawings.get(xray))


class _Drawings:
    """The drawings of one graph. Each is made once and kept: a graph stays as it was loaded."""

    def __init__(self, graph: LoadedGraph) -> None:
        self._graph = graph
        self._asked: dict[int, Future[Drawing]] = {}
        self._making = Lock()

    def get(self, xray: int) -> Future[Drawing]:
        if (asked := self._asked.get(xray)) is not None:
            return asked
        future = self._asked[xray] = Future[Drawing]()
        future.set_running_or_notify_cancel()  # who stops waiting does not stop the others
        # To draw runs the graph's own code. The executor's threads are for nodes.
        make = Thread(target=self._make, args=(xray, future), name="sereno-drawing", daemon=True)
        make.start()
        return future

    def _make(self, xray: int, future: Future[Drawing]) -> None:
        try:
            with self._making:
                drawn = _draw(self._graph, xray)
        except BaseException as exc:
            del self._asked[xray]  # the next who asks has it tried again
            future.set_exception(exc)
        else:
            future.set_result(drawn)


def _draw(graph: LoadedGraph, xray: int) -> Drawing:
    try:
        nodes, edges = _parts(graph, xray)
        body = {"graph": graph.name, "xray": xray, "nodes": nodes, "edges": edges}
        return Drawing(orjson.dumps(body), "".join(_mermaid(nodes, edges)).encode())
    except (Exception, SystemExit) as exc:
        raise NotDrawable(graph.name, exc) from exc


def _parts(graph: LoadedGraph, xray: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    drawn = graph.graph.get_graph(xray=xray)
    subgraphs = {path.replace("|", INSIDE) for path, _ in graph.graph.get_subgraphs(recurse=True)}
    nodes = [
        {"id": node.id, "label": _label(node.id), "kind": _kind(node.id, subgraphs)}
        for node in drawn.nodes.values()
    ]
    edges: list[dict[str, Any]] = []
    for edge in drawn.edges:
        arrow = {"source": edge.source, "target": edge.target, "conditional": edge.conditional}
        edges.append(arrow if edge.data is None else {**arrow, "label": str(edge.data)})
    return nodes, edges


def _label(id: str) -> str:
    return {START: "start", END: "end"}.get(name := id.rpartition(INSIDE)[2], name)


def _kind(id: str, subgraphs: set[str]) -> str:
    name = id.rpartition(INSIDE)[2]
    if name in (START, END):
        return "start" if name == START else "end"
    return "subgraph" if id in subgraphs else "node"


# Mermaid. LangChain's has no place for two subgraphs of one name, nor for a node called `end`:
# here boxes are numbered, and names are only what is written in them.

SHAPES = {"start": "([{}])", "end": "([{}])", "node": "({})", "subgraph": "[[{}]]"}


def _mermaid(
    nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    numbers = {node["id"]: f"n{at}" for at, node in enumerate(nodes)}
    boxes = {
        node["id"]: numbers[node["id"]] + SHAPES[node["kind"]].format(_quoted(node["label"]))
        for node in nodes
    }
    yield "graph TD;\n"
    yield from _frame("", boxes, count(), "\t")
    for edge in edges:
        arrow = "-.->" if edge["conditional"] else "-->"
        label = f"|{_quoted(edge['label'])}|" if "label" in edge else ""
        yield f"\t{numbers[edge['source']]} {arrow}{label} {numbers[edge['target']]};\n"


def _frame(
    path: str, boxes: Mapping[str, str], numbers: Iterator[int], indent: str
) -> Iterator[str]:
    """What is inside of a subgraph, or of the whole graph: boxes, and frames around others."""
    frames: dict[str, dict[str, str]] = {}
    for id, box in boxes.items():
        name, inside, _ = id.removeprefix(path).partition(INSIDE)
        if inside:
            frames.setdefault(name, {})[id] = box
        else:
            yield f"{indent}{box};\n"
    for name, inner in frames.items():
        yield f"{indent}subgraph s{next(numbers)}[{_quoted(name)}]\n"
        yield from _frame(f"{path}{name}{INSIDE}", inner, numbers, indent + "\t")
        yield f"{indent}end\n"


def _quoted(text: str) -> str:
    """Text that is nothing but text to Mermaid: all that could be more is written as a number."""
    return '"' + re.sub(r"[^\w .,:/-]", lambda found: f"#{ord(found[0])};", text) + '"'
