"""Variables of OpenTelemetry that cannot be read: as good as unset, and told with a remedy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from structlog.testing import capture_logs

from telemetry.environment import Ignored, number, take_out


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "xyz"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "1.5"),
        ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "9" * 20),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://[bad"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://:4318"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://collector:99999"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "x"),
        ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "-5"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "nan"),
        ("OTEL_PROPAGATORS", "nonsense"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "unset"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "9" * 5000),
        ("OTEL_PYTHON_METER_PROVIDER", "nonsense"),
        ("OTEL_PYTHON_TRACER_PROVIDER", "nonsense"),
        ("OTEL_PYTHON_TRACER_PROVIDER", "none"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "nonsense"),
    ],
)
def test_what_cannot_be_read_is_taken_out_and_told(variable: str, value: str) -> None:
    environ = {variable: value, "OTEL_SERVICE_NAME": "mine"}
    (ignored,) = take_out(environ)

    assert environ == {"OTEL_SERVICE_NAME": "mine"}
    assert (ignored.variable, ignored.value) == (variable, value)
    assert ignored.remedy
    with capture_logs() as records:
        ignored.tell()
    assert [record["log_level"] for record in records] == ["warning"]
    assert {"variable", "value", "remedy"} <= set(records[0])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", " 100 "),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "0"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://[::1]/otlp/"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3"),
        ("OTEL_PROPAGATORS", "tracecontext, baggage"),
        ("OTEL_PROPAGATORS", "none"),
    ],
)
def test_what_can_be_read_stays(variable: str, value: str) -> None:
    environ = {variable: value}

    assert list(take_out(environ)) == []
    assert environ == {variable: value}


def test_an_empty_value_is_unset_and_nobody_is_told() -> None:
    environ = {
        "OTEL_ATTRIBUTE_COUNT_LIMIT": "",
        "OTEL_EXPORTER_OTLP_TIMEOUT": " ",
        "OTEL_PROPAGATORS": " , ",
        "OTEL_PYTHON_TRACER_PROVIDER": "",
    }

    assert list(take_out(environ)) == []
    assert environ == {}


def test_of_several_propagators_those_that_exist_stay() -> None:
    environ = {"OTEL_PROPAGATORS": "b4,tracecontext"}
    (ignored,) = take_out(environ)

    assert environ == {"OTEL_PROPAGATORS": "tracecontext"}
    assert "baggage" in ignored.remedy


def test_an_empty_part_of_a_list_is_none() -> None:
    environ = {"OTEL_PROPAGATORS": "tracecontext, ,baggage,"}

    assert list(take_out(environ)) == []
    assert environ == {"OTEL_PROPAGATORS": "tracecontext,baggage"}


REQUEST = """
import asyncio, sys
from fastapi import FastAPI
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from telemetry.http import FASTAPI_OFF, observe
from telemetry.metrics import Metrics
from telemetry.selfwatch import Selfwatch
from telemetry.tracing import Tracing

kept, metrics, app = InMemorySpanExporter(), Metrics(), FastAPI(telemetry=FASTAPI_OFF)
tracing = Tracing(processors=[SimpleSpanProcessor(kept)])
observe(app).attach(tracing, metrics, Selfwatch(metrics), sys.argv[1])
app.get("/here")(lambda: {})

async def receive():
    return {"type": "http.request", "body": b"", "more_body": False}

async def send(message):
    pass

named = (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
scope = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
    "scheme": "http", "path": "/here", "raw_path": b"/here", "root_path": "", "query_string": b"",
    "headers": [(b"host", b"test"), named], "server": ("test", 80), "client": ("test", 1),
}
asyncio.run(app(scope, receive, send))
(span,) = kept.get_finished_spans()
mistakes = metrics["telemetry_internal_errors_total"].value("http")
print(span.name, span.parent is not None, len(span.links), mistakes)
"""


@pytest.mark.parametrize(
    ("value", "trust", "told"),
    [
        ("tracecontext", "parent", "GET /here True 0 0.0"),
        ("tracecontext", "link", "GET /here False 1 0.0"),
        ("none", "parent", "GET /here False 0 0.0"),
        ("none", "link", "GET /here False 0 0.0"),
        ("tracecontext,none", "parent", "GET /here False 0 0.0"),
    ],
)
def test_without_propagation_a_request_is_a_span_that_knows_no_other(
    value: str, trust: str, told: str
) -> None:
    """In a process of its own: OpenTelemetry reads the variable at its import."""
    done = subprocess.run(
        [sys.executable, "-c", REQUEST, trust],
        env={**os.environ, "OTEL_PROPAGATORS": value},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == told, done.stderr


def test_a_password_in_an_endpoint_is_not_told() -> None:
    assert [ignored.value for ignored in take_out({"OTEL_EXPORTER_OTLP_ENDPOINT": "me:pw@x"})] == [
        "(not shown)"
    ]


@pytest.mark.parametrize(
    ("value", "read"), [("", 7), ("12", 12), ("0", 7), ("-1", 7), ("abc", 7), ("9" * 20, 7)]
)
def test_a_number_is_positive_or_the_default(
    monkeypatch: pytest.MonkeyPatch, value: str, read: int
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", value)
    with capture_logs() as records:
        assert number("OTEL_BSP_MAX_QUEUE_SIZE", 7) == read

    told = [(record["variable"], record["value"]) for record in records]
    assert told == ([] if read == 12 or not value else [("OTEL_BSP_MAX_QUEUE_SIZE", value)])


def test_what_the_sdk_reads_at_its_import_is_taken_out_before() -> None:
    """In a process of its own: here OpenTelemetry is imported already."""
    code = (
        "import telemetry.setup; t = telemetry.setup.Telemetry(); t.tracing.close();"
        "print(*(one.variable for one in telemetry.IGNORED))"
    )
    wrong = {"OTEL_PROPAGATORS": "nonsense", "OTEL_SPAN_LINK_COUNT_LIMIT": "x"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **wrong},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) == set(wrong)


def test_a_value_is_told_as_one_record() -> None:
    with capture_logs() as records:
        Ignored("OTEL_X", "x", "a number").tell()

    assert records == [
        {
            "event": "Variable ignored",
            "log_level": "warning",
            "variable": "OTEL_X",
            "value": "x",
            "remedy": "a number",
        }
    ]
