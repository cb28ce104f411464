"""Makes every log line of the process, ours and other people's, one JSON object on stdout.

    {"ts": "2026-02-13 12:55:02", "level": "INFO", "name": "runtime", "msg": "Run started",
     "time": "2026-02-13T12:55:02.123456Z", "event": "run.started", "run_id": "…", …}

`ts`, `level`, `name` and `msg` come first and are always ours: an extra of such a name becomes
`extra_<name>`. Times are UTC. Our code logs by structlog, and calls the event by `event_type`, as
structlog says `event` for the message:

    log = structlog.get_logger("runtime")
    log.info("Run started", event_type="run.started", run_id=run_id)

Such a logger may be made before `configure()`, but a `bind()` fixes the configuration of its day.

A line says by itself in which trace it was logged, and in which run: `trace_id` and `span_id` are
those of the current span, the rest is what `identify` knows. What the caller says goes first.

Whoever logs only puts the line in a queue. A thread writes, so that a reader of stdout who stops
reading stops nobody here; what no longer fits is dropped and counted. Each sink that is attached
gets the same lines by a queue and a thread of its own.
"""

from __future__ import annotations

import atexit
import copy
import io
import logging
import math
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, Protocol

import structlog
from opentelemetry import trace
from structlog.contextvars import merge_contextvars
from structlog.processors import StackInfoRenderer
from structlog.typing import EventDict

from telemetry.contract import classify
from telemetry.encoding import JsonEncoder
from telemetry.stacks import stack

__all__ = ["LEVELS", "Logs", "Sink", "configure", "current", "reset"]

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

#: After the first keys and `event`, in this order; the other extras follow in theirs.
_IDS = (
    *("trace_id", "span_id", "trace_kept"),
    *("run_id", "thread_id", "graph", "node", "attempt", "request_id", "seq"),
)

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

#: Others say once more what we tell of: each request, each retry, each export that failed
#: (`telemetry.degraded`). Unless somebody debugs, they begin at this level.
_OTHERS = {
    "httpx": logging.WARNING,
    "httpx2": logging.WARNING,
    "langgraph.pregel._retry": logging.WARNING,
    "opentelemetry.exporter.otlp": logging.CRITICAL,
}
#: These put an exception's message into their own, whatever it quotes.
_QUOTING = {"langgraph.pregel._retry"}

#: An exporter in trouble says so with every batch: of a kind, one passes in that many seconds.
_NOISY = "opentelemetry"
_QUIET = 300.0
_MOST_KINDS = 100

_Clock = Callable[[], float]
_Identify = Callable[[], Mapping[str, object]]
_NOTHING: Mapping[str, object] = MappingProxyType({})


class Sink(Protocol):
    """Takes every line beside stdout. A thread of its own calls `write`, `flush` and `finish`."""

    @property
    def name(self) -> str:
        """What its losses are counted under."""

    def attached(self, lost: Callable[[int], None]) -> None:
        """Called first, with what to call for lines that it takes and loses."""

    def takes(self, logger: str) -> bool:
        """Whether it wants the line that this thread is about to log. Must be cheap."""

    def write(self, lines: bytes) -> int | None:
        """Take whole lines and say how many bytes that were; none means: not yet."""

    def flush(self) -> None: ...

    def finish(self) -> None:
        """Deliver what was taken. Called after the last line, and may take any time."""

    def close(self) -> None:
        """Give up what is not delivered; from now on `write` raises. Must not block."""


