"""Graphs: what is served, and what it takes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from runtime.api.dependencies import ServicesDep
from runtime.api.problems import RESPONSES
from runtime.api.schemas import GraphInfo
from runtime.graphs import LoadedGraph

__all__ = ["router"]

router = APIRouter(prefix="/v1/graphs", tags=["graphs"], responses=RESPONSES)


@router.get("")
async def index(services: ServicesDep) -> dict[str, Any]:
    """The graphs that are served, and why others are not."""
    return {
        "graphs": [_info(graph).model_dump() for graph in services.graphs],
        "failures": dict(services.graphs.failures),
    }


@router.get("/{name}")
async def show(name: str, services: ServicesDep) -> GraphInfo:
    """One graph."""
    return _info(services.graphs.get(name))


@router.get("/{name}/schema")
async def schema(name: str, services: ServicesDep) -> dict[str, Any]:
    """JSON Schemas of a graph's input, output and context."""
    return services.graphs.get(name).schema()


def _info(graph: LoadedGraph) -> GraphInfo:
    return GraphInfo(
        name=graph.name,
        description=graph.description,
        nodes=list(graph.nodes),
        default_input=graph.default_input,
        digest=graph.digest,
    )
