"""Runs: start, look, follow, wait, cancel."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import orjson
from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator

from runtime.api.accept import NotAcceptable, chosen
from runtime.api.dependencies import Services, ServicesDep
from runtime.api.document import headers, stream_content
from runtime.api.examples import RUN_ID
from runtime.api.problems import (
    AHEAD,
    BAD_CURSOR,
    BLOCKED,
    BUSY,
    HELD,
    NO_GRAPH,
    NO_RUN,
    NO_THREAD,
    NOT_NOW,
    RESPONSES,
    UNREADABLE,
    BadCursor,
    may,
)
from runtime.api.schemas import (
    CancelRequest,
    JsonRoute,
    NotYet,
    RunInfo,
    RunList,
    RunRequest,
    RunResult,
    run_info,
    terminal_data,
    unix_seconds,
)
from runtime.api.stream import LINE_HEADERS, NOTHING_MORE, LinesResponse, acts_on, stream_of
from runtime.api.submitting import submit_request
from runtime.engines.base import follow
from runtime.errors import InvalidRequest, NotFound, TraceNotRecorded
from runtime.events import STORED_TYPES, TERMINAL_TYPES, UNSTORED_TYPES
from runtime.model import Run, RunQuery, RunStatus
from runtime.transports.ndjson import MEDIA_TYPE
from telemetry.recorder import otlp

__all__ = [
    "ANSWERED",
    "NOT_YET",
    "RESULT",
    "UNANSWERABLE",
    "Heartbeat",
    "LastEventId",
    "Prefer",
    "answer_new_run",
    "read_cursor",
    "result_of",
    "router",
    "wait_for",
    "wanted",
]

router = APIRouter(prefix="/v1/runs", tags=["runs"], route_class=JsonRoute, responses=RESPONSES)
#: The longest that a request may wait for a result, in seconds.
WAIT_MAX = 60.0

#: The shortest time between heartbeats that a reader may ask for, in seconds.
HEARTBEAT_MIN = 0.1

#: What a request that starts a run may be answered with.
FORMS = ("application/json", MEDIA_TYPE)

_RUN_HEADERS = headers("Location", "X-Run-Id", "X-Trace-Id")
_LINE_HEADERS = headers(*LINE_HEADERS)
#: For the OpenAPI document: what a request that starts a run may answer.
ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The run's lines, or its result: what `Accept` and `Prefer` asked for.",
        "model": RunResult,
        "headers": _LINE_HEADERS,
        "content": {MEDIA_TYPE: stream_content()},
    },
    202: {"description": "The run is committed.", "headers": _RUN_HEADERS},
}
RESULT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The run has ended, one way or the other.",
        "model": RunResult,
        "headers": headers("X-Run-Id", "X-Trace-Id", "Cache-Control"),
    }
}
#: Why a run is not started that would be answered in no way that its client takes.
UNANSWERABLE = (
    NotAcceptable("text/event-stream", FORMS),
    InvalidRequest("Prefer", "wait='soon' is not a number of seconds"),
)
NOT_YET: dict[int | str, dict[str, Any]] = {
    202: {"description": "There is no result yet.", "model": NotYet, "headers": _RUN_HEADERS}
}
LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The run's lines, one JSON object each.",
        "headers": _LINE_HEADERS,
        "content": {MEDIA_TYPE: stream_content()},
    },
    **NOTHING_MORE,
}
SPANS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OTLP/JSON, as a collector takes it at `/v1/traces`.",
        "headers": headers("X-Trace-Id", "Cache-Control"),
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["resourceSpans"]},
                "example": {"resourceSpans": [], "open": [], "complete": True},
            }
        },
    }
}
#: What a request body may look like.
RUN_EXAMPLES: dict[str, Any] = {
    "input": {
        "summary": "A new run on a thread",
        "value": {
            "graph": "research",
            "thread_id": "t1",
            "input": {"question": "How do streams survive retries?"},
        },
    },
    "all": {
        "summary": "Values are recorded as well, and there is an end to it",
        "value": {
            "graph": "screening",
            "input": {"job": "backend-engineer"},
            "stream": ["updates", "values", "messages", "custom"],
            "deadline_s": 60,
            "metadata": {"asked_by": "ana"},
        },
    },
    "command": {
        "summary": "Answer an interrupt and change the state at once",
        "value": {
            "graph": "research",
            "thread_id": "t1",
            "command": {"resume": {"approve": True}, "update": {"notes": []}},
        },
    },
}


def _spaced(seconds: float | None) -> float | None:
    if seconds is not None and 0 < seconds < HEARTBEAT_MIN:
        raise ValueError(f"use {HEARTBEAT_MIN} or more seconds, or 0 for none")
    return seconds


RunId = Annotated[str, Path(description="A run's id.", examples=[RUN_ID])]
Heartbeat = Annotated[
    float | None,
    Query(
        ge=0,
        le=3600,
        description="Seconds of silence after which a `heartbeat` line comes: 0 for none, else "
        "0.1 or more; SERENO_HEARTBEAT_S unless said.",
    ),
    AfterValidator(_spaced),
]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="The same as `after`, which wins."),
]
Prefer = Annotated[
    str | None,
    Header(
        description="`wait=30` waits so many seconds for the result, at most 60.",
        examples=["wait=30"],
    ),
]


@router.post(
    "",
    summary="Start a run",
    status_code=202,
    response_model=RunInfo,
    responses={
        **ANSWERED,
        **may(
            NO_GRAPH,
            NO_THREAD,
            BUSY,
            HELD,
            InvalidRequest("input.question", "is required by the graph's input schema"),
            InvalidRequest("Idempotency-Key", "not supported yet; leave the header out"),
            *UNANSWERABLE,
            BLOCKED,
            *NOT_NOW,
            body=True,
        ),
    },
)
async def start(
    body: Annotated[RunRequest, Body(openapi_examples=RUN_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    idempotency_key: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description="Not supported yet: leave it out."),
    ] = None,
    prefer: Prefer = None,
) -> Response:
    """Commits a run on a thread that has no other. Answers 202 at once; streams the run's lines
    with `Accept: application/x-ndjson`; waits for the result with `Prefer: wait=30`. A run goes on
    when its client goes away."""
    if idempotency_key is not None:
        raise InvalidRequest("Idempotency-Key", "not supported yet; leave the header out")
    how = wanted(request)
    run = await submit_request(services, body)
    return await answer_new_run(services, run, how)


class Wanted(NamedTuple):
    """How a client wants to see the run that it starts."""

    lines: bool
    #: Seconds to wait for the result.
    wait_s: float | None


def wanted(request: Request) -> Wanted:
    """To be asked before the run is committed. Raises NotAcceptable, InvalidRequest."""
    lines = chosen(request, FORMS) == MEDIA_TYPE
    return Wanted(lines, _preferred_wait(request.headers.get("prefer")))


async def answer_new_run(services: Services, run: Run, how: Wanted) -> Response:
    """A new run as the client wants to see it: its stream, its result, or where it is."""
    acts_on(run)
    if how.lines:
        return stream_of(services, run, origin=True)
    if how.wait_s is not None:
        return await result_of(services, run, how.wait_s)
    return _accepted(run_info(run).model_dump(), run)


@router.get(
    "",
    summary="List runs",
    response_model=RunList,
    response_description="A page of runs.",
    responses=may(
        InvalidRequest("cursor", "use next_cursor of the page before"),
        UNREADABLE,
    ),
)
async def index(
    services: ServicesDep,
    status: Annotated[RunStatus | None, Query(description="Only runs that are so now.")] = None,
    graph: Annotated[str | None, Query(description="Only runs of this graph.")] = None,
    thread_id: Annotated[str | None, Query(description="Only runs on this thread.")] = None,
    updated_after: Annotated[
        str | None,
        Query(
            description="Only runs with a line after this time: RFC 3339 or unix seconds.",
            examples=["2026-11-24T17:00:00Z"],
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Runs on a page.")] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> dict[str, Any]:
    """Runs, newest first, a page at a time."""
    since = unix_seconds(updated_after, "updated_after") if updated_after is not None else None
    query = RunQuery(
        status=status,
        graph=graph,
        thread_id=thread_id,
        updated_after=since,
        limit=limit + 1,  # one more tells whether there is another page
        cursor=_read_page(cursor),
    )
    runs = await services.engine.search(query)
    page = runs[:limit]
    return {
        "runs": [run_info(run).model_dump() for run in page],
        "next_cursor": _page_after(page[-1]) if len(runs) > limit else None,
    }


@router.get(
    "/{run_id}",
    summary="Look at a run",
    response_model=RunInfo,
    response_description="The run.",
    responses={200: {"headers": headers("X-Trace-Id")}, **may(NO_RUN, UNREADABLE)},
)
async def show(run_id: RunId, services: ServicesDep) -> RunInfo:
    """A run as it is now: where it stands in the queue, or how it ended."""
    run = await _named(services, run_id)
    if run.terminal is not None:
        lines = await services.engine.read(run_id, run.terminal - 1, 1)
        result = dict(terminal_data(lines[0].body))
        result.pop("output", None)
        return run_info(run, result=result)
    position = None
    if run.status is RunStatus.PENDING:
        position = await services.engine.position(run)
    return run_info(run, queue_position=position)


@router.get(
    "/{run_id}/stream",
    summary="Follow a run",
    response_class=LinesResponse,
    responses={
        **LINES,
        **may(
            BAD_CURSOR,
            AHEAD,
            NO_RUN,
            InvalidRequest("types", f"'node' is no line type; known: {', '.join(STORED_TYPES)}"),
            UNREADABLE,
        ),
    },
)
async def stream(
    run_id: RunId,
    services: ServicesDep,
    after: Annotated[
        str | None,
        Query(description="The `seq` that was seen last, 0, or `latest`.", examples=["12"]),
    ] = None,
    types: Annotated[
        str | None,
        Query(
            description="A comma list of line types; the terminal line comes always.",
            examples=["node.retrying,call.retrying"],
        ),
    ] = None,
    follow: Annotated[bool, Query(description="0 ends when the reader has caught up.")] = True,
    heartbeat: Heartbeat = None,
    last_event_id: LastEventId = None,
) -> Response:
    """A run's lines from a cursor on: what is stored first, then what comes, to the terminal line.
    A stream that ends without one was cut: reconnect with the last `seq`."""
    run = await _named(services, run_id)
    return stream_of(
        services,
        run,
        after=read_cursor(after if after is not None else last_event_id, run),
        types=_read_types(types),
        following=follow,
        heartbeat_s=heartbeat,
    )


@router.get(
    "/{run_id}/data/{seq}/{member}",
    summary="Read a large member",
    responses={
        200: {
            "description": "The member, as it would have stood in the line's `data`.",
            "headers": headers("X-Trace-Id", "Cache-Control", "X-Content-Type-Options"),
            "content": {"application/json": {"schema": {}}},
        },
        **may(
            NO_RUN,
            NotFound(f"line 3 of run {RUN_ID!r} has no large member 'update'"),
            InvalidRequest("seq", "Input should be greater than or equal to 1"),
            UNREADABLE,
        ),
    },
)
async def data(
    run_id: RunId,
    seq: Annotated[int, Path(ge=1, lt=2**53, description="The line's seq.")],
    member: Annotated[str, Path(description="The member's name in `data`.", examples=["update"])],
    services: ServicesDep,
) -> Response:
    """A member that was too large for its line, in which `$ref` stands for it."""
    await _named(services, run_id)
    body = await services.engine.data(run_id, seq, member)
    if body is None:
        raise NotFound(f"line {seq} of run {run_id!r} has no large member {member!r}")
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(body, media_type="application/json", headers=headers)


@router.get(
    "/{run_id}/trace",
    summary="Read a run's trace",
    responses={**SPANS, **may(NO_RUN, TraceNotRecorded(RUN_ID), UNREADABLE)},
)
async def trace(run_id: RunId, services: ServicesDep) -> JSONResponse:
    """The run's spans as OTLP/JSON, from this process's own recorder. Those that have not ended
    are under `open`; `complete` is false when an epoch's are gone."""
    await _named(services, run_id)
    recorded = services.recorded(run_id)
    if recorded is None or recorded.empty:
        raise TraceNotRecorded(run_id)
    return JSONResponse(otlp(recorded), headers={"Cache-Control": "no-store"})


