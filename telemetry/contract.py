"""What telemetry promises by name: every metric, span, attribute and log event, declared once.

Instruments, `docs/telemetry.md` (`python -m telemetry.contract`) and the tests that compare the
promise with what was emitted are all made from these declarations. An exception becomes one of a
closed set of classes here too, for that set is a part of the promise.
"""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from prometheus_client import CollectorRegistry

__all__ = [
    "ATTRIBUTES",
    "CLOSED_SETS",
    "ERROR_CLASSES",
    "EXCEPTION_ATTRIBUTES",
    "LINK_KINDS",
    "LOG_BASE",
    "LOG_EVENTS",
    "LOG_FIELDS",
    "LOG_KEYS",
    "METRICS",
    "METRIC_GROUPS",
    "NODE_ATTRIBUTES",
    "OTHER",
    "OVERFLOW",
    "PREFIX",
    "RESOURCE",
    "RUN_ATTRIBUTES",
    "SPANS",
    "VERSION",
    "AttemptOutcome",
    "Attribute",
    "B",
    "CancelReason",
    "CloseReason",
    "ClosedSet",
    "ErrorClass",
    "G",
    "Label",
    "LineType",
    "LogEvent",
    "Metric",
    "N",
    "NodeOutcome",
    "Part",
    "Profile",
    "R",
    "RejectReason",
    "ResourceAttribute",
    "RunOutcome",
    "S",
    "SegmentOutcome",
    "Span",
    "SpanResult",
    "StreamKind",
    "Trigger",
    "check_logs",
    "check_metrics",
    "check_spans",
    "classify",
    "error_text",
    "error_type",
]

#: Raised by a change that breaks a reader; additions do not raise it.
VERSION = "1"
#: In front of every metric's name.
PREFIX = "sereno_"
#: The label value of what a family has no room for, or no name.
OVERFLOW = "__overflow__"
#: The label value that a closed set may have for all the rest.
OTHER = "other"

# --- closed sets ----------------------------------------------------------------------------------

#: `error_class`, on metrics, spans, logs and lines: closed, so that it can be a metric's label.
ErrorClass = Literal[
    "timeout",
    "connection",
    "rate_limited",
    "upstream_5xx",
    "upstream_4xx",
    "validation",
    "auth",
    "recursion_limit",
    "tool_error",
    "storage",
    "max_attempts",
    "worker_lost",
    "other",
]
RunOutcome = Literal["success", "error", "timeout", "interrupted", "cancelled"]
SegmentOutcome = Literal[RunOutcome, "lost", "drained"]
NodeOutcome = Literal[RunOutcome, "lost", "drained"]
AttemptOutcome = Literal[
    "success", "retried", "exhausted", "failed", "interrupted", "cancelled", "lost"
]
CancelReason = Literal["api", "deadline", "shutdown", "superseded", "sibling_failed"]
Trigger = Literal["api", "resume", "recovery"]
RejectReason = Literal["queue_full", "limit", "storage", "draining"]
StreamKind = Literal["origin", "join", "resume"]
CloseReason = Literal[
    "complete", "client_disconnect", "slow_consumer", "server_shutdown", "error", "timeout"
]
LineType = Literal[
    "run.queued",
    "run.started",
    "run.recovered",
    "run.requeued",
    "node.started",
    "node.retrying",
    "node.completed",
    "node.failed",
    "node.interrupted",
    "node.cancelled",
    "call.retrying",
    "token",
    "message",
    "custom",
    "values",
    "run.completed",
    "run.failed",
    "run.cancelled",
    "run.timed_out",
    "run.interrupted",
    "heartbeat",
    "caught_up",
    "error",
]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
SpanResult = Literal["exported", "failed", "dropped_queue_full", "dropped_budget", "sampled_out"]
#: Parts of telemetry that may fail.
Part = Literal[
    "admin",
    "exporting",
    "genai",
    "http",
    "langchain",
    "langgraph",
    "logs",
    "loopwatch",
    "metrics",
    "recorder",
    "segments",
    "selfwatch",
    "storage",
    "tenacity",
    "tracing",
    "other",
]

ERROR_CLASSES: tuple[ErrorClass, ...] = get_args(ErrorClass)


@dataclass(frozen=True, slots=True)
class ClosedSet:
    """All the values that something can have."""

    name: str
    values: tuple[str, ...]
    help: str


CLOSED_SETS = (
    ClosedSet("run outcome", get_args(RunOutcome), "How a run ended: its final status."),
    ClosedSet(
        "segment outcome",
        get_args(SegmentOutcome),
        "How one execution of a run ended; after *lost* and *drained* another one goes on.",
    ),
    ClosedSet("node outcome", get_args(NodeOutcome), "How a visit of a node ended."),
    ClosedSet(
        "attempt outcome",
        get_args(AttemptOutcome),
        "*retried*: a retry follows. *exhausted*: a policy matched, and its maximum was reached. "
        "*failed*: no policy, or none that matches.",
    ),
    ClosedSet("error class", ERROR_CLASSES, "What kind of error it was, whichever library raised."),
    ClosedSet("cancel reason", get_args(CancelReason), "Why something was cancelled."),
    ClosedSet("trigger", get_args(Trigger), "What caused a segment."),
    ClosedSet("reject reason", get_args(RejectReason), "Why a run was refused."),
    ClosedSet(
        "stream kind",
        get_args(StreamKind),
        "*origin*: the response to the request that started the run. *join*: a reader that begins "
        "at the first line. *resume*: one that begins at a cursor.",
    ),
    ClosedSet("close reason", get_args(CloseReason), "Why a stream ended."),
    ClosedSet("line type", get_args(LineType), "The lines of a stream."),
    ClosedSet("span result", get_args(SpanResult), "What became of a span that had ended."),
    ClosedSet("part", get_args(Part), "The part of telemetry that failed."),
)

# --- metrics --------------------------------------------------------------------------------------

Profile = Literal["core", "llm"]
#: Upper bounds of a histogram's buckets, the last one of all left out.
Bounds = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a metric: its values, or what they are drawn from."""

    name: str
    #: All of them; empty when they are drawn from elsewhere.
    values: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A family of time series."""

    #: Without the prefix.
    name: str
    type: Literal["counter", "gauge", "histogram", "info"]
    #: The question that it answers.
    help: str
    labels: tuple[Label, ...] = ()
    #: Of a histogram.
    buckets: Bounds = ()
    #: Buckets, or counts, may name a span that is an example of them.
    exemplar: bool = False
    profile: Profile = "core"
    #: Its series begin when something is counted, and not at 0.
    on_demand: bool = False
    #: Of the last label, only these begin at 0; all when empty.
    begins: tuple[str, ...] = ()
    #: A gauge that events move up and down, and so begins at 0. Others are NaN until known.
    counted: bool = False
    #: Why nothing moves it yet.
    later: str = ""
    #: Label values that nothing moves yet, each with the reason.
    later_values: tuple[tuple[str, str], ...] = ()


