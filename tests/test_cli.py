"""What each command asks of a server, what it prints, and how it ends."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console
from typer.testing import CliRunner

from runtime.cli import Source, app
from runtime.cli_client import BACKOFF_S
from runtime.cli_client import Server as Client
from runtime.cli_question import fitting
from runtime.cli_screen import compact
from runtime.cli_surroundings import Surroundings
from runtime.cli_top import Run, Snapshot, Top, rows_of
from runtime.cli_view import Line, RunView
from runtime.errors import GraphLoadFailed, UnknownGraph

RUN, THREAD = "01RUN", "t-1"
NOW = 1_800_000_000.0
TS = "2027-01-15T08:00:00.000Z"
URL = "http://127.0.0.1:8009"

Answer = httpx2.Response | Exception


# A server that says what it is told to.


class Body(httpx2.SyncByteStream):
    """Chunks, then an end, a cut, or a Ctrl-C."""

    def __init__(self, chunks: Iterable[bytes], end: BaseException | None = None) -> None:
        self._chunks = chunks
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        if self._end is not None:
            raise self._end


class Server:
    """Answers requests in order; the last answer is for all that follow."""

    def __init__(self, *answers: Answer | Callable[[httpx2.Request], Answer]) -> None:
        self._answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.slept: list[float] = []
        self.clock = itertools.repeat(NOW).__next__

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if not isinstance(answer, httpx2.Response | Exception):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def paths(self) -> list[str]:
        return [str(request.url).removeprefix(URL) for request in self.requests]

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)

    def around(self, console: Console | None = None) -> Surroundings:
        return Surroundings(
            transport=httpx2.MockTransport(self),
            sleep=self.slept.append,
            clock=self.clock,
            console=console,
        )


class Result:
    def __init__(self, code: int, stdout: bytes, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr


def sereno(
    server: Server, *args: str, input: bytes | None = None, console: Console | None = None
) -> Result:
    result = CliRunner(env={"SERENO_URL": None}).invoke(
        app, args, input=input, obj=server.around(console)
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout_bytes, result.stderr)


def terminal(width: int = 80) -> tuple[Console, Callable[[], str]]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=width, height=30)
    return console, lambda: out.getvalue()


def line(seq: int, type: str, data: dict[str, Any] | None = None, **where: Any) -> bytes:
    said = {"v": 1, "seq": seq, "ts": TS, "type": type, "run_id": RUN, "thread_id": THREAD}
    return json.dumps(said | {"epoch": 1} | where | {"data": data or {}}).encode()


def node(seq: int, type: str, data: dict[str, Any] | None = None, **where: Any) -> bytes:
    base = {"node": "score", "ns": [], "path": [], "task": "k1", "attempt": 1, "step": 1}
    return line(seq, type, data, **(base | where))


def bookmark(type: str, after: int) -> bytes:
    said = {"v": 1, "ts": TS, "type": type, "run_id": RUN, "thread_id": THREAD, "epoch": 1}
    return json.dumps(said | {"after": after, "data": {}}).encode()


def end(seq: int, type: str = "run.completed", status: str = "success", **data: Any) -> bytes:
    numbers = {"duration_ms": 1900.0, "nodes": 1, "attempts": 2, "retries": 1}
    return line(seq, type, {"final": True, "status": status} | numbers | data)


def told(lines: Sequence[bytes]) -> bytes:
    return b"".join(one + b"\n" for one in lines)


def stream(
    lines: Sequence[bytes], cut: BaseException | None = None, half: bytes = b"", **headers: str
) -> httpx2.Response:
    return httpx2.Response(
        200,
        headers={
            "Content-Type": "application/x-ndjson; charset=utf-8",
            "X-Run-Id": RUN,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
        stream=Body([told(lines) + half], cut),
    )


def problem(status: int, code: str, detail: str, **more: Any) -> httpx2.Response:
    body = {"status": status, "code": code, "detail": detail} | more
    return httpx2.Response(
        status, json=body, headers={"Content-Type": "application/problem+json", "Retry-After": "5"}
    )


LINES = [
    line(1, "run.queued", epoch=0),
    line(2, "run.started"),
    node(3, "node.started"),
    node(
        4,
        "node.retrying",
        {"error_class": "transport", "retry_in_ms": 1500, "max_attempts": 3, "discard_from": 3},
    ),
    node(5, "node.started", attempt=2),
    node(6, "custom", {"value": {"text": "ñ \u2028 \x1b[2J"}}, attempt=2),
    node(7, "node.completed", {"update": {}, "attempts": 2, "duration_ms": 812.4}, attempt=2),
    end(8, output={"score": 7}),
]


# run


def test_a_pipe_gets_the_bytes_of_the_server() -> None:
    server = Server(stream(LINES))

    result = sereno(server, "run", "agent", "--input", '{"x": 1}', "--thread", "t-1")

    assert result.code == 0
    assert result.stdout == told(LINES)
    assert result.stderr == ""
    assert server.body == {"graph": "agent", "input": {"x": 1}, "thread_id": "t-1"}
    assert server.requests[0].headers["Accept"] == "application/x-ndjson"
    assert server.requests[0].headers["Accept-Encoding"] == "identity"


def test_lines_may_be_split_anywhere() -> None:
    text = told(LINES)
    chunks = [text[i : i + 7] for i in range(0, len(text), 7)]
    answer = stream([])
    answer.stream = Body(chunks)

    result = sereno(Server(answer), "run", "agent", "--input", "{}")

    assert result.stdout == text


@pytest.mark.parametrize("k", range(len(LINES)))
@pytest.mark.parametrize(
    ("cut", "half"),
    [
        pytest.param(httpx2.ReadError("reset"), b"", id="cut"),
        pytest.param(httpx2.RemoteProtocolError("incomplete"), b'{"v":1,"se', id="half-line"),
        pytest.param(None, b"", id="eof"),
    ],
)
def test_a_cut_stream_is_resumed_by_its_cursor(k: int, cut: Exception | None, half: bytes) -> None:
    server = Server(stream(LINES[:k], cut, half, X_Log_Id="log-1"), stream(LINES[k:]))

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.code == 0
    assert result.stdout == told(LINES)
    assert server.paths == ["/v1/runs", f"/v1/runs/{RUN}/stream?after={k}"]
    assert server.requests[1].headers["X-Log-Id"] == "log-1"
    assert f"after line {k}; reconnecting in 0.2 s (1/{len(BACKOFF_S)})" in result.stderr


def test_lines_that_come_twice_are_shown_once() -> None:
    server = Server(stream(LINES[:5], httpx2.ReadError("")), stream(LINES[2:]))

    assert sereno(server, "run", "agent", "--input", "{}").stdout == told(LINES)


def test_lines_that_are_missing_are_asked_for() -> None:
    server = Server(stream([*LINES[:3], *LINES[5:]]), stream(LINES[3:]))

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.stdout == told(LINES)
    assert server.paths[1].endswith("?after=3")
    assert "line 6 came next" in result.stderr


def test_a_server_that_restarts_is_waited_for() -> None:
    server = Server(
        stream(LINES[:4], httpx2.ReadError("")),
        httpx2.ConnectError("refused"),
        problem(503, "draining", "the server is shutting down"),
        stream(LINES[4:]),
    )

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.stdout == told(LINES)
    assert server.slept == [0.2, 0.5, 1.0]


def test_a_server_that_stays_away_is_given_up() -> None:
    server = Server(stream(LINES[:4], httpx2.ReadError("")), httpx2.ConnectError("refused"))

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.code == 5
    assert server.slept == list(BACKOFF_S)
    assert f"watch it: `sereno tail {RUN} --after 4`" in result.stderr


def test_bookmarks_alone_do_not_keep_a_dying_server_watched() -> None:
    """A server that drains greets every reader and closes."""
    server = Server(stream(LINES[:4]), lambda _: stream([bookmark("caught_up", 4)]))

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.code == 5
    assert server.slept == list(BACKOFF_S)


def test_a_connection_that_lasted_begins_the_count_of_tries_anew() -> None:
    """Nodes may be silent for hours while the server closes streams every few minutes."""
    beats = [stream([bookmark("heartbeat", 4)]) for _ in range(30)]
    server = Server(stream(LINES[:4]), *beats, stream(LINES[4:]))
    server.clock = itertools.count(NOW, 60).__next__

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.code == 0
    assert set(server.slept) == {0.2}


@pytest.mark.parametrize(
    ("type", "status", "code"),
    [
        ("run.completed", "success", 0),
        ("run.failed", "error", 1),
        ("run.timed_out", "timeout", 1),
        ("run.interrupted", "interrupted", 3),
        ("run.cancelled", "cancelled", 130),
    ],
)
@pytest.mark.parametrize("command", [("run", "agent", "--input", "{}"), ("tail", RUN)])
def test_the_exit_code_tells_how_the_run_ended(
    command: tuple[str, ...], type: str, status: str, code: int
) -> None:
    server = Server(stream([LINES[0], end(2, type, status)]))

    assert sereno(server, *command).code == code


@pytest.mark.parametrize(
    ("interrupts", "how"),
    [
        pytest.param(
            [{"id": "i1", "value": "ok?"}],
            f"the run waits for an answer; give it: `sereno answer {RUN} '…'`",
            id="one",
        ),
        pytest.param(
            [{"id": "i1", "value": 1}, {"id": "i2", "value": 2}],
            """2 answers; give them: `sereno answer t-1 '{"i1": "…", "i2": "…"}'`""",
            id="two",
        ),
        pytest.param(
            [{"id": "i1", "value": {"answers": ["sí", 'say "no"', '{"approve": true}', "5"]}}],
            f"""give it: `sereno answer {RUN} '{{"approve": true}}'`""",
            id="first-answer-in-json",
        ),
        pytest.param(
            [{"id": "i1", "value": {"answers": [[1]]}}, {"id": "i2", "value": {"answers": "x"}}],
            """give them: `sereno answer t-1 '{"i1": [1], "i2": "…"}'`""",
            id="two-of-which-one-names-answers",
        ),
        pytest.param([], "`sereno run agent --thread t-1 --input null`", id="breakpoint"),
    ],
)
def test_an_interrupted_run_says_how_to_answer(interrupts: list[Any], how: str) -> None:
    first = line(1, "run.queued", {"graph": "agent"}, thread_id=THREAD)
    last = end(2, "run.interrupted", "interrupted", interrupts=interrupts, next=["ask"])

    result = sereno(Server(stream([first, last])), "tail", RUN)

    assert result.code == 3
    assert how in result.stderr


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        pytest.param(["yes, do"], "yes, do", id="text"),
        pytest.param(["true"], True, id="json"),
        pytest.param(['{"i1": "a", "i2": 2}'], {"i1": "a", "i2": 2}, id="several"),
        pytest.param(["--text", "5"], "5", id="text-that-looks-like-json"),
        pytest.param(["NaN"], "NaN", id="no-number-of-json"),
    ],
)
@pytest.mark.parametrize(
    ("asked", "known"),
    [
        pytest.param(
            RUN, httpx2.Response(200, json={"thread_id": THREAD}), id="by-a-run-that-asks-nothing"
        ),
        pytest.param(THREAD, httpx2.Response(404, json={}), id="by-thread"),
    ],
)
def test_an_answer_goes_to_the_thread_and_its_run_is_watched(
    given: list[str], sent: Any, asked: str, known: httpx2.Response
) -> None:
    server = Server(known, stream(LINES))

    result = sereno(server, "answer", asked, *given)

    assert result.code == 0
    assert result.stdout == told(LINES)
    assert server.paths == [f"/v1/runs/{asked}", f"/v1/threads/{THREAD}/resume"]
    assert server.body == {"resume": sent}


@pytest.mark.parametrize(
    ("given", "sent"),
    [("yes", {"i1": "yes"}), ('{"ok": true}', {"i1": {"ok": True}}), ('{"i1": 1}', {"i1": 1})],
)
def test_an_answer_to_a_run_meets_no_later_question_of_its_thread(given: str, sent: Any) -> None:
    asks = {"thread_id": THREAD, "result": {"interrupts": [{"id": "i1", "value": "ok?"}]}}
    server = Server(httpx2.Response(200, json=asks), stream(LINES))

    assert sereno(server, "answer", RUN, given).code == 0
    assert server.body == {"resume": sent}


def test_questions_too_large_for_their_line_are_asked_for() -> None:
    last = end(1, "run.interrupted", "interrupted", interrupts={"$ref": "/v1/x", "bytes": 9})
    state = httpx2.Response(200, json={"interrupts": [{"id": "i1", "value": {"answers": [7]}}]})
    server = Server(stream([last]), state)

    assert f"give it: `sereno answer {RUN} 7`" in sereno(server, "tail", RUN).stderr
    assert server.paths[1:] == [f"/v1/threads/{THREAD}/state"]


@pytest.mark.parametrize(
    ("status", "trigger", "state", "asked"),
    [
        pytest.param("error", "resume", {"interrupts": [{"id": "i1"}]}, True, id="misfit"),
        pytest.param("error", "resume", {"interrupts": []}, False, id="another-error"),
        pytest.param("error", "resume", None, False, id="nobody-can-say"),
        pytest.param("error", "api", {"interrupts": [{"id": "i1"}]}, False, id="no-answer"),
        pytest.param("success", "resume", {"interrupts": [{"id": "i2"}]}, False, id="success"),
    ],
)
def test_after_an_answer_that_does_not_fit_the_thread_still_asks(
    status: str, trigger: str, state: dict[str, Any] | None, asked: bool
) -> None:
    first = line(1, "run.queued", {"graph": "agent", "trigger": trigger})
    told = httpx2.Response(200, json=state) if state else problem(404, "graph_not_found", "gone")
    server = Server(
        httpx2.Response(200, json={"thread_id": THREAD}),
        stream([first, end(2, "run.failed", status)]),
        told,
    )

    result = sereno(server, "answer", RUN, '{"approve": "maybe"}')

    said = "sereno: the thread still asks; answer again: `sereno answer t-1 '…'`\n"
    assert result.stderr == (said if asked else "")
    assert result.code == (0 if status == "success" else 1)


def test_a_server_in_trouble_is_not_asked_for_a_thread_of_a_runs_name() -> None:
    server = Server(httpx2.Response(503, json={"code": "storage_failed", "detail": "full"}))

    assert sereno(server, "answer", RUN, "yes").code == 4
    assert server.paths == [f"/v1/runs/{RUN}"]


def test_an_answer_that_is_half_json_is_not_taken_for_text() -> None:
    server = Server(stream(LINES))

    result = sereno(server, "answer", THREAD, '{"approved": tru')

    assert result.code == 2
    assert "VALUE: not JSON at line 1 column" in result.stderr
    assert server.requests == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (("1e999",), "VALUE: not JSON: 1e999 is too large for a number"),
        (("--", "-1e999"), "VALUE: not JSON: -1e999 is too large for a number"),
        (("\udcff",), "VALUE: has characters that are not UTF-8"),
        (("--text", "\udcff"), "VALUE: has characters that are not UTF-8"),
        (('"\\ud800"',), "VALUE: has characters that are not UTF-8"),
    ],
)
def test_an_answer_that_cannot_be_sent_is_refused(value: tuple[str, ...], says: str) -> None:
    server = Server(stream(LINES))

    result = sereno(server, "answer", THREAD, *value)

    assert result.code == 2
    assert result.stderr == f"sereno: {says}\n"
    assert server.requests == []


def test_ctrl_c_stops_the_watching_and_says_how_to_go_on() -> None:
    server = Server(stream(LINES[:3], KeyboardInterrupt()))

    result = sereno(server, "run", "agent", "--input", "{}", "--url", "http://host:1/")

    assert result.code == 130
    assert result.stdout == told(LINES[:3])
    assert f"run {RUN} goes on" in result.stderr
    assert f"sereno tail {RUN} --after 3 --url http://host:1`" in result.stderr
    assert f"sereno cancel {RUN} --url http://host:1`" in result.stderr


def test_ctrl_c_on_a_terminal_leaves_what_was_seen() -> None:
    console, shown = terminal()
    server = Server(stream([*LINES[:3], tokens(4, "half a")], KeyboardInterrupt()))

    result = sereno(server, "tail", RUN, console=console)

    assert result.code == 130
    assert "… score  not over\n  │ half a\n" in shown()
    assert f"run {RUN} goes on" in result.stderr


def test_ctrl_c_before_the_answer_cannot_name_the_run() -> None:
    def interrupt(request: httpx2.Request) -> httpx2.Response:
        raise KeyboardInterrupt

    result = sereno(Server(interrupt), "run", "agent", "--input", "{}")

    assert result.code == 130
    assert "may have started: see `sereno ps`" in result.stderr


def test_a_run_is_not_started_twice_when_the_answer_is_lost() -> None:
    server = Server(httpx2.ReadError("reset"))

    result = sereno(server, "run", "agent", "--input", "{}")

    assert result.code == 5
    assert len(server.requests) == 1
    assert "the run may have started: `sereno ps`" in result.stderr


def test_options_go_into_the_request() -> None:
    server = Server(stream(LINES))

    sereno(server, "run", "a", "--input", "null", "--deadline", "2.5", "--stream", "values,custom")

    assert server.body == {
        "graph": "a",
        "input": None,
        "deadline_s": 2.5,
        "stream": ["values", "custom"],
    }


@pytest.mark.parametrize(
    ("default", "sent"),
    [pytest.param({"q": "hi"}, {"q": "hi"}, id="default"), pytest.param(None, {}, id="none")],
)
def test_without_input_a_run_starts_from_the_default_of_its_graph(default: Any, sent: Any) -> None:
    known = {"graphs": [{"name": "agent", "nodes": [], "default_input": default}]}
    server = Server(httpx2.Response(200, json=known), stream(LINES))

    assert sereno(server, "run", "agent").code == 0
    assert server.paths == ["/v1/graphs", "/v1/runs"]
    assert server.body["input"] == sent


def test_input_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_bytes(b'\xef\xbb\xbf{"x": "\xc3\xb1"}')
    server = Server(stream(LINES))

    sereno(server, "run", "agent", "--input", f"@{file}")

    assert server.body["input"] == {"x": "ñ"}


def test_input_comes_from_stdin() -> None:
    server = Server(stream(LINES))

    sereno(server, "run", "agent", "--input", "-", input=b'{"x": 12345678901234567890123}')

    assert server.body["input"] == {"x": 12345678901234567890123}


@pytest.mark.parametrize(
    ("given", "stdin", "says"),
    [
        pytest.param('{"x": }', b"", "--input: not JSON at line 1 column 7: Exp", id="json"),
        pytest.param("-", b'{\n"a" 1}', "--input - (stdin): not JSON at line 2 column 5", id="in"),
        pytest.param("-", b"\xff", "--input - (stdin): not JSON: 'utf-8' codec", id="not-utf-8"),
        pytest.param("@no.json", b"", "--input @no.json: No such file or directory", id="no-file"),
        pytest.param("[NaN]", b"", "--input: not JSON: NaN is not a number", id="nan"),
        pytest.param('{"v": 1e999}', b"", "--input: not JSON: 1e999 is too large", id="infinite"),
        pytest.param('"\udcff"', b"", "--input: has characters that are not UTF-8", id="bytes"),
        pytest.param('{"\\ud800": 1}', b"", "--input: has characters that", id="surrogate"),
        pytest.param("[" * 100_000, b"", "--input: not JSON", id="deep"),
    ],
)
def test_bad_input_is_named_with_its_place(given: str, stdin: bytes, says: str) -> None:
    server = Server(stream(LINES))

    result = sereno(server, "run", "agent", "--input", given, input=stdin)

    assert result.code == 2
    assert result.stderr.startswith(f"sereno: {says}")
    assert server.requests == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("run", "a", "--stream", "updates,nope"), "--stream: 'nope' is not one of updates"),
        (("run", "a", "--local", "--deadline", "1"), "--deadline: needs a server"),
        (("run", "a", "--config", "x.json"), "--config: is for --local"),
        (("run", "a", "--deadline", "1e999"), "--deadline: inf is not a number of seconds"),
        (("run", "a", "--deadline", "nan"), "--deadline: nan is not a number of seconds"),
        (("tail", RUN, "--after", "x"), "--after: 'x' is neither"),
        (("ps", "--url", "localhost:8009"), "--url: 'localhost:8009' is not a server's address"),
        (("ps", "--url", "http://[::1"), "--url: 'http://[::1' is not a server's address"),
    ],
)
def test_options_that_cannot_be_used_are_named(args: tuple[str, ...], says: str) -> None:
    server = Server(stream(LINES))

    result = sereno(server, *args)

    assert result.code == 2
    assert result.stderr.startswith(f"sereno: {says}")
    assert server.requests == []


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("run", "\udcff"), "GRAPH"),
        (("run", "a", "--thread", "\udcff"), "--thread"),
        (("answer", "\udcff", "1"), "RUN|THREAD"),
        (("tail", "\udcff"), "RUN"),
        (("trace", "\udcff"), "RUN"),
        (("cancel", "\udcff"), "RUN"),
        (("cancel", RUN, "--reason", "\udcff"), "--reason"),
        (("ps", "--graph", "\udcff"), "--graph"),
        (("ps", "--status", "\udcff"), "--status"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_named(args: tuple[str, ...], name: str) -> None:
    server = Server(stream(LINES))

    result = sereno(server, *args)

    assert result.code == 2
    assert f"Invalid value for '{name}': '\\udcff' is not UTF-8" in result.stderr
    assert server.requests == []


def test_what_begins_with_a_dash_comes_after_two() -> None:
    server = Server(stream(LINES))

    assert sereno(server, "run", "--input", "{}", "--", "-agent").code == 0
    assert server.body["graph"] == "-agent"


# tail


def test_tail_reads_from_a_cursor_on() -> None:
    server = Server(stream(LINES[5:]))

    result = sereno(server, "tail", RUN, "--after", "5")

    assert result.code == 0
    assert result.stdout == told(LINES[5:])
    assert server.paths == [f"/v1/runs/{RUN}/stream?after=5"]


def test_tail_from_the_latest_line_learns_its_cursor() -> None:
    first = [bookmark("caught_up", 5)]
    server = Server(stream(first, httpx2.ReadError("")), stream(LINES[5:]))

    result = sereno(server, "tail", RUN, "--after", "latest")

    assert result.stdout == told([*first, *LINES[5:]])
    assert [path.partition("?")[2] for path in server.paths] == ["after=latest", "after=5"]


@pytest.mark.parametrize(("status", "code"), [("success", 0), ("error", 1), ("interrupted", 3)])
def test_tail_at_the_end_says_so_and_exits_as_the_run_did(status: str, code: int) -> None:
    server = Server(httpx2.Response(204, headers={"X-Run-Status": status, "X-Run-Id": RUN}))

    result = sereno(server, "tail", RUN, "--after", "8")

    assert result.code == code
    assert result.stdout == b""
    assert f"run {RUN} ended with status {status}; no line comes after" in result.stderr


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        pytest.param(
            problem(404, "run_not_found", "run 'x' not found"),
            "run_not_found: run 'x' not found; `sereno ps` lists runs",
            id="404",
        ),
        pytest.param(
            problem(400, "cursor_ahead", "after=9 is ahead of the log", last_seq=8),
            "cursor_ahead: after=9 is ahead of the log; --after 8 is the most\n",
            id="cursor-ahead",
        ),
        pytest.param(
            problem(410, "log_expired", "expired", terminal={"data": {"status": "error"}}),
            "log_expired: expired; its lines are gone, it ended with status error\n",
            id="410",
        ),
        pytest.param(
            problem(409, "thread_busy", "busy", active_run="01B"),
            "thread_busy: busy; `sereno tail 01B` shows it\n",
            id="409",
        ),
        pytest.param(
            problem(503, "queue_full", "10 runs\nare waiting\x1b[0m"),
            "queue_full: 10 runs are waiting[0m; try again in 5 s\n",
            id="503",
        ),
        pytest.param(
            httpx2.Response(502, html="<h1>Bad</h1>"),
            f"HTTP 502 Bad Gateway from {URL}/v1/runs/{RUN}/stream?after=0\n",
            id="proxy",
        ),
        pytest.param(
            httpx2.Response(200, html="<h1>Hi</h1>"),
            f"{URL} did not answer with a stream: is it Sereno?\n",
            id="something-else",
        ),
    ],
)
def test_a_refusal_is_one_line(answer: httpx2.Response, says: str) -> None:
    result = sereno(Server(answer), "tail", RUN)

    assert result.code == (5 if "is it Sereno?" in says else 4)
    assert result.stdout == b""
    assert result.stderr.startswith(f"sereno: {says}")
    assert result.stderr.count("\n") == 1


def test_a_refusal_after_a_cut_ends_the_watching() -> None:
    gone = problem(404, "run_not_found", "run '01RUN' not found")

    result = sereno(Server(stream(LINES[:2]), gone), "tail", RUN)

    assert result.code == 4
    assert result.stdout == told(LINES[:2])
    assert "run_not_found" in result.stderr


@pytest.mark.parametrize(
    "args",
    [("run", "a"), ("run", "a", "--input", "{}"), ("tail", RUN), ("ps",), ("graphs",)],
)
def test_without_a_server_it_says_how_to_start_one(args: tuple[str, ...]) -> None:
    result = sereno(Server(httpx2.ConnectError("[Errno 111] Connection refused")), *args)

    assert result.code == 5
    assert result.stderr == f"sereno: no server at {URL}; start one with `sereno serve`\n"


def test_the_url_comes_from_the_environment() -> None:
    server = Server(httpx2.Response(200, json={"graphs": []}))

    CliRunner(env={"SERENO_URL": "https://sereno.example/base/"}).invoke(
        app, ["graphs"], obj=server.around()
    )

    assert server.paths == ["https://sereno.example/base/v1/graphs"]


# ps, cancel, graphs


def run_row(number: int, **more: Any) -> dict[str, Any]:
    return {
        "run_id": f"01RUN{number}",
        "thread_id": THREAD,
        "graph": "agent",
        "status": "running",
        "epoch": 1,
        "created_at": "2027-01-15T07:58:00.000Z",
        "started_at": "2027-01-15T07:58:30.000Z",
        "ended_at": None,
        "last_seq": 7,
    } | more


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def test_ps_lists_runs_over_pages_as_ndjson() -> None:
    rows = [run_row(i) for i in range(130)]
    server = Server(
        httpx2.Response(200, json={"runs": rows[:100], "next_cursor": "c 1"}),
        httpx2.Response(200, json={"runs": rows[100:], "next_cursor": None}),
    )

    result = sereno(server, "ps", "--limit", "150", "--status", "running", "--graph", "agent")

    assert [json.loads(one) for one in result.stdout.splitlines()] == rows
    assert server.paths == [
        "/v1/runs?status=running&graph=agent&limit=100",
        "/v1/runs?status=running&graph=agent&limit=50&cursor=c+1",
    ]


@pytest.mark.parametrize(
    ("width", "head", "rows"),
    [
        pytest.param(
            120,
            "run graph thread status age took lines",
            [
                "01RUN1 agent t-1 ▶ running 2 m 00 s 1 m 30 s 7",
                "01RUN2 agent t-1 ✓ success 2 m 00 s 1.9 s 7",
            ],
            id="wide",
        ),
        pytest.param(
            60,
            "run graph status age took",
            [
                "01RUN1 agent ▶ running 2 m 00 s 1 m 30 s",
                "01RUN2 agent ✓ success 2 m 00 s 1.9 s",
            ],
            id="narrow",
        ),
    ],
)
def test_ps_draws_a_table_on_a_terminal(width: int, head: str, rows: list[str]) -> None:
    ended = run_row(2, status="success", ended_at="2027-01-15T07:58:31.900Z")
    answer = {"runs": [run_row(1), ended], "next_cursor": "c"}
    console, shown = terminal(width)

    sereno(Server(httpx2.Response(200, json=answer)), "ps", "--limit", "2", console=console)

    lines = [" ".join(text.split()) for text in shown().splitlines()]
    assert lines == [head, *rows, "there are more; --limit shows them"]


def test_ps_never_cuts_an_id() -> None:
    row = run_row(1, run_id="01M878Q3AYM3MNYJDQ52M1S410", graph="a_graph_with_a_long_name")
    console, shown = terminal(60)

    sereno(Server(httpx2.Response(200, json={"runs": [row]})), "ps", console=console)

    assert "01M878Q3AYM3MNYJDQ52M1S410" in shown()


@pytest.mark.parametrize(
    ("width", "row"),
    [
        pytest.param(
            70, "01M878Q3AYM3MNYJDQ52M1S410 screening ? needs an answer 2 m 00 s", id="70"
        ),
        pytest.param(60, "01M878Q3AYM3MNYJDQ52M1S410 screening ? needs an answer", id="60"),
        pytest.param(40, "01M878Q3AYM3MNYJDQ52M1S410 screening ?", id="40"),
    ],
)
def test_ps_leaves_out_columns_before_it_breaks_the_name_of_a_graph(width: int, row: str) -> None:
    run = run_row(1, run_id="01M878Q3AYM3MNYJDQ52M1S410", graph="screening", status="interrupted")
    console, shown = terminal(width)

    sereno(Server(httpx2.Response(200, json={"runs": [run]})), "ps", console=console)

    assert [" ".join(text.split()) for text in shown().splitlines()[1:]] == [row]


def test_ps_marks_the_runs_whose_threads_wait_for_an_answer() -> None:
    """The latest that was interrupted, or failed on an answer that did not fit."""
    rows = [
        run_row(9, thread_id="misfit", status="error"),
        run_row(8, thread_id="broken", status="error"),
        run_row(7, thread_id="answered", status="success"),
        run_row(6, thread_id="answered", status="interrupted"),
        run_row(5, thread_id="asks", status="interrupted"),
        run_row(4, thread_id="misfit", status="interrupted"),
    ]

    def asked(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/state"):
            return httpx2.Response(200, json={"interrupts": [{"id": "i1", "value": "?"}]})
        thread, status = request.url.params.get("thread_id"), request.url.params.get("status")
        found = [
            row
            for row in rows
            if thread in (None, row["thread_id"]) and status in (None, row["status"])
        ]
        return httpx2.Response(200, json={"runs": found})

    for status, paths in (
        (None, ["misfit&limit=10", "/state", "broken&limit=10"]),
        ("interrupted", ["answered&limit=10", "asks&limit=10", "misfit&limit=10"]),
    ):
        server, (console, shown) = Server(asked), terminal(100)
        sereno(server, "ps", *(["--status", status] if status else []), console=console)

        told = {row.split()[0]: " ".join(row.split()[3:7]) for row in shown().splitlines()[1:]}
        assert told["01RUN5"] == "? needs an answer"
        assert told["01RUN6"].startswith("? interrupted")
        assert told["01RUN4"].startswith("? interrupted")
        if status is None:
            assert told["01RUN9"] == "✗ error, needs an"
            assert told["01RUN8"].startswith("✗ error 2")
        assert [
            path.rpartition("thread_id=")[2][-len(end) :]
            for path, end in zip(server.paths[1:], paths, strict=True)
        ] == paths


def test_ps_without_runs_says_so_on_a_terminal() -> None:
    console, shown = terminal()

    sereno(Server(httpx2.Response(200, json={"runs": []})), "ps", console=console)

    assert shown() == "no runs\n"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (202, f"cancelling run {RUN}; its end: `sereno tail {RUN}`\n"),
        (200, f"run {RUN} had ended already: success\n"),
    ],
)
def test_cancel_asks_a_run_to_end(status: int, says: str) -> None:
    answer = {"run_id": RUN, "status": "success"}
    server = Server(lambda _: httpx2.Response(status, json=answer))
    console, shown = terminal()

    assert sereno(server, "cancel", RUN, "--reason", "no need", console=console).code == 0
    assert server.paths == [f"/v1/runs/{RUN}/cancel"]
    assert server.body == {"reason": "no need"}
    assert shown() == says
    assert json.loads(sereno(server, "cancel", RUN, "--json", console=console).stdout) == answer


def test_an_id_cannot_lead_to_another_path() -> None:
    server = Server(httpx2.Response(202, json={}))

    sereno(server, "cancel", "a/../b?c")

    assert server.paths == ["/v1/runs/a%2F..%2Fb%3Fc/cancel"]


def test_graphs_are_listed() -> None:
    known = [
        {"name": "agent", "description": "Answers.", "nodes": ["a", "b"], "default_input": {"q": 1}}
    ]
    server = Server(lambda _: httpx2.Response(200, json={"graphs": known}))
    console, shown = terminal()

    assert [json.loads(sereno(server, "graphs").stdout)] == known
    sereno(server, "graphs", console=console)
    assert shown().splitlines()[1].split() == ["agent", "a,", "b", '{"q":', "1}", "Answers."]


@pytest.mark.parametrize("args", [("ps",), ("graphs",), ("run", "a")])
@pytest.mark.parametrize("answer", [{"json": []}, {"json": {}}, {"text": "hi"}], ids=str)
def test_another_server_is_recognised(args: tuple[str, ...], answer: Any) -> None:
    result = sereno(Server(httpx2.Response(200, **answer)), *args)

    assert result.code == 5
    assert "is it Sereno?" in result.stderr


# top


LIFE = [
    node(3, "node.started", node="plan", task="p1"),
    node(4, "node.completed", node="plan", task="p1"),
    node(5, "node.started", node="look", task="l1", step=2),
    node(6, "node.started", node="look", task="l2", step=2),
    node(7, "node.started", node="deep", ns=["look"], path=["l1"], task="d1"),
    node(
        8,
        "node.retrying",
        {"error_class": "transport", "retry_in_ms": 4000, "max_attempts": 3},
        node="look",
        task="l2",
        step=2,
    ),
    bookmark("caught_up", 9),
]


class Busy:
    """A server with one run that goes on and one that waits."""

    def __init__(
        self, *lives: list[bytes], running: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.lives = list(lives)
        self.running = [run_row(1, last_seq=9)] if running is None else running
        self.paths: list[str] = []
        #: Numbers of the runs that ended lately, by how.
        self.ends: dict[str, list[int]] = {"error": [], "timeout": [], "interrupted": []}
        #: Runs by thread, newest first, and threads that wait for an answer.
        self.threads: dict[str, list[dict[str, Any]]] = {}
        self.asking: set[str] = set()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = str(request.url).removeprefix(URL)
        self.paths.append(path)
        if path.startswith("/v1/runs?status=running"):
            return httpx2.Response(200, json={"runs": self.running, "next_cursor": None})
        if "&updated_after=" in path:
            assert "updated_after=2027-01-15T07%3A00" in path
            name = path.partition("status=")[2].partition("&")[0]
            ended = [self.ended(n, name) for n in self.ends[name]]
            return httpx2.Response(200, json={"runs": ended, "next_cursor": None})
        if path.startswith("/v1/runs?thread_id="):
            known = self.threads.get(request.url.params["thread_id"], [])
            return httpx2.Response(200, json={"runs": known, "next_cursor": None})
        if path.endswith("/state"):
            asked = [{"id": "i1", "value": "?"}] if path.split("/")[3] in self.asking else []
            return httpx2.Response(200, json={"interrupts": asked})
        if path.startswith("/v1/runs?status=pending"):
            waits = run_row(2, status="pending", started_at=None)
            return httpx2.Response(200, json={"runs": [waits], "next_cursor": None})
        if path.startswith("/info"):
            return httpx2.Response(200, json={"slots": 4})
        if path.endswith("/debug/live"):
            told = {"run_id": "01RUN1", "silence_s": 12.5, "nodes": []}
            return httpx2.Response(200, json={"runs": [told]})
        return stream(self.lives.pop(0))

    def ended(self, number: int, status: str) -> dict[str, Any]:
        at = stamp(NOW - 60 + number)
        return run_row(number, status=status, ended_at=at, thread_id=f"t-{number % 10}")


def test_top_as_json_tells_of_the_server_and_its_runs_once() -> None:
    busy = Busy(LIFE)

    result = sereno(Server(busy), "top", "--json")

    server, running, waiting = map(json.loads, result.stdout.splitlines())
    assert result.code == 0
    assert server == {
        "type": "server",
        "running": 1,
        "pending": 1,
        "slots": 4,
        "nodes": 3,
        "sleeping": 1,
        "last_hour": {"error": 0, "timeout": 0, "interrupted": 0},
        "complete": True,
    }
    assert (running["type"], running["run_id"], running["age_s"]) == ("run", "01RUN1", 90.0)
    assert running["nodes"] == [
        {"node": "look", "task": "l1", "attempt": 1, "state": "running", "age_s": 0.0},
        {
            "node": "look",
            "task": "l2",
            "attempt": 2,
            "state": "retrying",
            "age_s": 0.0,
            "retry_in_s": 4.0,
        },
        {"node": "look/deep", "task": "d1", "attempt": 1, "state": "running", "age_s": 0.0},
    ]
    assert (waiting["run_id"], waiting["status"], waiting["age_s"]) == ("01RUN2", "pending", None)


def test_top_asks_the_admin_listener_how_long_runs_are_silent() -> None:
    busy = Busy(LIFE)

    result = sereno(Server(busy), "top", "--admin-url", "http://127.0.0.1:9009")

    assert json.loads(result.stdout.splitlines()[1])["silence_s"] == 12.5
    assert busy.paths[-2] == "http://127.0.0.1:9009/debug/live"


def test_top_reads_only_what_is_new() -> None:
    more = [node(10, "node.completed", node="look", task="l1"), bookmark("caught_up", 10)]
    busy = Busy(LIFE, more)
    console, shown = terminal()
    server = Server(busy)
    server.clock = itertools.count(NOW, 0.5).__next__

    def pause(seconds: float) -> None:
        server.slept.append(seconds)
        busy.running = [run_row(1, last_seq=10 if len(server.slept) > 5 else 9)]
        if len(server.slept) == 20:
            raise KeyboardInterrupt

    around = server.around(console)
    object.__setattr__(around, "sleep", pause)
    result = CliRunner(env={"SERENO_URL": None}).invoke(app, ["top"], obj=around)

    assert result.exit_code == 0
    asked = [path for path in busy.paths if "/stream" in path]
    assert [path.partition("&")[0] for path in asked] == [
        "/v1/runs/01RUN1/stream?after=0",
        "/v1/runs/01RUN1/stream?after=9",
    ]
    last = shown().rpartition("sereno top")[2]
    assert "1 running of 4 slots · 1 queued · 1 node open · 1 waiting to retry" in last
    assert "look/deep" not in last


def test_top_tells_what_ended_badly_in_the_last_hour_and_what_waits_to_be_answered() -> None:
    busy = Busy(LIFE)
    busy.ends = {"error": [7, 3], "timeout": [], "interrupted": [5]}

    result = sereno(Server(busy), "top", "--json")
    rows = [json.loads(row) for row in result.stdout.splitlines()]

    assert rows[0]["last_hour"] == {"error": 2, "timeout": 0, "interrupted": 1}
    assert [row["run_id"] for row in rows[1:]] == [f"01RUN{n}" for n in (1, 2, 7, 5, 3)]

    seen = Snapshot(running=[], pending=[], slots=4, ended=[Run(row) for row in rows[3:]])
    assert [text.plain for text in rows_of(seen, NOW, 80)] == [
        "no run goes on",
        "✗ 01RUN7 agent  error 53.0 s ago  thread t-7",
        "? 01RUN5 agent  interrupted 55.0 s ago  thread t-5",
        "✗ 01RUN3 agent  error 57.0 s ago  thread t-3",
    ]


def test_top_leaves_out_what_was_answered_and_marks_what_needs_an_answer() -> None:
    busy = Busy([bookmark("caught_up", 1)], [], running=[])
    busy.ends = {"error": [16, 3], "timeout": [], "interrupted": [5, 6, 7]}
    ended = busy.ended
    busy.threads = {
        "t-3": [ended(3, "error")],
        "t-5": [ended(5, "interrupted")],
        "t-6": [ended(16, "error"), ended(6, "interrupted")],  # its answer did not fit
        "t-7": [ended(17, "success"), ended(7, "interrupted")],
    }
    busy.asking = {"t-6", "t-7"}
    server = Server(busy)
    client = Client(URL, server.around())
    top = Top(Source(client, None), server.clock)

    seen = top.look()
    shown = [text.plain for text in rows_of(seen, NOW, 80)]

    assert [run.row["run_id"] for run in seen.ended] == ["01RUN16", "01RUN5", "01RUN3"]
    assert shown[:3] == [
        "✗ 01RUN16 agent  needs an answer  error 44.0 s ago  thread t-6",
        "? 01RUN5 agent  needs an answer  interrupted 55.0 s ago  thread t-5",
        "✗ 01RUN3 agent  error 57.0 s ago  thread t-3",
    ]
    head, *rows = seen.rows(NOW)
    assert head["last_hour"] == {"error": 2, "timeout": 0, "interrupted": 1}
    assert [row.get("needs_answer") for row in rows[1:4]] == [True, True, None]

    busy.paths.clear()
    busy.threads["t-5"].insert(0, ended(18, "success"))
    assert [run.row["run_id"] for run in top.look().ended] == ["01RUN16", "01RUN3"]
    assert sorted(path for path in busy.paths if "thread_id" in path) == [
        "/v1/runs?thread_id=t-5&limit=10",
        "/v1/runs?thread_id=t-6&limit=10",
    ]  # what was settled is not asked for again


def test_top_puts_first_what_waits_to_retry_and_then_what_is_oldest() -> None:
    still = [bookmark("caught_up", 1)]
    running = [run_row(n, started_at=stamp(NOW - n), last_seq=9) for n in (1, 2, 3)]
    # They are looked into from the oldest on.
    busy = Busy(still, LIFE, still, running=running)

    result = sereno(Server(busy), "top", "--json")

    rows = [json.loads(row) for row in result.stdout.splitlines()]
    assert [row["run_id"] for row in rows[1:4]] == ["01RUN2", "01RUN3", "01RUN1"]


def test_top_goes_on_when_the_server_is_away() -> None:
    busy = Busy(LIFE)
    console, shown = terminal()
    server = Server(busy)
    server.clock = itertools.count(NOW, 0.5).__next__

    def pause(seconds: float) -> None:
        server.slept.append(seconds)
        server._answers[:] = [httpx2.ConnectError("refused") if len(server.slept) < 9 else busy]
        if len(server.slept) == 20:
            raise KeyboardInterrupt

    around = server.around(console)
    object.__setattr__(around, "sleep", pause)
    CliRunner(env={"SERENO_URL": None}).invoke(app, ["top"], obj=around)

    assert f"! no server at {URL}" in shown()
    assert "! no server" not in shown().rpartition("sereno top")[2]


def test_top_without_a_server_says_how_to_start_one() -> None:
    console, _ = terminal()

    result = sereno(Server(httpx2.ConnectError("refused")), "top", console=console)

    assert result.code == 5
    assert result.stderr == f"sereno: no server at {URL}; start one with `sereno serve`\n"


@pytest.mark.parametrize(
    ("width", "rows"),
    [
        pytest.param(
            80,
            [
                "▶ 01RUN1 agent  1 m 30 s  thread t-1",
                "  ↻ look #2  attempt 2 of 3 in 4.0 s  transport",
                "  ⠋ look/deep  0 ms",
                "… 01RUN2 agent  queued 2 m 00 s  thread t-1",
            ],
            id="wide",
        ),
        pytest.param(
            40,
            [
                "▶ agent  1 m 30 s  thread t-1",
                "  01RUN1",
                "  ↻ look #2  attempt 2 of 3 in 4.0 s  transport",
                "  ⠋ look/deep  0 ms",
                "… agent  queued 2 m 00 s  thread t-1",
                "  01RUN2",
            ],
            id="narrow",
        ),
    ],
)
def test_top_shows_the_innermost_nodes_of_each_run(width: int, rows: list[str]) -> None:
    running = Run(run_row(1))
    running.take(map(json.loads, LIFE), NOW)
    seen = Snapshot(running=[running], pending=[Run(run_row(2, status="pending"))], slots=4)

    assert [text.plain for text in rows_of(seen, NOW, width)] == rows


def test_top_forgets_the_nodes_of_an_epoch_that_is_over() -> None:
    run = Run(run_row(1))

    run.take(map(json.loads, [*LIFE, line(10, "run.recovered", epoch=2)]), NOW)

    assert run.nodes == {}


# On a terminal.


def test_json_is_for_terminals_too() -> None:
    console, shown = terminal()

    result = sereno(Server(stream(LINES)), "tail", RUN, "--json", console=console)

    assert result.stdout == told(LINES)
    assert shown() == ""


def view_of(*lines: bytes, now: float = NOW, width: int = 60) -> tuple[RunView, str]:
    """A view after some lines, not redrawing by itself, and what it has printed."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        height=30,
        color_system=None,
        force_terminal=True,
        _environ={"TERM": "xterm"},
    )
    view = RunView(console, lambda: now)
    for one in lines:
        view.line(Line(one, json.loads(one)))
    return view, out.getvalue()


