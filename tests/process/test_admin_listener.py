"""The admin listener on real sockets, and the watch over a loop of a process that is suspended."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from server import until

from telemetry import admin as admin_module
from telemetry.admin import Admin, AdminListener
from telemetry.health import Liveness
from telemetry.loopwatch import LoopWatch
from telemetry.metrics import Metrics

GRAPHS, NODES = 5, 10

Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = Metrics()
    for graph in range(GRAPHS):
        metrics.graph(f"graph-{graph}", [f"node-{node}" for node in range(NODES)])
    yield metrics
    metrics.close()


@pytest.fixture
def listening(metrics: Metrics) -> Iterator[Callable[..., AdminListener]]:
    with ExitStack() as stack:

        def listen(
            host: str = "127.0.0.1", *, age: Callable[[], float] = lambda: 0.0
        ) -> AdminListener:
            liveness = Liveness(age, limit_s=0.2)
            admin = Admin(metrics, alive=liveness.checks, live=lambda: {"runs": []})
            return stack.enter_context(AdminListener(host, 0, admin))

        yield listen


def ask(port: int, target: str, method: str = "GET", host: str = "127.0.0.1", **more: Any) -> Reply:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(method, target, **more)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def test_it_answers_http(listening: Callable[..., AdminListener]) -> None:
    port = listening().port
    status, headers, body = ask(port, "/livez?verbose")

    assert (status, body) == (200, b"ok\nevent_loop pass 0.0")
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] == "sereno"
    assert json.loads(ask(port, "/debug/live")[2]) == {"runs": []}
    assert ask(port, "/health")[0] == 404
    assert ask(port, "/metrics", headers={"Host": "elsewhere"})[0] == 200


def test_a_head_has_no_body(listening: Callable[..., AdminListener]) -> None:
    status, headers, body = ask(listening().port, "/livez", "HEAD")

    assert (status, headers["Content-Length"], body) == (200, "2", b"")


@pytest.mark.parametrize(
    ("method", "status"), [("POST", 405), ("PUT", 405), ("DELETE", 405), ("BREW", 501)]
)
def test_other_methods_change_nothing(
    listening: Callable[..., AdminListener], method: str, status: int
) -> None:
    assert ask(listening().port, "/metrics", method, body=b"x" * 10_000)[0] == status


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_a_host_may_be_a_name_or_of_ipv6(
    listening: Callable[..., AdminListener], host: str
) -> None:
    assert ask(listening(host).port, "/livez", host=host)[0] == 200


def test_it_answers_while_the_loop_is_blocked(
    listening: Callable[..., AdminListener], metrics: Metrics
) -> None:
    replies: list[Reply] = []
    answered = threading.Event()

    async def work() -> None:
        async with LoopWatch(metrics) as watch:
            port = listening(age=watch.age).port

            def operate() -> None:
                until(lambda: ask(port, "/livez")[0] == 503, "the loop is late")
                replies.extend(ask(port, target) for target in ("/livez", "/metrics"))
                answered.set()

            thread = threading.Thread(target=operate)
            thread.start()
            assert answered.wait(60), "it was not answered while the loop was blocked"
            thread.join()
            await asyncio.sleep(0.2)
            replies.append(ask(port, "/livez"))

    asyncio.run(work())

    late, exposition, well = replies
    assert late[0] == 503
    assert b"event_loop fail" in late[2]
    (age,) = [
        float(line.split()[1])
        for line in exposition[2].decode().splitlines()
        if line.startswith("sereno_event_loop_heartbeat_age_seconds ")
    ]
    assert age > 0.2
    assert well[0] == 200


def test_twenty_scrapers_at_once_are_served(
    listening: Callable[..., AdminListener], metrics: Metrics
) -> None:
    port = listening().port
    replies: list[Reply] = []
    scrapers = [
        threading.Thread(target=lambda: replies.append(ask(port, "/metrics"))) for _ in range(20)
    ]
    for scraper in scrapers:
        scraper.start()
    for scraper in scrapers:
        scraper.join()

    assert [reply[0] for reply in replies] == [200] * 20
    assert metrics["metrics_render_seconds"].value() <= 20


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HTTP/1.1\r\nHost:"], ids=["nothing", "half a request"]
)
def test_who_sends_nothing_is_cut_off(
    listening: Callable[..., AdminListener], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(admin_module, "_PATIENCE_S", 0.1)
    with socket.create_connection(("127.0.0.1", listening().port), timeout=30) as silent:
        silent.sendall(sent)

        assert silent.recv(1) == b""


def test_who_does_not_read_is_cut_off(
    listening: Callable[..., AdminListener], metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(metrics, "render_now", lambda accept: (b"x" * 50_000_000, "text/plain"))
    with socket.create_connection(("127.0.0.1", listening().port), timeout=30) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        until(lambda: not handlers(), "its thread is free")


def handlers() -> list[str]:
    """Threads that serve a connection."""
    found = [thread.name for thread in threading.enumerate()]
    return [name for name in found if "process_request_thread" in name]


def test_a_crowd_of_the_silent_is_refused_and_goes(
    listening: Callable[..., AdminListener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "_CONNECTIONS", 3)
    port = listening().port
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        until(lambda: len(handlers()) == 3, "they are served")
        assert ask(port, "/livez")[0] == 503
    until(lambda: ask(port, "/livez")[0] == 200, "they went")


def test_a_port_that_is_taken_is_named(metrics: Metrics) -> None:
    admin = Admin(metrics, alive=list, live=dict)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already"),
            AdminListener("127.0.0.1", port, admin),
        ):
            pass


def test_a_port_is_free_again_at_once(listening: Callable[..., AdminListener]) -> None:
    """Whoever is in the middle of something is not waited for."""
    first = listening()
    with socket.create_connection(("127.0.0.1", first.port), timeout=30) as silent:
        until(handlers, "it is served")
        begun = time.monotonic()
        first.__exit__(None, None, None)
        took = time.monotonic() - begun

        assert silent.recv(1) == b""
        assert took < 5
        with AdminListener("127.0.0.1", first.port, first._admin) as again:
            assert ask(again.port, "/livez")[0] == 200


SUSPENDED = """
import asyncio, sys, time
from telemetry.loopwatch import LoopWatch
from telemetry.metrics import Metrics

async def main():
    metrics = Metrics()
    async with LoopWatch(metrics, stall_s=0.1):
        print("ready", flush=True)
        for _ in range(int(sys.argv[1])):
            await asyncio.sleep(0.01)
        print("resumed", flush=True)
    metrics.close()

asyncio.run(main())
"""


def test_a_process_that_was_suspended_was_not_blocked() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, "100"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):  # whether its loop or its watchdog wakes first is a matter of luck
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.05)
        said, _ = process.communicate(timeout=60)

    assert said == "resumed\n"
