"""What can be seen of a node and of a call: frozen details that the seam makes and listeners read.

The seam (`telemetry.langgraph`, `telemetry.tenacity`) makes each observation once and hands it to
the listener of the context, synchronously: a start in the context in which the body is about to
run, its end in the same, unless a timeout around the body ended it. What LangGraph itself tells
late or in part goes into its stream as parts of mode `attempts`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

from telemetry.contract import AttemptOutcome

__all__ = [
    "ATTEMPTS",
    "AttemptEnded",
    "AttemptOutcome",
    "AttemptStarted",
    "CallAttemptEnded",
    "CallAttemptStarted",
    "CallRetrying",
    "Custom",
    "Listener",
    "NodeEnded",
    "NodeOutcome",
    "NodeRetrying",
    "NodeWrote",
    "Observation",
    "SuperstepEnded",
    "Visit",
    "current_listener",
]

#: The stream mode of our parts in LangGraph's stream.
ATTEMPTS = "attempts"

NodeOutcome = Literal["success", "error", "interrupted", "cancelled", "drained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One entry into a node: where it is. Equal for all its attempts."""

    #: LangGraph's task id: the same on a retry and on re-execution after a crash.
    task: str
    node: str
    #: Names of the enclosing subgraph calls, outermost first.
    ns: tuple[str, ...]
    #: Task ids of the same calls.
    path: tuple[str, ...]
    #: Superstep of the graph that the node belongs to.
    step: int

    @property
    def label(self) -> str:
        """The node's path, names from the root graph: what metrics and spans call the node."""
        return "/".join((*self.ns, self.node)) if self.ns else self.node


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    """A node is about to be called."""

    visit: Visit
    #: 1, 2, 3… within this visit and process.
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """A call of a node returned, raised, timed out or was cancelled.

    With outcome `retried`, a NodeRetrying follows at once.
    """

    visit: Visit
    attempt: int
    outcome: AttemptOutcome
    error: BaseException | None
    #: Of the policy that matched, None when none did.
    max_attempts: int | None
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRetrying:
    """LangGraph's RetryPolicy is about to sleep before it calls the node again."""

    visit: Visit
    #: The attempt that failed.
    attempt: int
    error: BaseException
    #: Lower bound of the sleep; LangGraph adds up to `jitter_s` after we have been told.
    retry_in_s: float
    jitter_s: float
    #: Of the policy that matched.
    max_attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnded:
    """A visit is over, all attempts and back-off included."""

    visit: Visit
    attempts: int
    outcome: NodeOutcome
    error: BaseException | None
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAttemptStarted:
    """A function that tenacity retries is about to be called."""

    #: The node around it and that node's attempt; None outside of any node.
    visit: Visit | None
    node_attempt: int | None
    #: `module.qualname`, or what the function's `sereno_call` says.
    call: str
    #: One per operation, over all its attempts.
    call_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAttemptEnded:
    """A call that tenacity retries returned or raised.

    With outcome `retried`, a CallRetrying follows at once.
    """

    visit: Visit | None
    node_attempt: int | None
    call: str
    call_id: str
    attempt: int
    outcome: AttemptOutcome
    error: BaseException | None
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRetrying:
    """Tenacity is about to sleep before it calls the function again."""

    visit: Visit | None
    node_attempt: int | None
    call: str
    call_id: str
    #: The attempt that failed.
    attempt: int
    #: None when a result, not an exception, asked for the retry.
    error: BaseException | None
    retry_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWrote:
    """The result of a visit is known. Only in the stream, in front of LangGraph's own parts."""

    visit: Visit
    #: As in LangGraph's stream mode `updates`.
    update: object
    #: Nobody was called for it: it comes from the cache, or from before a crash.
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperstepEnded:
    """The outermost graph has taken over what its tasks wrote. Only in the stream."""

    step: int


class Custom(NamedTuple):
    """What a node wrote to the graph's stream writer, tagged with who wrote it."""

    visit: Visit
    attempt: int
    value: object


Observation = (
    AttemptStarted
    | AttemptEnded
    | NodeRetrying
    | NodeEnded
    | CallAttemptStarted
    | CallAttemptEnded
    | CallRetrying
)

Listener = Callable[[Observation], object]

#: Who is told what the current code does; follows asyncio tasks, executors and `to_thread`.
current_listener: ContextVar[Listener | None] = ContextVar("sereno_listener", default=None)
