"""A real OpenTelemetry collector receives what a real server exports.

`SERENO_COLLECTOR` names the collector's binary; it needs the OTLP receiver and the file exporter.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lines import violations
from server import Server, until

BINARY = os.environ.get("SERENO_COLLECTOR", "")

pytestmark = pytest.mark.skipif(
    not BINARY, reason="SERENO_COLLECTOR does not name the binary of a collector"
)

CONFIG = """
receivers:
  otlp:
    protocols:
      http: {{endpoint: "127.0.0.1:{port}"}}
exporters:
  file: {{path: "{file}", flush_interval: 100ms}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines:
    traces: {{receivers: [otlp], exporters: [file]}}
    logs: {{receivers: [otlp], exporters: [file]}}
"""


@dataclass(frozen=True, slots=True)
class Collector:
    url: str
    file: Path

    def spans(self) -> dict[str, dict[str, Any]]:
        """What it wrote down, by span id."""
        return {
            span["spanId"]: span
            for batch in self._batches("resourceSpans")
            for scope in batch["scopeSpans"]
            for span in scope["spans"]
        }

    def records(self) -> list[dict[str, Any]]:
        return [
            record
            for batch in self._batches("resourceLogs")
            for scope in batch["scopeLogs"]
            for record in scope["logRecords"]
        ]

    def _batches(self, key: str) -> Iterator[Any]:
        for line in self.file.read_text().split("\n")[:-1]:
            yield from json.loads(line).get(key, ())


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config, file, log = (tmp_path / name for name in ("collector.yaml", "spans", "collector.log"))
    config.write_text(CONFIG.format(port=port, file=file))
    with log.open("wb") as out:
        process = subprocess.Popen([BINARY, "--config", str(config)], stdout=out, stderr=out)
    try:

        def listens() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        until(listens, "the collector listens")
        yield Collector(f"http://127.0.0.1:{port}", file)
    finally:
        process.terminate()
        process.wait(30)


def attributes(thing: dict[str, Any]) -> dict[str, Any]:
    return {a["key"]: next(iter(a["value"].values()), None) for a in thing.get("attributes", ())}


def test_it_receives_the_spans_and_records_of_a_run_that_was_killed_once(
    serving: Callable[..., Server], collector: Collector
) -> None:
    server = serving(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
        OTEL_BSP_SCHEDULE_DELAY="50",
        OTEL_BLRP_SCHEDULE_DELAY="50",
        SERENO_OTLP_LOGS="1",
    ).start()
    server.hold("t", "c1")
    run_id = server.submit("chain", "t")
    started = server.wait_line(run_id, "node.started", node="c")
    ended = {line["span_id"] for line in server.lines(run_id, follow=0)} - {started["span_id"]}
    until(lambda: len(ended - collector.spans().keys()) <= 1, "all but the segment is there")
    server.kill()
    server.release("t", "c1")
    server.start()
    lines = server.lines(run_id)
    exported = server.metric("sereno_telemetry_spans_total", result="failed")
    server.term()
    assert server.wait() == 0

    assert violations(lines) == []
    assert exported == 0
    spans = {
        span_id: span
        for span_id, span in until(collector.spans, "spans are written").items()
        if span["traceId"] == lines[0]["trace_id"]
    }
    assert {line["span_id"] for line in lines} <= spans.keys()
    roots = [span for span in spans.values() if span.get("parentSpanId", "") not in spans]
    assert [span["name"] for span in roots] == ["POST /v1/runs"]
    segments = [span for span in spans.values() if span["name"] == "run chain"]
    outcomes = [attributes(segment)["sereno.run.outcome"] for segment in segments]
    assert sorted(outcomes) == ["lost", "success"]
    attempts = [span for span in spans.values() if span["name"].startswith("attempt ")]
    assert len(attempts) == len([line for line in lines if line["type"] == "node.started"])
    records = {
        (attributes(record).get("run_id"), record.get("spanId"))
        for record in collector.records()
        if record.get("eventName") == "run.completed"
    }
    assert records == {(run_id, lines[-1]["span_id"])}
