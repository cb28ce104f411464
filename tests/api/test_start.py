"""POST /v1/runs: what starts a run, and what is refused before it becomes one."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from .conftest import Serving
from .graphs.play import Stage
from .harness import NDJSON, Server, problem

# Three ways to be answered.


async def test_a_run_is_accepted_before_it_has_run(server: Server, gates: Stage) -> None:
    answer = await server.post("/v1/runs", {"graph": "gated", "input": {}, "thread_id": "t-1"})

    body = answer.json()
    assert answer.status == 202
    assert answer.headers["location"] == f"/v1/runs/{body['run_id']}"
    assert answer.headers["x-run-id"] == body["run_id"]
    assert re.fullmatch("[0-9A-HJKMNP-TV-Z]{26}", body["run_id"])
    assert (body["thread_id"], body["graph"], body["status"]) == ("t-1", "gated", "pending")
    assert (body["epoch"], body["last_seq"]) == (0, 1)
    assert body["stream"] == ["updates", "messages", "custom"]


async def test_without_a_thread_a_run_gets_one_of_its_own(server: Server) -> None:
    body = (await server.post("/v1/runs", {"graph": "free", "input": {}})).json()

    assert body["thread_id"] == body["run_id"]


async def test_a_streamed_start_sends_headers_and_the_first_line_before_the_graph_ends(
    server: Server, gates: Stage
) -> None:
    body = {"graph": "gated", "input": {}, "thread_id": "t-1"}
    async with server.stream(
        "POST", "/v1/runs", json=body, headers={**NDJSON, "accept-encoding": "gzip, br"}
    ) as stream:
        queued = await stream.line()
        assert queued is not None
        started = await stream.until("node.started")
        gates.open("first", "second")
        rest = await stream.rest()

    assert stream.status == 200
    assert stream.headers == {
        "x-trace-id": queued["trace_id"],
        "traceresponse": f"00-{queued['trace_id']}-{queued['span_id']}-01",
        "content-type": "application/x-ndjson; charset=utf-8",
        "x-accel-buffering": "no",
        "cache-control": "no-store, no-transform",
        "x-content-type-options": "nosniff",
        "x-run-id": queued["run_id"],
        "x-log-id": server.engine.log_id,
        "location": f"/v1/runs/{queued['run_id']}",
    }
    assert (queued["type"], queued["seq"], queued["epoch"], queued["v"]) == ("run.queued", 1, 0, 1)
    assert [line["type"] for line in started] == ["caught_up", "run.started", "node.started"]
    assert rest[-1]["type"] == "run.completed"
    assert stream.complete
    assert stream.raw.endswith(b"\n")
    assert not stream.raw.startswith(b"\xef\xbb\xbf")


async def test_the_first_line_comes_before_the_graph_starts(serve: Serving, gates: Stage) -> None:
    async with serve(slots=1) as server:
        await server.start("gated")
        await gates.arrival("first")
        async with server.stream(
            "POST", "/v1/runs", json={"graph": "free", "input": {}}, headers=NDJSON
        ) as stream:
            lines = [await stream.line(), await stream.line()]
            run = (await server.get(f"/v1/runs/{stream.headers['x-run-id']}")).json()

    assert [line and line["type"] for line in lines] == ["run.queued", "caught_up"]
    assert run["status"] == "pending"


async def test_prefer_wait_answers_with_the_result(server: Server) -> None:
    answer = await server.post(
        "/v1/runs",
        {"graph": "free", "input": {"n": 1}},
        headers={"Prefer": "respond-async, wait=30"},
    )

    body = answer.json()
    assert answer.status == 200
    assert (body["status"], body["final"], body["output"]["n"]) == ("success", True, 2)
    assert answer.headers["x-run-id"] == body["run_id"]
    assert answer.headers["cache-control"] == "no-store"


async def test_prefer_wait_gives_up_after_its_seconds(server: Server, gates: Stage) -> None:
    answer = await server.post(
        "/v1/runs", {"graph": "gated", "input": {}}, headers={"Prefer": "wait=0.01"}
    )

    assert answer.status == 202
    assert answer.headers["location"] == f"/v1/runs/{answer.json()['run_id']}"
    assert answer.json()["status"] in ("pending", "running")


@pytest.mark.parametrize("value", ["soon", "nan", "-1", "inf"])
async def test_a_wait_that_is_no_number_is_named(server: Server, value: str) -> None:
    answer = await server.post(
        "/v1/runs", {"graph": "free", "input": {}}, headers={"Prefer": f"wait={value}"}
    )

    assert problem(answer, 422, "invalid_request")["field"] == "Prefer"


# What a body may hold.


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        pytest.param({"input": ...}, "body", "give input", id="neither input nor command"),
        pytest.param(
            {"command": {"goto": "count"}, "thread_id": "t"}, "body", "not both", id="both"
        ),
        pytest.param({"inputs": {}}, "inputs", "not permitted", id="unknown field"),
        pytest.param({"graph": ...}, "graph", "required", id="no graph"),
        pytest.param({"graph": 5}, "graph", "string", id="graph is no text"),
        pytest.param({"thread_id": "a b"}, "thread_id", "A-Z a-z 0-9", id="bad id"),
        pytest.param({"thread_id": "t\n"}, "thread_id", "A-Z a-z 0-9", id="id ends a line"),
        pytest.param({"thread_id": ""}, "thread_id", "1 to 128", id="empty id"),
        pytest.param({"thread_id": "x" * 129}, "thread_id", "1 to 128", id="long id"),
        pytest.param({"thread_id": "acme::t"}, "thread_id", "tenant", id="a tenant's id"),
        pytest.param({"checkpoint_id": "c"}, "checkpoint_id", "not supported yet", id="checkpoint"),
        pytest.param({"multitask": "enqueue"}, "multitask", "not supported yet", id="multitask"),
        pytest.param({"deadline_s": 0}, "deadline_s", "greater than 0", id="no time"),
        pytest.param({"deadline_s": "x"}, "deadline_s", "number", id="deadline is no number"),
        pytest.param({"stream": ["debug"]}, "stream.0", "'updates'", id="stream mode"),
        pytest.param({"durability": "never"}, "durability", "'sync'", id="durability"),
        pytest.param({"config": {"callbacks": []}}, "config.callbacks", "", id="config field"),
        pytest.param({"config": {"tags": "x"}}, "config.tags", "list", id="tags"),
        pytest.param(
            {"config": {"recursion_limit": 0}}, "config.recursion_limit", "", id="no steps"
        ),
        pytest.param(
            {"config": {"recursion_limit": 1001}},
            "config.recursion_limit",
            "more than 1000",
            id="recursion limit above the ceiling",
        ),
        pytest.param({"input": None}, "thread_id", "name the thread", id="continue what"),
        pytest.param({"input": [1]}, "input", "object", id="input is no object"),
        pytest.param(
            {"input": ..., "command": {}, "thread_id": "t"}, "command", "give", id="empty command"
        ),
        pytest.param(
            {"input": ..., "command": {"goto": "count"}}, "thread_id", "name it", id="command where"
        ),
        pytest.param(
            {"input": ..., "command": {"goto": "moon"}, "thread_id": "t"},
            "command.goto",
            "nodes: count",
            id="goto nowhere",
        ),
    ],
)
async def test_a_bad_field_is_named_with_its_remedy(
    server: Server, change: dict[str, Any], field: str, says: str
) -> None:
    body = {"graph": "free", "input": {}} | change
    answer = await server.post("/v1/runs", {k: v for k, v in body.items() if v is not ...})

    told = problem(answer, 422, "invalid_request")
    assert told["field"] == field
    assert says in told["detail"]
    assert "Value error" not in told["detail"]
    assert (await server.get("/v1/runs")).json()["runs"] == []


async def test_every_bad_field_is_listed(server: Server) -> None:
    answer = await server.post("/v1/runs", {"input": {}, "deadline_s": -1, "what": 1})

    errors = problem(answer, 422, "invalid_request")["errors"]
    assert {error["field"] for error in errors} == {"graph", "deadline_s", "what"}


@pytest.mark.parametrize(
    ("graph", "input", "field"),
    [
        pytest.param("needs", {"topic": "cats"}, "input.tone", id="schema"),
        pytest.param("typed", {"item": "pen", "amount": "many"}, "input.amount", id="pydantic"),
    ],
)
async def test_an_input_that_the_graph_refuses_is_no_run(
    server: Server, graph: str, input: Any, field: str
) -> None:
    answer = await server.post("/v1/runs", {"graph": graph, "input": input})

    assert problem(answer, 422, "invalid_request")["field"] == field


async def test_an_unknown_graph_is_answered_with_the_known_names(server: Server) -> None:
    answer = await server.post("/v1/runs", {"graph": "nope", "input": {}})

    told = problem(answer, 404, "graph_not_found")
    assert "gated" in told["known"]
    assert "gated" in told["detail"]


async def test_an_idempotency_key_is_not_supported_yet(server: Server) -> None:
    answer = await server.post(
        "/v1/runs", {"graph": "free", "input": {}}, headers={"Idempotency-Key": "k"}
    )

    told = problem(answer, 422, "invalid_request")
    assert told["field"] == "Idempotency-Key"
    assert "not supported yet" in told["detail"]


async def test_multitask_reject_is_what_happens_anyway(server: Server) -> None:
    await server.start("free", multitask="reject")


# Bodies that are no request at all.


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{", id="cut"),
        pytest.param(b'{"graph":"free","input":{"n":NaN}}', id="NaN"),
        pytest.param(b'{"graph":"free","input":{},"metadata":{"n":1e999}}', id="infinite"),
        pytest.param(b'{"graph":"free","input":{},"metadata":{"a":"\\ud800"}}', id="surrogate"),
        pytest.param(b'{"graph":"fr\xffee","input":{}}', id="not UTF-8"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deeper than a parser goes"),
        pytest.param(b"9" * 5000, id="a number of 5000 digits"),
    ],
)
async def test_a_body_that_is_no_json_is_400(server: Server, body: bytes) -> None:
    problem(await server.request("POST", "/v1/runs", body=body), 400, "invalid_json")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"1"])
async def test_a_body_that_is_no_object_is_422(server: Server, body: bytes) -> None:
    answer = await server.request("POST", "/v1/runs", body=body)

    assert problem(answer, 422, "invalid_request")["field"] == "body"


FORM = {"content-type": "application/x-www-form-urlencoded"}


async def test_a_body_without_a_type_is_json_as_curl_sends_it(server: Server) -> None:
    body = b'{"graph":"free","input":{}}'
    answer = await server.request("POST", "/v1/runs", body=body, headers=FORM)

    assert answer.status == 202, answer.body


async def test_a_form_from_a_page_of_another_site_is_refused(server: Server) -> None:
    body = b'{"graph":"free","input":{}}'
    headers = {**FORM, "origin": "https://example.com"}
    answer = await server.request("POST", "/v1/runs", body=body, headers=headers)

    told = problem(answer, 415, "unsupported_media_type")
    assert "Content-Type: application/json" in told["detail"]


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ("input", "input"),
        ("context", "context"),
        ("metadata", "metadata"),
        ("config.configurable", "config"),
        ("config.metadata", "config"),
        ("command.update", "command"),
        ("command.resume", "command"),
    ],
)
async def test_deep_nesting_is_refused_wherever_it_stands(
    server: Server, place: str, field: str
) -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    body: dict[str, Any] = {"graph": "free", "thread_id": "t"}
    outer, _, inner = place.partition(".")
    body[outer] = {inner: deep} if inner else deep
    if outer != "command":
        body.setdefault("input", {})

    answer = await server.post("/v1/runs", body)

    told = problem(answer, 422, "invalid_request")
    assert told["field"] == field
    assert "levels deep" in told["detail"]


async def test_an_integer_is_stored_exactly_or_refused(server: Server, gates: Stage) -> None:
    """A checkpoint holds integers of 64 bits; JavaScript's parser would round them sooner."""
    n = 2**64 - 1
    await server.ended("looks", config={"configurable": {"n": n, "m": -(2**63)}})
    answer = await server.post("/v1/runs", {"graph": "free", "input": {"n": n + 1}})

    assert (gates.seen["configurable"]["n"], gates.seen["configurable"]["m"]) == (n, -(2**63))
    assert problem(answer, 422, "invalid_request")["field"] == "input"


