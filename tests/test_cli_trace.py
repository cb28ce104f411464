"""A trace in the terminal: every attempt, every pause, and the error where it happened."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import Span, SpanKind
from rich.cells import cell_len
from rich.console import Console

from runtime.cli_trace import waterfall
from telemetry.recorder import Recorder, otlp
from telemetry.tracing import Tracing, set_error

MS = 1_000_000
BEGAN = 1_800_000_000_000 * MS
#: Seconds after the run began at which it is looked at.
NOW = 2.5


class Story:
    """Spans whose times, in ms after the run began, are told."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.tracing = Tracing(processors=[self.recorder])

    def start(self, name: str, at: int, parent: Span | None = None, **attributes: Any) -> Span:
        kind = SpanKind.SERVER if name.startswith(("GET /", "POST /")) else SpanKind.INTERNAL
        return self.tracing.start(
            name,
            kind=kind,
            parent=parent.get_span_context() if parent else None,
            attributes={"sereno.run.id": "r"} | dotted(attributes),
            start_ns=BEGAN + at * MS,
        )

    def end(self, span: Span, at: int, exc: Exception | None = None, **attributes: Any) -> None:
        span.set_attributes(dotted(attributes))
        if exc is not None:
            set_error(span, exc, messages=True)
        span.end(BEGAN + at * MS)

    def attempt(self, number: int, at: int, node: Span, **attributes: Any) -> Span:
        about = {"attempt_number": number, "attempt_layer": "node", **attributes}
        return self.start("attempt a", at, node, **about)

    def told(self) -> dict[str, Any]:
        found = self.recorder.run("r", self.tracing.open_spans("r"))
        return otlp(found) if found else {"resourceSpans": [], "open": []}


def dotted(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"sereno.{name.replace('_', '.', 1)}": value for name, value in attributes.items()}


@pytest.fixture(autouse=True)
def _no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")


@pytest.fixture
def story() -> Iterator[Story]:
    made = Story()
    yield made
    made.tracing.close()


def drawn(trace: dict[str, Any], width: int = 80) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(waterfall(trace, width, BEGAN / 1e9 + NOW))
    return out.getvalue().splitlines()


#: A row: label, duration, bar.
ROW = re.compile(r"(.*?) +(\d[\d.]* m?s) ([ ━┄]*▶?)")


def labels(lines: list[str]) -> list[str]:
    """The rows' left sides."""
    rows = [ROW.fullmatch(line) for line in lines]
    return [row[1] if row else line.rstrip() for row, line in zip(rows, lines, strict=True)]


def bar_of(lines: list[str], label: str) -> tuple[float, float]:
    """Where a row's bar begins and ends, as parts of the whole."""
    (row,) = (row for line in lines if (row := ROW.fullmatch(line)) and row[1].strip() == label)
    (axis,) = (line for line in lines if line.strip().startswith("0 "))
    scale = axis.index("0")
    whole = len(axis) - scale
    begin = row.start(3) + len(row[3]) - len(row[3].lstrip())
    return (begin - scale) / whole, (row.start(3) + len(row[3].rstrip()) - scale) / whole


def retried(story: Story) -> None:
    """A node whose first attempt fails, and which sleeps 400 ms before the second."""
    request = story.start("POST /v1/runs", 0)
    run = story.start("run g", 0, request, run_trigger="api")
    node = story.start("node a", 0, run)
    first = story.attempt(1, 0, node, attempt_max=3)
    exc = ConnectionError("refused:\n[red]not markup[/red]")
    story.end(first, 600, exc, attempt_outcome="retried", attempt_will_retry=True)
    second = story.attempt(2, 1000, node, attempt_max=3)
    story.end(second, 2000, attempt_outcome="success")
    story.end(node, 2000, node_outcome="success")
    story.end(run, 2000, run_outcome="success", run_backoff_s=0.4)
    story.end(request, 2000)


def test_attempts_stand_below_their_node_with_the_pause_between_them(story: Story) -> None:
    retried(story)
    lines = drawn(story.told())

    assert lines[0].rstrip() == (
        "✓ success  run g  2.0 s · 5 spans · 1 node · 2 attempts · 1 retry · 400 ms of"
    )
    assert labels(lines[3:]) == [
        "· POST /v1/runs",
        "  ✓ run g",
        "    ✓ node a",
        "      ↻ attempt 1 of 3  ConnectionError",
        "        refused: [red]not markup[/red]",
        "      ┄ sleep",
        "      ✓ attempt 2 of 3",
    ]


def test_bars_are_to_scale(story: Story) -> None:
    retried(story)
    lines = drawn(story.told(), width=180)

    assert bar_of(lines, "✓ run g") == (0, 1)
    assert bar_of(lines, "↻ attempt 1 of 3  ConnectionError") == pytest.approx((0, 0.3), abs=0.02)
    assert bar_of(lines, "┄ sleep") == pytest.approx((0.3, 0.5), abs=0.02)
    assert bar_of(lines, "✓ attempt 2 of 3") == pytest.approx((0.5, 1), abs=0.02)


