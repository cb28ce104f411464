"""What an operator reads on stdout: the form of every line, and which lines are lost."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, BinaryIO, cast

import pytest
import structlog
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from structlog.contextvars import bound_contextvars
from structlog.testing import capture_logs

from telemetry import logs
from telemetry.logs import configure, reset

#: Made when this module is imported, as most of our loggers are.
EARLY = structlog.get_logger("early")
#: Somebody else's.
THIRD = logging.getLogger("third")

NOON = 1_770_987_302.123456  # 2026-02-13 12:55:02 UTC


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = state()
    yield
    reset()

    assert state() == before


def state() -> dict[str, Any]:
    loggers = [
        logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.error", "uvicorn.access")
    ]
    return {
        "structlog": (structlog.is_configured(), structlog.get_config()["wrapper_class"]),
        "loggers": [(x.level, x.propagate, x.disabled, x.handlers) for x in loggers[1:]],
        # pytest changes the root's own handlers between the phases of a test
        "root": (loggers[0].level, any(type(x) is logs._Handler for x in loggers[0].handlers)),
        "writers": [x.name for x in threading.enumerate() if x.name.startswith("sereno-logs")],
    }


class Written:
    """Logs into memory; reading closes them."""

    def __init__(self, **options: Any) -> None:
        self.stream = io.BytesIO()
        self.logs = configure(stream=self.stream, clock=lambda: NOON, **options)

    def raw(self) -> bytes:
        self.logs.close()
        return self.stream.getvalue()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.raw().splitlines()]

    def line(self) -> dict[str, Any]:
        (line,) = self.lines()
        return line


class Blocked(io.RawIOBase):
    """A stream that nobody reads, until somebody does."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.reached.set()
        self.opened.wait()
        self.data += bytes(data)
        return len(data)


class Failing(io.BytesIO):
    """Takes what it is told to take, then fails until it is mended."""

    def __init__(self, takes: int = 0) -> None:
        super().__init__()
        self.takes: int | None = takes
        self.failed = threading.Event()

    def write(self, data: Any) -> int:
        if self.takes is None:
            return super().write(data)
        if not self.takes:
            self.failed.set()
            raise OSError(errno.EPIPE, "nobody reads")
        taken = super().write(data[: self.takes])
        self.takes -= taken
        return taken


