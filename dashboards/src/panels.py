"""The vocabulary of the dashboards: a board, its rows, and the few kinds of panels they need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    logs,
    loki,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog import builder, variants
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as shapes
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models import prometheus as prom

from dashboards.src.colours import BLUE, GREEN, GREY, MEANING, RED
from dashboards.src.promql import HERE, metric

__all__ = [
    "Query",
    "board",
    "distribution",
    "evidence",
    "explore_logs",
    "explore_traces",
    "failing_traces",
    "lines",
    "link",
    "number",
    "row",
    "rows",
    "states",
]

PROMETHEUS = looks.DataSourceRef(type_val="prometheus", uid="${datasource}")
LOKI = looks.DataSourceRef(type_val="loki", uid="${logs}")
JAEGER = looks.DataSourceRef(type_val="jaeger", uid="${traces}")


@dataclass(frozen=True, slots=True)
class Query:
    """An expression and what its series are called."""

    expr: str
    legend: str = ""
    exemplars: bool = False


_Panel = TypeVar("_Panel", stat.Panel, timeseries.Panel, statetimeline.Panel)

#: From this value on, this colour; the first one from minus infinity.
Steps = Sequence[tuple[float | None, str]]


class _Search(variants.Dataquery):
    """A search of the Jaeger data source, for which the SDK has no class."""

    def __init__(self, tags: str) -> None:
        self.tags = tags

    def to_json(self) -> dict[str, object]:
        return {
            "datasource": JAEGER,
            "limit": 20,
            "queryType": "search",
            "refId": "A",
            "service": "${service}",
            "tags": self.tags,
        }


class _Built(builder.Builder[Any]):
    """What is built already, where the SDK wants to build."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def build(self) -> Any:
        return self.value


# --- boards ---------------------------------------------------------------------------------------