S: Bounds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
N: Bounds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
R: Bounds = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
G: Bounds = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
B: Bounds = tuple(float(256 * 4**power) for power in range(9))
#: Of the event loop's lag.
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
#: Of how long people take: a minute to a week.
_PATIENCE = (60, 300, 900, 3600, 14400, 43200, 86400, 259200, 604800)

_GRAPH = Label("graph", source="the graphs that are served")
_NODE = Label("node", source="paths of the graphs' nodes: names joined by `/`")
_RUN_OUTCOME = Label("outcome", get_args(RunOutcome))
_ATTEMPT = Label("attempt", ("first", "retry"))
_ATTEMPT_OUTCOME = Label("outcome", get_args(AttemptOutcome))
_ERROR_CLASS = Label("error_class", ERROR_CLASSES)
_CALL = Label("call", source="`module.qualname` of what tenacity retries, 100 at most")
_ROUTE = Label("route", source="the app's route templates, and `__unmatched__`")
_KIND = Label("kind", get_args(StreamKind))
_BACKEND = Label("backend", source="the schemes of engines")
_PROVIDER = Label("provider", source="what the chat model calls its provider")
_MODEL = Label("model", source="the models that are configured, and `other`")
_TOOL = Label("tool", source="the tools that were called")
_TOKENS = Label("result", ("kept", "discarded"))

