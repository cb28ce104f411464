"""Which node fails, retries, sleeps or is slow, and where is the evidence?"""

from __future__ import annotations

from typing import get_args

from grafana_foundation_sdk.builders import dashboard

from dashboards.src.colours import GREEN, ORANGE, RED
from dashboards.src.panels import (
    Query,
    evidence,
    explore_logs,
    explore_traces,
    failing_traces,
    lines,
    row,
    rows,
)
from dashboards.src.panels import (
    board as empty,
)
from dashboards.src.promql import GRAPH, HERE, NODE, metric, quantile, rate, total
from telemetry.contract import AttemptOutcome

RETRIES = f'{NODE},attempt="retry"'


def board() -> dashboard.Dashboard:
    made = empty(
        "sereno-graphs",
        "Sereno / Graphs and nodes",
        "Which node fails, retries, sleeps or is slow?",
        node=True,
    )
    made.with_row(row(1, "Now"))
    made.with_panel(
        lines(
            1,
            "In back-off now",
            "Nodes and calls that sleep before a retry: the earliest sign that something they "
            "depend on is down.",
            "short",
            Query(total("node_retries_sleeping", NODE, "graph, node"), "{{graph}} {{node}}"),
            Query(total("call_retries_sleeping", GRAPH, "graph, call"), "{{graph}} {{call}}"),
        )
    )
    made.with_panel(
        lines(
            2,
            "Where runs sit now",
            "Nodes that are being visited, back-off included.",
            "short",
            Query(total("nodes_active", NODE, "graph, node"), "{{graph}} {{node}}"),
            stacked=True,
            links=(_logs("__field.labels.node"), _traces("__field.labels.node")),
        )
    )
    made.with_panel(
        lines(
            3,
            "Share of time asleep",
            "Of the time that a graph's nodes take, the part that they sleep before a retry.",
            "percentunit",
            Query(f"graph:sereno_node_backoff:ratio_rate5m{{{_JOB_GRAPH}}}", "{{graph}}"),
            steps=((None, GREEN), (0.2, ORANGE)),
        )
    )
    made.with_row(row(2, "Attempts"))
    made.with_panel(
        lines(
            4,
            "How attempts end",
            "Calls of nodes, a second. Retried: another one follows. Exhausted: it was the last.",
            "ops",
            Query(rate("node_attempts_total", NODE, "outcome"), "{{outcome}}"),
            words=get_args(AttemptOutcome),
            stacked=True,
            width=6,
        )
    )
    made.with_panel(
        lines(
            5,
            "Why attempts fail",
            "Attempts that failed, a second, by node and class of their error.",
            "ops",
            Query(
                rate("node_attempt_failures_total", NODE, "node, error_class"),
                "{{node}} {{error_class}}",
            ),
            links=(_logs("__field.labels.node"), _traces("__field.labels.node")),
            width=6,
        )
    )
    made.with_panel(
        lines(
            6,
            "Retry ratio",
            "Share of a node's attempts that are not its first.",
            "percentunit",
            Query(
                f"({rate('node_attempts_total', RETRIES, 'graph, node')})"
                f" / ({rate('node_attempts_total', NODE, 'graph, node')} > 0)",
                "{{graph}} {{node}}",
            ),
            steps=((None, GREEN), (0.2, ORANGE), (0.5, RED)),
            width=6,
        )
    )
    made.with_panel(
        lines(
            7,
            "Time asleep",
            "Back-off of nodes and of calls: seconds asleep for each second on the clock.",
            "short",
            Query(rate("node_backoff_seconds_total", NODE, "graph, node"), "{{graph}} {{node}}"),
            Query(rate("call_backoff_seconds_total", GRAPH, "graph, call"), "{{graph}} {{call}}"),
            width=6,
        )
    )
    made.with_row(row(3, "How long nodes take"))
    made.with_panel(
        lines(
            8,
            "Node duration",
            "Visits of the chosen nodes, all attempts and back-off included. "
            "A point is an exemplar: click it for the trace.",
            "s",
            Query(quantile(0.5, "node_duration_seconds", NODE), "p50"),
            Query(quantile(0.95, "node_duration_seconds", NODE), "p95"),
            Query(quantile(0.99, "node_duration_seconds", NODE), "p99", exemplars=True),
        )
    )
    made.with_panel(
        lines(
            9,
            "Attempt duration, p95",
            "The work itself, without back-off, by node.",
            "s",
            Query(
                quantile(0.95, "node_attempt_duration_seconds", NODE, "graph, node"),
                "{{graph}} {{node}}",
            ),
            links=(_logs("__field.labels.node"), _traces("__field.labels.node")),
        )
    )
    made.with_panel(
        rows(
            10,
            "Slowest nodes",
            "Click a node for its traces and its lines of the log. Visits that a cache answered "
            "are counted on their own.",
            (
                (
                    Query(quantile(0.95, "node_duration_seconds", NODE, "graph, node"), "p95"),
                    "s",
                ),
                (
                    Query(rate("node_duration_seconds", NODE, "graph, node"), "visits"),
                    "ops",
                ),
                (Query(rate("nodes_cached_total", NODE, "graph, node"), "from cache"), "ops"),
            ),
            labels=("graph", "node"),
            links=(_traces("__data.fields.node"), _logs("__data.fields.node")),
            width=8,
        )
    )
    made.with_row(row(4, "Calls, tools and models"))
    made.with_panel(
        lines(
            11,
            "How calls end",
            "Attempts of calls that tenacity retries, a second.",
            "ops",
            Query(rate("call_attempts_total", GRAPH, "outcome"), "{{outcome}}"),
            words=get_args(AttemptOutcome),
            stacked=True,
            width=6,
        )
    )
    made.with_panel(
        lines(
            12,
            "Why calls fail",
            "Attempts of calls that failed, a second, by call and class of their error.",
            "ops",
            Query(
                rate("call_attempt_failures_total", GRAPH, "call, error_class"),
                "{{call}} {{error_class}}",
            ),
            width=6,
        )
    )
    made.with_panel(
        lines(
            13,
            "Call duration, p95",
            "One attempt of a call, without back-off.",
            "s",
            Query(quantile(0.95, "call_attempt_duration_seconds", GRAPH, "call"), "{{call}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            14,
            "Tools, p95",
            "How long tools take, by tool and outcome.",
            "s",
            Query(
                quantile(0.95, "tool_duration_seconds", GRAPH, "tool, outcome"),
                "{{tool}} {{outcome}}",
            ),
            width=6,
        )
    )
    made.with_panel(
        lines(
            15,
            "Chat models, p95",
            "How long a chat model takes, and until it says something.",
            "s",
            Query(quantile(0.95, "llm_duration_seconds", HERE, "model"), "{{model}}"),
            Query(
                quantile(0.95, "llm_first_chunk_seconds", HERE, "model"), "{{model}} first chunk"
            ),
        )
    )
    made.with_panel(
        lines(
            16,
            "Tokens",
            "Tokens a second, by model and direction. They are counted when the attempt that "
            "spent them ends.",
            "short",
            Query(
                rate("llm_tokens_total", HERE, "model, direction, result"),
                "{{model}} {{direction}} {{result}}",
            ),
        )
    )
    made.with_panel(
        lines(
            17,
            "Runs that wait for a human",
            "Runs that are interrupted and have no answer yet.",
            "short",
            Query(total("runs_waiting_interrupt", GRAPH, "graph"), "{{graph}}"),
            width=4,
        )
    )
    made.with_panel(
        lines(
            18,
            "How long humans take",
            "The oldest question without an answer, and how long answers took (p95).",
            "s",
            Query(f"max({metric('interrupt_oldest_seconds', GRAPH)})", "oldest without an answer"),
            Query(quantile(0.95, "interrupt_wait_seconds", GRAPH), "answered, p95"),
            width=4,
        )
    )
    made.with_row(row(5, "Evidence"))
    made.with_panel(
        failing_traces(
            19,
            "Recent traces with an error",
            "Of all graphs of the service: the trace store searches by exact values only.",
            width=10,
        )
    )
    made.with_panel(
        evidence(
            20,
            "What went wrong, in words",
            "Warnings and errors of the chosen graphs. A line's trace is one click away.",
            '{service_name="$service"} | graph=~"$graph"'
            ' | detected_level=~"warn|error|critical|fatal"',
            width=14,
        )
    )
    return made


#: A rule that is recorded for each graph, over processes.
_JOB_GRAPH = 'job=~"$job",graph=~"$graph"'


def _logs(variable: str) -> dashboard.DashboardLink:
    return explore_logs(
        "Lines of this node", '{service_name="${service}"} | node=`${' + variable + "}`"
    )


def _traces(variable: str) -> dashboard.DashboardLink:
    return explore_traces("Traces of this node", 'sereno.node.path="${' + variable + '}"')