def test_a_run_that_goes_on_is_open_to_the_right(story: Story) -> None:
    run = story.start("run g", 0, run_trigger="api")
    node = story.start("node a", 500, run)
    first = story.attempt(1, 500, node)
    story.end(
        first,
        1500,
        ValueError("no"),
        attempt_outcome="retried",
        attempt_will_retry=True,
        attempt_backoff_s=3.0,
    )
    lines = drawn(story.told())

    assert lines[0].startswith("▶ running  run g  2.5 s")
    assert labels(lines[2:]) == [
        "▶ run g  running",
        "  ▶ node a  running",
        "    ↻ attempt 1  ValueError",
        "      no",
        "    ┄ sleeps, 3.0 s planned",
    ]
    assert lines[2].endswith("━▶")
    assert (
        lines[4].endswith("━" + " " * (len(lines[4]) - len(lines[4].rstrip())))
        or "▶" not in lines[4]
    )
    assert lines[6].endswith("┄▶")


def test_retries_of_calls_are_told_apart(story: Story) -> None:
    run = story.start("run g", 0, run_trigger="api")
    node = story.start("node a", 0, run)
    attempt = story.attempt(1, 0, node)
    for number, (begin, end) in enumerate([(0, 100), (100, 200), (300, 400), (900, 1000)]):
        call = story.start(
            "attempt fetch",
            begin,
            attempt,
            call_name=f"fetch{number % 2}",
            call_id=str(number % 2),
            attempt_number=number // 2 + 1,
            attempt_layer="call",
        )
        story.end(call, end, attempt_will_retry=number < 2)

    found = [line.strip() for line in labels(drawn(story.told()))]
    assert found[5:] == [
        "· attempt 1 · fetch0",
        "· attempt 1 · fetch1",
        "┄ sleep",
        "· attempt 2 · fetch0",
        "┄ sleep",
        "· attempt 2 · fetch1",
    ]


def test_an_attempt_that_is_the_last_is_followed_by_no_pause(story: Story) -> None:
    run = story.start("run g", 0, run_trigger="api")
    node = story.start("node a", 0, run)
    story.end(story.attempt(1, 0, node), 10, attempt_outcome="retried", attempt_will_retry=True)
    story.end(node, 500, node_outcome="cancelled")
    story.end(run, 500, run_outcome="cancelled")

    text = "\n".join(drawn(story.told()))
    assert "sleep" not in text
    assert "■ node a  cancelled" in text


def test_requests_that_came_later_do_not_stretch_the_scale(story: Story) -> None:
    retried(story)
    later = story.start("GET /v1/runs/{run_id}/stream", 3_600_000)
    story.end(later, 3_600_100)
    lines = drawn(story.told())

    assert lines[0].startswith("✓ success  run g  2.0 s")
    assert "not shown: 1 span of requests that read it later" in "\n".join(lines)


def test_the_request_that_asks_for_the_trace_is_none_that_is_missed(story: Story) -> None:
    """Its span is open, and has no name yet."""
    retried(story)
    path = {"url.path": "/v1/runs/r/trace", "sereno.run.id": "r"}
    story.tracing.start("GET", kind=SpanKind.SERVER, parent=None, attributes=path, start_ns=BEGAN)

    assert "not shown" not in "\n".join(drawn(story.told()))


def test_it_says_when_something_is_missing(story: Story) -> None:
    run = story.start("run g", 0, run_trigger="recovery")
    story.end(run, 10, run_outcome="success")

    assert "not all of it" in "\n".join(drawn(story.told()))


def test_it_says_how_much_the_budget_left_out(story: Story) -> None:
    run = story.start("run g", 0, run_trigger="api")
    story.end(run, 10, run_outcome="success", run_spans_suppressed=7)

    assert "7 spans over the budget of a run: not recorded" in "\n".join(drawn(story.told()))


def test_a_child_whose_parent_is_not_there_is_shown_all_the_same(story: Story) -> None:
    run = story.start("run g", 0, run_trigger="api")
    gone = story.start("node gone", 0, run)
    story.tracing.discard(gone)
    story.end(story.attempt(1, 5, gone), 10, attempt_outcome="success")
    story.end(run, 10, run_outcome="success")

    assert labels(drawn(story.told()))[2:] == ["✓ run g", "✓ attempt 1"]


def test_a_trace_without_spans_says_so() -> None:
    assert drawn({"resourceSpans": [], "open": []}) == ["no spans"]


def test_text_of_others_leaves_the_terminal_alone(story: Story) -> None:
    run = story.start("run \x1b[31mg", 0, run_trigger="api")
    story.end(run, 10, ValueError("\x1b]0;title\x07"), run_outcome="error")

    assert "\x1b" not in "\n".join(drawn(story.told()))


@settings(deadline=None)
@given(
    spans=st.lists(
        st.tuples(
            st.integers(0, 9),  # which of the earlier ones is the parent; 9: none
            st.integers(0, 3000),
            st.one_of(st.none(), st.integers(0, 3000)),
            st.text(max_size=40),
        ),
        max_size=12,
    ),
    width=st.integers(20, 200),
)
def test_any_trace_fits_any_terminal(
    spans: list[tuple[int, int, int | None, str]], width: int
) -> None:
    made = Story()
    there: list[Span] = []
    for above, at, took, name in spans:
        parent = there[above] if above < len(there) else None
        span = made.start(name, at, parent, attempt_number=1, attempt_will_retry=True)
        there.append(span)
        if took is not None:
            made.end(span, at + took)

    assert all(cell_len(line) <= width for line in drawn(made.told(), width))
