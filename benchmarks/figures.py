"""Medians and quartiles: what tells a difference from noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ratio", "spread", "table"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratios of pairs, both of a pair measured one right after the other."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Ratio:
        """Of each pair, the first by the second."""
        return cls(tuple(first / second for first, second in pairs if second > 0))

    def __str__(self) -> str:
        return spread(self.values, "{:.3f}×")


def spread(values: Sequence[float], form: str) -> str:
    """`median (first quartile … third quartile)`."""
    if not values:
        return ""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else tuple(values) * 3
    )
    return f"{form.format(median)} ({form.format(low)} … {form.format(high)})"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print Markdown; the first column is text."""
    print(f"\n| {' | '.join(heads)} |")
    print(f"|---|{'---:|' * (len(heads) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
