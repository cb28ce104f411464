"""What the lifespan built, for whoever answers a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from opentelemetry.trace import SpanContext

from runtime.engines.base import Engine
from runtime.graphs import Graphs
from runtime.model import NewRun, Run
from runtime.settings import Settings
from runtime.transports.ndjson import Ndjson
from runtime.transports.seed import SeedNdjson
from telemetry.health import Checks
from telemetry.metrics import Metrics
from telemetry.recorder import Recorded

__all__ = ["Services", "ServicesDep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The open parts of a server. What executes is known by what it can be asked."""

    settings: Settings
    engine: Engine
    graphs: Graphs
    checks: Checks
    metrics: Metrics
    ndjson: Ndjson
    seed: SeedNdjson
    #: Commit a run and have it executed.
    submit: Callable[[NewRun, Mapping[str, Any]], Awaitable[Run]]
    #: Ask a run to end.
    cancel: Callable[[str, str], Awaitable[Run]]
    #: Nodes of a run that are executing in this process.
    open_nodes: Callable[[str], Sequence[str]]
    #: Done when the server shuts down: open streams say where they are and end.
    draining: Callable[[], bool]
    #: The span of a run's latest segment, as far as it is known here.
    run_context: Callable[[Run], SpanContext | None] = lambda run: None
    #: A run's spans, as long as they are kept; None when they never were.
    recorded: Callable[[str], Recorded | None] = lambda run_id: None
    info: Mapping[str, Any] = field(default_factory=dict)


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]