class Logs:
    """What `configure()` set up. Closing writes what is queued and puts all back as it was."""

    def __init__(self, lines: _Lines, outputs: _Outputs, quiet: _Quiet, undo: ExitStack) -> None:
        self._lines = lines
        self._outputs = outputs
        self._writer = outputs.stdout
        self._quiet = quiet
        self._undo = undo
        # At exit only what is queued is written: late lines should not turn up in another form.
        atexit.register(self._finish)
        undo.callback(atexit.unregister, self._finish)

    @property
    def dropped(self) -> int:
        """Lines that stdout never got, since `configure()`."""
        return self._writer.dropped

    @property
    def suppressed(self) -> int:
        """Records of exporters that were left out because others said the same."""
        return self._quiet.suppressed

    @property
    def losses(self) -> dict[str, int]:
        """Lines lost so far, by output: `stdout`, and the name of each sink."""
        return self._outputs.losses.count.copy()

    def watch(self, lost: Callable[[str, int], None]) -> None:
        """Tell of losses, those until now at once. Comes in any thread, and must not block."""
        self._outputs.losses.watch(lost)

    def attach(self, sink: Sink) -> None:
        """Give every line from now on to a sink as well."""
        self._outputs.attach(sink)

    def detach(self, sink: Sink, timeout: float = _PATIENCE) -> None:
        """Close a sink, which takes that long at most. Sinks still attached close with the logs."""
        self._outputs.detach(timeout, sink)

    def close(self, timeout: float = _PATIENCE) -> None:
        """Takes little more than `timeout` seconds; what is not written by then is dropped."""
        self._finish(timeout, self._undo.close)

    def _finish(
        self, timeout: float = _PATIENCE, between: Callable[[], None] = lambda: None
    ) -> None:
        deadline = time.monotonic() + timeout
        self._outputs.detach(timeout)  # while their complaints can still be written
        for kind, count in self._quiet.rest():
            self._outputs.write(kind.logger, self._lines.suppressed(kind, count))
        between()
        self._writer.close(max(deadline - time.monotonic(), timeout / 4))

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
    constants: Mapping[str, object] = _NOTHING,
    identify: _Identify = lambda: _NOTHING,
    exception_messages: bool = True,
) -> Logs:
    """Send the lines of structlog, `logging` and `warnings` to `stream`, by default stdout.

    `constants` are on every line. `identify` is asked with every line, in the context of whoever
    logs it, for ids that are not given. Without `exception_messages` an exception is its type and
    its stack, wherever a line holds one as such.

    Takes the place of an earlier call. Run uvicorn with `log_config=None`, or it takes its own
    loggers back.
    """
    global _current
    number = _number(level)
    reset()
    lines = _Lines(clock, constants, identify, exception_messages)
    outputs = _Outputs(sys.stdout.buffer if stream is None else stream, queue_max, lines.dropped)
    quiet = _Quiet()
    undo = ExitStack()
    _configure_structlog(number, lines, outputs, undo)
    _configure_logging(number, _Handler(number, lines, outputs, quiet), undo)
    _current = Logs(lines, outputs, quiet, undo)
    return _current


def current() -> Logs | None:
    """What `configure()` set up last, unless it was reset."""
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


def _configure_structlog(level: int, lines: _Lines, outputs: _Outputs, undo: ExitStack) -> None:
    if structlog.is_configured():
        undo.callback(structlog.configure, **structlog.get_config())
    undo.callback(structlog.reset_defaults)
    structlog.configure(
        processors=[merge_contextvars, StackInfoRenderer(), lines.of_event],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=lambda *args: _Logger(str(args[0]) if args else "root", outputs),
        # A cached logger would outlive reset() and escape structlog.testing.capture_logs(). To
        # assemble one for every line costs 2 µs; a logger that was bound is assembled already.
        cache_logger_on_first_use=False,
    )


