"""Writes `dashboards/grafana/*.json`; edits made in Grafana are lost, edits made here stay."""

from __future__ import annotations

from pathlib import Path

from dashboards.src.boards import render

GRAFANA = Path(__file__).parent.parent / "grafana"


def main() -> None:
    GRAFANA.mkdir(exist_ok=True)
    for name, text in render().items():
        (GRAFANA / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