def parsed(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


# The form of a line


def test_a_line_is_what_the_contract_shows() -> None:
    written = Written()
    structlog.get_logger("api").info("Stream iniciado para thread_id: test-123")

    assert written.raw().decode() == (
        '{"ts":"2026-02-13 12:55:02","level":"INFO","name":"api",'
        '"msg":"Stream iniciado para thread_id: test-123","time":"2026-02-13T12:55:02.123456Z"}\n'
    )


def test_the_keys_come_in_the_order_of_the_contract() -> None:
    written = Written()
    structlog.get_logger("runtime").info(
        "Node retrying",
        zeta=1,
        seq=7,
        request_id="q",
        attempt=2,
        alpha=2,
        node="n",
        graph="g",
        thread_id="t",
        run_id="r",
        trace_kept="undecided",
        span_id="s",
        trace_id="i",
        event_type="node.retrying",
    )

    line = written.line()
    assert list(line) == [
        *("ts", "level", "name", "msg", "time", "event"),
        *("trace_id", "span_id", "trace_kept"),
        *("run_id", "thread_id", "graph", "node", "attempt", "request_id", "seq"),
        *("zeta", "alpha"),
    ]
    assert line["event"] == "node.retrying"


@pytest.mark.parametrize(
    ("now", "ts", "time"),
    [
        pytest.param(NOON, "2026-02-13 12:55:02", "2026-02-13T12:55:02.123456Z", id="micros"),
        pytest.param(0, "1970-01-01 00:00:00", "1970-01-01T00:00:00.000000Z", id="zeros"),
        pytest.param(
            59.9999999, "1970-01-01 00:01:00", "1970-01-01T00:01:00.000000Z", id="rounded up"
        ),
    ],
)
def test_times_are_utc(now: float, ts: str, time: str) -> None:
    stream = io.BytesIO()
    with configure(stream=stream, clock=lambda: now):
        structlog.get_logger("api").info("x")

    (line,) = parsed(stream.getvalue())
    assert (line["ts"], line["time"]) == (ts, time)


def test_the_seconds_move_on() -> None:
    times = iter([1.0, 1.5, 2.0])
    stream = io.BytesIO()
    with configure(stream=stream, clock=lambda: next(times)):
        for _ in range(3):
            structlog.get_logger("api").info("x")

    assert [line["ts"][-2:] for line in parsed(stream.getvalue())] == ["01", "01", "02"]


def test_an_extra_never_takes_the_place_of_our_keys() -> None:
    written = Written()
    log = structlog.get_logger("api").bind(name="mine", extra_name="theirs")
    log.info("real", ts="a", level="b", msg="c", time="d", exception="e")

    line = written.line()
    assert (line["level"], line["name"], line["msg"]) == ("INFO", "api", "real")
    assert line["ts"] == "2026-02-13 12:55:02"
    assert line["exception"] == "e"
    assert {key: value for key, value in line.items() if key.startswith("extra_")} == {
        "extra_name": "mine",
        "extra_extra_name": "theirs",
        "extra_ts": "a",
        "extra_level": "b",
        "extra_msg": "c",
        "extra_time": "d",
    }


@given(
    msg=st.text(),
    extras=st.dictionaries(
        st.one_of(st.text(), st.sampled_from(["ts", "level", "name", "msg", "time", "extra_ts"])),
        st.one_of(st.text(), st.integers(), st.floats(), st.binary(), st.lists(st.text())),
    ).filter(lambda extras: not {"event", "self", "method_name"} & set(extras)),
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_is_logged_is_one_line_that_starts_with_our_keys(
    msg: str, extras: dict[str, Any]
) -> None:
    written = Written()
    structlog.get_logger("api").info(msg, **extras)

    raw = written.raw()
    assert len(raw.decode().splitlines()) == 1
    assert list(json.loads(raw))[:4] == ["ts", "level", "name", "msg"]
    assert json.loads(raw)["name"] == "api"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('x"}\n{"ts":"2026-01-01 00:00:00","level":"INFO"', id="line feed"),
        pytest.param("a\r\nb", id="carriage return"),
        pytest.param("a\u2028b\u2029c\x85d", id="unicode line breaks"),
        pytest.param("\x1b[31mred\x1b[0m", id="ANSI"),
        pytest.param("\x9b31mred", id="ANSI in one character"),
        pytest.param("año \x00", id="NUL"),
    ],
)
def test_nothing_in_a_value_can_write_a_line_or_paint_a_terminal(text: str) -> None:
    written = Written()
    EARLY.info(text, event_type=text, run_id=text, **{text: text})
    THIRD.warning("%s", text, extra={text: text})

    raw = written.raw().decode()
    assert len(raw.splitlines()) == 2
    assert not [c for c in raw if c != "\n" and (ord(c) < 0x20 or 0x7F < ord(c) < 0xA0)]
    for line in parsed(raw.encode()):
        assert line["msg"] == line[text] == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param({1}, [1], id="set"),
        pytest.param(float("nan"), None, id="nan"),
        pytest.param("\ud800", "\ufffd", id="lone surrogate"),
        pytest.param(ValueError("no"), {"$type": "ValueError", "message": "no"}, id="exception"),
    ],
)
def test_a_value_that_json_does_not_know_is_shown(value: object, shown: object) -> None:
    written = Written()
    EARLY.info("x", value=value)

    assert written.line()["value"] == shown


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def test_a_value_that_cannot_be_shown_costs_no_line() -> None:
    written = Written()
    EARLY.info(Hostile(), value=Hostile())
    THIRD.warning("%s", Hostile())
    THIRD.warning(Hostile())

    ours, formatted, message = written.lines()
    assert ours["msg"] == "<unprintable Hostile>"
    assert ours["value"] == formatted["args"][0]
    assert ours["value"]["$repr"] == "<unprintable>"
    assert formatted["msg"] == "%s"
    assert message["msg"] == "<unprintable Hostile>"


# structlog


def test_a_logger_made_before_configure_writes_our_form() -> None:
    written = Written()
    EARLY.info("x")
    EARLY.bind(run_id="r").info("x")

    assert [line["name"] for line in written.lines()] == ["early", "early"]


def test_a_logger_follows_a_new_configuration() -> None:
    first = Written()
    EARLY.info("first")
    second = Written(level="WARNING")
    EARLY.info("no")
    EARLY.warning("second")

    assert second.line()["msg"] == "second"
    assert first.line()["msg"] == "first"


def test_a_logger_without_a_name_is_the_root() -> None:
    written = Written()
    structlog.get_logger().info("x")

    assert written.line()["name"] == "root"


def test_a_bound_logger_carries_its_ids() -> None:
    written = Written()
    log = EARLY.bind(seq=1, run_id="r")
    log.info("x", seq=2)
    log.unbind("run_id").info("y")

    first, second = written.lines()
    assert (first["run_id"], first["seq"]) == ("r", 2)
    assert "run_id" not in second


def test_the_context_of_a_request_is_on_every_line_of_it() -> None:
    written = Written()
    with bound_contextvars(request_id="q", node="context"):
        EARLY.info("ours", node="own")
        THIRD.info("theirs", extra={"node": "own"})
        THIRD.info("theirs")

    assert [(line["request_id"], line["node"]) for line in written.lines()] == [
        ("q", "own"),
        ("q", "own"),
        ("q", "context"),
    ]


def test_an_event_of_none_is_no_event() -> None:
    written = Written()
    EARLY.info("x", event_type=None)

    assert "event" not in written.line()


