"""Breaks one thing of a runtime, to see whether the smoke test notices.

Python imports it at its start when its folder is on PYTHONPATH; SMOKE_BREAK says what to break.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

TERMINAL = re.compile(
    rb'[^\n]*"type":"(?:run\.(?:completed|failed|cancelled|timed_out|interrupted)|final)"[^\n]*\n'
)


def without_ts(path: str, body: bytes) -> bytes:
    return json.dumps({"status": "ok"}).encode() if path == "/health" else body


def with_another_name(path: str, body: bytes) -> bytes:
    if path != "/metrics":
        return body
    return body.replace(b"sereno_node_attempts_total", b"sereno_node_tries_total")


def without_terminal_line(path: str, body: bytes) -> bytes:
    return TERMINAL.sub(b"", body) if "stream" in path or path == "/v1/runs" else body


class Edited:
    """An ASGI app whose answers are changed."""

    def __init__(self, app: Any, edit: Callable[[str, bytes], bytes]) -> None:
        self._app = app
        self._edit = edit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def edited(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != b"content-length"]
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                body = self._edit(scope["path"], message.get("body", b""))
                message = {**message, "body": body}
            await send(message)

        await self._app(scope, receive, edited if scope["type"] == "http" else send)


def edit_answers(edit: Callable[[str, bytes], bytes]) -> None:
    import uvicorn

    configure = uvicorn.Config.__init__

    def with_edits(self: uvicorn.Config, app: Any, *args: Any, **kwargs: Any) -> None:
        configure(self, Edited(app, edit), *args, **kwargs)

    uvicorn.Config.__init__ = with_edits  # type: ignore[method-assign]


def export_nothing() -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    OTLPSpanExporter.export = lambda *_: SpanExportResult.SUCCESS  # type: ignore[method-assign]


if "serve" in sys.orig_argv:
    match os.environ.get("SMOKE_BREAK"):
        case "health":
            edit_answers(without_ts)
        case "metric":
            edit_answers(with_another_name)
        case "terminal":
            edit_answers(without_terminal_line)
        case "spans":
            export_nothing()
