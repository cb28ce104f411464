"""The OpenAPI document is valid, and what it says of the app is so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import Serving
from .harness import Server

EXAMPLES = 150


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
    """Whatever is asked: no 5xx, and only documented statuses, types and bodies."""
    runner, server = running
    document = runner.run(server.get("/openapi.json")).json()
    for body in ("RunRequest", "SeedRequest"):  # so that many are not just 404
        graph = {"type": "string", "enum": ["free", "asks", "fails", "looks", "typed", "nope"]}
        document["components"]["schemas"][body]["properties"]["graph"] = graph
    schema = schemathesis.openapi.from_dict(document)
    asked = st.one_of(
        *(
            found.ok().as_strategy(generation_mode=mode)
            for found in schema.get_all_operations()
            for mode in GenerationMode
        )
    )
    seen: set[int] = set()

    @settings(
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