#: What is measured, by subject.
METRIC_GROUPS: Mapping[str, tuple[Metric, ...]] = {
    "HTTP": (
        Metric(
            "http_request_duration_seconds",
            "histogram",
            "Is the API slow? Streams are left out: they have families of their own.",
            (
                Label(
                    "method", ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", OTHER)
                ),
                _ROUTE,
                Label("status_class", ("1xx", "2xx", "3xx", "4xx", "5xx")),
            ),
            S,
            on_demand=True,
        ),
        Metric(
            "http_active_requests",
            "gauge",
            "How many requests are being answered?",
            (_ROUTE,),
            on_demand=True,
            counted=True,
        ),
        Metric(
            "http_aborted_total",
            "counter",
            "Who hangs up, and when?",
            (Label("phase", ("before_headers", "streaming")), Label("by", ("client", "server"))),
        ),
        Metric(
            "health_checks_total",
            "counter",
            "Who probes, and what is the answer? Probes are in no other family.",
            (
                Label(
                    "endpoint",
                    ("/health", "/healthz", "/livez", "/ready", "/readyz", "/startupz", OTHER),
                ),
                Label("result", ("pass", "fail")),
            ),
            on_demand=True,
        ),
    ),
    "Runs": (
        Metric(
            "runs_started_total",
            "counter",
            "How many runs were asked for? Once per run, at its `run.queued` line.",
            (_GRAPH, Label("trigger", ("api", "resume"))),
        ),
        Metric(
            "runs_finished_total",
            "counter",
            "How did runs end? Once per run, at its terminal line.",
            (_GRAPH, _RUN_OUTCOME),
        ),
        Metric(
            "run_errors_total",
            "counter",
            "Why did runs fail?",
            (_GRAPH, _ERROR_CLASS),
            on_demand=True,
        ),
        Metric(
            "runs_rejected_total",
            "counter",
            "How many runs were refused?",
            (_GRAPH, Label("reason", get_args(RejectReason))),
        ),
        Metric(
            "run_duration_seconds",
            "histogram",
            "How long do runs take? From first claim to terminal line, with back-off and crashes.",
            (_GRAPH, _RUN_OUTCOME),
            R,
            exemplar=True,
            begins=("success",),
        ),
        Metric(
            "run_first_output_seconds",
            "histogram",
            "How long until a run shows something? From `run.queued` to its first `token`, "
            "`message`, `custom` or `node.completed` line; +Inf when it failed before.",
            (_GRAPH,),
            N,
            exemplar=True,
        ),
        Metric(
            "run_queue_wait_seconds",
            "histogram",
            "How long do runs wait for a slot?",
            (_GRAPH,),
            N,
        ),
        Metric("runs_active", "gauge", "How many runs execute now?", (_GRAPH,), counted=True),
        Metric("runs_waiting_interrupt", "gauge", "How many runs wait for a human?", (_GRAPH,)),
        Metric(
            "runs_detached",
            "gauge",
            "How many runs go on without a client?",
            (_GRAPH,),
        ),
        Metric(
            "run_oldest_active_seconds", "gauge", "How old is the oldest active run?", (_GRAPH,)
        ),
        Metric(
            "run_silence_seconds",
            "gauge",
            "What is the longest time that an active run has not stored a line?",
            (_GRAPH,),
        ),
        Metric(
            "interrupt_oldest_seconds",
            "gauge",
            "For how long has a human not answered?",
            (_GRAPH,),
        ),
        Metric(
            "interrupt_wait_seconds",
            "histogram",
            "How long do humans take to answer?",
            (_GRAPH,),
            _PATIENCE,
        ),
        Metric(
            "runs_lost_total",
            "counter",
            "How many segments died with their process? Drains are not counted.",
            (_GRAPH,),
        ),
        Metric(
            "runs_recovered_total", "counter", "How many of them were taken up again?", (_GRAPH,)
        ),
    ),
    "Nodes": (
        Metric(
            "node_duration_seconds",
            "histogram",
            "Which node is slow, all attempts and back-off included?",
            (_GRAPH, _NODE),
            N,
            exemplar=True,
        ),
        Metric("nodes_active", "gauge", "Where do runs sit now?", (_GRAPH, _NODE), counted=True),
        Metric(
            "nodes_cached_total",
            "counter",
            "How often did a cache answer for a node?",
            (_GRAPH, _NODE),
            on_demand=True,
        ),
        Metric(
            "nodes_abandoned",
            "gauge",
            "How many threads of cancelled sync nodes go on?",
            (_GRAPH,),
        ),
    ),
    "Attempts": (
        Metric(
            "node_attempts_total",
            "counter",
            "How often are nodes called, how often again, and how does it end?",
            (_GRAPH, _NODE, _ATTEMPT, _ATTEMPT_OUTCOME),
        ),
        Metric(
            "node_attempt_failures_total",
            "counter",
            "Why do attempts fail?",
            (_GRAPH, _NODE, _ERROR_CLASS),
            on_demand=True,
        ),
        Metric(
            "node_attempt_duration_seconds",
            "histogram",
            "How long does the work itself take, without back-off?",
            (_GRAPH, _NODE),
            N,
        ),
        Metric(
            "node_backoff_seconds_total",
            "counter",
            "How long did nodes sleep between attempts?",
            (_GRAPH, _NODE),
        ),
        Metric(
            "node_attempt_wasted_seconds_total",
            "counter",
            "How long did the outermost discarded attempts take?",
            (_GRAPH, _NODE),
            later="nobody books wasted time yet",
        ),
        Metric(
            "node_retries_sleeping",
            "gauge",
            "How many nodes are in back-off now? The earliest sign of an outage.",
            (_GRAPH, _NODE),
            counted=True,
        ),
    ),
    "Calls": (
        Metric(
            "call_attempts_total",
            "counter",
            "How often are calls made that tenacity retries, and how does it end?",
            (_GRAPH, _CALL, _ATTEMPT, _ATTEMPT_OUTCOME),
            on_demand=True,
        ),
        Metric(
            "call_attempt_failures_total",
            "counter",
            "Why do attempts of calls fail?",
            (_GRAPH, _CALL, _ERROR_CLASS),
            on_demand=True,
        ),
        Metric(
            "call_attempt_duration_seconds",
            "histogram",
            "How long do attempts of calls take?",
            (_GRAPH, _CALL),
            N,
            on_demand=True,
        ),
        Metric(
            "call_backoff_seconds_total",
            "counter",
            "How long did calls sleep between attempts?",
            (_GRAPH, _CALL),
            on_demand=True,
        ),
        Metric(
            "call_retries_sleeping",
            "gauge",
            "How many calls are in back-off now?",
            (_GRAPH, _CALL),
            on_demand=True,
            counted=True,
        ),
    ),
    "Streams": (
        Metric("streams_active", "gauge", "How many streams are open?", (_KIND,), counted=True),
        Metric(
            "stream_events_total",
            "counter",
            "How many lines were delivered?",
            (Label("type", get_args(LineType)),),
        ),
        Metric("stream_bytes_total", "counter", "How many bytes were delivered?", (_KIND,)),
        Metric(
            "stream_gap_seconds",
            "histogram",
            "Is the graph slow? Time between two lines, heartbeats left out.",
            (_KIND,),
            G,
        ),
        Metric(
            "stream_delivery_lag_seconds",
            "histogram",
            "Is the client slow? Time from a line's commit to its delivery, heartbeats left out.",
            (_KIND,),
            S,
        ),
        Metric(
            "stream_send_blocked_seconds_total",
            "counter",
            "How long did streams wait until clients took bytes?",
        ),
        Metric(
            "streams_closed_total",
            "counter",
            "Why do streams end?",
            (Label("reason", get_args(CloseReason)),),
        ),
        Metric(
            "stream_resumes_total",
            "counter",
            "How often do readers come back with a cursor, and is the log still there?",
            (Label("result", ("complete", "expired")),),
        ),
        Metric(
            "encoder_fallbacks_total",
            "counter",
            "How many values could JSON not hold?",
        ),
    ),
    "Engine": (
        Metric("queue_depth", "gauge", "How many runs wait?"),
        Metric("queue_capacity", "gauge", "How many runs may wait?"),
        Metric("queue_oldest_seconds", "gauge", "How long has the oldest of them waited?"),
        Metric(
            "slots", "gauge", "How many runs could start now?", (Label("state", ("busy", "free")),)
        ),
        Metric(
            "log_commit_seconds",
            "histogram",
            "How long does it take to commit lines?",
            (Label("outcome", ("success", "error")),),
            S,
        ),
        Metric("lease_renew_failures_total", "counter", "How often could leases not be renewed?"),
        Metric(
            "fenced_writes_total",
            "counter",
            "How often was a worker without a lease held off?",
            (Label("kind", ("event", "checkpoint")),),
        ),
        Metric(
            "storage_bytes",
            "gauge",
            "How much room does the store take?",
            (Label("part", source="what the engine's store consists of"),),
            on_demand=True,
        ),
        Metric(
            "storage_limit_bytes",
            "gauge",
            "How much room may the store take?",
            later="the store has no limit yet",
        ),
        Metric(
            "retention_deleted_total",
            "counter",
            "How much was deleted for its age?",
            (Label("kind", ("run", "checkpoint")),),
            later="nothing is deleted for its age yet",
        ),
        Metric(
            "checkpoint_duration_seconds",
            "histogram",
            "How long do checkpoints take?",
            (Label("op", ("put", "get", "list")), _BACKEND),
            S,
            on_demand=True,
        ),
        Metric(
            "checkpoint_bytes",
            "histogram",
            "How large are checkpoints?",
            (Label("op", ("put", "get", "list")), _BACKEND),
            B,
            on_demand=True,
        ),
        Metric("executor_threads", "gauge", "How many threads run sync nodes?"),
        Metric("executor_queue", "gauge", "How many sync nodes wait for a thread?"),
    ),
    "Event loop": (
        Metric(
            "event_loop_lag_seconds",
            "histogram",
            "How late does the event loop wake up?",
            (),
            _LAG,
        ),
        Metric(
            "event_loop_lag_max_seconds",
            "gauge",
            "What was the longest lag of the last minute?",
        ),
        Metric(
            "event_loop_heartbeat_age_seconds",
            "gauge",
            "How long ago did the event loop turn? A thread reads it, even while it is blocked.",
        ),
        Metric("event_loop_tasks", "gauge", "How many tasks does the event loop have?"),
        Metric(
            "event_loop_stalls_total",
            "counter",
            "Who blocked the event loop?",
            (_GRAPH, _NODE),
            on_demand=True,
        ),
    ),
    "Tools and language models": (
        Metric(
            "tool_duration_seconds",
            "histogram",
            "How long do tools take, and how does it end?",
            (_GRAPH, _TOOL, Label("outcome", ("success", "error", "interrupted", "cancelled"))),
            N,
            profile="llm",
            on_demand=True,
        ),
        Metric(
            "llm_duration_seconds",
            "histogram",
            "How long do chat models take?",
            (_PROVIDER, _MODEL),
            N,
            profile="llm",
            on_demand=True,
        ),
        Metric(
            "llm_first_chunk_seconds",
            "histogram",
            "How long until a chat model says something?",
            (_PROVIDER, _MODEL),
            N,
            profile="llm",
            on_demand=True,
        ),
        Metric(
            "llm_tokens_total",
            "counter",
            "How many tokens were spent? Booked as soon as it is known whether they were in vain: "
            "kept ones when the outermost attempt around them ends. An answer that broke off has "
            "told its usage in part or, as most providers tell it last, not at all: then its "
            "tokens are in neither.",
            (
                _PROVIDER,
                _MODEL,
                Label("direction", ("input", "output", "cache_read", "cache_write", "reasoning")),
                _TOKENS,
            ),
            profile="llm",
            on_demand=True,
        ),
        Metric(
            "llm_cost_usd_total",
            "counter",
            "What did it cost?",
            (_PROVIDER, _MODEL, _TOKENS),
            profile="llm",
            on_demand=True,
            later="there is no price table yet",
        ),
    ),
    "Telemetry about itself": (
        Metric(
            "telemetry_spans_total",
            "counter",
            "Can I trust my traces?",
            (Label("result", get_args(SpanResult)),),
            later_values=(("sampled_out", "all traces are kept"),),
        ),
        Metric("telemetry_span_queue", "gauge", "How many spans wait for their export?"),
        Metric("telemetry_span_queue_capacity", "gauge", "How many spans may wait?"),
        Metric(
            "telemetry_live_spans",
            "gauge",
            "How many spans have not ended? With no active run they should be none.",
        ),
        Metric(
            "telemetry_last_export_success_timestamp_seconds",
            "gauge",
            "When did an export last succeed? NaN until the first one does.",
            (Label("signal", ("traces", "logs")),),
        ),
        Metric(
            "telemetry_log_dropped_total",
            "counter",
            "How many log lines were never written?",
            (Label("sink", ("stdout", "otlp")),),
        ),
        Metric(
            "metric_series_dropped_total",
            "counter",
            "How often did a family have no room for new labels?",
            (Label("family", source="the families of this table"),),
            on_demand=True,
        ),
        Metric(
            "telemetry_internal_errors_total",
            "counter",
            "How often did telemetry itself fail, to the harm of nobody else?",
            (Label("part", get_args(Part)),),
        ),
        Metric("metrics_render_seconds", "histogram", "What does a scrape cost?", (), S),
    ),
    "What runs where": (
        Metric(
            "build_info",
            "info",
            "What runs here?",
            tuple(
                Label(name, source="the installation")
                for name in ("version", "commit", "python", "langgraph", "contract")
            ),
        ),
        Metric(
            "config_info",
            "info",
            "How is it set up?",
            (
                *(
                    Label(name, source="the settings")
                    for name in ("engine", "durability", "slots", "semconv", "trace_trust")
                ),
                Label("seam", source="how nodes are seen: `installed` or `wrapped`"),
            ),
        ),
        Metric("insecure", "gauge", "Is the API open to others without keys?"),
        Metric(
            "ready",
            "gauge",
            "Which checks of readiness pass?",
            (Label("check", source="the checks of `/readyz`"),),
            on_demand=True,
        ),
        Metric(
            "probe_up",
            "gauge",
            "Could the values be read that are polled?",
            (Label("probe", source="what is polled"),),
            on_demand=True,
        ),
        Metric(
            "probe_age_seconds",
            "gauge",
            "How old are they?",
            (Label("probe", source="what is polled"),),
            on_demand=True,
        ),
        Metric("start_time_seconds", "gauge", "Since when does it serve?"),
    ),
}
METRICS = tuple(metric for group in METRIC_GROUPS.values() for metric in group)

