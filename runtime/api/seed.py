"""The seed profile: one address that starts a task or attaches to it, and streams simple lines."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from runtime.api.dependencies import Services, ServicesDep
from runtime.api.problems import RESPONSES
from runtime.api.runs import NOT_YET, WAIT_MAX, read_cursor, result_of
from runtime.api.schemas import JsonRoute, SeedRequest, check_id
from runtime.api.stream import NOTHING_MORE, LinesResponse, acts_on, stream_of
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

__all__ = ["router"]

router = APIRouter(prefix="/api", tags=["seed profile"], route_class=JsonRoute, responses=RESPONSES)


@router.get("/stream", response_class=LinesResponse, responses=NOTHING_MORE)
async def attach(
    services: ServicesDep,
    thread_id: str | None = None,
    graph: str | None = None,
    run_id: str | None = None,
    after: str | None = None,
    last_event_id: Annotated[str | None, Header()] = None,
    sec_purpose: Annotated[str | None, Header()] = None,
    heartbeat: Annotated[float | None, Query(ge=0, le=3600)] = None,
) -> Response:
    """Attach to the thread's run, or start one. With `after` it only reads."""
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


@router.post("/stream", response_class=LinesResponse)
@router.post("/run/stream", include_in_schema=False)
async def start(services: ServicesDep, body: SeedRequest | None = None) -> Response:
    """Start a task and stream it; the same body on its active run attaches."""
    body = body or SeedRequest()
    run, started = await _start_or_same(services, body)
    return _seed_stream(services, run, body.graph, 0, None, origin=started)


@router.post("/run", responses=NOT_YET)
async def run(services: ServicesDep, body: SeedRequest | None = None) -> Response:
    """Start a task and wait for its result."""
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
        raise OtherGraph(run, graph)
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


class OtherGraph(Conflict):
    """The thread's run is one of another graph."""

    code = "other_graph"

    def __init__(self, run: Run, asked: str) -> None:
        super().__init__(
            f"thread {run.thread_id!r} has run {run.run_id!r} of graph {run.graph!r}, not {asked!r}"
        )
        self.active_run = run.run_id


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
