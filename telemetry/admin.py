"""Answers operators from threads of its own: metrics and liveness, while the event loop is blocked.

What is asked of it is little and slow at worst, so every connection serves one request, for
`_PATIENCE_S` at most: whoever stays longer, or sends nothing, is cut off.
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

import structlog

from telemetry.encoding import JsonEncoder
from telemetry.metrics import Metrics

__all__ = ["Admin", "AdminListener", "Answer"]

_PATIENCE_S = 10.0
#: Connections at a time; more are told to come again.
_CONNECTIONS = 32
#: How often those that stay too long are looked for, and how long closing takes at most.
_POLL_S = 0.2
_TEXT = "text/plain; charset=utf-8"

_log = structlog.get_logger("telemetry")


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back, of any request."""

    status: int
    body: bytes
    media_type: str = _TEXT
    headers: Mapping[str, str] = field(default_factory=dict)


class Admin:
    """Decides what is answered; knows no sockets. For any thread."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        alive: Callable[[], Sequence[Mapping[str, object]]],
        live: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._metrics = metrics
        self._alive = alive
        self._live = live
        self._render = _Shared(metrics.render_now)
        self._encode = JsonEncoder().encode
        self._routes: dict[str, Callable[[str, str], Answer]] = {
            "/metrics": self._exposition,
            "/livez": self._liveness,
            "/debug/live": self._unfinished,
        }

    def answer(self, method: str, target: str, accept: str = "") -> Answer:
        """The answer to a request of `target`, a path and perhaps a query. Never raises."""
        try:
            path, _, query = target.partition("?")
            route = self._routes.get(path)
            if route is None:
                known = ", ".join(self._routes)
                return self._problem(404, "not_found", f"there are {known}")
            if method not in ("GET", "HEAD"):
                return self._problem(
                    405, "method_not_allowed", f"{path} takes GET", {"Allow": "GET, HEAD"}
                )
            return route(query, accept)
        except Exception:
            self._metrics["telemetry_internal_errors_total"].inc("admin")
            _log.warning("Admin request failed", exc_info=True, target=target[:200])
            return self._problem(500, "internal", "see the log")

    def _exposition(self, query: str, accept: str) -> Answer:
        return Answer(200, *self._render(accept))

    def _liveness(self, query: str, accept: str) -> Answer:
        checks = self._alive()
        failed = [check for check in checks if check["status"] != "pass"]
        self._metrics["health_checks_total"].inc("/livez", "fail" if failed else "pass")
        lines = ["failed" if failed else "ok"]
        # A failure shows why at once: it may be the last that is seen of this process.
        shown = checks if "verbose" in parse_qs(query, keep_blank_values=True) else failed
        for check in shown:
            lines.append(" ".join(str(value) for value in check.values()))
        return Answer(503 if failed else 200, "\n".join(lines).encode())

    def _unfinished(self, query: str, accept: str) -> Answer:
        return Answer(200, self._encode(self._live()), "application/json")

    def _problem(
        self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> Answer:
        body = {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "code": code,
            "detail": detail,
        }
        return Answer(status, self._encode(body), "application/problem+json", headers or {})


class AdminListener:
    """Serves an `Admin` as long as it is entered; leaving blocks for a moment.

    Entering raises OSError, with the address in its text, when nobody can listen there.
    """

    def __init__(self, host: str, port: int, admin: Admin) -> None:
        self._host = host
        #: Where it listens; 0 until it has taken a free one.
        self.port = port
        self._admin = admin
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self._server = server = _listen(self._host, self.port, self._admin)
        self.port = server.server_address[1]
        threading.Thread(
            target=server.serve_forever, args=(_POLL_S,), name="sereno-admin", daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut_off(older_than_s=0.0)


def _listen(host: str, port: int, admin: Admin) -> _Server:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return _Server(family, address, admin)
    except (OSError, OverflowError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from exc


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 2 * _CONNECTIONS

    def __init__(self, family: int, address: Any, admin: Admin) -> None:
        self.address_family = family
        self.admin = admin
        self._since: dict[Any, float] = {}
        super().__init__(address, _Handler)

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:  # no descriptors left: it would be asked again at once
            time.sleep(_POLL_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._since) >= _CONNECTIONS:
            with suppress(OSError):
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self.cut_off(older_than_s=_PATIENCE_S)

    def cut_off(self, *, older_than_s: float) -> None:
        """Let go of who has been here for too long; their threads find the connection closed."""
        now = time.monotonic()
        for request, since in self._since.copy().items():
            if now - since >= older_than_s:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's error, and answering raises nothing else."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    error_content_type = _TEXT
    error_message_format = "%(code)d %(message)s"

    def _answer(self) -> None:
        answer = self.server.admin.answer(self.command, self.path, self.headers.get("Accept", ""))
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.media_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer

    def version_string(self) -> str:
        return "sereno"

    def log_message(self, format: str, *args: Any) -> None:
        """Probes and scrapes are counted, not logged."""


class _Shared:
    """Renders once at a time. Whoever asks before a rendering begins has what comes of it."""

    def __init__(self, render: Callable[[str], tuple[bytes, str]]) -> None:
        self._render = render
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        #: The last who asked, and the last who had asked when the last rendering began.
        self.asked = self._served = 0
        self._accept = ""
        self._last = (b"", "")

    def __call__(self, accept: str) -> tuple[bytes, str]:
        with self._counting:
            number = self.asked = self.asked + 1
        with self._lock:
            if self._served < number or self._accept != accept:
                served = self.asked
                self._last = self._render(accept)
                self._served, self._accept = served, accept
            return self._last
