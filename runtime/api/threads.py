"""Threads: their state, and the answer to a question that a run has asked."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Response
from langgraph.types import Interrupt

from runtime.api.dependencies import ServicesDep
from runtime.api.problems import (
    BLOCKED,
    BUSY,
    HELD,
    NO_GRAPH,
    NO_THREAD,
    NOT_NOW,
    RESPONSES,
    UNREADABLE,
    may,
)
from runtime.api.runs import ANSWERED, UNANSWERABLE, Prefer, answer_new_run, wanted
from runtime.api.schemas import JsonRoute, ResumeRequest, RunInfo, ThreadState
from runtime.api.submitting import bound_resume, latest_run, state_of, submit_stored
from runtime.errors import InvalidRequest, ThreadBusy
from telemetry import http

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/threads", tags=["threads"], route_class=JsonRoute, responses=RESPONSES
)

ThreadId = Annotated[str, Path(description="A thread's id.", examples=["t1"])]

#: What a request body may look like.
ANSWERS: dict[str, Any] = {
    "value": {"summary": "When one interrupt is pending", "value": {"resume": {"approve": True}}},
    "by id": {
        "summary": "By the interrupt's id",
        "value": {"resume": {"6b7f0d5e2c914a83b1d7e0f9a2c4d6e8": {"approve": True}}},
    },
}


@router.get(
    "/{thread_id}/state",
    summary="Read a thread's state",
    response_model=ThreadState,
    response_description="The state.",
    responses=may(NO_THREAD, NO_GRAPH, BLOCKED, UNREADABLE),
)
async def state(thread_id: ThreadId, services: ServicesDep) -> Response:
    """The thread's values after its latest checkpoint, what comes next, and what it waits for."""
    run = await latest_run(services, thread_id)
    http.current().acts_on(thread_id=thread_id, graph=run.graph)
    snapshot = await state_of(services, services.graphs.get(run.graph), thread_id)
    body: dict[str, Any] = {
        "thread_id": thread_id,
        "graph": run.graph,
        "values": snapshot.values,
        "next": list(snapshot.next),
        "interrupts": [_interrupt(interrupt) for interrupt in snapshot.interrupts],
        "checkpoint_id": snapshot.config["configurable"].get("checkpoint_id"),
        "created_at": snapshot.created_at,
        "active_run": run.run_id if run.terminal is None else None,
    }
    return Response(services.ndjson.unstored(body), media_type="application/json")


def _interrupt(interrupt: Interrupt[Any]) -> dict[str, Any]:
    """One question, with the schema of its answer when it has one."""
    told = {"id": interrupt.id, "value": interrupt.value}
    if interrupt.response_schema is not None:
        told["response_schema"] = interrupt.response_schema
    return told


@router.post(
    "/{thread_id}/resume",
    summary="Answer an interrupt",
    status_code=202,
    response_model=RunInfo,
    responses={
        **ANSWERED,
        **may(
            NO_THREAD,
            NO_GRAPH,
            BUSY,
            HELD,
            InvalidRequest("resume", "no interrupt is pending on this thread"),
            *UNANSWERABLE,
            BLOCKED,
            *NOT_NOW,
            body=True,
        ),
    },
)
async def resume(
    thread_id: ThreadId,
    body: Annotated[ResumeRequest, Body(openapi_examples=ANSWERS)],
    request: Request,
    services: ServicesDep,
    prefer: Prefer = None,
) -> Response:
    """A new run goes on where the thread stopped. It answers as `POST /v1/runs` does."""
    how = wanted(request)
    before = await latest_run(services, thread_id)
    if before.terminal is None:
        raise ThreadBusy(thread_id, before.run_id)
    graph = services.graphs.get(before.graph)
    answer = bound_resume(await state_of(services, graph, thread_id), body.resume)
    kept = ("config", "context", "durability", "metadata", "stream")
    stored: dict[str, Any] = {name: before.request[name] for name in kept if name in before.request}
    if body.stream is not None:
        stored["stream"] = body.stream
    if answer is None:  # a static breakpoint: there is nothing to answer
        stored["input"] = None
    else:
        stored["command"] = {"resume": answer}
    stored["resumes_digest"] = before.graph_digest
    run = await submit_stored(
        services,
        graph,
        stored,
        thread_id=thread_id,
        deadline_s=body.deadline_s,
        trigger="resume",
    )
    return await answer_new_run(services, run, how)