# --- attributes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of spans."""

    name: str
    type: Literal["string", "int", "double", "boolean", "string[]"]
    help: str
    #: What log records call it; empty when they do not have it.
    log: str = ""
    values: tuple[str, ...] = ()
    #: Of the GenAI conventions: there with `SERENO_SEMCONV=genai` only.
    dialect: bool = False
    #: Why nothing sets it yet.
    later: str = ""


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("sereno.run.id", "string", "The run.", "run_id"),
    Attribute("sereno.thread.id", "string", "Its thread.", "thread_id"),
    Attribute("sereno.graph.name", "string", "Its graph.", "graph"),
    Attribute("sereno.run.epoch", "int", "1 with the first claim, one more with each.", "epoch"),
    Attribute("sereno.node.name", "string", "The node as its graph calls it."),
    Attribute(
        "sereno.node.path",
        "string",
        "Names from the root graph joined by `/`: the `node` of metrics.",
        "node",
    ),
    Attribute(
        "sereno.run.trigger",
        "string",
        "What caused the segment.",
        "trigger",
        get_args(Trigger),
    ),
    Attribute("sereno.graph.version", "string", "A digest of the graph's code and shape."),
    Attribute(
        "sereno.run.outcome",
        "string",
        "How the segment ended.",
        "status",
        get_args(SegmentOutcome),
    ),
    Attribute("sereno.run.steps", "int", "Supersteps of the segment."),
    Attribute("sereno.run.attempts", "int", "Attempts of the segment, at any depth."),
    Attribute("sereno.run.backoff_s", "double", "Measured sleep between attempts of nodes."),
    Attribute("sereno.run.spans_suppressed", "int", "Spans above the run's budget."),
    Attribute(
        "sereno.cancel.reason",
        "string",
        "Why it was cancelled.",
        values=get_args(CancelReason),
    ),
    Attribute("sereno.checkpoint.id", "string", "The last checkpoint of the root graph."),
    Attribute("sereno.task.id", "string", "LangGraph's task id.", "task"),
    Attribute("sereno.step", "int", "Superstep of the graph that the node belongs to."),
    Attribute("sereno.node.attempts", "int", "How often it was called.", "attempts"),
    Attribute(
        "sereno.node.outcome", "string", "How the visit ended.", values=get_args(NodeOutcome)
    ),
    Attribute("sereno.node.backoff_s", "double", "Measured sleep between its attempts."),
    Attribute(
        "sereno.attempt.number",
        "int",
        "From 1, per epoch and task, or per operation of a call.",
        "attempt",
    ),
    Attribute(
        "sereno.attempt.layer",
        "string",
        "Who retries: LangGraph the node, or tenacity the call.",
        "layer",
        ("node", "call"),
    ),
    Attribute(
        "sereno.attempt.outcome",
        "string",
        "How the attempt ended.",
        "outcome",
        get_args(AttemptOutcome),
    ),
    Attribute("sereno.attempt.will_retry", "boolean", "Whether a retry follows."),
    Attribute("sereno.attempt.max", "int", "The maximum of the policy that matched."),
    Attribute("sereno.attempt.backoff_s", "double", "The planned sleep, a lower bound."),
    Attribute("sereno.attempt.jitter_ms", "double", "What LangGraph may add to it."),
    Attribute("sereno.attempt.wait_before_s", "double", "The measured sleep before this attempt."),
    Attribute("sereno.call.name", "string", "`module.qualname`, or its `sereno_call`.", "call"),
    Attribute("sereno.call.id", "string", "One per operation, over all its attempts."),
    Attribute("error.type", "string", "The exception's class name.", "error_type"),
    Attribute("sereno.error.class", "string", "Its class.", "error_class", ERROR_CLASSES),
    Attribute("sereno.stream", "boolean", "The answer is a stream."),
    Attribute("sereno.stream.events", "int", "Lines that were delivered.", "events"),
    Attribute("sereno.stream.bytes", "int", "Bytes that were delivered.", "bytes"),
    Attribute(
        "sereno.stream.first_output_s",
        "double",
        "From the request to the first line of output.",
        "first_output_s",
    ),
    Attribute(
        "sereno.stream.max_gap_s", "double", "The longest time between two lines.", "max_gap_s"
    ),
    Attribute(
        "sereno.stream.close_reason",
        "string",
        "Why it ended.",
        "reason",
        get_args(CloseReason),
    ),
    Attribute("sereno.stream.from_seq", "int", "The cursor that it began after.", "from_seq"),
    Attribute("sereno.stream.last_seq", "int", "The last line that was delivered.", "last_seq"),
    Attribute("db.system.name", "string", "The store."),
    Attribute("sereno.checkpoint.bytes", "int", "Size of the checkpoint."),
    Attribute(
        "sereno.truncated", "boolean", "A text was longer than 4,096 characters, and was cut."
    ),
    Attribute("gen_ai.operation.name", "string", "`chat` or `execute_tool`.", dialect=True),
    Attribute("gen_ai.provider.name", "string", "Who serves the model.", dialect=True),
    Attribute("gen_ai.request.model", "string", "The model that was asked for.", dialect=True),
    Attribute("gen_ai.response.model", "string", "The model that answered.", dialect=True),
    Attribute("gen_ai.response.finish_reasons", "string[]", "Why it stopped.", dialect=True),
    Attribute(
        "gen_ai.response.time_to_first_chunk",
        "double",
        "Seconds until it said something.",
        dialect=True,
    ),
    Attribute("gen_ai.usage.input_tokens", "int", "Tokens read.", dialect=True),
    Attribute("gen_ai.usage.output_tokens", "int", "Tokens written.", dialect=True),
    Attribute(
        "gen_ai.usage.cache_read.input_tokens", "int", "Of those read, from a cache.", dialect=True
    ),
    Attribute(
        "gen_ai.usage.cache_creation.input_tokens",
        "int",
        "Of those read, written to a cache.",
        dialect=True,
    ),
    Attribute(
        "gen_ai.usage.reasoning.output_tokens",
        "int",
        "Of those written, for reasoning.",
        dialect=True,
    ),
    Attribute("gen_ai.tool.name", "string", "The tool.", dialect=True),
    Attribute("gen_ai.tool.call.id", "string", "The model's id of the call.", dialect=True),
)

