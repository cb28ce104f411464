"""A collector of our own: takes spans and log records by OTLP over HTTP, and keeps them decoded.

And two addresses where there is none: where nobody listens, and where nobody answers.
"""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from server import until

__all__ = ["Link", "Record", "Sink", "Span", "collecting", "nobody", "serving_http", "silence"]

KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
STATUSES = ("UNSET", "OK", "ERROR")


@dataclass(frozen=True, slots=True)
class Link:
    trace_id: str
    span_id: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Ids are hex; a root has no `parent_id`. Times are unix seconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    status: str
    start: float
    end: float
    attributes: Mapping[str, Any]
    links: Sequence[Link]
    #: Names of its events.
    events: Sequence[str]
    resource: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """A log record."""

    event: str
    body: str
    trace_id: str
    span_id: str
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]


class Sink:
    """What was delivered; each span once, unless it was delivered more often."""

    def __init__(self, status: int) -> None:
        self.spans: list[Span] = []
        self.records: list[Record] = []
        self.requests = 0
        #: Where it listens.
        self.url = ""
        #: What the next requests are answered with.
        self.status = status

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            self.spans += _spans(body)
        elif path == "/v1/logs":
            self.records += _records(body)

    def of(self, run_id: str) -> list[Span]:
        """The spans of a run, the earliest start first."""
        spans = [span for span in self.spans if span.attributes.get("sereno.run.id") == run_id]
        return sorted(spans, key=lambda span: span.start)

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def wait(self, *span_ids: str) -> None:
        """Wait until these spans are here."""
        wanted = set(span_ids)

        def missing() -> set[str]:
            return wanted - {span.span_id for span in self.spans}

        until(lambda: not missing(), f"{len(wanted)} spans are exported")


@contextmanager
def collecting(status: int = 200) -> Iterator[Sink]:
    """A collector on a free port, and what arrives there."""
    sink = Sink(status)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sink.requests += 1
            if (status := sink.status) == 200:
                sink.take(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with serving_http(Handler) as sink.url:
        yield sink


@contextmanager
def serving_http(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free port, in threads of this process; its URL."""

    class Http(ThreadingHTTPServer):
        daemon_threads: ClassVar[bool] = True
        block_on_close: ClassVar[bool] = False

    with Http(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nobody listens, and where nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def silence() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def _spans(body: bytes) -> Iterator[Span]:
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    kind=KINDS[span.kind],
                    status=STATUSES[span.status.code],
                    start=span.start_time_unix_nano / 1e9,
                    end=span.end_time_unix_nano / 1e9,
                    attributes=_attributes(span.attributes),
                    links=[
                        Link(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes))
                        for link in span.links
                    ],
                    events=[event.name for event in span.events],
                    resource=resource,
                )


def _records(body: bytes) -> Iterator[Record]:
    for group in ExportLogsServiceRequest.FromString(body).resource_logs:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_logs:
            for record in scope.log_records:
                yield Record(
                    event=record.event_name,
                    body=record.body.string_value,
                    trace_id=record.trace_id.hex(),
                    span_id=record.span_id.hex(),
                    attributes=_attributes(record.attributes),
                    resource=resource,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind) if kind else None
