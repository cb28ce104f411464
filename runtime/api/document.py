"""What `/openapi.json` says beyond what the routes' signatures tell: headers, problems, lines."""

from __future__ import annotations

import asyncio
import json
from threading import Lock
from typing import Any

from fastapi import FastAPI, Request, Response

from runtime.api.etags import etag_of, is_known
from runtime.api.examples import ANSWERS, RUN_ID, TRACE_ID
from runtime.api.lines import LINE_SCHEMAS
from telemetry.http import UNSEEN

__all__ = ["LINES_EXAMPLE", "headers", "install", "stream_content"]

DESCRIPTION = """\
A run is one execution of a graph. `POST /v1/runs` commits it and answers; what it does is a log of
numbered lines, which any number of readers follow at `GET /v1/runs/{run_id}/stream`, each from the
`seq` that it has seen last. The end of a stream without a terminal line is the end of the
connection, not of the run: reconnect with `after`.

What starts a run answers with JSON or with its lines, as `Accept` likes best: `*/*` or no header is
JSON, and who takes neither gets 406 `not_acceptable`, and no run. Elsewhere a header `Accept` that
fits nothing is ignored. Errors are `application/problem+json` in any case. An address that does not
exist is 404 `not_found`, a method that it does not have 405 `method_not_allowed` with `Allow`.

The `traceparent` of a request is the parent of its trace, or linked from it, as SERENO_TRACE_TRUST
says; its `X-Request-Id` stands in the server's log.

There are no API keys yet: a server listens to its own machine only, unless told otherwise.
"""

TAGS = {
    "runs": "Start, look, follow, wait, cancel.",
    "threads": "A line of state that runs continue, and the answer to what one of them asks.",
    "graphs": "What is served, what it takes, and how it looks.",
    "seed profile": "One address that starts a task or attaches to it, and streams simple lines.",
    "operations": "Is it alive, is it ready, and what is it?",
}

HEADERS: dict[str, dict[str, Any]] = {
    "Cache-Control": {
        "description": "`no-store`: the next answer may be another one.",
        "schema": {"type": "string"},
        "example": "no-store",
    },
    "Location": {
        "description": "Where the run is.",
        "schema": {"type": "string", "pattern": "^/v1/runs/"},
        "example": f"/v1/runs/{RUN_ID}",
    },
    "Retry-After": {
        "description": "Seconds after which the same request may succeed.",
        "schema": {"type": "integer", "minimum": 0},
        "example": 5,
    },
    "X-Accel-Buffering": {
        "description": "Tells a proxy to pass on each line as it comes.",
        "schema": {"const": "no"},
        "example": "no",
    },
    "X-Content-Type-Options": {
        "description": "Tells a browser to believe the content type.",
        "schema": {"const": "nosniff"},
        "example": "nosniff",
    },
    "X-Log-Id": {
        "description": "The store that the run's log is in. Another value means another log: "
        "cursors into the old one are worth nothing.",
        "schema": {"type": "string"},
        "example": "c5d74f2fa583499789b7d1e67977bdd1",
    },
    "X-Run-Id": {
        "description": "The run that this is about.",
        "schema": {"type": "string", "pattern": "^[0-9A-HJKMNP-TV-Z]{26}$"},
        "example": RUN_ID,
    },
    "X-Run-Status": {
        "description": "How the run ended.",
        "schema": {
            "type": "string",
            "enum": ["success", "error", "timeout", "interrupted", "cancelled"],
        },
        "example": "success",
    },
    "X-Trace-Id": {
        "description": "The trace that the run's spans are in. Absent when tracing is off, and "
        "when no run was found or started.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "example": TRACE_ID,
    },
    "traceresponse": {
        "description": "The W3C id of the request's own span. Absent when tracing is off.",
        "schema": {"type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"},
        "example": f"00-{TRACE_ID}-d5f1e2a3b4c5d6e7-01",
    },
}

PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "What went wrong (RFC 9457). Programs read `code`, people read `detail`.",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string", "const": "about:blank"},
        "title": {"type": "string", "description": "The status in words."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "code": {"type": "string", "description": "Stable; what a program may act on."},
        "detail": {"type": "string", "description": "What to do about it."},
        "trace_id": {"type": "string", "description": "The request's trace."},
        "field": {"type": "string", "description": "The field that cannot be used."},
        "errors": {
            "type": "array",
            "description": "All fields that cannot be used.",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
        "run_id": {"type": "string"},
        "thread_id": {"type": "string"},
        "active_run": {"type": "string", "description": "The run that has the thread."},
        "node": {"type": "string"},
        "known": {
            "type": "array",
            "items": {"type": "string"},
            "description": "What could have been asked for.",
        },
        "after": {"type": "integer", "description": "The cursor that was sent."},
        "last_seq": {"type": "integer", "description": "The last line that there is."},
    },
}

_IDS = f'"run_id":"{RUN_ID}","thread_id":"t1"'
_NODE = '"node":"fetch","ns":[],"path":[],"task":"c1d7…"'
#: A run with one node that fails once; trace and span ids are left out.
LINES_EXAMPLE = f"""\
{{"v":1,"seq":1,"ts":"2026-11-24T17:06:08.101Z","type":"run.queued",{_IDS},"epoch":0,"data":{{"graph":"research","trigger":"api"}}}}
{{"v":1,"seq":2,"ts":"2026-11-24T17:06:08.110Z","type":"run.started",{_IDS},"epoch":1,"data":{{}}}}
{{"v":1,"seq":3,"ts":"2026-11-24T17:06:08.112Z","type":"node.started",{_IDS},"epoch":1,{_NODE},"attempt":1,"step":1,"data":{{}}}}
{{"v":1,"seq":4,"ts":"2026-11-24T17:06:08.978Z","type":"node.retrying",{_IDS},"epoch":1,{_NODE},"attempt":1,"step":1,"data":{{"error_class":"connection","error_type":"ConnectionError","retry_in_ms":200.0,"jitter_ms":0.0,"max_attempts":3,"discard_from":3}}}}
{{"v":1,"ts":"2026-11-24T17:06:09.000Z","type":"caught_up",{_IDS},"epoch":1,"after":4,"data":{{}}}}
"""


def headers(*names: str) -> dict[str, Any]:
    """For a response of the OpenAPI document: headers that are described once."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def stream_content(example: str = LINES_EXAMPLE, schema: str = "Line") -> dict[str, Any]:
    """For a response of the OpenAPI document: NDJSON, whose schema is that of one line."""
    return {
        "schema": {"$ref": f"#/components/schemas/{schema}"},
        "examples": {"stream": {"summary": "One object a line", "value": example}},
    }


def install(app: FastAPI) -> None:
    """Serve the app's document, which is built when it is first asked for."""
    generate = app.openapi
    building, body, etag = Lock(), b"", ""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        assert app.openapi_schema is not None
        return app.openapi_schema

    def build() -> None:
        nonlocal body, etag
        with building:
            if not body:
                built = json.dumps(openapi(), separators=(",", ":")).encode()
                etag = etag_of(built)
                body = built

    async def document(request: Request) -> Response:
        # In a thread, because building it takes longer than anybody may have the event loop.
        if not body:
            await asyncio.to_thread(build)
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        if is_known(request, etag):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="application/json")

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_route("/openapi.json", document, include_in_schema=False)


def _complete(document: dict[str, Any]) -> None:
    document["info"]["description"] = DESCRIPTION
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update({"Problem": PROBLEM, **LINE_SCHEMAS})
    components["headers"] = HEADERS
    for name, answer in ANSWERS.items():
        components["schemas"][name]["examples"] = [answer]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            responses = operation["responses"].values()
            # Whatever is answered, a request that has found its run says which trace it is in.
            found = any("X-Trace-Id" in response.get("headers", {}) for response in responses)
            every = [*["X-Trace-Id"] * found, *["traceresponse"] * (path not in UNSEEN)]
            for response in responses:
                response.setdefault("headers", {}).update(headers(*every))