def test_a_message_is_text() -> None:
    written = Written()
    EARLY.info({"a": 1})
    EARLY.info("%d of %s", 1, "two")

    assert [line["msg"] for line in written.lines()] == ["{'a': 1}", "1 of two"]


def test_the_names_of_the_levels_are_the_standard_ones() -> None:
    written = Written(level="debug")
    for name in ("debug", "info", "warning", "error", "exception", "critical", "fatal"):
        getattr(EARLY, name)("x")
    for number in (10, 20, 25, 30, 40, 50, 60):
        THIRD.log(number, "x")

    levels = [line["level"] for line in written.lines()]
    ours, theirs = levels[:7], levels[7:]
    assert ours == ["DEBUG", "INFO", "WARNING", "ERROR", "ERROR", "CRITICAL", "CRITICAL"]
    assert theirs == ["DEBUG", "INFO", "INFO", "WARNING", "ERROR", "CRITICAL", "CRITICAL"]


def test_what_is_below_the_level_is_not_written() -> None:
    written = Written(level="WARNING")
    THIRD.setLevel(logging.DEBUG)
    try:
        EARLY.info("no")
        EARLY.warning("ours")
        THIRD.info("no")
        THIRD.warning("theirs")
    finally:
        THIRD.setLevel(logging.NOTSET)

    assert [line["msg"] for line in written.lines()] == ["ours", "theirs"]


@pytest.mark.parametrize("level", ["TRACE", "", "warn", "10"])
def test_a_level_that_is_none_is_refused_with_those_that_are(level: str) -> None:
    with pytest.raises(ValueError, match="DEBUG, INFO, WARNING, ERROR, CRITICAL"):
        configure(level=level)


def test_a_refused_level_leaves_what_was_configured() -> None:
    written = Written()
    with pytest.raises(ValueError, match="unknown log level"):
        configure(level="loud")
    EARLY.info("x")

    assert written.line()["msg"] == "x"


def test_tests_can_capture_what_a_configured_logger_says() -> None:
    written = Written()
    EARLY.info("written")
    with capture_logs() as captured:
        EARLY.info("captured")

    assert written.line()["msg"] == "written"
    assert [entry["event"] for entry in captured] == ["captured"]


async def test_the_async_methods_keep_the_context() -> None:
    written = Written()
    with bound_contextvars(run_id="r"):
        await EARLY.ainfo("x")

    assert written.line()["run_id"] == "r"


# Where a line was logged

SPAN = trace.SpanContext(0xA1, 0xB2, is_remote=False, trace_flags=trace.TraceFlags(1))


def inside() -> AbstractContextManager[Any]:
    """In a span that is the current one."""
    return trace.use_span(trace.NonRecordingSpan(SPAN))


def test_a_line_tells_the_trace_it_was_logged_in() -> None:
    written = Written()
    with inside():
        EARLY.info("ours")
        THIRD.info("theirs")
        with trace.use_span(trace.INVALID_SPAN):
            EARLY.info("outside")
    EARLY.info("outside")

    *lines, outside, after = written.lines()
    for line in lines:
        assert (line["trace_id"], line["span_id"]) == (f"{0xA1:032x}", f"{0xB2:016x}")
        assert line["trace_kept"] == "true"
    for line in (outside, after):
        assert not {"trace_id", "span_id", "trace_kept"} & set(line)


def test_a_span_that_is_recorded_tells_its_own_ids() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("t")
    written = Written()
    spans = []
    for _ in range(3):
        with tracer.start_as_current_span("s") as span:
            EARLY.info("x")
            spans.append(f"{span.get_span_context().span_id:016x}")

    assert [line["span_id"] for line in written.lines()] == spans


@pytest.mark.parametrize("given", [{"trace_id": "t"}, {"span_id": "s"}])
def test_ids_that_are_given_are_not_mixed_with_the_current_ones(given: dict[str, str]) -> None:
    written = Written()
    with inside():
        EARLY.info("x", **given)
        THIRD.info("x", extra=given)

    for line in written.lines():
        assert {key: line.get(key) for key in ("trace_id", "span_id")} == {
            "trace_id": None,
            "span_id": None,
            **given,
        }
        assert line.get("trace_kept") == ("true" if "trace_id" in given else None)


def test_whoever_logs_in_a_node_is_identified_by_it() -> None:
    where: ContextVar[dict[str, object]] = ContextVar("where")
    written = Written(identify=where.get)
    where.set({"run_id": "r", "graph": "g", "node": "a/b", "attempt": 2})
    THIRD.info("theirs")
    EARLY.info("ours", node="own")
    with bound_contextvars(run_id="bound"):
        THIRD.info("theirs", extra={"graph": "own"})
    where.set({})
    THIRD.info("nowhere")

    theirs, ours, bound, nowhere = written.lines()
    assert list(theirs)[5:] == ["run_id", "graph", "node", "attempt"]
    assert theirs["node"] == "a/b"
    assert (ours["run_id"], ours["node"]) == ("r", "own")
    assert (bound["run_id"], bound["graph"], bound["node"]) == ("bound", "own", "a/b")
    assert "run_id" not in nowhere


