"""Makes every log line of the process, ours and other people's, one JSON object on stdout.

    {"ts": "2026-02-13 12:55:02", "level": "INFO", "name": "runtime", "msg": "Run started",
     "time": "2026-02-13T12:55:02.123456Z", "event": "run.started", "run_id": "…", …}

`ts`, `level`, `name` and `msg` come first and are always ours: an extra of such a name becomes
`extra_<name>`. Times are UTC. Our code logs by structlog, and calls the event by `event_type`, as
structlog says `event` for the message:

    log = structlog.get_logger("runtime")
    log.info("Run started", event_type="run.started", run_id=run_id)

Such a logger may be made before `configure()`, but a `bind()` fixes the configuration of its day.
Whoever logs only puts the line in a queue. A thread writes, so that a reader of stdout who stops
reading stops nobody here; what no longer fits is dropped and counted.
"""

from __future__ import annotations

import atexit
import io
import logging
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, BinaryIO

import structlog
from structlog.contextvars import merge_contextvars
from structlog.processors import StackInfoRenderer
from structlog.typing import EventDict

from telemetry.encoding import JsonEncoder

__all__ = ["LEVELS", "Logs", "configure", "reset"]

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

#: After the first keys and `event`, in this order; the other extras follow in theirs.
_IDS = ("run_id", "thread_id", "graph", "node", "attempt", "request_id", "seq")

#: What a LogRecord holds anyway. `color_message` is uvicorn's message again, with ANSI colours.
_RECORD = frozenset(logging.makeLogRecord({}).__dict__) | {
    "asctime",
    "color_message",
    "message",
    "taskName",
}

#: A pipe takes that many bytes whole, so that processes which share one do not tear lines.
_PIPE_BUF = 4096
_PATIENCE = 2.0
_RETRY = 0.02
_LONGEST_MESSAGE = 2_000
_LONGEST_STACK = 16_000

_Clock = Callable[[], float]


class Logs:
    """What `configure()` set up. Closing writes what is queued and puts all back as it was."""

    def __init__(self, writer: _Writer, undo: ExitStack) -> None:
        self._writer = writer
        self._undo = undo

    @property
    def dropped(self) -> int:
        """Lines that were never written, since `configure()`."""
        return self._writer.dropped

    def close(self, timeout: float = _PATIENCE) -> None:
        """Takes `timeout` seconds at most; what the stream has not taken by then is dropped."""
        self._undo.close()
        self._writer.close(timeout)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


_current: Logs | None = None


def configure(
    *,
    level: str = "INFO",
    stream: BinaryIO | None = None,
    queue_max: int = 10_000,
    clock: _Clock = time.time,
) -> Logs:
    """Send the lines of structlog, `logging` and `warnings` to `stream`, by default stdout.

    Takes the place of an earlier call. Run uvicorn with `log_config=None`, or it takes its own
    loggers back.
    """
    global _current
    number = _number(level)
    reset()
    lines = _Lines(clock)
    writer = _Writer(sys.stdout.buffer if stream is None else stream, queue_max, lines.dropped)
    undo = ExitStack()
    # At exit only what is queued is written: late lines should not turn up in another form.
    atexit.register(writer.close)
    undo.callback(atexit.unregister, writer.close)
    _configure_structlog(number, lines, writer, undo)
    _configure_logging(number, lines, writer, undo)
    _current = Logs(writer, undo)
    return _current


