"""The composition root: settings, graphs, engine, worker, app, each open as long as it serves."""

from __future__ import annotations

# First: what FastAPI imports reads variables of OpenTelemetry's at once.
import telemetry as _telemetry  # noqa: F401

# isort: split
import asyncio
import contextlib
import contextvars
import os
import platform
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime import engines
from runtime.api import console, health, problems, runs, seed, threads
from runtime.api import graphs as graphs_api
from runtime.api.dependencies import Services
from runtime.api.schemas import RunRequest
from runtime.api.submitting import default_input, submit_request
from runtime.engines import probes as engine_probes
from runtime.engines.base import Engine, follow
from runtime.engines.serde import StrictSerializer
from runtime.errors import (
    BadSetting,
    InvalidRequest,
    SeamBroken,
    StorageFailed,
    StoreUnusable,
)
from runtime.execution.runner import mend_langgraph
from runtime.execution.worker import Worker
from runtime.graphs import Graphs
from runtime.settings import Settings
from runtime.transports.ndjson import Ndjson
from runtime.transports.seed import SeedNdjson
from telemetry import http, logs, selftest
from telemetry import langchain as langchain_seam
from telemetry import tenacity as tenacity_seam
from telemetry.admin import AdminListener
from telemetry.contract import VERSION as CONTRACT_VERSION
from telemetry.encoding import JsonEncoder
from telemetry.health import Checks
from telemetry.langgraph import SeamMismatch
from telemetry.metrics import Metrics
from telemetry.probes import Probes
from telemetry.selftest import Wrap
from telemetry.setup import Telemetry, TelemetryConfig, log_ids
from telemetry.tracing import read_traceparent

__all__ = ["create_app", "local_stream", "serve"]

_log = structlog.get_logger("runtime")


