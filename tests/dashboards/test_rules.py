"""Rules, alerts and runbooks name only what exists, and each alert has all that it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.utils import floatToGoString
from promql import named

from telemetry import contract

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "dashboards/prometheus"
RUNBOOKS = ROOT / "docs/runbooks"
SECTIONS = ("Meaning", "Impact", "Diagnosis", "Mitigation")
SEVERITIES = {"page", "ticket", "none"}

#: Metrics of others, with their labels besides job and instance.
FOREIGN = {
    "up": set(),
    "ALERTS": {"alertname", "alertstate", "severity"},
    "process_start_time_seconds": set(),
    "process_resident_memory_bytes": set(),
    "process_cpu_seconds_total": set(),
    "prometheus_notifications_dropped_total": set(),
    "otelcol_processor_memory_limiter_refused_spans_total": {"processor"},
} | {
    name: {"exporter"}
    for name in (
        "otelcol_exporter_queue_size",
        "otelcol_exporter_queue_capacity",
        *(
            f"otelcol_exporter_{what}_{signal}_total"
            for what in ("sent", "send_failed", "enqueue_failed")
            for signal in ("spans", "log_records")
        ),
    )
}
FOREIGN |= {
    f"otelcol_receiver_{what}_{signal}_total": {"receiver"}
    for what in ("accepted", "refused")
    for signal in ("spans", "log_records")
}
#: A recorded name that says what it is in another order: the contract's design has it so.
UNLEVELLED = {"sereno_histogram_overflow_ratio"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in read(PROMETHEUS / name)["groups"] for rule in group["rules"]]


RECORDED = rules("rules.yml")
ALERTS = rules("alerts.yml")
NAMES = sorted({rule["alert"] for rule in ALERTS})
BOOKS = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md")}
PANELS = {
    (board["uid"], panel["id"]): panel["title"]
    for board in (json.loads(path.read_text()) for path in ROOT.glob("dashboards/grafana/*.json"))
    for panel in board["panels"]
}
QUERIES = [
    (name, query.strip())
    for name, text in sorted(BOOKS.items())
    for query in re.findall(r"```promql\n(.+?)```", text, re.DOTALL)
]
EXPRESSIONS = [
    *((rule["record"], rule["expr"]) for rule in RECORDED),
    *((rule["alert"], rule["expr"]) for rule in ALERTS),
    *QUERIES,
]


# --- the scanner of values ------------------------------------------------------------------------

_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


def matchers(expr: str) -> Iterator[tuple[str, str, str]]:
    """Metric, label and each value, or alternative of a pattern, that selectors name."""
    for metric, inside in _SELECTOR.findall(expr):
        for label, sign, value in _MATCHER.findall(inside):
            for one in value.split("|") if "~" in sign else [value]:
                yield metric, label, one


def declared(name: str) -> contract.Metric | None:
    """The family of the contract that a series belongs to."""
    for metric in contract.METRICS:
        full = contract.PREFIX + metric.name
        suffixes = ("_bucket", "_count", "_sum") if metric.type == "histogram" else ("",)
        if name in {full + suffix for suffix in suffixes}:
            return metric
    return None


def recorded_labels() -> dict[str, set[str]]:
    """Each recorded name, with the labels that its series may have."""
    found: dict[str, set[str]] = {}
    for rule in RECORDED:
        labels = found.setdefault(rule["record"], {"job"})
        labels |= set(rule.get("labels", ())) | named(rule["expr"]).grouped
        for metric in named(rule["expr"]).metrics & set(found):
            labels |= found[metric]
    return found


LABELS = recorded_labels()


def labels_of(name: str) -> set[str]:
    """The labels that a series may have. Raises KeyError when there is no such series."""
    if name in LABELS:
        return LABELS[name]
    if (metric := declared(name)) is not None:
        edge = {"le"} if name.endswith("_bucket") else set()
        return {label.name for label in metric.labels} | edge | {"job", "instance"}
    return FOREIGN[name] | {"job", "instance"}


def edges(metric: contract.Metric, *bounds: float) -> set[str]:
    """How the edges of a histogram's buckets may be written."""
    written = {floatToGoString(bound) for bound in bounds or metric.buckets}
    return written | {edge.removesuffix(".0") for edge in written}


def allowed(name: str, label: str) -> set[str]:
    """The values that a label of a series may have; empty when they are open."""
    metric = declared(name)
    if metric is None:
        return set()
    if label == "le":
        return edges(metric)
    return {value for one in metric.labels if one.name == label for value in one.values}


