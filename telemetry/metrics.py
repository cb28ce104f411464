"""Prometheus instruments made from the contract, rendered off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client import core as prometheus
from prometheus_client.exposition import choose_encoder
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from telemetry import contract

__all__ = ["Family", "Metrics"]

_log = logging.getLogger("telemetry")

_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")
#: A longer label value is cut.
_LONGEST_VALUE = 200


class Metrics:
    """Every family of the contract, and the process's own numbers.

    Series that follow from closed sets begin at 0 here, those of a graph in `graph()`. Beyond
    `max_series` more of a family, new ones fold into those whose open labels are `__overflow__`.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, max_series: int = 2_000
    ) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sereno-metrics")
        self._complained: set[str] = set()
        self._families = {
            spec.name: Family(spec, max_series, self._failed, self._dropped)
            for spec in contract.METRICS
        }
        for family in self._families.values():
            family.begin({})
            self.registry.register(family)

    def __getitem__(self, name: str) -> Family:
        """A family, named as in the contract. Raises KeyError for any other name."""
        return self._families[name]

    def graph(self, name: str, nodes: Sequence[str] = ()) -> None:
        """Begin a graph's series at 0, so that a first increase is seen as one."""
        known = {"graph": (name,), "node": tuple(nodes)}
        for family in self._families.values():
            family.begin(known)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition that a scraper accepts, and its content type."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.render_now, accept)

    def render_now(self, accept: str) -> tuple[bytes, str]:
        """The same, in the calling thread."""
        begun = time.perf_counter()
        encoder, media_type = choose_encoder(accept)
        body = encoder(self.registry)
        self["metrics_render_seconds"].observe(time.perf_counter() - begun)
        return body, media_type

    def close(self) -> None:
        """End the rendering thread."""
        self._threads.shutdown(wait=False)

    def _failed(self, family: str) -> None:
        """Called while an exception is handled that nobody else shall see: told of once."""
        if family != "telemetry_internal_errors_total":
            self._families["telemetry_internal_errors_total"].inc("metrics")
        if family not in self._complained:
            self._complained.add(family)
            with contextlib.suppress(Exception):
                _log.warning("A metric was not recorded: %s", family, exc_info=True)

    def _dropped(self, family: str) -> None:
        if family != "metric_series_dropped_total":
            self._families["metric_series_dropped_total"].inc(family)


