"""What can be seen of a node and of a call: frozen details that the seam makes and listeners read.

The seam (`telemetry.langgraph`, `telemetry.tenacity`) makes each observation once. It goes to the
listeners, and into LangGraph's own stream as a part of mode `attempts`, so that a reader of the
stream has it in total order with updates and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
]

#: The stream mode under which observations travel in LangGraph's stream.
ATTEMPTS = "attempts"

AttemptOutcome = Literal[
    "success", "retried", "exhausted", "failed", "interrupted", "cancelled", "lost"
]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    """A node is about to be called."""

    visit: Visit
    #: 1, 2, 3… within this visit and process.
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """A call of a node returned, raised, timed out or was cancelled."""

    visit: Visit
    attempt: int
    outcome: AttemptOutcome
    error: BaseException | None
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
    """A call that tenacity retries returned or raised."""

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

Listener = Callable[[Observation], None]
