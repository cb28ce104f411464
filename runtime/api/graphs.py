"""Graphs: what is served, and what it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import PlainTextResponse

from runtime.api.dependencies import ServicesDep
from runtime.api.drawing import NotDrawable, drawing_of
from runtime.api.problems import NO_GRAPH, RESPONSES, may
from runtime.api.schemas import Drawing, GraphInfo, GraphList, GraphSchema
from runtime.errors import InvalidRequest
from runtime.graphs import LoadedGraph

__all__ = ["router"]

router = APIRouter(prefix="/v1/graphs", tags=["graphs"], responses=RESPONSES)

GraphName = Annotated[str, Path(description="A graph's name.", examples=["research"])]

#: For the OpenAPI document.
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The drawing, in the format that was asked for.",
        "content": {
            "text/plain": {
                "schema": {"type": "string"},
                "example": 'graph TD;\n\tn0(["start"]);\n\tn1("plan");\n\tn0 --> n1;\n',
            }
        },
    }
}
#: Levels of subgraphs that may be opened.
XRAY_MAX = 100


@router.get("", summary="List graphs", response_model=GraphList, response_description="The graphs.")
async def index(services: ServicesDep) -> dict[str, Any]:
    """The graphs that are served, and why others are not."""
    return {
        "graphs": [_info(graph).model_dump() for graph in services.graphs],
        "failures": dict(services.graphs.failures),
    }


@router.get(
    "/{name}",
    summary="Look at a graph",
    response_description="The graph.",
    responses=may(NO_GRAPH),
)
async def show(name: GraphName, services: ServicesDep) -> GraphInfo:
    """What it is for, its nodes, and what a run without an input starts from."""
    return _info(services.graphs.get(name))


@router.get(
    "/{name}/schema",
    summary="Read a graph's schemas",
    response_model=GraphSchema,
    response_description="The schemas.",
    responses=may(NO_GRAPH),
)
async def schema(name: GraphName, services: ServicesDep) -> dict[str, Any]:
    """JSON Schemas of a graph's input, output and context."""
    return services.graphs.get(name).schema()


@router.get(
    "/{name}/drawing",
    summary="Draw a graph",
    response_model=Drawing,
    responses={
        **DRAWN,
        **may(
            NO_GRAPH,
            NotDrawable("research", ValueError()),
            InvalidRequest("format", "Input should be 'json' or 'mermaid'"),
        ),
    },
)
async def draw(
    name: GraphName,
    services: ServicesDep,
    format: Annotated[
        Literal["json", "mermaid"], Query(description="`mermaid` is text for Mermaid.")
    ] = "json",
    xray: Annotated[
        int, Query(ge=0, le=XRAY_MAX, description="How many levels of subgraphs are opened.")
    ] = 0,
) -> Response:
    """Its nodes and edges; `format` chooses, not `Accept`. A node's `id` is its `ns` and name in
    lines, joined by `:`."""
    drawing = await drawing_of(services.graphs.get(name), xray)
    if format == "mermaid":
        return PlainTextResponse(drawing.mermaid)
    return Response(drawing.json, media_type="application/json")


def _info(graph: LoadedGraph) -> GraphInfo:
    return GraphInfo(
        name=graph.name,
        description=graph.description,
        nodes=list(graph.nodes),
        default_input=graph.default_input,
        digest=graph.digest,
    )