@pytest.mark.parametrize("counted", [True, False], ids=["content-length", "chunked"])
async def test_too_large_a_body_is_413(serve: Serving, counted: bool) -> None:
    async with serve(body_max=2048) as server:
        body = b'{"graph":"free","input":{"text":"' + b"x" * 2048 + b'"}}'
        chunks = [body] if counted else [body[i : i + 500] for i in range(0, len(body), 500)]
        answer = await server.request("POST", "/v1/runs", body=body if counted else chunks)

        told = problem(answer, 413, "body_too_large")
        assert "2048" in told["detail"]
        assert (await server.get("/v1/runs")).json()["runs"] == []


async def test_a_large_body_is_refused_by_its_header_alone(server: Server) -> None:
    answer = await server.request(
        "POST", "/v1/runs", body=b"{}", headers={"content-length": "9" * 5000}
    )

    problem(answer, 413, "body_too_large")


async def test_a_chunked_body_below_the_limit_is_read(server: Server) -> None:
    answer = await server.request(
        "POST", "/v1/runs", body=[b'{"graph":"free",', b'"input"', b":{}}"]
    )

    assert answer.status == 202


# What of a request reaches the graph.


async def test_reserved_keys_are_stripped(server: Server, gates: Stage) -> None:
    reserved = {
        "__pregel_checkpointer": "x",
        "checkpoint_ns": "x",
        "checkpoint_id": "x",
        "thread_id": "theirs",
        "run_id": "x",
        "sereno_run": "x",
    }
    result = await server.wait(
        await server.start(
            "looks",
            thread_id="ours",
            metadata={**reserved, "team": "a"},
            config={
                "configurable": {**reserved, "user": "u"},
                "metadata": {**reserved, "ticket": 1},
                "tags": ["x"],
                "recursion_limit": 7,
            },
            context={"city": "Rome", "none": None},
        )
    )

    assert result["status"] == "success"
    configurable, metadata = gates.seen["configurable"], gates.seen["metadata"]
    assert configurable["thread_id"] == "ours"
    assert configurable["user"] == "u"
    assert configurable["__pregel_checkpointer"] != "x"
    assert configurable.get("checkpoint_id") != "x"
    assert "sereno_run" not in configurable
    assert (metadata["team"], metadata["ticket"]) == ("a", 1)
    assert metadata["sereno_run"] == result["run_id"]
    assert metadata["thread_id"] == "ours"
    assert "x" not in metadata.values()
    assert gates.seen["tags"] == ["x"]
    assert gates.seen["recursion_limit"] == 7
    assert gates.seen["context"] == {"city": "Rome", "none": None}


