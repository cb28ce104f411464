"""What can go wrong, as one family, so that a caller can catch as much of it as it means to.

SerenoError
├── InvalidRequest            a field of a request cannot be used; names the field and the remedy
├── NotFound
│   ├── UnknownRun
│   ├── UnknownThread
│   └── UnknownGraph          carries the names that are known
├── Conflict
│   ├── ThreadBusy            another run has the thread; carries its id
│   ├── ThreadHeld            a cancelled run's thread-pool function is still running on it
│   └── NotRecorded           the run was started without what is asked for
├── CursorAhead               a reader is ahead of the log
├── Unavailable               not now: try again
│   ├── Draining
│   ├── QueueFull
│   └── StorageFailed
├── LeaseLost                 a writer's permission has gone to another epoch
├── LogLimit                  a run wrote more than its budget
└── StartupError              the server cannot start
    ├── EngineLocked          another process owns the file
    ├── StoreUnusable         the file is not ours, or cannot be written
    ├── GraphLoadFailed       a graph's file, attribute or factory did not give a graph
    ├── SeamBroken            LangGraph's insides are not those that we know
    └── BadSetting
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BadSetting",
    "Conflict",
    "CursorAhead",
    "Draining",
    "EngineLocked",
    "GraphLoadFailed",
    "InvalidRequest",
    "LeaseLost",
    "LogLimit",
    "NotFound",
    "NotRecorded",
    "QueueFull",
    "SeamBroken",
    "SerenoError",
    "StartupError",
    "StorageFailed",
    "StoreUnusable",
    "ThreadBusy",
    "ThreadHeld",
    "Unavailable",
    "UnknownGraph",
    "UnknownRun",
    "UnknownThread",
]


class SerenoError(Exception):
    """The base of everything that Sereno raises on purpose."""

    #: Stable machine name, the `code` of a problem on the wire.
    code = "internal"


class InvalidRequest(SerenoError):
    """A field of a request cannot be used. Says which, and what to do about it."""

    code = "invalid_request"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class NotFound(SerenoError):
    """What was asked for does not exist, or is not the caller's to see."""

    code = "not_found"


class UnknownRun(NotFound):
    """No run has this id."""

    code = "run_not_found"

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id!r} not found")
        self.run_id = run_id


class TraceNotRecorded(NotFound):
    """The run exists, and none of its spans is kept here."""

    code = "trace_not_recorded"

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"no span of run {run_id!r} is kept here: it ran before the last restart, too many "
            "came after it (SERENO_RECORDER_SPANS), or tracing is off"
        )
        self.run_id = run_id


class UnknownThread(NotFound):
    """No run and no checkpoint has been written on this thread."""

    code = "thread_not_found"

    def __init__(self, thread_id: str) -> None:
        super().__init__(f"thread {thread_id!r} not found")
        self.thread_id = thread_id


class UnknownGraph(NotFound):
    """No graph is served under this name."""

    code = "graph_not_found"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"graph {name!r} not found; known graphs: {', '.join(known) or 'none'}")
        self.name = name
        self.known = tuple(known)


class Conflict(SerenoError):
    """The thing is there, but in a state that forbids this."""

    code = "conflict"


class ThreadBusy(Conflict):
    """Another run has the thread and has not ended."""

    code = "thread_busy"

    def __init__(self, thread_id: str, active_run: str) -> None:
        super().__init__(
            f"thread {thread_id!r} is busy with run {active_run!r}: follow, cancel or wait for it"
        )
        self.thread_id = thread_id
        self.active_run = active_run


class ThreadHeld(Conflict):
    """A node of a cancelled run still runs: it cannot be killed, only waited for."""

    code = "thread_held"

    def __init__(self, thread_id: str, run_id: str, node: str) -> None:
        super().__init__(
            f"thread {thread_id!r} is held: node {node!r} of cancelled run {run_id!r} is still "
            "running and cannot be stopped; wait until it returns, or restart the server"
        )
        self.thread_id = thread_id
        self.run_id = run_id
        self.node = node


class NotRecorded(Conflict):
    """The run was started without the stream mode that this reader needs."""

    code = "not_recorded"

    def __init__(self, run_id: str, mode: str) -> None:
        super().__init__(
            f"run {run_id!r} was started without {mode!r}: read it at /v1/runs/{run_id}/stream"
        )
        self.run_id = run_id
        self.mode = mode


class CursorAhead(SerenoError):
    """A reader asked for what comes after a line that does not exist."""

    code = "cursor_ahead"

    def __init__(self, after: int, last_seq: int) -> None:
        super().__init__(f"after={after} is ahead of the log, whose last seq is {last_seq}")
        self.after = after
        self.last_seq = last_seq


class Unavailable(SerenoError):
    """Not now: the same request may succeed later."""

    code = "unavailable"
    #: Seconds that a client should wait before it tries again.
    retry_after = 5


class Draining(Unavailable):
    """The server is shutting down and takes no new runs."""

    code = "draining"

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try another one or try again")


class QueueFull(Unavailable):
    """Too many runs wait already."""

    code = "queue_full"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} runs are waiting already; try again later")


class StorageFailed(Unavailable):
    """The store cannot be written: full, locked, read-only or damaged."""

    code = "storage"

    def __init__(self, cause: str) -> None:
        super().__init__(f"the run store cannot be written: {cause}")


class LeaseLost(SerenoError):
    """A writer came back after its lease had gone to another epoch, or its run had ended."""

    code = "lease_lost"

    def __init__(self, run_id: str, epoch: int) -> None:
        super().__init__(f"epoch {epoch} of run {run_id!r} has no lease any more")
        self.run_id = run_id
        self.epoch = epoch


class LogLimit(SerenoError):
    """A run wrote more than SERENO_RUN_MAX_EVENTS lines or SERENO_RUN_MAX_LOG_BYTES bytes."""

    code = "log_limit"


class StartupError(SerenoError):
    """The server cannot start; the message says what to change."""

    code = "startup"


class EngineLocked(StartupError):
    """Another process owns the store."""


class StoreUnusable(StartupError):
    """The store is no store, has another schema, or cannot be written."""


class GraphLoadFailed(StartupError):
    """A graph's file, attribute or factory did not give a graph. Names all three and the cause."""


class SeamBroken(StartupError):
    """The installed LangGraph is not built as the one that we know how to observe."""


class BadSetting(StartupError):
    """A setting's value cannot be used."""
