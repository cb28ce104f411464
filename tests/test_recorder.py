"""The latest runs' spans can be read, are bounded, and say when something is missing."""

from __future__ import annotations

import base64
import math
import threading
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.trace import Link, Span, SpanKind

from telemetry.recorder import Recorded, Recorder, otlp
from telemetry.tracing import Tracing, new_context, set_error


@pytest.fixture(autouse=True)
def _no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")


def traced(most: int = 1000, most_per_run: int = 100) -> tuple[Tracing, Recorder]:
    recorder = Recorder(most, most_per_run=most_per_run)
    return Tracing(processors=[recorder]), recorder


def of(run: str, **more: Any) -> dict[str, Any]:
    return {"sereno.run.id": run} | {f"sereno.{name}": value for name, value in more.items()}


def segment(tracing: Tracing, run: str, trigger: str = "api") -> Span:
    return tracing.start("run g", attributes=of(run) | {"sereno.run.trigger": trigger})


def end(span: Span, outcome: str = "success") -> None:
    span.set_attribute("sereno.run.outcome", outcome)
    span.end()


def a_run(tracing: Tracing, run: str, spans: int = 3) -> None:
    """A whole run of that many spans."""
    whole = segment(tracing, run)
    for number in range(spans - 1):
        tracing.start(f"s{number}", parent=whole.get_span_context(), attributes=of(run)).end()
    end(whole)


def read(tracing: Tracing, recorder: Recorder, run: str) -> Recorded:
    found = recorder.run(run, tracing.open_spans(run))
    assert found is not None
    return found


def test_a_run_that_goes_on_shows_what_ended_and_what_is_open() -> None:
    tracing, recorder = traced()
    whole = segment(tracing, "r")
    node = tracing.start("node a", parent=whole.get_span_context(), attributes=of("r"))
    tracing.start("attempt a", parent=node.get_span_context(), attributes=of("r")).end()

    going_on = read(tracing, recorder, "r")
    assert [span.name for span in going_on.spans] == ["attempt a"]
    assert [span.name for span in going_on.open] == ["run g", "node a"]
    assert not going_on.complete

    node.end()
    end(whole)
    ended = read(tracing, recorder, "r")
    assert [span.name for span in ended.spans] == ["attempt a", "node a", "run g"]
    assert list(ended.open) == []
    assert ended.complete
    assert not ended.forgotten


def test_a_run_that_nobody_saw_is_none() -> None:
    tracing, recorder = traced()
    tracing.start("elsewhere").end()

    assert recorder.run("r", tracing.open_spans("r")) is None


def test_a_request_belongs_to_the_run_that_it_learns_of_late() -> None:
    tracing, recorder = traced()
    request = tracing.start("POST /v1/runs", kind=SpanKind.SERVER)
    request.set_attribute("sereno.run.id", "r")
    request.end()

    assert [span.name for span in read(tracing, recorder, "r").spans] == ["POST /v1/runs"]


def test_a_span_that_ends_between_the_two_looks_is_there_once() -> None:
    tracing, recorder = traced()
    span = tracing.start("a", attributes=of("r"))
    looked = tracing.open_spans("r")
    span.end()

    found = recorder.run("r", looked)
    assert found is not None
    assert len(found.spans) == 1
    assert list(found.open) == []


@pytest.mark.parametrize(
    ("trigger", "outcome", "complete"),
    [
        pytest.param("api", "error", True, id="failed"),
        pytest.param("api", "drained", False, id="handed-on"),
        pytest.param("recovery", "success", False, id="taken-over"),
    ],
)
def test_a_run_is_complete_when_all_of_it_happened_here(
    trigger: str, outcome: str, complete: bool
) -> None:
    tracing, recorder = traced()
    end(segment(tracing, "r", trigger), outcome)

    assert read(tracing, recorder, "r").complete is complete


def test_a_run_is_not_complete_when_its_budget_left_spans_out() -> None:
    tracing, recorder = traced()
    whole = segment(tracing, "r")
    whole.set_attribute("sereno.run.spans_suppressed", 3)
    end(whole)

    assert not read(tracing, recorder, "r").complete


def test_one_run_has_a_bound_that_its_segment_does_not_fall_under() -> None:
    tracing, recorder = traced(most_per_run=5)
    a_run(tracing, "r", spans=20)

    found = read(tracing, recorder, "r")
    assert [span.name for span in found.spans] == ["s0", "s1", "s2", "s3", "s4", "run g"]
    assert not found.complete


