"""GET /v1/runs/{id}/stream: replay and tail are the same lines, and every end has a reason."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.engines.base import BATCH, RING
from runtime.engines.memory import MemoryEngine
from runtime.errors import StorageFailed

from .conftest import Serving
from .graphs.play import Stage
from .harness import NDJSON, Server, Stream, problem

UNSTORED = {"heartbeat", "caught_up"}


def stored(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] not in UNSTORED]


def closings(logs: list[Any]) -> list[dict[str, Any]]:
    """What was said when streams were closed."""
    return [record for record in logs if record.get("event_type") == "stream.closed"]


def tail(server: Server, run_id: str, *, window: int | None = None, **params: Any) -> Any:
    return server.stream("GET", f"/v1/runs/{run_id}/stream", params=params, window=window)


# One log, however it is read.


async def test_a_replay_equals_what_was_seen_live(server: Server, gates: Stage) -> None:
    body = {"graph": "gated", "input": {}}
    async with server.stream("POST", "/v1/runs", json=body, headers=NDJSON) as stream:
        begun = await stream.until("node.started")
        gates.open("first", "second")
        live = begun + await stream.rest()
    replay = await server.replay(stream.headers["x-run-id"])

    assert stored(live) == replay.lines()
    assert [line["seq"] for line in replay.lines()] == list(range(1, len(replay.lines()) + 1))
    assert replay.headers.pop("traceresponse") != stream.headers.pop("traceresponse")
    assert replay.headers == stream.headers


async def test_two_watchers_get_the_same_bytes(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    async with tail(server, run_id, after=1) as one, tail(server, run_id, after=1) as other:
        await one.until("caught_up")
        await other.until("caught_up")
        before = one.raw
        gates.open("first", "second")
        await asyncio.gather(one.end(), other.end())

    replay = await server.replay(run_id, after=1)
    lines = [line for line in one.raw.splitlines(True) if b'"caught_up"' not in line]
    assert one.raw.removeprefix(before)
    assert lines == [line for line in other.raw.splitlines(True) if b'"caught_up"' not in line]
    assert b"".join(lines) == replay.body


async def test_every_cut_can_be_resumed(server: Server, gates: Stage) -> None:
    """lines[:k] + stream(after=k) == lines, for a reader who waits and for one who comes later."""
    run_id = await server.start("gated", stream=["updates", "values"])
    await gates.arrival("first")
    now = (await server.get(f"/v1/runs/{run_id}")).json()["last_seq"]
    waiting = [await _open(server, run_id, after=k) for k in range(now + 1)]
    for stream in waiting:
        await stream.until("caught_up")
    gates.open("first", "second")
    whole = (await server.replay(run_id)).lines() or []
    await server.wait(run_id)
    whole = (await server.replay(run_id)).lines()

    for k, stream in enumerate(waiting):
        await stream.end()
        lines = [orjson.loads(line) for line in stream.raw.splitlines()]
        assert whole[:k] + stored(lines) == whole
        await stream.close()
    for k in range(len(whole)):
        assert whole[:k] + (await server.replay(run_id, after=k)).lines() == whole
    assert (await server.replay(run_id, after=len(whole))).status == 204


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(n=st.integers(0, 2 * BATCH + 3), cuts=st.lists(st.integers(0, 10_000), max_size=4))
def test_a_reader_who_reconnects_at_any_line_misses_none(
    serve: Serving, gates: Stage, n: int, cuts: list[int]
) -> None:
    """A reader that is cut off again and again while the run goes on has seen the whole log."""

    async def read() -> None:
        gates.reset()
        async with serve() as server:
            run_id = await server.start("bursts", {"n": n})
            seen: list[dict[str, Any]] = []
            for cut in sorted(cuts):
                async with tail(server, run_id, after=len(seen)) as stream:
                    while len(seen) < cut % (n + 3) and (line := await stream.line()):
                        seen += stored([line])
            gates.open("burst")
            async with tail(server, run_id, after=len(seen)) as stream:
                seen += stored(await stream.rest())
            assert seen == (await server.replay(run_id)).lines()
            assert [line["seq"] for line in seen] == list(range(1, len(seen) + 1))

    asyncio.run(read())


async def _open(server: Server, run_id: str, **params: Any) -> Stream:
    return await server.open("GET", f"/v1/runs/{run_id}/stream", params=params)


async def test_lines_that_are_ready_together_leave_in_one_write(server: Server) -> None:
    run_id = await server.ended("free")
    async with tail(server, run_id) as stream:
        chunk = await stream.chunk()
        assert await stream.chunk() is None

    assert chunk == stream.raw
    assert chunk.count(b"\n") > 3


async def test_a_reader_far_behind_is_given_batches(server: Server, gates: Stage) -> None:
    gates.open("burst")
    run_id = await server.ended("bursts", {"n": 3000})
    async with tail(server, run_id) as stream:
        chunks = []
        while (chunk := await stream.chunk()) is not None:
            chunks.append(chunk)

    assert len(chunks) > 2
    assert all(chunk.endswith(b"\n") for chunk in chunks)


# Cursors.


async def test_the_query_wins_over_last_event_id(server: Server) -> None:
    run_id = await server.ended("free")
    path = f"/v1/runs/{run_id}/stream"
    header = await server.get(path, headers={"Last-Event-ID": "2"})
    both = await server.get(path, headers={"Last-Event-ID": "2"}, params={"after": "3"})

    assert header.lines()[0]["seq"] == 3
    assert both.lines()[0]["seq"] == 4


async def test_latest_tails_only(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    async with tail(server, run_id, after="latest") as stream:
        caught_up = await stream.line()
        gates.open("first", "second")
        rest = await stream.rest()

    assert caught_up is not None
    assert caught_up["type"] == "caught_up"
    assert rest[0]["seq"] == caught_up["after"] + 1


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "live"])
async def test_a_cursor_ahead_of_the_log_is_400(server: Server, gates: Stage, ended: bool) -> None:
    if ended:
        run_id = await server.ended("free")
    else:
        run_id = await server.start("gated")
        await gates.arrival("first")
        await written(server, run_id, 3)
    last_seq = (await server.get(f"/v1/runs/{run_id}")).json()["last_seq"]

    told = problem(await server.replay(run_id, after=last_seq + 1), 400, "cursor_ahead")
    assert told["last_seq"] == last_seq
    assert told["run_id"] == run_id


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "", "٣", "9" * 30])
async def test_a_cursor_that_is_no_number_is_400(server: Server, after: str) -> None:
    run_id = await server.ended("free")

    told = problem(await server.replay(run_id, after=after), 400, "invalid_cursor")
    assert told["field"] == "after"


@pytest.mark.parametrize("how", ["seq", "latest", "header"])
async def test_a_cursor_at_the_terminal_line_says_stop(server: Server, how: str) -> None:
    run_id = await server.ended("fails")
    seq = str((await server.get(f"/v1/runs/{run_id}")).json()["last_seq"])
    path = f"/v1/runs/{run_id}/stream"
    if how == "header":
        answer = await server.get(path, headers={"Last-Event-ID": seq})
    else:
        answer = await server.get(path, params={"after": seq if how == "seq" else "latest"})

    assert answer.status == 204
    assert answer.body == b""
    assert answer.headers["x-run-status"] == "error"
    assert answer.headers["x-run-id"] == run_id


async def test_an_unknown_run_is_404_with_one_text(server: Server) -> None:
    for path in ("", "/stream", "/wait", "/data/1/update"):
        answer = await server.get(f"/v1/runs/nope{path}")
        assert problem(answer, 404, "run_not_found")["detail"] == "run 'nope' not found"
    answer = await server.post("/v1/runs/nope/cancel")
    assert problem(answer, 404, "run_not_found")["detail"] == "run 'nope' not found"


# Filters, and an end when caught up.


@pytest.mark.parametrize("types", ["node.completed", " node.completed , ", "node.completed,token"])
async def test_types_choose_lines_but_never_hide_the_end(server: Server, types: str) -> None:
    answer = await server.replay(await server.ended("free"), types=types)

    assert answer.types() == ["node.completed", "run.completed"]


@pytest.mark.parametrize("types", ["", " ", ","])
async def test_no_types_are_all_types(server: Server, types: str) -> None:
    run_id = await server.ended("free")

    assert (await server.replay(run_id, types=types)).body == (await server.replay(run_id)).body


async def test_unstored_lines_pass_every_filter(serve: Serving, gates: Stage) -> None:
    async with serve(heartbeat_s=0.02) as server:
        run_id = await server.start("gated")
        await gates.arrival("first")
        async with tail(server, run_id, types="custom,heartbeat") as stream:
            lines = await stream.until("heartbeat")

    assert [line["type"] for line in lines] == ["caught_up", "heartbeat"]
    assert lines[1]["after"] >= lines[0]["after"] >= 1


async def test_an_unknown_type_is_named(server: Server) -> None:
    run_id = await server.ended("free")
    told = problem(await server.replay(run_id, types="token,tokens"), 422, "invalid_request")

    assert told["field"] == "types"
    assert "'tokens'" in told["detail"]
    assert "node.completed" in told["detail"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("follow", "maybe"), ("heartbeat", "x"), ("heartbeat", "-1"), ("heartbeat", "nan")],
)
async def test_a_bad_option_is_named(server: Server, name: str, value: str) -> None:
    run_id = await server.ended("free")
    told = problem(await server.replay(run_id, **{name: value}), 422, "invalid_request")

    assert told["field"] == name


async def test_without_follow_a_stream_ends_with_the_terminal_line(server: Server) -> None:
    run_id = await server.ended("free")

    assert (await server.replay(run_id, follow=0)).body == (await server.replay(run_id)).body


async def written(server: Server, run_id: str, seq: int) -> Any:
    """The run once a line is committed: a line may wait for a checkpoint to go with."""
    async with tail(server, run_id) as stream:
        while ((await stream.line()) or {}).get("seq", 0) < seq:
            pass
    return (await server.get(f"/v1/runs/{run_id}")).json()


@pytest.mark.parametrize("after", [0, 1, "latest"])
async def test_without_follow_a_stream_ends_when_caught_up(
    server: Server, gates: Stage, after: Any
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    run = await written(server, run_id, 3)
    lines = (await server.replay(run_id, follow=0, after=after)).lines()

    assert lines[-1]["type"] == "caught_up"
    assert lines[-1]["after"] == run["last_seq"]
    assert [line["type"] for line in lines].count("caught_up") == 1


async def test_caught_up_comes_once_at_the_last_line_that_was_there(
    server: Server, gates: Stage
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    run = await written(server, run_id, 3)
    async with tail(server, run_id) as stream:
        lines = await stream.until("caught_up")
        gates.open("first", "second")
        rest = await stream.rest()

    bookmark = lines[-1]
    assert lines[-2]["seq"] == bookmark["after"] == run["last_seq"]
    assert "caught_up" not in [line["type"] for line in rest]
    assert bookmark.keys() == {"v", "ts", "type", "run_id", "thread_id", "epoch", "after", "data"}


async def test_an_ended_run_has_nothing_to_catch_up_with(server: Server) -> None:
    assert "caught_up" not in (await server.replay(await server.ended("free"))).types()


# Heartbeats.


async def test_a_heartbeat_says_where_the_reader_and_the_run_are(
    serve: Serving, gates: Stage
) -> None:
    async with serve(heartbeat_s=0.02) as server:
        run_id = await server.start("gated")
        await gates.arrival("first")
        async with tail(server, run_id) as stream:
            lines = await stream.until("heartbeat")
            lines += await stream.until("heartbeat")
            gates.open("first", "second")
            rest = await stream.rest()
        resumed = await server.replay(run_id, after=lines[-1]["after"])

    beat = lines[-1]
    assert "seq" not in beat
    assert beat["after"] == stored(lines)[-1]["seq"]
    assert beat["epoch"] == 1
    assert beat["data"] == {"status": "running", "nodes": ["first"]}
    assert resumed.lines() == stored(rest)


async def test_a_heartbeat_of_a_waiting_run_has_no_nodes(serve: Serving, gates: Stage) -> None:
    async with serve(slots=1) as server:
        await server.start("gated")
        await gates.arrival("first")
        run_id = await server.start("free")
        async with tail(server, run_id, heartbeat=0.1) as stream:
            beat = (await stream.until("heartbeat"))[-1]

    assert beat["data"] == {"status": "pending", "nodes": []}
    assert (beat["epoch"], beat["after"]) == (0, 1)


async def test_filtered_lines_do_not_keep_heartbeats_away(server: Server, gates: Stage) -> None:
    """A reader hears nothing of lines that its filter holds back, however many there are."""
    run_id = await server.start("bursts", {"n": 3000})
    await gates.arrival("burst")
    async with tail(server, run_id, types="message", heartbeat=0.1) as stream:
        lines = await stream.until("heartbeat")

    assert {line["type"] for line in lines} == UNSTORED


async def test_heartbeats_can_be_switched_off(serve: Serving, gates: Stage) -> None:
    async with serve(heartbeat_s=0.01) as server:
        run_id = await server.start("gated")
        await gates.arrival("first")
        async with tail(server, run_id, heartbeat=0) as silent, tail(server, run_id) as talking:
            for _ in range(5):
                await talking.until("heartbeat")
            gates.open("first", "second")
            lines = await silent.rest()

    assert "heartbeat" not in {line["type"] for line in lines}


# Every end has a reason.


async def test_a_stream_that_ends_with_its_run_is_complete(server: Server, logs: list[Any]) -> None:
    run_id = await server.ended("free", thread_id="t")
    answer = await server.replay(run_id, after=2)

    opened = next(record for record in logs if record.get("event_type") == "stream.opened")
    assert (opened["run_id"], opened["thread_id"], opened["from_seq"]) == (run_id, "t", 2)
    (closed,) = closings(logs)
    told = {
        "run_id": run_id,
        "thread_id": "t",
        "kind": "resume",
        "reason": "complete",
        "events": len(answer.lines()),
        "bytes": len(answer.body),
        "from_seq": 2,
        "last_seq": answer.lines()[-1]["seq"],
    }
    assert told.items() <= closed.items()


@pytest.mark.parametrize("how", ["disconnect", "break_off"])
async def test_a_client_that_goes_leaves_the_run_alone(
    serve: Serving, gates: Stage, logs: list[Any], how: str
) -> None:
    """Noticed by the server's message, or by a write that fails."""
    async with serve(heartbeat_s=0.02) as server:
        body = {"graph": "gated", "input": {}}
        async with server.stream("POST", "/v1/runs", json=body, headers=NDJSON) as stream:
            lines = await stream.until("node.started")
            getattr(stream, how)()
            await stream.over()
        run_id = stream.headers["x-run-id"]
        gates.open("first", "second")
        result = await server.wait(run_id)
        resumed = await server.replay(run_id, after=lines[-1]["seq"])
        whole = await server.replay(run_id)

    assert stream.task.exception() is None
    assert result["status"] == "success"
    assert stored(lines) + resumed.lines() == whole.lines()
    assert closings(logs)[0]["reason"] == "client_disconnect"
    assert closings(logs)[0]["last_seq"] == lines[-1]["seq"]


