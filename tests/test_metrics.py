"""What is counted is what is rendered, whoever counts it wrongly, too often or with odd labels."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from telemetry import contract
from telemetry.metrics import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
EXAMPLE = {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7"}
NODES = [f"node{number}" for number in range(10)]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def text(metrics: Metrics, accept: str = "") -> str:
    return metrics.render_now(accept)[0].decode()


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """The rendered values of a sample name, by label values in the order of label names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in parse_text(text(metrics))
        for sample in family.samples
        if sample.name == f"sereno_{name}"
    }


def failures(metrics: Metrics) -> float:
    return metrics["telemetry_internal_errors_total"].value("metrics")


def test_counts_are_rendered(metrics: Metrics) -> None:
    metrics["runs_started_total"].inc("g", "api")
    metrics["runs_started_total"].inc("g", "api", by=2)
    metrics["runs_active"].inc("g", by=3)
    metrics["runs_active"].dec("g")
    metrics["queue_depth"].set(7)
    metrics["run_queue_wait_seconds"].observe(0.3, "g")
    metrics["run_queue_wait_seconds"].observe(40, "g")

    assert samples(metrics, "runs_started_total") == {("g", "api"): 3}
    assert samples(metrics, "runs_active") == {("g",): 2}
    assert samples(metrics, "queue_depth") == {(): 7}
    buckets = samples(metrics, "run_queue_wait_seconds_bucket")
    assert buckets["g", "0.25"] == 0
    assert buckets["g", "0.5"] == buckets["g", "30.0"] == 1
    assert buckets["g", "60.0"] == buckets["g", "+Inf"] == 2
    assert samples(metrics, "run_queue_wait_seconds_count") == {("g",): 2}
    assert samples(metrics, "run_queue_wait_seconds_sum") == {("g",): 40.3}


def test_a_value_on_an_edge_is_in_the_bucket_that_the_edge_closes(metrics: Metrics) -> None:
    metrics["run_queue_wait_seconds"].observe(0.5, "g")

    buckets = samples(metrics, "run_queue_wait_seconds_bucket")
    assert (buckets["g", "0.25"], buckets["g", "0.5"]) == (0, 1)


def test_what_never_came_is_in_the_last_bucket_and_leaves_the_sum_alone(metrics: Metrics) -> None:
    metrics["run_first_output_seconds"].observe(2, "g", exemplar=EXAMPLE)
    metrics["run_first_output_seconds"].observe(math.inf, "g", exemplar=EXAMPLE)

    buckets = samples(metrics, "run_first_output_seconds_bucket")
    assert (buckets["g", "300.0"], buckets["g", "+Inf"]) == (1, 2)
    assert samples(metrics, "run_first_output_seconds_sum") == {("g",): 2}
    assert list(parse_openmetrics(text(metrics, OPENMETRICS)))


def test_an_undeclared_name_is_refused_when_it_is_asked_for(metrics: Metrics) -> None:
    with pytest.raises(KeyError):
        metrics["runs_begun_total"]


def test_every_declared_family_is_announced(metrics: Metrics) -> None:
    announced = {line.split()[2] for line in text(metrics).splitlines() if line.startswith("# T")}

    assert announced >= {contract.PREFIX + metric.name for metric in contract.METRICS}


def test_a_counter_that_somebody_else_keeps_is_read_at_scrape_time(metrics: Metrics) -> None:
    metrics["encoder_fallbacks_total"].watch(lambda: 3)

    assert "sereno_encoder_fallbacks_total 3.0" in text(metrics).splitlines()


