"""From a validated request to a committed run: what is decided before the store is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson
from langgraph.constants import END
from opentelemetry.trace import get_current_span
from pydantic import BaseModel, ValidationError

from runtime.api.dependencies import Services
from runtime.api.schemas import RunRequest, new_run_id
from runtime.errors import InvalidRequest, UnknownThread
from runtime.graphs import LoadedGraph
from runtime.model import NewRun, Run, RunQuery
from telemetry.tracing import traceparent

__all__ = [
    "bound_resume",
    "default_input",
    "latest_run",
    "state_of",
    "submit_request",
    "submit_stored",
]


async def submit_request(services: Services, request: RunRequest) -> Run:
    """Validate a request against its graph and commit the run.

    Raises UnknownGraph, InvalidRequest, ThreadBusy, ThreadHeld, Unavailable.
    """
    graph = services.graphs.get(request.graph)
    stored = request.stored()
    limit = services.settings.recursion_limit_max
    asked = (stored.get("config") or {}).get("recursion_limit")
    if asked is not None and asked > limit:
        raise InvalidRequest("config.recursion_limit", f"{asked} is more than {limit}")
    trigger = "api"
    if request.command is None:
        if request.input is not None:
            check_input(graph, request.input)
        elif request.thread_id is None:
            raise InvalidRequest(
                "thread_id", "input null goes on from a thread's state: name the thread"
            )
        else:
            stored["resumes_digest"] = await _digest_of(services, request.thread_id)
    else:
        if request.thread_id is None:
            raise InvalidRequest("thread_id", "a command acts on a thread: name it")
        if unknown := sorted(set(request.command.nodes) - {*graph.nodes, END}):
            raise InvalidRequest(
                "command.goto", f"no node {unknown[0]!r}; nodes: {', '.join(graph.nodes)}"
            )
        if request.command.resumes:
            state = await state_of(services, graph, request.thread_id)
            resume = bound_resume(state, request.command.resume, "command.resume")
            trigger = "resume"
            if resume is not None:
                stored["command"] = {**stored["command"], "resume": resume}
            elif not stored["command"]:
                del stored["command"]
                stored["input"] = None
        stored["resumes_digest"] = await _digest_of(services, request.thread_id)
    return await submit_stored(
        services,
        graph,
        stored,
        thread_id=request.thread_id,
        deadline_s=request.deadline_s,
        trigger=trigger,
    )


async def submit_stored(
    services: Services,
    graph: LoadedGraph,
    stored: Mapping[str, Any],
    *,
    thread_id: str | None,
    deadline_s: float | None = None,
    trigger: str = "api",
) -> Run:
    """Commit a run of which everything is known."""
    run_id, noted = new_run_id(), {"trigger": trigger}
    asked = get_current_span().get_span_context()
    if asked.is_valid:
        noted["traceparent"] = traceparent(asked)
    before = None
    if trigger == "resume" and thread_id is not None:
        before = await latest_run(services, thread_id)
        if (ended := await _ended_with(services, before)) is not None:
            noted["resume_of"] = ended
    new = NewRun(
        run_id=run_id,
        thread_id=thread_id or run_id,
        graph=graph.name,
        graph_digest=graph.digest,
        request={**stored, **noted},
        deadline=time.time() + deadline_s if deadline_s is not None else None,
    )
    data: dict[str, Any] = {"graph": graph.name, "trigger": trigger}
    if metadata := stored.get("metadata"):
        data["metadata"] = metadata
    run = await services.submit(new, data)
    if before is not None and before.ended_at is not None:
        waited = services.metrics["interrupt_wait_seconds"]
        waited.observe(max(0.0, run.created_at - before.ended_at), graph.name)
    return run


async def _ended_with(services: Services, run: Run) -> str | None:
    """The traceparent of the segment that a run ended with; None when it was not traced."""
    if run.terminal is None:
        return None
    for line in await services.engine.read(run.run_id, run.terminal - 1, 1):
        ids = orjson.loads(line.body)
        if "trace_id" in ids:
            return f"00-{ids['trace_id']}-{ids['span_id']}-01"
    return None


def check_input(graph: LoadedGraph, value: Any) -> None:
    """Input that the graph's schema refuses never becomes a run. Raises InvalidRequest."""
    schema = graph.schema()["input"]
    if schema.get("type") == "object":
        if not isinstance(value, dict):
            raise InvalidRequest("input", f"must be an object, got {type(value).__name__}")
        if missing := [name for name in schema.get("required") or () if name not in value]:
            raise InvalidRequest(f"input.{missing[0]}", "is required by the graph's input schema")
    model = getattr(getattr(graph.graph, "builder", None), "input_schema", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        try:
            model.model_validate(value)
        except ValidationError as exc:
            first = exc.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(f"input.{path}" if path else "input", first["msg"]) from exc


def default_input(graph: LoadedGraph, given: Any) -> Any:
    """What was given, else the graph's default, else nothing when the graph needs nothing."""
    if given is not None:
        check_input(graph, given)
        return given
    if graph.default_input is not None:
        return graph.default_input
    if required := graph.schema()["input"].get("required"):
        raise InvalidRequest("input", f"graph {graph.name!r} needs {', '.join(required)}")
    return {}


def bound_resume(state: Any, resume: Any, field: str = "resume") -> dict[str, Any] | None:
    """An answer by interrupt id, so that it can never meet another question.

    None at a static breakpoint, where there is nothing to answer. Raises InvalidRequest.
    """
    pending = [interrupt.id for interrupt in state.interrupts]
    if not pending:
        if state.next:
            return None
        raise InvalidRequest(field, "no interrupt is pending on this thread")
    if isinstance(resume, dict) and resume:
        if unknown := [key for key in resume if key not in pending]:
            if len(unknown) < len(resume) or all(_looks_like_id(key) for key in unknown):
                raise InvalidRequest(
                    f"{field}.{unknown[0]}",
                    f"no such interrupt is pending; pending: {', '.join(pending)}",
                )
        else:
            return resume
    if len(pending) > 1:
        raise InvalidRequest(
            field,
            f"{len(pending)} interrupts are pending: answer by id, one of {', '.join(pending)}",
        )
    return {pending[0]: resume}


async def state_of(services: Services, graph: LoadedGraph, thread_id: str) -> Any:
    """The thread's LangGraph state snapshot, read with the graph."""
    config: Any = {
        "configurable": {
            "thread_id": thread_id,
            "__pregel_checkpointer": services.engine.checkpointer(None),
        }
    }
    async with graph.open(config) as opened:
        return await opened.aget_state(config)


async def latest_run(services: Services, thread_id: str) -> Run:
    """The run that was submitted last on a thread. Raises UnknownThread."""
    runs = await services.engine.search(RunQuery(thread_id=thread_id, limit=1))
    if not runs:
        raise UnknownThread(thread_id)
    return runs[0]


async def _digest_of(services: Services, thread_id: str) -> str | None:
    runs = await services.engine.search(RunQuery(thread_id=thread_id, limit=1))
    return runs[0].graph_digest if runs else None


def _looks_like_id(key: str) -> bool:
    """LangGraph's interrupt ids are 128-bit hashes in hex."""
    return len(key) == 32 and all(c in "0123456789abcdef" for c in key)