#: Of a link between spans.
LINK_KINDS = ("previous_segment", "resume_of", "run", "remote")
#: Of the one span event there is, `exception`, on the innermost span that owns it.
EXCEPTION_ATTRIBUTES = (
    "exception.type",
    "exception.message",
    "exception.stacktrace",
    "exception.escaped",  # of instrumentations that are not ours
    "sereno.truncated",
)
#: Log key → span attribute.
LOG_KEYS: Mapping[str, str] = MappingProxyType(
    {attribute.log: attribute.name for attribute in ATTRIBUTES if attribute.log}
)

# --- spans ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """A kind of span."""

    key: str
    #: Of the span; what is in braces varies.
    name: str
    kind: Literal["INTERNAL", "SERVER", "CLIENT"]
    parent: str
    #: When it ends, and with which status.
    end: str
    #: Attributes that it has from its start, and those that it may get.
    always: tuple[str, ...] = ()
    sometimes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    #: An attribute that tells it from another span of such a name.
    told_by: tuple[str, str] | None = None
    #: Attributes that an instrumentation of OpenTelemetry sets, by how they begin.
    foreign: tuple[str, ...] = ()
    #: The instrumentation scope.
    scope: str = "sereno"
    profile: Profile = "core"


#: Of every span of a run, and of every one below a node besides.
RUN_ATTRIBUTES = ("sereno.run.id", "sereno.thread.id", "sereno.graph.name", "sereno.run.epoch")
NODE_ATTRIBUTES = ("sereno.node.name", "sereno.node.path")
_BELOW = (*RUN_ATTRIBUTES, *NODE_ATTRIBUTES)
_ERROR = ("error.type", "sereno.error.class")
_HTTP = ("http.", "url.", "server.", "client.", "network.", "user_agent.")
_DIALECT = tuple(attribute.name for attribute in ATTRIBUTES if attribute.dialect)
_ATTEMPT_ENDS = (
    "sereno.attempt.outcome",
    "sereno.attempt.will_retry",
    "sereno.attempt.backoff_s",
    "sereno.attempt.wait_before_s",
    "sereno.cancel.reason",
    *_ERROR,
)

