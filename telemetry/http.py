"""Makes each HTTP request a SERVER span, metrics and a log line, without touching its answer.

    http = observe(app)             # when the app is built: outermost, around all middleware
    http.attach(tracing, metrics)   # when there is telemetry; until then requests just pass

A request's span ends with the last byte handed over. Whatever goes wrong in here, the app's bytes
reach the client and the app's exceptions reach the server.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import structlog
from fastapi import FastAPI
from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import CarrierT, Getter, default_getter
from opentelemetry.trace import INVALID_SPAN, Span, SpanContext, get_current_span
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from telemetry.contract import CloseReason
from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch
from telemetry.tracing import Tracing, ids_of, read_traceparent, set_error, traceparent

__all__ = [
    "FASTAPI_OFF",
    "UNMATCHED",
    "Exchange",
    "HttpTelemetry",
    "current",
    "harmless",
    "observe",
    "use_stable_names",
]

Trust = Literal["parent", "link", "ignore"]

#: For `FastAPI(telemetry=…)`: it has spans of its own, which begin once a global provider is set.
FASTAPI_OFF: Any = {"tracing": False, "metrics": False, "logs": False}
#: The `route` of a request that no route is for.
UNMATCHED = "__unmatched__"
#: Asked every few seconds by machines: counted, and otherwise left alone.
PROBES = frozenset(("/health", "/healthz", "/livez", "/ready", "/readyz", "/startupz"))
UNSEEN = PROBES | {"/metrics"}

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
#: What a log says of an answer that its client did not wait for.
_CLIENT_CLOSED = 499

_log = structlog.get_logger("api")

P = ParamSpec("P")


class _Breakable(Protocol):
    def broke(self, where: str) -> None:
        """Note a mistake of ours. Called in the `except`."""


B = TypeVar("B", bound=_Breakable)


def harmless(method: Callable[Concatenate[B, P], None]) -> Callable[Concatenate[B, P], None]:
    """Telemetry that fails is counted, and nobody else's business."""

    @wraps(method)
    def call(self: B, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.broke(method.__qualname__)

    return call


def observe(app: FastAPI) -> HttpTelemetry:
    """Observe everything that an app does with a request, middleware added later included."""
    http = HttpTelemetry()
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: http.around(build())  # type: ignore[method-assign]
    return http


class HttpTelemetry:
    """Observes the requests of one app, as soon as it knows with what."""

    def __init__(self) -> None:
        self._observer: _Observer | None = None

    def attach(
        self, tracing: Tracing, metrics: Metrics, selfwatch: Selfwatch, trust: Trust = "link"
    ) -> None:
        """Begin. `trust` says what the span that a client names is to the request's.

        `parent`: its parent. `link`: a link, for a stranger shall not choose in whose trace we
        write. `ignore`: nothing. Its word not to sample is not heard, and its baggage dropped.
        """
        self._observer = _Observer(tracing, metrics, selfwatch, trust)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app, observed."""

        async def observed(scope: Scope, receive: Receive, send: Send) -> None:
            observer = self._observer
            if observer is None or scope["type"] != "http":
                await app(scope, receive, send)
                return
            # Apps that are mounted in this one leave requests to us as well.
            scope.setdefault("fastapi.telemetry", None)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in UNSEEN:
                await observer.probed(path, app, scope, receive, send)
            else:
                await observer.observed(app, scope, receive, send)

        return observed


class _Observer:
    """What all requests share."""

    def __init__(
        self, tracing: Tracing, metrics: Metrics, selfwatch: Selfwatch, trust: Trust
    ) -> None:
        self.duration = metrics["http_request_duration_seconds"]
        self.active = metrics["http_active_requests"]
        self.aborted = metrics["http_aborted_total"]
        self._checks = metrics["health_checks_total"]
        self._selfwatch = selfwatch
        _mend_propagation()
        understood = propagate.get_global_textmap().fields
        #: Whether a stranger's span is linked to, if the request names one in a way that counts.
        self.links = trust == "link" and "traceparent" in understood
        hidden = {"traceparent", "tracestate", *understood}
        if trust == "parent":
            hidden.clear()
        #: Headers of a request that do not get to propagators.
        self.hidden = frozenset(name.lower().encode() for name in {*hidden, "baggage"})
        self.spans = _server_spans(tracing) if tracing.enabled else None

    async def probed(
        self, path: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, watched)
        finally:
            if path in PROBES:
                self._probed(path, "pass" if status < 400 else "fail")

    @harmless
    def _probed(self, path: str, result: str) -> None:
        self._checks.inc(path, result)

    async def observed(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self, app, scope, receive, send)
        token = _current.set(exchange)
        try:
            with bound_contextvars(request_id=exchange.request_id):
                await exchange.run()
        finally:
            _current.reset(token)

    def broke(self, where: str) -> None:
        try:
            self._selfwatch.internal_error("http", where)
        except Exception:
            return


def use_stable_names() -> None:
    """Have OpenTelemetry's HTTP instrumentations write the stable names, unless told otherwise.

    The first one of a process that is set up decides for all of them: call this before.
    """
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")


def _mend_propagation() -> None:
    """With OTEL_PROPAGATORS=none nothing is extracted: not even a context, which requests need."""
    if propagate.extract({}) is None:
        propagate.set_global_textmap(_Nothing([]))


class _Nothing(CompositePropagator):
    def extract(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        getter: Getter[CarrierT] = default_getter,
    ) -> Context:
        return Context() if context is None else context


def _server_spans(tracing: Tracing) -> ASGIApp:
    """Makes the span and its attributes by the HTTP conventions; the rest is ours."""
    use_stable_names()

    async def enter(scope: Scope, receive: Receive, send: Send) -> None:
        await current().enter(scope, receive, send)

    middleware: ASGIApp = OpenTelemetryMiddleware(
        enter,
        tracer_provider=tracing.provider,
        meter_provider=NoOpMeterProvider(),
        exclude_spans=["send", "receive"],
        default_span_details=lambda scope: (_method(scope), {}),
    )
    return middleware


class Exchange:
    """One request and its answer."""

    #: The request's trace in 32 hex digits; None without a span.
    trace_id: str | None = None
    #: Set by whoever answers with a stream: why it ends, and that it is one.
    streams = False
    close_reason: CloseReason | None = None

    def __init__(
        self, observer: _Observer, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._observer = observer
        self._app = app
        self._scope = scope
        self._headers = scope["headers"]
        self._receive_client = receive
        self._send_client = send
        self.request_id = _request_id(self._headers)
        self.span: Span = INVALID_SPAN
        self._began = time.perf_counter()
        self._status: int | None = None
        self._run_trace: str | None = None
        self._error: BaseException | None = None
        #: What the app raised; telemetry in between does not see it.
        self._raised: BaseException | None = None
        #: What the connection raised.
        self._refused: BaseException | None = None
        self._entered = self._handed = self._complete = self._gone = self._ended = False
        self._active: str | None = None
        # By the time that a request first waits for something, it has its route.
        self._waiting = asyncio.get_running_loop().call_soon(self._waits)

    # What the app may say.

    @harmless
    def acts_on(
        self,
        *,
        thread_id: str,
        graph: str,
        run_id: str | None = None,
        traceparent: str | None = None,
    ) -> None:
        """The run that the request is about, and where its trace began; or at least the thread."""
        ids = ids_of(read_traceparent(traceparent))
        self._run_trace = ids[0] if ids is not None else None
        self.span.set_attributes({"sereno.thread.id": thread_id, "sereno.graph.name": graph})
        if run_id is not None:
            self.span.set_attribute("sereno.run.id", run_id)

    @harmless
    def reads(self, run_context: Callable[[], SpanContext | None]) -> None:
        """Link to the span of a run that another request started."""
        if self.span.is_recording() and (context := run_context()) is not None:
            self.span.add_link(context, {"sereno.link.kind": "run"})

    @harmless
    def failed(self, exc: BaseException) -> None:
        """We could not answer, or not to the end."""
        self._error = exc
        set_error(self.span, exc, messages=True)

    def broke(self, where: str) -> None:
        """Note a mistake of telemetry's."""
        self._observer.broke(where)

    # The way of a request: run → OpenTelemetry's middleware → enter → the app.

    async def run(self) -> None:
        """Have the app answer, in a span if there can be one."""
        if self._observer.spans is not None:
            # Neither a span nor baggage of whoever called us in this process is the client's.
            token = otel_context.attach(Context())
            try:
                self._hide()
                await self._observer.spans(self._scope, self._receive, self._to_client)
            except Exception:  # the app's are kept by enter()
                self.broke("server span")
            finally:
                otel_context.detach(token)
        if not self._entered:
            await self.enter(self._scope, self._receive, self._to_client)
        self._end()
        raised = self._raised
        self._raised = self._error = self._refused = None
        if raised is not None:
            try:
                raise raised
            finally:
                del raised  # it knows this frame

    @harmless
    def _hide(self) -> None:
        hidden = self._observer.hidden
        self._scope["headers"] = [h for h in self._headers if h[0] not in hidden]

    async def enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._entered = True
        scope["headers"] = self._headers
        self._begin(get_current_span())

        async def watched(message: Message) -> None:
            await self._send(send, message)

        try:
            await self._app(scope, receive, watched)
        except BaseException as exc:
            self._raised = exc
            if isinstance(exc, Exception) and not isinstance(self._refused, OSError):
                self.failed(exc)
        if self._status is None:
            self._name()

    @harmless
    def _begin(self, span: Span) -> None:
        ids = ids_of(span.get_span_context())
        if ids is None:
            return
        self.span, self.trace_id = span, ids[0]
        if server := self._scope.get("server"):
            span.set_attribute("server.address", server[0])  # until here with its port
        if self._observer.links:
            named = read_traceparent(_header(self._headers, b"traceparent"))
            if named is not None:
                span.add_link(named, {"sereno.link.kind": "remote"})

    async def _receive(self) -> Message:
        message = await self._receive_client()
        if message["type"] == "http.disconnect":
            self._gone = True
        return message

    async def _send(self, traced: Send, message: Message) -> None:
        """A message of the app's, on its way through OpenTelemetry's middleware to the client."""
        if message["type"] == "http.response.body" and message.get("more_body"):
            await self._hand(message)
            return
        if message["type"] == "http.response.start":
            self._start(message)
        self._handed = False
        try:
            await traced(message)
        except Exception as exc:
            if exc is self._refused:
                raise
            self.broke("sending")
            if not self._handed:
                await self._to_client(message)

    async def _to_client(self, message: Message) -> None:
        if self._error is not None:
            self.failed(self._error)  # more than the status, which was just noted as the error
        await self._hand(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._complete = True
            self._end()

    async def _hand(self, message: Message) -> None:
        self._handed = True
        try:
            await self._send_client(message)
        except BaseException as exc:
            self._refused = exc
            raise

    @harmless
    def _start(self, message: Message) -> None:
        self._status = message["status"]
        self._name()
        ours = []
        if self._run_trace is not None:
            ours.append((b"x-trace-id", self._run_trace.encode()))
        if self.trace_id is not None:
            ours.append((b"traceresponse", traceparent(self.span.get_span_context()).encode()))
        message["headers"] = [*message.get("headers", ()), *ours]

    @harmless
    def _name(self) -> None:
        if (route := _route(self._scope)) is not None and self.span.is_recording():
            self.span.update_name(f"{_method(self._scope)} {route}")
            self.span.set_attribute("http.route", route)

    @harmless
    def _waits(self) -> None:
        self._active = _route(self._scope) or UNMATCHED
        self._observer.active.inc(self._active)

    @harmless
    def _end(self) -> None:
        """Once, after the last byte, or when the app has given up."""
        if self._ended:
            return
        self._ended = True
        self._waiting.cancel()
        if self._active is not None:
            self._observer.active.dec(self._active)
        hung_up = self._hung_up()
        if hung_up is not None:
            phase = "before_headers" if self._status is None else "streaming"
            self._observer.aborted.inc(phase, hung_up)
        if not self.streams:
            self._answered(hung_up)

    def _hung_up(self) -> Literal["client", "server"] | None:
        if self.close_reason == "complete" or (self.close_reason is None and self._complete):
            return None
        if self.close_reason == "client_disconnect":
            return "client"
        if self.close_reason is None and (self._gone or isinstance(self._refused, OSError)):
            return "client"
        return "server"

    def _answered(self, hung_up: str | None) -> None:
        took = time.perf_counter() - self._began
        method, route = self._scope["method"], _route(self._scope) or UNMATCHED
        if self._status is not None:
            self._observer.duration.observe(took, method, route, f"{self._status // 100}xx")
        ids = ids_of(self.span.get_span_context())
        _log.info(
            "Request",
            method=method,
            route=route,
            status=_CLIENT_CLOSED if hung_up == "client" else self._status,
            duration_ms=round(took * 1000, 3),
            request_id=self.request_id,
            **({"trace_id": ids[0], "span_id": ids[1]} if ids is not None else {}),
        )


class _Unobserved(Exchange):
    """Where no request is observed, there is nothing to say."""

    def __init__(self) -> None:
        self.span = INVALID_SPAN

    def acts_on(self, **_: Any) -> None: ...

    def reads(self, _: Callable[[], SpanContext | None]) -> None: ...

    def failed(self, _: BaseException) -> None: ...

    def broke(self, _: str) -> None: ...


_current: ContextVar[Exchange | None] = ContextVar("sereno_exchange", default=None)


def current() -> Exchange:
    """The exchange that the current code takes part in."""
    return _current.get() or _Unobserved()


def _method(scope: Scope) -> str:
    """The method as a span's name begins: those that a client made up are no names."""
    return scope["method"] if scope["method"] in _METHODS else "HTTP"


_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
)


def _route(scope: Scope) -> str | None:
    """The template of the route that was found; None before, and when there is none.

    Only what routing left in the scope is read: to walk the app's routes has failed requests.
    """
    route = scope.get("route")
    mounted: str = scope.get("root_path", "").removeprefix(scope.get("app_root_path", ""))
    if "app_root_path" not in scope:
        mounted = ""  # a root path that the server was given is no mount
    if isinstance(route, Mount):
        return f"{mounted}/{{path}}"
    if route is None:
        return None
    included = scope.get("fastapi", {}).get("effective_route_context")
    if getattr(included, "original_route", None) is route:
        path = getattr(included, "path", None)
    else:
        path = getattr(route, "path_format", None)
    return None if path is None else f"{mounted}{path}"


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's word for its request, if it is fit for a log; else one of ours."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return uuid.uuid4().hex