def below(view: RunView, width: int = 60, height: int = 30) -> list[str]:
    """What is redrawn below what is printed."""
    out = io.StringIO()
    Console(file=out, width=width, height=height, color_system=None).print(view)
    return [text.rstrip() for text in out.getvalue().splitlines()]


def tokens(seq: int, text: str, message_id: str = "m1", **where: Any) -> bytes:
    return node(seq, "token", {"message_id": message_id, "text": text}, **where)


def test_a_terminal_shows_nodes_retries_and_a_summary() -> None:
    console, shown = terminal()

    result = sereno(Server(stream(LINES)), "run", "agent", "--input", "{}", console=console)

    assert result.code == 0
    assert result.stdout == b""
    for text in (
        "▶ run 01RUN · thread t-1",
        "✓ score  812 ms · 2 attempts",
        "  ↻ attempt 1 failed: transport; again in 1.5 s",
        '  │ {"text": "ñ \u2028 \\u001b[2J"}',
        "✓ success after 1.9 s · 1 node · 2 attempts · 1 retry",
        'output: {"score": 7}',
    ):
        assert text in shown()


def test_a_cut_is_shown_on_a_terminal() -> None:
    console, shown = terminal()
    server = Server(stream(LINES[:4], httpx2.ReadError("reset")), stream(LINES[4:]))

    sereno(server, "tail", RUN, console=console)

    assert "! the connection was cut after line 4; reconnecting in 0.2 s" in shown()