def test_ended_runs_make_room_whole_and_oldest_first() -> None:
    tracing, recorder = traced(most=10)
    going_on = segment(tracing, "first")
    tracing.start("a", attributes=of("first")).end()
    for number in range(5):
        a_run(tracing, f"r{number}", spans=3)

    assert recorder.kept <= 10
    states = {}
    for run in ("first", *(f"r{number}" for number in range(5))):
        found = read(tracing, recorder, run)
        states[run] = (len(found.spans), found.complete, found.forgotten)
    assert states == {
        "first": (1, False, False),
        "r0": (0, False, True),
        "r1": (0, False, True),
        "r2": (3, True, False),
        "r3": (3, True, False),
        "r4": (3, True, False),
    }
    going_on.end()


def test_a_run_that_had_to_make_room_is_never_complete_again() -> None:
    tracing, recorder = traced(most=4)
    a_run(tracing, "old")
    a_run(tracing, "new")
    request = tracing.start("GET", kind=SpanKind.SERVER, attributes=of("old"))
    request.end()
    end(segment(tracing, "old", "api"))

    found = read(tracing, recorder, "old")
    assert len(found.spans) == 2
    assert found.forgotten
    assert not found.complete


def test_requests_about_runs_of_long_ago_take_no_room_from_others() -> None:
    tracing, recorder = traced(most=10)
    going_on = segment(tracing, "r")
    tracing.start("a", attributes=of("r")).end()
    for number in range(100):
        tracing.start("GET", kind=SpanKind.SERVER, attributes=of(f"old{number}")).end()
    tracing.start("b", attributes=of("r")).end()
    end(going_on)

    assert [span.name for span in read(tracing, recorder, "r").spans] == ["a", "b", "run g"]


def test_without_an_ended_run_the_quietest_makes_room() -> None:
    tracing, recorder = traced(most=4)
    for run in ("a", "b", "a", "c", "a", "d"):
        tracing.start("s", attributes=of(run)).end()

    assert recorder.kept <= 4
    assert len(read(tracing, recorder, "a").spans) == 3
    assert read(tracing, recorder, "b").forgotten


def test_threads_may_end_spans_at_the_same_time() -> None:
    tracing, recorder = traced(most=50)

    def many(who: int) -> None:
        for number in range(50):
            a_run(tracing, f"{who}-{number}", spans=4)

    threads = [threading.Thread(target=many, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert recorder.kept == sum(len(run.spans) for run in recorder._runs.values()) <= 50


# OTLP/JSON.


def test_a_trace_is_what_an_exporter_would_have_sent() -> None:
    """Compared with the SDK's own encoder: Protobuf's JSON but for hex ids, as OTLP says."""
    tracing, recorder = traced()
    caller = new_context()
    caller = type(caller)(caller.trace_id, caller.span_id, is_remote=True)
    request = tracing.start("POST /v1/runs", kind=SpanKind.SERVER, parent=caller)
    request.set_attribute("sereno.run.id", "r")
    whole = tracing.start(
        "run g",
        parent=request.get_span_context(),
        attributes=of("r")
        | {
            "text": "é\n",
            "yes": True,
            "no": False,
            "zero": 0,
            "many": 2**62,
            "part": 0.25,
            "odd": math.nan,
            "endless": -math.inf,
            "bytes": b"\x00\xff",
            "list": ["a", "b"],
            "numbers": [1, 2],
            "map": {"a": 1, "b": [True]},
            "empty": "",
        },
        links=[Link(caller, {"sereno.link.kind": "resume_of"}), Link(new_context())],
    )
    set_error(whole, ValueError("no"), messages=True)
    whole.add_event("bare", timestamp=5)
    whole.end()
    tracer = tracing.provider.get_tracer("httpx", "1.0", schema_url="https://example.test/1")
    tracer.start_span("GET", kind=SpanKind.CLIENT, attributes=of("r")).end()
    request.end()

    found = read(tracing, recorder, "r")
    sent = MessageToDict(encode_spans(found.spans), use_integers_for_enums=True)
    assert otlp(found)["resourceSpans"] == as_otlp(sent["resourceSpans"])


def test_a_span_that_has_not_ended_has_no_end() -> None:
    tracing, recorder = traced()
    span = segment(tracing, "r")
    context = span.get_span_context()

    (there,) = otlp(read(tracing, recorder, "r"))["open"]
    assert there["spanId"] == f"{context.span_id:016x}"
    assert there["traceId"] == f"{context.trace_id:032x}"
    assert there["name"] == "run g"
    assert int(there["startTimeUnixNano"]) > 0
    assert "endTimeUnixNano" not in there
    assert {"key": "sereno.run.id", "value": {"stringValue": "r"}} in there["attributes"]


def as_otlp(value: Any) -> Any:
    """Protobuf's JSON as OTLP writes it: ids in hex, nothing for an empty status."""
    if isinstance(value, list):
        return [as_otlp(item) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {name: as_otlp(item) for name, item in value.items() if (name, item) != ("status", {})}
    for name in ("traceId", "spanId", "parentSpanId"):
        if name in plain:
            plain[name] = base64.b64decode(plain[name]).hex()
    return plain
