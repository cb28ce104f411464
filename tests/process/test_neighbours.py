"""A node that misbehaves costs its neighbours nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx2
from lines import violations
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


def die_often(server: Server, run_id: str, then: Callable[[int], None] | None = None) -> int:
    """Start the server again each time it dies, until the run has ended; how often it died.

    `then(deaths)` is called before it starts again.
    """
    deaths = 0
    while True:
        try:
            if server.get(f"/v1/runs/{run_id}").json()["ended_at"]:
                return deaths
        except httpx2.TransportError:
            assert server.wait() == -9
            deaths += 1
            assert deaths < 8
            if then is not None:
                then(deaths)
            server.start()
        time.sleep(0.02)


def test_a_run_that_kills_its_process_fails_and_its_neighbours_finish(server: Server) -> None:
    """The neighbours get on no further in two processes, and so are suspects too: each of them
    has to run alone, and does not die."""
    neighbours = {f"n{number}": "" for number in range(4)}
    for thread in neighbours:
        server.hold(thread, "b")
    server.hold("poison", "die")
    for number, thread in enumerate(neighbours):
        neighbours[thread] = server.submit("chain", thread)
        if number == 1:
            poison = server.submit("deadly", "poison")
    for thread in neighbours:
        server.entered(thread, "b")

    def then(deaths: int) -> None:
        if deaths == 2:
            for thread in neighbours:
                server.release(thread, "b")

    server.entered("poison", "die")
    server.release("poison", "die")
    deaths = die_often(server, poison, then)

    assert deaths == 3
    lines = server.lines(poison)
    assert violations(lines) == []
    assert lines[-1]["type"] == "run.failed"
    assert lines[-1]["data"]["error"]["code"] == "max_attempts"
    assert lines[-1]["epoch"] == 3
    assert server.marks("poison") == ["die"] * 3
    for run_id in neighbours.values():
        lines = server.lines(run_id)
        assert violations(lines) == []
        assert lines[-1]["type"] == "run.completed"


def test_a_suspect_begins_when_its_neighbours_are_done(server: Server) -> None:
    """The neighbour is older, got on between the crashes, and so is no suspect."""
    server.hold("n", "b")
    neighbour = server.submit("chain", "n")
    server.entered("n", "b")
    server.hold("poison", "die")
    poison = server.submit("deadly", "poison")
    server.entered("poison", "die")
    server.release("poison", "die")
    assert server.wait() == -9

    server.release("n", "b")
    server.hold("n", "c1")
    server.hold("poison", "die")
    server.start()
    server.entered("n", "c1")
    server.entered("poison", "die", 2)
    server.release("poison", "die")
    assert server.wait() == -9

    server.start()
    server.entered("n", "c1", 2)
    server.release("n", "c1")
    assert die_often(server, poison) == 1
    lines = server.lines(neighbour)
    assert lines[-1]["type"] == "run.completed"
    assert lines[-1]["epoch"] == 3
    lines = server.lines(poison)
    assert violations(lines) == []
    assert lines[-1]["data"]["error"]["code"] == "max_attempts"
    assert lines[-1]["epoch"] == 3


def test_a_run_that_got_on_before_it_crashed_is_no_suspect_for_that(server: Server) -> None:
    """prepare → finish → die: each claim begins at `die`, so only its own crashes count."""
    poison = server.submit("careful_then_deadly", "t")
    deaths = die_often(server, poison)

    assert deaths == 3
    assert server.marks("t") == ["prepare", "finish", "die", "die", "die"]
    lines = server.lines(poison)
    assert violations(lines) == []
    assert lines[-1]["data"]["error"]["code"] == "max_attempts"


def test_a_failed_poison_frees_its_thread(server: Server) -> None:
    die_often(server, server.submit("deadly", "t"))

    assert server.lines(server.submit("chain", "t"))[-1]["type"] == "run.completed"
