"""SIGTERM: what runs gets to the end of its superstep, nothing is lost, readers go on elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from lines import completed, recoveries, violations
from server import Reader, Server, until, whole

CHAIN = {"a": 1, "b": 1, "c": 1}


def test_a_drain_under_load_loses_no_run_and_repeats_no_superstep(
    serving: Callable[..., Server],
) -> None:
    """Twelve runs in various nodes, one of them in a thread, one in a subgraph, three in their
    last superstep: these just end."""
    server = serving(forked=False).start()
    where = [*[("chain", node) for node in ("a", "b", "c1")] * 3]
    where += [("fanout", "work0"), ("nested", "one"), ("blocking", "block")]
    runs: dict[str, str] = {}
    for number, (graph, node) in enumerate(where):
        thread = f"t{number}"
        server.hold(thread, node)
        runs[thread] = server.submit(graph, thread)
    for number, (_, node) in enumerate(where):
        server.entered(f"t{number}", node)
    readers = {thread: Reader(server, run_id) for thread, run_id in runs.items()}
    for reader in readers.values():
        reader.start()
        reader.saw("caught_up")

    server.term()
    until(lambda: server.logged("Draining"), "it drains")
    assert "draining" in until(server.ready, "readyz is red", 1)
    assert server.get("/health").json()["status"] == "ok"
    refused = server.post("/v1/runs", graph="chain", input={}, thread_id="new")
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    slipped = server.post("/v1/runs", graph="chain", input={}, thread_id="t0")
    assert (slipped.status_code, slipped.json()["code"]) == (503, "draining")

    for thread, reader in readers.items():
        reader.join(10)
        assert reader.eof, thread
        assert reader.all[-1]["type"] == "heartbeat"
        assert reader.all[-1]["after"] == reader.lines[-1]["seq"]
    for number, (_, node) in enumerate(where):
        server.release(f"t{number}", node)
    assert server.wait() == 0
    assert len(server.logged("Run requeued")) == 9
    assert len(server.logged("Run completed")) == 3
    assert '"ERROR"' not in server.output

    going_on = [f"t{number}" for number in range(9) if number % 3 < 2]
    for thread in going_on:
        server.hold(thread, "c2")
    server.start()
    for thread in going_on:
        busy = server.post("/v1/runs", graph="chain", input={}, thread_id=thread)
        assert (busy.status_code, busy.json()["code"]) == (409, "thread_busy")
        server.release(thread, "c2")
    for thread, run_id in runs.items():
        after = readers[thread].all[-1]["after"]
        raw = whole(server.raw(run_id))
        lines = server.lines(run_id)
        assert readers[thread].whole + whole(server.raw(run_id, after)) == raw
        assert violations(lines) == []
        assert lines[-1]["type"] == "run.completed"
        if lines[-1]["epoch"] == 2:
            assert [line["type"] for line in lines if line["epoch"] == 1][-1] == "run.requeued"
            assert recoveries(lines)[0]["reason"] == "drain"
            # A drain inside a subgraph stops the node around it, which goes on inside.
            around = ["sub"] if lines[0]["data"]["graph"] == "nested" else []
            assert [lost["node"] for lost in recoveries(lines)[0]["lost"]] == around
        marks = server.marks(thread)
        assert len(marks) == len(set(marks))
        if thread in ("t0", "t1", "t2"):
            assert completed(lines) == CHAIN


def test_what_does_not_end_within_the_grace_is_let_go_and_repeated(
    serving: Callable[..., Server],
) -> None:
    server = serving(SERENO_DRAIN_S="0.5", SERENO_CANCEL_GRACE_S="0.5").start()
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    server.entered("t", "b")
    server.wait_line(run_id, "node.started", node="b")
    server.term()
    assert server.wait() == 0
    server.release("t", "b")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert not [line for line in lines if line["type"] == "node.cancelled"]
    assert [lost["node"] for lost in recoveries(lines)[0]["lost"]] == ["b"]
    assert recoveries(lines)[0]["reason"] == "drain"
    assert server.marks("t") == ["a", "b", "b", "c1", "c2"]


def test_a_drain_does_not_wait_for_a_back_off_that_outlasts_it(
    serving: Callable[..., Server],
) -> None:
    server = serving(SERENO_DRAIN_S="60").start()
    server.hold("t", "tire")
    run_id = server.submit("tiring", "t")
    server.wait_line(run_id, "node.retrying")
    server.term()
    assert server.wait(20) == 0
    server.release("t", "tire")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert server.marks("t") == ["prepare", "tire", "tire"]


@pytest.mark.parametrize(
    ("graph", "node"), [("blocking", "block"), ("swallowing", "swallow")], ids=["sync", "swallow"]
)
def test_a_node_that_cannot_be_stopped_does_not_keep_the_process(
    serving: Callable[..., Server], graph: str, node: str
) -> None:
    server = serving(SERENO_DRAIN_S="0.5", SERENO_CANCEL_GRACE_S="0.5").start()
    server.hold("t", node)
    run_id = server.submit(graph, "t")
    server.entered("t", node)
    server.wait_line(run_id, "node.started", node=node)
    server.term()
    assert server.wait(15) == 0
    server.release("t", node)
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert [lost["node"] for lost in recoveries(lines)[0]["lost"]] == [node]
    assert lines[-1]["type"] == "run.completed"


def test_a_second_sigterm_ends_the_process_at_once(server: Server) -> None:
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    server.entered("t", "b")
    server.term()
    until(lambda: server.logged("Draining"), "it drains")
    begun = time.monotonic()
    server.term()
    code = server.wait()

    assert code == 128 + 15
    assert time.monotonic() - begun < 5
    server.release("t", "b")
    server.start()
    lines = server.lines(run_id)
    assert violations(lines) == []
    assert recoveries(lines)[0]["reason"] == "crash"


def test_many_deploys_fail_no_long_run(serving: Callable[..., Server]) -> None:
    """Each drain is too short for the node: that is no crash of the run."""
    server = serving(SERENO_DRAIN_S="0.1").start()
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    for times in range(1, 5):
        server.entered("t", "b", times)
        server.term()
        assert server.wait() == 0
        if times == 4:
            server.release("t", "b")
        server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert {recovery["reason"] for recovery in recoveries(lines)} == {"drain"}
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["epoch"] == 5


def test_a_pending_run_waits_for_the_next_process(serving: Callable[..., Server]) -> None:
    server = serving(SERENO_SLOTS="1").start()
    server.hold("first", "a")
    first = server.submit("chain", "first")
    server.entered("first", "a")
    second = server.submit("chain", "second")
    server.term()
    until(lambda: server.logged("Draining"), "it drains")
    server.release("first", "a")
    assert server.wait() == 0
    server.start()

    assert server.lines(first)[-1]["epoch"] == 2
    assert server.lines(second)[-1]["epoch"] == 1
    assert server.lines(second)[-1]["type"] == "run.completed"
