"""Requests as spans, metrics and log lines; whatever telemetry does, the answers stay the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from opentelemetry import baggage, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.background import BackgroundTask
from starlette.routing import Mount, Route
from starlette.types import Message
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs

from telemetry import http
from telemetry.http import FASTAPI_OFF, UNMATCHED, HttpTelemetry, observe
from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch
from telemetry.tracing import Tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    raised: BaseException | None = None
    #: When the last byte came.
    at: float = 0.0


class World:
    """An app, its telemetry, and a client."""

    def __init__(self, *, trust: Any = "link", attached: bool = True, traced: bool = True) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(processors=[SimpleSpanProcessor(self.exporter)], enabled=traced)
        self.metrics = Metrics()
        self.selfwatch = Selfwatch(self.metrics)
        self.app = _app()
        self.http: HttpTelemetry = observe(self.app)
        if attached:
            self.attach(trust)

    def attach(self, trust: Any = "link") -> None:
        self.http.attach(self.tracing, self.metrics, self.selfwatch, trust)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def span(self) -> ReadableSpan:
        (span,) = self.spans
        return span

    @property
    def mistakes(self) -> float:
        return self.metrics["telemetry_internal_errors_total"].value("http")

    def answered(self, method: str, route: str, status: str = "2xx") -> float:
        return self.metrics["http_request_duration_seconds"].value(method, route, status)

    def aborted(self) -> dict[tuple[str, str], float]:
        family = self.metrics["http_aborted_total"]
        pairs = [(p, b) for p in ("before_headers", "streaming") for b in ("client", "server")]
        return {pair: family.value(*pair) for pair in pairs if family.value(*pair)}

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.ask("GET", path, **more)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: bytes = b"",
        root_path: str = "",
        send: Callable[[Message], Awaitable[None]] | None = None,
        receive: Callable[[], Awaitable[Message]] | None = None,
        **headers: str,
    ) -> Answer:
        answer = Answer()

        async def received() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def sent(message: Message) -> None:
            if send is not None:
                await send(message)
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")
                answer.at = time.perf_counter()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": root_path + path,
            "raw_path": (root_path + path).encode(),
            "root_path": root_path,
            "query_string": query,
            "headers": [
                (name.replace("_", "-").encode(), value.encode("latin-1"))
                for name, value in {"host": "test", **headers}.items()
            ],
            "server": ("10.0.0.1", 8009),
            "client": ("127.0.0.1", 1234),
        }
        try:
            await self.app(scope, receive or received, sent)
        except BaseException as exc:
            answer.raised = exc
        return answer


def _app() -> FastAPI:
    inner, middle, app = APIRouter(), APIRouter(), FastAPI(telemetry=FASTAPI_OFF)
    sub = FastAPI()

    @inner.get("/leaf/{id}")
    async def leaf(id: str) -> str:
        return id

    @app.get("/plain")
    async def plain() -> dict[str, str]:
        return {"hello": "there"}

    @app.get("/context")
    async def context(request: Request) -> dict[str, Any]:
        return {
            "baggage": dict(baggage.get_all()),
            "span": trace.get_current_span().get_span_context().span_id,
            "headers": dict(request.headers),
            "bound": get_contextvars().get("request_id"),
        }

    @app.get("/waits")
    async def waits(request: Request) -> str:
        request.app.state.waiting.set()
        await request.app.state.go_on.wait()
        return "done"

    @app.get("/breaks")
    async def breaks() -> None:
        raise RuntimeError("broken inside")

    @app.get("/unavailable")
    async def unavailable() -> PlainTextResponse:
        return PlainTextResponse("later", 503)

    @app.get("/stream")
    async def stream(n: int = 3, fail: bool = False) -> StreamingResponse:
        async def lines() -> Any:
            for i in range(n):
                yield f"{i}\n"
            if fail:
                raise RuntimeError("in the middle")

        return StreamingResponse(lines())

    @app.get("/background")
    async def background(request: Request) -> PlainTextResponse:
        async def work() -> None:
            request.app.state.waiting.set()
            await request.app.state.go_on.wait()

        return PlainTextResponse("done", background=BackgroundTask(work))

    @app.get("/health")
    @app.get("/readyz")
    @app.get("/metrics")
    async def probe(request: Request) -> PlainTextResponse:
        return PlainTextResponse("", 503 if request.url.path == "/readyz" else 200)

    @sub.get("/inside/{id}")
    async def inside(id: str) -> str:
        return id

    async def star(_: Request) -> PlainTextResponse:
        return PlainTextResponse("star")

    middle.include_router(inner, prefix="/inner")
    app.include_router(middle, prefix="/middle")
    app.mount("/sub", sub)
    app.router.routes.append(Mount("/star", routes=[Route("/{name}", star)]))
    app.state.waiting, app.state.go_on = asyncio.Event(), asyncio.Event()
    return app


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as records:
        yield records


# A request is a span.


async def test_a_request_is_one_server_span_by_the_stable_conventions(world: World) -> None:
    answer = await world.get("/plain", query=b"a=b", user_agent="curl/8")

    assert (answer.status, answer.body) == (200, b'{"hello":"there"}')
    assert world.span.name == "GET /plain"
    assert world.span.kind is SpanKind.SERVER
    assert world.span.parent is None
    assert world.span.status.status_code is StatusCode.UNSET
    attributes = dict(world.span.attributes or {})
    assert (
        attributes.items()
        >= {
            "http.request.method": "GET",
            "http.response.status_code": 200,
            "http.route": "/plain",
            "url.path": "/plain",
            "url.query": "a=b",
            "url.scheme": "http",
            "user_agent.original": "curl/8",
            "client.address": "127.0.0.1",
            "server.address": "10.0.0.1",
            "server.port": 8009,
        }.items()
    )
    assert not attributes.keys() & {"http.method", "http.status_code", "http.target", "http.url"}


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        pytest.param("GET", "/middle/inner/leaf/7", 200, "/middle/inner/leaf/{id}", id="nested"),
        pytest.param("GET", "/sub/inside/7", 200, "/sub/inside/{id}", id="mounted"),
        pytest.param("GET", "/star/x", 200, "/star/{name}", id="mounted starlette"),
        pytest.param("HEAD", "/plain", 405, "/plain", id="head"),
        pytest.param(
            "HEAD", "/middle/inner/leaf/7", 405, "/middle/inner/leaf/{id}", id="nested head"
        ),
        pytest.param("DELETE", "/sub/inside/7", 405, "/sub/inside/{id}", id="mounted 405"),
    ],
)
async def test_a_route_is_its_whole_template(
    world: World, method: str, path: str, status: int, route: str
) -> None:
    answer = await world.ask(method, path)

    assert answer.status == status
    assert world.span.name == f"{method} {route}"
    assert (world.span.attributes or {})["http.route"] == route
    assert world.answered(method, route, f"{status // 100}xx") == 1


@pytest.mark.parametrize("path", ["/nowhere/7", "/middle/inner/nowhere", "/sub/nowhere", "//"])
async def test_without_a_route_there_is_none(world: World, path: str) -> None:
    assert (await world.get(path)).status == 404

    assert world.span.name == "GET"
    assert "http.route" not in (world.span.attributes or {})
    assert world.answered("GET", UNMATCHED, "4xx") == 1


async def test_a_root_path_of_the_server_is_no_part_of_a_route(world: World) -> None:
    for path in ("/plain", "/middle/inner/leaf/7", "/sub/inside/7", "/health"):
        assert (await world.get(path, root_path="/proxied")).status == 200

    assert [span.name for span in world.spans] == [
        "GET /plain",
        "GET /middle/inner/leaf/{id}",
        "GET /sub/inside/{id}",
    ]


async def test_methods_that_a_client_made_up_are_one(world: World) -> None:
    for n in range(3):
        await world.ask(f"X{n}", "/plain")

    assert [span.name for span in world.spans] == ["HTTP /plain"] * 3
    assert world.answered("other", "/plain", "4xx") == 3


async def test_a_stream_is_one_span_however_many_writes_it_has(world: World) -> None:
    answer = await world.get("/stream", query=b"n=1000")

    assert answer.body.count(b"\n") == 1000
    assert world.span.name == "GET /stream"
    assert world.tracing.live() == 0


async def test_work_after_the_answer_is_no_part_of_the_span(world: World) -> None:
    """The span ends with the last byte, while the app is still at work."""
    asking = asyncio.create_task(world.get("/background"))
    await world.app.state.waiting.wait()

    assert world.span.name == "GET /background"
    assert world.answered("GET", "/background") == 1
    assert world.metrics["http_active_requests"].value("/background") == 0
    world.app.state.go_on.set()
    assert (await asking).body == b"done"
    assert len(world.spans) == 1


async def test_middleware_that_is_added_later_is_inside_the_span(world: World) -> None:
    seen = []

    class Late:
        def __init__(self, app: Any) -> None:
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(trace.get_current_span().get_span_context().span_id)
            await self._app(scope, receive, send)

    world.app.add_middleware(Late)
    await world.get("/plain")

    assert seen == [world.span.context.span_id]


async def test_the_apps_code_runs_with_the_span_as_the_current_one(world: World) -> None:
    answer = await world.get("/context")

    assert f'"span":{world.span.context.span_id},'.encode() in answer.body
    assert not trace.get_current_span().get_span_context().is_valid


async def test_a_caller_in_this_process_is_not_the_parent(world: World) -> None:
    with trace.use_span(world.tracing.start("caller")):
        await world.get("/plain")

    assert world.spans[0].parent is None
    assert world.spans[0].kind is SpanKind.SERVER


async def test_fastapi_makes_no_spans_besides(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does as soon as there is a global provider, for each request and for parts of it."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", world.tracing.provider)
    for path in ("/plain", "/sub/inside/7"):
        await world.get(path)

    assert [span.name for span in world.spans] == ["GET /plain", "GET /sub/inside/{id}"]


# Whom we believe.


@pytest.mark.parametrize("flag", ["01", "00"], ids=["sampled", "unsampled"])
async def test_by_default_a_client_is_linked_to(world: World, flag: str) -> None:
    await world.get("/plain", traceparent=f"00-{TRACE}-{SPAN}-{flag}", tracestate="a=b")

    (link,) = world.span.links
    assert world.span.parent is None
    assert f"{world.span.context.trace_id:032x}" != TRACE
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == (TRACE, SPAN)
    assert dict(link.attributes or {}) == {"sereno.link.kind": "remote"}


@pytest.mark.parametrize("flag", ["01", "00"], ids=["sampled", "unsampled"])
async def test_a_client_that_is_trusted_is_the_parent(flag: str) -> None:
    """Its word not to sample is not heard: the request may be one that fails."""
    world = World(trust="parent")
    await world.get("/plain", traceparent=f"00-{TRACE}-{SPAN}-{flag}")

    assert world.span.parent is not None
    assert f"{world.span.parent.span_id:016x}" == SPAN
    assert f"{world.span.context.trace_id:032x}" == TRACE
    assert world.span.context.trace_flags.sampled
    assert world.span.kind is SpanKind.SERVER
    assert world.span.links == ()


async def test_a_client_can_be_ignored() -> None:
    world = World(trust="ignore")
    await world.get("/plain", traceparent=f"00-{TRACE}-{SPAN}-01")

    assert world.span.parent is None
    assert world.span.links == ()


@pytest.mark.parametrize("value", ["nonsense", f"00-{'0' * 32}-{SPAN}-01", "", "\xff"])
@pytest.mark.parametrize("trust", ["link", "parent"])
async def test_a_traceparent_that_is_none_is_nothing(trust: str, value: str) -> None:
    world = World(trust=trust)
    answer = await world.get("/plain", traceparent=value)

    assert answer.status == 200
    assert (world.span.parent, world.span.links) == (None, ())
    assert world.mistakes == 0


@pytest.mark.parametrize("trust", ["parent", "link", "ignore"])
async def test_baggage_never_gets_in(trust: str) -> None:
    """The handlers see the header, but nothing that they call passes it on."""
    assert any(
        isinstance(each, W3CBaggagePropagator)
        for each in propagate.get_global_textmap()._propagators  # type: ignore[attr-defined]
    )
    world = World(trust=trust)
    answer = await world.get(
        "/context", baggage="tenant=other", traceparent=f"00-{TRACE}-{SPAN}-01"
    )

    assert b'"baggage":{}' in answer.body
    assert b'"baggage":"tenant=other"' in answer.body
    assert f'"traceparent":"00-{TRACE}-{SPAN}-01"'.encode() in answer.body


# What an answer says.


async def test_an_answer_names_its_own_span(world: World) -> None:
    answer = await world.get("/plain")
    context = world.span.context

    assert (
        answer.headers["traceresponse"] == f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
    )
    assert "x-trace-id" not in answer.headers


async def test_untraced_answers_name_none() -> None:
    world = World(traced=False)
    answer = await world.get("/plain")

    assert "traceresponse" not in answer.headers
    assert world.answered("GET", "/plain") == 1


async def test_before_there_is_telemetry_requests_pass(logs: list[Any]) -> None:
    world = World(attached=False)
    before = await world.get("/plain")
    world.attach()
    after = await world.get("/plain")

    assert (before.status, before.body) == (after.status, after.body)
    assert "traceresponse" not in before.headers
    assert len(world.spans) == len(logs) == world.answered("GET", "/plain") == 1


# Failures.


async def test_an_exception_is_told_once(world: World) -> None:
    answer = await world.get("/breaks")

    assert answer.status == 500
    assert isinstance(answer.raised, RuntimeError)
    assert world.span.status.status_code is StatusCode.ERROR
    attributes = dict(world.span.attributes or {})
    assert attributes["error.type"] == "500"  # the app answered before anybody told us
    assert [event.name for event in world.span.events] == []
    assert world.answered("GET", "/breaks", "5xx") == 1
    assert world.aborted() == {}


async def test_an_exception_of_which_we_are_told_names_the_error(world: World) -> None:
    @world.app.exception_handler(Exception)
    async def tell(_: Request, exc: Exception) -> PlainTextResponse:
        http.current().failed(exc)
        return PlainTextResponse("sorry", 500)

    await world.get("/breaks")

    assert (world.span.attributes or {})["error.type"] == "RuntimeError"
    assert [event.name for event in world.span.events] == ["exception"]


async def test_a_status_above_499_is_an_error(world: World) -> None:
    await world.get("/unavailable")

    assert world.span.status.status_code is StatusCode.ERROR
    assert (world.span.attributes or {})["error.type"] == "503"


async def test_a_client_error_is_none(world: World) -> None:
    await world.get("/stream", query=b"n=x")

    assert world.span.status.status_code is StatusCode.UNSET


async def test_a_failure_after_200_is_an_error_once(world: World) -> None:
    answer = await world.get("/stream", query=b"fail=1")

    assert answer.status == 200
    assert isinstance(answer.raised, RuntimeError)
    assert world.span.status.status_code is StatusCode.ERROR
    assert (world.span.attributes or {})["error.type"] == "RuntimeError"
    assert [event.name for event in world.span.events] == ["exception"]
    assert world.aborted() == {("streaming", "server"): 1}
    assert world.tracing.live() == 0


async def test_a_client_that_goes_while_it_is_sent_to_is_no_error(
    world: World, logs: list[Any]
) -> None:
    async def gone(message: Message) -> None:
        if message.get("body"):
            raise OSError("gone")

    await world.get("/stream", send=gone)

    assert world.span.status.status_code is StatusCode.UNSET
    assert world.aborted() == {("streaming", "client"): 1}
    assert [record["status"] for record in logs] == [499]


async def test_a_request_that_is_cancelled_ends_its_span(world: World) -> None:
    asking = asyncio.create_task(world.get("/waits"))
    await world.app.state.waiting.wait()
    asking.cancel()
    answer = await asking

    assert isinstance(answer.raised, asyncio.CancelledError)
    assert world.span.name == "GET /waits"
    assert world.span.status.status_code is StatusCode.UNSET
    assert world.aborted() == {("before_headers", "server"): 1}
    assert world.metrics["http_active_requests"].value("/waits") == 0


# Numbers and lines.


async def test_a_request_that_waits_is_active_on_its_route(world: World) -> None:
    asking = asyncio.create_task(world.get("/waits"))
    await world.app.state.waiting.wait()
    await asyncio.sleep(0)

    assert world.metrics["http_active_requests"].value("/waits") == 1
    assert world.spans == []
    world.app.state.go_on.set()
    await asking
    assert world.metrics["http_active_requests"].value("/waits") == 0


async def test_a_request_has_a_line(world: World, logs: list[Any]) -> None:
    await world.get("/middle/inner/leaf/7", x_request_id="abc.1:2-3")
    (line,) = logs
    context = world.span.context

    assert line.pop("duration_ms") >= 0
    assert line == {
        "event": "Request",
        "log_level": "info",
        "method": "GET",
        "route": "/middle/inner/leaf/{id}",
        "status": 200,
        "request_id": "abc.1:2-3",
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
    }


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'quo"te', "\xe9"])
async def test_a_request_id_that_is_not_fit_for_a_log_is_replaced(
    world: World, logs: list[Any], given: str
) -> None:
    answer = await world.get("/context", x_request_id=given)

    (line,) = logs
    assert line["request_id"] not in (given, "")
    assert f'"bound":"{line["request_id"]}"'.encode() in answer.body
    assert "request_id" not in get_contextvars()


async def test_probes_are_counted_and_in_nothing_else(world: World, logs: list[Any]) -> None:
    for path in ("/health", "/readyz", "/metrics"):
        await world.get(path)

    checks = world.metrics["health_checks_total"]
    assert (checks.value("/health", "pass"), checks.value("/readyz", "fail")) == (1, 1)
    assert (world.spans, logs) == ([], [])
    assert b"http_request_duration_seconds_count" not in world.metrics.render_now("")[0]


# Telemetry that fails.


class Broken:
    """Fails at whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("telemetry is broken")


