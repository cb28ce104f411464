"""A node that misbehaves costs its neighbours nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx2
from lines import recoveries, violations
from server import Server


def test_a_node_that_blocks_the_event_loop_costs_no_lease(serving: Callable[..., Server]) -> None:
    """It blocks for 5 s, a lease lasts 2."""
    server = serving(SERENO_LEASE_S="2", SERENO_LEASE_HEARTBEAT_S="0.5").start()
    server.hold("neighbour", "b")
    neighbour = server.submit("chain", "neighbour")
    server.entered("neighbour", "b")
    frozen = server.submit("freezing", "t")
    lines = server.lines(frozen)
    server.release("neighbour", "b")

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["epoch"] == 1
    assert lines[-1]["data"]["duration_ms"] > 4900
    assert server.lines(neighbour)[-1]["epoch"] == 1
    assert server.marks("t") == ["freeze", "finish"]


def deaths_of(server: Server, run_id: str) -> int:
    """Start the server again each time it dies, until the run has ended."""
    deaths = 0
    while True:
        try:
            if server.get(f"/v1/runs/{run_id}").json()["status"] == "error":
                return deaths
        except httpx2.TransportError:
            assert server.wait() == -9
            deaths += 1
            assert deaths < 8
            server.start()
        time.sleep(0.02)


def test_a_run_that_kills_its_process_fails_alone(server: Server) -> None:
    """Two crashes make a suspect; it fails when it crashes once more, all by itself."""
    neighbours = [f"n{number}" for number in range(4)]
    for thread in neighbours:
        server.hold(thread, "b")
    runs = {thread: server.submit("chain", thread) for thread in neighbours[:2]}
    for thread in runs:
        server.entered(thread, "b")
    server.hold("poison", "die")
    poison = server.submit("deadly", "poison")
    server.entered("poison", "die")
    runs |= {thread: server.submit("chain", thread) for thread in neighbours[2:]}
    for thread in neighbours:
        server.entered(thread, "b")
    server.release("poison", "die")
    deaths = deaths_of(server, poison)
    for thread in neighbours:
        server.release(thread, "b")

    assert deaths == 3
    lines = server.lines(poison)
    assert violations(lines) == []
    assert lines[-1]["type"] == "run.failed"
    assert lines[-1]["data"]["error"]["code"] == "max_attempts"
    assert lines[-1]["epoch"] == 3
    assert server.marks("poison") == ["die"] * 3
    for run_id in runs.values():
        lines = server.lines(run_id)
        assert violations(lines) == []
        assert lines[-1]["type"] == "run.completed"


def test_a_suspect_is_alone_in_its_process(server: Server) -> None:
    """The neighbour is older, got on, and so is no suspect itself: it waits for the solo run."""
    server.hold("n", "b")
    neighbour = server.submit("chain", "n")
    server.entered("n", "b")
    poison = server.submit("deadly", "poison")
    deaths = deaths_of(server, poison)
    server.release("n", "b")
    lines = server.lines(neighbour)

    assert lines[-1]["type"] == "run.completed"
    assert violations(lines) == []
    # Both were there at the first two deaths, at the third only the suspect.
    assert deaths == 3
    reasons = [recovery["reason"] for recovery in recoveries(lines)]
    assert reasons in (["crash"], ["crash", "crash"]), reasons
    assert server.lines(poison)[-1]["data"]["error"]["code"] == "max_attempts"


def test_a_run_that_got_on_before_it_crashed_is_no_suspect_for_that(server: Server) -> None:
    """prepare → finish → die: each claim begins at `die`, so only its own crashes count."""
    poison = server.submit("careful_then_deadly", "t")
    deaths = deaths_of(server, poison)

    assert deaths == 3
    assert server.marks("t") == ["prepare", "finish", "die", "die", "die"]
    lines = server.lines(poison)
    assert violations(lines) == []
    assert lines[-1]["data"]["error"]["code"] == "max_attempts"


def test_a_failed_poison_frees_its_thread(server: Server) -> None:
    deaths_of(server, server.submit("deadly", "t"))

    assert server.lines(server.submit("chain", "t"))[-1]["type"] == "run.completed"
