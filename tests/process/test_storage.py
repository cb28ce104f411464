"""The store cannot be written for a while: clients are told, and nothing acknowledged is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lines import completed, customs, texts, violations
from server import Server, until, whole

LARGE = "x" * 40_000


def submit_large(server: Server, thread: str) -> Any:
    body = {"graph": "chain", "thread_id": thread, "input": {"seen": [], "pad": LARGE}}
    return server.post("/v1/runs", **body)


def test_a_full_disk_refuses_runs_and_loses_none(serving: Callable[..., Server]) -> None:
    server = serving(SERENO_LEASE_S="2", SERENO_LEASE_HEARTBEAT_S="0.5").start()
    ended = server.submit("chain", "ended")
    before = whole(server.raw(ended))
    server.hold("t", "large")
    run_id = server.submit("growing", "t", input={"seen": [], "size": 20_000})
    server.entered("t", "large")
    server.wait_line(run_id, "node.started", node="large")
    known = whole(server.raw(run_id, follow=0))

    (server.folder / "full").touch()
    refused = until(
        lambda: (answer := submit_large(server, "new")).status_code != 202 and answer, "it is full"
    )
    assert (refused.status_code, refused.json()["code"]) == (503, "storage")
    assert int(refused.headers["Retry-After"]) > 0
    until(lambda: "storage" in server.ready(), "readyz is red")
    assert server.get("/health").status_code == 200
    server.release("t", "large")
    assert whole(server.raw(ended)) == before

    (server.folder / "full").unlink()
    lines = server.lines(run_id)
    assert violations(lines) == []
    assert whole(server.raw(run_id)).startswith(known)
    assert lines[-1]["type"] in ("run.completed", "run.failed")
    if lines[-1]["type"] == "run.failed":
        assert lines[-1]["data"]["error"]["code"] == "storage"
    until(lambda: not server.ready(), "readyz is green")
    again = until(
        lambda: (answer := submit_large(server, "again")).status_code == 202 and answer,
        "it has room",
    )
    assert server.lines(again.json()["run_id"])[-1]["type"] == "run.completed"


def test_a_kill_while_the_disk_is_full_loses_nothing(serving: Callable[..., Server]) -> None:
    server = serving().start()
    server.hold("t", "large")
    run_id = server.submit("growing", "t", input={"seen": [], "size": 20_000})
    server.entered("t", "large")
    server.wait_line(run_id, "node.started", node="large")
    known = whole(server.raw(run_id, follow=0))
    (server.folder / "full").touch()
    until(lambda: submit_large(server, "new").status_code == 503, "it is full")
    server.release("t", "large")
    server.kill()
    (server.folder / "full").unlink()
    server.start()
    lines = server.lines(run_id)

    assert whole(server.raw(run_id)).startswith(known)
    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert len(customs(lines)) == 20


def test_any_single_write_may_fail(serving: Callable[..., Server]) -> None:
    """Of each of these runs another write fails, once: its log stays whole, or says `storage`."""
    server = serving(SERENO_LEASE_S="1", SERENO_LEASE_HEARTBEAT_S="0.3", CHAOS_ONE_BY_ONE="1")
    server.start()
    usual = server.lines(server.submit("chain", "usual"))
    runs = {}
    for number in range(1, 25):
        thread = f"fail-{number}"
        answer = server.post("/v1/runs", graph="chain", thread_id=thread, input={"seen": []})
        if number == 1:
            assert (answer.status_code, answer.json()["code"]) == (503, "storage")
            assert server.run_on(thread) is None
            continue
        runs[thread] = answer.json()["run_id"]
    wrong = []
    for thread, run_id in runs.items():
        lines = server.lines(run_id)
        problems = violations(lines)
        last = lines[-1]
        if last["type"] == "run.failed" and last["data"]["error"]["code"] == "storage":
            pass
        elif last["type"] != "run.completed":
            problems.append(f"{last['type']} {last['data']}")
        else:
            for what in (texts, customs, completed):
                if what(lines) != what(usual):
                    problems.append(f"{what.__name__} {what(lines)}")
        wrong += [f"{thread}: {problem}" for problem in problems]

    assert not wrong, "\n" + "\n".join(wrong)
    assert server.ready() == {}
