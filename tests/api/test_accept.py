"""Which form of an answer a client gets, by its `Accept`."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.api import accept
from runtime.api.accept import LONGEST, _range, preferred

from .harness import Server, problem

JSON = "application/json"
NDJSON = "application/x-ndjson"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        pytest.param("", JSON, id="nothing"),
        pytest.param(" , ", JSON, id="an empty list"),
        pytest.param("*/*", JSON, id="curl"),
        pytest.param("*", JSON, id="a bare star"),
        pytest.param("application/*", JSON, id="a family"),
        pytest.param(BROWSER, JSON, id="a browser"),
        pytest.param("application/json, text/plain, */*", JSON, id="axios"),
        pytest.param(JSON, JSON, id="JSON"),
        pytest.param(NDJSON, NDJSON, id="NDJSON"),
        pytest.param("Application/X-NDJSON; charset=utf-8", NDJSON, id="as a content type"),
        pytest.param("application/x-ndjson, */*", NDJSON, id="named before a wildcard"),
        pytest.param("*/*, application/x-ndjson", NDJSON, id="named after a wildcard"),
        pytest.param("*/*;q=0.1, application/x-ndjson", NDJSON, id="a wildcard liked less"),
        pytest.param("application/x-ndjson;q=0.5, */*", JSON, id="a wildcard liked more"),
        pytest.param("application/json;q=0.9, application/x-ndjson", NDJSON, id="liked more"),
        pytest.param("application/json, application/x-ndjson;q=0.9", JSON, id="liked less"),
        pytest.param("application/x-ndjson, application/json", NDJSON, id="the first of two"),
        pytest.param("application/json, application/x-ndjson", JSON, id="the other first"),
        pytest.param("*/*, application/json;q=0", NDJSON, id="refused by name"),
        pytest.param("*/*;q=0, application/x-ndjson", NDJSON, id="all others refused"),
        pytest.param(
            "application/json ; Q=0.2 , application/x-ndjson ; q=0.3", NDJSON, id="spaces"
        ),
        pytest.param("application/x-ndjson;q=high, */*;q=0.1", JSON, id="a q that is no number"),
        pytest.param("application/x-ndjson;q=nan, */*;q=0.1", JSON, id="nor is this"),
        pytest.param("application/x-ndjson;q=1_0, */*;q=0.1", JSON, id="nor this"),
        pytest.param("application/x-ndjson;q=1e0, */*;q=0.1", JSON, id="nor that"),
        pytest.param("application/x-ndjson;q=\u0661, */*;q=0.1", JSON, id="nor a foreign digit"),
        pytest.param("application/x-ndjson;q=, */*;q=0.1", JSON, id="an empty q"),
        pytest.param("application/json;q=.2, application/x-ndjson;q=1.", NDJSON, id="halves"),
        pytest.param("text/html, *; q=.2, */*; q=.2", JSON, id="Java"),
        pytest.param(f"{NDJSON}, {'a/b,' * 20_000}", NDJSON, id="a long list"),
        pytest.param(f"{'a/b,' * 20_000} {NDJSON}", None, id="the end of a long list"),
        pytest.param(f"{JSON}, {'a' * (LONGEST - 35)}/b, {NDJSON};q=0.01", JSON, id="cut off"),
        pytest.param("a" * 65_000, JSON, id="nothing but length"),
        pytest.param("text/event-stream", None, id="another form"),
        pytest.param("application/problem+json", None, id="errors only"),
        pytest.param("application/json;q=0, application/x-ndjson;q=0.0", None, id="neither"),
        pytest.param("*/*;q=0", None, id="nothing at all"),
        pytest.param("json", None, id="no media type"),
        pytest.param("application/x-ndjson-not", None, id="a longer name"),
    ],
)
def test_what_an_accept_header_likes_best(accept: str, form: str | None) -> None:
    assert preferred(accept, (JSON, NDJSON)) == form


@pytest.mark.parametrize("part", ["a/b,", "a,", "*/*;q=0,", ";", "a;", ",", "q=0;"])
def test_a_long_header_is_read_as_fast_as_a_short_one(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def counted(text: str, at: int) -> object:
        nonlocal read
        read += len(text) + 1
        return _range(text, at)

    monkeypatch.setattr(accept, "_range", counted)
    preferred(part * 65_536, (JSON, NDJSON))

    assert read <= LONGEST


STARTS = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/runs", {"graph": "free", "input": {}}),
        ("/v1/threads/asked/resume", {"resume": 1}),
    ],
    ids=["start", "resume"],
)


@STARTS
@pytest.mark.parametrize(
    ("accept", "status", "media_type"),
    [
        ("*/*", 202, JSON),
        (BROWSER, 202, JSON),
        ("application/json", 202, JSON),
        ("application/json;q=0.5, application/x-ndjson", 200, f"{NDJSON}; charset=utf-8"),
        ("text/html, application/x-ndjson;q=0.1", 200, f"{NDJSON}; charset=utf-8"),
    ],
)
async def test_a_start_answers_in_the_form_that_is_liked(
    server: Server, path: str, body: Any, accept: str, status: int, media_type: str
) -> None:
    await server.ended("asks", thread_id="asked")
    answer = await server.post(path, body, headers={"Accept": accept})

    assert (answer.status, answer.headers["content-type"]) == (status, media_type)


@STARTS
async def test_who_takes_no_form_starts_no_run_and_is_told_what_to_ask_for(
    server: Server, path: str, body: Any
) -> None:
    await server.ended("asks", thread_id="asked")
    before = (await server.get("/v1/runs")).json()
    answer = await server.post(path, body, headers={"Accept": "text/event-stream"})
    told = problem(answer, 406, "not_acceptable")

    assert told["field"] == "Accept"
    assert "'text/event-stream'" in told["detail"]
    assert f"ask for {JSON} or {NDJSON}, or leave the header out" in told["detail"]
    assert (await server.get("/v1/runs")).json() == before


@STARTS
async def test_a_preference_that_cannot_be_read_starts_no_run(
    server: Server, path: str, body: Any
) -> None:
    await server.ended("asks", thread_id="asked")
    before = (await server.get("/v1/runs")).json()
    answer = await server.post(path, body, headers={"Prefer": "wait=soon"})

    assert problem(answer, 422, "invalid_request")["field"] == "Prefer"
    assert (await server.get("/v1/runs")).json() == before


@pytest.mark.parametrize("accept", ["*/*", BROWSER, JSON, "text/event-stream", "*/*;q=0", ""])
async def test_where_there_is_one_form_it_is_given(server: Server, accept: str) -> None:
    run_id = await server.ended("free", stream=["values"])
    for path, media_type in {
        f"/v1/runs/{run_id}": JSON,
        f"/v1/runs/{run_id}/stream": f"{NDJSON}; charset=utf-8",
        f"/v1/runs/{run_id}/wait": JSON,
        f"/v1/threads/{run_id}/state": JSON,
        "/v1/graphs/free/drawing": JSON,
        "/health": JSON,
        "/livez": "text/plain; charset=utf-8",
        "/readyz": JSON,
        "/info": JSON,
        "/openapi.json": JSON,
    }.items():
        answer = await server.get(path, headers={"Accept": accept})

        assert (answer.status, answer.headers["content-type"]) == (200, media_type), path


async def test_a_problem_is_a_problem_whatever_is_accepted(server: Server) -> None:
    answer = await server.get("/v1/runs/nope/stream", headers={"Accept": NDJSON})

    problem(answer, 404, "run_not_found")