def reset() -> None:
    """Close what `configure()` set up last, if anything."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def _number(level: str) -> int:
    if level.upper() not in LEVELS:
        raise ValueError(f"unknown log level {level!r}; allowed are {', '.join(LEVELS)}")
    return logging.getLevelNamesMapping()[level.upper()]


def _configure_structlog(level: int, lines: _Lines, writer: _Writer, undo: ExitStack) -> None:
    if structlog.is_configured():
        undo.callback(structlog.configure, **structlog.get_config())
    undo.callback(structlog.reset_defaults)
    structlog.configure(
        processors=[merge_contextvars, StackInfoRenderer(), lines.of_event],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=lambda *args: _Logger(str(args[0]) if args else "root", writer),
        # A cached logger would outlive reset() and escape structlog.testing.capture_logs(). To
        # assemble one for every line costs 2 µs; a logger that was bound is assembled already.
        cache_logger_on_first_use=False,
    )


def _configure_logging(level: int, lines: _Lines, writer: _Writer, undo: ExitStack) -> None:
    root = logging.getLogger()
    _remember(root, undo)
    root.handlers.clear()
    root.addHandler(_Handler(level, lines, writer))
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        logger = logging.getLogger(name)
        _remember(logger, undo)
        logger.handlers.clear()
        # We write our own access line; without a handler uvicorn does not even make its.
        logger.disabled = name == "uvicorn.access"
        logger.propagate = not logger.disabled
    # A line at INFO for every request, and for every retry that we tell of ourselves.
    for name in ("httpx", "httpx2", "langgraph.pregel._retry"):
        logger = logging.getLogger(name)
        _remember(logger, undo)
        logger.setLevel(level if level < logging.INFO else max(level, logging.WARNING))
    logging.captureWarnings(True)
    undo.callback(logging.captureWarnings, False)


def _remember(logger: logging.Logger, undo: ExitStack) -> None:
    """Have `undo` put a logger back; handlers that others add in the meantime stay."""
    handlers, level = logger.handlers[:], logger.level
    propagate, disabled = logger.propagate, logger.disabled

    def put_back() -> None:
        kept = [handler for handler in logger.handlers if not isinstance(handler, _Handler)]
        logger.handlers[:] = handlers + [other for other in kept if other not in handlers]
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled

    undo.callback(put_back)


class _Lines:
    """Gives every line its form."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._encode = JsonEncoder().encode
        self._second = (-1, "", "")

    def of_event(self, logger: Any, method: str, fields: EventDict) -> bytes:
        """The last processor of structlog's chain."""
        msg = fields.pop("event", "")
        event = fields.pop("event_type", None)
        return self._line(self._clock(), method.upper(), logger.name, msg, event, fields)

    def of_record(self, record: logging.LogRecord) -> bytes:
        fields = {
            key if type(key) is str else _text(key): value
            for key, value in record.__dict__.items()
            if key not in _RECORD
        }
        try:
            msg = record.getMessage()
        except Exception:  # arguments that do not fit the format, or cannot be shown
            msg = _text(record.msg)
            fields["args"] = record.args
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        if record.stack_info:
            fields["stack"] = record.stack_info
        merge_contextvars(None, "", fields)
        event = fields.pop("event", None)
        event = fields.pop("event_type", event)
        return self._line(record.created, _level(record.levelno), record.name, msg, event, fields)

    def dropped(self, lines: int) -> bytes:
        msg, event = "Log lines dropped", "telemetry.degraded"
        return self._line(self._clock(), "WARNING", "telemetry", msg, event, {"dropped": lines})

    def _line(
        self, now: float, level: str, name: str, msg: object, event: object, fields: EventDict
    ) -> bytes:
        second, micros = divmod(round(now * 1_000_000), 1_000_000)
        ts, time_ = self._stamps(second)
        line: dict[str, object] = {
            "ts": ts,
            "level": level,
            "name": name,
            "msg": msg if type(msg) is str else _text(msg),
            "time": f"{time_}.{micros:06}Z",
        }
        if event is not None:
            line["event"] = event
        for key in _IDS:
            if key in fields:
                line[key] = fields.pop(key)
        if "exc_info" in fields and (error := _error(fields.pop("exc_info"))) is not None:
            line["exception"] = _exception(error)
        for key, value in fields.items():
            while key in line:
                key = f"extra_{key}"
            line[key] = value
        return _without_controls(self._encode(line)) + b"\n"

    def _stamps(self, second: int) -> tuple[str, str]:
        known, ts, time_ = self._second
        if known != second:
            ts = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%d %H:%M:%S}"
            time_ = ts.replace(" ", "T")
            self._second = (second, ts, time_)
        return ts, time_


