"""Log lines of real processes: a pipe nobody reads, a signal, a collector that is not there."""

from __future__ import annotations

import contextlib
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from server import PATIENCE, environment

ROOT = Path(__file__).parent.parent.parent

#: A child logs to stdout, and says to stderr how it went.
HEAD = """
import asyncio, json, logging, signal, sys, threading, time
import structlog
from telemetry import logs

log = structlog.get_logger("child")

def tell(**facts):
    print(json.dumps(facts), file=sys.stderr, flush=True)

def asleep():
    while True:  # pause() would miss a signal that comes just before it
        time.sleep(0.05)

def otlp(handle):
    from opentelemetry.sdk.resources import Resource
    from telemetry.otlp_logs import OtlpLogs
    sink = OtlpLogs(Resource({"service.name": "child"}))
    handle.attach(sink)
    return sink
"""


class Child:
    """A Python process whose stdout is read, unless nobody shall."""

    def __init__(self, code: str, *, unread: bool = False, **env: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", HEAD + code],
            cwd=ROOT,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._read = b""
        self._reader = threading.Thread(target=self._read_all)
        if not unread:
            self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        if self._reader.ident is None:
            self._reader.start()
        self._reader.join(PATIENCE)
        self.popen.communicate()

    def _read_all(self) -> None:
        assert self.popen.stdout is not None
        self._read = self.popen.stdout.read()

    def told(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self.popen.stderr is not None
        line = self.popen.stderr.readline()
        assert line.startswith(b"{"), (line + self.popen.stderr.read()).decode()
        told: dict[str, Any] = json.loads(line)
        return told

    def lines(self) -> list[dict[str, Any]]:
        """All lines until the end of the process; stderr has nothing more to say."""
        assert self.popen.stderr is not None
        if self._reader.ident is None:
            self._reader.start()
        self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.popen.stderr.read() == b""
        return [json.loads(line) for line in self._read.splitlines()]


# A pipe that nobody reads

FLOOD = """
async def main(handle):
    worst, over = 0.0, False

    async def heart():
        nonlocal worst
        while not over:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - before - 0.001)

    beating = asyncio.create_task(heart())
    for number in range(10_000):
        log.info("x" * 50, number=number)
        logging.getLogger("theirs").warning("y")
        if number % 50 == 0:
            await asyncio.sleep(0)
    over = True
    await beating
    tell(worst=worst, dropped=handle.dropped, losses=handle.losses)

handle = logs.configure(queue_max=2_000)
asyncio.run(main(handle))
"""


def test_a_pipe_that_nobody_reads_stalls_neither_the_loop_nor_the_end() -> None:
    with Child(FLOOD, unread=True) as child:
        told = child.told()
        ended = time.monotonic()
        child.popen.wait(PATIENCE)
        took = time.monotonic() - ended

        assert told["dropped"] > 15_000
        assert told["losses"] == {"stdout": told["dropped"]}
        assert told["worst"] < 0.5  # a loop that waits for the pipe waits for ever
        assert took < 5
        assert child.popen.returncode == 0


def test_a_reader_who_comes_back_gets_whole_lines_and_the_count_of_the_lost() -> None:
    code = FLOOD.replace("asyncio.run(main(handle))", "asyncio.run(main(handle))\nhandle.close(60)")
    with Child(code, unread=True) as child:
        dropped = child.told()["dropped"]
        lines = child.lines()

    notices = [line for line in lines if line["name"] == "telemetry"]
    assert sum(line["dropped"] for line in notices) == dropped
    assert len(lines) - len(notices) == 20_000 - dropped


# A signal

SIGNAL = """
def stop(*_):
    log.info("stopping")
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
with logs.configure() as handle:
    for number in range(5_000):
        log.info("x", number=number)
    tell(ready=True)
    asleep()
"""


@pytest.mark.parametrize("end", ["with", "at exit"])
def test_what_is_queued_is_written_after_sigterm(end: str) -> None:
    code = SIGNAL
    if end == "at exit":
        code = SIGNAL.replace("with logs.configure() as handle:", "logs.configure()\nif True:")
    with Child(code) as child:
        child.told()
        child.popen.send_signal(signal.SIGTERM)
        lines = child.lines()

        assert child.popen.returncode == 0
    assert [line["number"] for line in lines[:-1]] == list(range(5_000))
    assert lines[-1]["msg"] == "stopping"


# Collectors

EXPORT = """
handle = logs.configure()
sink = otlp(handle)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
for number in range(3_000):
    log.info("x", number=number, run_id="r")
tell(ready=True)
"""
ASLEEP = EXPORT + "asleep()\n"

#: Closed in the program, so that it can say what was lost. A thread counts what it had in hand.
CLOSED = (
    EXPORT
    + """
begun = time.monotonic()
handle.close()
took = time.monotonic() - begun
while handle.losses["otlp"] < 3_000 and time.monotonic() < begun + 30:
    time.sleep(0.01)
tell(took=took, losses=handle.losses, exported=sink.exported)
"""
)


class Collector(http.server.ThreadingHTTPServer):
    """Answers every batch with one status, and keeps the records."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        self.status = status
        self.records: list[Any] = []
        self.resources: list[Any] = []
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status == 200:
            for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
                self.server.resources.append(resource.resource)
                for scope in resource.scope_logs:
                    self.server.records += scope.log_records
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def collector(status: int) -> Iterator[Collector]:
    with Collector(status) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def nobody(kind: str) -> Iterator[str]:
    """The address of a collector that refuses, that never answers, or that answers 503."""
    if kind == "503":
        with collector(503) as server:
            yield server.url
    elif kind == "silent":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
    else:
        with socket.socket() as taken:  # bound, and not listening
            taken.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_collector_gets_every_line_until_the_end() -> None:
    with (
        collector(200) as server,
        Child(ASLEEP, OTEL_EXPORTER_OTLP_ENDPOINT=server.url) as child,
    ):
        child.told()
        child.popen.send_signal(signal.SIGTERM)
        lines = child.lines()

        assert child.popen.returncode == 0
        assert len(lines) == 3_000
        numbers = [
            attribute.value.int_value
            for record in server.records
            for attribute in record.attributes
            if attribute.key == "number"
        ]
        assert numbers == list(range(3_000))
        assert {record.body.string_value for record in server.records} == {"x"}
        (name,) = server.resources[0].attributes
        assert (name.key, name.value.string_value) == ("service.name", "child")


@pytest.mark.parametrize("kind", ["refusing", "silent", "503"])
def test_without_a_collector_the_end_comes_soon_and_stdout_is_whole(kind: str) -> None:
    with nobody(kind) as url, Child(ASLEEP, OTEL_EXPORTER_OTLP_ENDPOINT=url) as child:
        child.told()
        begun = time.monotonic()
        child.popen.send_signal(signal.SIGTERM)
        lines = child.lines()
        took = time.monotonic() - begun

        assert child.popen.returncode == 0
        assert took < 5
    assert [x["number"] for x in lines if x["name"] == "child"] == list(range(3_000))
    # What the exporter says of it is in our form, and little.
    noise = [line for line in lines if line["name"].startswith("opentelemetry")]
    assert len(noise) <= 10


@pytest.mark.parametrize("kind", ["refusing", "silent", "503"])
def test_what_no_collector_took_is_counted(kind: str) -> None:
    with nobody(kind) as url, Child(CLOSED, OTEL_EXPORTER_OTLP_ENDPOINT=url) as child:
        child.told()
        told = child.told()
        lines = child.lines()

    assert told["took"] < 5
    assert told["exported"] == 0
    assert told["losses"] == {"otlp": 3_000}  # the exporter's own words are not sent
    assert [x["number"] for x in lines if x["name"] == "child"] == list(range(3_000))
    assert any(line.get("event") == "telemetry.degraded" for line in lines)