def test_a_waiting_retry_counts_down() -> None:
    for now, says in [
        (NOW + 0.25, "attempt 2 of 3 in 1.2 s"),
        (NOW + 1.0, "attempt 2 of 3 in 0.5 s"),
        (NOW + 2.0, "attempt 2 of 3 is due"),
    ]:
        view, _ = view_of(*LINES[:4], now=now)

        assert below(view) == [f"↻ score  {says}  transport"]


def test_a_back_off_with_jitter_is_told_as_what_is_known_of_it() -> None:
    data = {"error_class": "transport", "retry_in_ms": 800, "jitter_ms": 1000, "max_attempts": 3}
    lines = [*LINES[:3], node(4, "node.retrying", data)]
    for now, says in [
        (NOW, "in 0.8 to 1.8 s"),
        (NOW + 0.5, "in 0.3 to 1.3 s"),
        (NOW + 1.0, "within 0.8 s"),
        (NOW + 2.0, "is due"),
    ]:
        assert below(view_of(*lines, now=now)[0]) == [f"↻ score  attempt 2 of 3 {says}  transport"]

    _, printed = view_of(*lines, node(5, "node.completed"), end(6))
    assert "↻ attempt 1 failed: transport; again in 0.8 to 1.8 s\n" in printed

    data["retry_in_ms"] = 90_000
    _, printed = view_of(*LINES[:3], node(4, "node.retrying", data), end(5), width=80)
    assert "again in 1 m 30 s to 1 m 31 s\n" in printed

    run = Run(run_row(1))
    run.take(map(json.loads, lines), NOW)
    (told,) = run.json(NOW)["nodes"]
    assert (told["retry_in_s"], told["jitter_s"]) == (0.8, 1.0)


