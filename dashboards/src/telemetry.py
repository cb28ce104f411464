"""Can the other dashboards be trusted: what does telemetry lose, and what does it cost?"""

from __future__ import annotations

from typing import get_args

from grafana_foundation_sdk.builders import dashboard

from dashboards.src.colours import GREEN, ORANGE, RED
from dashboards.src.panels import Query, lines, number, row, rows, states
from dashboards.src.panels import (
    board as empty,
)
from dashboards.src.promql import HERE, metric, quantile, rate, total
from telemetry.contract import SpanResult

#: The collector's own metrics, and those that it makes of spans.
COLLECTOR = 'job="otel-collector"'
SPANS = 'service_name="$service"'


def board() -> dashboard.Dashboard:
    made = empty(
        "sereno-telemetry",
        "Sereno / Telemetry health",
        "Can the other dashboards be trusted?",
        graph=False,
    )
    made.with_row(row(1, "Is anything lost?"))
    made.with_panel(
        number(
            1,
            "Last export",
            "Time since traces and logs were last exported. Without an endpoint, or without "
            "traffic, there is nothing to export.",
            "s",
            Query(
                "time() - min by (signal)"
                f" ({metric('telemetry_last_export_success_timestamp_seconds')})",
                "{{signal}}",
            ),
            steps=((None, GREEN), (300, ORANGE), (900, RED)),
            width=4,
        )
    )
    made.with_panel(
        number(
            2,
            "Spans lost",
            "Spans that ended and were not exported, for want of room or because the export "
            "failed, a second.",
            "ops",
            Query(rate("telemetry_spans_total", _LOST)),
            steps=((None, GREEN), (0.001, RED)),
            width=4,
        )
    )
    made.with_panel(
        number(
            3,
            "Open without keys",
            "Processes whose API is open to others than this machine, without keys.",
            "short",
            Query(total("insecure")),
            steps=((None, GREEN), (1, RED)),
            width=4,
        )
    )
    made.with_panel(
        rows(
            4,
            "What runs where",
            "Version and settings of each process, and since when it serves.",
            (
                (
                    Query(
                        f"{metric('start_time_seconds')} * 1000"
                        " * on (job, instance) group_left (version, commit, python, langgraph)"
                        f" {metric('build_info')}"
                        " * on (job, instance)"
                        " group_left (engine, durability, slots, semconv, trace_trust)"
                        f" {metric('config_info')}",
                        "started",
                    ),
                    "dateTimeAsIso",
                ),
            ),
            labels=("job", "instance", "version", "commit", "python", "langgraph", "engine"),
            width=12,
        ).height(5)
    )
    made.with_panel(
        lines(
            5,
            "What became of spans",
            "Spans that ended, a second. Dropped: the queue, or the budget of a run, was full.",
            "ops",
            Query(rate("telemetry_spans_total", HERE, "result"), "{{result}}"),
            words=get_args(SpanResult),
            stacked=True,
        )
    )
    made.with_panel(
        lines(
            6,
            "Queue of spans",
            "Spans that wait for their export, and how many may.",
            "short",
            Query(total("telemetry_span_queue"), "waiting"),
            Query(total("telemetry_span_queue_capacity"), "bound"),
            dashed="bound",
        )
    )
    made.with_panel(
        lines(
            7,
            "Spans that have not ended",
            "Without an active run and an open stream there should be none: else something leaks.",
            "short",
            Query(total("telemetry_live_spans"), "live spans"),
            Query(total("runs_active"), "active runs"),
        )
    )
    made.with_row(row(2, "What does it cost?"))
    made.with_panel(
        lines(
            8,
            "Lost, or failed",
            "Log lines that were never written, failures inside of telemetry by part, and labels "
            "that a family had no room for, a second.",
            "ops",
            Query(rate("telemetry_log_dropped_total", HERE, "sink"), "log lines, {{sink}}"),
            Query(rate("telemetry_internal_errors_total", HERE, "part"), "errors, {{part}}"),
            Query(rate("metric_series_dropped_total", HERE, "family"), "labels, {{family}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            9,
            "Series",
            "How many samples a scrape returns, by process.",
            "short",
            Query(f"scrape_samples_scraped{{{HERE}}}", "{{instance}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            10,
            "Cost of a scrape",
            "How long the process takes to write its metrics (p95), and Prometheus to read them.",
            "s",
            Query(quantile(0.95, "metrics_render_seconds", HERE, "instance"), "{{instance}} p95"),
            Query(f"scrape_duration_seconds{{{HERE}}}", "{{instance}} scrape"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            11,
            "Observations beyond the last bucket",
            "Share of a histogram's observations that are longer than its buckets tell, where "
            "quantiles are too low.",
            "percentunit",
            Query(f"sereno_histogram_overflow_ratio{{{_JOB}}}", "{{family}}"),
            steps=((None, GREEN), (0.05, ORANGE)),
            width=6,
        )
    )
    made.with_panel(
        states(
            12,
            "Values that are polled",
            "Whether they could be read. What cannot be read is no number, rather than 0.",
            Query(metric("probe_up"), "{{instance}} {{probe}}"),
            width=8,
        )
    )
    made.with_panel(
        lines(
            13,
            "Age of polled values",
            "How long ago they were read.",
            "s",
            Query(f"max by (probe) ({metric('probe_age_seconds')})", "{{probe}}"),
        )
    )
    made.with_panel(
        lines(
            14,
            "Health checks",
            "Probes, a second, by endpoint and answer.",
            "ops",
            Query(rate("health_checks_total", HERE, "endpoint, result"), "{{endpoint}} {{result}}"),
        )
    )
    made.with_row(row(3, "Collector"))
    made.with_panel(
        lines(
            15,
            "Spans in and out",
            "Spans that the collector took, refused, sent on and failed to send, a second.",
            "ops",
            Query(_collected("otelcol_receiver_accepted_spans_total"), "accepted"),
            Query(_collected("otelcol_receiver_refused_spans_total"), "refused"),
            Query(_collected("otelcol_exporter_sent_spans_total"), "sent"),
            Query(_collected("otelcol_exporter_send_failed_spans_total"), "failed"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            16,
            "Log records in and out",
            "Log records that the collector took and sent on, a second.",
            "ops",
            Query(_collected("otelcol_receiver_accepted_log_records_total"), "accepted"),
            Query(_collected("otelcol_exporter_sent_log_records_total"), "sent"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            17,
            "Queues of the collector",
            "How full the queue of each exporter is. A full one refuses what comes.",
            "percentunit",
            Query(
                f"otelcol_exporter_queue_size{{{COLLECTOR}}}"
                f" / otelcol_exporter_queue_capacity{{{COLLECTOR}}}",
                "{{exporter}}",
            ),
            steps=((None, GREEN), (0.8, RED)),
            maximum=1,
            width=6,
        )
    )
    made.with_panel(
        lines(
            18,
            "Memory of the collector",
            "Resident memory.",
            "bytes",
            Query(f"otelcol_process_memory_rss_bytes{{{COLLECTOR}}}", "{{instance}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            19,
            "Spans that failed",
            "Spans with status ERROR, a second, by name: as the collector counts them. A "
            "convenience; the metrics of the runtime are the truth.",
            "ops",
            Query(
                "sum by (span_name) (rate(traces_span_metrics_calls_total"
                f'{{{SPANS},status_code="STATUS_CODE_ERROR"}}[$__rate_interval]))',
                "{{span_name}}",
            ),
            width=12,
        )
    )
    made.with_panel(
        lines(
            20,
            "Span duration, p95",
            "By name, as the collector counts it. A point is an exemplar: click it for the trace.",
            "s",
            Query(
                "histogram_quantile(0.95, sum by (le, span_name) (rate("
                f"traces_span_metrics_duration_seconds_bucket{{{SPANS}}}[$__rate_interval])))",
                "{{span_name}}",
                exemplars=True,
            ),
            width=12,
        )
    )
    return made


_JOB = 'job=~"$job"'
_LOST = f'{HERE},result=~"failed|dropped_.*"'


def _collected(name: str) -> str:
    return f"sum(rate({name}{{{COLLECTOR}}}[$__rate_interval]))"
