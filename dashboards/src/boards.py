"""The five dashboards, as the texts of their files."""

from __future__ import annotations

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards.src import graphs, overview, saturation, streams, telemetry

__all__ = ["render"]

BOARDS = (overview.board, graphs.board, streams.board, saturation.board, telemetry.board)


def render() -> dict[str, str]:
    """Their texts by file name."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    built = [board().build() for board in BOARDS]
    return {f"{board.uid}.json": encoder.encode(board) + "\n" for board in built}