def test_a_countdown_is_never_longer_than_the_back_off() -> None:
    """The server's clock may be ahead of ours."""
    view, _ = view_of(*LINES[:4], now=NOW - 3600)

    assert below(view) == ["↻ score  attempt 2 of 3 in 1.5 s  transport"]


def test_an_open_node_shows_its_attempt_and_time() -> None:
    view, _ = view_of(*LINES[:5], now=NOW + 2)

    assert below(view) == ["⠋ score  2.0 s  attempt 2 of 3"]


def test_a_call_that_retries_is_shown_in_its_node() -> None:
    retrying = {"call": "ask", "attempt": 1, "error_class": "rate_limit", "retry_in_ms": 4000}
    lines = [*LINES[:3], node(4, "call.retrying", retrying)]

    view, _ = view_of(*lines, now=NOW + 1)
    assert below(view) == ["⠋ score  1.0 s  ↻ ask  attempt 2 in 3.0 s"]

    _, printed = view_of(*lines, node(5, "node.completed"), end(6))
    assert "  ↻ ask  attempt 1 failed: rate_limit; again in 4.0 s\n" in printed


def test_tokens_are_shown_as_they_come_and_printed_when_their_node_is_over() -> None:
    lines = [*LINES[:3], tokens(4, "Hello "), tokens(5, "wor")]

    view, printed = view_of(*lines)
    assert "Hello" not in printed
    assert below(view) == ["⠋ score  0 ms", "  │ Hello wor"]

    long = "ld\n" + "word " * 12
    _, printed = view_of(*lines, tokens(6, long), node(7, "node.completed"), end(8))
    assert [text for text in printed.splitlines() if "│" in text] == [
        "  │ Hello world",
        "  │ " + " ".join(["word"] * 11),
        "  │ word",
    ]