SPANS: tuple[Span, ...] = (
    Span(
        "request",
        "{METHOD} {http.route}",
        "SERVER",
        "the caller's span, if `SERENO_TRACE_TRUST=parent`",
        "Last byte handed over, or disconnect. ERROR for 5xx or a failure of our delivery after "
        "200; that a run failed is its segment's ERROR. A client that hangs up is no error.",
        sometimes=(
            *RUN_ATTRIBUTES,
            *_ERROR,
            "sereno.stream",
            "sereno.stream.events",
            "sereno.stream.bytes",
            "sereno.stream.first_output_s",
            "sereno.stream.max_gap_s",
            "sereno.stream.close_reason",
            "sereno.stream.from_seq",
            "sereno.stream.last_seq",
        ),
        links=("remote", "run"),
        foreign=_HTTP,
        scope="opentelemetry.instrumentation.asgi",
    ),
    Span(
        "segment",
        "run {graph}",
        "INTERNAL",
        "the request that submitted the run, in every epoch",
        "Terminal line, or drain. ERROR for error, timeout and lost only.",
        always=RUN_ATTRIBUTES,
        sometimes=(
            "sereno.run.trigger",
            "sereno.graph.version",
            "sereno.run.outcome",
            "sereno.run.steps",
            "sereno.run.attempts",
            "sereno.run.backoff_s",
            "sereno.run.spans_suppressed",
            "sereno.cancel.reason",
            "sereno.checkpoint.id",
            *_ERROR,
        ),
        links=("previous_segment", "resume_of"),
    ),
    Span(
        "node",
        "node {node}",
        "INTERNAL",
        "the segment; in a subgraph the attempt that called it",
        "The end of the visit, all attempts and back-off included. ERROR if it finally failed.",
        always=(*_BELOW, "sereno.task.id", "sereno.step"),
        sometimes=(
            "sereno.node.attempts",
            "sereno.node.outcome",
            "sereno.node.backoff_s",
            "sereno.cancel.reason",
            *_ERROR,
        ),
    ),
    Span(
        "attempt",
        "attempt {node}",
        "INTERNAL",
        "its node",
        "The call of the node returned, raised, timed out or was cancelled. One for each call, "
        "with or without a policy. ERROR when it raised; an interrupt is none.",
        always=(*_BELOW, "sereno.attempt.number", "sereno.attempt.layer"),
        sometimes=(*_ATTEMPT_ENDS, "sereno.attempt.max", "sereno.attempt.jitter_ms"),
        told_by=("sereno.attempt.layer", "node"),
    ),
    Span(
        "call attempt",
        "attempt {call}",
        "INTERNAL",
        "the current span",
        "The same for what tenacity retries. There is no span around the attempts of one call.",
        always=(
            *RUN_ATTRIBUTES,
            "sereno.attempt.number",
            "sereno.attempt.layer",
            "sereno.call.name",
            "sereno.call.id",
        ),
        sometimes=(*NODE_ATTRIBUTES, *_ATTEMPT_ENDS),
        told_by=("sereno.attempt.layer", "call"),
    ),
    Span(
        "chat",
        "chat {model}",
        "CLIENT",
        "the attempt, or the call attempt around it",
        "The model's last chunk. Covers the retries of the model's own client.",
        always=RUN_ATTRIBUTES,
        sometimes=(*NODE_ATTRIBUTES, *_ERROR, *_DIALECT),
        profile="llm",
    ),
    Span(
        "tool",
        "execute_tool {tool}",
        "INTERNAL",
        "the attempt, or the call attempt around it",
        "The tool returned or raised. An interrupt is no error.",
        always=RUN_ATTRIBUTES,
        sometimes=(*NODE_ATTRIBUTES, *_ERROR, *_DIALECT),
        profile="llm",
    ),
    Span(
        "checkpoint",
        "checkpoint {op}",
        "CLIENT",
        "the node's attempt, or the segment",
        "Written afterwards, only if it was slow or failed.",
        always=("db.system.name",),
        sometimes=(*_BELOW, *_ERROR, "sereno.checkpoint.bytes"),
    ),
    Span(
        "outbound request",
        "{METHOD}",
        "CLIENT",
        "the current span",
        "As OpenTelemetry's instrumentation of httpx says; off with `SERENO_INSTRUMENT_HTTPX=0`.",
        sometimes=(*_BELOW, *_ERROR),
        foreign=_HTTP,
        scope="opentelemetry.instrumentation.httpx",
    ),
)

# --- log events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogEvent:
    """What the `event` of a log record may be: the type of the line where there is one."""

    name: str
    level: Level
    help: str
    #: Fields that it has, and those that it may have, besides LOG_FIELDS.
    always: tuple[str, ...] = ()
    sometimes: tuple[str, ...] = ()
    #: The level of those that another record warns of.
    quieter: Level | None = None
    #: Why nothing says it yet.
    later: str = ""


#: The keys that every record has, in this order.
LOG_BASE = ("ts", "level", "name", "msg", "time")
#: The keys that any record may have; `extra_<key>` is what would have taken the place of one.
LOG_FIELDS = (
    *LOG_BASE,
    "event",
    "trace_id",
    "span_id",
    "trace_kept",
    "run_id",
    "thread_id",
    "graph",
    "node",
    "attempt",
    "request_id",
    "seq",
    "service",
    "version",
    "worker",
    "exception",
    "stack",
)

_OF_RUN = ("run_id", "thread_id", "graph")
_OF_NODE = (*_OF_RUN, "node", "task")
_OF_STREAM = ("run_id", "thread_id", "kind")
_OF_ERROR = ("error_class", "error_type")
_ENDED = ("attempts", "duration_ms")
_TERMINAL = (*_OF_RUN, "status", "duration_ms")
_FAILURE = (*_OF_RUN, "outcome", "layer", *_OF_ERROR)

LOG_EVENTS: tuple[LogEvent, ...] = (
    LogEvent("run.queued", "INFO", "A run was committed.", (*_OF_RUN, "trigger")),
    LogEvent("run.started", "INFO", "It was claimed for the first time.", (*_OF_RUN, "epoch")),
    LogEvent("run.recovered", "INFO", "It was claimed again.", (*_OF_RUN, "epoch", "reason")),
    LogEvent("run.requeued", "INFO", "A drain gave it back.", (*_OF_RUN, "status"), _ENDED),
    LogEvent("run.completed", "INFO", "It ended with success.", _TERMINAL),
    LogEvent(
        "run.failed",
        "WARNING",
        "It ended with an error.",
        (*_TERMINAL, *_OF_ERROR),
        ("code", "node", "task"),
    ),
    LogEvent("run.timed_out", "WARNING", "Its deadline passed.", _TERMINAL, (*_OF_ERROR, "code")),
    LogEvent("run.cancelled", "INFO", "Somebody asked for its end.", _TERMINAL),
    LogEvent("run.interrupted", "INFO", "It waits for a human.", _TERMINAL),
    LogEvent("run.lost", "WARNING", "A segment died with its process.", (*_OF_RUN, "epoch")),
    LogEvent(
        "run.heartbeat",
        "INFO",
        "It goes on: its open nodes with their retried calls, which attempt each is in, or waits "
        "for while its `state` is `retrying`, and for how long.",
        (*_OF_RUN, "age_s", "silence_s", "nodes"),
        ("nodes_not_shown", "runs_not_shown", "calls", "calls_not_shown"),
    ),
    LogEvent("node.started", "DEBUG", "An attempt begins.", _OF_NODE),
    LogEvent(
        "node.retrying",
        "WARNING",
        "An attempt failed, and a back-off begins.",
        (*_OF_NODE, "attempt", "retry_in_ms", *_OF_ERROR),
        ("error",),
    ),
    LogEvent(
        "node.completed",
        "INFO",
        "A task's result is known.",
        _OF_NODE,
        (*_ENDED, "cached", "recovered"),
    ),
    LogEvent(
        "node.failed", "WARNING", "It finally failed.", (*_OF_NODE, *_ENDED, *_OF_ERROR), ("error",)
    ),
    LogEvent("node.interrupted", "INFO", "It waits for a human.", (*_OF_NODE, *_ENDED)),
    LogEvent("node.cancelled", "INFO", "It was stopped.", (*_OF_NODE, *_ENDED)),
    LogEvent(
        "call.retrying",
        "WARNING",
        "An attempt of a call failed, and a back-off begins.",
        (*_OF_RUN, "call", "attempt", "retry_in_ms"),
        ("task", *_OF_ERROR, "error"),
    ),
    LogEvent(
        "attempt.failed",
        "WARNING",
        "An attempt of a node or of a call raised. Has the exception at its innermost attempt, "
        "also when a model or a tool in it raised. INFO when a retry follows: the record of that "
        "is the warning. Of a call that failed for good it is WARNING, whatever the node around "
        "it does then.",
        (*_FAILURE, "attempt"),
        ("call", "error"),
        quieter="INFO",
    ),
    LogEvent(
        "retry.exhausted",
        "WARNING",
        "It was the last attempt that the policy allows.",
        (*_FAILURE, "attempt"),
        ("call", "error"),
    ),
    LogEvent("stream.opened", "INFO", "A reader came.", (*_OF_STREAM, "from_seq")),
    LogEvent(
        "stream.slow",
        "INFO",
        "A reader took long to accept a write: said once per stream.",
        (*_OF_STREAM, "last_seq", "blocked_s"),
    ),
    LogEvent(
        "stream.closed",
        "INFO",
        "A reader went, or was let go.",
        (*_OF_STREAM, "reason", "events", "bytes", "from_seq", "last_seq"),
        ("first_output_s", "max_gap_s"),
    ),
    LogEvent(
        "checkpoint.slow",
        "WARNING",
        "A checkpoint took long. One record a minute at most: `count` is how many were slow since "
        "the last one, this one among them, and `longest_s` how long the slowest of them took. Of "
        "those that no other one follows, the slowest is told when the minute is over.",
        ("op", "duration_s", "bytes", "count", "longest_s"),
    ),
    LogEvent(
        "loop.stalled",
        "WARNING",
        "Something blocked the event loop; where it was seen.",
        ("blocked_s", "ongoing", "file", "line", "function", "samples", "samples_here"),
    ),
    LogEvent(
        "telemetry.degraded",
        "WARNING",
        "Telemetry is lost: one record for an outage, not one for each failure.",
        (),
        ("signal", "reason", "outage_s", "failed", "dropped", "remedy"),
    ),
    LogEvent(
        "telemetry.recovered",
        "INFO",
        "It is exported again.",
        ("signal", "outage_s", "failed", "dropped"),
    ),
)

