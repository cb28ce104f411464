"""The OpenAPI document is valid, and what it says of the app is so."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from fastapi.openapi.utils import get_openapi
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from runtime import errors
from runtime.app import create_app
from runtime.errors import InvalidRequest, LeaseLost, LogLimit, SerenoError, StartupError
from runtime.events import STORED_TYPES, UNSTORED_TYPES
from runtime.settings import Settings

from .conftest import Serving
from .graphs.play import Stage
from .harness import Server, problem

ROOT = Path(__file__).parents[2]
EXAMPLES = 200
#: What HTTP itself needs.
FRAMING = {"content-type", "content-length"}
#: Operations of which every answer is plain.
PLAIN = {"/health", "/livez", "/readyz", "/startupz", "/metrics", "/info", "/v1/graphs"}

Document = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Document:
    return create_app(Settings(), []).openapi()


def operations(document: Document) -> Iterator[tuple[str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def problems_of(operation: Document) -> Iterator[tuple[str, Document]]:
    """Status and example of each problem that an operation lists."""
    for status, response in operation["responses"].items():
        content = response.get("content", {}).get("application/problem+json", {})
        for example in content.get("examples", {}).values():
            yield status, example["value"]


def validator(document: Document, name: str) -> jsonschema_rs.Validator:
    ref = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema_rs.validator_for(ref)


def test_the_document_is_valid(document: Document) -> None:
    schemathesis.openapi.from_dict(document).validate()


def test_every_reference_has_its_target(document: Document) -> None:
    for ref in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
        found: Any = document
        for part in ref.split("/"):
            found = found[part]
        assert found, ref


def test_every_operation_says_what_it_does(document: Document) -> None:
    for name, operation in operations(document):
        assert operation.get("summary"), name
        assert operation.get("description"), name
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), f"{name} {parameter['name']}"
        for status, response in operation["responses"].items():
            assert response["description"] != "Successful Response", name
            assert response["headers"], name
            assert response.get("content") or status == "204", f"{name} {status}"


def test_every_body_has_an_example_that_is_valid(document: Document) -> None:
    for name, operation in operations(document):
        if (body := operation.get("requestBody")) is None:
            continue
        (content,) = body["content"].values()
        schema = content["schema"]
        examples = [e["value"] for e in content.get("examples", {}).values()]
        examples += schema.get("examples", ())
        check = jsonschema_rs.validator_for({**schema, "components": document["components"]})

        assert examples, name
        for example in examples:
            assert check.is_valid(example), f"{name}: {example}"


def test_every_answer_has_an_example_that_is_valid(document: Document) -> None:
    for name, operation in operations(document):
        for status, response in operation["responses"].items():
            for media_type, content in response.get("content", {}).items():
                where, schema = f"{name} {status} {media_type}", content["schema"]
                shown = [e["value"] for e in content.get("examples", {}).values()]
                shown += [content["example"]] if "example" in content else []
                if (named := schema.get("$ref", "").rpartition("/")[2]) and not shown:
                    shown = document["components"]["schemas"][named].get("examples", [])
                check = jsonschema_rs.validator_for(
                    {**schema, "components": document["components"]}
                )

                assert shown or not schema, where
                if media_type != "application/x-ndjson":  # looked at line by line
                    for example in shown:
                        assert check.is_valid(example), f"{where}: {example}"


def test_every_other_example_is_valid(document: Document) -> None:
    """Of parameters, headers, and members of schemas."""
    parts: list[Document] = [*document["components"]["headers"].values()]
    for _, operation in operations(document):
        parts += operation.get("parameters", ())
    for part in parts:
        schema = {**part["schema"], "components": document["components"]}
        check = jsonschema_rs.validator_for(schema)
        for example in [*part["schema"].get("examples", ()), part.get("example")]:
            assert example is None or check.is_valid(example), part
    for name, schema in document["components"]["schemas"].items():
        for member, of in schema.get("properties", {}).items():
            check = jsonschema_rs.validator_for({**of, "components": document["components"]})
            for example in of.get("examples", ()):
                assert check.is_valid(example), f"{name}.{member}: {example}"


async def test_answers_have_the_members_of_their_examples(
    server: Server, document: Document
) -> None:
    await server.ended("asks", thread_id="t")
    waits = await server.start("gated")
    good = await server.ended("free", metadata={"asked_by": "ana"})
    for name, path in {
        "RunInfo": f"/v1/runs/{good}",
        "RunList": "/v1/runs",
        "GraphInfo": "/v1/graphs/gated",
        "GraphList": "/v1/graphs",
        "GraphSchema": "/v1/graphs/gated/schema",
        "Drawing": "/v1/graphs/gated/drawing",
        "Health": "/health",
        "Info": "/info",
        "ThreadState": "/v1/threads/t/state",
        "RunResult": f"/v1/runs/{good}/wait",
        "NotYet": f"/v1/runs/{waits}/wait?timeout=0",
    }.items():
        (example,) = document["components"]["schemas"][name]["examples"]
        url, _, query = path.partition("?")
        answer = (await server.get(url, query=query.encode())).json()

        if name == "RunResult":  # what does not apply is absent
            assert answer.keys() <= example.keys()
        else:
            assert answer.keys() == example.keys(), name
    (row,) = document["components"]["schemas"]["RunList"]["examples"][0]["runs"]
    listed = (await server.get("/v1/runs")).json()["runs"]

    assert all(run.keys() == row.keys() for run in listed)
    assert not {"result", "queue_position"} & row.keys()  # they would be null in each


def test_every_problem_has_an_example_that_is_valid(document: Document) -> None:
    check = validator(document, "Problem")
    for name, operation in operations(document):
        found = list(problems_of(operation))
        for status, example in found:
            assert check.is_valid(example), f"{name} {status}"
            assert str(example["status"]) == status or status == "default", name
        listed = {status for status in operation["responses"] if status >= "400"} - {"default"}
        assert listed == {status for status, _ in found if status != "default"} or (
            name.removeprefix("GET ") in PLAIN
        ), name


def test_every_error_of_ours_is_in_the_document(document: Document) -> None:
    listed = {example["code"] for _, op in operations(document) for _, example in problems_of(op)}

    assert _codes(SerenoError) <= listed


def _codes(kind: type[SerenoError]) -> set[str]:
    """The codes of errors that a request can meet; a family's own code is nobody's."""
    if issubclass(kind, StartupError | LeaseLost | LogLimit):
        return set()
    below = set().union(*(_codes(child) for child in kind.__subclasses__()))
    return below if below and kind is not InvalidRequest else below | {kind.code}


def test_every_code_that_the_api_says_is_in_the_document_and_no_other(document: Document) -> None:
    listed = {example["code"] for _, op in operations(document) for _, example in problems_of(op)}
    said = _codes(SerenoError)
    for path in [*ROOT.glob("runtime/api/*.py"), ROOT / "runtime/app.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(args=[_, ast.Constant(str(code)), *_]) if _called(node) == "problem":
                    said.add(code)
                case ast.Call(args=[ast.Constant(int(status)), *_]) if (
                    _called(node) == "HTTPException"
                ):
                    said.add(HTTPStatus(status).phrase.lower().replace(" ", "_"))
                case ast.Raise(exc=ast.Call(func=ast.Name(name))) if hasattr(errors, name):
                    said.add(getattr(errors, name).code)

    assert listed == said - {StartupError.code} | {"internal"}
    assert {"body_too_large", "invalid_json", "unsupported_media_type"} <= said
    for code in ("not_found", "method_not_allowed"):  # of no operation: by the router
        assert f"`{code}`" in document["info"]["description"]


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


async def test_the_document_is_built_once_when_asked_for_and_not_on_the_event_loop(
    serve: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_by: list[threading.Thread] = []

    def noted(**told: Any) -> Document:
        built_by.append(threading.current_thread())
        return get_openapi(**told)

    monkeypatch.setattr("fastapi.applications.get_openapi", noted)
    async with serve() as server:
        at_start = list(built_by)
        answers = await asyncio.gather(*(server.get("/openapi.json") for _ in range(3)))
        answers.append(await server.get("/openapi.json"))

    assert at_start == []
    assert len(built_by) == 1
    assert built_by[0] is not threading.current_thread()
    assert {(answer.status, answer.headers["content-type"]) for answer in answers} == {
        (200, "application/json")
    }
    assert len({answer.body for answer in answers}) == 1
    assert answers[0].json() == create_app(Settings(), []).openapi()


@pytest.mark.parametrize("known", ["{}", "W/{}", '"other", {}', "*"])
async def test_who_has_the_document_is_not_sent_it_again(server: Server, known: str) -> None:
    whole = await server.get("/openapi.json")
    tag = whole.headers["etag"]
    again = await server.get("/openapi.json", headers={"If-None-Match": known.format(tag)})
    other = await server.get("/openapi.json", headers={"If-None-Match": '"other"'})

    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert whole.headers["cache-control"] == again.headers["cache-control"] == "no-cache"
    assert (other.status, other.body) == (200, whole.body)


def test_a_run_is_named_by_the_headers_of_what_starts_or_follows_it(document: Document) -> None:
    for path, method, status in (
        ("/v1/runs", "post", "202"),
        ("/v1/runs", "post", "200"),
        ("/v1/threads/{thread_id}/resume", "post", "202"),
        ("/v1/runs/{run_id}/stream", "get", "200"),
        ("/v1/runs/{run_id}/cancel", "post", "202"),
        ("/api/stream", "get", "200"),
    ):
        headers = document["paths"][path][method]["responses"][status]["headers"]
        assert {"Location", "X-Run-Id", "X-Trace-Id"} <= headers.keys(), path


def test_every_type_of_line_has_a_schema(document: Document) -> None:
    mapping = document["components"]["schemas"]["Line"]["discriminator"]["mapping"]

    assert {*mapping, "error"} == {*STORED_TYPES, *UNSTORED_TYPES}


def test_the_streams_that_are_shown_are_lines(document: Document) -> None:
    shown = 0
    for name, operation in operations(document):
        for response in operation["responses"].values():
            content = response.get("content", {}).get("application/x-ndjson")
            if content is None:
                continue
            schema = content["schema"]["$ref"].rpartition("/")[2]
            check = validator(document, schema)
            for line in content["examples"]["stream"]["value"].splitlines():
                assert check.is_valid(json.loads(line)), f"{name}: {line}"
                shown += 1
    assert shown


@pytest.mark.parametrize("settings", [{}, {"line_max": 1024}], ids=["whole", "moved"])
async def test_lines_are_as_the_document_says(
    serve: Serving, gates: Stage, document: Document, settings: dict[str, Any]
) -> None:
    gates.open("first", "second", "burst")
    check = validator(document, "Line")
    seen = set()
    modes = ["updates", "values", "messages", "custom"]
    async with serve(**settings) as server:
        for graph, input in (
            ("gated", {}),
            ("asks", {}),
            ("fails", {}),
            ("stops", {}),
            ("talks", {"messages": []}),
            ("bursts", {"n": 3}),
            ("grows", {"n": 2000}),
        ):
            run_id = await server.ended(graph, input, stream=modes, metadata={"a": "b"})
            for line in (await server.replay(run_id, heartbeat=1)).lines():
                seen.add(line["type"])
                assert check.is_valid(line), line

    assert {"custom", "message", "node.interrupted", "run.failed", "run.interrupted"} <= seen


@pytest.mark.parametrize("path", ["/v1/runs/{}/stream", "/api/stream?run_id={}"])
@pytest.mark.parametrize(
    ("value", "status"),
    [
        pytest.param("0.000001", 422, id="a flood"),
        pytest.param("0.09", 422, id="below the floor"),
        pytest.param("0.1", 200, id="the floor"),
        pytest.param("0", 200, id="off"),
        pytest.param("-1", 422, id="negative"),
        pytest.param("nan", 422, id="no number"),
    ],
)
async def test_heartbeats_are_not_closer_than_the_floor(
    server: Server, path: str, value: str, status: int
) -> None:
    run_id = await server.ended("free", stream=["values"])
    url, _, query = path.format(run_id).partition("?")
    answer = await server.get(url, query=f"{query}&heartbeat={value}".encode())

    if status == 422:
        assert problem(answer, 422, "invalid_request")["field"] == "heartbeat"
    assert answer.status == status


@pytest.fixture
def running(serve: Serving) -> Iterator[tuple[asyncio.Runner, Server]]:
    """A server on a loop of its own, which stays between the examples."""
    with asyncio.Runner() as runner:
        serving = serve(default_graph="free", heartbeat_s=0.0)
        server = runner.run(serving.__aenter__())
        try:
            yield runner, server
        finally:
            runner.run(serving.__aexit__(None, None, None))


def test_the_app_keeps_to_its_document(running: tuple[asyncio.Runner, Server]) -> None:
    """Whatever is asked: no 5xx, and only documented statuses, types, headers, codes, bodies."""
    runner, server = running
    document = runner.run(server.get("/openapi.json")).json()
    for _, operation in operations(document):  # it would let any status pass
        operation["responses"].pop("default", None)
    for body in ("RunRequest", "SeedRequest"):  # so that many are not just 404
        graph = {"type": "string", "enum": ["free", "asks", "fails", "looks", "typed", "nope"]}
        document["components"]["schemas"][body]["properties"]["graph"] = graph
    described = dict(operations(document))
    schema = schemathesis.openapi.from_dict(document)
    asked = st.one_of(
        *(
            found.ok().as_strategy(generation_mode=mode)
            for found in schema.get_all_operations()
            for mode in GenerationMode
        )
    )
    seen: set[int] = set()

    @bounded(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=asked)
    def ask(case: Any) -> None:
        sent = case.as_transport_kwargs(base_url="http://test")
        request = httpx.Request(
            sent["method"],
            sent["url"],
            params=sent.get("params"),
            headers=sent.get("headers"),
            cookies=sent.get("cookies"),
            **_body(sent),
        )
        answer = runner.run(
            server.request(
                request.method,
                request.url.path,
                query=request.url.query,
                body=request.content,
                headers=dict(request.headers),
            )
        )
        seen.add(answer.status)
        operation = described[f"{case.operation.method.upper()} {case.operation.path}"]
        documented = operation["responses"][str(answer.status)]
        sent_headers = {name.lower() for name in answer.headers} - FRAMING
        assert sent_headers <= {name.lower() for name in documented["headers"]}, case
        if answer.status >= 400:
            codes = {e["code"] for s, e in problems_of(operation) if s == str(answer.status)}
            assert answer.json()["code"] in codes, case
        response = httpx.Response(
            answer.status, headers=answer.headers, content=answer.body, request=request
        )
        response.elapsed = timedelta()
        case.validate_response(
            response,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_headers_conformance,
                response_schema_conformance,
            ],
        )

    ask()
    assert {200, 404, 422} <= seen


def _body(sent: dict[str, Any]) -> dict[str, Any]:
    if isinstance(data := sent.get("data"), bytes | str):
        return {"content": data}
    return {name: sent[name] for name in ("json", "data") if name in sent}
