"""Draw what the dashboards show, from a Prometheus's answers, as SVG: pictures for the docs.

    python -m dashboards.plots http://localhost:9090 [MINUTES [MINUTES_AGO]]

Writes docs/images/dashboards/*.svg, one for each dashboard, and docs/dashboards.md. Not Grafana's
looks: the same queries, so the same curves. What comes from Loki or Jaeger is left out.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dashboards.src.colours import MEANING
from dashboards.src.queries import EVERYTHING, Query, dashboards, filled, panels, queries

__all__ = ["main"]

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images" / "dashboards"

POINTS = 120
#: More series than this are not told apart by anybody.
SERIES = 8
COLUMNS, WIDTH, HEIGHT = 3, 330, 170
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 8, 24, 304, 82
PALETTE = ("#5794f2", "#b877d9", "#e0b400", "#37872d", "#c4162a", "#3274d9", "#fa6400", "#8f3bb8")
NAMED = {
    "green": "#56a64b",
    "red": "#e02f44",
    "dark-red": "#ad0317",
    "orange": "#ff780a",
    "yellow": "#e0b400",
    "blue": "#3274d9",
}


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    #: Time and value; no gaps are marked, NaN is left out.
    points: Sequence[tuple[float, float]]
    #: The bucket's upper bound, for a heatmap.
    bound: float = math.nan

    @property
    def last(self) -> float:
        return self.points[-1][1]


class Source:
    """A Prometheus, asked for the same range again and again."""

    def __init__(self, url: str, minutes: float, ago: float) -> None:
        self._url = url
        self.end = time.time() - 60 * ago
        self.start = self.end - 60 * minutes
        # Whether counters are scraped every second or every 15 is not ours to say.
        self._step = max(1.0, 60 * minutes / POINTS)

    def series(self, query: Query) -> Iterator[Series]:
        """What a query has to show."""
        expr = filled(query.expr, values=EVERYTHING)
        asked = {"query": expr, "start": self.start, "end": self.end, "step": self._step}
        body = urllib.parse.urlencode(asked).encode()
        with urllib.request.urlopen(f"{self._url}/api/v1/query_range", body, timeout=30) as reply:
            found = json.load(reply)["data"]["result"]
        for one in found:
            points = [
                (t, value) for t, text in one["values"] if math.isfinite(value := float(text))
            ]
            if points:
                labels = one["metric"]
                bound = float(labels.get("le", "nan"))
                yield Series(_called(query, labels), points, bound)


def _called(query: Query, labels: Mapping[str, str]) -> str:
    if query.instant:
        shown = " ".join(v for k, v in labels.items() if not k.startswith("__"))
        return f"{shown} {query.legend}".strip()
    name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: labels.get(m[1], ""), query.legend).strip()
    if instance := labels.get("instance"):  # there is one: what else it says is more telling
        name = name.replace(instance, "").strip() or name
    return name or " ".join(v for k, v in labels.items() if k != "__name__")


# --- numbers --------------------------------------------------------------------------------------


def shown(value: float, unit: str) -> str:
    """A value as somebody reads it."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %" if abs(value) < 10 else f"{100 * value:,.0f} %"
    if unit == "dateTimeAsIso":
        return time.strftime("%H:%M", time.gmtime(value / 1000))
    if unit == "s":
        for size, name in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return "0 s"
    if unit in ("bytes", "Bps"):
        per = "/s" if unit == "Bps" else ""
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}{per}"
        return f"{value:.3g} B{per}"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{text} /s" if unit == "ops" else text


# --- pictures -------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, kind: str = "", **more: str) -> str:
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}"{attributes}>{escape(text)}</text>'


def _colour(place: int, name: str) -> str:
    meant = MEANING.get(name, "")
    return NAMED.get(meant, meant) if meant else PALETTE[place % len(PALETTE)]