@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda m: m["runs_started_total"].inc("g"), id="too few labels"),
        pytest.param(lambda m: m["runs_started_total"].inc("g", "api", "x"), id="too many labels"),
        pytest.param(lambda m: m["runs_started_total"].inc("g", "api", by=-1), id="negative"),
        pytest.param(lambda m: m["runs_started_total"].inc("g", "api", by=math.nan), id="NaN"),
        pytest.param(lambda m: m["runs_started_total"].inc("g", "api", by=math.inf), id="Inf"),
        pytest.param(lambda m: m["runs_started_total"].inc("g", "api", by="1"), id="not a number"),
        pytest.param(lambda m: m["runs_started_total"].inc(["g"], "api"), id="unhashable label"),
        pytest.param(lambda m: m["runs_started_total"].dec("g", "api"), id="counter down"),
        pytest.param(lambda m: m["runs_started_total"].set(1, "g", "api"), id="counter set"),
        pytest.param(lambda m: m["runs_started_total"].observe(1, "g", "api"), id="not histogram"),
        pytest.param(lambda m: m["run_queue_wait_seconds"].watch(int, "g"), id="not to be read"),
        pytest.param(lambda m: m["runs_active"].inc("g", by=math.nan), id="gauge by NaN"),
        pytest.param(lambda m: m["runs_active"].set(None, "g"), id="gauge to nothing"),
        pytest.param(lambda m: m["run_queue_wait_seconds"].observe(math.nan, "g"), id="NaN seen"),
        pytest.param(lambda m: m["run_queue_wait_seconds"].observe("1", "g"), id="text seen"),
        pytest.param(lambda m: m["run_queue_wait_seconds"].inc("g"), id="histogram up"),
        pytest.param(lambda m: m["build_info"].info(version="1"), id="incomplete info"),
        pytest.param(lambda m: m["queue_depth"].info(version="1"), id="not info"),
    ],
)
def test_misuse_is_counted_and_never_raised(
    metrics: Metrics, misuse: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(misuse)
    metrics.graph("g", [])
    with caplog.at_level(logging.WARNING, "telemetry"):
        misuse(metrics)
        misuse(metrics)

    assert failures(metrics) == 2
    assert len(caplog.records) == 1
    assert not any(samples(metrics, "runs_started_total").values())
    assert samples(metrics, "run_queue_wait_seconds_sum") == {("g",): 0}
    assert samples(metrics, "runs_active") == {("g",): 0}


def test_odd_label_values_do_not_spoil_the_exposition(metrics: Metrics) -> None:
    odd = 'a"b\\c\nd\ud800' + "x" * 1_000
    metrics["runs_active"].set(1, odd)
    metrics["runs_active"].set(2, odd)

    assert list(samples(metrics, "runs_active").values()) == [2]
    assert len(next(iter(samples(metrics, "runs_active")))[0]) == 200
    assert list(parse_openmetrics(text(metrics, OPENMETRICS)))


def test_series_stay_constant_however_many_labels_come() -> None:
    """Values of open labels fold, those of closed ones stay right, and nothing is lost."""
    metrics = Metrics(max_series=50)
    metrics.graph("g", NODES)
    attempts = metrics["node_attempts_total"]
    before = len(samples(metrics, "node_attempts_total"))
    for number in range(10_000):
        attempts.inc(f"thread-{number}", "n", "first", "success" if number % 2 else "failed")
        attempts.inc("g", "node1", "first", "success")

    series = samples(metrics, "node_attempts_total")
    assert len(series) == before + 50 + 2
    assert sum(series.values()) == 20_000
    # By label name: attempt, graph, node, outcome.
    assert series["first", "g", "node1", "success"] == 10_000
    folded = [series["first", "__overflow__", "__overflow__", o] for o in ("success", "failed")]
    assert folded == [4_975, 4_975]
    assert metrics["metric_series_dropped_total"].value("node_attempts_total") == 9_950
    assert failures(metrics) == 0


def test_many_graphs_are_no_overflow() -> None:
    metrics = Metrics(max_series=10)
    for number in range(20):
        metrics.graph(f"g{number}", NODES)
        metrics["node_attempts_total"].inc(f"g{number}", "node9", "first", "success")

    assert metrics["node_attempts_total"].value("g19", "node9", "first", "success") == 1
    assert not samples(metrics, "metric_series_dropped_total")


def test_a_value_outside_its_closed_set_folds(metrics: Metrics) -> None:
    metrics["run_errors_total"].inc("g", "disk_on_fire")
    metrics["runs_rejected_total"].inc("g", "mood")
    metrics["runs_rejected_total"].inc("g", "mood")

    assert samples(metrics, "run_errors_total") == {("other", "g"): 1}
    assert samples(metrics, "runs_rejected_total") == {("g", "__overflow__"): 2}
    assert metrics["metric_series_dropped_total"].value("runs_rejected_total") >= 1


def test_series_of_a_graph_begin_at_zero(metrics: Metrics) -> None:
    metrics.graph("g", ["a", "sub/b"])
    metrics.graph("g", ["a", "sub/b"])

    assert samples(metrics, "runs_finished_total") == {
        ("g", outcome): 0 for outcome in ("success", "error", "timeout", "interrupted", "cancelled")
    }
    assert len(samples(metrics, "node_attempts_total")) == 2 * 2 * 7
    assert set(samples(metrics, "nodes_active")) == {("g", "a"), ("g", "sub/b")}
    # Only success of this one, and nothing of an error class.
    assert samples(metrics, "run_duration_seconds_count") == {("g", "success"): 0}
    assert not samples(metrics, "run_errors_total")


def test_series_of_closed_sets_begin_at_zero(metrics: Metrics) -> None:
    assert set(samples(metrics, "streams_closed_total").values()) == {0}
    assert len(samples(metrics, "stream_events_total")) == len(get_args(contract.LineType))
    assert samples(metrics, "encoder_fallbacks_total") == {(): 0}
    assert samples(metrics, "telemetry_spans_total")["sampled_out",] == 0
    assert samples(metrics, "streams_active") == {("join",): 0, ("origin",): 0, ("resume",): 0}


def test_what_nobody_knows_yet_is_no_zero(metrics: Metrics) -> None:
    """Gauges that are read from elsewhere are NaN; what nothing moves yet has no series."""
    assert math.isnan(samples(metrics, "queue_depth")[()])
    exports = samples(metrics, "telemetry_last_export_success_timestamp_seconds")
    assert all(map(math.isnan, exports.values()))
    assert len(exports) == 2
    assert samples(metrics, "storage_limit_bytes") == {}
    metrics.graph("g", ["a"])
    assert samples(metrics, "node_attempt_wasted_seconds_total") == {}


def test_a_gauge_of_unknown_value_counts_from_zero(metrics: Metrics) -> None:
    metrics["queue_depth"].inc()

    assert metrics["queue_depth"].value() == 1


def test_a_watched_gauge_is_read_when_it_is_rendered(metrics: Metrics) -> None:
    depth: list[int] = []
    metrics["queue_depth"].watch(lambda: len(depth))
    depth.append(1)

    assert samples(metrics, "queue_depth") == {(): 1}


def test_a_gauge_that_cannot_be_read_is_nan(metrics: Metrics) -> None:
    metrics["queue_depth"].watch(lambda: 1 / 0)

    assert math.isnan(samples(metrics, "queue_depth")[()])
    assert failures(metrics) == 0


def test_five_graphs_of_ten_nodes_are_under_five_thousand_lines(metrics: Metrics) -> None:
    for number in range(5):
        metrics.graph(f"graph{number}", NODES)

    assert len(text(metrics).splitlines()) < 5_000


def test_an_exemplar_makes_the_round_trip(metrics: Metrics) -> None:
    metrics["run_duration_seconds"].observe(3, "g", "error", exemplar=EXAMPLE)

    found = [
        (sample.labels["le"], sample.exemplar.labels, sample.exemplar.value)
        for family in parse_openmetrics(text(metrics, OPENMETRICS))
        for sample in family.samples
        if sample.exemplar
    ]
    assert found == [("5.0", EXAMPLE, 3)]


def test_the_plain_text_has_no_exemplars(metrics: Metrics) -> None:
    metrics["run_duration_seconds"].observe(3, "g", "error", exemplar=EXAMPLE)

    assert "trace_id" not in text(metrics)


@pytest.mark.parametrize(
    "exemplar",
    [
        pytest.param({}, id="empty"),
        pytest.param({"trace_id": EXAMPLE["trace_id"]}, id="no span"),
        pytest.param({**EXAMPLE, "trace_id": "0" * 32}, id="zeros"),
        pytest.param({**EXAMPLE, "trace_id": EXAMPLE["trace_id"].upper()}, id="upper case"),
        pytest.param({**EXAMPLE, "span_id": "x" * 500}, id="too long"),
        pytest.param({**EXAMPLE, "span_id": 7}, id="a number"),
    ],
)
def test_a_bad_exemplar_is_dropped_and_its_value_kept(
    metrics: Metrics, exemplar: dict[str, str]
) -> None:
    metrics["run_duration_seconds"].observe(3, "g", "success", exemplar=exemplar)

    assert metrics["run_duration_seconds"].value("g", "success") == 1
    assert "trace_id" not in text(metrics, OPENMETRICS)


def test_an_exemplar_is_dropped_where_none_is_declared(metrics: Metrics) -> None:
    metrics["run_queue_wait_seconds"].observe(3, "g", exemplar=EXAMPLE)
    metrics["runs_started_total"].inc("g", "api", exemplar=EXAMPLE)

    assert "trace_id" not in text(metrics, OPENMETRICS)


def test_other_fields_of_an_exemplar_stay_out(metrics: Metrics) -> None:
    metrics["run_duration_seconds"].observe(3, "g", "success", exemplar={**EXAMPLE, "run": "r-1"})

    assert "r-1" not in text(metrics, OPENMETRICS)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        pytest.param("", "text/plain", id="nothing"),
        pytest.param("text/html", "text/plain", id="a browser"),
        pytest.param(OPENMETRICS, "application/openmetrics-text", id="openmetrics"),
        pytest.param(
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
            "application/openmetrics-text",
            id="prometheus",
        ),
    ],
)
async def test_the_scraper_says_which_format(
    metrics: Metrics, accept: str, media_type: str
) -> None:
    body, got = await metrics.render(accept)

    assert got.startswith(media_type)
    assert body.endswith(b"# EOF\n") == ("openmetrics" in media_type)
    metrics.close()


