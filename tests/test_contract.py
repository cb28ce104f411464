"""What telemetry promises is consistent, documented and compared; every error has a class."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import re
import socket
import sqlite3
import subprocess
import sys
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any, get_args

import httpx
import httpx2
import openai
import pydantic
import pytest
import requests
import tenacity
from langchain_core.exceptions import OutputParserException
from langchain_core.tools import ToolException
from langgraph.errors import (
    GraphInterrupt,
    GraphRecursionError,
    InvalidUpdateError,
    NodeTimeoutError,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind
from prometheus_client import Counter

from runtime import events
from runtime.model import RunStatus
from telemetry import contract, contract_docs, genai, http, observations, selfwatch, storage
from telemetry.contract import ERROR_CLASSES, classify, error_type
from telemetry.metrics import Metrics

REQUEST = httpx.Request("GET", "http://service.test")
REQUEST2 = httpx2.Request("GET", "http://service.test")


def raised(expected: type[Exception], action: Any) -> Exception:
    with pytest.raises(expected) as info:
        action()
    return info.value


def with_attributes(**attributes: object) -> Exception:
    exc = Exception("from some client")
    vars(exc).update(attributes)
    return exc


def httpx_status(status: int) -> httpx.HTTPStatusError:
    response = httpx.Response(status, request=REQUEST)
    return httpx.HTTPStatusError("status", request=REQUEST, response=response)


def openai_status(cls: type[openai.APIStatusError], status: int) -> openai.APIStatusError:
    response = httpx2.Response(status, request=REQUEST2)
    return cls("status", response=response, body=None)


def caused(cause: BaseException, depth: int = 1) -> Exception:
    error: BaseException = cause
    for _ in range(depth):
        wrapper = RuntimeError("wrapped")
        wrapper.__cause__ = error
        error = wrapper
    assert isinstance(error, Exception)
    return error


def retry_error(outcome: BaseException | None) -> tenacity.RetryError:
    future = tenacity.Future(1)
    if outcome is None:
        future.set_result(None)
    else:
        future.set_exception(outcome)
    return tenacity.RetryError(future)


class Model(pydantic.BaseModel):
    x: int


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        pytest.param(None, "other", id="nothing"),
        pytest.param(TimeoutError(), "timeout", id="builtin timeout"),
        pytest.param(
            NodeTimeoutError("n", 1.0, kind="run", run_timeout=0.5), "timeout", id="node timeout"
        ),
        pytest.param(httpx.ReadTimeout("slow"), "timeout", id="httpx read timeout"),
        pytest.param(httpx.PoolTimeout("slow"), "timeout", id="httpx pool timeout"),
        pytest.param(httpx2.ConnectTimeout("slow"), "timeout", id="httpx2 timeout"),
        pytest.param(requests.ConnectTimeout(), "timeout", id="requests connect timeout"),
        pytest.param(requests.ReadTimeout(), "timeout", id="requests read timeout"),
        pytest.param(openai.APITimeoutError(REQUEST2), "timeout", id="openai timeout"),
        pytest.param(ConnectionResetError(), "connection", id="reset"),
        pytest.param(BrokenPipeError(), "connection", id="broken pipe"),
        pytest.param(socket.gaierror(), "connection", id="name resolution"),
        pytest.param(OSError(errno.ENETUNREACH, "no net"), "connection", id="no network"),
        pytest.param(urllib.error.URLError("gone"), "connection", id="urllib"),
        pytest.param(httpx.ConnectError("no"), "connection", id="httpx connect"),
        pytest.param(httpx.RemoteProtocolError("no"), "connection", id="httpx protocol"),
        pytest.param(httpx.LocalProtocolError("no"), "other", id="httpx own mistake"),
        pytest.param(httpx2.ReadError("no"), "connection", id="httpx2 read"),
        pytest.param(requests.ConnectionError(), "connection", id="requests connection"),
        pytest.param(
            openai.APIConnectionError(request=REQUEST2), "connection", id="openai connection"
        ),
        pytest.param(httpx_status(429), "rate_limited", id="httpx 429"),
        pytest.param(httpx_status(401), "auth", id="httpx 401"),
        pytest.param(httpx_status(403), "auth", id="httpx 403"),
        pytest.param(httpx_status(408), "timeout", id="httpx 408"),
        pytest.param(httpx_status(404), "upstream_4xx", id="httpx 404"),
        pytest.param(httpx_status(500), "upstream_5xx", id="httpx 500"),
        pytest.param(httpx_status(504), "upstream_5xx", id="httpx 504"),
        pytest.param(openai_status(openai.RateLimitError, 429), "rate_limited", id="openai 429"),
        pytest.param(openai_status(openai.AuthenticationError, 401), "auth", id="openai 401"),
        pytest.param(openai_status(openai.NotFoundError, 404), "upstream_4xx", id="openai 404"),
        pytest.param(
            openai_status(openai.InternalServerError, 529), "upstream_5xx", id="openai 529"
        ),
        pytest.param(
            urllib.error.HTTPError("http://s.test", 503, "busy", Message(), None),
            "upstream_5xx",
            id="urllib 503",
        ),
        pytest.param(with_attributes(status=502), "upstream_5xx", id="status"),
        pytest.param(with_attributes(code=429), "rate_limited", id="code"),
        pytest.param(with_attributes(code="429"), "other", id="code that is no number"),
        pytest.param(with_attributes(status_code=200), "other", id="status of no error"),
        pytest.param(SystemExit(2), "other", id="exit code"),
        pytest.param(
            raised(pydantic.ValidationError, lambda: Model(x="no")), "validation", id="pydantic"
        ),
        pytest.param(
            raised(json.JSONDecodeError, lambda: json.loads("{")), "validation", id="json"
        ),
        pytest.param(InvalidUpdateError(), "validation", id="invalid update"),
        pytest.param(OutputParserException("no"), "validation", id="output parser"),
        pytest.param(ValueError(), "other", id="plain value error"),
        pytest.param(GraphRecursionError(), "recursion_limit", id="recursion limit"),
        pytest.param(RecursionError(), "other", id="python's recursion"),
        pytest.param(ToolException(), "tool_error", id="tool"),
        pytest.param(sqlite3.OperationalError("locked"), "storage", id="sqlite"),
        pytest.param(OSError(errno.ENOSPC, "full"), "storage", id="disk full"),
        pytest.param(FileNotFoundError(), "other", id="no such file"),
        pytest.param(retry_error(TimeoutError()), "timeout", id="retry error"),
        pytest.param(retry_error(None), "other", id="retry error of a result"),
        pytest.param(tenacity.RetryError(tenacity.Future(1)), "other", id="retry error undone"),
        pytest.param(caused(TimeoutError()), "timeout", id="cause"),
        pytest.param(caused(TimeoutError(), 2), "timeout", id="cause of a cause"),
        pytest.param(caused(TimeoutError(), 3), "other", id="cause too deep"),
        pytest.param(retry_error(caused(TimeoutError())), "timeout", id="cause in a retry error"),
        pytest.param(GraphInterrupt(), "other", id="interrupt"),
        pytest.param(asyncio.CancelledError(), "other", id="cancelled"),
    ],
)
def test_an_error_has_a_class(exc: BaseException | None, expected: str) -> None:
    assert classify(exc) == expected
    assert expected in ERROR_CLASSES


def test_a_subclass_has_the_class_of_its_base() -> None:
    class Slow(httpx.ReadTimeout):
        pass

    assert classify(Slow("slow")) == "timeout"


def test_the_type_counts_when_a_property_fails() -> None:
    class Hostile(TimeoutError):
        @property
        def status_code(self) -> int:
            raise RuntimeError("no")

        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    assert classify(Hostile()) == "timeout"


class Meta(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no")


class Evil:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no")


class Endless(Exception):
    @property
    def last_attempt(self) -> Any:
        return self

    def exception(self, timeout: float) -> Exception:
        return self


@pytest.mark.parametrize(
    "exc",
    [
        pytest.param(Meta("Odd", (Exception,), {})(), id="class"),
        pytest.param(with_attributes(status_code=Evil()), id="value"),
        pytest.param(with_attributes(last_attempt=7), id="not an attempt"),
        pytest.param(Endless(), id="endless"),
    ],
)
def test_no_exception_makes_it_raise(exc: BaseException) -> None:
    assert classify(exc) == "other"


def test_the_type_of_an_error_is_its_class_name() -> None:
    assert error_type(httpx.ReadTimeout("slow")) == "ReadTimeout"


# What is declared.


@pytest.mark.parametrize("metric", contract.METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_named_as_prometheus_wants(metric: contract.Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert not metric.name.startswith(contract.PREFIX)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    assert metric.name.endswith("_info") == (metric.type == "info")
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_created", "_ms", "_minutes"))
    assert bool(metric.buckets) == (metric.type == "histogram")
    assert metric.type != "histogram" or metric.name.endswith(("_seconds", "_bytes"))
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help.endswith(("?", ".", "does."))
    for label in metric.labels:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", label.name)
        assert label.name not in ("le", "quantile", "job", "instance")
        assert bool(label.values) != bool(label.source)


@pytest.mark.parametrize("metric", contract.METRICS, ids=lambda metric: metric.name)
def test_what_begins_at_zero_is_known_before(metric: contract.Metric) -> None:
    known = {label.name for label in metric.labels if label.values} | {"graph", "node"}
    assert metric.on_demand or metric.later or metric.type == "info" or known >= names_of(metric)
    assert not {"error_class", "call", "tool", "model", "route"} & names_of(metric) or (
        metric.on_demand
    )
    assert set(metric.begins) <= set(metric.labels[-1].values if metric.labels else ())


def names_of(metric: contract.Metric) -> set[str]:
    return {label.name for label in metric.labels}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([metric.name for metric in contract.METRICS], id="metrics"),
        pytest.param([attribute.name for attribute in contract.ATTRIBUTES], id="attributes"),
        pytest.param([a.log for a in contract.ATTRIBUTES if a.log], id="log keys"),
        pytest.param([span.key for span in contract.SPANS], id="spans"),
        pytest.param([event.name for event in contract.LOG_EVENTS], id="log events"),
        pytest.param([known.name for known in contract.CLOSED_SETS], id="closed sets"),
    ],
)
def test_nothing_is_declared_twice(names: list[str]) -> None:
    assert len(names) == len(set(names))


def test_spans_have_declared_attributes_only_and_each_is_on_a_span() -> None:
    used = {name for span in contract.SPANS for name in (*span.always, *span.sometimes)}

    assert used | {"sereno.truncated"} == {attribute.name for attribute in contract.ATTRIBUTES}


def test_a_log_key_is_spelt_as_the_last_part_of_its_attribute_or_its_owner() -> None:
    for key, name in contract.LOG_KEYS.items():
        *_, owner, last = name.split(".")
        assert key in (last, owner, f"{owner}_{last}", "status", "node", "reason"), name


def test_a_log_key_is_one_of_a_record() -> None:
    of_events = {field for e in contract.LOG_EVENTS for field in (*e.always, *e.sometimes)}

    assert set(contract.LOG_KEYS) <= of_events | set(contract.LOG_FIELDS)


def test_every_event_that_is_a_line_says_what_the_line_is_called() -> None:
    lines = set(get_args(contract.LineType))
    run_and_node = {line for line in lines if line.startswith(("run.", "node.", "call."))}

    assert run_and_node <= {event.name for event in contract.LOG_EVENTS}


# The same words elsewhere.


def test_line_types_are_those_of_the_runtime() -> None:
    assert get_args(contract.LineType) == (*events.STORED_TYPES, *events.UNSTORED_TYPES)


def test_run_outcomes_are_the_final_statuses() -> None:
    ended = [status.value for status in RunStatus if status.ended]
    assert list(get_args(contract.RunOutcome)) == ended


def test_outcomes_are_those_that_the_seam_tells() -> None:
    assert get_args(observations.AttemptOutcome) == get_args(contract.AttemptOutcome)
    assert set(get_args(observations.NodeOutcome)) <= set(get_args(contract.NodeOutcome))


@pytest.mark.parametrize(
    ("literal", "metric", "label"),
    [
        pytest.param(genai.ToolOutcome, "tool_duration_seconds", "outcome", id="tools"),
        pytest.param(storage.Op, "checkpoint_duration_seconds", "op", id="checkpoints"),
        pytest.param(selfwatch.Loss, "telemetry_spans_total", "result", id="losses"),
        pytest.param(
            selfwatch.Signal, "telemetry_last_export_success_timestamp_seconds", "signal", id="sig"
        ),
    ],
)
def test_label_values_are_those_that_are_counted(literal: object, metric: str, label: str) -> None:
    declared = next(each for each in contract.METRICS if each.name == metric)
    values = next(each for each in declared.labels if each.name == label).values

    assert set(get_args(literal)) <= set(values)


def test_probes_are_the_endpoints_of_their_metric() -> None:
    declared = next(each for each in contract.METRICS if each.name == "health_checks_total")
    assert set(declared.labels[0].values) == http.PROBES | {"other"}


def test_no_module_asks_for_a_metric_that_is_not_declared() -> None:
    root = Path(__file__).parent.parent
    declared = {metric.name for metric in contract.METRICS}
    asked = {
        name
        for package in ("runtime", "telemetry")
        for path in (root / package).rglob("*.py")
        for name in re.findall(r'metrics\["(\w+)"\]', path.read_text("utf-8"))
    }

    assert asked <= declared


# The page.


def test_the_page_is_what_the_contract_says() -> None:
    """Write it anew with `python -m telemetry.contract > docs/telemetry.md`."""
    page = Path(__file__).parent.parent / "docs/telemetry.md"
    printed = subprocess.run(
        [sys.executable, "-m", "telemetry.contract"], capture_output=True, check=True
    ).stdout

    assert printed == page.read_bytes() == contract_docs.document().encode()


# What was emitted, against what is declared.


def moved_metrics(profile: str = "core") -> Metrics:
    """All families of a profile, with something counted in each."""
    metrics = Metrics()
    for declared in contract.METRICS:
        labels = [label.values[0] if label.values else "x" for label in declared.labels]
        family = metrics[declared.name]
        if declared.profile != profile or declared.later:
            continue
        if declared.type == "counter":
            family.inc(*labels)
        elif declared.type == "histogram":
            family.observe(1, *labels)
        elif declared.type == "info":
            family.info(**{label.name: "x" for label in declared.labels})
        else:
            family.inc(*labels)
            family.dec(*labels)
    return metrics


@pytest.mark.parametrize("profile", ["core", "llm"])
def test_metrics_that_all_moved_are_as_declared(profile: contract.Profile) -> None:
    registry = moved_metrics(profile).registry

    assert contract.check_metrics(registry, profile) == []


def test_a_family_that_never_moved_is_named() -> None:
    missing = contract.check_metrics(Metrics().registry, "core")

    assert "never moved: sereno_runs_started_total" in missing
    assert "never moved: sereno_queue_depth" in missing
    assert "never moved: sereno_build_info" in missing
    assert not [line for line in missing if "retention_deleted" in line or "llm_" in line]
    assert not [line for line in missing if not line.startswith("never moved")]


def test_a_gauge_that_is_back_at_zero_has_moved_and_one_that_cannot_be_read_has_not() -> None:
    metrics = Metrics()
    metrics["runs_active"].inc("g")
    metrics["runs_active"].dec("g")
    metrics["queue_depth"].watch(lambda: 0)
    metrics["queue_capacity"].watch(lambda: math.nan)
    missing = contract.check_metrics(metrics.registry)

    assert "never moved: sereno_runs_active" not in missing
    assert "never moved: sereno_queue_depth" not in missing
    assert "never moved: sereno_queue_capacity" in missing


def test_a_metric_beyond_the_contract_is_named() -> None:
    metrics = moved_metrics()
    Counter("sereno_surprises", "Nobody declared it.", registry=metrics.registry)
    metrics["runs_rejected_total"].inc("g", "mood")

    assert contract.check_metrics(metrics.registry) == [
        "undeclared metric: sereno_surprises_total",
        'undeclared value: sereno_runs_rejected_total{reason="__overflow__"}',
    ]


class Spans:
    """Spans as the contract declares them, but for what a test changes."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def add(
        self,
        key: str,
        *,
        name: str | None = None,
        kind: SpanKind | None = None,
        without: str = "",
        link: str | None = None,
        scope: str | None = None,
        **more: Any,
    ) -> None:
        declared = next(span for span in contract.SPANS if span.key == key)
        known = {attribute.name: attribute for attribute in contract.ATTRIBUTES}
        attributes = {
            attribute: (*known[attribute].values, "x")[0]
            for attribute in (*declared.always, *declared.sometimes)
            if attribute != without
        }
        if declared.told_by is not None:
            attributes.update([declared.told_by])
        attributes.update({key.replace("__", "."): value for key, value in more.items()})
        context = SpanContext(1, 1, is_remote=False)
        span = self._provider.get_tracer(scope or declared.scope).start_span(
            name or re.sub(r"\{.*?\}", "x", declared.name),
            kind=kind or SpanKind[declared.kind],
            attributes=attributes,
            links=[Link(context, {"sereno.link.kind": link})] if link else [],
        )
        span.end()

    def beyond(self, profile: contract.Profile = "core") -> list[str]:
        found = contract.check_spans(self._exporter.get_finished_spans(), profile)
        return [line for line in found if not line.startswith("never seen")]

    def unseen(self, profile: contract.Profile = "core") -> list[str]:
        found = contract.check_spans(self._exporter.get_finished_spans(), profile)
        return [line for line in found if line.startswith("never seen")]


