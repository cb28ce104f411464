"""Errors on the wire: RFC 9457 problems, one row for each error of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from runtime.api import document
from runtime.api.accept import NotAcceptable
from runtime.api.document import headers
from runtime.api.examples import RUN_ID, TRACE_ID
from runtime.engines.serde import StateTypeBlocked
from runtime.errors import (
    Conflict,
    CursorAhead,
    Draining,
    InvalidRequest,
    NotFound,
    QueueFull,
    SerenoError,
    StorageFailed,
    ThreadBusy,
    ThreadHeld,
    Unavailable,
    UnknownGraph,
    UnknownRun,
    UnknownThread,
)
from telemetry import http

__all__ = [
    "AHEAD",
    "BAD_CURSOR",
    "BLOCKED",
    "BUSY",
    "HELD",
    "NOT_NOW",
    "NO_GRAPH",
    "NO_RUN",
    "NO_THREAD",
    "RESPONSES",
    "UNREADABLE",
    "BadCursor",
    "install",
    "may",
    "problem",
]


class BadCursor(InvalidRequest):
    """`after` is neither a number nor `latest`."""

    code = "invalid_cursor"

    def __init__(self, value: str) -> None:
        super().__init__("after", f"{value!r} is not a cursor; use a seq, 0 or 'latest'")


#: Error → status. The first row that fits counts.
STATUSES: Sequence[tuple[type[SerenoError], int]] = (
    (BadCursor, 400),
    (NotAcceptable, 406),
    (InvalidRequest, 422),
    (NotFound, 404),
    (Conflict, 409),
    (CursorAhead, 400),
    (Unavailable, 503),
    (SerenoError, 500),
)
#: Attributes of an error that a client may use.
MEMBERS = ("field", "run_id", "thread_id", "active_run", "node", "known", "last_seq", "after")

#: Wrong fields that are listed.
ERRORS_MAX = 20
MEDIA_TYPE = "application/problem+json"

_log = structlog.get_logger("api")

#: Codes that have no error of ours.
INVALID_JSON = (400, "invalid_json", "the body is not JSON: unexpected end of data")
TOO_LARGE = (413, "body_too_large", "the body is larger than 16777216 bytes")
NOT_DECLARED = (
    415,
    "unsupported_media_type",
    "send the body with Content-Type: application/json",
)
INTERNAL = (500, "internal", "the request could not be answered; the server's log says why")


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem, and say so in its document."""
    document.install(app)
    app.add_exception_handler(SerenoError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    **members: Any,
) -> JSONResponse:
    """A problem document; members that are None are left out. A trace is the request's."""
    body = _body(status, code, detail, members)
    if (trace_id := http.current().trace_id) is not None:
        body["trace_id"] = trace_id
    return _Problem(body, status, headers=headers)


#: One of each, for the OpenAPI document.
NO_RUN = UnknownRun(RUN_ID)
NO_THREAD = UnknownThread("t1")
NO_GRAPH = UnknownGraph("reserch", ("research", "screening"))
BUSY = ThreadBusy("t1", RUN_ID)
HELD = ThreadHeld("t1", RUN_ID, "fetch")
BAD_CURSOR = BadCursor("first")
AHEAD = CursorAhead(120, 57)
#: Why a run is not taken now, or a store cannot be read or written.
NOT_NOW = (Draining(), QueueFull(1000), StorageFailed("database or disk is full"))
UNREADABLE = NOT_NOW[-1]
#: Of whoever reads a thread's state.
BLOCKED = StateTypeBlocked("agent.state:Plan")


def may(
    *errors: SerenoError | tuple[int, str, str], body: bool = False
) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: problems that a route may answer, one of each. A route that reads
    a body may find it unreadable."""
    found: dict[int | str, dict[str, Any]] = {}
    for error in (*errors, *((INVALID_JSON, TOO_LARGE, NOT_DECLARED) if body else ())):
        if isinstance(error, SerenoError):
            members = {name: getattr(error, name, None) for name in MEMBERS}
            example = _body(_status(error), error.code, str(error), members)
        else:
            status, code, detail = error
            example = _body(status, code, detail, {})
        answer = found.setdefault(example["status"], _documented(example["title"]))
        if isinstance(error, Unavailable):
            answer["headers"] = headers("Retry-After")
        examples = answer["content"][MEDIA_TYPE]["examples"]
        name = example["code"]
        if name in examples:  # of another field
            name = f"{name}: {example['field']}"
        examples[name] = {"value": {**example, "trace_id": TRACE_ID}}
    return found


def _documented(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": schema, "examples": {}}},
    }


def _body(status: int, code: str, detail: str, members: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        **{name: value for name, value in members.items() if value is not None},
    }


def _status(error: SerenoError) -> int:
    return next(status for kind, status in STATUSES if isinstance(error, kind))


#: For the OpenAPI document: what any address may answer besides.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {**may(INTERNAL)[500], "description": "A problem (RFC 9457)."}
}


class _Problem(JSONResponse):
    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        # ASCII: what a client sent wrong may hold characters that have no UTF-8.
        return json.dumps(content, separators=(",", ":")).encode()


async def _ours(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, SerenoError)
    status = _status(exc)
    if status >= 500:
        http.current().failed(exc)
    headers = {"Retry-After": str(exc.retry_after)} if isinstance(exc, Unavailable) else None
    members = {name: getattr(exc, name, None) for name in MEMBERS}
    if members["run_id"] is None:
        members["run_id"] = request.path_params.get("run_id")
    return problem(status, exc.code, str(exc), headers=headers, **members)


async def _invalid(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    # A body that cannot be read is malformed, a value that cannot be used is not.
    for error in exc.errors():
        if error["type"] == "json_invalid":
            return problem(400, "invalid_json", f"the body is not JSON: {error['ctx']['error']}")
    errors = [
        {"field": _field(error["loc"]), "message": error["msg"].removeprefix("Value error, ")}
        for error in exc.errors()[:ERRORS_MAX]
    ]
    first = errors[0]
    detail = f"{first['field']}: {first['message']}"
    return problem(422, "invalid_request", detail, field=first["field"], errors=errors)


async def _http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_")
    return problem(exc.status_code, code, str(exc.detail), headers=dict(exc.headers or {}))


async def _unexpected(request: Request, exc: Exception) -> Response:
    http.current().failed(exc)  # before the answer, with which the request's span ends
    _log.error("Request failed", path=request.url.path, exc_info=exc)
    return problem(*INTERNAL)


def _field(loc: Sequence[Any]) -> str:
    parts = [str(part) for part in loc if part not in ("body", "query", "path", "header")]
    return ".".join(parts) or str(loc[0])