def _level(number: int) -> str:
    """The standard name at or below a level of somebody's own."""
    return LEVELS[min(max(number // 10, 1), len(LEVELS)) - 1]


def _text(value: object) -> str:
    try:
        return str.__str__(str(value))
    except Exception:
        return f"<unprintable {type(value).__name__}>"


def _error(exc_info: Any) -> BaseException | None:
    """What `exc_info=` means: an exception, what sys.exc_info() returned, or just yes."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple) and len(exc_info) == 3:
        value: BaseException | None = exc_info[1]
        return value
    return sys.exc_info()[1] if exc_info else None


def _exception(error: BaseException) -> dict[str, str]:
    try:
        stack = "".join(traceback.format_exception(error))
    except Exception:  # a hostile cause or note
        stack = ""
    if len(stack) > _LONGEST_STACK:
        half = _LONGEST_STACK // 2
        stack = f"{stack[:half]}\n…\n{stack[-half:]}"
    return {
        "type": type(error).__name__,
        "message": _text(error)[:_LONGEST_MESSAGE],
        "stack": stack,
    }


_C1 = re.compile(rb"\xc2[\x80-\x9f]")


def _without_controls(line: bytes) -> bytes:
    """JSON escapes ESC and its like, but not U+009B, with which ANSI sequences begin as well."""
    if line.isascii():
        return line
    return _C1.sub(lambda match: rb"\u%04x" % ord(match[0].decode()), line)


class _Logger:
    """What structlog hands a rendered line to."""

    __slots__ = ("_write", "name")

    def __init__(self, name: str, writer: _Writer) -> None:
        self.name = name
        self._write = writer.write

    def info(self, line: bytes) -> None:
        self._write(line)

    debug = warning = error = critical = info


class _Handler(logging.Handler):
    """Takes the records of everybody who logs by the standard library."""

    def __init__(self, level: int, lines: _Lines, writer: _Writer) -> None:
        super().__init__(level)
        self._lines = lines
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self._lines.of_record(record))
        except Exception:  # a record that somebody built by hand, or no stack left
            self._writer.drop(1)


class _Writer:
    """Writes lines to a stream from a thread of its own, and never keeps its caller waiting."""

    def __init__(self, stream: BinaryIO, most: int, notice: Callable[[int], bytes]) -> None:
        self._stream = stream  # a buffer that nobody holds closes its raw stream
        # Past the buffer, whose lock a stuck write would hold: the interpreter flushes stdout
        # last of all, and aborts the process when it cannot have that lock.
        self._raw: Any = stream.raw if isinstance(stream, io.BufferedWriter) else stream
        self._most = most
        self._notice = notice
        # Its put() may interrupt itself, for instance when __del__ logs; None says that this is
        # the end. Threads that find the last place free at once may each take it.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._mend = b""
        self._told = 0
        self._dropped = 0
        self._counting = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="sereno-logs", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._dropped

    def write(self, line: bytes) -> None:
        if self._closed or self._queue.qsize() >= self._most:
            self.drop(1)
        else:
            self._queue.put(line)

    def drop(self, lines: int) -> None:
        with self._counting:
            self._dropped += lines

    def close(self, timeout: float = _PATIENCE) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            while self._waiting():
                self.drop(1)
            self._queue.put(None)

    def _run(self) -> None:
        line = self._queue.get()
        while line is not None:
            batch, size = [line], len(line)
            while (line := self._waiting()) and (size := size + len(line)) <= _PIPE_BUF:
                batch.append(line)
            self._send(b"".join(batch))
            if line == b"":
                line = self._queue.get()
        self._send(b"")

    def _waiting(self) -> bytes | None:
        """The next line; empty when there is none yet, None when there will be none."""
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            return b""

    def _send(self, lines: bytes) -> None:
        # Losses are told once there is room again, not with every batch of a jam.
        dropped = self._dropped if self._queue.qsize() <= self._most // 2 else self._told
        whole = rest = self._mend + lines
        try:
            if dropped > self._told:
                whole = rest = self._mend + self._notice(dropped - self._told) + lines
            while rest:
                if not (taken := self._raw.write(rest)):  # a full pipe that does not block
                    time.sleep(_RETRY)
                    continue
                rest = rest[taken:]
            self._raw.flush()
            self._mend, self._told = b"", dropped
        except Exception:  # nobody reads any more, the disk is full, the stream is closed
            lost = rest or lines
            self.drop(min(lost.count(b"\n"), lines.count(b"\n")))
            if len(rest) < len(whole):  # what follows a torn line begins a new one
                self._mend = b"" if whole[: len(whole) - len(rest)].endswith(b"\n") else b"\n"