def board(
    uid: str, title: str, description: str, *, graph: bool = True, node: bool = False
) -> dashboard.Dashboard:
    """An empty dashboard with its variables, annotations and links."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .tags(["sereno"])
        .description(f"{description} Made by python -m dashboards.src: edits in Grafana are lost.")
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(shapes.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Sereno")
            .type(shapes.DashboardLinkType.DASHBOARDS)
            .tags(["sereno"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(_source("datasource", "Metrics", "prometheus"))
        .with_variable(_source("logs", "Logs", "loki"))
        .with_variable(_source("traces", "Traces", "jaeger"))
        .with_variable(
            dashboard.TextBoxVariable("service")
            .label("Service")
            .description("`service.name` of traces and logs: OTEL_SERVICE_NAME.")
            .default_value("sereno")
            .current(shapes.VariableOption(text="sereno", value="sereno"))
        )
        .with_variable(_values("job", "sereno_start_time_seconds"))
        .with_variable(_values("instance", 'sereno_start_time_seconds{job=~"$job"}'))
    )
    if graph:
        made.with_variable(_values("graph", metric("runs_active")))
    if node:
        made.with_variable(_values("node", metric("nodes_active", f'{HERE},graph=~"$graph"')))
    for annotation in _ANNOTATIONS:
        made.annotation(annotation)
    return made


def row(identity: int, title: str) -> dashboard.Row:
    return dashboard.Row(title).id(100 + identity)


def _source(name: str, label: str, kind: str) -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable(name).label(label).type(kind)


def _values(label: str, series: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .label(label.capitalize())
        .datasource(PROMETHEUS)
        .query(f"label_values({series}, {label})")
        .refresh(shapes.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(shapes.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(shapes.VariableOption(text="All", value="$__all"))
    )


def _annotation(name: str, colour: str, expr: str, title: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(PROMETHEUS)
        .enable(True)
        .icon_color(colour)
        .expr(expr)
        .step("60s")
        .title_format(title)
    )


_BUILDS = f"sum by (job, version, commit) ({metric('build_info')}"
_ANNOTATIONS = (
    _annotation(
        "Deploys",
        BLUE,
        f"{_BUILDS}) unless {_BUILDS} offset 5m)",
        "{{job}}: version {{version}}, commit {{commit}}",
    ),
    _annotation(
        "Starts", GREY, f"{metric('start_time_seconds')} * 1000", "{{instance}} started"
    ).use_value_for_time(True),
    _annotation(
        "Alerts",
        RED,
        'ALERTS{alertstate="firing",alertname!="Watchdog"}',
        "{{alertname}} ({{severity}})",
    ),
)

# --- panels ---------------------------------------------------------------------------------------


def number(
    identity: int,
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps,
    width: int = 3,
    decimals: int | None = None,
) -> stat.Panel:
    """One figure, or a few beside each other, coloured by what it means."""
    panel: stat.Panel = _described(stat.Panel(), identity, title, description, unit, width, 5)
    panel.thresholds(_thresholds(steps)).graph_mode(looks.BigValueGraphMode.AREA)
    panel.color_mode(looks.BigValueColorMode.VALUE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if decimals is not None:
        panel.decimals(decimals)
    return _with_queries(panel, queries)


def lines(
    identity: int,
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps = (),
    width: int = 8,
    stacked: bool = False,
    links: Iterable[dashboard.DashboardLink] = (),
    words: Iterable[str] = (),
    dashed: str = "",
    maximum: float | None = None,
) -> timeseries.Panel:
    """Series over time. `steps` are drawn as lines; `dashed` names a series that is a bound.

    `words` are what series may be called besides their legends; some have a colour.
    """
    panel: timeseries.Panel = _described(
        timeseries.Panel(), identity, title, description, unit, width, 8
    )
    panel.min(0).show_points(looks.VisibilityMode.NEVER).fill_opacity(30 if stacked else 0)
    panel.tooltip(
        common.VizTooltipOptions()
        .mode(looks.TooltipDisplayMode.MULTI)
        .sort(looks.SortOrder.DESCENDING)
    )
    panel.legend(
        common.VizLegendOptions()
        .display_mode(looks.LegendDisplayMode.LIST)
        .placement(looks.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if steps:
        panel.thresholds(_thresholds(steps))
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED)
        )
    if maximum is not None:
        panel.max(maximum)
    for word in [query.legend for query in queries] + list(words):
        if word in MEANING:
            panel.override_by_name(word, [_fixed(MEANING[word])])
    if dashed:
        style = shapes.DynamicConfigValue(
            id_val="custom.lineStyle", value={"dash": [10, 10], "fill": "dash"}
        )
        panel.override_by_name(dashed, [_fixed(RED), style])
    return _with_queries(panel.data_links(list(links)), queries)


def distribution(
    identity: int, title: str, description: str, unit: str, query: Query, *, width: int = 8
) -> heatmap.Panel:
    """How the values of a histogram spread over time."""
    panel: heatmap.Panel = _described(heatmap.Panel(), identity, title, description, unit, width, 8)
    panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit)).color(
        heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    )
    target = _target("A", query).format(prom.PromQueryFormat.HEATMAP)
    return panel.with_target(target)


def states(
    identity: int, title: str, description: str, *queries: Query, width: int = 12
) -> statetimeline.Panel:
    """What passes (1) and what does not (0), over time."""
    panel: statetimeline.Panel = _described(
        statetimeline.Panel(), identity, title, description, "none", width, 8
    )
    panel.mappings(
        [
            shapes.ValueMap(
                options={
                    "0": shapes.ValueMappingResult(text="no", color=RED, index=0),
                    "1": shapes.ValueMappingResult(text="yes", color=GREEN, index=1),
                }
            )
        ]
    )
    panel.show_value(looks.VisibilityMode.NEVER)
    return _with_queries(panel, queries)


def rows(
    identity: int,
    title: str,
    description: str,
    columns: Sequence[tuple[Query, str]],
    *,
    width: int = 12,
    labels: Sequence[str] = (),
    links: Iterable[dashboard.DashboardLink] = (),
) -> table.Panel:
    """A table of labels, and a column for each query, called by its legend, with its unit.

    The highest values of the first column are on top.
    """
    panel: table.Panel = _described(
        table.Panel(), identity, title, description, columns[0][1], width, 8
    )
    for place, (query, unit) in enumerate(columns):
        reference = chr(ord("A") + place)
        panel.with_target(_target(reference, query, now=True))
        panel.override_by_name(
            f"Value #{reference}" if len(columns) > 1 else "Value",
            [
                shapes.DynamicConfigValue(id_val="displayName", value=query.legend),
                shapes.DynamicConfigValue(id_val="unit", value=unit),
            ],
        )
    first = columns[0][0].legend
    panel.sort_by([common.TableSortByFieldState().display_name(first).desc(True)])
    panel.with_transformation(shapes.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        shapes.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "indexByName": {label: at for at, label in enumerate(labels)},
            },
        )
    )
    return panel.data_links(list(links))


def evidence(identity: int, title: str, description: str, expr: str, *, width: int = 24) -> Any:
    """Lines of the log."""
    panel = _described(logs.Panel(), identity, title, description, "string", width, 9, LOKI)
    panel.show_time(True).wrap_log_message(True).enable_log_details(True)
    panel.sort_order(looks.LogsSortOrder.DESCENDING)
    return panel.with_target(
        loki.Dataquery().ref_id("A").datasource(LOKI).expr(expr).max_lines(200)
    )


def failing_traces(identity: int, title: str, description: str, *, width: int = 24) -> Any:
    """Traces of the trace store that hold an error."""
    panel = _described(table.Panel(), identity, title, description, "string", width, 9, JAEGER)
    return panel.with_target(_Built(_Search("error=true")))


# --- links ----------------------------------------------------------------------------------------


def explore_logs(title: str, expr: str) -> dashboard.DashboardLink:
    """Into Explore, to lines of the log of the time range that is shown."""
    return link(title, _explore("loki", "${logs}", {"expr": expr}))


def explore_traces(title: str, tags: str) -> dashboard.DashboardLink:
    """Into Explore, to traces with a span that is tagged so."""
    search = {"queryType": "search", "service": "${service}", "tags": tags, "limit": 20}
    return link(title, _explore("jaeger", "${traces}", search))


def link(title: str, url: str) -> dashboard.DashboardLink:
    made = dashboard.DashboardLink(title).type(shapes.DashboardLinkType.LINK)
    return made.url(url).target_blank(True)


def _explore(kind: str, uid: str, query: dict[str, object]) -> str:
    asked = {"refId": "A", "datasource": {"type": kind, "uid": uid}, **query}
    pane = {
        "datasource": uid,
        "queries": [asked],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
    text = json.dumps({"a": pane}, separators=(",", ":"))
    # What Grafana is to fill in has to stay readable to it.
    return f"/explore?schemaVersion=1&panes={quote(text, safe='${}')}"


# --- pieces ---------------------------------------------------------------------------------------


def _described(
    panel: Any,
    identity: int,
    title: str,
    description: str,
    unit: str,
    width: int,
    height: int,
    source: looks.DataSourceRef = PROMETHEUS,
) -> Any:
    panel.id(identity).title(title).description(description).unit(unit)
    return panel.datasource(source).span(width).height(height)


def _with_queries(panel: _Panel, queries: Sequence[Query]) -> _Panel:
    for place, query in enumerate(queries):
        panel.with_target(_target(chr(ord("A") + place), query))
    return panel


def _target(reference: str, query: Query, *, now: bool = False) -> prometheus.Dataquery:
    made = prometheus.Dataquery().ref_id(reference).datasource(PROMETHEUS).expr(query.expr)
    made.editor_mode(prom.QueryEditorMode.CODE)
    if now:
        made.instant().format(prom.PromQueryFormat.TABLE)
    else:
        made.range().legend_format(query.legend)
    return made.exemplar(True) if query.exemplars else made


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(shapes.ThresholdsMode.ABSOLUTE)
        .steps([shapes.Threshold(value=value, color=colour) for value, colour in steps])
    )


def _fixed(colour: str) -> shapes.DynamicConfigValue:
    return shapes.DynamicConfigValue(id_val="color", value={"fixedColor": colour, "mode": "fixed"})