def create_app(
    settings: Settings, sources: Sequence[str | Path], *, engine: Engine | None = None
) -> FastAPI:
    """The application; what it needs is opened by its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, sources, engine=engine) as opened:
            _attach(app, *opened)
            yield

    return _routes(settings, lifespan=lifespan)


def _routes(settings: Settings, **options: Any) -> FastAPI:
    app = FastAPI(
        title="Sereno",
        version=version("sereno"),
        summary="LangGraph graphs as durable, resumable NDJSON streams.",
        openapi_url=None,  # served by runtime.api.document
        telemetry=http.FASTAPI_OFF,
        **options,
    )
    for module in (runs, threads, graphs_api, seed, health, console):
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(BodyLimit, limit=settings.body_max)
    app.state.http = http.observe(app)
    return app


def _attach(app: FastAPI, services: Services, worker: Worker, telemetry: Telemetry) -> None:
    app.state.services = services
    app.state.worker = worker
    app.state.telemetry = telemetry
    app.state.http.attach(
        telemetry.tracing,
        telemetry.metrics,
        telemetry.selfwatch,
        services.settings.trace_trust,
    )


@asynccontextmanager
async def open_services(
    settings: Settings, sources: Sequence[str | Path], *, engine: Engine | None = None
) -> AsyncIterator[tuple[Services, Worker, Telemetry]]:
    """Open everything a server needs; one `async with` per resource, closed in reverse."""
    if not settings.loopback and not settings.insecure:
        raise BadSetting(
            f"SERENO_HOST: {settings.host} is reachable by others and there are no API keys yet; "
            "listen on 127.0.0.1, or say --insecure"
        )
    wrap = await observe(settings)
    encoder, checks = JsonEncoder(), Checks()
    async with AsyncExitStack() as stack:
        telemetry = await stack.enter_async_context(Telemetry(_config(settings)))
        metrics = telemetry.metrics
        graphs = await stack.enter_async_context(
            Graphs(sources, lenient=settings.lenient, wrap=wrap)
        )
        store = engine or engines.create(
            settings.engine,
            serde=StrictSerializer.allowing(settings.serde_allow),
            wait_lock=settings.wait_lock,
            telemetry=telemetry.storage,
        )
        try:
            await stack.enter_async_context(store)
        except StorageFailed as exc:
            raise StoreUnusable(f"SERENO_ENGINE: {settings.engine}: {exc}") from exc
        worker = Worker(store, graphs, settings, encoder=encoder, segments=telemetry.segments)
        await stack.enter_async_context(worker)
        _describe(telemetry, settings, graphs, worker, encoder, seam=_seam(wrap))
        _register_checks(checks, store, graphs, worker, metrics)
        probes = Probes(metrics)
        engine_probes.register(probes, store, graphs=graphs.names(), queue_max=settings.queue_max)
        for looks in (checks, probes):
            await looks.refresh()
            looking = asyncio.create_task(looks.run_forever(), name="sereno-checks")
            stack.callback(looking.cancel)
        checks.start()
        await stack.enter_async_context(telemetry.loopwatch)
        yield (
            Services(
                settings=settings,
                engine=store,
                graphs=graphs,
                checks=checks,
                metrics=metrics,
                ndjson=Ndjson(encoder),
                seed=SeedNdjson(encoder),
                submit=worker.submit,
                cancel=worker.cancel,
                open_nodes=worker.open_nodes,
                draining=lambda: worker.draining,
                run_context=lambda run: (
                    telemetry.run_context(run.run_id)
                    or read_traceparent(run.request.get("traceparent"))
                ),
                recorded=lambda run_id: telemetry.recorder.run(
                    run_id, telemetry.tracing.open_spans(run_id)
                ),
                info=_info(settings, graphs, store, seam=_seam(wrap)),
            ),
            worker,
            telemetry,
        )


def _config(settings: Settings) -> TelemetryConfig:
    return TelemetryConfig(
        version=version("sereno"),
        max_series=settings.metrics_max_series,
        semconv=settings.semconv,
        models=tuple(name for name in settings.metrics_models.split(",") if name),
        instrument_httpx=settings.instrument_httpx,
        exception_messages=settings.exception_messages,
        recorder_spans=settings.recorder_spans,
        otlp_logs=settings.otlp_logs,
        loop_stall_s=settings.loop_stall_s,
        run_heartbeat_s=settings.run_heartbeat_s,
    )


def _describe(
    telemetry: Telemetry,
    settings: Settings,
    graphs: Graphs,
    worker: Worker,
    encoder: JsonEncoder,
    *,
    seam: str,
) -> None:
    """What metrics say of this server from the start, and what they read when asked."""
    metrics = telemetry.metrics
    for graph in graphs:
        metrics.graph(graph.name, graph.node_paths())
        telemetry.segments.graph(graph.name)
    worker.watch(metrics)
    metrics["encoder_fallbacks_total"].watch(lambda: encoder.fallbacks)
    metrics["build_info"].info(
        version=version("sereno"),
        commit=os.environ.get("SERENO_COMMIT", ""),
        python=platform.python_version(),
        langgraph=version("langgraph"),
        contract=CONTRACT_VERSION,
    )
    metrics["config_info"].info(
        engine=settings.engine.partition(":")[0],
        durability=settings.durability,
        slots=str(settings.slots),
        semconv=settings.semconv,
        trace_trust=settings.trace_trust,
        seam=seam,
    )
    metrics["insecure"].set(0 if settings.loopback else 1)
    metrics["start_time_seconds"].set(time.time())


async def observe(settings: Settings) -> Wrap | None:
    """Install the seams. What graphs are to be wrapped with, if need be. Raises SeamBroken."""
    try:
        tenacity_seam.install(guard=settings.tenacity_guard)
        langchain_seam.install()
        mend_langgraph()
        return await selftest.observe()
    except SeamMismatch as exc:
        raise SeamBroken(str(exc)) from exc


def _seam(wrap: Wrap | None) -> str:
    """How nodes are seen."""
    return "installed" if wrap is None else "wrapped"


class BodyLimit:
    """Refuses bodies above a size, whatever their headers say. Pure ASGI."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self._limit):
            await self._refuse(scope, receive, send)
            return
        seen, answered = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            if answered:
                raise
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        detail = f"the body is larger than {self._limit} bytes"
        await problems.problem(413, "body_too_large", detail)(scope, receive, send)


class _TooLarge(BaseException):
    """Not an Exception: FastAPI would answer it with a 400."""


