"""Delivers a run's lines to one reader: replay, tail, heartbeats, and an honest end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import structlog
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from runtime.api.dependencies import Services
from runtime.api.document import headers
from runtime.engines.base import check_cursor, follow
from runtime.errors import SerenoError
from runtime.events import TERMINAL_TYPES, unstored
from runtime.model import Run, StoredLine
from runtime.transports.base import Transport
from runtime.transports.ndjson import MEDIA_TYPE
from telemetry import http
from telemetry.contract import CloseReason, StreamKind
from telemetry.streams import StreamWatch

__all__ = ["LINE_HEADERS", "NOTHING_MORE", "Lines", "LinesResponse", "acts_on", "stream_of"]

_ALWAYS = (
    "Location",
    "X-Run-Id",
    "X-Trace-Id",
    "X-Log-Id",
    "Cache-Control",
    "X-Content-Type-Options",
)
#: For the OpenAPI document: the headers of a stream, and what is answered when there is none.
LINE_HEADERS = (*_ALWAYS, "X-Accel-Buffering")
NOTHING_MORE: dict[int | str, dict[str, Any]] = {
    204: {
        "description": "The cursor is the terminal line's: `X-Run-Status` says how it ended.",
        "headers": headers(*_ALWAYS, "X-Run-Status"),
    }
}
#: Seconds that a timer may go off before its time: uvloop counts whole milliseconds.
EARLY = 0.01
#: The part of the longest time for a write after which a client is called slow.
SLOW = 0.1

_log = structlog.get_logger("api")


def acts_on(run: Run) -> None:
    """Say which run the current request is about."""
    http.current().acts_on(
        run_id=run.run_id,
        thread_id=run.thread_id,
        graph=run.graph,
        traceparent=run.request.get("traceparent"),
    )


def stream_of(
    services: Services,
    run: Run,
    *,
    origin: bool = False,
    after: int = 0,
    types: frozenset[str] | None = None,
    following: bool = True,
    heartbeat_s: float | None = None,
    transport: Transport | None = None,
) -> Response:
    """The response that carries a run's lines from a cursor on. Raises CursorAhead.

    `origin`: this request started the run. Other readers come back with a cursor (`resume`), or
    begin at the first line (`join`), of a run that goes on or has ended.
    """
    if not origin:
        http.current().reads(lambda: services.run_context(run))
    check_cursor(after, run.last_seq)
    headers = {
        "X-Run-Id": run.run_id,
        "X-Log-Id": services.engine.log_id,
        "Location": f"/v1/runs/{run.run_id}",
        "Cache-Control": "no-store, no-transform",
        "X-Content-Type-Options": "nosniff",
    }
    if run.terminal is not None and after == run.terminal:
        return Response(status_code=204, headers={**headers, "X-Run-Status": run.status})
    beat = services.settings.heartbeat_s if heartbeat_s is None else heartbeat_s
    return Lines(
        services,
        run,
        kind="origin" if origin else "resume" if after else "join",
        after=after,
        types=types,
        following=following,
        heartbeat_s=beat,
        transport=transport or services.ndjson,
        headers={**headers, "X-Accel-Buffering": "no"},
    )


class LinesResponse(Response):
    """For the OpenAPI document: FastAPI reads a status off its constructor."""

    media_type = MEDIA_TYPE


class Lines(Response):
    """One reader of one run. A failure of the delivery is an EOF, never a line."""

    def __init__(
        self,
        services: Services,
        run: Run,
        *,
        kind: StreamKind,
        after: int,
        types: frozenset[str] | None,
        following: bool,
        heartbeat_s: float,
        transport: Transport,
        headers: dict[str, str],
    ) -> None:
        self.status_code = 200
        self.media_type = transport.media_type
        self.background = None
        self.body = b""
        self.init_headers(headers)
        self.raw_headers = [h for h in self.raw_headers if h[0] != b"content-length"]
        self._services = services
        self._run = run
        self._after = after
        self._types = types
        self._following = following
        self._heartbeat_s = heartbeat_s
        self._transport = transport
        self._exchange = http.current()
        self._watch = StreamWatch(
            services.metrics,
            self._exchange,
            kind=kind,
            run_id=run.run_id,
            thread_id=run.thread_id,
            from_seq=after,
            last_seq=run.last_seq,
            slow_s=services.settings.write_timeout_s * SLOW,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._watch.opened()
        reason: CloseReason = "error"
        gone = asyncio.create_task(_disconnected(receive))
        deliver = asyncio.create_task(self._deliver(send))
        longest = self._services.settings.stream_max_s or None
        try:
            await asyncio.wait({gone, deliver}, timeout=longest, return_when=FIRST_COMPLETED)
            if deliver.done():
                reason = deliver.result()
            elif gone.done():
                reason = "client_disconnect"
            else:
                reason = "timeout"
                await _cancelled(deliver)
                await self._end(send, reason)
        except _Closed as closed:
            reason = closed.reason
        except asyncio.CancelledError:
            reason = "server_shutdown"
            raise
        finally:
            await _cancelled(gone, deliver)
            self._watch.closed(reason)

    async def _deliver(self, send: Send) -> CloseReason:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        reason: CloseReason = "complete"
        try:
            async with contextlib.aclosing(self._writes()) as writes:
                async for write in writes:
                    blocked_s = await self._send(send, _body(write.body))
                    self._watch.wrote(
                        write.lines,
                        write.unstored,
                        seq=write.seq,
                        size=len(write.body),
                        blocked_s=blocked_s,
                    )
        except _Closed as closed:
            if closed.reason != "server_shutdown":  # an end would not get through either
                raise
            reason = closed.reason
        except SerenoError as exc:
            _log.warning("Stream failed", run_id=self._run.run_id, error=str(exc))
            self._exchange.failed(exc)
            reason = "error"
        await self._end(send, reason)
        return reason

    async def _end(self, send: Send, reason: CloseReason) -> None:
        self._watch.closing(reason)
        await self._send(send, _END)

    async def _send(self, send: Send, message: Message) -> float:
        """The seconds that it took. Raises _Closed when the client does not take it."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._services.settings.write_timeout_s):
                await send(message)
        except TimeoutError:
            self._watch.refused(time.perf_counter() - began)
            raise _Closed("slow_consumer") from None
        except OSError:
            raise _Closed("client_disconnect") from None
        return time.perf_counter() - began

    async def _writes(self) -> AsyncGenerator[_Write, None]:
        """Lines that are ready together leave in one write. Raises _Closed when draining."""
        engine = self._services.engine
        caught_up = self._run.terminal is not None
        opened_at = self._run.last_seq
        spoke = time.monotonic()
        if not caught_up and self._after >= opened_at:
            yield self._caught_up()
            caught_up = True
            if not self._following:
                return
        batches = follow(engine, self._run.run_id, self._after, tick=self._heartbeat_s or None)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                if not caught_up and batch and batch[-1].seq >= opened_at:
                    seen = [line for line in batch if line.seq <= opened_at]
                    write = self._encoded(seen).then(self._caught_up())
                    caught_up = True
                    if not self._following:
                        yield write
                        return
                    write = write.then(self._encoded(batch[len(seen) :]))
                elif not batch and self._services.draining():
                    yield await self._heartbeat()
                    raise _Closed("server_shutdown")
                else:
                    write = self._encoded(batch)
                if not write.body and self._heartbeat_due(spoke):
                    write = await self._heartbeat()
                if write.body:
                    spoke = time.monotonic()
                    yield write

    def _heartbeat_due(self, spoke: float) -> bool:
        beat = self._heartbeat_s
        return beat > 0 and time.monotonic() - spoke >= beat - EARLY

    def _encoded(self, batch: Sequence[StoredLine]) -> _Write:
        if batch:
            self._after = batch[-1].seq
        types = self._types
        chosen = [
            line
            for line in batch
            if types is None or line.type in types or line.type in TERMINAL_TYPES
        ]
        body = b"".join([self._transport.stored(line) for line in chosen])
        return _Write(body, chosen, (), self._after)

    def _caught_up(self) -> _Write:
        return self._bookmark("caught_up", {})

    async def _heartbeat(self) -> _Write:
        run = await self._services.engine.get(self._run.run_id)
        self._run = run
        nodes = list(self._services.open_nodes(run.run_id))
        return self._bookmark("heartbeat", {"status": run.status, "nodes": nodes})

    def _bookmark(self, type: str, data: dict[str, Any]) -> _Write:
        line = unstored(self._run, type, after=self._after, ts=time.time(), data=data)
        return _Write(self._transport.unstored(line), (), (type,), self._after)


class _Write(NamedTuple):
    """What leaves at once."""

    body: bytes
    lines: Sequence[StoredLine]
    #: Types of lines that are not stored.
    unstored: tuple[str, ...]
    #: Where the reader is then.
    seq: int

    def then(self, other: _Write) -> _Write:
        """Both in one."""
        return _Write(
            self.body + other.body,
            [*self.lines, *other.lines],
            self.unstored + other.unstored,
            other.seq,
        )


def _body(chunk: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


_END = _body(b"", more=False)


class _Closed(Exception):
    """The delivery ends before the run's last line."""

    def __init__(self, reason: CloseReason) -> None:
        self.reason = reason


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
