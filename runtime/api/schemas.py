"""What requests carry, and what is answered besides streams."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from starlette.exceptions import HTTPException
from starlette.types import Scope

from runtime.errors import InvalidRequest
from runtime.events import rfc3339
from runtime.model import MODES, Run, RunStatus

__all__ = [
    "CancelRequest",
    "Checked",
    "Drawing",
    "GraphInfo",
    "GraphList",
    "GraphSchema",
    "Health",
    "Info",
    "JsonRoute",
    "NotYet",
    "ResumeRequest",
    "RunInfo",
    "RunList",
    "RunRequest",
    "RunResult",
    "SeedRequest",
    "ThreadState",
    "new_run_id",
    "run_info",
]

ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
#: Reserved for tenants: `tenant::thread`.
TENANT = re.compile(r"[a-z0-9-]{1,40}::")
MAX_DEPTH = 100

Mode = Literal["updates", "values", "messages", "custom"]


def check_id(value: str | None) -> str | None:
    """An id that a client chose."""
    if value is None:
        return None
    if not ID.fullmatch(value):
        raise ValueError("use 1 to 128 of the characters A-Z a-z 0-9 _ . : -")
    if TENANT.match(value):
        raise ValueError("an id may not begin with a tenant's name and '::'")
    return value


def check_storable(value: Any) -> Any:
    """Nested too deeply, it would exhaust whoever walks it; checkpoints hold 64 bits."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if any(type(item) is int and not -(2**63) <= item < 2**64 for item in level):
            raise ValueError("holds an integer of more than 64 bits; send it as text")
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return value


class JsonRoute(APIRoute):
    """A route whose body is read as strictly as the next reader will."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(_json_scope(request), request.receive))

        return handle_strictly


def _json_scope(request: Request) -> Scope:
    """The request's scope, its body declared to be JSON: `curl -d` calls it a form.

    A page of another site can send such a form without asking, but not without an `Origin`.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared == "application/json" or declared.endswith("+json"):
        return request.scope
    if "origin" in request.headers and request.method != "GET":
        raise HTTPException(415, "send the body with Content-Type: application/json")
    headers = [(k, v) for k, v in request.scope["headers"] if k != b"content-type"]
    return {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}


class _StrictRequest(Request):
    async def json(self) -> Any:
        return strict_json(await self.body())