def _configure_logging(level: int, handler: _Handler, undo: ExitStack) -> None:
    root = logging.getLogger()
    _remember(root, undo)
    root.handlers.clear()
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        logger = logging.getLogger(name)
        _remember(logger, undo)
        logger.handlers.clear()
        # We write our own access line; without a handler uvicorn does not even make its.
        logger.disabled = name == "uvicorn.access"
        logger.propagate = not logger.disabled
    for name, floor in _OTHERS.items():
        logger = logging.getLogger(name)
        _remember(logger, undo)
        debugging = level < logging.INFO and name not in _QUOTING
        logger.setLevel(level if debugging else max(level, floor))
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

    def __init__(
        self, clock: _Clock, constants: Mapping[str, object], identify: _Identify, messages: bool
    ) -> None:
        self._clock = clock
        self._constants = dict(constants)
        self._identify = identify
        self._messages = messages
        self._encode = JsonEncoder().encode
        self._second = (-1, "", "")
        self._span: tuple[trace.SpanContext, dict[str, str]] = (trace.INVALID_SPAN_CONTEXT, {})

    def of_event(self, logger: Any, method: str, fields: EventDict) -> bytes:
        """The last processor of structlog's chain. Empty when no stack is left to write on."""
        try:
            msg = fields.pop("event", "")
            event = fields.pop("event_type", None)
            return self._line(self._clock(), method.upper(), logger.name, msg, event, fields)
        except Exception:
            return b""

    def of_record(self, record: logging.LogRecord, **more: object) -> bytes:
        if not self._messages:
            record = copy.copy(record)
            record.msg, record.args = _unsaid(record.msg), _unsaid(record.args)
        fields = {
            key if type(key) is str else _text(key): value
            for key, value in record.__dict__.items()
            if key not in _RECORD
        }
        fields.update(more)
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

    def suppressed(self, kind: _Kind, count: int) -> bytes:
        level, fields = _level(kind.level), {"suppressed": count}
        return self._line(self._clock(), level, kind.logger, kind.template, None, fields)

    def _line(
        self, now: float, level: str, name: str, msg: object, event: object, fields: EventDict
    ) -> bytes:
        second, micros = divmod(round(now * 1_000_000), 1_000_000)
        ts, time_ = self._stamps(second)
        if not self._messages:
            msg = _unsaid(msg)
        line: dict[str, object] = {
            "ts": ts,
            "level": level,
            "name": name,
            "msg": msg if type(msg) is str else _text(msg),
            "time": f"{time_}.{micros:06}Z",
        }
        if event is not None:
            line["event"] = event
        self._correlate(fields)
        for key in _IDS:
            if key in fields:
                line[key] = fields.pop(key)
        line.update(self._constants)
        if "exc_info" in fields and (error := _error(fields.pop("exc_info"))) is not None:
            line["exception"] = self._exception(error)
        for key, value in fields.items():
            while key in line:
                key = f"extra_{key}"
            line[key] = value if self._messages else _unsaid(value)
        return _without_controls(self._encode(line)) + b"\n"

    def _correlate(self, fields: EventDict) -> None:
        """Add the ids that the surroundings know and nobody gave."""
        try:
            if "trace_id" not in fields and "span_id" not in fields:
                fields.update(self._span_ids())
            elif fields.get("trace_id"):
                fields.setdefault("trace_kept", "true")
            for key, value in self._identify().items():
                if key not in fields:
                    fields[key] = value
        except Exception:  # a line without ids is better than none
            return

    def _span_ids(self) -> dict[str, str]:
        context = trace.get_current_span().get_span_context()
        known, ids = self._span
        if context is not known:
            ids = {}
            if context.is_valid:
                ids = {
                    "trace_id": f"{context.trace_id:032x}",
                    "span_id": f"{context.span_id:016x}",
                    "trace_kept": "true",  # every trace is, until there is sampling
                }
            self._span = (context, ids)
        return ids

    def _exception(self, error: BaseException) -> dict[str, str]:
        shown = {"type": type(error).__name__}
        if self._messages and classify(error) != "validation":
            shown["message"] = _text(error)[:_LONGEST_MESSAGE]
        return {**shown, "stack": stack(error, messages=self._messages)}

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
    except BaseException:
        return f"<unprintable {type(value).__name__}>"


def _error(exc_info: Any) -> BaseException | None:
    """What `exc_info=` means: an exception, what sys.exc_info() returned, or just yes."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple) and len(exc_info) == 3:
        value: BaseException | None = exc_info[1]
        return value
    return sys.exc_info()[1] if exc_info else None


def _unsaid(value: Any) -> Any:
    """A value without the messages of the exceptions in it: they become their types."""
    if type(value) is dict:
        return {key: _type_of(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_type_of, value))
    return _type_of(value)


def _type_of(value: Any) -> Any:
    return type(value).__name__ if isinstance(value, BaseException) else value


_C1 = re.compile(rb"\xc2[\x80-\x9f]")


def _without_controls(line: bytes) -> bytes:
    """JSON escapes ESC and its like, but not U+009B, with which ANSI sequences begin as well."""
    if line.isascii():
        return line
    return _C1.sub(lambda match: rb"\u%04x" % ord(match[0].decode()), line)


class _Logger:
    """What structlog hands a rendered line to."""

    __slots__ = ("_write", "name")

    def __init__(self, name: str, outputs: _Outputs) -> None:
        self.name = name
        self._write = outputs.write

    def info(self, line: bytes) -> None:
        self._write(self.name, line)

    debug = warning = error = critical = info


class _Handler(logging.Handler):
    """Takes the records of everybody who logs by the standard library."""

    def __init__(self, level: int, lines: _Lines, outputs: _Outputs, quiet: _Quiet) -> None:
        super().__init__(level)
        self._lines = lines
        self._outputs = outputs
        self._quiet = quiet

    def emit(self, record: logging.LogRecord) -> None:
        try:
            more = {}
            if record.name.startswith(_NOISY):
                if (count := self._quiet.passes(record)) is None:
                    return
                if count:
                    more = {"suppressed": count}
            line = self._lines.of_record(record, **more)
        except Exception:  # a record that somebody built by hand, or no stack left
            line = b""
        self._outputs.write(record.name, line)


class _Kind(NamedTuple):
    logger: str
    level: int
    template: str


class _Quiet:
    """Lets one record of a kind pass from time to time, which says how many it stands for."""

    def __init__(self) -> None:
        self.suppressed = 0
        self._kinds: dict[_Kind, tuple[float, int]] = {}
        self._lock = threading.RLock()  # __del__ may log while this thread holds it

    def passes(self, record: logging.LogRecord) -> int | None:
        """How many records of its kind were suppressed before it; None when it is, too."""
        kind = _Kind(record.name, record.levelno, _text(record.msg)[:_LONGEST_MESSAGE])
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
                kind = _Kind(_NOISY, record.levelno, "Other messages")
            since, count = self._kinds.get(kind, (-math.inf, 0))
            if 0 <= record.created - since < _QUIET:
                self._kinds[kind] = (since, count + 1)
                self.suppressed += 1
                return None
            self._kinds[kind] = (record.created, 0)
            return count

    def rest(self) -> list[tuple[_Kind, int]]:
        """What was suppressed and not told of since. Telling is once."""
        with self._lock:
            rest = [(kind, count) for kind, (_, count) in self._kinds.items() if count]
            self._kinds.clear()
        return rest


class _Losses:
    """Counts the lines that each output lost."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}
        self._lost: Callable[[str, int], None] = lambda output, lines: None
        self._lock = threading.RLock()  # __del__ may log while this thread holds it

    def add(self, output: str, lines: int) -> None:
        with self._lock:
            self.count[output] = self.count.get(output, 0) + lines
            with suppress(Exception):
                self._lost(output, lines)

    def watch(self, lost: Callable[[str, int], None]) -> None:
        with self._lock:
            for output, lines in self.count.items():
                lost(output, lines)
            self._lost = lost


