"""Many watchers of one run, and watchers that leave."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from pathlib import Path

import httpx2
from lines import violations
from server import Reader, Server, whole

WATCHERS = 200


def memory_of(server: Server) -> int:
    """Resident bytes."""
    pages = Path(f"/proc/{server.pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def test_two_hundred_watchers_of_one_run_get_the_same_bytes(server: Server) -> None:
    server.hold("t", "many")
    run_id = server.submit("talkative", "t", input={"seen": [], "size": 600})
    server.entered("t", "many")
    before = memory_of(server)
    url = f"{server.url}/v1/runs/{run_id}/stream"

    async def watch(http: httpx2.AsyncClient) -> str:
        raw = b""
        async with http.stream("GET", url, params={"heartbeat": 0}) as response:
            async for chunk in response.aiter_raw():
                raw += chunk
                if not watched.is_set():
                    watching.release()
        return hashlib.sha256(whole(raw)).hexdigest()

    async def watch_all() -> set[str]:
        limits = httpx2.Limits(max_connections=None)
        async with (
            httpx2.AsyncClient(timeout=60, limits=limits, trust_env=False) as http,
            asyncio.TaskGroup() as group,
        ):
            tasks = [group.create_task(watch(http)) for _ in range(WATCHERS)]
            for _ in range(WATCHERS):
                await watching.acquire()
            watched.set()
            server.release("t", "many")
        return {task.result() for task in tasks}

    watching, watched = asyncio.Semaphore(0), asyncio.Event()
    seen = asyncio.run(watch_all())
    grown = memory_of(server) - before

    lines = server.lines(run_id)
    assert violations(lines) == []
    assert len(lines) > 600
    assert seen == {hashlib.sha256(whole(server.raw(run_id))).hexdigest()}
    assert grown < 100 * 1024 * 1024, f"{grown / 2**20:.0f} MiB"


def test_a_watcher_that_leaves_at_any_byte_leaves_the_run_alone(server: Server) -> None:
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    server.entered("t", "b")
    host, port = server.url.removeprefix("http://").split(":")
    request = f"GET /v1/runs/{run_id}/stream HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    for length in (0, 1, 10, 100, 500, 1000):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(request)
            read = b""
            while len(read) < length:
                read += client.recv(length - len(read))
    server.release("t", "b")
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["epoch"] == 1


def test_the_client_that_started_a_run_by_its_stream_may_leave(server: Server) -> None:
    server.hold("t", "b")
    body = {"graph": "chain", "thread_id": "t", "input": {"seen": []}}
    headers = {"Accept": "application/x-ndjson"}
    with server.http.stream(
        "POST", f"{server.url}/v1/runs", json=body, headers=headers
    ) as response:
        run_id = response.headers["X-Run-Id"]
        first = next(response.iter_raw())
    server.release("t", "b")
    lines = server.lines(run_id)

    assert whole(server.raw(run_id)).startswith(whole(first))
    assert lines[-1]["type"] == "run.completed"
    assert server.marks("t") == ["a", "b", "c1", "c2"]


def test_a_client_that_never_reads_costs_bounded_memory(server: Server) -> None:
    """Ten of them, and a run that writes 20 MB in lines of 1 MB."""
    size = 1_000_000
    server.hold("t", "large")
    run_id = server.submit("growing", "t", input={"seen": [], "size": size})
    server.entered("t", "large")
    host, port = server.url.removeprefix("http://").split(":")
    request = f"GET /v1/runs/{run_id}/stream HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.sendall(request)
        before = memory_of(server)
        server.release("t", "large")
        lines = server.lines(run_id)
        grown = memory_of(server) - before

    assert lines[-1]["type"] == "run.completed"
    assert violations(lines) == []
    assert grown < 200 * 1024 * 1024, f"{grown / 2**20:.0f} MiB"


def test_a_slow_reader_gets_every_line(server: Server) -> None:
    server.hold("t", "many")
    run_id = server.submit("talkative", "t", input={"seen": [], "size": 5000})
    server.entered("t", "many")
    with Reader(server, run_id, pause=0.02) as reader:
        reader.saw("caught_up")
        server.release("t", "many")

    assert reader.eof
    assert reader.whole == whole(server.raw(run_id))