@router.get(
    "/{run_id}/wait",
    summary="Wait for a run's result",
    responses={
        **RESULT,
        **NOT_YET,
        **may(
            NO_RUN,
            InvalidRequest("timeout", "Input should be greater than or equal to 0"),
            UNREADABLE,
        ),
    },
)
async def wait(
    run_id: RunId,
    services: ServicesDep,
    timeout: Annotated[
        float, Query(ge=0, description="Seconds to wait; more than 60 are 60.")
    ] = WAIT_MAX,
) -> Response:
    """The result: 200 for every outcome, 202 when there is none yet."""
    run = await _named(services, run_id)
    return await result_of(services, run, timeout)


@router.post(
    "/{run_id}/cancel",
    summary="Cancel a run",
    status_code=202,
    response_model=RunInfo,
    responses={
        **RESULT,
        202: {"description": "The run is asked to end.", "headers": _RUN_HEADERS},
        **may(
            NO_RUN,
            InvalidRequest("reason", "String should have at most 500 characters"),
            UNREADABLE,
            body=True,
        ),
    },
)
async def cancel(
    run_id: RunId,
    services: ServicesDep,
    body: Annotated[
        CancelRequest | None, Body(examples=[{"reason": "the question has changed"}])
    ] = None,
) -> Response:
    """Ask a run to end. Idempotent: an ended run answers 200 with its outcome."""
    reason = (body.reason if body else None) or "api"
    run = await services.cancel(run_id, reason)
    acts_on(run)
    if run.terminal is not None:
        return await result_of(services, run, 0)
    return _accepted(run_info(run).model_dump(), run)


