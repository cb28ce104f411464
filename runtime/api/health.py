"""Is it alive, is it ready, and what is it?"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from runtime.api.dependencies import ServicesDep
from runtime.api.schemas import Checked, Health

__all__ = ["router"]

router = APIRouter(tags=["operations"])
_NO_STORE = {"Cache-Control": "no-store"}
#: For the OpenAPI document.
CHECKED: dict[int | str, dict[str, Any]] = {
    200: {"description": "All pass.", "model": Checked},
    503: {"description": "A check fails.", "model": Checked},
}
PLAIN: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": "ok"}}}
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What `Accept` asked for: Prometheus text, or OpenMetrics.",
        "content": {
            media_type: {
                "schema": {"type": "string"},
                "example": 'sereno_runs_total{graph="research",outcome="success"} 3.0\n',
            }
            for media_type in ("text/plain", "application/openmetrics-text")
        },
    }
}
INFO: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/json": {
                "schema": {"type": "object"},
                "example": {
                    "name": "sereno",
                    "version": "0.1.0",
                    "langgraph": "1.2.24",
                    "engine": "sqlite",
                    "graphs": ["research", "screening"],
                },
            }
        }
    }
}


@router.get("/health", summary="Is it alive?", responses={200: {"model": Health}})
@router.get("/healthz", include_in_schema=False)
async def health() -> Response:
    """The event loop answers: `{"status":"ok","ts":<unix seconds>}`, exactly."""
    await asyncio.sleep(0)  # a turn of the loop really happened
    return JSONResponse({"status": "ok", "ts": int(time.time())}, headers=_NO_STORE)


@router.get("/livez", summary="Is it not stuck?", response_class=PlainTextResponse, responses=PLAIN)
async def live() -> Response:
    """The process is not stuck; best effort on this port."""
    return PlainTextResponse("ok", headers=_NO_STORE)


@router.get("/readyz", summary="Does it take new runs?", responses=CHECKED)
@router.get("/ready", include_in_schema=False)
async def ready(request: Request, services: ServicesDep) -> Response:
    """New runs are welcome: started, not draining, the store writable, every graph served."""
    results = services.checks.ready()
    if services.draining():  # known at once, while the last answers of checks have an age
        down: dict[str, object] = {"status": "fail", "output": "the server shuts down"}
        results = [{**r, **down} if r["name"] == "draining" else r for r in results]
    return _checked(results, request)


@router.get("/startupz", summary="Has it started?", responses=CHECKED)
async def started(request: Request, services: ServicesDep) -> Response:
    """Graphs are compiled and the store is open."""
    return _checked(services.checks.started(), request)


@router.get("/metrics", summary="Read metrics", response_class=PlainTextResponse, responses=METRICS)
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Prometheus text, or OpenMetrics when asked for; rendered in a thread."""
    body, media_type = await services.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": media_type, **_NO_STORE})


@router.get("/info", summary="What is it?", responses=INFO)
async def info(services: ServicesDep) -> dict[str, object]:
    """Versions, graphs, and what this server was told."""
    return dict(services.info)


def _checked(results: list[dict[str, object]], request: Request) -> Response:
    ok = all(result["status"] == "pass" for result in results)
    body = {"status": "pass" if ok else "fail", "checks": results}
    media_type = "application/json"
    if "application/health+json" in request.headers.get("accept", ""):
        media_type = "application/health+json"
    return JSONResponse(body, 200 if ok else 503, headers=_NO_STORE, media_type=media_type)