def test_who_cannot_be_identified_may_still_log() -> None:
    def fails() -> dict[str, object]:
        raise RuntimeError

    written = Written(identify=fails)
    with inside():
        EARLY.info("x")

    assert written.line()["trace_id"] == f"{0xA1:032x}"


def test_what_is_the_same_on_every_line_follows_the_ids() -> None:
    written = Written(constants={"service": "sereno", "version": "1", "worker": 3})
    EARLY.info("x", run_id="r", alpha=1, version="own")
    THIRD.info("x")

    ours, theirs = written.lines()
    assert list(ours)[5:] == ["run_id", "service", "version", "worker", "alpha", "extra_version"]
    assert (ours["version"], ours["extra_version"]) == ("1", "own")
    assert theirs["worker"] == 3


def test_a_line_that_cannot_be_made_raises_nothing_and_is_counted() -> None:
    def clock() -> float:
        raise RecursionError

    stream = io.BytesIO()
    with configure(stream=stream, clock=clock) as handle:
        EARLY.info("x")

    assert handle.dropped == 1


# Exceptions


def fails() -> None:
    raise ValueError("the key\nis wrong")


@pytest.mark.parametrize(
    "log",
    [
        pytest.param(lambda error: EARLY.exception("Failed"), id="exception()"),
        pytest.param(lambda error: EARLY.error("Failed", exc_info=True), id="exc_info=True"),
        pytest.param(lambda error: EARLY.error("Failed", exc_info=error), id="exc_info=error"),
        pytest.param(lambda error: EARLY.error("Failed", exc_info=sys.exc_info()), id="tuple"),
        pytest.param(lambda error: THIRD.exception("Failed"), id="stdlib exception()"),
        pytest.param(lambda error: THIRD.error("Failed", exc_info=error), id="stdlib exc_info"),
    ],
)
def test_an_exception_has_a_type_a_message_and_a_stack(log: Callable[[Exception], None]) -> None:
    written = Written()
    try:
        fails()
    except ValueError as error:
        log(error)

    line = written.line()
    assert line["level"] == "ERROR"
    assert list(line["exception"]) == ["type", "message", "stack"]
    assert line["exception"]["type"] == "ValueError"
    assert line["exception"]["message"] == "the key\nis wrong"
    assert line["exception"]["stack"].startswith("Traceback (most recent call last):\n")
    assert "in fails\n" in line["exception"]["stack"]
    assert "exc_info" not in line


@pytest.mark.parametrize("exc_info", [None, False, True, (None, None, None)])
def test_without_an_exception_there_is_no_such_key(exc_info: Any) -> None:
    written = Written()
    EARLY.info("x", exc_info=exc_info)
    THIRD.info("x", exc_info=exc_info)

    for line in written.lines():
        assert not {"exception", "exc_info"} & set(line)


def test_an_extra_called_exception_gives_way_to_the_exception() -> None:
    written = Written()
    EARLY.error("x", exc_info=ValueError("real"), exception="own")

    line = written.line()
    assert line["exception"]["message"] == "real"
    assert line["extra_exception"] == "own"


def test_a_long_exception_is_cut_in_the_middle() -> None:
    written = Written()
    EARLY.error("x", exc_info=ValueError("a" * 1_000_000 + "end"))

    exception = written.line()["exception"]
    assert len(exception["message"]) == 2_000
    assert len(exception["stack"]) < 17_000
    assert exception["stack"].startswith("ValueError: aaa")
    assert exception["stack"].endswith("aend\n")


def test_a_hostile_exception_costs_no_line() -> None:
    class Bad(Exception):
        @property
        def __notes__(self) -> Any:
            raise RuntimeError

        def __str__(self) -> str:
            raise RuntimeError

    written = Written()
    EARLY.error("x", exc_info=Bad())

    exception = written.line()["exception"]
    assert (exception["type"], exception["message"]) == ("Bad", "<unprintable Bad>")


def raised(act: Callable[[], object]) -> BaseException:
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError


def caused() -> None:
    try:
        raise KeyError("SECRET")
    except KeyError as error:
        raise ValueError("SECRET") from error


def handled() -> None:
    try:
        raise KeyError("SECRET")
    except KeyError:
        raise TypeError("SECRET")  # noqa: B904


def noted() -> None:
    error = ValueError("SECRET")
    error.add_note("SECRET\nSECRET")
    raise error


def grouped() -> None:
    members = [raised(caused), raised(noted), ExceptionGroup("SECRET", [raised(handled)])]
    raise ExceptionGroup("SECRET", cast(Any, members))


def looped() -> None:
    first, second = ValueError("SECRET"), KeyError("SECRET")
    first.__cause__, second.__cause__ = second, first
    raise first