def _breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("telemetry is broken")


_FAULTS = [
    "opentelemetry.sdk.trace.Tracer.start_span",
    "opentelemetry.sdk.trace.Span.set_attribute",
    "opentelemetry.sdk.trace.Span.set_attributes",
    "opentelemetry.sdk.trace.Span.set_status",
    "opentelemetry.sdk.trace.Span.update_name",
    "opentelemetry.sdk.trace.Span.add_link",
    "opentelemetry.sdk.trace.Span.add_event",
    "opentelemetry.sdk.trace.Span.end",
    "opentelemetry.sdk.trace.Span.get_span_context",
    "opentelemetry.instrumentation.asgi.collect_request_attributes",
    "opentelemetry.instrumentation.asgi.set_status_code",
    "opentelemetry.instrumentation.asgi._collect_target_attribute",
    "opentelemetry.instrumentation.asgi.OpenTelemetryMiddleware._get_otel_send",
    "telemetry.metrics.Family.inc",
    "telemetry.metrics.Family.dec",
    "telemetry.metrics.Family.observe",
    "telemetry.selfwatch.Selfwatch.internal_error",
    "telemetry.http.read_traceparent",
    "telemetry.http.set_error",
    "telemetry.http.traceparent",
    "telemetry.http.ids_of",
    "telemetry.http._route",
    "telemetry.http._log",
]