@pytest.mark.parametrize("profile", ["core", "llm"])
def test_spans_that_were_all_seen_are_as_declared(profile: contract.Profile) -> None:
    spans = Spans()
    for declared in contract.SPANS:
        spans.add(declared.key, sereno__truncated=True)

    assert spans.beyond(profile) == []
    assert spans.unseen(profile) == []


def test_spans_that_nobody_saw_are_named() -> None:
    spans = Spans()
    spans.add("node")

    assert "never seen: span attempt" in spans.unseen()
    assert "never seen: attribute sereno.attempt.number" in spans.unseen()
    assert "never seen: span chat" not in spans.unseen()
    assert "never seen: span node" not in spans.unseen()
    assert "never seen: span chat" in spans.unseen("llm")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            {"key": "node", "name": "knot x"}, "undeclared span: INTERNAL knot x", id="name"
        ),
        pytest.param(
            {"key": "node", "kind": SpanKind.CLIENT}, "undeclared span: CLIENT node x", id="kind"
        ),
        pytest.param(
            {"key": "node", "sereno__mood": "good"},
            "undeclared attribute: node: sereno.mood",
            id="attribute",
        ),
        pytest.param(
            {"key": "node", "sereno__attempt__number": 1},
            "undeclared attribute: node: sereno.attempt.number",
            id="attribute of another span",
        ),
        pytest.param(
            {"key": "node", "without": "sereno.run.id"},
            "missing attribute: node: sereno.run.id",
            id="missing",
        ),
        pytest.param(
            {"key": "node", "sereno__node__outcome": "fine"},
            "undeclared value: node: sereno.node.outcome=fine",
            id="value",
        ),
        pytest.param({"key": "node", "link": "cousin"}, "undeclared link: node: cousin", id="link"),
        pytest.param(
            {"key": "call attempt", "sereno__attempt__layer": "sdk"},
            "undeclared span: INTERNAL attempt x",
            id="layer",
        ),
    ],
)
def test_a_span_beyond_the_contract_is_named(change: dict[str, Any], complaint: str) -> None:
    spans = Spans()
    spans.add(**change)

    assert complaint in spans.beyond()