# --- resource -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResourceAttribute:
    """What is said of the process, on all that it exports."""

    name: str
    help: str
    #: Whether it is there even when nobody says it by `OTEL_RESOURCE_ATTRIBUTES`.
    always: bool = True


RESOURCE = (
    ResourceAttribute("service.name", "`sereno`, unless `OTEL_SERVICE_NAME` says otherwise."),
    ResourceAttribute("service.namespace", "A group of services.", always=False),
    ResourceAttribute("service.version", "The version of Sereno."),
    ResourceAttribute("service.instance.id", "A uuid for each process."),
    ResourceAttribute("deployment.environment.name", "Such as `production`.", always=False),
    ResourceAttribute("process.pid", "The process id."),
    ResourceAttribute("sereno.contract.version", "The version of this contract."),
    ResourceAttribute("telemetry.sdk.language", "`python`."),
    ResourceAttribute("telemetry.sdk.name", "`opentelemetry`."),
    ResourceAttribute("telemetry.sdk.version", "Its version."),
)

# --- what was emitted, against what is declared ---------------------------------------------------

_SUFFIXES = {"counter": "_total", "info": "_info"}


def check_metrics(registry: CollectorRegistry, profile: Profile = "core") -> list[str]:
    """What a registry holds beyond the contract, and which families of a profile never moved."""
    declared = {PREFIX + metric.name: metric for metric in METRICS}
    beyond: set[str] = set()
    moved: set[str] = set()
    for family in registry.collect():
        name = family.name + _SUFFIXES.get(family.type, "")
        if not name.startswith(PREFIX):
            continue  # of the process, by prometheus-client
        metric = declared.get(name)
        if metric is None:
            beyond.add(f"undeclared metric: {name}")
            continue
        if _moved(family):
            moved.add(name)
        for sample in family.samples:
            given = {key: value for key, value in sample.labels.items() if key != "le"}
            if set(given) != {label.name for label in metric.labels}:
                beyond.add(f"undeclared labels: {name} {sorted(given)}")
                continue
            for label in metric.labels:
                if label.values and given[label.name] not in label.values:
                    beyond.add(f'undeclared value: {name}{{{label.name}="{given[label.name]}"}}')
    return sorted(beyond) + [
        f"never moved: {name}"
        for name, metric in declared.items()
        if metric.profile == profile and not metric.later and name not in moved
    ]


def check_spans(spans: Iterable[ReadableSpan], profile: Profile = "core") -> list[str]:
    """What spans are beyond the contract, what they lack, and what of a profile was never seen.

    Spans of other instrumentation scopes than the contract's are nobody's business here.
    """
    scopes = {declared.scope for declared in SPANS}
    beyond: set[str] = set()
    seen: set[str] = set()
    attributes: set[str] = set()
    for span in spans:
        scope = span.instrumentation_scope
        if scope is None or scope.name not in scopes:
            continue
        declared = _declared(span, scope.name)
        if declared is None:
            beyond.add(f"undeclared span: {span.kind.name} {span.name}")
            continue
        seen.add(declared.key)
        has = set(span.attributes or ())
        attributes |= has
        allowed = {*declared.always, *declared.sometimes, "sereno.truncated"}
        beyond.update(
            f"undeclared attribute: {declared.key}: {name}"
            for name in has - allowed
            if not (declared.foreign and name.startswith(declared.foreign))
        )
        beyond.update(
            f"missing attribute: {declared.key}: {name}" for name in set(declared.always) - has
        )
        beyond.update(_beyond_values(declared, span))
    return [
        *sorted(beyond),
        *(
            f"never seen: span {declared.key}"
            for declared in SPANS
            if declared.profile == profile and declared.key not in seen
        ),
        *(
            f"never seen: attribute {attribute.name}"
            for attribute in ATTRIBUTES
            if attribute.dialect == (profile == "llm")
            and not attribute.later
            and attribute.name not in attributes
        ),
    ]