@pytest.mark.parametrize("target", _FAULTS)
async def test_an_answer_is_the_same_when_telemetry_fails(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, but for the header that names the span, if there is none."""

    async def told(world: World) -> list[Any]:
        found = []
        for path, query in [
            ("/plain", b""),
            ("/stream", b"n=5"),
            ("/stream", b"fail=1"),
            ("/breaks", b""),
            ("/unavailable", b""),
            ("/nowhere", b""),
            ("/health", b""),
        ]:
            answer = await world.get(path, query=query, traceparent=f"00-{TRACE}-{SPAN}-01")
            answer.headers.pop("traceresponse", None)
            found.append((answer.status, answer.headers, answer.body, repr(answer.raised)))
        return found

    whole = await told(World())
    world = World()
    monkeypatch.setattr(target, Broken() if target.endswith("_log") else _breaks)

    assert await told(world) == whole


async def test_a_query_that_is_not_text_is_answered(world: World) -> None:
    """OpenTelemetry's middleware cannot read it."""
    answer = await world.get("/plain", query=b"\xff")

    assert answer.status == 200
    assert world.mistakes == 1
    assert world.answered("GET", "/plain") == 1


async def test_concurrent_requests_keep_apart(world: World) -> None:
    answers = await asyncio.gather(
        *(world.get(f"/middle/inner/leaf/{i}", x_request_id=str(i)) for i in range(20))
    )

    assert [answer.body for answer in answers] == [f'"{i}"'.encode() for i in range(20)]
    assert len({answer.headers["traceresponse"] for answer in answers}) == 20
    assert len(world.spans) == 20
