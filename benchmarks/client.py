"""A load generator that costs little: raw sockets, one request a connection, bounded in count."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

__all__ = ["Burst", "burst", "first_lines", "open_stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What a number of runs took."""

    runs: int
    seconds: float
    lines: int


def _request(graph: str) -> bytes:
    body = b'{"graph":"%s","input":{"n":0}}' % graph.encode()
    return (
        b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Accept: application/x-ndjson\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body


async def burst(port: int, graph: str, *, runs: int, concurrency: int) -> Burst:
    """`runs` runs, `concurrency` at a time, each read to its end."""
    todo = iter(range(runs))
    request = _request(graph)
    lines = 0

    async def one_after_another() -> None:
        nonlocal lines
        for _ in todo:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
            lines += answer.count(b"}\n")

    begun = time.perf_counter()
    await asyncio.gather(*[one_after_another() for _ in range(concurrency)])
    return Burst(runs=runs, seconds=time.perf_counter() - begun, lines=lines)


async def first_lines(port: int, graph: str, node_marks: tuple[bytes, ...]) -> tuple[float, float]:
    """Seconds to the first line, and to the first line that a node caused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.perf_counter()
    writer.write(_request(graph))
    seen, first = b"", 0.0
    while chunk := await reader.read(65536):
        seen += chunk
        if not first and b"}\n" in seen:
            first = time.perf_counter() - begun
        if any(mark in seen for mark in node_marks):
            break
    to_node = time.perf_counter() - begun
    await reader.read()
    writer.close()
    return first, to_node


async def open_stream(port: int, graph: str) -> asyncio.StreamWriter:
    """A stream that stays open after its first line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(graph))
    await reader.readuntil(b"}\n")
    return writer