async def test_a_recursion_limit_ends_the_run(server: Server) -> None:
    run_id = await server.start("endless", config={"recursion_limit": 3})

    result = await server.wait(run_id)
    assert (result["status"], result["error"]["code"]) == ("error", "recursion_limit")


async def test_a_deadline_ends_the_run(server: Server, gates: Stage) -> None:
    result = await server.wait(await server.start("gated", deadline_s=0.05))

    lines = (await server.replay(result["run_id"])).lines()
    assert (result["status"], result["error"]["code"]) == ("timeout", "deadline")
    assert lines[-1]["type"] == "run.timed_out"


async def test_no_modes_leave_what_happens_and_no_more(server: Server) -> None:
    run_id = await server.ended("free", stream=[])

    lines = (await server.replay(run_id)).lines()
    assert (await server.get(f"/v1/runs/{run_id}")).json()["stream"] == []
    assert "node.completed" in {line["type"] for line in lines}
    assert not [line for line in lines if "update" in line["data"]]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_a_run_may_choose_its_durability(server: Server, durability: str) -> None:
    result = await server.wait(await server.start("free", durability=durability))

    assert result["status"] == "success"


@pytest.mark.parametrize(
    ("modes", "recorded", "values", "updates"),
    [
        (None, ["updates", "messages", "custom"], False, True),
        (["values"], ["values"], True, False),
        (["custom", "values", "updates", "values"], ["updates", "values", "custom"], True, True),
    ],
    ids=["default", "values", "several"],
)
async def test_modes_are_recorded(
    server: Server, modes: Any, recorded: list[str], values: bool, updates: bool
) -> None:
    run_id = await server.ended("free", stream=modes)

    lines = (await server.replay(run_id)).lines()
    completed = next(line for line in lines if line["type"] == "node.completed")
    assert (await server.get(f"/v1/runs/{run_id}")).json()["stream"] == recorded
    assert ("values" in {line["type"] for line in lines}) is values
    assert ("update" in completed["data"]) is updates


