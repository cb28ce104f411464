"""A Sereno server as a client sees it: its answers, and a run's lines over any number of cuts."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
import orjson
import typer

from runtime.cli_surroundings import Surroundings
from runtime.cli_view import Line

__all__ = [
    "BACKOFF_S",
    "DEFAULT_URL",
    "FAILED",
    "Follower",
    "NoServer",
    "Refused",
    "Server",
    "Trouble",
    "path_of",
]

DEFAULT_URL = "http://127.0.0.1:8009"
NDJSON = "application/x-ndjson"
#: Seconds before each try to reconnect; a restart with its drain fits in.
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)
#: A connection that lasted this long was a good one: the count of tries begins anew.
STEADY_S = 10.0
#: Silence after which a connection is given up; heartbeats come every 10 s.
SILENCE_S = 60.0
#: Answers of a server or proxy that is about to be back.
TRANSIENT = (429, 502, 503, 504)
#: Most rows of one request for runs.
PAGE = 100
#: Ends after which a thread may still ask what it asked before, and how many of its runs are
#: looked at for that.
FAILED, LOOKED_BACK = ("error", "timeout"), 10


class Trouble(Exception):
    """What stops a command, in one line: something that it was told."""

    exit_code = 2


class Refused(Trouble):
    """The server is there and said no."""

    exit_code = 4

    def __init__(self, said: str, status: int) -> None:
        super().__init__(said)
        self.status = status


class NoServer(Trouble):
    """Nobody answers there, or it is not Sereno who does."""

    exit_code = 5


class Server:
    """A Sereno server by its URL."""

    def __init__(self, url: str, around: Surroundings, option: str = "--url") -> None:
        self.url = url.rstrip("/")
        self.around = around
        try:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("it begins with http:// or https:// and a host")
            self._client = httpx2.Client(
                base_url=self.url,
                transport=around.transport,
                timeout=httpx2.Timeout(10.0, read=SILENCE_S),
                # Lines are taken as they are on the wire.
                headers={"Accept-Encoding": "identity", "User-Agent": "sereno"},
                # A proxy does not know what is on this machine.
                trust_env=parts.hostname not in ("127.0.0.1", "::1", "localhost"),
            )
        except (ValueError, httpx2.InvalidURL) as exc:
            raise Trouble(f"{option}: {url!r} is not a server's address: {exc}") from exc

    @classmethod
    def of(cls, ctx: typer.Context, url: str, option: str = "--url") -> Server:
        """The server that a command speaks to until it ends."""
        server = cls(url, ctx.ensure_object(Surroundings), option)
        ctx.call_on_close(server._client.close)
        return server

    def get(self, path: str, member: str, params: Mapping[str, str] | None = None) -> Any:
        """A JSON object that has this member."""
        _, answer = self.ask("GET", path, params=params)
        if not isinstance(answer, dict) or member not in answer:
            raise NoServer(f"{self.url} did not answer with {member}: is it Sereno?")
        return answer

    def runs(self, asked: Mapping[str, str], most: int) -> tuple[Sequence[Mapping[str, Any]], bool]:
        """The newest runs over as many pages as that takes, and whether there are more."""
        runs: list[Mapping[str, Any]] = []
        more: str | None = None
        while len(runs) < most:
            page = {"limit": str(min(most - len(runs), PAGE))} | ({"cursor": more} if more else {})
            answer = self.get("/v1/runs", "runs", {**asked, **page})
            runs += answer["runs"]
            more = answer.get("next_cursor")
            if more is None or not answer["runs"]:
                break
        return runs, more is not None

    def asked(self, thread: str) -> Sequence[Mapping[str, Any]]:
        """The interrupts that wait on a thread; none where the server cannot say."""
        try:
            state = self.get(f"/v1/threads/{quote(thread, safe='')}/state", "interrupts")
        except Refused:
            return ()
        interrupts: Sequence[Mapping[str, Any]] = state["interrupts"]
        return interrupts

    def asks(self, row: Mapping[str, Any]) -> bool:
        """Whether a run is the latest on its thread, and the thread waits for an answer."""
        if row["status"] not in ("interrupted", *FAILED):
            return False
        before, _ = self.runs({"thread_id": row["thread_id"]}, LOOKED_BACK)
        if before and before[0]["run_id"] != row["run_id"]:
            return False
        if row["status"] == "interrupted":
            return True
        # An answer that does not fit fails its run, and the thread asks as before.
        interrupted = any(run["status"] == "interrupted" for run in before)
        return interrupted and bool(self.asked(row["thread_id"]))

    def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """Status and JSON of an answer. Raises Trouble for everything but success."""
        response = self._request(method, path, **more)
        try:
            return response.status_code, orjson.loads(response.content)
        except orjson.JSONDecodeError as exc:
            raise NoServer(f"{self.url} did not answer with JSON: is it Sereno?") from exc

    def fetch(self, path: str, params: Mapping[str, str]) -> bytes:
        """A whole answer as it is."""
        return self._request("GET", path, params=params).content

    def _request(self, method: str, path: str, **more: Any) -> httpx2.Response:
        try:
            response = self._client.request(method, path, **more)
        except httpx2.TransportError as exc:
            raise self.unreachable(exc) from exc
        if response.is_error:
            raise Refused(self.problem(response), response.status_code)
        return response

    def stream(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> contextlib.AbstractContextManager[httpx2.Response]:
        """An open answer, whatever its status."""
        return self._client.stream(
            method, path, headers={"Accept": NDJSON, **(headers or {})}, **more
        )

    def unreachable(self, exc: Exception) -> NoServer:
        """What it means that a request was not answered."""
        if isinstance(exc, httpx2.ConnectError):
            return NoServer(f"no server at {self.url}; start one with `sereno serve`")
        return NoServer(f"{self.url} did not answer: {_reason(exc)}")

    def command(self, *words: str) -> str:
        """A command line for this server, to be copied."""
        at = ["--url", self.url] if self.url != DEFAULT_URL else []
        return f"`{shlex.join(['sereno', *words, *at])}`"

    def problem(self, response: httpx2.Response) -> str:
        """A problem document as one line, with what can be done about it."""
        try:
            said = orjson.loads(response.content)
            code, detail = said["code"], said.get("detail") or said.get("title") or ""
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return f"HTTP {response.status_code} {response.reason_phrase} from {response.url}"
        text = f"{code}: {detail}"
        if code == "cursor_ahead" and "last_seq" in said:
            text += f"; --after {said['last_seq']} is the most"
        elif code == "log_expired":
            terminal = said.get("terminal")
            status = (terminal.get("data") or terminal).get("status") if terminal else None
            text += f"; its lines are gone{f', it ended with status {status}' if status else ''}"
        elif code in ("run_not_found", "thread_not_found"):
            text += f"; {self.command('ps')} lists runs"
        elif code == "thread_busy" and said.get("active_run"):
            text += f"; {self.command('tail', said['active_run'])} shows it"
        elif wait := response.headers.get("Retry-After"):
            text += f"; try again in {wait} s"
        return " ".join(text.split())


def path_of(run: str) -> str:
    return f"/v1/runs/{quote(run, safe='')}"


class Follower:
    """A run's lines to its end, each exactly once, over as many connections as that takes."""

    def __init__(
        self,
        server: Server,
        first: Callable[[], contextlib.AbstractContextManager[httpx2.Response]],
        run_id: str | None,
        cursor: int | None,
    ) -> None:
        self.server = server
        self.run_id = run_id
        #: seq of the last line that was seen; None before any is known.
        self.cursor = cursor
        #: How the run ended, when it had no more lines to give.
        self.status: str | None = None
        self._first = first
        self._log_id: str | None = None
        self._answered = False

    @classmethod
    def of_new_run(cls, server: Server, path: str, body: Any) -> Follower:
        """Starts a run."""
        return cls(server, lambda: server.stream("POST", path, json=body), None, cursor=0)

    @classmethod
    def of_run(cls, server: Server, run: str, after: str) -> Follower:
        """Reads a run that there is already."""
        return cls(
            server,
            lambda: server.stream("GET", f"{path_of(run)}/stream", params={"after": after}),
            run,
            cursor=int(after) if after != "latest" else None,
        )

    def lines(self, note: Callable[[str], None]) -> Iterator[Line]:
        """All lines up to the terminal one. Raises Trouble when the server stays away."""
        tries = 0
        opened: float | None = None
        while True:
            try:
                with self._open() as response:
                    if response.status_code == httpx2.codes.NO_CONTENT:
                        self.status = response.headers.get("X-Run-Status", "success")
                        return
                    opened = self.server.around.clock()
                    for line in self._read(response):
                        if "seq" in line.data:
                            tries = 0
                        yield line
                        if (line.data.get("data") or {}).get("final"):
                            return
                cut = "the connection ended"
            except (httpx2.TransportError, _Away) as exc:
                if not self._answered:
                    raise self._never_answered(exc) from exc
                cut = _how_cut(exc)
            if opened is not None and self.server.around.clock() - opened >= STEADY_S:
                tries = 0
            opened = None
            if self.run_id is None:
                raise NoServer(f"{cut} before the run had an id; look for it: `sereno ps`")
            if tries == len(BACKOFF_S):
                raise NoServer(f"{cut}, and {self.server.url} did not come back; {self._later()}")
            pause = BACKOFF_S[tries]
            tries += 1
            note(
                f"{cut} after line {self.cursor or 0}; reconnecting in {pause:g} s "
                f"({tries}/{len(BACKOFF_S)})"
            )
            self.server.around.sleep(pause)

    def stopped(self) -> str:
        """What to say to who stops watching."""
        if self.run_id is None:
            return "stopped before the server answered; the run may have started: see `sereno ps`"
        return (
            f"stopped watching; {self._later()}; "
            f"end it: {self.server.command('cancel', self.run_id)}"
        )

    def _later(self) -> str:
        assert self.run_id is not None
        command = self.server.command("tail", self.run_id, "--after", str(self.cursor or 0))
        return f"run {self.run_id} goes on without you; watch it: {command}"

    @contextlib.contextmanager
    def _open(self) -> Iterator[httpx2.Response]:
        """The first connection, or one more from the cursor on."""
        if not self._answered:
            opening = self._first()
        else:
            assert self.run_id is not None
            headers = {"X-Log-Id": self._log_id} if self._log_id else {}
            after = {"after": str(self.cursor) if self.cursor is not None else "latest"}
            opening = self.server.stream(
                "GET", f"{path_of(self.run_id)}/stream", params=after, headers=headers
            )
        with opening as response:
            if self._answered and response.status_code in TRANSIENT:
                raise _Away(f"HTTP {response.status_code}")
            if response.is_error:
                response.read()
                raise Refused(self.server.problem(response), response.status_code)
            if response.status_code != httpx2.codes.NO_CONTENT and not response.headers.get(
                "Content-Type", ""
            ).startswith(NDJSON):
                raise NoServer(f"{self.server.url} did not answer with a stream: is it Sereno?")
            self._answered = True
            self.run_id = response.headers.get("X-Run-Id", self.run_id)
            self._log_id = response.headers.get("X-Log-Id", self._log_id)
            yield response

    def _read(self, response: httpx2.Response) -> Iterator[Line]:
        """The whole lines of one connection that were not seen before."""
        rest = b""
        for chunk in response.iter_raw():
            # A half line at the end of a connection comes again, whole, on the next one.
            *whole, rest = (rest + chunk).split(b"\n")
            for raw in whole:
                try:
                    data = orjson.loads(raw)
                    self.run_id = data["run_id"]
                except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
                    raise _Away("a line was damaged") from exc
                seq = data.get("seq")
                if seq is None:
                    self.cursor = data.get("after", 0) if self.cursor is None else self.cursor
                elif self.cursor is None or seq == self.cursor + 1:
                    self.cursor = seq
                elif seq <= self.cursor:
                    continue
                else:
                    raise _Away(f"line {seq} came next")
                yield Line(raw, data)

    def _never_answered(self, exc: Exception) -> NoServer:
        if self.run_id is None and not isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout):
            return NoServer(
                f"{self.server.url} did not answer ({_reason(exc)}); "
                f"the run may have started: {self.server.command('ps')}"
            )
        return self.server.unreachable(exc)


class _Away(Exception):
    """The server is there but cannot go on with the stream now; it may soon."""


def _how_cut(exc: Exception) -> str:
    """What a reader is told of it; how a library puts it would not help."""
    if isinstance(exc, _Away):
        return f"the connection was cut ({exc})"
    if isinstance(exc, httpx2.TimeoutException):
        return "nothing was heard for too long"
    refused = isinstance(exc, httpx2.ConnectError)
    return f"the connection was {'refused' if refused else 'cut'}"


def _reason(exc: Exception) -> str:
    return str(exc) or type(exc).__name__