def mistakes(expr: str) -> list[str]:
    """What an expression names and nobody declares."""
    found = []
    seen = named(expr)
    known: set[str] = set()
    for metric, labels in seen.selectors:
        try:
            own = labels_of(metric)
        except KeyError:
            found.append(f"unknown metric {metric}")
            continue
        known |= own
        found += [f"unknown label {metric}{{{label}}}" for label in sorted(labels - own)]
    found += [f"unknown label {label}" for label in sorted(seen.grouped - known)]
    for name, label, value in matchers(expr):
        values = allowed(name, label)
        if values and not any(re.fullmatch(value, one) for one in values):
            found.append(f"unknown value {name}{{{label}={value}}}")
    return found


@pytest.mark.parametrize(
    ("expr", "wrong"),
    [
        pytest.param('sereno_runs_finished_total{outcome=~"error|timeout"}', [], id="good"),
        pytest.param(
            "sereno_runs_ended_total", ["unknown metric sereno_runs_ended_total"], id="name"
        ),
        pytest.param(
            'rate(sereno_runs_finished_total{node="x"}[5m])',
            ["unknown label sereno_runs_finished_total{node}"],
            id="label",
        ),
        pytest.param(
            "sum by (nodes) (sereno_nodes_active)", ["unknown label nodes"], id="grouped by"
        ),
        pytest.param(
            'sereno_runs_finished_total{outcome=~"error|timed_out"}',
            ["unknown value sereno_runs_finished_total{outcome=timed_out}"],
            id="value",
        ),
        pytest.param(
            'sereno_run_first_output_seconds_bucket{le=~"6([.]0)?"}',
            ["unknown value sereno_run_first_output_seconds_bucket{le=6([.]0)?}"],
            id="no edge",
        ),
        pytest.param(
            "sereno_queue_depth_count", ["unknown metric sereno_queue_depth_count"], id="suffix"
        ),
    ],
)
def test_the_scanner_finds_what_nobody_declares(expr: str, wrong: list[str]) -> None:
    assert mistakes(expr) == wrong


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expr"), [pytest.param(*one, id=f"{one[0]}-{n}") for n, one in enumerate(EXPRESSIONS)]
)
def test_expressions_name_what_exists(name: str, expr: str) -> None:
    assert mistakes(expr) == []


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_recorded_names_say_level_metric_and_operations(rule: dict[str, Any]) -> None:
    name = rule["record"]

    assert name in UNLEVELLED or re.fullmatch(r"[a-z]+:[a-z_]+:[a-z0-9_]+", name)


def test_edges_are_never_matched_literally() -> None:
    """One version writes 5, another 5.0."""
    for _, expr in EXPRESSIONS:
        assert not re.search(r'le\s*!?="', expr), expr


def test_both_slos_have_every_window() -> None:
    windows = {"5m", "30m", "1h", "2h", "6h", "1d", "3d", "30d"}
    names = [rule["record"] for rule in RECORDED]

    assert {name for name in names if name.startswith("slo:sli_error:")} == {
        f"slo:sli_error:ratio_rate{window}" for window in windows
    }
    for name in ("slo:objective:ratio", "slo:sli_bad:rate5m", "slo:sli_valid:rate5m"):
        slos = [rule["labels"]["slo"] for rule in RECORDED if rule["record"] == name]
        assert slos == ["run-success", "run-success-less-input", "first-output"]


def test_long_windows_are_sums_over_sums() -> None:
    for rule in RECORDED:
        name, expr = rule["record"], rule["expr"]
        if name.startswith("slo:sli_error:") and not name.endswith("5m"):
            window = name.removeprefix("slo:sli_error:ratio_rate")
            bad, valid = (
                f"sum_over_time(slo:sli_{of}:rate5m[{window}])" for of in ("bad", "valid")
            )
            assert expr == f"{bad} / ({valid} > 0)"
        assert "avg" not in expr


def test_the_count_of_bad_events_knows_how_often_rates_are_recorded() -> None:
    (group,) = (
        group
        for group in read(PROMETHEUS / "rules.yml")["groups"]
        if any(rule["record"] == "slo:sli_bad:rate5m" for rule in group["rules"])
    )
    counts = [rule for rule in RECORDED if rule["record"].startswith("slo:sli_bad:count")]

    assert group["interval"] == "30s"
    assert counts
    assert all(rule["expr"].endswith("]) * 30") for rule in counts)


def test_every_histogram_is_watched_at_its_last_edge() -> None:
    watched = {
        rule["labels"]["family"]: rule["expr"]
        for rule in RECORDED
        if rule["record"] == "sereno_histogram_overflow_ratio"
    }
    histograms = {metric.name: metric for metric in contract.METRICS if metric.type == "histogram"}

    # Runs that failed before any output are in its +Inf on purpose.
    assert set(watched) == set(histograms) - {"run_first_output_seconds"}
    for name, expr in watched.items():
        (pattern,) = re.findall(r'le=~"([^"]+)"', expr)
        last = edges(histograms[name], histograms[name].buckets[-1])
        assert all(re.fullmatch(pattern, edge) for edge in last), name
        assert f"sereno_{name}_count" in expr


