"""A calendar and a mail server on a free port of this machine, with faults that pass.

They fail in the same way in every round of interviews:

- the first request for each booking: by turns a 503 with `Retry-After`, and a dropped connection;
- the first request for the first mail: a 429 with `Retry-After`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from pace import PACE

SLOTS = tuple(f"{day} a las {hour}" for day in ("lunes", "martes") for hour in ("10:00", "12:00"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes back to the client; status None hangs up without a word."""

    status: int | None
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


LATER = {"Retry-After": f"{PACE:g}"}
BUSY = Answer(status=503, headers=LATER)
TOO_MANY = Answer(status=429, headers=LATER)
HANG_UP = Answer(status=None)


class FlakyOffice(ThreadingHTTPServer):
    """Answers `PUT /{round}/interviews/{candidate}` and `PUT /{round}/mails/{candidate}`.

    The address says what is meant, so asking again changes nothing and gets the same answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        #: How often each path has been asked for.
        self.requests: Counter[str] = Counter()
        self._done: dict[tuple[str, str], dict[str, Answer]] = defaultdict(dict)
        self._lock = Lock()

    def answer(self, path: str) -> Answer:
        _, round_id, kind, candidate = path.split("/")
        with self._lock:
            self.requests[path] += 1
            done = self._done[round_id, kind]
            if self.requests[path] == 1 and (fault := self._fault(kind, len(done))):
                return fault
            return done.setdefault(candidate, self._receipt(kind, len(done)))

    def _fault(self, kind: str, done: int) -> Answer | None:
        if kind == "interviews":
            return HANG_UP if done % 2 else BUSY
        return None if done else TOO_MANY

    def _receipt(self, kind: str, done: int) -> Answer:
        body = {"slot": SLOTS[done % len(SLOTS)]} if kind == "interviews" else {"sent": True}
        return Answer(status=200, body=body)


class _Handler(BaseHTTPRequestHandler):
    server: FlakyOffice

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.answer(self.path)
        if answer.status is None:
            return
        body = json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing: its requests are seen from the side of the caller."""


@contextmanager
def flaky_office() -> Iterator[FlakyOffice]:
    """An office that is open for as long as it is entered."""
    with FlakyOffice() as office:
        serving = Thread(target=office.serve_forever, args=(0.05,), name="office", daemon=True)
        serving.start()
        try:
            yield office
        finally:
            office.shutdown()
            serving.join()
