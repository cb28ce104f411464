"""The dashboards ask only for what exists, show all that is measured, and read alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from promql import named

from dashboards.src.colours import MEANING
from dashboards.src.queries import GRAFANA, Query, dashboards, filled, panels, queries
from telemetry import contract

ROOT = GRAFANA.parent
BOARDS = dashboards()
QUERIES = tuple(queries())
PROMQL = tuple(query for query in QUERIES if query.source == "prometheus")

#: Metrics of others, each with its labels besides job and instance, and where it comes from.
PROCESS = "prometheus_client, of every process"
SCRAPE = "Prometheus, of every scrape"
COLLECTOR = "the collector, about itself"
OF_SPANS = "the collector's span_metrics connector"
FOREIGN: dict[str, tuple[set[str], str]] = {
    "ALERTS": ({"alertname", "alertstate", "severity", "graph"}, "Prometheus, of every alert"),
    "process_cpu_seconds_total": (set(), PROCESS),
    "process_resident_memory_bytes": (set(), PROCESS),
    "process_open_fds": (set(), PROCESS),
    "process_max_fds": (set(), PROCESS),
    "python_gc_collections_total": ({"generation"}, PROCESS),
    "scrape_duration_seconds": (set(), SCRAPE),
    "scrape_samples_scraped": (set(), SCRAPE),
    "otelcol_receiver_accepted_spans_total": (set(), COLLECTOR),
    "otelcol_receiver_refused_spans_total": (set(), COLLECTOR),
    "otelcol_receiver_accepted_log_records_total": (set(), COLLECTOR),
    "otelcol_exporter_sent_spans_total": ({"exporter"}, COLLECTOR),
    "otelcol_exporter_send_failed_spans_total": ({"exporter"}, COLLECTOR),
    "otelcol_exporter_sent_log_records_total": ({"exporter"}, COLLECTOR),
    "otelcol_exporter_queue_size": ({"exporter"}, COLLECTOR),
    "otelcol_exporter_queue_capacity": ({"exporter"}, COLLECTOR),
    "otelcol_process_memory_rss_bytes": (set(), COLLECTOR),
    "traces_span_metrics_calls_total": ({"service_name", "span_name", "status_code"}, OF_SPANS),
    "traces_span_metrics_duration_seconds_bucket": ({"service_name", "span_name", "le"}, OF_SPANS),
}
#: Metrics of the contract that are on no panel though something moves them.
WAIVED: dict[str, str] = {}


def identify(query: Query) -> str:
    return f"{query.board}-{query.panel}{query.reference}"


def recorded() -> dict[str, set[str]]:
    """The names that rules record, with the labels that their text knows."""
    names: dict[str, set[str]] = {}
    for group in yaml.safe_load((ROOT / "prometheus" / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            known = names.setdefault(rule["record"], set())
            known |= set(rule.get("labels", ())) | named(rule["expr"]).grouped
    for name, labels in names.items():  # of the rules that it is made of
        if name.startswith("slo:"):
            labels |= {"slo"}
    return names


RECORDED = recorded()


def labels_of(name: str) -> set[str] | None:
    """The labels that a series may have; None when there is no such series."""
    if name in FOREIGN:
        return FOREIGN[name][0] | {"job", "instance"}
    if name in RECORDED:
        return RECORDED[name] | {"job"}
    for metric in contract.METRICS:
        labels = {label.name for label in metric.labels} | {"job", "instance"}
        full = contract.PREFIX + metric.name
        if metric.type == "histogram":
            if name == f"{full}_bucket":
                return labels | {"le"}
            if name in (f"{full}_count", f"{full}_sum"):
                return labels
        elif name == full:
            return labels
    return None


def everything() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for board in BOARDS.values():
        for panel in panels(board):
            yield board, panel


PANELS = [
    pytest.param(board, panel, id=f"{board['uid']}-{panel['id']}") for board, panel in everything()
]


@pytest.mark.parametrize("query", PROMQL, ids=identify)
def test_a_panel_asks_only_for_metrics_and_labels_that_exist(query: Query) -> None:
    said = named(query.expr)
    known: set[str] = set()
    for metric, matched in said.selectors:
        labels = labels_of(metric)
        assert labels is not None, f"nothing is called {metric}"
        assert matched <= labels, f"{metric} has no label {matched - labels}"
        known |= labels

    assert said.grouped <= known
    assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= known


@pytest.mark.parametrize("query", PROMQL, ids=identify)
def test_a_panel_asks_only_for_label_values_that_can_be(query: Query) -> None:
    closed = {
        (contract.PREFIX + metric.name + suffix, label.name): set(label.values)
        for metric in contract.METRICS
        for label in metric.labels
        if label.values
        for suffix in ("", "_bucket", "_count", "_sum")
    }
    said = named(query.expr)
    for label, sign, value in said.values:
        for metric, matched in said.selectors:
            if label in matched and (values := closed.get((metric, label))):
                wanted = [value] if sign in ("=", "!=") else value.split("|")
                for word in wanted:
                    assert any(re.fullmatch(word, possible) for possible in values), (label, word)


@pytest.mark.parametrize("query", PROMQL, ids=identify)
def test_rates_are_over_the_interval_that_grafana_knows_to_be_long_enough(query: Query) -> None:
    for function, window in named(query.expr).windows:
        if function == "last_over_time":  # of what begins with the first failure, not a rate
            assert window == "1h"
            continue
        assert function in ("rate", "increase")
        assert window == "$__rate_interval"


@pytest.mark.parametrize("query", PROMQL, ids=identify)
def test_what_may_not_exist_before_its_first_failure_counts_from_nothing(query: Query) -> None:
    """`rate` does not see a series begin."""
    counters = {
        contract.PREFIX + m.name + ("_count" if m.type == "histogram" else "")
        for m in contract.METRICS
        if m.on_demand
    }
    for selector in re.findall(r"rate\((\w+\{[^}]*\})\[", query.expr):
        if selector.partition("{")[0] in counters:
            first = f"{selector} unless last_over_time({selector}[1h] offset $__rate_interval)"
            assert f"({first}) / ($__rate_interval_ms / 1000) or rate({selector}[" in query.expr


def test_every_metric_is_on_a_panel_or_waived_with_a_reason() -> None:
    shown = {metric for query in PROMQL for metric in named(query.expr).metrics}
    missing = {
        metric.name
        for metric in contract.METRICS
        if not metric.later
        and not any(
            contract.PREFIX + metric.name + suffix in shown
            for suffix in ("", "_bucket", "_count", "_sum")
        )
    }

    assert missing == set(WAIVED)
    assert all(WAIVED.values())


def test_nothing_is_declared_foreign_that_no_panel_asks_for() -> None:
    asked = {metric for query in PROMQL for metric in named(query.expr).metrics}

    assert set(FOREIGN) <= asked


@pytest.mark.parametrize("board", BOARDS.values(), ids=lambda board: str(board["uid"]))
def test_a_dashboard_can_be_linked_to_and_reads_like_the_others(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 42
    assert board["graphTooltip"] == 1, "a shared crosshair"
    assert board["title"].startswith("Sereno / ")
    assert board["description"]
    assert "sereno" in board["tags"]
    assert len(list(panels(board))) <= 20
    identities = [panel["id"] for panel in board["panels"]]
    assert len(set(identities)) == len(identities)
    assert 0 not in identities
    assert {annotation["name"] for annotation in board["annotations"]["list"]} == {
        *("Deploys", "Starts", "Alerts")
    }
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert {name for name in used if not name.startswith("__")} <= variables


@pytest.mark.parametrize("board", BOARDS.values(), ids=lambda board: str(board["uid"]))
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_files_are_called_as_the_links_to_them() -> None:
    assert {name: board["uid"] for name, board in BOARDS.items()} == {
        f"sereno-{name}.json": f"sereno-{name}"
        for name in ("overview", "graphs", "streams", "saturation", "telemetry")
    }


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_a_panel_says_what_it_shows(board: dict[str, Any], panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    variable = {"prometheus": "datasource", "loki": "logs", "jaeger": "traces"}
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    for source in sources:
        assert source["uid"] == "${" + variable[source["type"]] + "}"
    references = [target["refId"] for target in panel["targets"]]
    assert references
    assert len(set(references)) == len(references)


#: What a colour says, wherever it is.
COLOURS = {"success": "green", "error": "red", "timeout": "orange", "cancelled": "#8e8e8e"}


def test_a_colour_means_the_same_everywhere() -> None:
    found: dict[str, set[str]] = {}
    for _, panel in everything():
        for override in panel["fieldConfig"]["overrides"]:
            for setting in override["properties"]:
                if setting["id"] == "color":
                    name = override["matcher"]["options"]
                    found.setdefault(name, set()).add(setting["value"]["fixedColor"])

    assert all(len(colours) == 1 for colours in found.values()), found
    assert {name: found[name] for name in COLOURS} == {n: {c} for n, c in COLOURS.items()}


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_outcomes_are_drawn_in_their_colours(board: dict[str, Any], panel: dict[str, Any]) -> None:
    sets = {"{{outcome}}": {"success"}, "{{reason}}": set(), "{{result}}": set()}
    coloured = {o["matcher"]["options"] for o in panel["fieldConfig"]["overrides"]}
    for target in panel["targets"]:
        if target.get("legendFormat") in sets:
            assert coloured
            assert sets[target["legendFormat"]] <= coloured


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_thresholds_rise_and_a_figure_has_some(
    board: dict[str, Any], panel: dict[str, Any]
) -> None:
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    values = [step["value"] for step in steps]

    assert values[:1] in ([], [None])
    assert values[1:] == sorted(values[1:])
    assert steps or panel["type"] != "stat"
    assert {step["color"] for step in steps} <= {"green", "orange", "red", "#8e8e8e"}


def test_exemplars_are_shown_where_the_contract_promises_them() -> None:
    promised = {
        f"{contract.PREFIX}{metric.name}_bucket" for metric in contract.METRICS if metric.exemplar
    }
    shown = {metric for query in PROMQL if query.exemplars for metric in named(query.expr).metrics}

    assert promised <= shown
    assert shown - promised == {"traces_span_metrics_duration_seconds_bucket"}


def test_the_first_screen_says_whether_users_are_hurt() -> None:
    first = [p for p in BOARDS["sereno-overview.json"]["panels"] if p["gridPos"]["y"] < 6]

    assert first[0]["title"] == "Are users hurt?"
    assert {panel["type"] for panel in first[1:]} == {"stat"}


def test_variables_can_all_be_filled_in() -> None:
    for query in QUERIES:
        assert "$" not in filled(query.expr)


@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2")  # Grafana 13 only
def test_the_files_are_what_the_generator_makes() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="needs the extra `dashboards`")
    from dashboards.src.boards import render

    made = render()

    assert {path.name: path.read_text() for path in GRAFANA.glob("*.json")} == made, (
        "python -m dashboards.src writes them anew"
    )


# --- provisioning ---------------------------------------------------------------------------------

PROVISIONING = ROOT / "provisioning"


def provisioned(path: str) -> Any:
    return yaml.safe_load((PROVISIONING / path).read_text())


def sources() -> dict[str, dict[str, Any]]:
    return {
        source["uid"]: source for source in provisioned("datasources/sereno.yaml")["datasources"]
    }


def test_the_data_sources_are_what_grafana_takes() -> None:
    known = {"name", "uid", "type", "access", "url", "isDefault", "jsonData"}
    found = sources()

    assert provisioned("datasources/sereno.yaml")["apiVersion"] == 1
    assert {uid: source["type"] for uid, source in found.items()} == {
        uid: uid for uid in ("prometheus", "jaeger", "loki")
    }
    assert all(set(source) <= known and source["access"] == "proxy" for source in found.values())
    assert [uid for uid, source in found.items() if source.get("isDefault")] == ["prometheus"]


def test_the_three_jumps_are_wired() -> None:
    found = sources()
    (exemplar,) = found["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    to_logs = found["jaeger"]["jsonData"]["tracesToLogsV2"]
    to_traces = found["loki"]["jsonData"]["derivedFields"]

    assert (exemplar["name"], exemplar["datasourceUid"]) == ("trace_id", "jaeger")
    assert to_logs["datasourceUid"] == "loki"
    assert to_logs["customQuery"]
    assert to_logs["query"].endswith('| trace_id="$${__trace.traceId}"')
    assert {field["datasourceUid"] for field in to_traces} == {"jaeger"}
    assert {field["url"] for field in to_traces} == {"$${__value.raw}"}
    assert to_traces[0]["matcherType"] == "label"
    assert to_traces[0]["matcherRegex"] in contract.LOG_FIELDS
    line = json.dumps({"trace_id": "ab" * 16})
    assert re.search(to_traces[1]["matcherRegex"], line)[1] == "ab" * 16  # type: ignore[index]


def test_no_dollar_is_left_to_grafanas_own_expansion() -> None:
    for path in PROVISIONING.rglob("*.yaml"):
        text = "".join(
            line.split(" #")[0] for line in path.read_text().splitlines(keepends=True)[2:]
        )
        assert not re.search(r"(?<!\$)\$(?!\$)", text.replace("$$", "")), path


def test_the_dashboards_are_read_from_a_folder() -> None:
    found = provisioned("dashboards/sereno.yaml")
    (provider,) = found["providers"]

    assert found["apiVersion"] == 1
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).is_absolute()
    assert not provider["allowUiUpdates"]


# --- the scanner ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "metrics", "grouped", "windows"),
    [
        pytest.param("up", {"up"}, set(), [], id="a name"),
        pytest.param(
            'sum by (le, a) (rate(x_bucket{b=~"c.+"}[5m]))',
            {"x_bucket"},
            {"le", "a"},
            [("rate", "5m")],
            id="grouped before",
        ),
        pytest.param("sum(rate(x[1m])) by (a) > 0", {"x"}, {"a"}, [("rate", "1m")], id="after"),
        pytest.param(
            "a / on (b) group_left (c) d:e:f unless time() - g offset 5m",
            {"a", "d:e:f", "g"},
            {"b", "c"},
            [],
            id="joined",
        ),
        pytest.param('x{a="} by (b) y"} or vector(1)', {"x"}, set(), [], id="braces in a string"),
    ],
)
def test_the_scanner_finds_names(
    expr: str, metrics: set[str], grouped: set[str], windows: list[tuple[str, str]]
) -> None:
    said = named(expr)

    assert said.metrics == metrics
    assert said.grouped == grouped
    assert list(said.windows) == windows


def test_the_scanner_tells_what_is_no_promql() -> None:
    with pytest.raises(ValueError, match="no PromQL"):
        named("sum(;)")


def test_closed_sets_have_colours_for_what_is_good_and_bad() -> None:
    words = {
        *get_args(contract.RunOutcome),
        *get_args(contract.AttemptOutcome),
        *get_args(contract.CloseReason),
        *get_args(contract.SpanResult),
        *get_args(contract.RejectReason),
    }

    assert words <= set(MEANING)