async def test_rendering_is_not_done_on_the_event_loop(metrics: Metrics) -> None:
    threads: list[threading.Thread] = []
    turned = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> float:
        threads.append(threading.current_thread())
        # The loop can turn while we render, or this never comes back.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)
        loop.call_soon_threadsafe(turned.set)
        return 1.0

    metrics["queue_depth"].watch(read)
    body, _ = await metrics.render("")
    await turned.wait()

    assert b"\nsereno_queue_depth 1.0\n" in body
    assert threads[0].name.startswith("sereno-metrics")
    metrics.close()


def test_a_scrape_tells_what_the_scrapes_before_it_cost(metrics: Metrics) -> None:
    assert samples(metrics, "metrics_render_seconds_count") == {(): 0}
    assert samples(metrics, "metrics_render_seconds_count") == {(): 1}


def test_what_runs_here_is_told(metrics: Metrics) -> None:
    metrics["build_info"].info(
        version="1.2", commit="abc", python="3.11", langgraph="1.2.24", contract="1"
    )

    line = 'sereno_build_info{commit="abc",contract="1",langgraph="1.2.24",python="3.11",version='
    assert line in text(metrics)


def test_the_process_tells_of_itself_and_not_of_when_series_were_made(metrics: Metrics) -> None:
    rendered = text(metrics, OPENMETRICS)

    assert "process_resident_memory_bytes" in rendered
    assert "python_gc_collections" in rendered
    assert "_created" not in rendered


def test_nothing_is_lost_between_threads(metrics: Metrics) -> None:
    def count() -> None:
        for number in range(2_000):
            metrics["runs_started_total"].inc("g", "api")
            metrics["run_queue_wait_seconds"].observe(1, "g")
            metrics["run_errors_total"].inc(f"g{number}", "other")

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(count) for _ in range(4)]:
            future.result()

    assert metrics["runs_started_total"].value("g", "api") == 8_000
    assert metrics["run_queue_wait_seconds"].value("g") == 8_000
    assert sum(samples(metrics, "run_errors_total").values()) == 8_000
