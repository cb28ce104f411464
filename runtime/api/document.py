"""What `/openapi.json` says beyond what the routes' signatures tell: headers, problems, lines."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from runtime.api.lines import LINE_SCHEMAS

__all__ = ["LINES_EXAMPLE", "RUN_ID", "TRACE_ID", "headers", "install", "stream_content"]

#: For examples.
RUN_ID = "01KAV3V2Q4X8ZJ5T9W6M1N7R0C"
TRACE_ID = "74f3b1c09d2e4a5f8b6c7d8e9f0a1b2c"

DESCRIPTION = """\
A run is one execution of a graph. `POST /v1/runs` commits it and answers; what it does is a log of
numbered lines, which any number of readers follow at `GET /v1/runs/{run_id}/stream`, each from the
`seq` that it has seen last. The end of a stream without a terminal line is the end of the
connection, not of the run: reconnect with `after`.

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
    "X-Log-Id": {
        "description": "The store that the run's log is in. Another value means another log: "
        "cursors into the old one are worth nothing.",
        "schema": {"type": "string"},
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
        "description": "The trace that the run's spans are in. Absent when tracing is off.",
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
    """Have the app's document completed when it is first asked for."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    document["info"]["description"] = DESCRIPTION
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update({"Problem": PROBLEM, **LINE_SCHEMAS})
    components["headers"] = HEADERS
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                response.setdefault("headers", {}).update(headers("traceresponse"))
