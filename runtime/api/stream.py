"""Delivers a run's lines to one reader: replay, tail, heartbeats, and an honest end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.api.dependencies import Services
from runtime.engines.base import check_cursor, follow
from runtime.errors import SerenoError
from runtime.events import TERMINAL_TYPES, unstored
from runtime.model import Run, StoredLine
from runtime.transports.base import Transport

__all__ = ["Lines", "stream_of"]

CloseReason = Literal[
    "complete", "client_disconnect", "slow_consumer", "server_shutdown", "error", "timeout"
]

_log = structlog.get_logger("api")


def stream_of(
    services: Services,
    run: Run,
    *,
    after: int = 0,
    types: frozenset[str] | None = None,
    following: bool = True,
    heartbeat_s: float | None = None,
    transport: Transport | None = None,
) -> Response:
    """The response that carries a run's lines from a cursor on. Raises CursorAhead."""
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
        after=after,
        types=types,
        following=following,
        heartbeat_s=beat,
        transport=transport or services.ndjson,
        headers={**headers, "X-Accel-Buffering": "no"},
    )


class Lines(Response):
    """One reader of one run. A failure of the delivery is an EOF, never a line."""

    def __init__(
        self,
        services: Services,
        run: Run,
        *,
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
        self._from = after
        self._types = types
        self._following = following
        self._heartbeat_s = heartbeat_s
        self._transport = transport
        self._lines = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _log.info(
            "Stream opened",
            event_type="stream.opened",
            run_id=self._run.run_id,
            thread_id=self._run.thread_id,
            after=self._from,
        )
        reason: CloseReason = "error"
        gone = asyncio.create_task(_disconnected(receive))
        deliver = asyncio.create_task(self._deliver(send))
        try:
            await asyncio.wait({gone, deliver}, return_when=asyncio.FIRST_COMPLETED)
            if deliver.done():
                reason = deliver.result()
            else:
                reason = "client_disconnect"
        finally:
            for task in (gone, deliver):
                task.cancel()
            await asyncio.gather(gone, deliver, return_exceptions=True)
            _log.info(
                "Stream closed",
                event_type="stream.closed",
                run_id=self._run.run_id,
                thread_id=self._run.thread_id,
                reason=reason,
                events=self._lines,
                bytes=self._bytes,
                from_seq=self._from,
                last_seq=self._after,
            )

    async def _deliver(self, send: Send) -> CloseReason:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        opened = time.monotonic()
        longest = self._services.settings.stream_max_s
        chunks = self._chunks()
        reason: CloseReason = "complete"
        try:
            async for chunk in chunks:
                try:
                    async with asyncio.timeout(self._services.settings.write_timeout_s):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except TimeoutError:
                    # Its buffers are full: an end would not get through either.
                    raise _SlowConsumer from None
                self._bytes += len(chunk)
                if longest and time.monotonic() - opened > longest:
                    reason = "timeout"
                    break
        except _SlowConsumer:
            return "slow_consumer"
        except SerenoError as exc:
            _log.warning("Stream failed", run_id=self._run.run_id, error=str(exc))
            reason = "error"
        finally:
            await chunks.aclose()
        if reason == "complete" and self._services.draining():
            reason = "server_shutdown"
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return reason

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        """Lines that are ready together leave in one write."""
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
        try:
            async for batch in batches:
                if batch:
                    chunk = b""
                    if not caught_up and batch[-1].seq >= opened_at:
                        seen = [line for line in batch if line.seq <= opened_at]
                        batch = batch[len(seen) :]
                        chunk = self._encoded(seen) + self._caught_up()
                        caught_up = True
                        if not self._following:
                            yield chunk
                            return
                    chunk += self._encoded(batch)
                    if chunk:
                        spoke = time.monotonic()
                        yield chunk
                elif self._services.draining():
                    yield await self._heartbeat()
                    return
                if self._heartbeat_s and time.monotonic() - spoke >= self._heartbeat_s:
                    spoke = time.monotonic()
                    yield await self._heartbeat()
        finally:
            await batches.aclose()

    def _encoded(self, batch: Sequence[StoredLine]) -> bytes:
        if not batch:
            return b""
        self._after = batch[-1].seq
        types = self._types
        chosen = [
            line
            for line in batch
            if types is None or line.type in types or line.type in TERMINAL_TYPES
        ]
        self._lines += len(chosen)
        return b"".join([self._transport.stored(line) for line in chosen])

    def _caught_up(self) -> bytes:
        return self._bookmark("caught_up", {})

    async def _heartbeat(self) -> bytes:
        run = await self._services.engine.get(self._run.run_id)
        self._run = run
        nodes = list(self._services.open_nodes(run.run_id))
        return self._bookmark("heartbeat", {"status": run.status, "nodes": nodes})

    def _bookmark(self, type: str, data: dict[str, Any]) -> bytes:
        line = unstored(self._run, type, after=self._after, ts=time.time(), data=data)
        return self._transport.unstored(line)


class _SlowConsumer(Exception):
    pass


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