class _Outputs:
    """Where lines go: stdout, and the sinks."""

    def __init__(self, stdout: BinaryIO, most: int, notice: Callable[[int], bytes]) -> None:
        self.losses = _Losses()
        self._most = most
        self._notice = notice
        self._sinks: tuple[tuple[Sink, _Writer], ...] = ()
        self.stdout = self._writer(stdout, "sereno-logs", "stdout")

    def _writer(
        self,
        stream: BinaryIO | Sink,
        thread: str,
        output: str,
        finish: Callable[[], None] = lambda: None,
    ) -> _Writer:
        lost = partial(self.losses.add, output)
        return _Writer(stream, self._most, self._notice, lost, thread, finish)

    def write(self, logger: str, line: bytes) -> None:
        if not line:
            self.stdout.drop(1)
            return
        self.stdout.write(line)
        for sink, writer in self._sinks:
            if sink.takes(logger):
                writer.write(line)

    def attach(self, sink: Sink) -> None:
        sink.attached(partial(self.losses.add, sink.name))
        writer = self._writer(sink, f"sereno-logs-{sink.name}", sink.name, sink.finish)
        self._sinks += ((sink, writer),)

    def detach(self, timeout: float, only: Sink | None = None) -> None:
        leaving = [each for each in self._sinks if only is None or each[0] is only]
        self._sinks = tuple(each for each in self._sinks if each not in leaving)
        deadline = time.monotonic() + timeout
        for sink, writer in leaving:
            writer.close(max(deadline - time.monotonic(), 0))
            sink.close()


class _Writer:
    """Writes lines to a stream from a thread of its own, and never keeps its caller waiting."""

    def __init__(
        self,
        stream: BinaryIO | Sink,
        most: int,
        notice: Callable[[int], bytes],
        lost: Callable[[int], None],
        thread: str,
        finish: Callable[[], None],
    ) -> None:
        self._stream = stream  # a buffer that nobody holds closes its raw stream
        # Past the buffer, whose lock a stuck write would hold: the interpreter flushes stdout
        # last of all, and aborts the process when it cannot have that lock.
        self._raw: Any = stream.raw if isinstance(stream, io.BufferedWriter) else stream
        self._most = most
        self._notice = notice
        self._lost = lost
        self._finish = finish
        # Its put() may interrupt itself, for instance when __del__ logs; None says that this is
        # the end. Threads that find the last place free at once may each take it.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._mend = b""
        self._told = 0
        self._dropped = 0
        self._counting = threading.RLock()
        self._thread = threading.Thread(target=self._run, name=thread, daemon=True)
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
        self._lost(lines)

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
        with suppress(Exception):
            self._finish()

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
