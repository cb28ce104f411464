"""The nouns: a run, what it may do with its time, and the permission to write for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

__all__ = [
    "DEFAULT_MODES",
    "MODES",
    "NOTED",
    "SEED",
    "Lease",
    "NewRun",
    "Renewal",
    "Run",
    "RunQuery",
    "RunStatus",
    "StoredLine",
]

#: Stream modes that a run can record.
MODES = ("updates", "values", "messages", "custom")
DEFAULT_MODES = ("updates", "messages", "custom")
#: Members of a stored request that no client sent: the span that asked for the run, what asked,
#: and the segment that a resumed run ended with.
NOTED = ("traceparent", "trigger", "resume_of")
#: What the seed profile records: it needs the state after each superstep.
SEED = ("updates", "values", "messages", "custom")


class RunStatus(StrEnum):
    """LangGraph's SDK's words, plus `cancelled`."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCESS = "success"
    ERROR = "error"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether a run with this status has its terminal line."""
        return self not in (RunStatus.PENDING, RunStatus.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run as it is submitted."""

    run_id: str
    thread_id: str
    graph: str
    graph_digest: str
    #: The validated body of the request; everything that an execution needs.
    request: Mapping[str, Any]
    #: Absolute, unix seconds; None without a deadline.
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A row of the run table: times are unix seconds by the store's clock."""

    run_id: str
    thread_id: str
    graph: str
    graph_digest: str
    request: Mapping[str, Any]
    status: RunStatus
    #: 0 before the first claim, then 1, rising by one with each claim.
    epoch: int
    lease_owner: str | None
    lease_until: float | None
    #: Claims of an expired or void lease since the last new checkpoint.
    crashes: int
    deadline: float | None
    cancel_reason: str | None
    #: Whether this run has written to the checkpointer.
    applied: bool
    last_seq: int
    #: seq of the terminal line, None before.
    terminal: int | None
    created_at: float
    updated_at: float
    started_at: float | None
    ended_at: float | None

    @classmethod
    def pending(cls, new: NewRun, *, now: float, last_seq: int = 0) -> Run:
        """A new run as its row begins: nobody has claimed it."""
        return cls(
            run_id=new.run_id,
            thread_id=new.thread_id,
            graph=new.graph,
            graph_digest=new.graph_digest,
            request=new.request,
            deadline=new.deadline,
            status=RunStatus.PENDING,
            epoch=0,
            lease_owner=None,
            lease_until=None,
            crashes=0,
            cancel_reason=None,
            applied=False,
            last_seq=last_seq,
            terminal=None,
            created_at=now,
            updated_at=now,
            started_at=None,
            ended_at=None,
        )

    @property
    def body(self) -> Mapping[str, Any]:
        """The request without what the server noted on it."""
        return {name: value for name, value in self.request.items() if name not in NOTED}

    @property
    def modes(self) -> Sequence[str]:
        """The stream modes that this run records."""
        chosen = self.request.get("stream")
        return DEFAULT_MODES if chosen is None else tuple(chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Permission to write for a run, as long as its epoch is the run's."""

    run_id: str
    thread_id: str
    epoch: int
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What a heartbeat learns: whether the lease is still ours, and whether the run is to stop."""

    held: bool
    cancel_reason: str | None = None


class StoredLine(NamedTuple):
    """A committed line: `body` is the encoded object of profile v1 without the line break."""

    seq: int
    type: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQuery:
    """Which runs to list, newest first; None does not filter."""

    status: str | None = None
    graph: str | None = None
    thread_id: str | None = None
    #: Unix seconds.
    updated_after: float | None = None
    limit: int = 50
    #: (created_at, run_id) of the last row of the page before.
    cursor: tuple[float, str] | None = None