class Family:
    """All series of one metric. Label values stand in the contract's order.

    Nothing here raises: what cannot be recorded is counted in `telemetry_internal_errors_total`.
    """

    def __init__(
        self,
        spec: contract.Metric,
        max_series: int,
        failed: Callable[[str], None],
        dropped: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self._max_series = max_series
        self._failed = failed
        self._dropped = dropped
        # Reentrant: a collected generator may count something while we do.
        self._lock = threading.RLock()
        self._series: dict[tuple[str, ...], _Series] = {}
        #: Series that were there before anything was counted: bounded by the graphs served.
        self._begun = 0
        self._counter = spec.type == "counter"
        self._info: dict[str, str] = {}
        self._bounds = tuple(float(bound) for bound in spec.buckets)
        self._edges = tuple(
            floatToGoString(bound)  # type: ignore[no-untyped-call]
            for bound in (*self._bounds, math.inf)
        )
        self._names = tuple(label.name for label in spec.labels)
        self._name = contract.PREFIX + spec.name.removesuffix("_total").removesuffix("_info")

    def inc(self, *labels: str, by: float = 1.0, exemplar: Mapping[str, str] | None = None) -> None:
        """Count something; of a gauge: one more."""
        try:
            series = self._series.get(labels) or self._find(labels)
            if self._counter:
                if not 0.0 <= by < math.inf:
                    raise ValueError(f"a counter cannot be increased by {by}")
                with self._lock:
                    series.value += by
                if exemplar is not None and (example := self._example(exemplar, by)):
                    series.exemplars[0] = example
            else:
                self._move(series, by)
        except Exception:
            self._failed(self.spec.name)

    def dec(self, *labels: str, by: float = 1.0) -> None:
        """Of a gauge: one less."""
        try:
            self._move(self._series.get(labels) or self._find(labels), -by)
        except Exception:
            self._failed(self.spec.name)

    def set(self, value: float, *labels: str) -> None:
        """Say what a gauge is now."""
        try:
            series = self._series.get(labels) or self._find(labels)
            self._require("gauge")
            series.value = float(value)
            series.moved = True
        except Exception:
            self._failed(self.spec.name)

    def watch(self, read: Callable[[], float], *labels: str) -> None:
        """Have a gauge, or somebody's counter, read at each scrape, by the scraping thread; NaN
        when that raises."""
        try:
            self._require("counter" if self._counter else "gauge")
            (self._series.get(labels) or self._find(labels)).read = read
        except Exception:
            self._failed(self.spec.name)

    def observe(
        self, value: float, *labels: str, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """Add a value to a histogram. +Inf counts in the last bucket, and not in the sum."""
        try:
            series = self._series.get(labels) or self._find(labels)
            if value != value:
                raise ValueError("a histogram cannot hold NaN")
            bucket = bisect_left(self._bounds, value)
            with self._lock:
                series.buckets[bucket] += 1
                if value < math.inf:
                    series.value += value
            if exemplar is not None and (example := self._example(exemplar, value)):
                series.exemplars[bucket] = example
        except Exception:
            self._failed(self.spec.name)

    def info(self, **values: str) -> None:
        """Say what an info metric tells."""
        try:
            self._require("info")
            if set(values) != set(self._names):
                raise ValueError(f"{sorted(values)} are not {sorted(self._names)}")
            self._info = {name: _text(str(value)) for name, value in values.items()}
        except Exception:
            self._failed(self.spec.name)

    def value(self, *labels: str) -> float:
        """What a series is now, of a histogram the number of observations; 0 without a series."""
        series = self._series.get(labels)
        if series is None:
            return 0.0
        return float(sum(series.buckets)) if self._bounds else series.current()

    def begin(self, known: Mapping[str, Sequence[str]]) -> None:
        """Make the series whose label values are all known, given those of some open labels."""
        spec = self.spec
        if spec.on_demand or spec.later or spec.type == "info":
            return
        if set(known) and not set(known) & set(self._names):
            return
        choices: list[Sequence[str]] = []
        for position, label in enumerate(spec.labels):
            if label.values:
                last = position == len(spec.labels) - 1
                choices.append((spec.begins if last else ()) or label.values)
            elif label.name in known:
                choices.append(known[label.name])
            else:
                return
        with self._lock:
            for labels in itertools.product(*choices):
                if labels not in self._series:
                    self._series[labels] = self._new()
                    self._begun += 1

    def describe(self) -> Iterable[prometheus.Metric]:
        """For the registry: the names that this family takes."""
        return (self._metric(),)

    def collect(self) -> Iterator[prometheus.Metric]:
        """For the registry: all samples."""
        metric = self._metric()
        if self.spec.type == "info":
            if self._info:
                metric.add_sample(f"{self._name}_info", self._info, 1.0)
                metric.moved = True
        else:
            with self._lock:
                everything = list(self._series.items())
            for labels, series in everything:
                self._add(metric, dict(zip(self._names, labels, strict=True)), series)
        yield metric

    def _metric(self) -> _Collected:
        return _Collected(self._name, self.spec.help, self.spec.type)

    def _add(self, metric: _Collected, labels: dict[str, str], series: _Series) -> None:
        if self._counter:
            value = series.current()
            metric.add_sample(f"{self._name}_total", labels, value, None, series.exemplars.get(0))
            metric.moved |= value > 0
            return
        if not self._bounds:
            value = series.current()
            metric.add_sample(self._name, labels, value)
            metric.moved |= series.moved or (value == value and series.read is not None)
            return
        with self._lock:
            buckets, total = series.buckets[:], series.value
        count = 0
        for index, edge in enumerate(self._edges):
            count += buckets[index]
            metric.add_sample(
                f"{self._name}_bucket",
                {**labels, "le": edge},
                count,
                None,
                series.exemplars.get(index),
            )
        metric.add_sample(f"{self._name}_count", labels, count)
        metric.add_sample(f"{self._name}_sum", labels, total)
        metric.moved |= count > 0

    def _move(self, series: _Series, by: float) -> None:
        self._require("gauge")
        if not -math.inf < by < math.inf:
            raise ValueError(f"a gauge cannot be moved by {by}")
        with self._lock:
            before = series.value
            series.value = by if before != before else before + by
            series.moved = True

    def _require(self, type: str) -> None:
        if self.spec.type != type:
            raise TypeError(f"{self.spec.name} is a {self.spec.type}")

    def _new(self) -> _Series:
        unknown = self.spec.type == "gauge" and not self.spec.counted
        return _Series(math.nan if unknown else 0.0, len(self._bounds) + 1 if self._bounds else 0)

    def _find(self, labels: tuple[str, ...]) -> _Series:
        """The series of labels that were not seen before, or are not as they should be."""
        if len(labels) != len(self._names):
            raise ValueError(f"{self.spec.name} has the labels {self._names}")
        wanted = tuple(map(_allowed, self.spec.labels, labels))
        with self._lock:
            if wanted not in self._series and not self._room():
                wanted = tuple(
                    value if label.values else contract.OVERFLOW
                    for label, value in zip(self.spec.labels, wanted, strict=True)
                )
            series = self._series.get(wanted) or self._series.setdefault(wanted, self._new())
        if contract.OVERFLOW in wanted:
            self._dropped(self.spec.name)
        return series

    def _room(self) -> bool:
        return len(self._series) - self._begun < self._max_series

    def _example(self, exemplar: Mapping[str, str], value: float) -> Exemplar | None:
        """What may go on the wire: a bad exemplar would fail the whole exposition."""
        if not self.spec.exemplar:
            return None
        ids = {name: exemplar[name] for name in ("trace_id", "span_id")}
        if not _TRACE_ID.fullmatch(ids["trace_id"]) or not _SPAN_ID.fullmatch(ids["span_id"]):
            return None
        return Exemplar(ids, value, time.time())


class _Collected(prometheus.Metric):
    """A family at one moment."""

    #: Whether anything was ever said of it: a gauge may be back where it began.
    moved = False


class _Series:
    """The numbers of one set of label values."""

    __slots__ = ("buckets", "exemplars", "moved", "read", "value")

    def __init__(self, value: float, buckets: int) -> None:
        #: Of a histogram, the sum.
        self.value = value
        self.buckets = [0] * buckets
        #: By bucket.
        self.exemplars: dict[int, Exemplar] = {}
        self.moved = False
        self.read: Callable[[], float] | None = None

    def current(self) -> float:
        if self.read is None:
            return self.value
        try:
            return float(self.read())
        except Exception:
            return math.nan


def _allowed(label: contract.Label, value: str) -> str:
    """A label value as it may stand: of a closed set, or at least not too long."""
    if not label.values:
        return _text(str(value))
    if value in label.values:
        return value
    return contract.OTHER if contract.OTHER in label.values else contract.OVERFLOW


def _text(value: str) -> str:
    """Cut, and without lone surrogates: they would fail the whole exposition."""
    return value[:_LONGEST_VALUE].encode("utf-8", "replace").decode("utf-8")
