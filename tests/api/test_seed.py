"""The seed profile: one address that starts a task or attaches to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from runtime.transports.seed import KEPT_MAX, _Kept

from .conftest import Serving
from .graphs.play import Stage
from .harness import Server, graph_file, problem


def by_type(lines: list[dict[str, Any]], type: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] == type]


async def runs(server: Server) -> list[str]:
    """The ids of all runs, oldest first."""
    found = (await server.get("/v1/runs")).json()["runs"]
    return [run["run_id"] for run in found][::-1]


# GET starts, or attaches.


async def test_get_starts_a_run(server: Server) -> None:
    answer = await server.get("/api/stream", params={"graph": "free", "thread_id": "t"})
    lines = answer.lines()
    run = (await server.get(f"/v1/runs/{lines[0]['run_id']}")).json()

    assert answer.status == 200
    assert answer.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    assert answer.headers["x-run-id"] == lines[0]["run_id"]
    assert answer.headers["x-accel-buffering"] == "no"
    assert lines[0]["type"] == "run.queued"
    assert lines[-1]["type"] == "final"
    assert run["thread_id"] == "t"
    assert "values" in run["stream"]


async def test_get_attaches_to_the_threads_run(server: Server, gates: Stage) -> None:
    params = {"graph": "gated", "thread_id": "t"}
    async with server.stream("GET", "/api/stream", params=params) as one:
        begun = await one.until("node.started")
        async with server.stream("GET", "/api/stream", params=params) as other:
            again = await other.until("node.started")
            gates.open("first", "second")
            await other.rest()
        rest = await one.rest()

    assert begun[0] == again[0]
    assert rest[-1]["type"] == "final"
    assert await runs(server) == [begun[0]["run_id"]]


async def test_two_who_come_at_once_get_one_run(server: Server, gates: Stage) -> None:
    params = {"graph": "gated", "thread_id": "t"}
    one, other = [await server.open("GET", "/api/stream", params=params) for _ in range(2)]
    begun = [await one.line(), await other.line()]
    gates.open("first", "second")
    rest = [await one.rest(), await other.rest()]

    assert begun[0] == begun[1]
    assert stored(rest[0]) == stored(rest[1])
    assert len(await runs(server)) == 1


async def test_the_seed_profile_has_heartbeats(server: Server, gates: Stage) -> None:
    params = {"graph": "gated", "heartbeat": 0.1}
    async with server.stream("GET", "/api/stream", params=params) as stream:
        await gates.arrival("first")
        await stream.until("heartbeat")
        beat = (await stream.until("heartbeat"))[-1]

    assert beat["data"] == {"status": "running", "nodes": ["first"]}


async def test_get_starts_anew_when_the_threads_run_has_ended(server: Server) -> None:
    params = {"graph": "free", "thread_id": "t"}
    for expected in (1, 2):
        final = (await server.get("/api/stream", params=params)).lines()[-1]
        assert final["data"]["output"]["n"] == expected

    assert len(await runs(server)) == 2


async def test_get_replays_a_run_that_waits_for_a_human_and_starts_nothing(
    server: Server,
) -> None:
    params = {"graph": "asks", "thread_id": "t"}
    first = await server.get("/api/stream", params=params)
    second = await server.get("/api/stream", params=params)

    final = second.lines()[-1]
    assert (final["type"], final["ok"], final["status"]) == ("final", True, "interrupted")
    assert stored(first.lines()) == stored(second.lines())
    assert len(await runs(server)) == 1


def stored(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "seq" in line]


async def test_get_of_a_run_by_its_id_starts_nothing(server: Server) -> None:
    run_id = (await server.get("/api/stream", params={"graph": "free"})).headers["x-run-id"]
    answer = await server.get("/api/stream", params={"run_id": run_id})

    assert answer.lines()[-1]["type"] == "final"
    assert await runs(server) == [run_id]


@pytest.mark.parametrize("how", ["query", "header"])
async def test_get_with_a_cursor_only_reads(server: Server, how: str) -> None:
    cursor: dict[str, Any] = (
        {"params": {"after": "0"}} if how == "query" else {"headers": {"Last-Event-ID": "0"}}
    )
    params = {"thread_id": "t", "graph": "free", **cursor.pop("params", {})}
    missing = await server.get("/api/stream", params=params, **cursor)
    nobody = await server.get("/api/stream", params={"after": "0"})
    unknown = await server.get("/api/stream", params={"after": "0", "run_id": "nope"})
    assert await runs(server) == []
    started = await server.get("/api/stream", params={"thread_id": "t", "graph": "free"})
    read = await server.get("/api/stream", params=params, **cursor)

    problem(missing, 404, "thread_not_found")
    problem(nobody, 404, "thread_not_found")
    problem(unknown, 404, "run_not_found")
    assert read.lines() == stored(started.lines())
    assert len(await runs(server)) == 1


async def test_a_reader_of_the_seed_profile_resumes_at_any_line(server: Server) -> None:
    run_id = (await server.get("/api/stream", params={"graph": "fails"})).headers["x-run-id"]
    whole = (await server.get("/api/stream", params={"run_id": run_id, "after": 0})).lines()

    cursors = [line.get("seq", line.get("after")) for line in whole]
    for k, cursor in enumerate(cursors[:-1]):
        rest = await server.get("/api/stream", params={"run_id": run_id, "after": cursor})
        # The error line stands before the final one for each who has not seen that.
        begin = k if whole[k]["type"] == "error" else k + 1
        assert rest.lines() == whole[begin:]
    stop = await server.get("/api/stream", params={"run_id": run_id, "after": cursors[-1]})
    assert (stop.status, stop.headers["x-run-status"]) == (204, "error")
    ahead = await server.get("/api/stream", params={"run_id": run_id, "after": cursors[-1] + 1})
    problem(ahead, 400, "cursor_ahead")
    wrong = await server.get("/api/stream", params={"run_id": run_id, "after": "x"})
    problem(wrong, 400, "invalid_cursor")


@pytest.mark.parametrize("purpose", ["prefetch", "prefetch;prerender"])
async def test_get_is_not_prefetched(server: Server, purpose: str) -> None:
    answer = await server.get(
        "/api/stream", params={"graph": "free"}, headers={"Sec-Purpose": purpose}
    )

    assert problem(answer, 422, "invalid_request")["field"] == "Sec-Purpose"
    assert await runs(server) == []


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("thread_id", ["a b", "acme::t", "t\n"])
async def test_a_bad_thread_id_is_named(server: Server, method: str, thread_id: str) -> None:
    if method == "GET":
        answer = await server.get("/api/stream", params={"thread_id": thread_id})
    else:
        answer = await server.post("/api/stream", {"thread_id": thread_id})

    assert problem(answer, 422, "invalid_request")["field"] == "thread_id"


# POST starts.


@pytest.mark.parametrize("path", ["/api/stream", "/api/run/stream"])
async def test_post_starts_a_run(server: Server, path: str) -> None:
    body = {"graph": "free", "thread_id": "t", "input": {"n": 4}}
    final = (await server.post(path, body)).lines()[-1]

    assert (final["type"], final["data"]["output"]["n"], final["thread_id"]) == ("final", 5, "t")


async def test_post_to_a_busy_thread_attaches_with_the_same_body_only(
    server: Server, gates: Stage
) -> None:
    body = {"graph": "gated", "thread_id": "t", "input": {"n": 1}}
    async with server.stream("POST", "/api/stream", json=body) as one:
        begun = await one.until("node.started")
        async with server.stream("POST", "/api/stream", json=body) as other:
            again = await other.until("node.started")
        for different in ({"n": 2}, {}, None):
            refused = await server.post("/api/stream", {**body, "input": different})
            told = problem(refused, 409, "thread_busy")
            assert told["active_run"] == one.headers["x-run-id"]
        refused = await server.post("/api/run", {**body, "graph": "free"})
        assert problem(refused, 409, "thread_busy")["active_run"] == one.headers["x-run-id"]
        waiting = asyncio.create_task(server.post("/api/run", body))
        await server.watched(one.headers["x-run-id"], by=2)
        gates.open("first", "second")
        result = (await waiting).json()
        await one.rest()

    assert begun[0] == again[0]
    assert result["run_id"] == one.headers["x-run-id"]
    assert await runs(server) == [one.headers["x-run-id"]]


async def test_a_run_that_was_told_more_is_not_the_same(server: Server, gates: Stage) -> None:
    more = {"config": {"configurable": {"user": "u"}}, "stream": ["values"]}
    await server.start("gated", {"n": 1}, thread_id="t", **more)
    body = {"graph": "gated", "thread_id": "t", "input": {"n": 1}}

    problem(await server.post("/api/stream", body), 409, "thread_busy")


async def test_another_graph_than_the_threads_is_a_conflict(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", thread_id="t", stream=["values"])
    for params in ({}, {"after": "0"}):
        answer = await server.get(
            "/api/stream", params={"thread_id": "t", "graph": "free", **params}
        )
        assert problem(answer, 409, "other_graph")["active_run"] == run_id
    ended = await server.ended("free", thread_id="u", stream=["values"])
    answer = await server.get("/api/stream", params={"run_id": ended, "graph": "gated"})
    problem(answer, 409, "other_graph")


async def test_a_run_without_snapshots_is_not_recorded(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", thread_id="t")
    for answer in (
        await server.get("/api/stream", params={"thread_id": "t"}),
        await server.get("/api/stream", params={"run_id": run_id}),
        await server.post("/api/stream", {"thread_id": "t", "graph": "gated"}),
    ):
        assert problem(answer, 409, "not_recorded")["run_id"] == run_id


# What is not said has a default.


async def test_the_first_graph_is_the_default(server: Server) -> None:
    async with server.stream("GET", "/api/stream") as stream:
        queued = await stream.line()

    assert queued is not None
    assert queued["data"]["graph"] == "gated"


async def test_a_default_graph_can_be_set(serve: Serving) -> None:
    async with serve(default_graph="free") as server:
        got = await server.get("/api/stream")
        posted = await server.request("POST", "/api/stream")
        assert (await server.get(f"/v1/runs/{got.headers['x-run-id']}")).json()["graph"] == "free"

    assert posted.lines()[0]["data"]["graph"] == "free"


async def test_a_default_graph_that_is_not_served_is_404(serve: Serving) -> None:
    async with serve(default_graph="nope") as server:
        told = problem(await server.get("/api/stream"), 404, "graph_not_found")

    assert "gated" in told["known"]


async def test_a_graphs_default_input_is_taken(server: Server) -> None:
    got = await server.post("/api/run", {"graph": "defaulted"})
    given = await server.post(
        "/api/run", {"graph": "defaulted", "input": {"topic": "dogs", "tone": "dry"}}
    )

    assert got.json()["output"] == {"topic": "CATS", "tone": "dry"}
    assert given.json()["output"]["topic"] == "DOGS"


async def test_a_graph_that_requires_nothing_gets_an_empty_input(server: Server) -> None:
    assert (await server.post("/api/run", {"graph": "free"})).json()["output"]["n"] == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_input_that_is_required_is_named(server: Server, method: str) -> None:
    if method == "GET":
        answer = await server.get("/api/stream", params={"graph": "needs"})
    else:
        answer = await server.post("/api/stream", {"graph": "needs"})

    told = problem(answer, 422, "invalid_request")
    assert told["field"] == "input"
    assert "topic, tone" in told["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"graph": "needs", "input": {"topic": "x"}}, "input.tone"),
        ({"graph": "free", "input": [1]}, "input"),
        ({"graph": "free", "config": {}}, "config"),
    ],
)
async def test_a_bad_field_is_named(server: Server, body: Any, field: str) -> None:
    answer = await server.post("/api/run", body)

    assert problem(answer, 422, "invalid_request")["field"] == field


# Lines that simple clients know.


async def test_lines_are_a_superset_of_the_simple_ones(server: Server) -> None:
    simple = await server.post("/api/stream", {"graph": "free", "input": {"n": 1}})
    run_id = simple.headers["x-run-id"]
    lines = (await server.replay(run_id)).lines()

    snapshots = by_type(simple.lines(), "snapshot")
    values = by_type(lines, "values")
    assert [s["nodes"] for s in snapshots] == [[], ["count"]]
    assert [s["snapshot"] for s in snapshots] == [
        {"n": 1, "log": []},
        {"n": 2, "log": ["count"]},
    ]
    for snapshot, value in zip(snapshots, values, strict=True):
        own = {"type", "event", "nodes", "snapshot"}
        assert snapshot["event"] == "superstep.completed"
        assert snapshot.keys() == value.keys() | own
        assert all(snapshot[name] == value[name] for name in value.keys() - own)
    final = simple.lines()[-1]
    assert (final["type"], final["ok"], final["status"]) == ("final", True, "success")
    assert all(final[name] == lines[-1][name] for name in lines[-1].keys() - {"type"})
    rest = [line for line in lines if line["type"] not in ("values", "run.completed")]
    assert [line for line in stored(simple.lines()) if line in rest] == rest


@pytest.mark.parametrize(
    ("graph", "status", "detail"),
    [
        ("fails", "error", "A step of the graph failed."),
        ("endless", "error", "The graph did not stop within its limit of steps."),
    ],
)
async def test_before_a_final_of_a_failure_goes_an_error_line(
    server: Server, graph: str, status: str, detail: str
) -> None:
    answer = await server.post("/api/stream", {"graph": graph})
    *_, error, final = answer.lines()

    assert error.keys() == {
        "v",
        "ts",
        "type",
        "run_id",
        "thread_id",
        "epoch",
        "after",
        "detail",
    }
    assert (error["type"], error["detail"]) == ("error", detail)
    assert error["after"] == final["seq"] - 1
    assert (final["type"], final["ok"], final["status"]) == ("final", False, status)
    assert b"hunter2" not in answer.body
    assert (await server.replay(answer.headers["x-run-id"])).types().count("error") == 0


async def test_a_timeout_is_told_as_an_error(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", stream=["values"], deadline_s=0.05)
    await server.wait(run_id)
    *_, error, final = (await server.get("/api/stream", params={"run_id": run_id})).lines()

    assert (error["type"], error["detail"]) == ("error", "The run did not end before its deadline.")
    assert (final["ok"], final["status"]) == (False, "timeout")


async def test_a_cancelled_run_is_not_ok_and_no_error(server: Server, gates: Stage) -> None:
    async with server.stream("GET", "/api/stream", params={"graph": "gated"}) as stream:
        await stream.until("node.started")
        await server.post(f"/v1/runs/{stream.headers['x-run-id']}/cancel", {"reason": "enough"})
        lines = await stream.rest()

    assert by_type(lines, "error") == []
    assert (lines[-1]["type"], lines[-1]["ok"], lines[-1]["status"]) == (
        "final",
        False,
        "cancelled",
    )


async def test_a_snapshot_is_the_graphs_output(server: Server) -> None:
    answer = await server.post("/api/stream", {"graph": "hides"})
    snapshots = by_type(answer.lines(), "snapshot")

    assert snapshots[-1]["snapshot"] == {"n": 1}
    assert "text" in snapshots[-1]["data"]["values"]


async def test_a_snapshot_that_is_too_large_is_a_reference(serve: Serving) -> None:
    async with serve(line_max=4096) as server:
        answer = await server.post("/api/stream", {"graph": "grows", "input": {"n": 10_000}})
        snapshot = by_type(answer.lines(), "snapshot")[-1]["snapshot"]
        whole = await server.get(snapshot["$ref"])

    assert whole.json()["text"] == "x" * 10_000


async def test_line_separators_are_escaped(server: Server) -> None:
    answer = await server.post("/api/stream", {"graph": "odd"})

    text = answer.body.decode()
    assert not {"\u2028", "\u2029", "\u0085"} & set(text)
    assert answer.lines()[-1]["data"]["output"]["text"] == "a\u2028b\u2029c\u0085d é 雪"


async def test_every_reader_gets_the_same_bytes(server: Server) -> None:
    run_id = (await server.post("/api/stream", {"graph": "free"})).headers["x-run-id"]
    one, other = [await server.get("/api/stream", params={"run_id": run_id}) for _ in range(2)]

    assert one.body == other.body


def test_converted_lines_are_kept_up_to_a_size() -> None:
    kept = _Kept()
    size = KEPT_MAX // 8
    for i in range(10):
        kept.put((bytes([i]) * size, None), b"x" * size)

    assert kept.get((bytes([9]) * size, None)) is not None
    assert kept.get((bytes([6]) * size, None)) is not None
    assert kept.get((bytes([5]) * size, None)) is None


# Wait for the result.


async def test_post_run_answers_with_the_result(server: Server) -> None:
    answer = await server.post("/api/run", {"graph": "free", "thread_id": "t", "input": {"n": 2}})
    terminal = (await server.replay(answer.headers["x-run-id"])).lines()[-1]

    body = answer.json()
    assert answer.status == 200
    assert body == {
        "run_id": answer.headers["x-run-id"],
        "thread_id": "t",
        **terminal["data"],
    }
    assert body["output"]["n"] == 3


@pytest.mark.parametrize(("graph", "status"), [("fails", "error"), ("asks", "interrupted")])
async def test_post_run_answers_200_for_every_outcome(
    server: Server, graph: str, status: str
) -> None:
    answer = await server.post("/api/run", {"graph": graph})

    assert (answer.status, answer.json()["status"]) == (200, status)


async def test_two_defaults_in_one_file(tmp_path: Path, serve: Serving) -> None:
    source = graph_file(tmp_path, default_input={"free": {"n": 41}})
    async with serve(source=source, default_graph="free") as server:
        assert (await server.request("POST", "/api/run")).json()["output"]["n"] == 42
