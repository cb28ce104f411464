"""Cancel over HTTP: what can be stopped stops, what cannot holds its thread and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lines import violations
from server import Line, Server, until

BODY: dict[str, Any] = {"graph": "chain", "input": {"seen": []}, "thread_id": "t"}


def cancelled(server: Server, run_id: str) -> list[Line]:
    """Cancel a run; its log."""
    answer = server.post(f"/v1/runs/{run_id}/cancel", reason="enough")
    assert answer.status_code == 202, answer.text
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.cancelled"
    assert lines[-1]["data"]["reason"] == "enough"
    return lines


def test_an_async_node_is_stopped_and_its_thread_is_free(server: Server) -> None:
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    server.entered("t", "b")
    lines = cancelled(server, run_id)

    assert [line["node"] for line in lines if line["type"] == "node.cancelled"] == ["b"]
    again = server.post(f"/v1/runs/{run_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    server.release("t", "b")
    assert server.lines(server.submit("chain", "t"))[-1]["type"] == "run.completed"
    assert server.marks("t")[:2] == ["a", "b"]


def test_a_node_in_a_subgraph_is_stopped(server: Server) -> None:
    server.hold("t", "two")
    run_id = server.submit("nested", "t")
    server.entered("t", "two")
    lines = cancelled(server, run_id)

    ended = [line["node"] for line in lines if line["type"] == "node.cancelled"]
    assert sorted(ended) == ["sub", "two"]
    assert "after" not in server.marks("t")


def test_a_sync_node_holds_its_thread_until_it_returns(serving: Callable[..., Server]) -> None:
    server = serving(SERENO_CANCEL_GRACE_S="0.3").start()
    server.hold("t", "block")
    run_id = server.submit("blocking", "t")
    server.entered("t", "block")
    lines = cancelled(server, run_id)
    held = server.post("/v1/runs", **BODY)

    assert [line["node"] for line in lines if line["type"] == "node.cancelled"] == ["block"]
    assert (held.status_code, held.json()["code"]) == (409, "thread_held")
    assert (held.json()["run_id"], held.json()["node"]) == (run_id, "block")
    assert server.get("/health").status_code == 200
    server.release("t", "block")
    server.entered("t", "unblocked")
    run = until(lambda: started(server), "the thread is free")
    assert server.lines(run)[-1]["type"] == "run.completed"
    assert "finish" not in server.marks("t")
    assert len(server.lines(run_id)) == len(lines)


def started(server: Server) -> str | None:
    answer = server.post("/v1/runs", **BODY)
    return answer.json()["run_id"] if answer.status_code == 202 else None


def test_a_restart_ends_the_hold(serving: Callable[..., Server]) -> None:
    server = serving(SERENO_CANCEL_GRACE_S="0.3").start()
    server.hold("t", "block")
    run_id = server.submit("blocking", "t")
    server.entered("t", "block")
    cancelled(server, run_id)
    assert server.post("/v1/runs", **BODY).json()["code"] == "thread_held"
    server.term()

    assert server.wait(20) == 0
    server.start()
    assert server.lines(server.submit("chain", "t"))[-1]["type"] == "run.completed"


def test_after_a_node_that_swallows_its_cancellation_no_other_runs(
    serving: Callable[..., Server],
) -> None:
    server = serving(SERENO_CANCEL_GRACE_S="0.3").start()
    server.hold("t", "swallow")
    run_id = server.submit("swallowing", "t")
    server.entered("t", "swallow")
    lines = cancelled(server, run_id)
    held = server.post("/v1/runs", **BODY)

    assert (held.status_code, held.json()["code"]) == (409, "thread_held")
    assert held.json()["node"] == "swallow"
    server.release("t", "swallow")
    run = until(lambda: started(server), "the thread is free")
    assert server.lines(run)[-1]["type"] == "run.completed"
    assert "finish" not in server.marks("t")
    assert "swallowed" in server.marks("t")
    assert server.lines(run_id) == lines


def test_a_node_that_swallows_and_then_returns_in_time_ends_its_run_too(server: Server) -> None:
    server.hold("t", "swallow")
    run_id = server.submit("swallowing", "t")
    server.entered("t", "swallow")
    server.post(f"/v1/runs/{run_id}/cancel", reason="enough")
    server.entered("t", "swallowed")
    server.release("t", "swallow")
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.cancelled"
    assert "finish" not in server.marks("t")


def test_a_run_that_waits_for_a_slot_is_cancelled_without_starting(
    serving: Callable[..., Server],
) -> None:
    server = serving(SERENO_SLOTS="1").start()
    server.hold("first", "a")
    server.submit("chain", "first")
    server.entered("first", "a")
    second = server.submit("chain", "second")
    answer = server.post(f"/v1/runs/{second}/cancel", reason="enough")
    lines = server.lines(second)

    assert answer.status_code in (200, 202)
    assert [line["type"] for line in lines] == ["run.queued", "run.cancelled"]
    assert server.marks("second") == []
    server.release("first", "a")


def test_a_cancel_that_was_answered_outlives_a_kill(serving: Callable[..., Server]) -> None:
    """The wish is durable: the next process ends the run instead of going on with it."""
    server = serving(SERENO_CANCEL_GRACE_S="30").start()
    server.hold("t", "swallow")
    run_id = server.submit("swallowing", "t")
    server.entered("t", "swallow")
    assert server.post(f"/v1/runs/{run_id}/cancel", reason="enough").status_code == 202
    server.kill()
    server.release("t", "swallow")
    server.start()
    lines = server.lines(run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.cancelled"
    assert lines[-1]["data"]["reason"] == "enough"
    assert server.marks("t").count("swallow") == 1
