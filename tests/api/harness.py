"""An ASGI client that reads while the app writes: httpx's transport waits for the whole body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import orjson
from fastapi import FastAPI

from runtime.api.dependencies import Services
from runtime.app import create_app
from runtime.engines.base import Engine
from runtime.execution.worker import Worker
from runtime.settings import Settings

from .graphs.play import NAMES

__all__ = ["NDJSON", "Answer", "Server", "Stream", "graph_file", "problem", "serving"]

NDJSON = {"accept": "application/x-ndjson"}
#: A test that waits this long has failed.
PATIENCE = 10


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def types(self) -> list[str]:
        return [line["type"] for line in self.lines()]

    def lines(self) -> list[dict[str, Any]]:
        assert self.body == b"" or self.body.endswith(b"\n")
        return [orjson.loads(line) for line in self.body.split(b"\n")[:-1]]


def problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The members of a problem document (RFC 9457)."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "code"} <= body.keys()
    assert (body["status"], body["code"]) == (status, code)
    return body


class Stream:
    """One exchange with the app, which may be so many messages ahead of who reads it."""

    def __init__(
        self, app: FastAPI, scope: dict[str, Any], chunks: Iterable[bytes], window: int | None
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.raw = b""
        #: Whether the app said that the body is over.
        self.complete = False
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._window = asyncio.Semaphore(window or 1_000_000)
        self._broken = False
        self._rest = b""
        *most, last = list(chunks) or [b""]
        for chunk in most:
            self._to_app.put_nowait({"type": "http.request", "body": chunk, "more_body": True})
        self._to_app.put_nowait({"type": "http.request", "body": last, "more_body": False})
        self.task = asyncio.create_task(app(scope, self._to_app.get, self._send))
        self.task.add_done_callback(lambda _: self._from_app.put_nowait(None))

    async def _send(self, message: Any) -> None:
        await self._window.acquire()
        if self._broken:
            raise OSError("the connection is gone")
        self._from_app.put_nowait(message)

    # What a client may do.

    def disconnect(self) -> None:
        """Go, and let the app know as uvicorn does."""
        self._to_app.put_nowait({"type": "http.disconnect"})

    def break_off(self) -> None:
        """Go, so that the next write fails."""
        self._broken = True

    async def chunk(self) -> bytes | None:
        """What the app wrote at once; None at the end."""
        while True:
            async with asyncio.timeout(PATIENCE):
                message = await self._from_app.get()
            if message is None:
                return None
            self._window.release()
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                continue
            self.complete = not message.get("more_body", False)
            if body := message.get("body", b""):
                self.raw += body
                return bytes(body)

    async def line(self) -> dict[str, Any] | None:
        """The next line; None at the end."""
        while b"\n" not in self._rest:
            chunk = await self.chunk()
            if chunk is None:
                assert self._rest == b"", "a line was cut"
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        value: dict[str, Any] = orjson.loads(line)
        return value

    async def until(self, type: str) -> list[dict[str, Any]]:
        """Lines up to the first of this type."""
        found = []
        while (line := await self.line()) is not None:
            found.append(line)
            if line["type"] == type:
                return found
        raise AssertionError(f"no {type} in {[line['type'] for line in found]}")

    async def rest(self) -> list[dict[str, Any]]:
        """All further lines."""
        found = []
        while (line := await self.line()) is not None:
            found.append(line)
        return found

    async def end(self) -> bytes:
        """Read to the end: all bytes of the body."""
        while await self.chunk() is not None:
            pass
        return self.raw

    async def over(self) -> None:
        """Wait until the app is done with it, reading nothing."""
        await asyncio.wait({self.task}, timeout=PATIENCE)
        assert self.task.done()

    async def close(self) -> None:
        if not self.task.done():
            self.disconnect()
        await self.over()
        if not self.task.cancelled():
            self.task.exception()


class Server:
    """A client of one app, and the app's insides."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def worker(self) -> Worker:
        worker: Worker = self.app.state.worker
        return worker

    @property
    def engine(self) -> Engine:
        return self.services.engine

    async def open(
        self,
        method: str,
        path: str,
        *,
        json: Any = ...,
        body: bytes | Iterable[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        query: bytes | None = None,
        window: int | None = None,
    ) -> Stream:
        """Send a request; the response is read by whoever wants it. `window` messages fit between
        the app and who reads: then it waits."""
        sent = {name.lower(): value for name, value in (headers or {}).items()}
        if json is not ...:
            body = _dumped(json)
        if body:
            sent.setdefault("content-type", "application/json")
        if isinstance(body, bytes):
            if body:
                sent.setdefault("content-length", str(len(body)))
            body = [body]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query if query is not None else urlencode(params or {}).encode(),
            "headers": [(k.encode(), v.encode()) for k, v in {"host": "test", **sent}.items()],
            "server": ("test", 80),
            "client": ("127.0.0.1", 1234),
        }
        return Stream(self.app, scope, body, window)

    @asynccontextmanager
    async def stream(self, method: str, path: str, **more: Any) -> AsyncIterator[Stream]:
        """An exchange that is read while it goes on."""
        stream = await self.open(method, path, **more)
        try:
            yield stream
        finally:
            await stream.close()

    async def request(self, method: str, path: str, **more: Any) -> Answer:
        stream = await self.open(method, path, **more)
        await stream.end()
        await stream.over()
        if (wrong := stream.task.exception()) is not None and stream.status != 500:
            raise wrong  # at a 500, starlette answers and raises
        return Answer(stream.status, stream.headers, stream.raw)

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.request("GET", path, **more)

    async def post(self, path: str, json: Any = ..., **more: Any) -> Answer:
        return await self.request("POST", path, json=json, **more)

    # What most tests begin with.

    async def start(self, graph: str, input: Any = None, **more: Any) -> str:
        """Start a run: its id."""
        body = {"graph": graph, "input": {} if input is None else input, **more}
        answer = await self.post("/v1/runs", body)
        assert answer.status == 202, answer.body
        run_id: str = answer.json()["run_id"]
        return run_id

    async def ended(self, graph: str, input: Any = None, **more: Any) -> str:
        """Start a run and wait for its end: its id."""
        run_id = await self.start(graph, input, **more)
        await self.wait(run_id)
        return run_id

    async def wait(self, run_id: str) -> dict[str, Any]:
        answer = await self.get(f"/v1/runs/{run_id}/wait")
        assert answer.status == 200, answer.body
        result: dict[str, Any] = answer.json()
        return result

    async def watched(self, run_id: str, *, by: int) -> None:
        """Wait until so many readers follow a run."""
        async with asyncio.timeout(PATIENCE):
            while self.engine.tails._tails[run_id].watchers < by:  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def replay(self, run_id: str, **params: Any) -> Answer:
        return await self.get(f"/v1/runs/{run_id}/stream", params=params)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def graph_file(folder: Path, *, default_input: Mapping[str, Any] | None = None) -> Path:
    """A langgraph.json of all graphs. They are this process's: tests hold their gates."""
    module = f"{__package__}.graphs.play"
    path = folder / "langgraph.json"
    graphs: dict[str, Any] = {name: f"{module}:{name}" for name in NAMES}
    graphs["gated"] = {"path": graphs["gated"], "description": "Two steps that wait."}
    graphs["defaulted"] = f"{module}:needs"
    defaults = {"defaulted": {"topic": "cats", "tone": "dry"}, **(default_input or {})}
    path.write_text(json.dumps({"graphs": graphs, "sereno": {"default_input": defaults}}))
    return path


@asynccontextmanager
async def serving(
    source: Path | str, *, engine: Engine | None = None, **settings: Any
) -> AsyncIterator[Server]:
    """An app with its lifespan, on the memory engine."""
    told = {"engine": "memory://", "drain_s": 0.0, "cancel_grace_s": 1.0, **settings}
    app = create_app(Settings(**told), [source], engine=engine)
    async with app.router.lifespan_context(app):
        yield Server(app)
