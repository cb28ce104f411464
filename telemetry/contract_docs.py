"""Writes `docs/telemetry.md` from the contract, as `python -m telemetry.contract` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from telemetry.contract import (
    ATTRIBUTES,
    CLOSED_SETS,
    LOG_EVENTS,
    LOG_FIELDS,
    METRIC_GROUPS,
    METRICS,
    NODE_ATTRIBUTES,
    OTHER,
    OVERFLOW,
    PREFIX,
    RESOURCE,
    RUN_ATTRIBUTES,
    SPANS,
    VERSION,
    B,
    G,
    Label,
    Metric,
    N,
    R,
    S,
    Span,
)

__all__ = ["document"]

_BUCKETS = {"S": S, "N": N, "R": R, "G": G, "B": B}
_DIALECT = {attribute.name for attribute in ATTRIBUTES if attribute.dialect}

# One sentence per line; a backslash joins what is too long for this file.

_INTRODUCTION = f"""\
# Telemetry

What Sereno says of itself: contract version {VERSION}.
This page is written by `python -m telemetry.contract > docs/telemetry.md`: change the contract, \
not the page.

Names and label values are stable: a change that breaks a reader raises the version, additions do \
not.
The resource attribute `sereno.contract.version` and `{PREFIX}build_info` carry it.
What is marked *later* is declared, and nothing moves it yet.
"""

_SPANS = """\
## Spans

The *attempt* is the operation that may fail, the *node* the logical one around its attempts.
Every span of a run carries {run}; every one below a node also {node}.
Interrupt, cancel and drain are outcomes, never errors.
An exception is recorded once, as the event `exception` of the innermost span that owns it.
There are no spans and no events per line, token or chunk.
When a process died, the one that recovers its runs writes the spans of their segments, nodes and \
attempts, with outcome `lost` and `error.type` `worker_lost`.
Crash recovery goes on in the same trace; the run that answers an interrupt begins a new one, with \
a link.
`sereno.link.kind` says what a link is: to the `previous_segment`, to the run that it is a \
`resume_of`, to the `run` that a reader joins, or to the `remote` span of a caller that is not \
trusted.
Users' own spans, and those of other instrumentations, find the attempt as their parent.
"""

_ATTRIBUTES = """\
## Attributes

Log records call an attribute by its log key.
Those of the *dialect* are there with `SERENO_SEMCONV=genai` only; no name of ours, and no metric, \
depends on them.
"""

_COUNTS = f"""\
## What equals what

Per graph and node, before any sampling:

- attempt spans of layer node = the sum of `{PREFIX}node_attempts_total` = `node.started` lines;
- attempts with outcome `retried` = spans with `sereno.attempt.will_retry` = `node.retrying` lines \
= `node.retrying` records;
- attempts that are a `retry` = the same, less the back-offs that were cut short;
- call attempt spans = the sum of `{PREFIX}call_attempts_total`;
- call attempts with outcome `retried` = `call.retrying` lines = `call.retrying` records;
- segments with the outcome of a run = `{PREFIX}runs_finished_total` = terminal lines = terminal \
records;
- `{PREFIX}runs_started_total` = `run.queued` lines.

After a `kill -9` the metrics of the dead process are gone, and so are spans that had ended but \
were not exported yet (`OTEL_BSP_SCHEDULE_DELAY`, 5 s) and its open requests, calls, tools and \
models.
Open segments, nodes and attempts are written by the process that recovers the run, with outcome \
`lost`; they end with the lease, or when that process starts.
The lines have all of it.
"""

_METRICS = f"""\
## Metrics

All names begin with `{PREFIX}`.
Label values come from closed sets, or from what is served and configured; never from ids, \
messages, URLs or what a client sent.
A value outside its closed set becomes `{OTHER}` where the set has it, else `{OVERFLOW}`.
Beyond `SERENO_METRICS_MAX_SERIES` series of a family, further ones fold into those whose open \
labels are `{OVERFLOW}`; `{PREFIX}metric_series_dropped_total` counts how often.
Series that follow from the graphs and the closed sets are there from the start, at 0, and do not \
count towards that number.
*On demand* series appear when something is counted.
A gauge that is read from elsewhere is NaN as long as nobody knows its value.
Exemplars name a trace and a span, and are only in the OpenMetrics exposition.
Profile *llm* moves only where graphs call chat models and tools.
Besides these, the exposition has `process_*` and `python_*`.
"""

_LOGS = """\
## Log events

Records are JSON, one a line, on stdout.
The `event` is the type of the run's line where there is one.
Any record may have {fields}, and an `extra_<key>` for what would have taken the place of one.
"""

_RESOURCE = """\
## Resource