@pytest.mark.parametrize(
    ("act", "types"),
    [
        pytest.param(caused, ["KeyError", "ValueError"], id="cause"),
        pytest.param(handled, ["KeyError", "TypeError"], id="context"),
        pytest.param(noted, ["ValueError"], id="notes"),
        pytest.param(
            grouped, ["KeyError", "ValueError", "TypeError", "ExceptionGroup"], id="group"
        ),
        pytest.param(looped, ["KeyError", "ValueError"], id="a loop of causes"),
        pytest.param(lambda: compile("SECRET =", "SECRET", "exec"), ["SyntaxError"], id="syntax"),
        pytest.param(lambda: json.loads("SECRET"), ["json.decoder.JSONDecodeError"], id="module"),
    ],
)
def test_exceptions_can_be_shown_without_their_messages(
    act: Callable[[], object], types: list[str]
) -> None:
    error = raised(act)
    written = Written(exception_messages=False)
    EARLY.error("Failed", exc_info=error)
    THIRD.error("Failed", exc_info=error)

    for line in written.lines():
        assert list(line["exception"]) == ["type", "stack"]
        assert line["exception"]["type"] == type(error).__name__
        stack = line["exception"]["stack"]
        # What a line of code says is no message.
        shown = [row.strip() for row in stack.splitlines() if not row.strip().startswith("File")]
        assert set(types) <= set(shown)
        assert ", in raised\n" in stack
        assert not [row for row in shown if row in ("SECRET", "SECRET =") or ": SECRET" in row]


def test_without_messages_an_exception_is_its_type_wherever_it_stands() -> None:
    secret = ValueError("SECRET")
    written = Written(exception_messages=False)
    EARLY.error(secret, error=secret, errors=[secret], by={"name": secret})
    THIRD.error(secret)
    THIRD.error("%s of %s", secret, 2)
    THIRD.error("%(error)s", {"error": secret})
    THIRD.error("%d of %d", secret)

    lines = written.lines()
    assert b"SECRET" not in written.stream.getvalue()
    assert [line["msg"] for line in lines] == [
        "ValueError",
        "ValueError",
        "ValueError of 2",
        "ValueError",
        "%d of %d",
    ]
    assert (lines[0]["error"], lines[0]["errors"], lines[0]["by"]) == (
        "ValueError",
        ["ValueError"],
        {"name": "ValueError"},
    )
    assert str(secret) == "SECRET"


def test_a_record_stays_as_it_is_for_other_handlers() -> None:
    secret = ValueError("SECRET")
    record = logging.makeLogRecord({"name": "third", "levelno": 40, "msg": "%s", "args": (secret,)})
    written = Written(exception_messages=False)
    THIRD.handle(record)

    assert written.line()["msg"] == "ValueError"
    assert record.getMessage() == "SECRET"


def test_a_hostile_cause_costs_only_the_stack() -> None:
    class Bad(Exception):
        @property
        def __cause__(self) -> Any:
            raise RuntimeError

    written = Written(exception_messages=False)
    EARLY.error("x", exc_info=Bad())

    assert written.line()["exception"] == {"type": "Bad", "stack": ""}


def test_the_stack_can_be_asked_for() -> None:
    written = Written()
    EARLY.info("x", stack_info=True)
    THIRD.info("x", stack_info=True)

    for line in written.lines():
        assert line["stack"].startswith("Stack (most recent call last):\n")


# The standard library's records


def test_a_record_of_the_standard_library_has_our_form() -> None:
    written = Written()
    record = logging.makeLogRecord(
        {
            "name": "httpx",
            "levelno": logging.WARNING,
            "levelname": "\x1b[33mwarning",
            "msg": "HTTP %s %d",
            "args": ("GET", 503),
            "created": NOON,
            "level": "mine",
            "url": "http://x",
            "run_id": "r",
            "event": "call.retrying",
        }
    )
    logging.getLogger("httpx").handle(record)

    assert written.raw().decode() == (
        '{"ts":"2026-02-13 12:55:02","level":"WARNING","name":"httpx","msg":"HTTP GET 503",'
        '"time":"2026-02-13T12:55:02.123456Z","event":"call.retrying","run_id":"r",'
        '"extra_level":"mine","url":"http://x"}\n'
    )


def test_arguments_that_do_not_fit_the_format_are_kept() -> None:
    written = Written()
    THIRD.warning("%d of %d", "one")

    line = written.line()
    assert line["msg"] == "%d of %d"
    assert line["args"] == ["one"]


def test_a_record_that_nobody_can_write_is_counted() -> None:
    written = Written()
    THIRD.handle(logging.makeLogRecord({"name": "third", "levelno": 20, "created": float("nan")}))

    assert written.line()["dropped"] == 1
    assert written.logs.dropped == 1


