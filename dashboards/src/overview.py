"""Are users hurt, how badly, since when, and by which graph?"""

from __future__ import annotations

from typing import get_args

from grafana_foundation_sdk.builders import dashboard

from dashboards.src.colours import GREEN, GREY, ORANGE, RED
from dashboards.src.panels import Query, distribution, explore_logs, lines, number, row, rows
from dashboards.src.panels import (
    board as empty,
)
from dashboards.src.promql import GRAPH, HERE, JOB, buckets, metric, quantile, rate, total
from telemetry.contract import RejectReason, RunOutcome

#: Outcomes that are the service's fault, and all that it is judged by.
BAD = f'{GRAPH},outcome=~"error|timeout"'
JUDGED = f'{GRAPH},outcome=~"success|error|timeout"'

RUNS = f'{JOB},slo="run-success"'
FIRST = f'{JOB},slo="first-output"'


def _left(slo: str) -> str:
    return f"min(slo:error_budget_remaining:ratio{{{slo}}})"


def _burn(window: str, slo: str) -> str:
    """How many times too fast the budget is spent."""
    return (
        f"max(slo:sli_error:ratio_rate{window}{{{slo}}}"
        " / on (slo) group_left () slo:error_budget:ratio)"
    )


def board() -> dashboard.Dashboard:
    made = empty("sereno-overview", "Sereno / Overview", "Are users hurt?")
    made.with_row(row(1, "Are users hurt?"))
    made.with_panel(
        number(
            1,
            "Runs that succeed, 30 d",
            "Share of the runs of 30 days that neither failed, timed out nor were refused. "
            "The objective is 99.5 %.",
            "percentunit",
            Query(f"1 - max(slo:sli_error:ratio_rate30d{{{RUNS}}})"),
            steps=((None, RED), (0.995, GREEN)),
            decimals=3,
        )
    )
    made.with_panel(
        number(
            2,
            "Error budget left, 30 d",
            "1 is the whole budget; below 0 the objective of 30 days is missed.",
            "percentunit",
            Query(_left(RUNS), "runs"),
            Query(_left(FIRST), "first output"),
            steps=((None, RED), (0, ORANGE), (0.25, GREEN)),
            decimals=1,
        )
    )
    made.with_panel(
        number(
            3,
            "Burn rate",
            "How many times faster than the objective allows the budget of successful runs is "
            "spent. 14.4 over an hour, or 6 over six, calls somebody.",
            "short",
            Query(_burn("1h", RUNS), "1 h"),
            Query(_burn("6h", RUNS), "6 h"),
            steps=((None, GREEN), (1, ORANGE), (6, RED)),
            decimals=1,
        )
    )
    made.with_panel(
        number(
            4,
            "Runs",
            "Runs that ended, a second.",
            "ops",
            Query(rate("runs_finished_total", GRAPH)),
            steps=((None, GREEN),),
        )
    )
    made.with_panel(
        number(
            5,
            "Errors",
            "Share of the runs that ended now and were not cancelled or interrupted, and failed "
            "or timed out.",
            "percentunit",
            Query(
                f"{rate('runs_finished_total', BAD)}"
                f" / ({rate('runs_finished_total', JUDGED)} > 0) or vector(0)"
            ),
            steps=((None, GREEN), (0.005, ORANGE), (0.05, RED)),
            decimals=2,
        )
    )
    made.with_panel(
        number(
            6,
            "First output, p95",
            "How long 95 % of runs take at most to show something. The objective is 5 s.",
            "s",
            Query(quantile(0.95, "run_first_output_seconds", GRAPH)),
            steps=((None, GREEN), (5, ORANGE), (30, RED)),
        )
    )
    made.with_panel(
        number(
            7,
            "Run duration, p95",
            "How long 95 % of the runs that succeed take at most, with back-off and crashes.",
            "s",
            Query(quantile(0.95, "run_duration_seconds", f'{GRAPH},outcome="success"')),
            steps=((None, GREEN),),
        )
    )
    made.with_panel(
        number(
            8,
            "In flight",
            "Runs that execute, and streams that are open.",
            "short",
            Query(total("runs_active", GRAPH), "runs"),
            Query(total("streams_active"), "streams"),
            steps=((None, GREEN),),
        )
    )
    made.with_panel(
        lines(
            9,
            "Burn rates of successful runs",
            "Two windows must be above a line to call somebody: 14.4 for 1 h and 5 min, 6 for 6 h "
            "and 30 min; 1 for 3 d and 6 h makes a ticket.",
            "short",
            *(Query(_burn(w, RUNS), w) for w in ("5m", "30m", "1h", "6h", "3d")),
            steps=((None, GREEN), (1, GREY), (6, ORANGE), (14.4, RED)),
        )
    )
    made.with_panel(
        lines(
            10,
            "How runs end",
            "Runs that ended, a second, by outcome.",
            "ops",
            Query(rate("runs_finished_total", GRAPH, "outcome"), "{{outcome}}"),
            words=get_args(RunOutcome),
            stacked=True,
        )
    )
    made.with_panel(
        lines(
            11,
            "Time to first output",
            "From a run's acceptance to the first thing that its reader sees. "
            "A point is an exemplar: click it for the trace.",
            "s",
            Query(quantile(0.5, "run_first_output_seconds", GRAPH), "p50"),
            Query(quantile(0.95, "run_first_output_seconds", GRAPH), "p95", exemplars=True),
            steps=((None, GREEN), (5, ORANGE)),
        )
    )
    made.with_row(row(2, "Which graph?"))
    made.with_panel(
        lines(
            12,
            "Runs by graph",
            "Runs that were asked for, a second.",
            "ops",
            Query(rate("runs_started_total", GRAPH, "graph"), "{{graph}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            13,
            "Errors by graph",
            "Share of the runs of a graph that failed or timed out.",
            "percentunit",
            Query(
                f"({rate('runs_finished_total', BAD, 'graph')})"
                f" / ({rate('runs_finished_total', JUDGED, 'graph')} > 0)",
                "{{graph}}",
            ),
            width=6,
            links=(_logs_of_graph(),),
        )
    )
    made.with_panel(
        lines(
            14,
            "Why runs fail",
            "Runs that failed, a second, by graph and class of their error.",
            "ops",
            Query(
                rate("run_errors_total", GRAPH, "graph, error_class"), "{{graph}} {{error_class}}"
            ),
            width=6,
            links=(_logs_of_graph(),),
        )
    )
    made.with_panel(
        lines(
            15,
            "Runs that are refused",
            "Runs that were not taken, a second, by reason. A full queue and a broken store count "
            "against the objective.",
            "ops",
            Query(rate("runs_rejected_total", GRAPH, "reason"), "{{reason}}"),
            words=get_args(RejectReason),
            width=6,
        )
    )
    made.with_panel(
        distribution(
            16,
            "Run duration",
            "How many runs took how long, first claim to terminal line, whatever the outcome. "
            "A point is an exemplar: click it for the trace.",
            "s",
            Query(buckets("run_duration_seconds", GRAPH), "{{le}}", exemplars=True),
        )
    )
    made.with_panel(
        lines(
            17,
            "Age and silence of active runs",
            "The oldest run that executes, and the longest time that one has not stored a line. "
            "Silence, not age, says that a run is stuck.",
            "s",
            Query(
                f"max by (graph) ({metric('run_oldest_active_seconds', GRAPH)})", "{{graph}} age"
            ),
            Query(f"max by (graph) ({metric('run_silence_seconds', GRAPH)})", "{{graph}} silence"),
        )
    )
    made.with_panel(
        lines(
            18,
            "Crashes",
            "Executions that died with their process, and runs that were taken up again. They are "
            "counted at start-up: what stands is the count of the process that runs now.",
            "short",
            Query(total("runs_lost_total", GRAPH), "lost"),
            Query(total("runs_recovered_total", GRAPH), "recovered"),
        )
    )
    made.with_row(row(3, "The API"))
    made.with_panel(
        lines(
            19,
            "API latency, p95",
            "Requests without streams, by route.",
            "s",
            Query(quantile(0.95, "http_request_duration_seconds", HERE, "route"), "{{route}}"),
            width=12,
        )
    )
    made.with_panel(
        rows(
            20,
            "Alerts that fire",
            "Without the Watchdog, which always fires. The runbook of an alert is "
            "docs/runbooks/<alert>.md.",
            (
                (
                    Query(
                        "max by (alertname, severity, graph)"
                        ' (ALERTS{alertstate="firing",alertname!="Watchdog"})',
                        "fires",
                    ),
                    "short",
                ),
            ),
            labels=("alertname", "severity", "graph"),
            width=12,
        )
    )
    return made


def _logs_of_graph() -> dashboard.DashboardLink:
    return explore_logs(
        "Failures in the log",
        '{service_name="${service}"} | graph=`${__field.labels.graph}` | event=`run.failed`',
    )
