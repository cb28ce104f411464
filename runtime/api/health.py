"""Is it alive, is it ready, and what is it?"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from runtime.api.accept import preferred
from runtime.api.dependencies import ServicesDep
from runtime.api.document import headers
from runtime.api.schemas import Checked, Health, Info

__all__ = ["router"]

router = APIRouter(tags=["operations"])
_NO_STORE = {"Cache-Control": "no-store"}
HEALTH_JSON = "application/health+json"
#: For the OpenAPI document.
CACHE = headers("Cache-Control")
CHECKS = [{"name": "storage", "status": "pass", "age_s": 1.9, "latency_ms": 0.6}]
ALIVE: dict[int | str, dict[str, Any]] = {
    200: {"model": Health, "headers": CACHE, "description": "It is alive."}
}


def _checked_as(description: str, checks: list[dict[str, Any]]) -> dict[str, Any]:
    status = "pass" if all(check["status"] == "pass" for check in checks) else "fail"
    content = {
        "schema": {"$ref": "#/components/schemas/Checked"},
        "example": {"status": status, "checks": checks},
    }
    media_types = ("application/json", HEALTH_JSON)
    return {
        "description": description,
        "model": Checked,
        "headers": CACHE,
        "content": dict.fromkeys(media_types, content),
    }


CHECKED: dict[int | str, dict[str, Any]] = {
    200: _checked_as("All pass.", CHECKS),
    503: _checked_as(
        "A check fails.",
        [*CHECKS, {"name": "draining", "status": "fail", "output": "the server shuts down"}],
    ),
}
PLAIN: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "It is not stuck.",
        "headers": CACHE,
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "ok"}},
    }
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What `Accept` asked for: Prometheus text, or OpenMetrics.",
        "headers": CACHE,
        "content": {
            media_type: {
                "schema": {"type": "string"},
                "example": 'sereno_runs_total{graph="research",outcome="success"} 3.0\n',
            }
            for media_type in ("text/plain", "application/openmetrics-text")
        },
    }
}


@router.get("/health", summary="Is it alive?", responses=ALIVE)
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


@router.get("/info", summary="What is it?", response_model=Info, response_description="The server.")
async def info(services: ServicesDep) -> dict[str, object]:
    """Versions, graphs, and what this server was told."""
    return dict(services.info)


def _checked(results: list[dict[str, object]], request: Request) -> Response:
    ok = all(result["status"] == "pass" for result in results)
    body = {"status": "pass" if ok else "fail", "checks": results}
    # A probe is answered whatever it accepts.
    accept = request.headers.get("accept", "")
    media_type = preferred(accept, ("application/json", HEALTH_JSON)) or "application/json"
    return JSONResponse(body, 200 if ok else 503, headers=_NO_STORE, media_type=media_type)