def test_keys_that_are_no_text_cannot_pass_for_ours() -> None:
    class Key(Exception):
        def __str__(self) -> str:
            return "msg"

    written = Written()
    THIRD.info("real", extra=cast(Any, {Key(): "fake", 1: "one"}))

    line = written.line()
    assert (line["msg"], line["extra_msg"], line["1"]) == ("real", "fake", "one")


def test_uvicorn_logs_in_our_form_and_not_its_access_line() -> None:
    """As it is set up by `uvicorn --log-config` first, and then run by us."""
    uvicorn.Config(lambda: None)
    access = logging.getLogger("uvicorn.access")
    assert logging.getLogger("uvicorn").handlers
    try:
        written = Written()
        uvicorn.Config(lambda: None, log_config=None)
        logging.getLogger("uvicorn.error").info(
            "Started server process [%d]",
            7,
            extra={"color_message": "Started server process [\x1b[36m%d\x1b[0m]"},
        )
        access.info('%s - "%s"', "127.0.0.1", "GET /")
        assert not access.hasHandlers()  # what uvicorn asks before it makes an access line

        line = written.line()
        assert list(line) == ["ts", "level", "name", "msg", "time"]
        assert (line["name"], line["msg"]) == ("uvicorn.error", "Started server process [7]")
        assert logging.getLogger("uvicorn").handlers
        assert access.handlers
        assert not access.disabled
    finally:
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.setLevel(logging.NOTSET)
            logger.propagate = True


def test_warnings_are_lines() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        written = Written()
        warnings.warn("old\nway", DeprecationWarning, stacklevel=1)
        (line,) = written.lines()

    assert (line["level"], line["name"]) == ("WARNING", "py.warnings")
    assert "DeprecationWarning: old\nway" in line["msg"]


def test_handlers_that_were_there_write_nothing_and_come_back() -> None:
    other, later = logging.StreamHandler(io.StringIO()), logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(other)
    try:
        written = Written()
        THIRD.warning("x")
        root.addHandler(later)
        written.lines()

        assert other.stream.getvalue() == ""
        assert other in root.handlers
        assert later in root.handlers
    finally:
        root.removeHandler(other)
        root.removeHandler(later)


@pytest.mark.parametrize("configured", [True, False])
def test_what_structlog_was_told_before_comes_back(configured: bool) -> None:
    was_configured, config = structlog.is_configured(), structlog.get_config()
    own = [structlog.processors.JSONRenderer()]
    structlog.reset_defaults()
    if configured:
        structlog.configure(processors=own)
    try:
        Written().lines()

        assert structlog.is_configured() is configured
        assert (structlog.get_config()["processors"] is own) is configured
    finally:
        structlog.reset_defaults()
        if was_configured:
            structlog.configure(**config)


# The writer