async def _named(services: Services, run_id: str) -> Run:
    """The run that an address names. Raises UnknownRun."""
    run = await services.engine.get(run_id)
    acts_on(run)
    return run


async def result_of(services: Services, run: Run, seconds: float) -> Response:
    """The terminal line's data plus the run's id, or 202 with where to ask again."""
    data = await wait_for(services, run, min(seconds, WAIT_MAX))
    if data is None:
        run = await services.engine.get(run.run_id)
        return _accepted({"run_id": run.run_id, "status": run.status}, run)
    body = orjson.dumps({"run_id": run.run_id, "thread_id": run.thread_id, **data})
    headers = {"X-Run-Id": run.run_id, "Cache-Control": "no-store"}
    return Response(body, media_type="application/json", headers=headers)


async def wait_for(services: Services, run: Run, seconds: float) -> Mapping[str, Any] | None:
    """The data of the run's terminal line; None when it does not come in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds if run.terminal is None else None):
            after = run.last_seq if run.terminal is None else run.terminal - 1
            async with contextlib.aclosing(follow(services.engine, run.run_id, after)) as batches:
                async for batch in batches:
                    if batch and batch[-1].type in TERMINAL_TYPES:
                        return terminal_data(batch[-1].body)
                    if services.draining():
                        return None
    return None


def read_cursor(value: str | None, run: Run) -> int:
    """A cursor as it stands in a query or header; nothing is the beginning."""
    if value is None:
        return 0
    if value == "latest":
        return run.last_seq
    if not re.fullmatch("[0-9]{1,18}", value):
        raise BadCursor(value)
    return int(value)


def _read_types(types: str | None) -> frozenset[str] | None:
    chosen = frozenset(part.strip() for part in (types or "").split(",") if part.strip())
    if unknown := sorted(chosen - {*STORED_TYPES, *UNSTORED_TYPES}):
        raise InvalidRequest(
            "types", f"{unknown[0]!r} is no line type; known: {', '.join(STORED_TYPES)}"
        )
    return chosen or None


def _preferred_wait(prefer: str | None) -> float | None:
    for part in (prefer or "").split(","):
        name, _, value = part.strip().partition("=")
        if name == "wait":
            try:
                seconds = float(value or WAIT_MAX)
            except ValueError:
                seconds = math.nan
            if not 0 <= seconds < math.inf:
                raise InvalidRequest("Prefer", f"wait={value!r} is not a number of seconds")
            return seconds
    return None


def _accepted(body: Mapping[str, Any], run: Run) -> JSONResponse:
    headers = {"Location": f"/v1/runs/{run.run_id}", "X-Run-Id": run.run_id}
    return JSONResponse(body, 202, headers=headers)


def _page_after(run: Run) -> str:
    return base64.urlsafe_b64encode(f"{run.created_at!r}|{run.run_id}".encode()).decode()


def _read_page(cursor: str | None) -> tuple[float, str] | None:
    if cursor is None:
        return None
    try:
        created, _, run_id = base64.urlsafe_b64decode(cursor).decode().partition("|")
        if math.isfinite(at := float(created)):
            return at, run_id
    except (ValueError, binascii.Error):
        pass
    raise InvalidRequest("cursor", "use next_cursor of the page before")