def test_a_whole_message_takes_the_place_of_its_tokens() -> None:
    message = node(5, "message", {"message_id": "m1", "role": "ai", "text": "Hello world"})

    view, _ = view_of(*LINES[:3], tokens(4, "Hello"), message)

    assert below(view)[1:] == ["  │ Hello world"]


def test_only_the_end_of_a_long_text_is_redrawn() -> None:
    text = "\n".join(f"line {number}" for number in range(1000))

    view, _ = view_of(*LINES[:3], tokens(4, text))

    shown = below(view, height=12)
    assert shown == ["⠋ score  0 ms", *(f"  │ line {number}" for number in range(991, 1000))]


def test_a_message_is_printed_with_its_tool_calls_and_their_answers() -> None:
    calls = [{"name": "search", "args": {"q": "x"}}]
    ai = {"message_id": "m1", "role": "ai", "text": "Let me see.", "tool_calls": calls}
    tool = {"message_id": "m2", "role": "tool", "name": "search", "text": "found\nit"}
    lines = [node(4, "message", ai), node(5, "message", tool), node(6, "node.completed"), end(7)]

    _, printed = view_of(*LINES[:3], *lines)

    assert [text for text in printed.splitlines() if "│" in text] == [
        "  │ Let me see.",
        '  │ → search {"q": "x"}',
        '  │ ← search "found\\nit"',
    ]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("half\nway", ["half", "way"]),
        ({"message": "half way", "done": 1}, ["half way"]),
        ({"message": 1}, ['{"message": 1}']),
        (None, ["null"]),
    ],
    ids=str,
)
def test_what_a_node_writes_is_shown_as_a_person_would_say_it(value: Any, says: list[str]) -> None:
    _, printed = view_of(*LINES[:3], node(4, "custom", {"value": value}), end(5))

    assert [text for text in printed.splitlines() if "│" in text] == [f"  │ {s}" for s in says]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "boolean"}, "boolean"),
        (
            {
                "properties": {
                    "approve": {"type": "boolean"},
                    "remark": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                },
                "required": ["approve"],
                "type": "object",
            },
            '{"approve": boolean, "remark"?: string | null}',
        ),
        (
            {
                "$defs": {"Size": {"enum": ["s", "m"]}},
                "type": "array",
                "items": {"$ref": "#/$defs/Size"},
            },
            '["s" | "m", …]',
        ),
        ({"type": ["integer", "null"]}, "integer | null"),
        ({"oneOf": [{"const": 1}, {"const": 1}, {"type": "object"}]}, "1 | {…}"),
        (
            {
                "$ref": "#/$defs/A",
                "$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}},
            },
            "[[…, …], …]",
        ),
        ({"$ref": "http://elsewhere"}, "anything"),
        ({"anyOf": {}, "properties": [], "enum": 1}, "anything"),
        ({"enum": ["x" * 50] * 50}, " | ".join([json.dumps("x" * 50)] * 50)[:299] + "…"),
    ],
    ids=str,
)
def test_what_answers_fit_is_said_on_one_line(schema: dict[str, Any], says: str) -> None:
    assert fitting(schema) == says


