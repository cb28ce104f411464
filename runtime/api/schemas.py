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
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException
from starlette.types import Scope

from runtime.errors import InvalidRequest
from runtime.events import rfc3339
from runtime.model import MODES, Run

__all__ = [
    "CancelRequest",
    "GraphInfo",
    "JsonRoute",
    "ResumeRequest",
    "RunInfo",
    "RunRequest",
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


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    _storable = field_validator("*", mode="before")(check_storable)


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


class RunRequest(_Body):
    """A new run. Exactly one of `input` and `command`; `input: null` goes on from the thread's
    state."""

    graph: str
    input: Any = None
    command: Command | None = None
    thread_id: str | None = None
    checkpoint_id: str | None = None
    config: RunConfig | None = None
    context: dict[str, Any] | None = None
    stream: list[Mode] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=30 * 24 * 3600)] | None = None
    multitask: str | None = None
    durability: Literal["sync", "async", "exit"] | None = None
    metadata: dict[str, Any] | None = None

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

    resume: Any
    stream: list[Mode] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=30 * 24 * 3600)] | None = None


class CancelRequest(_Body):
    """Why a run is cancelled, for its terminal line."""

    reason: Annotated[str, Field(max_length=500)] | None = None


class SeedRequest(_Body):
    """A run of the seed profile; everything has a default."""

    thread_id: str | None = None
    graph: str | None = None
    input: dict[str, Any] | None = None

    _ids = field_validator("thread_id")(check_id)


class RunInfo(BaseModel):
    """A run as it is now."""

    run_id: str
    thread_id: str
    graph: str
    status: str
    epoch: int
    last_seq: int
    created_at: str
    updated_at: str
    started_at: str | None
    ended_at: str | None
    deadline: str | None = None
    cancel_reason: str | None = None
    stream: list[str]
    metadata: dict[str, Any] | None = None
    #: While it waits: how many runs were submitted before it and have not started.
    queue_position: int | None = None
    #: What the terminal line says, without the output.
    result: dict[str, Any] | None = None


class GraphInfo(BaseModel):
    """A graph that is served."""

    name: str
    description: str | None
    nodes: list[str]
    default_input: Any = None
    digest: str


class ThreadState(BaseModel):
    """The state of a thread after its latest checkpoint."""

    thread_id: str
    graph: str
    values: Any
    next: list[str]
    interrupts: list[dict[str, Any]]
    checkpoint_id: str | None
    created_at: str | None
    active_run: str | None


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