What `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say wins.
The command line is not told: it may hold secrets.
"""


def document() -> str:
    """The whole page."""
    return "\n".join(_sections())


def _sections() -> Iterator[str]:
    yield _INTRODUCTION
    yield _SPANS.format(run=_codes(RUN_ATTRIBUTES), node=_codes(NODE_ATTRIBUTES))
    yield _table(
        ("span", "name", "kind", "parent", "links", "attributes", "end and status"),
        (
            (
                span.key,
                _code(span.name),
                span.kind,
                span.parent,
                _codes(span.links),
                _codes(_own(span)),
                span.end,
            )
            for span in SPANS
        ),
    )
    yield _ATTRIBUTES
    yield _table(
        ("attribute", "type", "log key", "meaning"),
        (
            (
                _code(attribute.name),
                attribute.type,
                _code(attribute.log),
                _said(
                    attribute.help,
                    _codes(attribute.values) + "." if attribute.values else "",
                    "*Dialect.*" if attribute.dialect else "",
                ),
            )
            for attribute in ATTRIBUTES
        ),
    )
    yield _COUNTS
    yield _METRICS
    for subject, group in METRIC_GROUPS.items():
        yield f"### {subject}\n"
        yield _table(
            ("metric", "type", "labels", "buckets", "question it answers"), map(_row, group)
        )
    yield "### Labels from elsewhere\n"
    yield _table(("label", "drawn from"), _sources())
    yield "### Buckets\n"
    yield "".join(f"- {name}: {_bounds(bounds)}\n" for name, bounds in _BUCKETS.items())
    yield _LOGS.format(fields=_codes(LOG_FIELDS))
    yield _table(
        ("event", "level", "has", "may have", "when"),
        (
            (
                _code(event.name),
                " or ".join(filter(None, (event.level, event.quieter))),
                _codes(event.always),
                _codes(event.sometimes),
                _said(event.help, _later(event.later)),
            )
            for event in LOG_EVENTS
        ),
    )
    yield _RESOURCE
    yield _table(
        ("attribute", "meaning"),
        ((_code(a.name), _said(a.help, "" if a.always else "If given.")) for a in RESOURCE),
    )
    yield "## Closed sets\n"
    yield _table(
        ("set", "values", "meaning"),
        ((known.name, _codes(known.values), known.help) for known in CLOSED_SETS),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ("|".join(f" {cell} " if cell else " " for cell in line) for line in lines)
    return "".join(f"|{line}|\n" for line in cells)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _codes(texts: Iterable[str]) -> str:
    return " ".join(map(_code, texts))


def _said(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _later(reason: str) -> str:
    return f"*Later: {reason}.*" if reason else ""


def _own(span: Span) -> list[str]:
    """Without those that all spans of a run, or below a node, carry."""
    shared = {*RUN_ATTRIBUTES, *NODE_ATTRIBUTES, *_DIALECT}
    names = [*span.always, *span.sometimes]
    own = [name for name in names if name not in shared]
    if not _DIALECT.isdisjoint(names):
        own.append("gen_ai.*")
    return own + [f"{prefix}*" for prefix in span.foreign]


def _row(metric: Metric) -> Sequence[str]:
    return (
        _code(metric.name),
        metric.type + (", on demand" if metric.on_demand else ""),
        ", ".join(map(_label, metric.labels)),
        _buckets(metric),
        _said(
            metric.help,
            f"*Profile {metric.profile}.*" if metric.profile != "core" else "",
            *(f"*Later: `{value}`, {reason}.*" for value, reason in metric.later_values),
            _later(metric.later),
        ),
    )


def _label(label: Label) -> str:
    """Long sets go by their names."""
    if not label.values:
        return _code(label.name)
    named = [known.name for known in CLOSED_SETS if known.values == label.values]
    values = named[0] if named and len(label.values) > 3 else " ".join(label.values)
    return f"{_code(label.name)} ({values})"


def _buckets(metric: Metric) -> str:
    named = [name for name, bounds in _BUCKETS.items() if metric.buckets == bounds]
    buckets = named[0] if named else _bounds(metric.buckets)
    return buckets + (", exemplars" if metric.exemplar else "")


def _bounds(bounds: Iterable[float]) -> str:
    return " ".join(f"{bound:.10g}" for bound in bounds)


def _sources() -> Iterator[Sequence[str]]:
    by_source: dict[str, dict[str, None]] = {}
    for metric in METRICS:
        for label in metric.labels:
            by_source.setdefault(label.source, {})[label.name] = None
    return ((_codes(names), source) for source, names in by_source.items() if source)
