"""What do readers get, how late, and is a slow stream the graph's fault or the client's?"""

from __future__ import annotations

from typing import get_args

from grafana_foundation_sdk.builders import dashboard

from dashboards.src.colours import GREEN, ORANGE
from dashboards.src.panels import Query, distribution, evidence, lines, number, row
from dashboards.src.panels import (
    board as empty,
)
from dashboards.src.promql import GRAPH, HERE, buckets, metric, quantile, rate, total
from telemetry.contract import CloseReason, StreamKind


def board() -> dashboard.Dashboard:
    made = empty("sereno-streams", "Sereno / Streams", "What do readers get, and how late?")
    made.with_row(row(1, "Are readers hurt?"))
    made.with_panel(
        number(
            1,
            "Open streams",
            "Readers that are connected now.",
            "short",
            Query(total("streams_active")),
            steps=((None, GREEN),),
            width=4,
        )
    )
    made.with_panel(
        number(
            2,
            "Lines",
            "Lines that were delivered, a second.",
            "ops",
            Query(rate("stream_events_total")),
            steps=((None, GREEN),),
            width=4,
        )
    )
    made.with_panel(
        number(
            3,
            "Bytes",
            "Bytes that were delivered, a second.",
            "Bps",
            Query(rate("stream_bytes_total")),
            steps=((None, GREEN),),
            width=4,
        )
    )
    made.with_panel(
        number(
            4,
            "First output, p95",
            "How long 95 % of runs take at most to show something. The objective is 5 s.",
            "s",
            Query(quantile(0.95, "run_first_output_seconds", GRAPH)),
            steps=((None, GREEN), (5, ORANGE)),
            width=4,
        )
    )
    made.with_panel(
        number(
            5,
            "Delivery lag, p95",
            "From a line's commit to its delivery.",
            "s",
            Query(quantile(0.95, "stream_delivery_lag_seconds")),
            steps=((None, GREEN), (1, ORANGE)),
            width=4,
        )
    )
    made.with_panel(
        number(
            6,
            "Runs without a reader",
            "They go on: a run does not depend on its connection.",
            "short",
            Query(total("runs_detached", GRAPH)),
            steps=((None, GREEN),),
            width=4,
        )
    )
    made.with_panel(
        lines(
            7,
            "Slow graph, or slow client?",
            "Time between two lines (the graph), from a line's commit to its delivery (the way to "
            "the client), and seconds that streams waited for clients to take bytes, each second.",
            "s",
            Query(quantile(0.95, "stream_gap_seconds"), "between lines, p95"),
            Query(quantile(0.95, "stream_delivery_lag_seconds"), "delivery lag, p95"),
            Query(rate("stream_send_blocked_seconds_total"), "blocked on clients"),
            width=12,
        )
    )
    made.with_panel(
        lines(
            8,
            "Time to first output",
            "From a run's acceptance to the first thing that its reader sees, by graph (p95). "
            "A point is an exemplar: click it for the trace.",
            "s",
            Query(
                quantile(0.95, "run_first_output_seconds", GRAPH, "graph"),
                "{{graph}}",
                exemplars=True,
            ),
            steps=((None, GREEN), (5, ORANGE)),
            width=12,
        )
    )
    made.with_row(row(2, "What is delivered"))
    made.with_panel(
        lines(
            9,
            "Open streams by kind",
            "Origin: the request that started the run. Join: a reader from the first line on. "
            "Resume: one that came back with a cursor.",
            "short",
            Query(total("streams_active", HERE, "kind"), "{{kind}}"),
            words=get_args(StreamKind),
            stacked=True,
        )
    )
    made.with_panel(
        lines(
            10,
            "Lines by type",
            "Lines that were delivered, a second.",
            "ops",
            Query(rate("stream_events_total", HERE, "type") + " > 0", "{{type}}"),
            stacked=True,
        )
    )
    made.with_panel(
        lines(
            11,
            "Bytes by kind",
            "Bytes that were delivered, a second.",
            "Bps",
            Query(rate("stream_bytes_total", HERE, "kind"), "{{kind}}"),
            stacked=True,
        )
    )
    made.with_panel(
        distribution(
            12,
            "Time between lines",
            "How many pairs of lines were how far apart, heartbeats left out.",
            "s",
            Query(buckets("stream_gap_seconds"), "{{le}}"),
        )
    )
    made.with_panel(
        distribution(
            13,
            "Delivery lag",
            "How many lines were delivered how long after their commit.",
            "s",
            Query(buckets("stream_delivery_lag_seconds"), "{{le}}"),
        )
    )
    made.with_panel(
        lines(
            14,
            "Silence of active runs",
            "The longest time that an active run has not stored a line, by graph.",
            "s",
            Query(f"max by (graph) ({metric('run_silence_seconds', GRAPH)})", "{{graph}}"),
        )
    )
    made.with_row(row(3, "How streams end"))
    made.with_panel(
        lines(
            15,
            "Ends by reason",
            "Streams that ended, a second. Error: the delivery failed, whatever became of the run.",
            "ops",
            Query(rate("streams_closed_total", HERE, "reason"), "{{reason}}"),
            words=get_args(CloseReason),
            stacked=True,
            width=6,
        )
    )
    made.with_panel(
        lines(
            16,
            "Readers that come back",
            "Readers with a cursor, a second. Expired: the log was gone.",
            "ops",
            Query(rate("stream_resumes_total", HERE, "result"), "{{result}}"),
            words=("complete", "expired"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            17,
            "Who hangs up",
            "Connections that broke, a second, by when and by whom.",
            "ops",
            Query(rate("http_aborted_total", HERE, "phase, by"), "{{phase}}: {{by}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            18,
            "What JSON could not hold",
            "Values of lines that were written as text instead, a second: a graph's state has "
            "objects that no reader can use.",
            "ops",
            Query(rate("encoder_fallbacks_total"), "values"),
            width=6,
        )
    )
    made.with_panel(
        evidence(
            19,
            "Streams that ended badly, in words",
            "Slow streams, and those that did not end by their terminal line.",
            '{service_name="$service"} | event=~"stream.slow|stream.closed" | reason!="complete"',
        )
    )
    return made
