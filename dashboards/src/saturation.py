"""What is about to be full: slots, queue, event loop, threads, memory, store."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from dashboards.src.colours import GREEN, GREY, ORANGE, RED
from dashboards.src.panels import Query, distribution, lines, number, row, states
from dashboards.src.panels import (
    board as empty,
)
from dashboards.src.promql import GRAPH, HERE, buckets, metric, quantile, rate, total


def board() -> dashboard.Dashboard:
    made = empty("sereno-saturation", "Sereno / Saturation", "What is about to be full?")
    made.with_row(row(1, "Is there room?"))
    made.with_panel(
        number(
            1,
            "Queue in use",
            "Runs that wait, of those that may. A full queue refuses runs.",
            "percentunit",
            Query(f"max({metric('queue_depth')} / {metric('queue_capacity')})"),
            steps=((None, GREEN), (0.5, ORANGE), (0.9, RED)),
            width=4,
        )
    )
    made.with_panel(
        number(
            2,
            "Slots in use",
            "Runs that execute, of those that could.",
            "percentunit",
            Query(f"{total('slots', _BUSY)} / {total('slots')}"),
            steps=((None, GREEN), (0.9, ORANGE)),
            width=4,
        )
    )
    made.with_panel(
        number(
            3,
            "Event loop lag, p99",
            "How late the event loop wakes up. Above 0.25 s something blocks it.",
            "s",
            Query(quantile(0.99, "event_loop_lag_seconds")),
            steps=((None, GREEN), (0.1, ORANGE), (0.25, RED)),
            width=4,
        )
    )
    made.with_panel(
        states(
            4,
            "Ready",
            "The checks of /readyz. Saturation is none of them: it is answered with 429.",
            Query(f"min by (instance, check) ({metric('ready')})", "{{instance}} {{check}}"),
        ).height(5)
    )
    made.with_panel(
        lines(
            5,
            "Queue",
            "Runs that wait, and how many may.",
            "short",
            Query(total("queue_depth"), "waiting"),
            Query(total("queue_capacity"), "bound"),
            dashed="bound",
        )
    )
    made.with_panel(
        lines(
            6,
            "Slots",
            "How many runs execute, and how many more could.",
            "short",
            Query(total("slots", HERE, "state"), "{{state}}"),
            words=("busy", "free"),
            stacked=True,
        )
    )
    made.with_panel(
        lines(
            7,
            "Wait for a slot",
            "How long runs waited (p95), by graph, and how long the oldest has waited so far.",
            "s",
            Query(quantile(0.95, "run_queue_wait_seconds", GRAPH, "graph"), "{{graph}} p95"),
            Query(f"max({metric('queue_oldest_seconds')})", "oldest so far"),
        )
    )
    made.with_row(row(2, "Event loop and threads"))
    made.with_panel(
        lines(
            8,
            "Event loop lag",
            "How late the loop wakes up (p99), its longest lag of a minute, and how long ago it "
            "turned, which a thread reads even while it is blocked.",
            "s",
            Query(quantile(0.99, "event_loop_lag_seconds", HERE, "instance"), "{{instance}} p99"),
            Query(metric("event_loop_lag_max_seconds"), "{{instance}} longest"),
            Query(metric("event_loop_heartbeat_age_seconds"), "{{instance}} last turn"),
            steps=((None, GREEN), (0.25, RED)),
            width=6,
        )
    )
    made.with_panel(
        distribution(
            9,
            "Event loop lag, distribution",
            "How often the loop woke up how late.",
            "s",
            Query(buckets("event_loop_lag_seconds"), "{{le}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            10,
            "Who blocked the loop",
            "Stalls, a second, by node; the record loop.stalled names file and line.",
            "ops",
            Query(rate("event_loop_stalls_total", GRAPH, "graph, node"), "{{graph}} {{node}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            11,
            "Tasks and threads",
            "Tasks of the loop, threads that run sync nodes, nodes that wait for one, and threads "
            "that go on after their node was cancelled.",
            "short",
            Query(total("event_loop_tasks"), "tasks"),
            Query(total("executor_threads"), "threads"),
            Query(total("executor_queue"), "waiting for a thread"),
            Query(total("nodes_abandoned", GRAPH), "abandoned"),
            width=6,
        )
    )
    made.with_row(row(3, "Process"))
    made.with_panel(
        lines(
            12,
            "CPU",
            "Cores in use, by process. One core is the bound of a process's Python code.",
            "short",
            Query(f"rate(process_cpu_seconds_total{{{HERE}}}[$__rate_interval])", "{{instance}}"),
            steps=((None, GREEN), (0.9, ORANGE)),
            width=6,
        )
    )
    made.with_panel(
        lines(
            13,
            "Memory",
            "Resident memory, by process.",
            "bytes",
            Query(f"process_resident_memory_bytes{{{HERE}}}", "{{instance}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            14,
            "File descriptors",
            "Open files and sockets, of those that may be, by process.",
            "percentunit",
            Query(f"process_open_fds{{{HERE}}} / process_max_fds{{{HERE}}}", "{{instance}}"),
            steps=((None, GREEN), (0.8, RED)),
            width=6,
        )
    )
    made.with_panel(
        lines(
            15,
            "Garbage collections",
            "Collections a second, by generation. Those of generation 2 stop everything.",
            "ops",
            Query(
                "sum by (generation)"
                f" (rate(python_gc_collections_total{{{HERE}}}[$__rate_interval]))",
                "generation {{generation}}",
            ),
            width=6,
        )
    )
    made.with_row(row(4, "Store"))
    made.with_panel(
        lines(
            16,
            "Commits and checkpoints, p95",
            "How long it takes to commit lines, and to write and read checkpoints.",
            "s",
            Query(quantile(0.95, "log_commit_seconds", HERE, "outcome"), "lines, {{outcome}}"),
            Query(quantile(0.95, "checkpoint_duration_seconds", HERE, "op"), "checkpoint {{op}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            17,
            "Size of checkpoints, p95",
            "A state that grows makes every step slower.",
            "bytes",
            Query(quantile(0.95, "checkpoint_bytes", HERE, "op"), "{{op}}"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            18,
            "Size of the store",
            "What the store takes, by part.",
            "bytes",
            Query(total("storage_bytes", HERE, "part"), "{{part}}"),
            stacked=True,
            width=6,
        )
    )
    made.with_panel(
        lines(
            19,
            "Leases",
            "Renewals that failed, and writes of workers that had lost their lease, a second. "
            "Both are nearly always none.",
            "ops",
            Query(rate("lease_renew_failures_total"), "renewals failed"),
            Query(rate("fenced_writes_total", HERE, "kind"), "{{kind}} held off"),
            width=6,
        )
    )
    made.with_panel(
        lines(
            20,
            "Requests in flight",
            "Requests that are being answered, streams included, by route.",
            "short",
            Query(total("http_active_requests", HERE, "route"), "{{route}}"),
            steps=((None, GREY),),
            width=24,
        )
    )
    return made


_BUSY = f'{HERE},state="busy"'
