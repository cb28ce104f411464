"""A server with OpenAI's chat completions on a free port of this machine: no key, no network.

`url()` starts it. A `#429`, `#500`, `#cut` or `#slow` in a question makes that question fail, in
the same way each time that it is asked; the variable STANDIN_FAULTS ("429 cut") does it to all:

- `429`: refused once, with a `Retry-After`;
- `500`: two internal errors;
- `cut`: the connection breaks in the middle of the text, once;
- `slow`: ten times the pause between two words.
"""

import functools
import json
import os
import re
import socketserver
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import httpx2
from answers import Answer, Message, answer, faults_in, text_of
from pace import PACE

WORD = re.compile(r"\s*\S+|\s+")
PAUSE_S = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes back to the client."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    #: One part, or all the events of a stream.
    parts: tuple[bytes, ...]
    streamed: bool = False
    #: The connection breaks after the last part.
    cut: bool = False
    pause_s: float = 0.0


class Completions:
    """Decides what goes back, without a socket."""

    def __init__(self) -> None:
        #: How often each conversation was answered by a fault; forgotten once it is answered well.
        self._failed: Counter[str] = Counter()
        self._lock = Lock()

    def reply(self, request: dict[str, Any]) -> Reply:
        messages: list[Message] = request["messages"]
        said = answer(messages)
        faults = faults_in(messages) | set(os.environ.get("STANDIN_FAULTS", "").split())
        match self._due(messages, said, faults):
            case "429":
                again = {"Retry-After": f"{PACE:g}"}
                return refusal(429, "rate_limit_exceeded", "Too many requests", again)
            case "500":
                return refusal(500, "server_error", "The server had an error")
            case fault:
                cut = fault == "cut"
        if not request.get("stream"):
            return Reply(parts=(whole(request, said),))
        events = tuple(stream(request, said))
        pause_s = PAUSE_S * PACE * (10 if "slow" in faults else 1)
        parts = events[: len(events) // 2] if cut else events
        return Reply(parts=parts, streamed=True, cut=cut, pause_s=pause_s)

    def _due(self, messages: list[Message], said: Answer, faults: set[str]) -> str | None:
        """The fault that is this conversation's turn; a question is refused before it is heard."""
        due: list[str] = []
        if messages[-1]["role"] == "user":
            due += ["429"] * ("429" in faults) + ["500", "500"] * ("500" in faults)
        if said.text:
            due += ["cut"] * ("cut" in faults)
        key = json.dumps(messages, sort_keys=True)
        with self._lock:
            if self._failed[key] >= len(due):
                del self._failed[key]
                return None
            self._failed[key] += 1
            return due[self._failed[key] - 1]


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Reply:
    error = {"message": message, "type": code, "param": None, "code": code}
    return Reply(status=status, headers=headers or {}, parts=(encoded({"error": error}),))


def whole(request: dict[str, Any], said: Answer) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
    if said.calls:
        message["tool_calls"] = [
            {"id": new_id("call"), "type": "function", "function": function(call)}
            for call in said.calls
        ]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason(said)}
    usage = {"usage": counted(request["messages"], said)}
    return encoded(head(request, "chat.completion") | {"choices": [choice]} | usage)


def stream(request: dict[str, Any], said: Answer) -> Iterator[bytes]:
    """Server-sent events: the role, word by word or call by call, the reason, the usage."""
    every = head(request, "chat.completion.chunk")
    asked_usage = (request.get("stream_options") or {}).get("include_usage")

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse(every | {"choices": [choice]} | ({"usage": None} if asked_usage else {}))

    yield event({"role": "assistant", "content": "" if said.text else None})
    for word in WORD.findall(said.text):
        yield event({"content": word})
    for index, call in enumerate(said.calls):
        named = {"id": new_id("call"), "type": "function"}
        begun: dict[str, str] = {"name": call.name, "arguments": ""}
        yield event({"tool_calls": [{"index": index, **named, "function": begun}]})
        for piece in WORD.findall(json.dumps(call.args)):
            yield event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield event({}, reason(said))
    if asked_usage:
        yield sse(every | {"choices": [], "usage": counted(request["messages"], said)})
    yield b"data: [DONE]\n\n"


def head(request: dict[str, Any], kind: str) -> dict[str, Any]:
    made = {"created": int(time.time()), "model": request["model"]}
    return {"id": new_id("chatcmpl"), "object": kind, **made}


def function(call: Any) -> dict[str, str]:
    return {"name": call.name, "arguments": json.dumps(call.args)}


def reason(said: Answer) -> str:
    return "tool_calls" if said.calls else "stop"


def counted(messages: list[Message], said: Answer) -> dict[str, int]:
    """A word is a token."""
    read = sum(len(text_of(message).split()) for message in messages)
    written = len(said.text.split()) + sum(1 + len(call.args) for call in said.calls)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def sse(value: dict[str, Any]) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.completions = Completions()

    def server_bind(self) -> None:
        """Without asking the network for this machine's name, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave when it likes."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/chat/completions"):
            reply = self.server.completions.reply(json.loads(body))
        else:
            reply = refusal(404, "not_found", f"Unknown address {self.path}")
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.streamed:
            self._stream(reply)
            return
        (part,) = reply.parts
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def _stream(self, reply: Reply) -> None:
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in reply.parts:
            time.sleep(reply.pause_s)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        if reply.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Says nothing: its requests are seen from the side of the caller."""


_starting = Lock()


def url() -> str:
    """The address of the stand-in, which is started the first time, and ends with the process."""
    with _starting:
        return _started().url


@functools.cache
def _started() -> StandIn:
    server = StandIn()
    Thread(target=server.serve_forever, name="stand-in", daemon=True).start()
    return server


def client() -> httpx2.AsyncClient:
    """Not through a proxy: it has no business between two ends of one machine."""
    return httpx2.AsyncClient(trust_env=False)