def test_stdout_is_the_default(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with configure():
        EARLY.info("x")

    assert parsed(capsysbinary.readouterr().out)[0]["msg"] == "x"


def test_closing_twice_is_closing_once() -> None:
    written = Written()
    EARLY.info("x")
    written.logs.close()
    written.logs.close()

    assert written.line()["msg"] == "x"


def test_a_line_after_the_end_is_counted() -> None:
    written = Written()
    log = EARLY.bind()
    written.logs.close()
    log.info("late")

    assert written.raw() == b""
    assert written.logs.dropped == 1


def test_a_blocked_stream_stops_nobody_and_the_losses_are_told() -> None:
    stream = Blocked()
    with configure(stream=cast(BinaryIO, stream), queue_max=4, clock=lambda: NOON) as handle:
        EARLY.info("taken")
        assert stream.reached.wait(10)
        for number in range(10):
            EARLY.info("queued", number=number)
        assert handle.dropped == 6
        stream.opened.set()

    taken, *others = parsed(stream.data)
    notices = [line for line in others if line["name"] == "telemetry"]
    assert taken["msg"] == "taken"
    assert [line["number"] for line in others if line not in notices] == [0, 1, 2, 3]
    assert notices == [
        {
            "ts": "2026-02-13 12:55:02",
            "level": "WARNING",
            "name": "telemetry",
            "msg": "Log lines dropped",
            "time": "2026-02-13T12:55:02.123456Z",
            "event": "telemetry.degraded",
            "dropped": 6,
        }
    ]
    assert handle.dropped == 6


async def test_a_blocked_stream_does_not_stop_the_loop() -> None:
    stream = Blocked()
    handle = configure(stream=cast(BinaryIO, stream), queue_max=100)
    EARLY.info("taken")
    await asyncio.to_thread(stream.reached.wait, 10)
    ticks = 0
    for _ in range(1_000):
        EARLY.info("x")
        await asyncio.sleep(0)
        ticks += 1
    stream.opened.set()
    handle.close()

    assert ticks == 1_000
    assert handle.dropped == 900


def test_closing_gives_a_blocked_stream_only_so_long() -> None:
    stream = Blocked()
    handle = configure(stream=cast(BinaryIO, stream))
    EARLY.info("taken")
    assert stream.reached.wait(10)
    EARLY.info("lost")
    EARLY.info("lost")
    handle.close(timeout=0.01)

    assert handle.dropped == 2
    stream.opened.set()
    handle._writer._thread.join(10)
    taken, notice = parsed(stream.data)
    assert taken["msg"] == "taken"
    assert notice["dropped"] == 2


def test_a_stream_that_fails_loses_lines_and_not_the_thread() -> None:
    stream = Failing()
    with configure(stream=stream) as handle:
        EARLY.info("lost")
        assert stream.failed.wait(10)
        stream.takes = None
        EARLY.info("written")

    lines = parsed(stream.getvalue())
    assert [line["msg"] for line in lines if line["name"] == "early"] == ["written"]
    assert [line["dropped"] for line in lines if line["name"] == "telemetry"] == [1]
    assert handle.dropped == 1


def test_a_line_torn_by_a_failure_spoils_no_other() -> None:
    stream = Failing(takes=10)
    with configure(stream=stream) as handle:
        EARLY.info("torn")
        assert stream.failed.wait(10)
        stream.takes = None
        EARLY.info("written")

    torn, *lines = stream.getvalue().splitlines()
    assert torn == b'{"ts":"202'
    assert "written" in [json.loads(line)["msg"] for line in lines]
    assert handle.dropped == 1


def test_a_closed_stream_is_no_error() -> None:
    stream = io.BytesIO()
    with configure(stream=stream) as handle:
        stream.close()
        EARLY.info("lost")

    assert handle.dropped == 1


def test_a_stream_may_take_a_line_in_parts_or_not_yet() -> None:
    class Slow(io.RawIOBase):
        answers = iter([3, None, 5])
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int | None:
            taken = next(self.answers, len(data))
            self.data += bytes(data[:taken] if taken else b"")
            return taken

    stream = Slow()
    with configure(stream=cast(BinaryIO, stream)) as handle:
        EARLY.info("x")

    assert parsed(stream.data)[0]["msg"] == "x"
    assert handle.dropped == 0


def test_a_buffer_is_passed_by() -> None:
    """A stuck thread that held its lock would abort the interpreter at its end."""
    stream = Blocked()
    buffer = io.BufferedWriter(stream)
    handle = configure(stream=buffer)
    EARLY.info("taken")
    assert stream.reached.wait(10)
    flush = threading.Thread(target=buffer.flush, daemon=True)
    flush.start()
    flush.join(10)
    flushed = not flush.is_alive()
    stream.opened.set()
    handle.close()

    assert flushed
    assert parsed(stream.data)[0]["msg"] == "taken"


def test_lines_of_many_threads_stay_whole_and_in_order() -> None:
    written = Written()

    def work(thread: int) -> None:
        for number in range(200):
            EARLY.info("x" * number, thread=thread, number=number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    lines = written.lines()
    for n in range(8):
        assert [x["number"] for x in lines if x["thread"] == n] == list(range(200))


def test_a_write_is_no_longer_than_a_pipe_takes_whole() -> None:
    sizes: list[int] = []

    class Pipe(Blocked):
        def write(self, data: Any) -> int:
            sizes.append(len(data))
            return super().write(data)

    stream = Pipe()
    with configure(stream=cast(BinaryIO, stream)):
        for _ in range(1_000):
            EARLY.info("x" * 100)
        stream.opened.set()

    assert len(parsed(stream.data)) == 1_000
    assert max(sizes) <= 4096
    assert len(sizes) < 200


def test_what_is_queued_is_written_when_the_interpreter_ends() -> None:
    code = """
import structlog
from telemetry.logs import configure
configure()
for number in range(1000):
    structlog.get_logger("api").info("x", number=number)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert [line["number"] for line in parsed(done.stdout)] == list(range(1000))
    assert done.stderr == b""


@pytest.mark.parametrize(("level", "heard"), [("INFO", False), ("DEBUG", True)])
def test_http_clients_tell_of_every_request_only_when_asked(level: str, heard: bool) -> None:
    stream = io.BytesIO()
    with configure(level=level, stream=stream):
        logging.getLogger("httpx2").info("HTTP Request: GET /")
        logging.getLogger("httpx2").warning("odd")

    assert (b"HTTP Request" in stream.getvalue()) is heard
    assert b"odd" in stream.getvalue()


# What exporters say


def said(template: str, at: float, name: str = "opentelemetry.exporter", level: int = 30) -> None:
    record = {"name": name, "levelno": level, "msg": template, "args": (at,), "created": NOON + at}
    logging.getLogger(name).handle(logging.makeLogRecord(record))


def test_an_exporter_in_trouble_says_so_once_in_a_while() -> None:
    written = Written()
    for at in range(0, 700, 10):
        said("Failed after %d s", at)

    assert [(line["msg"], line.get("suppressed")) for line in written.lines()] == [
        ("Failed after 0 s", None),
        ("Failed after 300 s", 29),
        ("Failed after 600 s", 29),
        ("Failed after %d s", 9),  # told at the end
    ]
    assert written.logs.suppressed == 67


def test_each_kind_of_trouble_is_told() -> None:
    written = Written()
    for at in (0, 1, 2):
        said("Failed after %d s", at)
        said("Failed after %d s", at, level=logging.ERROR)
        said("Failed after %d s", at, name="opentelemetry.sdk")
        said("Dropped after %d s", at)
        said("Failed after %d s", at, name="opentelemetric")

    told = written.lines()
    assert [line["msg"] for line in told if line["name"] == "opentelemetric"] == [
        f"Failed after {at} s" for at in (0, 1, 2)
    ]
    assert len([line for line in told if line["name"] != "opentelemetric"]) == 4 + 4
    assert written.logs.suppressed == 8


def test_trouble_of_ever_new_words_is_told_no_oftener() -> None:
    written = Written()
    for number in range(1_000):
        said(f"Failed for the {number}. time %d", 0)

    lines = written.lines()
    assert len(lines) == 100 + 1 + 1
    assert lines[-1]["msg"] == "Other messages"
    assert lines[-1]["suppressed"] == written.logs.suppressed == 1_000 - 101


def test_a_clock_set_back_silences_nobody() -> None:
    written = Written()
    said("Failed after %d s", 0)
    said("Failed after %d s", -3_600)

    assert len(written.lines()) == 2


# Sinks, and what they lose


class Tank:
    """A sink that keeps what it takes; it may be shut."""

    name = "tank"

    def __init__(self, *, shut: bool = False) -> None:
        self.data = b""
        self.shut = shut
        self.closed = self.finished = False
        self.lost: Callable[[int], None] = lambda lines: None

    def attached(self, lost: Callable[[int], None]) -> None:
        self.lost = lost

    def takes(self, logger: str) -> bool:
        return logger != "third"

    def write(self, lines: bytes) -> int | None:
        if self.closed:
            raise ValueError
        if self.shut:
            return None
        self.data += lines
        return len(lines)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True


def test_a_sink_gets_the_lines_that_it_takes() -> None:
    written, tank = Written(), Tank()
    EARLY.info("before")
    written.logs.attach(tank)
    EARLY.info("both", value=[1, 2])
    THIRD.info("only stdout")
    lines = written.raw().splitlines()

    assert len(lines) == 3
    assert tank.data.splitlines() == [lines[1]]
    assert tank.finished
    assert tank.closed
    assert written.logs.losses == {}


def test_a_sink_can_leave_before_the_logs_end() -> None:
    written, tank, other = Written(), Tank(), Tank()
    written.logs.attach(tank)
    written.logs.attach(other)
    EARLY.info("both")
    written.logs.detach(tank)
    EARLY.info("after")

    assert tank.closed
    assert not other.closed
    assert [line["msg"] for line in written.lines()] == ["both", "after"]
    assert [line["msg"] for line in parsed(tank.data)] == ["both"]
    assert [line["msg"] for line in parsed(other.data)] == ["both", "after"]
    assert written.logs.losses == {}


def test_a_sink_that_takes_nothing_keeps_nobody_waiting() -> None:
    written, tank = Written(), Tank(shut=True)
    written.logs.attach(tank)
    for _ in range(20):
        EARLY.info("x")
    written.logs.close(timeout=0.05)
    for thread in threading.enumerate():
        if thread.name == "sereno-logs-tank":
            thread.join(10)

    assert len(written.lines()) == 20
    assert tank.data == b""
    assert written.logs.losses == {"tank": 20}


def test_what_a_sink_says_it_lost_is_counted() -> None:
    written, tank = Written(), Tank()
    written.logs.attach(tank)
    tank.lost(3)
    told: list[tuple[str, int]] = []
    written.logs.watch(lambda output, lines: told.append((output, lines)))
    tank.lost(4)
    written.logs.close()

    assert written.logs.losses == {"tank": 7}
    assert told == [("tank", 3), ("tank", 4)]


def test_losses_are_told_to_whoever_watches() -> None:
    stream = Blocked()
    told: list[tuple[str, int]] = []

    def watcher(output: str, lines: int) -> None:
        told.append((output, lines))
        if len(told) > 1:
            raise RuntimeError

    with configure(stream=cast(BinaryIO, stream), queue_max=2) as handle:
        EARLY.info("taken")
        assert stream.reached.wait(10)
        for _ in range(5):
            EARLY.info("x")
        handle.watch(watcher)
        EARLY.info("x")
        stream.opened.set()

    assert told == [("stdout", 3), ("stdout", 1)]
    assert handle.losses == {"stdout": 4}


def test_the_logs_of_the_moment_can_be_had() -> None:
    assert logs.current() is None
    written = Written()

    assert logs.current() is written.logs