def test_names_that_are_not_known_leave_the_first_word() -> None:
    spans = Spans()
    spans.add("request", name="GET", http__request__method="GET")
    spans.add("chat", name="chat")
    spans.add("segment", link="resume_of")

    assert spans.beyond() == []


def test_spans_of_other_people_are_left_alone() -> None:
    spans = Spans()
    spans.add("node", name="SELECT users", scope="their.instrumentation")

    assert spans.beyond() == []


def record(event: contract.LogEvent, **more: object) -> dict[str, object]:
    keys = (*contract.LOG_BASE, *event.always, *event.sometimes)
    return {**dict.fromkeys(keys, "x"), "event": event.name, "level": event.level, **more}


def test_records_that_were_all_seen_are_as_declared() -> None:
    records = [record(event) for event in contract.LOG_EVENTS]
    free = {"ts": "x", "msg": "Serving", "anything": 1}

    assert contract.check_logs([*records, free]) == []


def test_events_that_nobody_logged_are_named() -> None:
    missing = contract.check_logs([])

    assert missing == [f"never seen: event {event.name}" for event in contract.LOG_EVENTS]


def test_a_record_beyond_the_contract_is_named() -> None:
    events = {event.name: event for event in contract.LOG_EVENTS}
    incomplete = record(events["run.queued"])
    del incomplete["run_id"]
    found = contract.check_logs(
        [
            {"event": "run.sighed"},
            record(events["run.lost"], level="INFO", mood="bad"),
            incomplete,
        ]
    )

    assert [line for line in found if not line.startswith("never seen")] == [
        "missing field: run.queued: run_id",
        "undeclared event: run.sighed",
        "undeclared field: run.lost: mood",
        "undeclared level: run.lost: INFO",
    ]
