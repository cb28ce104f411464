"""Shows a run's trace in the terminal: what ran when, which attempts failed, where it slept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from runtime.cli_screen import clean
from runtime.cli_view import STATUSES, counted, took

__all__ = ["waterfall"]

#: Mark and style of what a segment, a node or an attempt came to.
MARKS: Mapping[str, tuple[str, str]] = {
    **STATUSES,
    "retried": ("↻", "yellow"),
    "exhausted": ("✗", "red"),
    "failed": ("✗", "red"),
    "lost": ("✗", "red"),
    "drained": ("■", "yellow"),
}
_OPEN = ("▶", "cyan")
_ERROR = ("✗", "red")
_OTHER = ("·", "dim")

_SERVER, _STATUS_ERROR = 2, 2
_NARROWEST_BAR = 12
_DURATION = 8
_OUTCOMES = ("sereno.run.outcome", "sereno.node.outcome", "sereno.attempt.outcome")


@dataclass(slots=True)
class _Span:
    """One span of OTLP/JSON, with what is below it."""

    id: str
    parent: str
    trace: str
    name: str
    kind: int
    start: int
    #: None while it goes on.
    end: int | None
    failed: bool
    attributes: Mapping[str, Any]
    #: The message of the exception that it tells of.
    message: str
    below: list[_Span] = field(default_factory=list)

    @property
    def is_segment(self) -> bool:
        return "sereno.run.trigger" in self.attributes

    @property
    def outcome(self) -> str:
        return next((str(self.attributes[n]) for n in _OUTCOMES if n in self.attributes), "")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line: a span, or the pause between two attempts."""

    label: Text
    start: int
    end: int
    stroke: str
    style: str
    open: bool = False


def waterfall(trace: Mapping[str, Any], width: int, now: float) -> RenderableType:
    """A run's trace, as `/v1/runs/{id}/trace` answers it, on lines of `width` cells.

    `now`, in Unix seconds, is where spans end that have not ended.
    """
    spans = _read(trace)
    roots = _grown(spans)
    shown = [span for root in roots for span in _all(root)]
    if not shown:
        return Text("no spans", "dim")
    until = max(int(now * 1e9), *(span.end or span.start for span in shown))
    first = min(span.start for span in shown)
    last = max(until if span.end is None else span.end for span in shown)
    rows = [row for root in roots for row in _rows(root, 0, until)]
    return Group(
        _title(shown, first, last),
        *_notes(trace, spans, shown),
        *_drawn(rows, first, last, width),
    )


# Reading.


def _read(trace: Mapping[str, Any]) -> list[_Span]:
    found = [
        span
        for group in trace.get("resourceSpans") or ()
        for scope in group.get("scopeSpans") or ()
        for span in scope.get("spans") or ()
    ]
    return [_span(said) for said in (*found, *(trace.get("open") or ()))]


def _span(said: Mapping[str, Any]) -> _Span:
    end = said.get("endTimeUnixNano")
    events = [event for event in said.get("events") or () if event.get("name") == "exception"]
    told = _attributes(events[-1]) if events else {}
    return _Span(
        id=said["spanId"],
        parent=said.get("parentSpanId") or "",
        trace=said["traceId"],
        name=clean(said.get("name") or "?"),
        kind=said.get("kind") or 0,
        start=int(said["startTimeUnixNano"]),
        end=int(end) if end is not None else None,
        failed=(said.get("status") or {}).get("code") == _STATUS_ERROR,
        attributes=_attributes(said),
        message=" ".join(clean(str(told.get("exception.message") or "")).split()),
    )


def _attributes(said: Mapping[str, Any]) -> dict[str, Any]:
    return {pair["key"]: _value(pair.get("value") or {}) for pair in said.get("attributes") or ()}


def _value(typed: Mapping[str, Any]) -> Any:
    for kind, value in typed.items():
        if kind == "intValue":
            return int(value)
        if kind == "doubleValue":
            return float(value)
        return value
    return None


def _grown(spans: Sequence[_Span]) -> list[_Span]:
    """The tree's roots in the order of their start.

    Requests that joined or replayed the run have traces of their own, perhaps much later: they
    would only make the scale useless.
    """
    by_id = {(span.trace, span.id): span for span in spans}
    roots: list[_Span] = []
    for span in sorted(by_id.values(), key=lambda span: span.start):
        parent = by_id.get((span.trace, span.parent))
        (parent.below if parent is not None else roots).append(span)
    traces = {span.trace for span in spans if span.is_segment or span.kind != _SERVER}
    return [root for root in roots if root.trace in traces] or roots


def _all(span: _Span) -> Iterator[_Span]:
    yield span
    for child in span.below:
        yield from _all(child)


# Rows.


def _rows(span: _Span, depth: int, until: int) -> Iterator[_Row]:
    yield _row(span, depth, until)
    if span.message:
        text = Text.assemble("  " * (depth + 1), (f"{span.message}", "red"))
        yield _Row(text, 0, 0, "", "")
    before: dict[Any, _Span] = {}
    for child in span.below:
        # Attempts of one call, or of the node itself.
        series = child.attributes.get("sereno.call.id")
        if "sereno.attempt.number" in child.attributes:
            if (earlier := before.get(series)) is not None:
                yield from _pause(earlier, child.start, depth + 1)
            before[series] = child
        yield from _rows(child, depth + 1, until)
    for earlier in before.values():
        if span.end is None:
            yield from _pause(earlier, until, depth + 1, open=True)