async def test_a_disconnect_leaves_no_watcher_behind(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    async with tail(server, run_id) as stream:
        await stream.until("caught_up")
        (kept,) = server.engine.tails._tails.values()
        assert kept.watchers == 1
    gc.collect()

    assert (kept.watchers, kept.waiters) == (0, set())


async def test_a_client_that_does_not_read_is_let_go_and_can_resume(
    serve: Serving, gates: Stage, logs: list[Any]
) -> None:
    async with serve(write_timeout_s=0.05) as server:
        run_id = await server.start("bursts", {"n": 2000})
        await gates.arrival("burst")
        async with tail(server, run_id, window=2) as slow:
            await slow.over()
            seen = await slow.rest()
        gates.open("burst")
        result = await server.wait(run_id)
        resumed = await server.replay(run_id, after=stored(seen)[-1]["seq"])
        whole = await server.replay(run_id)

    assert not slow.complete
    assert result["status"] == "success"
    assert stored(seen) + resumed.lines() == whole.lines()
    closed = closings(logs)[0]
    assert closed["reason"] == "slow_consumer"
    assert closed["last_seq"] == stored(seen)[-1]["seq"]
    assert closed["bytes"] == len(slow.raw)
    assert closed["events"] == len(stored(seen))


async def test_a_slow_client_does_not_slow_the_graph_nor_other_readers(
    server: Server, gates: Stage
) -> None:
    gates.open("burst")
    run_id = await server.start("bursts", {"n": 2000})
    async with tail(server, run_id, window=1):
        async with tail(server, run_id) as other:
            lines = await other.rest()

    assert lines[-1]["type"] == "run.completed"


async def test_a_reader_who_falls_off_the_ring_reads_on_from_the_log(
    server: Server, gates: Stage
) -> None:
    run_id = await server.start("bursts", {"n": RING + 2000})
    async with tail(server, run_id, window=2) as slow:
        await gates.arrival("burst")
        gates.open("burst")
        await server.wait(run_id)
        assert not slow.task.done()
        seen = stored(await slow.rest())

    assert [line["seq"] for line in seen] == list(range(1, len(seen) + 1))
    assert seen == (await server.replay(run_id)).lines()


async def test_a_client_that_stalls_at_the_very_end_is_let_go(
    serve: Serving, logs: list[Any]
) -> None:
    async with serve(write_timeout_s=0.02) as server:
        run_id = await server.ended("free")
        async with tail(server, run_id, window=2) as stream:
            await stream.over()
            lines = await stream.rest()

    assert lines[-1]["type"] == "run.completed"
    assert closings(logs)[0]["reason"] == "slow_consumer"


@pytest.mark.parametrize("heartbeat", [0, 0.1])
async def test_a_stream_may_have_a_longest_time(
    serve: Serving, gates: Stage, logs: list[Any], heartbeat: float
) -> None:
    async with serve(stream_max_s=0.1) as server:
        run_id = await server.start("gated")
        await gates.arrival("first")
        async with tail(server, run_id, heartbeat=heartbeat) as stream:
            lines = await stream.rest()
        gates.open("first", "second")
        await server.wait(run_id)
        resumed = await server.replay(run_id, after=stored(lines)[-1]["seq"])

    assert stream.complete
    assert resumed.types()[-1] == "run.completed"
    assert closings(logs)[0]["reason"] == "timeout"


async def test_a_server_that_shuts_down_says_where_the_reader_is(
    server: Server, gates: Stage, logs: list[Any]
) -> None:
    run_id = await server.start("gated")
    await gates.arrival("first")
    async with tail(server, run_id, heartbeat=0) as stream:
        seen = await stream.until("caught_up")
        await server.worker.drain()
        rest = await stream.rest()
    late = await server.replay(run_id)

    assert rest[-1]["type"] == "heartbeat"
    assert rest[-1]["after"] == stored(seen + rest)[-1]["seq"]
    assert "run.completed" not in {line["type"] for line in rest}
    assert stream.complete
    assert late.types()[-2:] == ["caught_up", "heartbeat"]
    assert [closed["reason"] for closed in closings(logs)] == ["server_shutdown"] * 2


async def test_a_run_that_ended_is_delivered_whole_while_draining(
    server: Server, logs: list[Any]
) -> None:
    run_id = await server.ended("free")
    await server.worker.drain()
    answer = await server.replay(run_id)

    assert answer.types()[-1] == "run.completed"
    assert closings(logs)[0]["reason"] == "complete"


async def test_a_server_that_stops_at_once_says_so(
    server: Server, gates: Stage, logs: list[Any]
) -> None:
    run_id = await server.start("gated")
    async with tail(server, run_id) as stream:
        await stream.until("caught_up")
        stream.task.cancel()
        await asyncio.wait({stream.task})

    assert stream.task.cancelled()
    assert closings(logs)[0]["reason"] == "server_shutdown"


class Unreadable(MemoryEngine):
    """Its disk goes away while it serves."""

    gone = False

    async def read(self, run_id: str, after: int, limit: int = 1000) -> Any:
        if self.gone:
            raise StorageFailed("disk I/O error")
        return await super().read(run_id, after, limit)


async def test_a_failure_of_the_delivery_is_an_end_and_never_a_line(
    serve: Serving, logs: list[Any]
) -> None:
    engine = Unreadable()
    async with serve(engine=engine) as server:
        run_id = await server.ended("free")
        engine.gone = True
        answer = await server.replay(run_id)

    assert (answer.status, answer.body) == (200, b"")
    assert closings(logs)[0]["reason"] == "error"


# What a line may hold.


async def test_line_separators_are_escaped(server: Server) -> None:
    run_id = await server.ended("odd", stream=["updates", "values"])
    body = (await server.replay(run_id)).body
    state = (await server.get(f"/v1/runs/{run_id}/wait")).json()["output"]

    text = body.decode()
    assert not {"\u2028", "\u2029", "\u0085"} & set(text)
    assert r"a\u2028b\u2029c\u0085d é 雪" in text
    assert len(text.splitlines()) == body.count(b"\n")
    assert state["text"] == "a\u2028b\u2029c\u0085d é 雪"


async def test_a_large_member_is_a_reference_to_its_exact_value(serve: Serving) -> None:
    async with serve(line_max=4096) as server:
        run_id = await server.ended("grows", {"n": 10_000}, stream=["updates", "values"])
        answer = await server.replay(run_id)
        found = {}
        for line in answer.lines():
            for member, value in line["data"].items():
                if isinstance(value, dict) and "$ref" in value:
                    part = await server.get(value["$ref"])
                    assert part.headers["content-type"] == "application/json"
                    assert part.headers["x-content-type-options"] == "nosniff"
                    assert len(part.body) == value["bytes"]
                    assert value["$ref"] == f"/v1/runs/{run_id}/data/{line['seq']}/{member}"
                    found[line["type"], member] = part.json()

        assert all(len(line) <= 4096 for line in answer.body.split(b"\n"))
        assert found["node.completed", "update"] == {"text": "x" * 10_000}
        assert found["run.completed", "output"]["text"] == "x" * 10_000
        assert found["values", "values"]["text"] == "x" * 10_000

        seq = next(line["seq"] for line in answer.lines() if line["type"] == "node.completed")
        for other in (f"{seq}/output", "1/update", "9999/update", f"{seq}/x"):
            told = await server.get(f"/v1/runs/{run_id}/data/{other}")
            assert problem(told, 404, "not_found")["run_id"] == run_id
        for wrong in ("x/update", "-1/update", "9" * 30 + "/update"):
            told = await server.get(f"/v1/runs/{run_id}/data/{wrong}")
            assert problem(told, 422, "invalid_request")["field"] == "seq"