def test_a_question_shows_what_answers_fit_and_those_that_it_names() -> None:
    value = {"question": "Publish?", "answers": ['{"approve": true}', "a text"]}
    asks = {"id": "i1", "value": value, "response_schema": {"type": "boolean"}}

    _, printed = view_of(end(1, "run.interrupted", "interrupted", interrupts=[asks]))

    assert printed.splitlines()[1:5] == [
        "  asks",
        "  │ question: Publish?",
        '  │ answers: {"approve": true} | a text',
        "  │ fits: boolean",
    ]


def test_what_a_failed_attempt_said_vanishes() -> None:
    before = [*LINES[:3], tokens(4, "half"), node(5, "custom", {"value": "old"})]
    retrying = node(6, "node.retrying", {"error_class": "transport", "discard_from": 3})
    message = node(8, "message", {"message_id": "m1", "text": "whole"}, attempt=2)
    again = [node(7, "node.started", attempt=2), message]

    view, _ = view_of(*before, retrying)
    assert below(view) == ["↻ score  attempt 2 is due  transport"]

    _, printed = view_of(*before, retrying, *again, node(9, "node.completed"), end(10))
    assert printed.splitlines()[1:4] == [
        "✓ score  0 ms",
        "  ↻ attempt 1 failed: transport; again in 0 ms",
        "  │ whole",
    ]
    assert "half" not in printed
    assert "old" not in printed


