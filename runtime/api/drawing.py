"""A graph as boxes and arrows, for pages that draw it and light up what runs."""

from __future__ import annotations

from typing import Any

from langgraph.constants import END, START

from runtime.errors import NotFound
from runtime.graphs import LoadedGraph

__all__ = ["NotDrawable", "as_json", "as_mermaid"]

#: Between the names of a node and of the subgraphs that it is in; no name may hold it.
INSIDE = ":"


class NotDrawable(NotFound):
    """LangGraph cannot draw this graph."""

    code = "drawing_not_found"

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"graph {name!r} cannot be drawn: {type(cause).__name__}")


def as_json(graph: LoadedGraph, xray: int) -> dict[str, Any]:
    """Nodes and edges; those of subgraphs too, `xray` levels deep. Raises NotDrawable."""
    drawn = _drawn(graph, xray)
    subgraphs = {path.replace("|", INSIDE) for path, _ in graph.graph.get_subgraphs(recurse=True)}
    nodes = [
        {"id": node.id, "label": _label(node.id), "kind": _kind(node.id, subgraphs)}
        for node in drawn.nodes.values()
    ]
    edges: list[dict[str, Any]] = []
    for edge in drawn.edges:
        arrow = {"source": edge.source, "target": edge.target, "conditional": edge.conditional}
        edges.append(arrow if edge.data is None else {**arrow, "label": str(edge.data)})
    return {"graph": graph.name, "xray": xray, "nodes": nodes, "edges": edges}


def as_mermaid(graph: LoadedGraph, xray: int) -> str:
    """The same as text of Mermaid's. Raises NotDrawable."""
    return str(_drawn(graph, xray).draw_mermaid())


def _drawn(graph: LoadedGraph, xray: int) -> Any:
    try:
        return graph.graph.get_graph(xray=xray)
    except Exception as exc:  # it runs the graph's own writers
        raise NotDrawable(graph.name, exc) from exc


def _label(id: str) -> str:
    return {START: "start", END: "end"}.get(name := id.rpartition(INSIDE)[2], name)


def _kind(id: str, subgraphs: set[str]) -> str:
    name = id.rpartition(INSIDE)[2]
    if name in (START, END):
        return "start" if name == START else "end"
    return "subgraph" if id in subgraphs else "node"
