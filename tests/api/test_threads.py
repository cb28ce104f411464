"""Threads: their state, and answers to what a run has asked."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Serving
from .graphs.play import Stage
from .harness import NDJSON, Server, problem


async def state(server: Server, thread_id: str = "t") -> dict[str, Any]:
    answer = await server.get(f"/v1/threads/{thread_id}/state")
    assert answer.status == 200, answer.body
    body: dict[str, Any] = answer.json()
    return body


async def test_a_thread_tells_its_values(server: Server) -> None:
    run_id = await server.ended("free", {"n": 4}, thread_id="t")
    seen = await state(server)

    assert seen["values"] == {"n": 5, "log": ["count"]}
    assert (seen["thread_id"], seen["graph"]) == ("t", "free")
    assert (seen["next"], seen["interrupts"], seen["active_run"]) == ([], [], None)
    assert seen["checkpoint_id"]
    assert run_id


async def test_a_thread_tells_what_comes_next_and_what_it_waits_for(server: Server) -> None:
    run_id = await server.ended("asks", thread_id="t")
    seen = await state(server)
    terminal = (await server.replay(run_id)).lines()[-1]

    assert seen["next"] == ["ask"]
    assert [i["value"] for i in seen["interrupts"]] == [{"question": "go on?"}]
    assert [i["id"] for i in seen["interrupts"]] == [
        i["id"] for i in terminal["data"]["interrupts"]
    ]
    assert terminal["data"]["next"] == ["ask"]


async def test_a_question_comes_with_the_schema_of_its_answer(server: Server) -> None:
    run_id = await server.ended("asks_fully", thread_id="t")
    (asked,) = (await state(server))["interrupts"]
    (told,) = (await server.replay(run_id)).lines()[-1]["data"]["interrupts"]

    assert asked["response_schema"]["properties"] == {"approve": {"type": "boolean"}}
    assert asked.items() <= told.items()


async def test_a_threads_state_can_be_seen_while_it_runs(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", thread_id="t")
    gates.open("first")
    await gates.arrival("second")
    seen = await state(server)

    assert seen["values"]["log"] == ["first"]
    assert (seen["next"], seen["active_run"]) == (["second"], run_id)


async def test_a_thread_whose_run_still_waits_is_empty(serve: Serving, gates: Stage) -> None:
    async with serve(slots=1) as server:
        await server.start("gated")
        await gates.arrival("first")
        run_id = await server.start("free", {"n": 1}, thread_id="t")
        seen = await state(server)

    assert (seen["values"], seen["next"], seen["checkpoint_id"]) == ({}, [], None)
    assert seen["active_run"] == run_id


async def test_a_state_may_hold_the_classes_that_it_declares(server: Server) -> None:
    await server.ended("holds", thread_id="t")

    assert (await state(server))["values"] == {"thing": {"size": 3}}


async def test_a_thread_is_held_by_a_node_that_does_not_stop(serve: Serving, gates: Stage) -> None:
    async with serve(cancel_grace_s=0.02) as server:
        run_id = await server.start("keeps", thread_id="t")
        await gates.arrival("keep")
        await server.post(f"/v1/runs/{run_id}/cancel")
        assert (await server.wait(run_id))["status"] == "cancelled"
        answer = await server.post("/v1/runs", {"graph": "free", "input": {}, "thread_id": "t"})
        gates.open("keep")

    told = problem(answer, 409, "thread_held")
    assert (told["run_id"], told["thread_id"]) == (run_id, "t")
    assert told["node"] == "keep"


async def test_a_state_that_json_has_no_word_for_is_told(server: Server) -> None:
    await server.ended("talks", {"messages": [{"role": "user", "content": "hi"}]}, thread_id="t")
    messages = (await state(server))["values"]["messages"]

    assert [message["content"] for message in messages] == ["hi", "hello"]


async def test_a_run_goes_on_from_the_threads_state(server: Server) -> None:
    for _ in range(3):
        await server.ended("free", thread_id="t")
    await server.ended("free", thread_id="other")

    assert (await state(server))["values"] == {"n": 3, "log": ["count"] * 3}
    assert (await state(server, "other"))["values"]["n"] == 1


@pytest.mark.parametrize("path", ["/state", "/resume"])
async def test_an_unknown_thread_is_404(server: Server, path: str) -> None:
    method = "GET" if path == "/state" else "POST"
    answer = await server.request(method, f"/v1/threads/nope{path}", body=b'{"resume":1}')

    assert problem(answer, 404, "thread_not_found")["thread_id"] == "nope"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/history"), ("POST", "/fork"), ("DELETE", "")],
)
async def test_the_rest_of_threads_comes_later(server: Server, method: str, path: str) -> None:
    await server.ended("free", thread_id="t")

    problem(await server.request(method, f"/v1/threads/t{path}"), 404, "not_found")


# Answers.


@pytest.mark.parametrize(
    "answer",
    [True, None, "yes", 5, [1], {}, {"text": "yes", "none": None}],
    ids=["bool", "null", "text", "int", "list", "empty", "object"],
)
async def test_a_bare_answer_meets_the_one_question(server: Server, answer: Any) -> None:
    before = await server.ended("asks", thread_id="t")
    started = await server.post("/v1/threads/t/resume", {"resume": answer})
    body = started.json()
    result = await server.wait(body["run_id"])
    lines = (await server.replay(body["run_id"])).lines()

    assert started.status == 202
    assert started.headers["location"] == f"/v1/runs/{body['run_id']}"
    assert body["run_id"] != before
    assert body["thread_id"] == "t"
    assert result["output"]["log"] == [f"answer={answer}"]
    assert lines[0]["data"]["trigger"] == "resume"


async def test_answers_are_given_by_id(server: Server) -> None:
    await server.ended("asks_two", thread_id="t")
    ids = {i["value"]: i["id"] for i in (await state(server))["interrupts"]}
    body = {"resume": {ids["right?"]: "r", ids["left?"]: "l"}}
    result = await server.wait((await server.post("/v1/threads/t/resume", body)).json()["run_id"])

    assert sorted(result["output"]["log"]) == ["left=l", "right=r"]


async def test_one_of_two_questions_may_be_answered_first(server: Server) -> None:
    await server.ended("asks_two", thread_id="t")
    for said in ("left?", "right?"):
        ids = {i["value"]: i["id"] for i in (await state(server))["interrupts"]}
        started = await server.post("/v1/threads/t/resume", {"resume": {ids[said]: said}})
        result = await server.wait(started.json()["run_id"])

    assert result["status"] == "success"
    assert sorted(result["output"]["log"]) == ["left=left?", "right=right?"]


async def test_a_bare_answer_to_two_questions_is_refused_with_their_ids(server: Server) -> None:
    await server.ended("asks_two", thread_id="t")
    told = problem(
        await server.post("/v1/threads/t/resume", {"resume": "yes"}), 422, "invalid_request"
    )

    assert told["field"] == "resume"
    for interrupt in (await state(server))["interrupts"]:
        assert interrupt["id"] in told["detail"]


async def test_an_answer_to_a_question_that_nobody_asked_is_refused(server: Server) -> None:
    await server.ended("asks", thread_id="t")
    (pending,) = (await state(server))["interrupts"]
    unknown = "0" * 32
    for body in ({unknown: 1}, {pending["id"]: 1, "other": 2}):
        told = problem(
            await server.post("/v1/threads/t/resume", {"resume": body}), 422, "invalid_request"
        )
        assert told["field"] == f"resume.{unknown if unknown in body else 'other'}"
        assert pending["id"] in told["detail"]


async def test_where_nothing_is_pending_nothing_is_answered(server: Server) -> None:
    run_id = await server.ended("free", thread_id="t")
    answer = await server.post("/v1/threads/t/resume", {"resume": 1})

    assert problem(answer, 422, "invalid_request")["field"] == "resume"
    assert [run["run_id"] for run in (await server.get("/v1/runs")).json()["runs"]] == [run_id]


async def test_a_static_breakpoint_is_passed_and_its_value_ignored(server: Server) -> None:
    run_id = await server.ended("stops", {"n": 1}, thread_id="t")
    assert (await server.wait(run_id))["next"] == ["count"]
    assert (await server.wait(run_id))["interrupts"] == []

    started = await server.post("/v1/threads/t/resume", {"resume": "whatever"})
    asked = await server.wait(started.json()["run_id"])
    started = await server.post("/v1/threads/t/resume", {"resume": "fine"})
    result = await server.wait(started.json()["run_id"])

    assert (asked["status"], asked["next"]) == ("interrupted", ["ask"])
    assert result["output"] == {"n": 2, "log": ["count", "answer=fine"]}


async def test_a_busy_thread_takes_no_answer(server: Server, gates: Stage) -> None:
    run_id = await server.start("gated", thread_id="t")
    answer = await server.post("/v1/threads/t/resume", {"resume": 1})

    assert problem(answer, 409, "thread_busy")["active_run"] == run_id


async def test_an_answer_can_be_streamed_and_waited_for(server: Server) -> None:
    await server.ended("asks", thread_id="t")
    streamed = await server.post("/v1/threads/t/resume", {"resume": 1}, headers=NDJSON)
    await server.ended("asks", thread_id="u")
    waited = await server.post("/v1/threads/u/resume", {"resume": 2}, headers={"Prefer": "wait=30"})

    assert streamed.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    assert streamed.types()[0] == "run.queued"
    assert streamed.types()[-1] == "run.completed"
    assert (waited.status, waited.json()["output"]["log"]) == (200, ["answer=2"])


async def test_an_answer_keeps_what_the_run_was_told(server: Server) -> None:
    await server.ended("asks", thread_id="t", stream=["values"], metadata={"team": "a"})
    first = (await server.post("/v1/threads/t/resume", {"resume": 1})).json()
    await server.wait(first["run_id"])
    await server.ended("asks", thread_id="u", stream=["values"])
    body = {"resume": 1, "stream": ["custom"], "deadline_s": 60}
    second = (await server.post("/v1/threads/u/resume", body)).json()

    assert (first["stream"], first["metadata"]) == (["values"], {"team": "a"})
    assert second["stream"] == ["custom"]
    assert second["deadline"] is not None


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "resume"), ({"resume": 1, "input": {}}, "input"), ({"resume": 2**70}, "resume")],
)
async def test_a_bad_answer_is_named(server: Server, body: Any, field: str) -> None:
    await server.ended("asks", thread_id="t")
    answer = await server.post("/v1/threads/t/resume", body)

    assert problem(answer, 422, "invalid_request")["field"] == field