def test_what_a_failed_call_said_vanishes_and_the_rest_stays() -> None:
    retrying = {"call": "ask", "attempt": 1, "error_class": "x", "message_ids": ["m2"]}

    view, _ = view_of(
        *LINES[:3],
        tokens(4, "kept", "m1"),
        tokens(5, "gone", "m2"),
        node(6, "call.retrying", retrying),
        tokens(7, "new", "m3"),
        node(8, "node.interrupted"),
    )
    with view:
        pass

    assert below(view) == []
    printed = view._console.file.getvalue()  # type: ignore[attr-defined]
    assert [text for text in printed.splitlines() if "│" in text] == ["  │ kept", "  │ new"]


def test_inner_nodes_stand_in_the_node_around_them_and_end_with_its_attempt() -> None:
    inner = node(4, "node.started", node="deep", ns=["score"], path=["k1"], task="k2")
    deeper = node(
        5, "node.started", node="deeper", ns=["score", "deep"], path=["k1", "k2"], task="k3"
    )

    view, _ = view_of(*LINES[:3], inner, deeper)
    assert below(view) == ["⠋ score  0 ms", "  ⠋ deep  0 ms", "    ⠋ deeper  0 ms"]

    retrying = {"error_class": "x", "retry_in_ms": 1000, "discard_from": 3}
    view, _ = view_of(*LINES[:3], inner, deeper, node(6, "node.retrying", retrying))
    assert below(view) == ["↻ score  attempt 2 in 1.0 s  x"]


def test_a_reader_who_comes_late_sees_where_inner_nodes_belong() -> None:
    where = {"ns": ["score", "deep"], "path": ["k1", "k2"], "task": "k3"}

    view, _ = view_of(node(9, "node.started", node="deeper", **where))

    assert below(view) == ["⠋ score/deep/deeper  0 ms"]


def test_parallel_visits_of_a_node_are_told_apart() -> None:
    def inner(seq: int, around: str) -> bytes:
        where = {"node": "deep", "ns": ["score"], "path": [around], "task": f"{around}-1"}
        return node(seq, "node.started", **where)

    lines = [*LINES[:3], node(4, "node.started", task="k2"), inner(5, "k2"), inner(6, "k1")]
    done = [node(7, "node.completed", {"duration_ms": 5}, task="k2")]

    view, printed = view_of(*lines, *done)

    assert "score" not in printed  # what ends first does not move while others go on
    assert below(view) == [
        "⠋ score #1  0 ms",
        "  ⠋ deep  0 ms",
        "✓ score #2  5 ms",
        "  ⠋ deep  0 ms",
    ]
    later = node(8, "node.started", task="k9", step=2)
    view, _ = view_of(*LINES[:3], node(4, "node.completed"), later)
    assert below(view) == ["⠋ score  0 ms"]


def test_a_node_that_writes_much_keeps_the_newest() -> None:
    values = [node(4 + number, "custom", {"value": number}) for number in range(1000)]

    _, printed = view_of(*LINES[:3], *values, node(1004, "node.completed"), end(1005))

    assert "  … " in printed
    assert "earlier values" in printed
    assert "  │ 999\n" in printed
    assert len(printed.splitlines()) < 420


@pytest.mark.parametrize("width", [20, 40])
def test_narrow_terminals_hold_every_line(width: int) -> None:
    text = "Esto es un texto de un modelo que no cabe en una sola línea. " * 3
    view, printed = view_of(*LINES[:4], node(5, "node.started"), tokens(6, text), width=width)

    assert all(len(one) <= width for one in [*below(view, width), *printed.splitlines()])
    assert below(view, width)[1].startswith("  │ ")


def test_where_nothing_can_be_redrawn_nodes_are_printed_as_they_end() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, _environ={"TERM": "dumb"})

    with RunView(console, lambda: NOW) as view:
        for one in LINES[:7]:
            view.line(Line(one, json.loads(one)))
        assert out.getvalue().split("\n")[:-1] == [
            "▶ run 01RUN · thread t-1",
            "↻ score  attempt 1 failed: transport; again in 1.5 s",
            "✓ score  812 ms · 2 attempts",
            '  │ {"text": "ñ \u2028 \\u001b[2J"}',
        ]
    assert "\x1b" not in out.getvalue()


def test_without_colour_no_colour_is_sent() -> None:
    out = io.StringIO()
    environ = {"TERM": "xterm-256color", "NO_COLOR": "1"}
    console = Console(file=out, width=60, force_terminal=True, _environ=environ)

    with RunView(console, lambda: NOW) as view:
        for one in LINES:
            view.line(Line(one, json.loads(one)))

    assert "✓ score" in out.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", out.getvalue())


def test_a_recovery_closes_what_was_open() -> None:
    recovered = line(4, "run.recovered", {"reason": "crash", "lost": [{"task": "k1"}]}, epoch=2)

    view, printed = view_of(*LINES[:3], recovered)

    assert "! recovered after a crash, epoch 2; 1 task again" in printed
    assert below(view) == ["… score  will begin anew", "⠋ running"]


def test_a_recovery_takes_back_what_lost_tasks_have_said() -> None:
    def inner(seq: int, type: str, data: dict[str, Any]) -> bytes:
        return node(seq, type, data, node="deep", ns=["score"], path=["k1"], task="k2")

    recovered = {"reason": "crash", "lost": [{"task": "k1"}], "discard_from": 3}
    lines = [
        *LINES[:3],
        tokens(4, "lost"),
        inner(5, "custom", {"value": "kept"}),
        inner(6, "node.completed", {"attempts": 1, "duration_ms": 5}),
        line(7, "run.recovered", recovered, epoch=2),
        node(8, "node.started", epoch=2),
    ]

    view, _ = view_of(*lines)
    assert below(view) == ["⠋ score  0 ms", "  ✓ deep  5 ms"]

    _, printed = view_of(*lines, node(9, "node.completed", {"attempts": 1}), end(10))
    assert printed.splitlines()[2:5] == ["✓ score  0 ms", "  ✓ deep  5 ms", "    │ kept"]


def test_a_run_that_waits_or_was_given_back_says_so() -> None:
    view, _ = view_of(*LINES[:1])
    assert below(view) == ["⠋ queued"]

    view, printed = view_of(*LINES[:3], line(4, "run.requeued", {"reason": "drain"}))
    assert "given back to the queue: drain" in printed
    assert below(view) == ["… score  will begin anew", "⠋ queued"]