def check_logs(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What records of events are beyond the contract, what they lack, and what was never said.

    Records without an event are free to say what they like.
    """
    declared = {event.name: event for event in LOG_EVENTS}
    beyond: set[str] = set()
    seen: set[str] = set()
    for record in records:
        name = record.get("event")
        if name is None:
            continue
        event = declared.get(name)
        if event is None:
            beyond.add(f"undeclared event: {name}")
            continue
        seen.add(name)
        if record.get("level") not in (event.level, event.quieter):
            beyond.add(f"undeclared level: {name}: {record.get('level')}")
        required = {*LOG_BASE, *event.always}
        allowed = {*LOG_FIELDS, *event.always, *event.sometimes}
        beyond.update(f"undeclared field: {name}: {key}" for key in set(record) - allowed)
        beyond.update(f"missing field: {name}: {key}" for key in required - set(record))
    return sorted(beyond) + [
        f"never seen: event {event.name}"
        for event in LOG_EVENTS
        if not event.later and event.name not in seen
    ]


def _moved(family: Any) -> bool:
    """Whether anything was counted: a gauge of ours says so itself, for it may be back at 0."""
    moved = getattr(family, "moved", None)
    if moved is not None:
        return bool(moved)
    return any(sample.value and sample.value == sample.value for sample in family.samples)


def _declared(span: ReadableSpan, scope: str) -> Span | None:
    attributes = span.attributes or {}
    for declared in SPANS:
        key, value = declared.told_by or ("", None)
        if (
            declared.scope == scope
            and declared.kind == span.kind.name
            and _pattern(declared.name).fullmatch(span.name)
            and (not key or attributes.get(key) == value)
        ):
            return declared
    return None


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    """What spans of a name look like: a route or a model may be unknown, then the rest is all."""
    first, *rest = name.split(" ", 1)
    start = ".+" if first.startswith("{") else re.escape(first)
    end = "( .+)" if rest else ""
    return re.compile(start + end + ("?" if rest in (["{http.route}"], ["{model}"]) else ""))


def _beyond_values(declared: Span, span: ReadableSpan) -> Iterator[str]:
    attributes = span.attributes or {}
    for attribute in ATTRIBUTES:
        value = attributes.get(attribute.name)
        if attribute.values and value is not None and value not in attribute.values:
            yield f"undeclared value: {declared.key}: {attribute.name}={value}"
    for link in span.links:
        kind = (link.attributes or {}).get("sereno.link.kind")
        if kind not in declared.links:
            yield f"undeclared link: {declared.key}: {kind}"
    for event in span.events:
        if event.name != "exception" or set(event.attributes or ()) - set(EXCEPTION_ATTRIBUTES):
            yield f"undeclared span event: {declared.key}: {event.name}"


# --- classes of errors ----------------------------------------------------------------------------

#: Top-level package and class name: the libraries themselves need not be installed. The nearest
#: class of an exception's own order of inheritance decides.
_CLASSES: dict[ErrorClass, tuple[str, ...]] = {
    "timeout": (
        "builtins.TimeoutError",  # asyncio's, concurrent.futures' and socket's too
        "langgraph.NodeTimeoutError",
        "httpx.TimeoutException",
        "httpx2.TimeoutException",
        "httpcore.TimeoutException",
        "httpcore2.TimeoutException",
        "requests.ConnectTimeout",  # would be a ConnectionError first
        "requests.Timeout",
        "urllib3.TimeoutError",
        "openai.APITimeoutError",
        "anthropic.APITimeoutError",
    ),
    "connection": (
        "builtins.ConnectionError",
        "socket.gaierror",
        "ssl.SSLError",
        "http.IncompleteRead",
        "urllib.URLError",
        "httpx.NetworkError",
        "httpx.ProxyError",
        "httpx.RemoteProtocolError",
        "httpx2.NetworkError",
        "httpx2.ProxyError",
        "httpx2.RemoteProtocolError",
        "httpcore.NetworkError",
        "httpcore.ProxyError",
        "httpcore.RemoteProtocolError",
        "httpcore2.NetworkError",
        "httpcore2.ProxyError",
        "httpcore2.RemoteProtocolError",
        "requests.ConnectionError",
        "requests.ChunkedEncodingError",
        "urllib3.NewConnectionError",  # would be a TimeoutError first
        "urllib3.ProtocolError",
        "urllib3.ProxyError",
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "openai.APIConnectionError",
        "anthropic.APIConnectionError",
    ),
    "validation": (
        "pydantic.ValidationError",
        "pydantic_core.ValidationError",
        "json.JSONDecodeError",
        "langgraph.InvalidUpdateError",
        "langgraph.EmptyInputError",
        "langchain_core.OutputParserException",
        "openai.APIResponseValidationError",
        "anthropic.APIResponseValidationError",
    ),
    "recursion_limit": ("langgraph.GraphRecursionError",),
    "tool_error": ("langchain_core.ToolException",),
    "storage": ("sqlite3.Error",),
}
_BY_NAME = {name: error_class for error_class, names in _CLASSES.items() for name in names}

_BY_ERRNO: dict[int, ErrorClass] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO), "storage"),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN), "connection"),
}

#: How far below an error of no class of its own its cause is looked for.
_DEPTH = 2


def classify(exc: BaseException | None) -> ErrorClass:
    """The class of an error. Never raises, whatever the exception's properties do.

    An HTTP status says more than a type, and a type more than the error that caused it. A plain
    ValueError is `other`: it may be anybody's.
    """
    try:
        return _classify(exc, _DEPTH)
    except BaseException:  # of a property or a `__str__`: nobody asked this code to stop
        return "other"


def error_type(exc: BaseException) -> str:
    """`error.type`: the exception's class name. Never a metric label."""
    return type(exc).__name__


def error_text(exc: BaseException, limit: int = 2_000) -> str:
    """An exception's message. Never raises, whatever its `__str__` does."""
    try:
        return str.__str__(str(exc))[:limit]
    except BaseException:
        return f"<{type(exc).__name__} without a message>"


def _classify(exc: BaseException | None, depth: int) -> ErrorClass:
    if exc is None:
        return "other"
    found = _by_status(exc) or _by_type(exc)
    if found is None and depth:
        last = _get(exc, "last_attempt")  # tenacity's RetryError
        inner = last.exception(timeout=0) if last is not None else exc.__cause__
        found = _classify(inner, depth - 1)
    return found or "other"


def _by_status(exc: BaseException) -> ErrorClass | None:
    for owner in (exc, _get(exc, "response")):
        for name in ("status_code", "status", "code"):
            status = _get(owner, name)
            if isinstance(status, int) and 400 <= status <= 599:
                return _of_status(status)
    return None


def _of_status(status: int) -> ErrorClass:
    if status == 429:
        return "rate_limited"
    if status in (401, 403):
        return "auth"
    if status == 408:
        return "timeout"
    return "upstream_5xx" if status >= 500 else "upstream_4xx"


def _by_type(exc: BaseException) -> ErrorClass | None:
    for cls in type(exc).__mro__:
        package = cls.__module__.partition(".")[0]
        if found := _BY_NAME.get(f"{package}.{cls.__name__}"):
            return found
    return _BY_ERRNO.get(exc.errno or 0) if isinstance(exc, OSError) else None


def _get(owner: object, name: str) -> Any:
    """An attribute, or None when there is none or reading it fails."""
    try:
        return getattr(owner, name, None)
    except BaseException:
        return None


if __name__ == "__main__":
    from telemetry.contract_docs import document

    print(document(), end="")