# --- alerts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_who_gets_up_and_what_to_read(alert: dict[str, Any]) -> None:
    name, said = alert["alert"], alert["annotations"]

    assert alert["labels"]["severity"] in SEVERITIES
    assert set(said) == {"summary", "description", "runbook_url", "dashboard_uid"}
    assert said["runbook_url"] == f"docs/runbooks/{name}.md"
    assert (ROOT / said["runbook_url"]).exists()
    assert said["dashboard_uid"] in {uid for uid, _ in PANELS}
    assert len(said["summary"]) < 120


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_texts_use_labels_that_the_alert_has(alert: dict[str, Any]) -> None:
    seen = named(alert["expr"])
    known = seen.grouped | set(alert["labels"])
    for metric, labels in seen.selectors:
        known |= labels | (set() if "sum" in alert["expr"] else labels_of(metric))
    used = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))

    assert used <= known


def test_alerts_are_those_that_were_promised() -> None:
    assert set(NAMES) == {
        *("RunSuccessBurn", "FirstOutputSlow", "StreamStalled", "RetryStorm", "RetriesExhausted"),
        *("RunStuck", "RunsLost", "QueueStarved", "LoopStall", "TelemetryBlind", "SeriesOverflow"),
        *("HistogramOverflow", "InterruptsRotting", "LeaseTrouble", "StorageFilling"),
        *("RuntimeDown", "MetricsAbsent", "CollectorDown", "CollectorDropping"),
        *("CollectorRefusing", "CollectorQueueFilling", "CollectorExportFailing", "Watchdog"),
    }


def directions(name: str) -> tuple[bool, bool]:
    """Whether tests of promtool see an alert fire, and see it silent."""
    fires = silent = False
    for path in PROMETHEUS.glob("tests/*.yml"):
        for case in read(path)["tests"]:
            for one in case.get("alert_rule_test", ()):
                if one["alertname"] == name:
                    fires |= bool(one["exp_alerts"])
                    silent |= not one["exp_alerts"]
            for one in case.get("promql_expr_test", ()):
                if f'ALERTS{{alertname="{name}"' in one["expr"]:
                    fires |= bool(one["exp_samples"])
                    silent |= not one["exp_samples"]
    return fires, silent


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Watchdog"])
def test_an_alert_is_tested_both_ways(name: str) -> None:
    assert directions(name) == (True, True)


def test_the_watchdog_is_never_silent() -> None:
    assert directions("Watchdog") == (True, False)


def test_what_may_not_exist_before_its_first_failure_is_looked_for_from_nothing() -> None:
    """`increase` does not see a series begin."""
    on_demand = {contract.PREFIX + m.name for m in contract.METRICS if m.on_demand}
    for alert in ALERTS:
        for metric in re.findall(r"increase\((\w+)", alert["expr"]):
            if metric in on_demand or metric.startswith("otelcol_"):
                assert f"unless {metric} offset 15m" in alert["expr"], alert["alert"]


def test_inhibitions_name_alerts_that_exist() -> None:
    config = read(ROOT / "dashboards/alertmanager/alertmanager.yml")
    for rule in config["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            label, pattern = re.fullmatch(r'(\w+)[!=]=?~?"(.*)"', matcher).groups()  # type: ignore[union-attr]
            if label == "alertname":
                for one in pattern.split("|"):
                    assert any(re.fullmatch(one, name) for name in NAMES), matcher


# --- runbooks -------------------------------------------------------------------------------------


def test_every_runbook_has_its_alert_and_every_alert_its_runbook() -> None:
    assert sorted(BOOKS) == NAMES


@pytest.mark.parametrize("name", sorted(BOOKS))
def test_a_runbook_says_what_it_means_what_it_does_why_and_what_to_do(name: str) -> None:
    text = BOOKS[name]

    assert text.startswith(f"# {name}\n")
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == SECTIONS
    assert any(name == whose for whose, _ in QUERIES)


@pytest.mark.parametrize("name", sorted(BOOKS))
def test_its_links_lead_somewhere(name: str) -> None:
    for title, link in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", BOOKS[name]):
        if panel := re.fullmatch(r"http://localhost:3000/d/([\w-]+)\?viewPanel=(\d+)", link):
            assert PANELS[panel[1], int(panel[2])] == title
        else:
            assert (RUNBOOKS / link).exists()


def test_its_words_are_those_of_the_contract_and_of_the_settings() -> None:
    settings = set(re.findall(r"`(SERENO_\w+)`", (ROOT / "docs/settings.md").read_text()))
    events = {event.name for event in contract.LOG_EVENTS}
    for text in BOOKS.values():
        assert set(re.findall(r"\bSERENO_\w+", text)) <= settings
        named_events = re.findall(r"`event` ((?:`[a-z_.]+`(?:,| and)? ?)+)", text)
        for event in re.findall(r"`([a-z_.]+)`", " ".join(named_events)):
            assert event in events
