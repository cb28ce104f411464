"""The seed profile: one address that starts a task or attaches to it, and streams simple lines."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response

from runtime.api.dependencies import Services, ServicesDep
from runtime.api.document import headers, stream_content
from runtime.api.examples import RUN_ID
from runtime.api.problems import (
    AHEAD,
    BAD_CURSOR,
    BUSY,
    HELD,
    NO_GRAPH,
    NO_RUN,
    NO_THREAD,
    NOT_NOW,
    RESPONSES,
    may,
)
from runtime.api.runs import (
    NOT_YET,
    RESULT,
    WAIT_MAX,
    Heartbeat,
    LastEventId,
    read_cursor,
    result_of,
)
from runtime.api.schemas import JsonRoute, SeedRequest, check_id
from runtime.api.stream import LINE_HEADERS, NOTHING_MORE, LinesResponse, acts_on, stream_of
from runtime.api.submitting import default_input, latest_run, submit_stored
from runtime.errors import (
    Conflict,
    InvalidRequest,
    NotRecorded,
    ThreadBusy,
    UnknownGraph,
    UnknownThread,
)
from runtime.graphs import LoadedGraph
from runtime.model import SEED, Run
from runtime.transports.ndjson import MEDIA_TYPE

__all__ = ["router"]

router = APIRouter(prefix="/api", tags=["seed profile"], route_class=JsonRoute, responses=RESPONSES)


#: For the OpenAPI document.
SEED_EXAMPLE = """\
{"v":1,"seq":3,"type":"node.started","run_id":"01KAV3…","node":"load","attempt":1,"data":{}}
{"v":1,"seq":5,"type":"snapshot","run_id":"01KAV3…","nodes":["load"],"snapshot":{"job":"backend-engineer"}}
{"v":1,"seq":9,"type":"final","run_id":"01KAV3…","ok":true,"status":"success","data":{}}
"""
SEED_LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The task's lines, one JSON object each.",
        "headers": headers(*LINE_HEADERS),
        "content": {MEDIA_TYPE: stream_content(SEED_EXAMPLE, "SeedLine")},
    }
}
START_EXAMPLES: dict[str, Any] = {
    "nothing": {"summary": "The default graph, its default input", "value": {}},
    "all": {
        "summary": "A task by name",
        "value": {"graph": "screening", "thread_id": "demo", "input": {"job": "backend-engineer"}},
    },
}


class OtherGraph(Conflict):
    """The thread's run is one of another graph."""

    code = "other_graph"

    def __init__(self, thread_id: str, run_id: str, graph: str, asked: str) -> None:
        super().__init__(
            f"thread {thread_id!r} has run {run_id!r} of graph {graph!r}, not {asked!r}"
        )
        self.active_run = run_id


NOT_SEED = NotRecorded(RUN_ID, "values")
STARTING = (
    NO_GRAPH,
    HELD,
    InvalidRequest("thread_id", "use 1 to 128 of the characters A-Z a-z 0-9 _ . : -"),
    *NOT_NOW,
)

Task = Annotated[SeedRequest | None, Body(openapi_examples=START_EXAMPLES)]


@router.get(
    "/stream",
    summary="Attach to a task, or start it",
    response_class=LinesResponse,
    responses={
        **SEED_LINES,
        **NOTHING_MORE,
        **may(
            BAD_CURSOR,
            AHEAD,
            NO_RUN,
            NO_THREAD,
            NOT_SEED,
            OtherGraph("t1", RUN_ID, "research", "screening"),
            *STARTING,
        ),
    },
)
async def attach(
    services: ServicesDep,
    thread_id: Annotated[
        str | None, Query(description="The task's name; without it a new one.", examples=["demo"])
    ] = None,
    graph: Annotated[
        str | None, Query(description="SERENO_DEFAULT_GRAPH unless said.", examples=["screening"])
    ] = None,
    run_id: Annotated[str | None, Query(description="Attach to this run of it.")] = None,
    after: Annotated[
        str | None, Query(description="Only read, from this `seq` on.", examples=["12"])
    ] = None,
    last_event_id: LastEventId = None,
    sec_purpose: Annotated[
        str | None,
        Header(alias="Sec-Purpose", description="A prefetch is refused: this starts a task."),
    ] = None,
    heartbeat: Heartbeat = None,
) -> Response:
    """Attach to the thread's run, or start one. With `after` it only reads. Its lines are those of
    profile v1, with `snapshot` for `values` and `final` for the terminal line."""
    if sec_purpose is not None and "prefetch" in sec_purpose:
        raise InvalidRequest("Sec-Purpose", "this address starts a task: it is not prefetched")
    _valid_thread(thread_id)
    cursor = after if after is not None else last_event_id
    run = await _found(services, thread_id, run_id)
    if cursor is not None:
        if run is None:
            raise UnknownThread(thread_id or "")
        return _seed_stream(services, run, graph, read_cursor(cursor, run), heartbeat)
    if run is not None and (run_id or run.terminal is None or run.status == "interrupted"):
        return _seed_stream(services, run, graph, 0, heartbeat)
    try:
        run = await _start(services, SeedRequest(thread_id=thread_id, graph=graph))
    except ThreadBusy as busy:  # somebody was faster
        run = await services.engine.get(busy.active_run)
        return _seed_stream(services, run, graph, 0, heartbeat)
    return _seed_stream(services, run, graph, 0, heartbeat, origin=True)


