"""With a LangGraph that we do not know, graphs are wrapped, and signals and lines still agree.

What functions call of LangGraph is not seen then; no signal tells of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import test_lines
from langgraph.func import entrypoint, task
from langgraph.pregel import _runner
from run_lines import run
from scenario_graphs import INPUT, SCENARIOS
from small_graphs import State, chain, writes
from test_scenarios import Observed, by_a_caller, by_a_worker, check_forest, check_records

import telemetry.langgraph
from runtime.graphs import LoadedGraph
from telemetry.selftest import Wrap, observe

#: These have nodes that only the seam sees.
UNSEEN = {
    "graph_in_a_function",
    "graph_in_a_retried_call",
    "graph_that_a_function_streams",
    "graph_that_a_thread_invokes",
    "tasks",
    "tasks_in_threads",
    "tools",
}
UNSEEN_LINES = {
    "test_an_inner_node_names_the_calls_around_it",
    "test_two_parallel_calls_of_one_subgraph_are_told_apart_by_task",
    "test_parallel_sync_graphs_in_threads_keep_their_updates_apart",
    "test_a_functional_graph_has_a_node_for_each_call_of_a_task",
    "test_a_sync_functional_graph_runs_its_tasks_in_threads",
    "test_an_interrupt_in_a_subgraph_is_its_inner_tasks",
    "test_an_update_that_a_thread_changes_later_stays_as_it_was",
}
every_other_scenario = pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - UNSEEN))


@pytest.fixture(autouse=True)
async def wrap(observed: None, monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """What a server chooses when one of LangGraph's functions takes something new."""
    telemetry.langgraph.uninstall()
    original: Any = _runner.arun_with_retry  # type: ignore[attr-defined]

    async def arun_with_retry(
        task: Any, retry_policy: Any, stream: bool = False, configurable: Any = None, new: int = 0
    ) -> Any:
        return await original(task, retry_policy, stream, configurable)

    monkeypatch.setattr(_runner, "arun_with_retry", arun_with_retry)
    chosen = await observe()
    assert chosen is not None
    wrap, opened = chosen, LoadedGraph.open

    @asynccontextmanager
    async def open(self: LoadedGraph, config: Any) -> AsyncIterator[Any]:
        async with opened(self, config) as graph:
            yield wrap(graph)

    monkeypatch.setattr(LoadedGraph, "open", open)
    monkeypatch.setattr(telemetry.langgraph, "install", lambda: None)
    return wrap


# All other lines are as they are with the seam: the same tests again.
globals().update(
    (name, found)
    for name, found in vars(test_lines).items()
    if name.startswith("test_") and name not in UNSEEN_LINES
)


@every_other_scenario
async def test_spans_of_a_workers_run(name: str) -> None:
    observed = Observed()
    made = SCENARIOS[name](observed.probe)

    await by_a_worker(observed, made)

    check_forest(observed, made)
    check_records(observed)


@every_other_scenario
async def test_spans_in_the_task_of_a_caller(name: str, wrap: Wrap) -> None:
    observed = Observed()
    made = SCENARIOS[name](observed.probe)

    await by_a_caller(observed, replace(made, graph=wrap(made.graph)))

    check_forest(observed, made)


async def test_a_graph_in_a_function_is_part_of_the_node_around_it() -> None:
    sub = chain(("inner", writes("in")))

    async def calls(state: State) -> State:
        return {"log": (await sub.ainvoke({"x": 1, "log": []}))["log"]}

    lines = await run(chain(("OUT", calls)), INPUT)

    assert [(line["type"], line["node"]) for line in lines.of("node.", "custom")] == [
        ("node.started", "OUT"),
        ("custom", "OUT"),
        ("node.completed", "OUT"),
    ]
    assert lines.one("node.completed")["data"]["update"] == {"log": ["in"]}


async def test_the_calls_of_a_functional_graph_are_part_of_it() -> None:
    @task
    async def double(x: int) -> int:
        return 2 * x

    @entrypoint()
    async def graph(x: int) -> int:
        return await double(x) + await double(x)

    lines = await run(graph, 2)

    assert [line["node"] for line in lines.of("node.")] == ["graph", "graph"]
    assert lines.one("node.completed")["data"]["update"] == 8
