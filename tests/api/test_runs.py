"""Look at a run, list runs, wait for one, cancel one."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import pytest

from .conftest import Serving
from .graphs.play import Stage
from .harness import Server, problem


async def pages(server: Server, **params: Any) -> list[list[str]]:
    """The ids of every page."""
    found: list[list[str]] = []
    while True:
        body = (await server.get("/v1/runs", params=params)).json()
        found.append([run["run_id"] for run in body["runs"]])
        if body["next_cursor"] is None:
            return found
        params["cursor"] = body["next_cursor"]


# A run as it is now.


async def test_a_run_tells_its_status_and_times(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", thread_id="t", metadata={"team": "a"}, deadline_s=60)
    await gates.arrival("first")
    running = (await server.get(f"/v1/runs/{run_id}")).json()
    gates.open("first", "second")
    await server.wait(run_id)
    ended = (await server.get(f"/v1/runs/{run_id}")).json()

    assert (running["status"], running["epoch"], running["metadata"]) == (
        "running",
        1,
        {"team": "a"},
    )
    assert running["ended_at"] is None
    assert running["result"] is None
    assert running["deadline"] > running["created_at"]
    assert (ended["status"], ended["thread_id"], ended["graph"]) == ("success", "t", "gated")
    for name in ("created_at", "updated_at", "started_at", "ended_at"):
        assert datetime.fromisoformat(ended[name]).utcoffset() is not None
    assert ended["created_at"] <= ended["started_at"] <= ended["ended_at"] <= ended["updated_at"]
    assert ended["result"]["nodes"] == ended["result"]["attempts"] == 2
    assert "output" not in ended["result"]
    assert ended["last_seq"] == len((await server.replay(run_id)).lines())


async def test_a_failed_run_tells_code_and_class_but_no_message(server: Server) -> None:
    run_id = await server.ended("fails")
    answer = await server.get(f"/v1/runs/{run_id}")
    error = answer.json()["result"]["error"]
    log = await server.replay(run_id)

    assert (error["code"], error["error_type"], error["node"]) == (
        "node_error",
        "ValueError",
        "fail",
    )
    assert b"hunter2" not in answer.body + log.body


async def test_messages_of_errors_are_told_when_they_may_be(serve: Serving) -> None:
    async with serve(expose_errors=True) as server:
        result = await server.wait(await server.start("fails"))

    assert result["error"]["detail"] == "the password is hunter2"


async def test_a_waiting_run_tells_its_place(serve: Serving, gates: Stage) -> None:
    async with serve(slots=1) as server:
        await server.start("gated")
        await gates.arrival("first")
        waiting = [await server.start("free") for _ in range(3)]
        runs = [(await server.get(f"/v1/runs/{run_id}")).json() for run_id in waiting]

    assert [run["queue_position"] for run in runs] == [0, 1, 2]
    assert {run["status"] for run in runs} == {"pending"}


# Lists.


async def test_runs_are_listed_newest_first_a_page_at_a_time(server: Server) -> None:
    run_ids = [await server.ended("free") for _ in range(5)]
    newest_first = run_ids[::-1]

    assert await pages(server) == [newest_first]
    assert await pages(server, limit=2) == [newest_first[:2], newest_first[2:4], newest_first[4:]]
    assert await pages(server, limit=5) == [newest_first]
    assert await pages(server, limit=500) == [newest_first]


async def test_an_empty_list_is_a_list(server: Server) -> None:
    answer = await server.get("/v1/runs")

    assert answer.json() == {"runs": [], "next_cursor": None}


async def test_lists_are_filtered(server: Server) -> None:
    good = await server.ended("free", thread_id="a")
    bad = await server.ended("fails", thread_id="b")
    asking = await server.ended("asks", thread_id="b")
    since = (await server.get(f"/v1/runs/{bad}")).json()["updated_at"]

    assert await pages(server, status="success") == [[good]]
    assert await pages(server, status="error") == [[bad]]
    assert await pages(server, status="cancelled") == [[]]
    assert await pages(server, graph="asks") == [[asking]]
    assert await pages(server, thread_id="b") == [[asking, bad]]
    assert await pages(server, thread_id="b", status="interrupted") == [[asking]]
    assert asking in (await pages(server, updated_after=since))[0]
    assert good not in (await pages(server, updated_after=since))[0]
    assert await pages(server, updated_after="2100-01-01T00:00:00Z") == [[]]
    assert await pages(server, updated_after="0") == [[asking, bad, good]]
    assert await pages(server, updated_after="2020-01-01") == [[asking, bad, good]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"),
        ("limit", "501"),
        ("limit", "x"),
        ("cursor", "x"),
        ("cursor", "é"),
        ("cursor", "bmFufHg="),
        ("status", "done"),
        ("updated_after", "yesterday"),
        ("updated_after", "nan"),
        ("updated_after", ""),
    ],
)
async def test_a_bad_filter_is_named(server: Server, name: str, value: str) -> None:
    answer = await server.get("/v1/runs", params={name: value})

    assert problem(answer, 422, "invalid_request")["field"] == name


# Results.


@pytest.mark.parametrize(
    ("graph", "more", "status", "member"),
    [
        ("free", {}, "success", "output"),
        ("fails", {}, "error", "error"),
        ("asks", {}, "interrupted", "interrupts"),
        ("gated", {"deadline_s": 0.05}, "timeout", "error"),
    ],
)
async def test_every_outcome_is_a_result(
    server: Server, graph: str, more: Any, status: str, member: str
) -> None:
    run_id = await server.start(graph, **more)
    answer = await server.get(f"/v1/runs/{run_id}/wait")
    terminal = (await server.replay(run_id)).lines()[-1]

    body = answer.json()
    assert answer.status == 200
    assert body == {"run_id": run_id, "thread_id": run_id, **terminal["data"]}
    assert (body["status"], body["final"]) == (status, True)
    assert member in body
    assert answer.headers["x-run-id"] == run_id
    assert answer.headers["cache-control"] == "no-store"


async def test_who_waits_is_answered_when_the_run_ends(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    waiting = asyncio.create_task(server.get(f"/v1/runs/{run_id}/wait"))
    await gates.arrival("first")
    gates.open("first", "second")

    assert (await waiting).json()["status"] == "success"


@pytest.mark.parametrize("timeout", ["0", "0.01"])
async def test_a_result_that_is_not_there_yet_is_202(
    server: Server, gates: Stage, timeout: str
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    answer = await server.get(f"/v1/runs/{run_id}/wait", params={"timeout": timeout})

    assert answer.status == 202
    assert answer.headers["location"] == f"/v1/runs/{run_id}"
    assert answer.json() == {"run_id": run_id, "status": "running"}


@pytest.mark.parametrize("timeout", ["-1", "x", "nan"])
async def test_a_bad_timeout_is_named(server: Server, timeout: str) -> None:
    run_id = await server.ended("free")
    answer = await server.get(f"/v1/runs/{run_id}/wait", params={"timeout": timeout})

    assert problem(answer, 422, "invalid_request")["field"] == "timeout"


async def test_who_waits_is_sent_away_when_the_server_shuts_down(
    server: Server, gates: Stage
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    waiting = asyncio.create_task(server.get(f"/v1/runs/{run_id}/wait"))
    await asyncio.sleep(0)
    await server.worker.drain()

    assert (await waiting).status == 202


# Cancel.


async def test_a_running_run_is_cancelled_with_its_reason(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    answer = await server.post(f"/v1/runs/{run_id}/cancel", {"reason": "too late"})
    result = await server.wait(run_id)
    run = (await server.get(f"/v1/runs/{run_id}")).json()
    types = (await server.replay(run_id)).types()

    assert answer.status == 202
    assert answer.headers["location"] == f"/v1/runs/{run_id}"
    assert answer.json()["cancel_reason"] == "too late"
    assert (result["status"], result["reason"]) == ("cancelled", "too late")
    assert (run["status"], run["cancel_reason"]) == ("cancelled", "too late")
    assert types[-2:] == ["node.cancelled", "run.cancelled"]


@pytest.mark.parametrize("body", [..., {}, {"reason": None}], ids=["none", "empty", "null"])
async def test_a_waiting_run_is_cancelled_at_once(serve: Serving, gates: Stage, body: Any) -> None:
    async with serve(slots=1) as server:
        await server.start("gated")
        await gates.arrival("first")
        run_id = await server.start("free")
        answer = await server.post(f"/v1/runs/{run_id}/cancel", body)

        assert answer.status == 200
        assert (answer.json()["status"], answer.json()["reason"]) == ("cancelled", "api")
        assert (await server.replay(run_id)).types() == ["run.queued", "run.cancelled"]


async def test_cancelling_an_ended_run_answers_with_its_outcome(
    server: Server, gates: Stage
) -> None:
    done = await server.ended("free")
    cancelled = await server.start("gated")
    await gates.arrival("first")
    await server.post(f"/v1/runs/{cancelled}/cancel", {"reason": "first"})
    await server.wait(cancelled)

    answer = await server.post(f"/v1/runs/{done}/cancel", {"reason": "x"})
    again = await server.post(f"/v1/runs/{cancelled}/cancel", {"reason": "second"})

    assert (answer.status, answer.json()["status"]) == (200, "success")
    assert (again.status, again.json()["reason"]) == (200, "first")
    assert (await server.get(f"/v1/runs/{done}")).json()["cancel_reason"] is None


async def test_the_first_reason_stays(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    for reason in ("first", "second"):
        await server.post(f"/v1/runs/{run_id}/cancel", {"reason": reason})

    assert (await server.wait(run_id))["reason"] == "first"


@pytest.mark.parametrize("body", [{"reason": "x" * 501}, {"reason": 1}, {"why": "x"}])
async def test_a_bad_reason_is_named(server: Server, gates: Stage, body: Any) -> None:
    run_id = await server.start("gated")
    answer = await server.post(f"/v1/runs/{run_id}/cancel", body)

    assert problem(answer, 422, "invalid_request")["field"] == next(iter(body))
