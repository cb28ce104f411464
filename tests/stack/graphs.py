"""Graphs that the collector's configuration is tried with: one is plain, one retries, one leaks."""

from __future__ import annotations

import asyncio
import logging
import operator
from typing import Annotated, TypedDict

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

#: None of these is anybody's.
KEY = "sk-live-abcdefghij0123456789"
BEARER = "Bearer abcdefghijklmnop0123"
JWT = "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl"
MAIL = "jane.doe@example.com"
PASSWORD = "hunter2-hunter2"


class State(TypedDict, total=False):
    seen: Annotated[list[str], operator.add]


async def work(state: State) -> State:
    await asyncio.sleep(0.01)
    return {"seen": ["work"]}


async def insist(state: State, runtime: Runtime[None]) -> State:
    assert runtime.execution_info is not None
    if runtime.execution_info.node_attempt == 1:
        raise ConnectionError("not yet")
    return {"seen": ["insist"]}


async def leak(state: State) -> State:
    """What a careless author might do with secrets."""
    tracer = trace.get_tracer("careless")
    said = {
        "note": f"call with {KEY} please",
        "tags": [KEY, "fine"],
        "jwt": JWT,
        "mail": f"to {MAIL}",
        "db.password": PASSWORD,
        "http.request.header.authorization": PASSWORD,
        "gen_ai.usage.input_tokens": 12,
    }
    with tracer.start_as_current_span("careless", attributes=said) as span:
        span.add_event("asked", {"with": BEARER, "all": [JWT, MAIL]})
        span.set_status(Status(StatusCode.ERROR, f"AuthError: {KEY} of {JWT}"))
    logging.getLogger("careless").warning("Asking with %s", KEY, extra={"password": PASSWORD})
    raise PermissionError(f"401 for {BEARER}")


plain = StateGraph(State).add_node(work).add_edge(START, "work").compile()
retrying = (
    StateGraph(State)
    .add_node(insist, retry_policy=RetryPolicy(initial_interval=0.01, jitter=False))
    .add_edge(START, "insist")
    .compile()
)
leaking = StateGraph(State).add_node(leak).add_edge(START, "leak").compile()