def serve(settings: Settings, sources: Sequence[str | Path]) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once. The exit code.

    Raises StartupError when a graph, the store or a setting cannot be used.
    """
    with logs.configure(
        level=settings.log_level,
        constants={"service": "sereno", "version": version("sereno"), "worker": str(os.getpid())},
        identify=log_ids,
        exception_messages=settings.exception_messages,
    ):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            server, worker = runner.run(_serve(settings, sources))
            code = 0 if server.started else 1
            if worker.abandoned:
                _log.warning("Leaving nodes behind", abandoned=worker.abandoned)
                logs.reset()
                os._exit(code)  # a thread that cannot be stopped would keep the process
    return code


async def _serve(settings: Settings, sources: Sequence[str | Path]) -> tuple[Server, Worker]:
    async with open_services(settings, sources) as (services, worker, telemetry):
        app = _routes(settings)
        _attach(app, services, worker, telemetry)
        server = Server(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            ),
            services,
            worker,
        )
        with _admin(settings, telemetry):
            await server.serve()
    return server, worker


@contextlib.contextmanager
def _admin(settings: Settings, telemetry: Telemetry) -> Iterator[None]:
    """The admin listener, which answers while the event loop is blocked."""
    listener = AdminListener(settings.admin_host, settings.admin_port, telemetry.admin)
    try:
        listener.__enter__()
    except OSError as exc:
        raise BadSetting(
            f"SERENO_ADMIN_PORT: {exc}; choose another with --admin-port, or a free one with "
            "--admin-port 0"
        ) from exc
    _log.info("Admin listener", host=settings.admin_host, port=listener.port)
    try:
        yield
    finally:
        listener.__exit__(None, None, None)


class Server(uvicorn.Server):
    """Drains before it stops listening: readers keep their streams until runs are let go."""

    def __init__(self, config: uvicorn.Config, services: Services, worker: Worker) -> None:
        super().__init__(config)
        self._services = services
        self._worker = worker
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except SystemExit as exc:  # uvicorn's word for a port that it cannot have
            raise BadSetting(
                f"SERENO_PORT: cannot listen on {self.config.host}:{self.config.port} "
                "(in use?); choose another port, or 0 for a free one"
            ) from exc
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            _log.info(
                "Serving",
                host=self.config.host,
                port=port,
                url=f"http://{self.config.host}:{port}",
                graphs=list(self._services.graphs.names()),
                engine=self._services.settings.engine,
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            os._exit(128 + sig)
        self._draining = self._loop.create_task(self._drain(), context=contextvars.Context())
        self._loop.call_soon_threadsafe(lambda: None)  # a signal alone does not wake the loop

    async def _drain(self) -> None:
        await self._worker.drain()
        self.should_exit = True


async def local_stream(
    settings: Settings,
    sources: Sequence[str | Path],
    graph: str,
    input: Any,
    thread_id: str | None,
    modes: Sequence[str] | None,
) -> AsyncIterator[bytes]:
    """Run a graph in this process without a server: its encoded lines, to the terminal one."""
    settings = settings.model_copy(update={"engine": "memory://"})
    async with open_services(settings, sources) as (services, _, _):
        body = {
            "graph": graph,
            "input": default_input(services.graphs.get(graph), input),
            "thread_id": thread_id,
            "stream": list(modes) if modes is not None else None,
        }
        try:
            request = RunRequest.model_validate(body)
        except ValidationError as exc:
            first = exc.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "run"
            raise InvalidRequest(field, first["msg"]) from exc
        run = await submit_request(services, request)
        async with contextlib.aclosing(follow(services.engine, run.run_id, 0)) as batches:
            async for batch in batches:
                for line in batch:
                    yield line.body


def _register_checks(
    checks: Checks, engine: Engine, graphs: Graphs, worker: Worker, metrics: Metrics
) -> None:
    async def storage() -> str | None:
        return None if await engine.writable() else "the run store cannot be written"

    async def draining() -> str | None:
        return "the server shuts down" if worker.draining else None

    async def served() -> str | None:
        missing = worker.missing_graphs
        return (
            f"runs wait for graphs that are not served: {', '.join(missing)}" if missing else None
        )

    for name in ("storage", "draining", "graphs"):
        metrics["ready"].watch(partial(_passes, checks, name), name)
    checks.register("storage", storage)
    checks.register("draining", draining)
    checks.register("graphs", served)


def _passes(checks: Checks, name: str) -> float:
    return float(any(r["name"] == name and r["status"] == "pass" for r in checks.ready()))


def _info(settings: Settings, graphs: Graphs, engine: Engine, *, seam: str) -> dict[str, Any]:
    return {
        "name": "sereno",
        "version": version("sereno"),
        "contract": CONTRACT_VERSION,
        "trace_url": settings.trace_url or None,
        "python": platform.python_version(),
        "langgraph": version("langgraph"),
        "seam": seam,
        "engine": settings.engine.partition(":")[0],
        "log_id": engine.log_id,
        "graphs": list(graphs.names()),
        "slots": settings.slots,
        "durability": settings.durability,
        "insecure": not settings.loopback,
    }