@router.post(
    "/stream",
    summary="Start a task and stream it",
    response_class=LinesResponse,
    responses={**SEED_LINES, **may(BUSY, NOT_SEED, *STARTING, body=True)},
)
@router.post("/run/stream", include_in_schema=False)
async def start(services: ServicesDep, body: Task = None) -> Response:
    """The same body on its active run attaches."""
    body = body or SeedRequest()
    run, started = await _start_or_same(services, body)
    return _seed_stream(services, run, body.graph, 0, None, origin=started)


@router.post(
    "/run",
    summary="Start a task and wait for its result",
    responses={**RESULT, **NOT_YET, **may(BUSY, *STARTING, body=True)},
)
async def run(services: ServicesDep, body: Task = None) -> Response:
    """Waits for 60 seconds at most. The same body on its active run attaches."""
    run, _ = await _start_or_same(services, body or SeedRequest())
    acts_on(run)
    return await result_of(services, run, WAIT_MAX)


async def _found(services: Services, thread_id: str | None, run_id: str | None) -> Run | None:
    """The run that is named, else the thread's latest one."""
    if run_id is not None:
        return await services.engine.get(run_id)
    if thread_id is None:
        return None
    try:
        return await latest_run(services, thread_id)
    except UnknownThread:
        return None


async def _start(services: Services, body: SeedRequest) -> Run:
    graph = _graph(services, body.graph)
    stored: dict[str, Any] = {"input": default_input(graph, body.input), "stream": list(SEED)}
    return await submit_stored(services, graph, stored, thread_id=body.thread_id)


async def _start_or_same(services: Services, body: SeedRequest) -> tuple[Run, bool]:
    """A run, and whether it is new: on a busy thread only what was asked for may run already."""
    try:
        return await _start(services, body), True
    except ThreadBusy as busy:
        active = await services.engine.get(busy.active_run)
        graph = _graph(services, body.graph)
        asked = {"input": default_input(graph, body.input)}
        running = {name: value for name, value in active.body.items() if name != "stream"}
        if active.graph != graph.name or running != asked:
            raise
        return active, False


def _seed_stream(
    services: Services,
    run: Run,
    graph: str | None,
    after: int,
    heartbeat: float | None,
    *,
    origin: bool = False,
) -> Response:
    acts_on(run)
    if graph is not None and graph != run.graph:
        raise OtherGraph(run.thread_id, run.run_id, run.graph, graph)
    if "values" not in run.modes:
        raise NotRecorded(run.run_id, "values")
    transport = services.seed.showing(_public(services, run.graph))
    return stream_of(
        services, run, origin=origin, after=after, transport=transport, heartbeat_s=heartbeat
    )


def _public(services: Services, name: str) -> frozenset[str] | None:
    """The keys of a graph's output schema; None when its state is no object."""
    try:
        keys = services.graphs.get(name).graph.output_channels
    except UnknownGraph:  # served by another configuration
        return None
    return None if isinstance(keys, str) else frozenset(keys)


def _graph(services: Services, name: str | None) -> LoadedGraph:
    chosen = name or services.settings.default_graph or next(iter(services.graphs.names()), None)
    if chosen is None:
        raise UnknownGraph("", ())
    return services.graphs.get(chosen)


def _valid_thread(thread_id: str | None) -> None:
    try:
        check_id(thread_id)
    except ValueError as exc:
        raise InvalidRequest("thread_id", str(exc)) from None
