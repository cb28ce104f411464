"""The servers that are compared, each a process of its own on a free port.

`python -m benchmarks.servers KIND PORT FOLDER` serves until it is killed. `sereno` is the product;
the naive ones are what a page of FastAPI gives: a StreamingResponse over `graph.astream`.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from benchmarks import graphs
from runtime.app import serve
from runtime.settings import load

KINDS = ("sereno", "naive", "naive+sqlite")
MODES = ["updates", "messages", "custom"]


def main(kind: str, port: int, folder: str) -> None:
    """Serve one kind."""
    if kind == "sereno":
        sereno(port, folder)
    else:
        app = naive(folder, durable=kind == "naive+sqlite")
        uvicorn.run(app, port=port, log_level="warning", access_log=False)


def sereno(port: int, folder: str) -> None:
    """What `sereno serve` does, the admin listener on a free port included."""
    here = Path(__file__).parent / "graphs.py"
    settings = load(
        port=port,
        admin_port=0,
        engine=f"sqlite:///{folder}/sereno.db",
        slots=256,
        log_level="WARNING",
    )
    serve(settings, [f"{name}={here}:{name}" for name in ("chain", "events", "idle")])


def naive(folder: str, *, durable: bool) -> Any:
    """The shortest thing that streams a graph; `durable` compiles it with AsyncSqliteSaver."""
    compiled: dict[str, Any] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncSqliteSaver.from_conn_string(f"{folder}/naive.db") as saver:
            await saver.setup()
            for name in ("chain", "events", "idle"):
                compiled[name] = getattr(graphs, name).compile(
                    checkpointer=saver if durable else None
                )
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/runs")
    async def run(request: Request) -> StreamingResponse:
        body = await request.json()
        graph = compiled[body["graph"]]
        config = {"configurable": {"thread_id": uuid.uuid4().hex}}

        async def lines() -> AsyncIterator[bytes]:
            yield b'{"type":"started"}\n'
            durability = {"durability": "sync"} if durable else {}
            parts = graph.astream(body["input"], config, stream_mode=MODES, **durability)
            async for mode, part in parts:
                yield orjson.dumps({"type": mode, "data": part}, default=str) + b"\n"
            yield b'{"type":"done"}\n'

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return app


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