@pytest.mark.parametrize(
    ("type", "data", "says"),
    [
        ("node.completed", {"cached": True, "attempts": 0}, "✓ score  cached"),
        ("node.completed", {"recovered": True, "attempts": 0}, "✓ score  recovered"),
        (
            "node.failed",
            {"error_class": "timeout", "error_type": "E", "attempts": 3, "duration_ms": 61000},
            "✗ score  timeout (E) 1 m 01 s · 3 attempts",
        ),
        ("node.interrupted", {"attempts": 1}, "? score  waits for an answer"),
        ("node.cancelled", {"attempts": 1, "duration_ms": 5}, "■ score  cancelled 5 ms"),
    ],
)
def test_each_end_of_a_node_is_shown(type: str, data: dict[str, Any], says: str) -> None:
    view, _ = view_of(*LINES[:3], node(4, type, data))
    assert below(view) == [says, "⠋ running"]

    _, printed = view_of(*LINES[:3], node(4, type, data), line(5, "values", {"values": {}}))
    assert printed.splitlines()[-2:] == [says, "state │ {}"]


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (
            end(2, "run.failed", "error", error={"code": "node_error", "node": "score"}),
            ["✗ error after 1.9 s", "node_error in score: error"],
        ),
        (
            end(2, "run.cancelled", "cancelled", reason="no need"),
            ["■ cancelled", "reason: no need"],
        ),
        (
            end(2, "run.interrupted", "interrupted", interrupts=[{"id": "i", "value": "ok?"}]),
            ["? interrupted", "asks │ ok?"],
        ),
        (
            end(2, backoff_ms=1500, tokens={"input": 12, "output": 3}),
            ["1.5 s of back-off", "12 input / 3 output tokens"],
        ),
    ],
)
def test_a_summary_says_how_it_went(last: bytes, says: list[str]) -> None:
    view, printed = view_of(LINES[0], last)

    assert all(text in " ".join(printed.split()) for text in says)
    assert below(view) == []


def test_text_from_models_cannot_drive_the_terminal() -> None:
    evil = "\x1b]0;x\x07a\x9b2J\u202eb\r"

    _, printed = view_of(
        *LINES[:3],
        tokens(4, evil),
        node(5, "custom", {"value": evil}),
        node(6, "node.failed", {"error_class": "x", "detail": evil, "attempts": 1}, node=evil),
        end(7, "run.interrupted", "interrupted", interrupts=[{"id": "i", "value": {evil: evil}}]),
    )

    assert not set(printed) & {"\x1b", "\x07", "\x9b", "\u202e", "\r"}


def test_types_to_come_are_ignored() -> None:
    view, printed = view_of(line(1, "run.blessed"), bookmark("nap", 1))

    assert printed == ""
    assert below(view) == ["⠋ waiting for the first line"]


def test_many_open_nodes_do_not_fill_the_screen() -> None:
    started = [node(3 + i, "node.started", task=f"k{i}") for i in range(100)]

    view, _ = view_of(*LINES[:2], *started)

    assert len(below(view)) < 30
    assert "more" in below(view)[-1]


def test_long_values_are_cut() -> None:
    assert compact({"x": "y" * 1000}, 20) == '{"x": "yyyyyyyyyyyy…'


# serve and --local: in this process.


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """`runtime.app`, which notes what it is asked for, in an empty folder."""
    asked = types.SimpleNamespace(calls=[], raises=None, exit_code=0, lines=LINES)

    def serve(settings: Any, sources: Sequence[str]) -> int:
        asked.calls.append((settings, sources))
        if asked.raises is not None:
            raise asked.raises
        return int(asked.exit_code)

    async def local_stream(*args: Any) -> AsyncIterator[bytes]:
        asked.calls.append(args)
        for one in asked.lines:
            yield one
        if asked.raises is not None:
            raise asked.raises

    module = types.ModuleType("runtime.app")
    vars(module).update(serve=serve, local_stream=local_stream)
    monkeypatch.setitem(sys.modules, "runtime.app", module)
    monkeypatch.chdir(tmp_path)
    for name in ("HOST", "PORT", "ENGINE", "LENIENT", "LOG_LEVEL"):
        monkeypatch.delenv(f"SERENO_{name}", raising=False)
    return asked


def nobody() -> Server:
    return Server(AssertionError("no request is expected"))


def test_serve_hands_on_settings_and_sources(composed: types.SimpleNamespace) -> None:
    composed.exit_code = 7

    result = sereno(
        nobody(),
        *("serve", "mod:graph", "--config", "a.json", "--config", "b.json", "--port", "0"),
        *("--engine", "memory://", "--lenient", "--log-level", "DEBUG", "--admin-port", "9010"),
    )

    assert result.code == 7
    [(settings, sources)] = composed.calls
    assert sources == ["a.json", "b.json", "mod:graph"]
    assert (settings.port, settings.engine, settings.lenient) == (0, "memory://", True)
    assert settings.admin_port == 9010
    assert (settings.host, settings.insecure, settings.log_level) == ("127.0.0.1", False, "DEBUG")


def test_serve_leaves_to_the_environment_what_it_is_not_told(
    composed: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERENO_LENIENT", "1")
    monkeypatch.setenv("SERENO_PORT", "9000")
    monkeypatch.setenv("SERENO_ADMIN_PORT", "9001")
    Path("langgraph.json").write_text("{}")

    assert sereno(nobody(), "serve").code == 0
    [(settings, sources)] = composed.calls
    assert (settings.lenient, settings.port, sources) == (True, 9000, ["langgraph.json"])
    assert settings.admin_port == 9001


@pytest.mark.parametrize("args", [("serve",), ("run", "a", "--local")])
def test_without_graphs_it_says_what_to_do(
    composed: types.SimpleNamespace, args: tuple[str, ...]
) -> None:
    result = sereno(nobody(), *args)

    assert result.code == 2
    assert result.stderr.startswith("sereno: no langgraph.json in this folder: name one with")
    assert composed.calls == []


def test_a_start_that_fails_is_one_line(composed: types.SimpleNamespace) -> None:
    composed.raises = GraphLoadFailed("graph 'a' did not load: ZeroDivisionError")

    result = sereno(nobody(), "serve", "m:a")

    assert result.code == 1
    assert result.stderr == "sereno: graph 'a' did not load: ZeroDivisionError\n"


def test_a_bad_setting_is_one_line(composed: types.SimpleNamespace) -> None:
    result = sereno(nobody(), "serve", "m:a", "--port", "70000")

    assert result.code == 1
    assert result.stderr.startswith("sereno: SERENO_PORT: ")
    assert composed.calls == []


def test_local_runs_without_a_server(composed: types.SimpleNamespace) -> None:
    result = sereno(
        nobody(), "run", "agent", "--local", "--config", "l.json", "--input", '{"x": 1}'
    )

    assert result.code == 0
    assert result.stdout == told(LINES)
    [(settings, sources, *rest)] = composed.calls
    assert (settings.engine, settings.expose_errors) == ("memory://", True)
    assert sources == ["l.json"]
    assert rest == ["agent", {"x": 1}, None, ("updates", "messages", "custom")]


@pytest.mark.parametrize(
    ("last", "raises", "code", "says"),
    [
        pytest.param(end(8, "run.failed", "error"), None, 1, "", id="error"),
        pytest.param(end(8, "run.interrupted", "interrupted"), None, 3, "only a server", id="ask"),
        pytest.param(LINES[6], KeyboardInterrupt(), 130, "is gone", id="ctrl-c"),
        pytest.param(LINES[6], UnknownGraph("a", ["b"]), 2, "known graphs: b", id="unknown"),
    ],
)
def test_local_ends_as_the_run_does(
    composed: types.SimpleNamespace,
    last: bytes,
    raises: BaseException | None,
    code: int,
    says: str,
) -> None:
    composed.lines, composed.raises = [*LINES[:6], last], raises

    result = sereno(nobody(), "run", "agent", "--local", "--config", "l.json")

    assert result.code == code
    assert says in result.stderr
    assert result.stdout == told([*LINES[:6], last])


def test_what_a_local_run_logs_does_not_mix_with_its_lines(
    composed: types.SimpleNamespace,
) -> None:
    class Logging(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            logging.getLogger("graph").warning("look out")
            return super().__iter__()

    composed.lines = Logging(LINES)

    result = sereno(nobody(), "run", "agent", "--local", "--config", "l.json")

    assert result.stdout == told(LINES)
    assert "look out" in result.stderr


def test_variables_that_look_like_settings_are_named_with_what_was_meant(
    composed: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SERENO_PROT", "SERENO_QUX_OF_SOMEBODY", "SERENO_PORT", "SERENO_RETRY_MIN_S"):
        monkeypatch.setenv(name, "1")

    result = sereno(nobody(), "serve", "m:a")

    assert result.code == 0
    assert result.stderr.splitlines() == [
        "sereno: SERENO_PROT is set and is no setting; did you mean SERENO_PORT?",
        "sereno: SERENO_QUX_OF_SOMEBODY is set and is no setting; it changes nothing here",
    ]


def test_it_says_its_version() -> None:
    assert sereno(nobody(), "--version").stdout.decode() == f"sereno {version('sereno')}\n"


def test_every_command_has_help_and_nothing_heavy_is_imported() -> None:
    """A command line that imports langgraph to list runs takes seconds to answer."""
    program = (
        "import sys; from runtime.cli import app; from typer.testing import CliRunner\n"
        "for c in ('serve', 'run', 'tail', 'ps', 'top', 'cancel', 'graphs'):\n"
        "    assert CliRunner().invoke(app, [c, '--help']).exit_code == 0, c\n"
        "print([m for m in ('langgraph', 'fastapi', 'uvicorn', 'pydantic_settings')"
        " if m in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "runtime", "--help"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("Usage: sereno ")
