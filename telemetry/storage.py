"""What an engine tells of itself: its commits, what it refuses, and its use of checkpoints."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token, copy_context
from types import TracebackType
from typing import Any, Literal, Self

import structlog
from opentelemetry.trace import SpanKind, get_current_span

from telemetry.contract import classify, error_type
from telemetry.metrics import Metrics
from telemetry.tracing import Tracing, new_context

__all__ = ["Op", "Operation", "StorageObserver", "StorageTelemetry", "weigh"]

Op = Literal["put", "get", "list"]

#: Seconds from which on an operation is told of by a span and a record.
SLOW_S = 0.25
#: Seconds between two of these records: a stall makes all operations slow that it meets.
PAUSE_S = 60.0
#: Backends whose `db.system.name` the semantic conventions know.
_SYSTEMS = frozenset(("sqlite", "postgresql"))
#: The `code` of an error that says that the writer's lease is gone.
_FENCED = "lease_lost"


class Operation:
    """One use of the checkpoints, around the code that does it; does nothing.

    It ends with its block, unless `posted` is set: then whoever knows the result calls `end`.
    """

    __slots__ = ("posted", "size")

    def __init__(self) -> None:
        self.posted = False
        #: Bytes that went through the serialiser.
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def end(self, error: BaseException | None = None) -> None:
        """It is done, or failed. Once is enough."""


#: Where the serialiser counts.
_current: ContextVar[Operation | None] = ContextVar("sereno_checkpoint_operation", default=None)


def weigh(size: int) -> None:
    """For a serialiser: so many bytes were made or read for the operation around it."""
    operation = _current.get()
    if operation is not None:
        operation.size += size


class StorageObserver:
    """What an engine tells; does nothing. The writer's and the heartbeat's threads call it too."""

    def committed(self, seconds: float, *, failed: bool) -> None:
        """A group of writes was committed, `seconds` after the first of them was posted."""

    def fenced(self, kind: Literal["event", "checkpoint"], count: int = 1) -> None:
        """Writes were refused, as their writer has no lease any more."""

    def not_renewed(self, leases: int) -> None:
        """Leases were lost to another epoch, or could not be renewed."""

    def checkpoint(self, op: Op, backend: str, run: Mapping[str, Any]) -> Operation:
        """An operation on checkpoints begins; `run` is what its span says of the run."""
        return _UNOBSERVED


_UNOBSERVED = Operation()


class StorageTelemetry(StorageObserver):
    """Counts all of it. A checkpoint operation has a span only if it was slow, or failed.

    `identify` is asked where the operation began, for what its span shall say beyond the lease.
    To be closed: what is held back is told then at the latest.
    """

    def __init__(
        self,
        metrics: Metrics,
        tracing: Tracing | None = None,
        *,
        slow_s: float = SLOW_S,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[float, Callable[[], None]], threading.Timer] = threading.Timer,
        identify: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._tracing = tracing
        self._slow_s = slow_s
        self._pause_s = pause_s
        self._clock = clock
        self._make_timer = timer
        self._lock = threading.RLock()
        #: When a slow one was told of; how many there were since, and the slowest of them.
        self._told = -math.inf
        self._slow = 0
        self._slowest: dict[str, Any] = {}
        #: Tells of them when no other one does.
        self._timer: threading.Timer | None = None
        self._closed = False
        self._identify = identify
        self._log = structlog.get_logger("telemetry")
        self._commits = metrics["log_commit_seconds"]
        self._fenced = metrics["fenced_writes_total"]
        self._not_renewed = metrics["lease_renew_failures_total"]
        self._durations = metrics["checkpoint_duration_seconds"]
        self._sizes = metrics["checkpoint_bytes"]
        self._failures = metrics["telemetry_internal_errors_total"]

    def committed(self, seconds: float, *, failed: bool) -> None:
        self._commits.observe(seconds, "error" if failed else "success")

    def fenced(self, kind: Literal["event", "checkpoint"], count: int = 1) -> None:
        self._fenced.inc(kind, by=count)

    def not_renewed(self, leases: int) -> None:
        self._not_renewed.inc(by=leases)

    def checkpoint(self, op: Op, backend: str, run: Mapping[str, Any]) -> Operation:
        return _Observed(self, op, backend, run)

    def _ended(self, operation: _Observed, error: BaseException | None) -> None:
        seconds = time.perf_counter() - operation.began
        self._durations.observe(seconds, operation.op, operation.backend)
        if operation.size:
            self._sizes.observe(operation.size, operation.op, operation.backend)
        if getattr(error, "code", None) == _FENCED:
            self.fenced("checkpoint")
        elif error is not None or seconds >= self._slow_s:
            try:
                operation.context.run(self._tell, operation, error, seconds)
            except Exception:
                self._failures.inc("storage")

    def _tell(self, operation: _Observed, error: BaseException | None, seconds: float) -> None:
        """Write the span afterwards, below what was current when the operation began."""
        name, end_ns = f"checkpoint {operation.op}", time.time_ns()
        if self._tracing is not None:
            around = get_current_span().get_span_context()
            parent = around if around.is_valid else None
            failure = {} if error is None else {"sereno.error.class": classify(error)}
            self._tracing.write(
                name,
                context=new_context(parent.trace_id if parent else None),
                parent=parent,
                kind=SpanKind.CLIENT,
                attributes={
                    **operation.run,
                    **self._identify(),
                    "db.system.name": _system(operation.backend),
                    "sereno.checkpoint.bytes": operation.size,
                    **failure,
                },
                start_ns=end_ns - int(seconds * 1e9),
                end_ns=end_ns,
                error=error_type(error) if error is not None else None,
            )
        if seconds >= self._slow_s:
            self._warn(operation, seconds)

    def _warn(self, operation: _Observed, seconds: float) -> None:
        this = {
            "op": operation.op,
            "duration_s": round(seconds, 3),
            "bytes": operation.size,
            "run_id": operation.run.get("sereno.run.id"),
            "thread_id": operation.run.get("sereno.thread.id"),
        }
        with self._lock:
            self._slow += 1
            if not self._slowest or this["duration_s"] > self._slowest["duration_s"]:
                self._slowest = this
            wait = self._told + self._pause_s - self._clock()
            if wait <= 0:
                self._say(this)
            elif self._timer is None and not self._closed:
                self._timer = self._make_timer(wait, self._say_held)
                self._timer.daemon = True
                self._timer.start()

    def _say_held(self) -> None:
        try:
            with self._lock:
                if self._slow:
                    self._say(self._slowest)
        except Exception:
            self._failures.inc("storage")

    def _say(self, this: Mapping[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        count, longest_s = self._slow, self._slowest["duration_s"]
        self._told, self._slow, self._slowest = self._clock(), 0, {}
        self._log.warning(
            "Checkpoint slow",
            event_type="checkpoint.slow",
            **this,
            count=count,
            longest_s=longest_s,
        )

    def close(self) -> None:
        """Tell what is held back; nothing is from now on."""
        with self._lock:
            self._closed = True
        self._say_held()


class _Observed(Operation):
    __slots__ = ("_ended", "_storage", "_token", "backend", "began", "context", "op", "run")

    def __init__(
        self, storage: StorageTelemetry, op: Op, backend: str, run: Mapping[str, Any]
    ) -> None:
        self.posted = False
        self.size = 0
        self.op = op
        self.backend = backend
        self.run = run
        #: Whoever calls `end` does so in another context than this.
        self.context = copy_context()
        self._storage = storage
        self._ended = False
        self.began = time.perf_counter()

    def __enter__(self) -> Self:
        self._token: Token[Operation | None] = _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _current.reset(self._token)
        failed = isinstance(error, Exception)  # who is cancelled has not failed
        if failed or not self.posted:
            self.end(error if failed else None)

    def end(self, error: BaseException | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._storage._ended(self, error)


def _system(backend: str) -> str:
    return backend if backend in _SYSTEMS else f"sereno.{backend}"
