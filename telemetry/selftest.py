"""Whether the seam sees what LangGraph does: runs a tiny graph and compares.

`observe()` is how a server begins: it installs the seam, and when that does not fit this LangGraph,
falls back to wrapping graphs.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable
from typing import Any

import structlog
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, StateGraph
from langgraph.pregel import Pregel
from langgraph.pregel.protocol import StreamProtocol
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy
from typing_extensions import TypedDict

from telemetry import langgraph as seam
from telemetry.langgraph import SeamMismatch, current_attempt
from telemetry.observations import (
    ATTEMPTS,
    AttemptEnded,
    AttemptStarted,
    Custom,
    NodeEnded,
    NodeRetrying,
    NodeWrote,
    SuperstepEnded,
    current_listener,
)
from telemetry.wrapping import wrap as wrapped

__all__ = ["Wrap", "observe", "problems"]

#: Makes an observed copy of a graph.
Wrap = Callable[[Pregel[Any, Any, Any, Any]], Pregel[Any, Any, Any, Any]]

#: Seconds that the tiny graph may take; it takes some milliseconds.
LIMIT_S = 2.0

_REMEDY = "install the langgraph of requirements.lock"
_log = structlog.get_logger("telemetry")


async def observe() -> Wrap | None:
    """Observe LangGraph from now on. What graphs are to be wrapped with; None: nothing is needed.

    Raises SeamMismatch, with nothing installed, when this LangGraph cannot be observed at all.
    """
    try:
        seam.install()
        wrong = await problems()
    except SeamMismatch as exc:
        wrong = [str(exc)]
    if not wrong:
        return None
    seam.uninstall()
    if worse := await problems(wrapped):
        raise SeamMismatch(f"{wrong[0]}; with wrapped nodes: {worse[0]}; remedy: {_REMEDY}")
    _log.warning(
        "LangGraph's nodes are wrapped: what functions call is not seen",
        event_type="telemetry.degraded",
        signal="nodes",
        reason="; ".join(wrong),
        remedy=_REMEDY,
    )
    return wrapped


async def problems(wrap: Wrap | None = None, *, limit_s: float = LIMIT_S) -> list[str]:
    """What is wrong with the seam that is installed, or with `wrap` in its place. Never raises."""
    seen: list[str] = []
    running = asyncio.create_task(_run(seen, wrap))
    await asyncio.wait({running}, timeout=limit_s)
    if not running.done():
        running.cancel()
        return [f"the self-test took longer than {limit_s} s"]
    if (error := running.exception()) is not None:
        return [f"the self-test failed: {type(error).__name__}: {error}"]
    return _differences(seen, _expected(wrap))


async def _run(seen: list[str], wrap: Wrap | None) -> None:
    """Notes in `seen` what the seam tells of the tiny graph, and what its bodies know."""

    def told(observation: Any) -> None:
        seen.extend(_words(observation))

    def streamed(part: Any) -> None:
        told(part[2])

    current_listener.set(told)
    graph = _graph(seen)
    modes: set[Any] = {ATTEMPTS, "custom"}
    config: Any = {
        "configurable": {
            "thread_id": "self-test",
            "__pregel_stream": StreamProtocol(streamed, modes),
            "__pregel_runtime": Runtime(),
        }
    }
    await (graph if wrap is None else wrap(graph)).ainvoke({"x": 0}, config)


class _State(TypedDict, total=False):
    x: int


class _Fault(Exception):
    pass


def _graph(seen: list[str]) -> Pregel[Any, Any, Any, Any]:
    """A node that fails once, one in a thread that calls a graph, and one in a subgraph."""
    faults = [_Fault()]

    def here() -> None:
        attempt = current_attempt.get()
        seen.append(f"in {attempt.visit.label} {attempt.number}" if attempt else "in no attempt")

    async def flaky(state: _State) -> _State:
        here()
        if faults:
            raise faults.pop()
        return {"x": 1}

    def called(state: _State) -> _State:
        return {"x": 2}

    def threaded(state: _State) -> _State:
        here()
        inner.invoke(state)
        return {"x": 3}

    async def leaf(state: _State) -> _State:
        here()
        get_stream_writer()("a value")
        return {"x": 4}

    once = RetryPolicy(initial_interval=0.0, jitter=False, max_attempts=2, retry_on=_Fault)
    inner = StateGraph(_State).add_node(called).add_edge(START, "called").compile()
    sub = StateGraph(_State).add_node(leaf).add_edge(START, "leaf").compile()
    graph = StateGraph(_State).add_node(flaky, retry_policy=once).add_node(threaded)
    graph.add_node("sub", sub).add_edge(START, "flaky")
    graph.add_edge("flaky", "threaded").add_edge("threaded", "sub")
    return graph.compile(checkpointer=InMemorySaver())


def _expected(wrap: Wrap | None) -> list[str]:
    called = _once("threaded/called") if wrap is None else []
    return [
        "flaky 1 starts",
        "in flaky 1",
        "flaky 1 retried",
        "flaky 1 retrying",
        *_once("flaky", "in flaky 2", number=2),
        "superstep 1 ends",
        *_once("threaded", "in threaded 1", *called),
        "superstep 2 ends",
        *_once("sub", *_once("sub/leaf", "in sub/leaf 1", "sub/leaf 1 says a value")),
        "superstep 3 ends",
    ]


def _once(node: str, *inside: str, number: int = 1) -> list[str]:
    return [
        f"{node} {number} starts",
        *inside,
        f"{node} {number} success",
        f"{node} ends: success after {number}",
        f"{node} wrote",
    ]


def _words(told: Any) -> list[str]:
    match told:
        case AttemptStarted():
            return [f"{told.visit.label} {told.attempt} starts"]
        case AttemptEnded():
            return [f"{told.visit.label} {told.attempt} {told.outcome}"]
        case NodeRetrying():
            return [f"{told.visit.label} {told.attempt} retrying"]
        case NodeEnded():
            return [f"{told.visit.label} ends: {told.outcome} after {told.attempts}"]
        case NodeWrote():
            return [f"{told.visit.label} wrote"]
        case Custom():
            return [f"{told.visit.label} {told.attempt} says {told.value}"]
        case SuperstepEnded() if told.step > 0:
            return [f"superstep {told.step} ends"]
    return []


def _differences(seen: list[str], expected: list[str]) -> list[str]:
    """Where they part, in few words."""
    matcher = difflib.SequenceMatcher(None, seen, expected, autojunk=False)
    return [
        f"saw {_first(seen[i:j])} instead of {_first(expected[k:m])}"
        for tag, i, j, k, m in matcher.get_opcodes()
        if tag != "equal"
    ]


def _first(words: list[str]) -> str:
    more = f" and {len(words) - 1} more" if len(words) > 1 else ""
    return f"{words[0]!r}{more}" if words else "nothing"