async def test_messages_are_recorded_only_when_asked_for(server: Server) -> None:
    input = {"messages": [{"role": "user", "content": "hi"}]}
    told = await server.replay(await server.ended("talks", input))
    silent = await server.replay(await server.ended("talks", input, stream=["updates"]))

    assert "message" in told.types()
    assert "message" not in silent.types()


# Threads.


async def test_a_busy_thread_refuses_another_run(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", thread_id="t")
    await gates.arrival("first")

    answer = await server.post("/v1/runs", {"graph": "free", "input": {}, "thread_id": "t"})

    assert problem(answer, 409, "thread_busy")["active_run"] == run_id


async def test_input_null_goes_on_from_the_threads_state(server: Server) -> None:
    await server.ended("stops", {"n": 1}, thread_id="t")

    answer = await server.post("/v1/runs", {"graph": "stops", "input": None, "thread_id": "t"})
    result = await server.wait(answer.json()["run_id"])

    assert result["status"] == "interrupted"  # at its question, after the breakpoint
    assert (await server.get("/v1/threads/t/state")).json()["values"]["n"] == 2


async def test_a_command_updates_and_goes_to_a_node(server: Server) -> None:
    await server.ended("free", {"n": 1}, thread_id="t")

    answer = await server.post(
        "/v1/runs",
        {
            "graph": "free",
            "thread_id": "t",
            "command": {"update": {"n": 40, "text": None}, "goto": "count"},
        },
    )
    result = await server.wait(answer.json()["run_id"])

    assert (result["output"]["n"], result["output"]["text"]) == (41, None)


@pytest.mark.parametrize("answer", ["yes", None], ids=["text", "null"])
async def test_a_command_answers_an_interrupt(server: Server, answer: Any) -> None:
    await server.ended("asks", thread_id="t")

    started = await server.post(
        "/v1/runs", {"graph": "asks", "thread_id": "t", "command": {"resume": answer}}
    )
    assert started.status == 202, started.body
    result = await server.wait(started.json()["run_id"])

    assert (result["status"], result["output"]["log"]) == ("success", [f"answer={answer}"])


async def test_a_command_resumes_a_static_breakpoint(server: Server) -> None:
    await server.ended("stops", {"n": 1}, thread_id="t")

    started = await server.post(
        "/v1/runs", {"graph": "stops", "thread_id": "t", "command": {"resume": True}}
    )
    result = await server.wait(started.json()["run_id"])

    assert result["status"] == "interrupted"
    assert (await server.get("/v1/threads/t/state")).json()["next"] == ["ask"]


async def test_a_resume_with_nothing_pending_is_refused(server: Server) -> None:
    await server.ended("free", thread_id="t")

    answer = await server.post(
        "/v1/runs", {"graph": "free", "thread_id": "t", "command": {"resume": 1}}
    )

    assert problem(answer, 422, "invalid_request")["field"] == "command.resume"


# Not now.


async def test_a_full_queue_is_503_with_retry_after(serve: Serving, gates: Stage) -> None:
    async with serve(slots=1, queue_max=1) as server:
        await server.start("gated")
        await gates.arrival("first")
        await server.start("free")
        answer = await server.post("/v1/runs", {"graph": "free", "input": {}})

    problem(answer, 503, "queue_full")
    assert answer.headers["retry-after"] == "5"


async def test_a_draining_server_takes_no_runs(server: Server) -> None:
    await server.worker.drain()

    answer = await server.post("/v1/runs", {"graph": "free", "input": {}})

    problem(answer, 503, "draining")
    assert answer.headers["retry-after"] == "5"


async def test_runs_start_side_by_side(server: Server, gates: Stage) -> None:
    starts = [server.start("gated", thread_id=f"t-{i}") for i in range(8)]
    run_ids = await asyncio.gather(*starts)
    gates.open("first", "second")
    results = await asyncio.gather(*map(server.wait, run_ids))

    assert {result["status"] for result in results} == {"success"}
    assert len(set(run_ids)) == 8
