"""Exporting to collectors of every kind, over real sockets: all losses counted, no exit held up."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from server import environment

#: Ends spans inside an event loop, closes in a thread as the server does, and says how it went.
CHILD = """
import asyncio, json, sys, time
from opentelemetry import trace
from telemetry import logs
from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch
from telemetry.tracing import Tracing

RESULTS = ("exported", "failed", "dropped_queue_full")

async def beat(lags):
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.005)
        lags.append(time.perf_counter() - began - 0.005)

async def main(spans, pause):
    metrics = Metrics()
    tracing = Tracing(selfwatch=Selfwatch(metrics))
    assert tracing.make_global() and not tracing.make_global()
    tracer = trace.get_tracer("somebody")
    for number in range(spans):
        tracer.start_span(f"s{number}").end()
    await asyncio.sleep(pause)
    lags = []
    beating = asyncio.create_task(beat(lags))
    began = time.monotonic()
    await asyncio.to_thread(tracing.close, 5.0)
    closed = time.monotonic() - began
    beating.cancel()
    family = metrics["telemetry_spans_total"]
    counts = {result: family.value(result) for result in RESULTS}
    last = metrics["telemetry_last_export_success_timestamp_seconds"].value("traces")
    said = {"closed_s": closed, "lag_s": max(lags, default=0), "sent": last == last}
    return said | counts | {"at": time.time()}

with logs.configure(stream=sys.stderr.buffer):
    said = asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
said["at"] = time.time()
print(json.dumps(said), flush=True)
"""


class Child:
    """A process that traced, with what it said."""

    def __init__(self, endpoint: str, spans: int, *, pause: float = 0, **env: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(spans), str(pause)],
            env=environment(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **env),
            capture_output=True,
            timeout=60,
            check=False,
        )
        ended = time.time()
        assert done.returncode == 0, done.stderr.decode()
        self.said: dict[str, Any] = json.loads(done.stdout)
        #: Seconds from its last word to its end.
        self.exit_s = ended - self.said["at"]
        self.logged = [json.loads(line) for line in done.stderr.splitlines()]

    @property
    def counts(self) -> dict[str, float]:
        return {name: self.said[name] for name in ("exported", "failed", "dropped_queue_full")}

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.logged if line.get("event") == name]

    def assert_prompt(self) -> None:
        """Neither the shutdown, nor the loop, nor the exit waited for the collector."""
        assert self.said["closed_s"] < 5.2
        assert self.said["lag_s"] < 0.5  # 50 ms on a machine that does nothing else
        assert self.exit_s < 2


class Collector:
    """An HTTP server that takes spans, or answers otherwise."""

    def __init__(self, status: int = 200, delay_s: float = 0) -> None:
        names = self.names = Counter[str]()
        resources: list[dict[str, str]] = []
        self.resources = resources
        self.requests = 0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                collector.requests += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(delay_s)
                if status == 200:
                    if self.headers.get("Content-Encoding") == "gzip":
                        body = gzip.decompress(body)
                    asked = ExportTraceServiceRequest.FromString(body)
                    for group in asked.resource_spans:
                        resources.append(
                            {a.key: a.value.string_value for a in group.resource.attributes}
                        )
                        for scope in group.scope_spans:
                            names.update(span.name for span in scope.spans)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def collecting(status: int = 200, delay_s: float = 0) -> Iterator[Collector]:
    collector = Collector(status, delay_s)
    thread = threading.Thread(target=collector.http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.http.shutdown()
        collector.http.server_close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens, and where nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def silence() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_good_collector_has_every_span(compression: str) -> None:
    with collecting() as collector:
        child = Child(
            collector.url,
            3000,
            OTEL_EXPORTER_OTLP_COMPRESSION=compression,
            OTEL_SERVICE_NAME="mine",
        )

    assert collector.names == Counter(f"s{number}" for number in range(3000))
    assert child.counts == {"exported": 3000, "failed": 0, "dropped_queue_full": 0}
    assert child.said["sent"]
    assert {found["service.name"] for found in collector.resources} == {"mine"}
    assert len({found["service.instance.id"] for found in collector.resources}) == 1
    assert child.logged == []
    child.assert_prompt()


def test_a_burst_into_a_small_queue_is_missing_what_was_counted_as_dropped() -> None:
    with collecting(delay_s=0.2) as collector:
        child = Child(collector.url, 5000, OTEL_BSP_MAX_QUEUE_SIZE="2048")

    missing = 5000 - collector.names.total()
    assert missing > 0
    assert child.counts == {
        "exported": 5000 - missing,
        "failed": 0,
        "dropped_queue_full": missing,
    }
    assert collector.names["s4999"] == 1  # what is newest is kept
    assert [line["reason"] for line in child.events("telemetry.degraded")] == ["queue_full"]
    child.assert_prompt()


def test_nobody_listening_loses_every_span_and_says_so_once(nobody: str) -> None:
    child = Child(nobody, 3000)

    assert child.counts == {"exported": 0, "failed": 3000, "dropped_queue_full": 0}
    assert not child.said["sent"]
    (degraded,) = child.events("telemetry.degraded")
    assert degraded["reason"] == "ConnectionError"
    child.assert_prompt()


def test_a_black_hole_loses_every_span_and_holds_up_nobody(silence: str) -> None:
    child = Child(silence, 3000)

    assert child.counts == {"exported": 0, "failed": 3000, "dropped_queue_full": 0}
    (degraded,) = child.events("telemetry.degraded")
    assert degraded["reason"] in ("ReadTimeout", "shutdown")
    child.assert_prompt()


def test_a_busy_collector_loses_every_span_and_holds_up_nobody() -> None:
    with collecting(status=503) as collector:
        child = Child(collector.url, 3000)

    assert collector.requests >= 2  # tried again
    assert child.counts == {"exported": 0, "failed": 3000, "dropped_queue_full": 0}
    (degraded,) = child.events("telemetry.degraded")
    assert degraded["reason"] == "HTTP 503"
    child.assert_prompt()


def test_a_time_limit_of_the_operator_is_kept(silence: str) -> None:
    child = Child(silence, 100, OTEL_EXPORTER_OTLP_TIMEOUT="0.3")

    assert child.said["closed_s"] < 2
    assert child.counts["failed"] == 100


def test_a_process_that_forgets_to_close_ends_all_the_same(silence: str) -> None:
    began = time.monotonic()
    script = "from telemetry.tracing import Tracing\nt = Tracing()\n"
    script += "for _ in range(2000): t.start('s').end()\n"
    subprocess.run(
        [sys.executable, "-c", script],
        env=environment(OTEL_EXPORTER_OTLP_ENDPOINT=silence),
        timeout=60,
        check=True,
    )

    assert time.monotonic() - began < 20
