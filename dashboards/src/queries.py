"""Every query of every dashboard, as it stands in the files: to try them on a real Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EVERYTHING", "GRAFANA", "Query", "dashboards", "filled", "panels", "queries"]

GRAFANA = Path(__file__).parent.parent / "grafana"

#: What the variables of a dashboard are when nothing is chosen.
EVERYTHING: Mapping[str, str] = {
    "job": ".+",
    "instance": ".+",
    "graph": ".+",
    "node": ".+",
    "service": "sereno",
}


@dataclass(frozen=True, slots=True)
class Query:
    """What a panel asks."""

    #: The dashboard's uid, and the panel's id in it.
    board: str
    panel: int
    title: str
    reference: str
    #: `prometheus`, `loki` or `jaeger`.
    source: str
    #: As in the file, variables and all; of a search for traces its tags.
    expr: str
    legend: str
    #: Whether the panel shows exemplars of it.
    exemplars: bool
    #: Asked for one moment, not for a range.
    instant: bool
    #: The panel's unit, for whoever draws it.
    unit: str


def dashboards(folder: Path = GRAFANA) -> dict[str, dict[str, Any]]:
    """The dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def panels(board: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A dashboard's panels without its rows."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", ())
        else:
            yield panel


def queries(folder: Path = GRAFANA) -> Iterator[Query]:
    """What the panels ask, in their order."""
    for board in dashboards(folder).values():
        for panel in panels(board):
            for target in panel["targets"]:
                yield Query(
                    board=board["uid"],
                    panel=panel["id"],
                    title=panel["title"],
                    reference=target["refId"],
                    source=panel["datasource"]["type"],
                    expr=target.get("expr") or target.get("tags", ""),
                    legend=target.get("legendFormat", ""),
                    exemplars=target.get("exemplar", False),
                    instant=target.get("instant", False),
                    unit=panel["fieldConfig"]["defaults"]["unit"],
                )


def filled(expr: str, interval: str = "1m", values: Mapping[str, str] = EVERYTHING) -> str:
    """An expression as Grafana would send it, with its variables filled in."""
    milliseconds = int(interval[:-1]) * {"s": 1_000, "m": 60_000}[interval[-1]]
    expr = expr.replace("$__rate_interval_ms", str(milliseconds))
    expr = expr.replace("$__rate_interval", interval)
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], expr)