def _clipped(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


class Frame:
    """Turns times and values into places of a plot."""

    def __init__(self, source: Source, top: float) -> None:
        self._source = source
        self._top = top if top > 0 else 1.0

    def x(self, t: float) -> float:
        return LEFT + PLOT_WIDTH * (t - self._source.start) / (
            self._source.end - self._source.start
        )

    def y(self, value: float) -> float:
        return TOP + PLOT_HEIGHT * (1 - min(1.0, max(0.0, value / self._top)))


def _lines(source: Source, found: Sequence[Series], unit: str) -> Iterator[str]:
    top = max((v for series in found for _, v in series.points), default=0.0)
    frame = Frame(source, top)
    for share in (0, 0.5, 1):
        y = TOP + PLOT_HEIGHT * share
        yield f'<path d="M{LEFT} {y:.0f}h{PLOT_WIDTH}" class="grid"/>'
    for place, series in enumerate(found):
        path = "L".join(f"{frame.x(t):.0f} {frame.y(v):.1f}" for t, v in series.points)
        colour = _colour(place, series.name)
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>'
    yield _text(LEFT + PLOT_WIDTH, 16, shown(top, unit), "dim", text_anchor="end")
    yield from _legend([(_colour(i, s.name), s.name or "value") for i, s in enumerate(found)])


def _legend(entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    for place, (colour, name) in enumerate(entries[:6]):
        x, y = LEFT + 102 * (place % 3), TOP + PLOT_HEIGHT + 16 + 14 * (place // 3)
        yield f'<path d="M{x} {y - 3}h8" stroke="{colour}" stroke-width="3"/>'
        yield _text(x + 11, y, _clipped(name, 17), "dim")
    if len(entries) > 6:
        yield _text(LEFT, TOP + PLOT_HEIGHT + 46, f"and {len(entries) - 6} more", "dim")


def _number(source: Source, found: Sequence[Series], unit: str) -> Iterator[str]:
    for place, series in enumerate(found[:3]):
        y = TOP + 30 + 36 * place
        yield _text(LEFT + 4, y, shown(series.last, unit), "big")
        yield _text(LEFT + 120, y, _clipped(series.name, 30), "dim")


def _heat(source: Source, found: Sequence[Series], unit: str) -> Iterator[str]:
    """Buckets above each other; the darker, the more values."""
    bounds = sorted((s for s in found), key=lambda s: s.bound)
    columns = 40
    span = (source.end - source.start) / columns
    below = [0.0] * columns
    cells: list[tuple[int, int, float]] = []
    for row, series in enumerate(bounds):
        sums = [0.0] * columns
        for t, value in series.points:
            column = min(columns - 1, int((t - source.start) / span))
            sums[column] = max(sums[column], value)
        cells += [(row, i, max(0.0, v - below[i])) for i, v in enumerate(sums)]
        below = sums
    most = max((v for *_, v in cells), default=0.0) or 1.0
    height, width = PLOT_HEIGHT / max(1, len(bounds)), PLOT_WIDTH / columns
    for row, column, value in cells:
        if value > most / 200:
            x, y = LEFT + column * width, TOP + PLOT_HEIGHT - (row + 1) * height
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="#1f60c4" opacity="{0.1 + 0.9 * math.sqrt(value / most):.2f}"/>'
            )
    finite = [s.bound for s in bounds if math.isfinite(s.bound)]
    if finite:
        ends = f"{shown(finite[0], unit)} (bottom) to {shown(finite[-1], unit)} (top)"
        yield _text(LEFT, TOP + PLOT_HEIGHT + 16, ends, "dim")


def _table(source: Source, found: Sequence[Series], unit: str) -> Iterator[str]:
    for place, series in enumerate(sorted(found, key=lambda s: s.last, reverse=True)[:8]):
        y = TOP + 14 + 15 * place
        yield _text(LEFT, y, _clipped(series.name, 42), "dim")
        yield _text(LEFT + PLOT_WIDTH, y, shown(series.last, unit), "", text_anchor="end")


DRAWN = {
    "stat": _number,
    "timeseries": _lines,
    "state-timeline": _lines,
    "heatmap": _heat,
    "table": _table,
}
STYLE = (
    "text{font:11px sans-serif;fill:#24292e}.title{font-weight:600;font-size:12px}"
    ".dim{fill:#6a737d;font-size:10px}.big{font-size:22px;font-weight:600}"
    ".head{font-size:17px;font-weight:600}.grid{stroke:#e1e4e8;fill:none}"
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A panel and what its queries answered."""

    identity: int
    title: str
    kind: str
    unit: str
    series: Sequence[Series]

    @property
    def summary(self) -> str:
        if not self.series:
            return "nothing"
        if self.kind == "heatmap":
            return f"{len(self.series)} buckets"
        largest = sorted(self.series, key=lambda series: series.last, reverse=True)[:3]
        values = (f"{_clipped(s.name, 40) or 'value'}: {shown(s.last, self.unit)}" for s in largest)
        more = f" (of {len(self.series)})" if len(self.series) > 3 else ""
        return ("; ".join(values) + more).replace("|", "/")


def picture(source: Source, title: str, shows: Sequence[Shown]) -> str:
    """A dashboard's panels beside each other."""
    rows = math.ceil(len(shows) / COLUMNS)
    width, height = COLUMNS * WIDTH + 10, 40 + rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(14, 26, title, "head"),
    ]
    for place, show in enumerate(shows):
        x, y = 10 + WIDTH * (place % COLUMNS), 40 + HEIGHT * (place // COLUMNS)
        parts.append(f'<g transform="translate({x} {y})">')
        parts.append(
            f'<rect width="{WIDTH - 10}" height="{HEIGHT - 10}" rx="3" fill="none" class="grid"/>'
        )
        parts.append(_text(LEFT, 16, _clipped(show.title, 48), "title"))
        series = show.series
        if show.kind != "heatmap":
            largest = sorted(series, key=lambda s: max(v for _, v in s.points), reverse=True)
            series = largest[:SERIES]
        if series:
            parts += DRAWN[show.kind](source, series, show.unit)
        else:
            parts.append(_text(LEFT, TOP + 50, "nothing", "dim"))
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def boards(source: Source) -> Iterator[tuple[str, str, str, list[Shown]]]:
    """Each dashboard's uid, title, question, and panels with their answers."""
    asked: dict[tuple[str, int], list[Query]] = {}
    for query in queries():
        if query.source == "prometheus":
            asked.setdefault((query.board, query.panel), []).append(query)
    for board in dashboards().values():
        shows = [
            Shown(
                identity=panel["id"],
                title=panel["title"],
                kind=panel["type"],
                unit=panel["fieldConfig"]["defaults"]["unit"],
                series=[s for query in found for s in source.series(query)],
            )
            for panel in panels(board)
            if (found := asked.get((board["uid"], panel["id"])))
        ]
        yield board["uid"], board["title"], board["description"].split("?")[0] + "?", shows


def page(drawn: Iterable[tuple[str, str, str, list[Shown]]], minutes: float) -> str:
    """docs/dashboards.md: each picture, and what each panel showed."""
    text = [
        "# What the dashboards show",
        "",
        f"The queries of each dashboard, answered by a real Prometheus over {minutes:g} minutes of "
        "traffic: both examples, some runs that fail, readers that hang up and come back.",
        "No trace store was behind the collector, and an alert says so.",
        "Drawn by `python -m dashboards.plots`; Grafana draws the same curves nicer, and those of "
        "Loki and Jaeger as well.",
        "*Nothing* is what a panel shows of what did not happen.",
        "",
    ]
    for uid, title, question, shows in drawn:
        text += [f"## {title}", "", question, "", f"![{title}](images/dashboards/{uid}.svg)", ""]
        text += ["| panel | last values, the largest first |", "| --- | --- |"]
        text += [f"| {show.title} | {show.summary} |" for show in shows]
        text.append("")
    return "\n".join(text)


def main(url: str, minutes: str = "10", ago: str = "0") -> None:
    source = Source(url.rstrip("/"), float(minutes), float(ago))
    IMAGES.mkdir(parents=True, exist_ok=True)
    drawn = list(boards(source))
    for uid, title, _, shows in drawn:
        (IMAGES / f"{uid}.svg").write_text(picture(source, title, shows))
        for show in shows:
            if not show.series:
                print(f"nothing: {uid} {show.title}")
    (DOCS / "dashboards.md").write_text(page(drawn, float(minutes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
