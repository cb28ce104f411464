"""Writes the spans that a process could not end because it died, from what its lines tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Link, SpanContext

from telemetry.observations import Visit
from telemetry.tracing import Tracing

__all__ = ["Lost", "LostNode"]

_WHY = "worker_lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostNode:
    """A node that was open when its process died, as its lines tell. Times in unix seconds."""

    visit: Visit
    span: SpanContext
    #: The span around it; None for the segment's.
    parent: SpanContext | None
    since: float
    #: Its latest attempt.
    attempt: int
    #: None when it was in a back-off.
    attempt_span: SpanContext | None
    attempt_since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A segment whose process died, as its lines tell. Times in unix seconds."""

    context: SpanContext
    parent: SpanContext | None
    links: Sequence[Link]
    trigger: str
    since: float
    #: The end of its lease.
    until: float
    nodes: Sequence[LostNode]

    def write(self, tracing: Tracing, attributes: Mapping[str, Any]) -> None:
        """End all of it with the lease; `attributes` are those of the run in that epoch."""
        for node in self.nodes:
            visit = node.visit
            below = {
                **attributes,
                "sereno.node.name": visit.node,
                "sereno.node.path": visit.label,
            }
            if node.attempt_span is not None:
                self._write(
                    tracing,
                    f"attempt {visit.node}",
                    node.attempt_span,
                    node.span,
                    node.attempt_since,
                    {
                        **below,
                        "sereno.attempt.number": node.attempt,
                        "sereno.attempt.layer": "node",
                        "sereno.attempt.outcome": "lost",
                        "sereno.attempt.will_retry": False,
                    },
                )
            self._write(
                tracing,
                f"node {visit.node}",
                node.span,
                node.parent or self.context,
                node.since,
                {
                    **below,
                    "sereno.task.id": visit.task,
                    "sereno.step": visit.step,
                    "sereno.node.attempts": node.attempt,
                    "sereno.node.outcome": "lost",
                },
            )
        self._write(
            tracing,
            f"run {attributes['sereno.graph.name']}",
            self.context,
            self.parent,
            self.since,
            {
                **attributes,
                "sereno.run.trigger": self.trigger,
                "sereno.run.outcome": "lost",
            },
            self.links,
        )

    def _write(
        self,
        tracing: Tracing,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        since: float,
        attributes: Mapping[str, Any],
        links: Sequence[Link] = (),
    ) -> None:
        tracing.write(
            name,
            context=context,
            parent=parent,
            attributes={**attributes, "sereno.error.class": _WHY},
            links=links,
            start_ns=round(since * 1e9),
            end_ns=round(self.until * 1e9),
            error=_WHY,
        )