def _row(span: _Span, depth: int, until: int) -> _Row:
    about = span.attributes
    outcome = span.outcome
    mark, style = MARKS.get(outcome, _ERROR if span.failed else _OTHER)
    if span.end is None:
        mark, style = _OPEN
    label = Text.assemble("  " * depth, (mark, style), " ", _named(span))
    # The marks of these say it all, and the room is for the cause.
    said = [outcome] if outcome not in ("", "success", "retried") else []
    if span.end is None:
        said.append("running")
    if "error.type" in about and span.failed:
        said.append(clean(str(about["error.type"])))
    if (code := about.get("http.response.status_code")) is not None:
        said.append(str(code))
    if said:
        label.append("  " + " ".join(said), style)
    end = until if span.end is None else span.end
    return _Row(label, span.start, end, "━", style, open=span.end is None)


def _named(span: _Span) -> str:
    number = span.attributes.get("sereno.attempt.number")
    if number is None:
        return span.name
    most = span.attributes.get("sereno.attempt.max")
    name = f"attempt {number}" + (f" of {most}" if most else "")
    call = span.attributes.get("sereno.call.name")
    return f"{name} · {clean(str(call))}" if call else name


def _pause(earlier: _Span, until: int, depth: int, *, open: bool = False) -> Iterator[_Row]:
    """The back-off after an attempt, as long as it really was."""
    if earlier.end is None or not earlier.attributes.get("sereno.attempt.will_retry"):
        return
    planned = float(earlier.attributes.get("sereno.attempt.backoff_s") or 0)
    text = f"┄ sleeps, {took(planned)} planned" if open else "┄ sleep"
    label = Text.assemble("  " * depth, (text, "yellow"))
    yield _Row(label, earlier.end, until, "┄", "yellow", open=open)


# Drawing.


def _title(shown: Sequence[_Span], first: int, last: int) -> Text:
    segments = [span for span in shown if span.is_segment]
    latest = segments[-1] if segments else None
    outcome = latest.outcome if latest else ""
    going_on = any(span.end is None for span in shown)
    mark, style = _OPEN if going_on else MARKS.get(outcome, _OTHER)
    attempts = [s for s in shown if s.attributes.get("sereno.attempt.layer") == "node"]
    retries = sum(s.attributes.get("sereno.attempt.will_retry") is True for s in shown)
    nodes = sum(
        "sereno.attempt.number" not in s.attributes and s.name.startswith("node ") for s in shown
    )
    slept = sum(float(s.attributes.get("sereno.run.backoff_s") or 0) for s in segments)
    numbers = [took((last - first) / 1e9), counted(len(shown), "span"), counted(nodes, "node")]
    numbers += [
        counted(len(attempts), "attempt"),
        f"{retries} {'retry' if retries == 1 else 'retries'}",
    ]
    if slept:
        numbers.append(f"{took(slept)} of back-off")
    name = latest.name if latest else "run"
    state = "running" if going_on else outcome or "unknown"
    return Text.assemble(
        (f"{mark} {state}", f"bold {style}"), f"  {name}  ", (" · ".join(numbers), "dim")
    )


def _notes(
    trace: Mapping[str, Any], spans: Sequence[_Span], shown: Sequence[_Span]
) -> Iterator[Text]:
    others = sum(span not in shown and not _is_look(span) for span in spans)
    if others:
        yield Text(f"  not shown: {counted(others, 'span')} of requests that read it later", "dim")
    left_out = sum(int(s.attributes.get("sereno.run.spans_suppressed") or 0) for s in shown)
    if left_out:
        yield Text(
            f"  {counted(left_out, 'span')} over the budget of a run: not recorded", "yellow"
        )
    elif trace.get("complete") is False and all(span.end is not None for span in shown):
        yield Text(
            "  not all of it: another process saw the rest, or it had to make room", "yellow"
        )


def _is_look(span: _Span) -> bool:
    """Whether it is a request for this very trace; it has no name before it ends."""
    return span.name.endswith("/trace") or str(span.attributes.get("url.path")).endswith("/trace")


def _drawn(rows: Sequence[_Row], first: int, last: int, width: int) -> Iterator[Text]:
    longest = max(cell_len(row.label.plain) for row in rows if row.stroke)
    room = width - _DURATION - 2
    label_width = min(longest, max(room - _NARROWEST_BAR, 0), max(24, width // 2))
    bar_width = room - label_width
    if bar_width < _NARROWEST_BAR:
        label_width, bar_width = max(room, 1), 0
    whole = max(1, last - first)
    if bar_width:
        right = took(whole / 1e9)
        scale = "0" + right.rjust(bar_width - 1)
        yield Text(" " * (width - bar_width) + scale, "dim", no_wrap=True, overflow="crop")
    for row in rows:
        line = row.label.copy()
        line.no_wrap, line.overflow = True, "crop"
        if not row.stroke:
            line.truncate(width, overflow="ellipsis")
            yield line
            continue
        line.truncate(label_width, overflow="ellipsis", pad=True)
        line.append(" " + took((row.end - row.start) / 1e9).rjust(_DURATION) + " ", "dim")
        if bar_width:
            begin = min(bar_width - 1, (row.start - first) * bar_width // whole)
            end = -(-(row.end - first) * bar_width // whole)
            length = max(1, min(bar_width, end) - begin)
            line.append(" " * begin)
            line.append(row.stroke * (length - row.open) + "▶" * row.open, row.style)
        yield line