def strict_json(body: bytes) -> Any:
    """JSON as RFC 8259 has it. Raises json.JSONDecodeError.

    orjson refuses what Python's own parser lets in and no encoder lets out again: NaN, lone
    surrogates, bytes that are not UTF-8. But it would round a large integer silently.
    """
    orjson.loads(body)
    try:
        return json.loads(body, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as exc:
        raise json.JSONDecodeError(str(exc), "", 0) from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


#: RFC 3339 in UTC.
Time = Annotated[str, Field(examples=["2026-11-24T17:06:08.978Z"])]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    _storable = field_validator("*", mode="before")(check_storable)


ThreadName = Annotated[
    str | None,
    Field(
        description="The line of state to go on; without it a new one, named after the run.",
        json_schema_extra={"examples": ["t1"], "pattern": f"^{ID.pattern}$"},
    ),
]
Recorded = Annotated[
    list[Mode] | None,
    Field(
        description="The modes to record; `updates messages custom` unless said.",
        examples=[["updates", "messages", "custom", "values"]],
    ),
]
Deadline = Annotated[
    Annotated[float, Field(gt=0, le=30 * 24 * 3600)] | None,
    Field(description="Seconds from now until `run.timed_out`, queue and restarts included."),
]


class Command(_Body):
    """LangGraph's Command: answer interrupts, change the state, go to a node."""

    resume: Any = None
    update: dict[str, Any] | None = None
    goto: str | list[str] | None = None

    @model_validator(mode="after")
    def _something(self) -> Command:
        if not self.resumes and self.update is None and not self.goto:
            raise ValueError("give resume, update or goto")
        return self

    @property
    def nodes(self) -> Sequence[str]:
        """Where it goes."""
        return [self.goto] if isinstance(self.goto, str) else self.goto or ()

    @property
    def resumes(self) -> bool:
        """Whether it answers an interrupt; null is an answer too."""
        return "resume" in self.model_fields_set


class RunConfig(_Body):
    """The parts of LangGraph's config that a client may set."""

    configurable: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    tags: list[str] | None = None
    recursion_limit: Annotated[int, Field(ge=1)] | None = None
    max_concurrency: Annotated[int, Field(ge=1)] | None = None


def _either(schema: dict[str, Any]) -> None:
    """For the OpenAPI document: one of input and command is there."""
    command = {"required": ["command"], "properties": {"command": {"type": "object"}}}
    schema["anyOf"] = [{"required": ["input"]}, command]


class RunRequest(_Body):
    """A new run. Exactly one of `input` and `command`; `input: null` goes on from the thread's
    state."""

    model_config = ConfigDict(json_schema_extra=_either)

    graph: Annotated[str, Field(description="The name of a graph that is served.")]
    input: Annotated[
        Any, Field(description="The graph's input; null goes on from the thread's state.")
    ] = None
    command: Annotated[
        Command | None, Field(description="As LangGraph's Command; needs `thread_id`.")
    ] = None
    thread_id: ThreadName = None
    checkpoint_id: Annotated[
        str | None, WithJsonSchema({"type": "null", "description": "Not supported yet."})
    ] = None
    config: RunConfig | None = None
    context: Annotated[dict[str, Any] | None, Field(description="The graph's runtime context.")] = (
        None
    )
    stream: Recorded = None
    deadline_s: Deadline = None
    multitask: Annotated[
        str | None,
        Field(
            description="What happens on a thread that is busy; only `reject` is supported yet.",
            json_schema_extra={"enum": ["reject", None]},
        ),
    ] = None
    durability: Annotated[
        Literal["sync", "async", "exit"] | None,
        Field(description="When checkpoints are written: `sync` before the next superstep begins."),
    ] = None
    metadata: Annotated[
        dict[str, Any] | None,
        Field(description="Kept with the run, and told by `run.queued`."),
    ] = None

    _ids = field_validator("thread_id")(check_id)

    @field_validator("checkpoint_id")
    @classmethod
    def _no_checkpoint(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("not supported yet; leave it out to go on from the latest state")
        return value

    @field_validator("multitask")
    @classmethod
    def _only_reject(cls, value: str | None) -> str | None:
        if value not in (None, "reject"):
            raise ValueError(f"{value!r} is not supported yet; use 'reject' or leave it out")
        return value

    @model_validator(mode="after")
    def _one_of(self) -> RunRequest:
        if "input" in self.model_fields_set and self.command is not None:
            raise ValueError("give either input or command, not both")
        if "input" not in self.model_fields_set and self.command is None:
            raise ValueError("give input (null goes on from the thread's state) or command")
        return self

    def stored(self) -> dict[str, Any]:
        """What an execution needs, as it goes into the store."""
        body = self.model_dump(
            exclude={"graph", "input", "thread_id", "deadline_s", "multitask"}, exclude_none=True
        )
        if self.command is None:
            body["input"] = self.input
        if self.stream is not None:
            body["stream"] = [mode for mode in MODES if mode in self.stream]
        return body


class ResumeRequest(_Body):
    """The answer to an interrupt: `{interrupt_id: value}`, or a bare value when one is pending."""

    resume: Annotated[Any, Field(description="`{interrupt_id: value}`, or the value alone.")]
    stream: Recorded = None
    deadline_s: Deadline = None


class CancelRequest(_Body):
    """Why a run is cancelled, for its terminal line."""

    reason: Annotated[str, Field(max_length=500)] | None = None


class SeedRequest(_Body):
    """A run of the seed profile; everything has a default."""

    thread_id: ThreadName = None
    graph: Annotated[str | None, Field(description="SERENO_DEFAULT_GRAPH unless said.")] = None
    input: Annotated[
        dict[str, Any] | None, Field(description="The graph's default input unless said.")
    ] = None

    _ids = field_validator("thread_id")(check_id)


class ListedRun(BaseModel):
    """A run as it is now, as far as its row tells."""

    run_id: Annotated[str, Field(examples=["01KAV3V2Q4X8ZJ5T9W6M1N7R0C"])]
    thread_id: Annotated[str, Field(examples=["t1"])]
    graph: Annotated[str, Field(examples=["research"])]
    status: RunStatus
    epoch: Annotated[int, Field(description="How many processes have taken it up.")]
    last_seq: Annotated[int, Field(description="The last line that there is: a cursor.")]
    created_at: Time
    updated_at: Time
    started_at: Time | None
    ended_at: Time | None
    deadline: Time | None = None
    cancel_reason: str | None = None
    stream: Annotated[list[str], Field(description="The modes that are recorded.")]
    metadata: dict[str, Any] | None = None


class RunInfo(ListedRun):
    """A run as it is now."""

    queue_position: Annotated[
        int | None,
        Field(description="Runs that were submitted before it and have not started."),
    ] = None
    result: Annotated[
        dict[str, Any] | None,
        Field(description="What the terminal line says, without the output."),
    ] = None


class RunList(BaseModel):
    """A page of runs, newest first."""

    runs: list[ListedRun]
    next_cursor: Annotated[str | None, Field(description="`cursor` of the next page, if any.")]


class RunResult(BaseModel):
    """The data of a run's terminal line, and which run it is."""

    model_config = ConfigDict(extra="allow")

    run_id: str
    thread_id: str
    status: Literal["success", "error", "timeout", "interrupted", "cancelled"]
    final: Literal[True]
    output: Annotated[Any, Field(description="Of a success.")] = None
    error: Annotated[
        dict[str, Any] | None, Field(description="Of an error or a timeout: its `code` and class.")
    ] = None
    interrupts: Annotated[
        list[dict[str, Any]] | None, Field(description="What an interrupted run asks.")
    ] = None


class NotYet(BaseModel):
    """There is no result yet: ask again at `Location`."""

    run_id: str
    status: RunStatus


class GraphInfo(BaseModel):
    """A graph that is served."""

    name: Annotated[str, Field(examples=["research"])]
    description: str | None
    nodes: list[str]
    default_input: Annotated[
        Any, Field(description="What a run of the seed profile starts from.")
    ] = None
    digest: Annotated[str, Field(description="Changes when nodes, edges or channels do.")]


class GraphList(BaseModel):
    """The graphs that are served."""

    graphs: list[GraphInfo]
    failures: Annotated[
        dict[str, str], Field(description="Graphs that could not be loaded, and why.")
    ]


class GraphSchema(BaseModel):
    """JSON Schemas; `{}` is anything."""

    input: dict[str, Any]
    output: dict[str, Any]
    context: Annotated[
        dict[str, Any] | None, Field(description="null: the graph takes no context.")
    ]


class DrawnNode(BaseModel):
    """A box."""

    id: Annotated[str, Field(examples=["investigate:search"])]
    label: Annotated[str, Field(examples=["search"])]
    kind: Literal["start", "end", "node", "subgraph"]


class DrawnEdge(BaseModel):
    """An arrow."""

    source: str
    target: str
    conditional: Annotated[bool, Field(description="Whether another one may be taken instead.")]
    label: Annotated[str, Field(description="The branch that it is of; absent without one.")] = ""


class Drawing(BaseModel):
    """A graph as boxes and arrows."""

    graph: str
    xray: int
    nodes: list[DrawnNode]
    edges: list[DrawnEdge]


class Health(BaseModel):
    """The event loop answers."""

    status: Literal["ok"]
    ts: Annotated[int, Field(description="Unix seconds.")]


class Checked(BaseModel):
    """Checks and what each has found."""

    status: Literal["pass", "fail"]
    checks: list[dict[str, Any]]


class Info(BaseModel):
    """A server, and what it was told."""

    name: Literal["sereno"]
    version: Annotated[str, Field(examples=["0.1.0"])]
    contract: Annotated[str, Field(description="The version of the telemetry's names.")]
    trace_url: Annotated[
        str | None,
        Field(
            description="Where a trace is looked at: a template.",
            examples=["http://localhost:16686/trace/{trace_id}"],
        ),
    ]
    python: Annotated[str, Field(examples=["3.12.12"])]
    langgraph: Annotated[str, Field(examples=["1.2.24"])]
    seam: Annotated[
        Literal["installed", "wrapped"], Field(description="How a graph's nodes are seen.")
    ]
    engine: Annotated[str, Field(examples=["sqlite"])]
    log_id: Annotated[str, Field(description="As in the header `X-Log-Id`.")]
    graphs: Annotated[list[str], Field(examples=[["research", "screening"]])]
    slots: Annotated[int, Field(description="Runs that may execute at once.")]
    durability: str
    insecure: Annotated[bool, Field(description="Whether others reach it without a key.")]


class ThreadState(BaseModel):
    """The state of a thread after its latest checkpoint."""

    thread_id: str
    graph: str
    values: Any
    next: Annotated[list[str], Field(description="The nodes that come next.")]
    interrupts: Annotated[
        list[dict[str, Any]],
        Field(
            description="What it waits for: `id` and `value` of each, and `response_schema`, a "
            "JSON Schema of the answer, when the graph gave one."
        ),
    ]
    checkpoint_id: str | None
    created_at: str | None
    active_run: Annotated[str | None, Field(description="The run that has the thread.")]


def run_info(run: Run, **more: Any) -> RunInfo:
    """The public part of a row."""
    return RunInfo(
        run_id=run.run_id,
        thread_id=run.thread_id,
        graph=run.graph,
        status=run.status,
        epoch=run.epoch,
        last_seq=run.last_seq,
        created_at=rfc3339(run.created_at),
        updated_at=rfc3339(run.updated_at),
        started_at=_time(run.started_at),
        ended_at=_time(run.ended_at),
        deadline=_time(run.deadline),
        cancel_reason=run.cancel_reason,
        stream=list(run.modes),
        metadata=run.request.get("metadata"),
        **more,
    )


def unix_seconds(value: str, name: str) -> float:
    """An RFC 3339 time or unix seconds, as a client may write it. Raises InvalidRequest."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            parsed = datetime.fromisoformat(value)
            seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            seconds = math.nan
    if not math.isfinite(seconds):
        raise InvalidRequest(name, f"{value!r} is no time; use RFC 3339 or unix seconds")
    return seconds


_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_run_id() -> str:
    """A ULID: 48 bits of milliseconds and 80 random bits in Crockford's base 32."""
    number = (int(time.time() * 1000) << 80) | int.from_bytes(os.urandom(10))
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def terminal_data(body: bytes) -> Mapping[str, Any]:
    """The data of a stored line."""
    data: Mapping[str, Any] = orjson.loads(body)["data"]
    return data


def _time(seconds: float | None) -> str | None:
    return rfc3339(seconds) if seconds is not None else None
