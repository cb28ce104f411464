"""PromQL over the metrics of the contract; names are checked as expressions are made."""

from __future__ import annotations

from telemetry.contract import METRICS, PREFIX

__all__ = ["GRAPH", "HERE", "JOB", "NODE", "buckets", "metric", "quantile", "rate", "total"]

#: What the variables of a dashboard choose.
JOB = 'job=~"$job"'
HERE = f'{JOB},instance=~"$instance"'
GRAPH = f'{HERE},graph=~"$graph"'
NODE = f'{GRAPH},node=~"$node"'

_DECLARED = {metric.name: metric for metric in METRICS}


def metric(name: str, where: str = HERE) -> str:
    """A metric of the contract, named without its prefix."""
    _DECLARED[name]  # a misspelt name stops here
    return f"{PREFIX}{name}{{{where}}}"


def total(name: str, where: str = HERE, by: str = "") -> str:
    """A gauge, added up over processes."""
    return f"sum{_by(by)} ({metric(name, where)})"


def rate(name: str, where: str = HERE, by: str = "") -> str:
    """What a counter counts, or a histogram observes, per second.

    PromQL's `rate` does not see a series begin. One that is made on demand begins with the first
    failure: it counts from nothing where the last hour has none of it.
    """
    counted = metric(name, where)
    if _DECLARED[name].type == "histogram":
        counted = counted.replace("{", "_count{", 1)
    each = f"rate({counted}[$__rate_interval])"
    if _DECLARED[name].on_demand:
        before = f"last_over_time({counted}[1h] offset $__rate_interval)"
        each = f"({counted} unless {before}) / ($__rate_interval_ms / 1000) or {each}"
    return f"sum{_by(by)} ({each})"


def quantile(q: float, name: str, where: str = HERE, by: str = "") -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q:g}, sum{_by(_with_le(by))} (rate({_bucket(name, where)})))"


def buckets(name: str, where: str = HERE) -> str:
    """The events of each bucket, for a heatmap."""
    return f"sum by (le) (increase({_bucket(name, where)}))"


def _bucket(name: str, where: str) -> str:
    assert _DECLARED[name].type == "histogram", name
    return f"{PREFIX}{name}_bucket{{{where}}}[$__rate_interval]"


def _with_le(by: str) -> str:
    return f"le, {by}" if by else "le"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
