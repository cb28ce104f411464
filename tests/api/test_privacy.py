"""What people say to graphs, and graphs to models and tools, is in no telemetry.

A secret is put wherever content can be, and looked for in every span, log line and metric, in
`/v1/runs/{id}/trace` and in `/debug/live`. Only a run's own stream has it, for that is what a
stream is for. Two things carry what others put into them: the message of an exception, for whoever
is on call needs it, unless a validation made it or `SERENO_EXCEPTION_MESSAGES=0`; and the spans of
other instrumentations, which are told of in their own documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from .chaos_graphs import graph_file, script
from .harness import NDJSON, Answer
from .observed import Observed, Observer

SECRET = "swordfish-7d1f3c"

#: By a library, in the name of what it was given.
QUOTED = (
    "an argument that does not validate",
    "a cause that does not validate",
    "a context that does not validate",
)
#: By the author of the graph.
SAID = (
    "a message",
    "the message of a cause",
    "a note",
    "the message of a tool's error",
    "the message of a call's error",
    "the messages of a group",
)


class Exports:
    """What leaves a server but for the streams of its runs."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._read: dict[str, str] = {}

    async def read(self, server: Observed, run_id: str, when: str) -> None:
        """What can be asked for now."""
        openmetrics = {"accept": "application/openmetrics-text; version=1.0.0"}
        answers = {
            "metrics": await server.get("/metrics", headers=openmetrics),
            "trace": await server.get(f"/v1/runs/{run_id}/trace"),
        }
        for name, answer in answers.items():
            assert answer.status == 200, answer.body
            self._read[f"{name} {when}"] = answer.body.decode()
        live = server.telemetry.admin.answer("GET", "/debug/live")
        self._read[f"live {when}"] = live.body.decode()

    def where(self, secret: str) -> set[str]:
        """Which exports have it."""
        spans = {f"span {span.name}": span.to_json() for span in self._observer.spans}
        lines = {
            f"log {number} {line[:200]!r}": line.decode()
            for number, line in enumerate(self._observer.written.splitlines())
        }
        everything: Mapping[str, str] = {**self._read, **spans, **lines}
        assert len(spans) > 3, "nothing was exported"
        assert len(lines) > 3, "nothing was logged"
        return {name for name, text in everything.items() if secret in text}


async def test_content_is_in_no_export(tmp_path: Path) -> None:
    observer = Observer()
    exports = Exports(observer)
    script.close("private")
    script.tell("private", {"keep": ["fail"], "tells": ["fail", "park"]})
    with observer.logging(level="INFO"):
        async with observer.serving(graph_file(tmp_path)) as server:
            body = {
                "graph": "private",
                "thread_id": "private",
                "input": {"secret": SECRET},
                "stream": ["updates", "values", "messages", "custom"],
                "context": {"secret": SECRET},
                "metadata": {"secret": SECRET, SECRET: 1},
                "config": {
                    "configurable": {"secret": SECRET},
                    "metadata": {"secret": SECRET},
                    "tags": [SECRET],
                },
            }
            headers = {**NDJSON, "baggage": f"secret={SECRET}", "authorization": SECRET}
            async with server.stream("POST", "/v1/runs", json=body, headers=headers) as stream:
                await stream.until("node.retrying")
                await stream.until("node.started")
                run_id = stream.headers["x-run-id"]
                await exports.read(server, run_id, "while it ran")
                script.release("private")
                await stream.rest()
                told = stream.raw.decode()
            await exports.read(server, run_id, "when it asked")
            answer = await server.post(
                "/v1/threads/private/resume", {"resume": SECRET}, headers=NDJSON
            )
            await exports.read(server, answer.headers["x-run-id"], "when it had ended")

            # A client's own words for a cancellation.
            script.tell("gone", {"hold": ["park"]})
            run_id = await server.start("held", {"n": 1}, thread_id="gone")
            await server.post(f"/v1/runs/{run_id}/cancel", {"reason": SECRET})
            await server.wait(run_id)

    assert told.count(SECRET) > 10
    assert SECRET in answer.body.decode()
    assert exports.where(SECRET) == set()


async def test_a_request_that_is_refused_is_not_quoted(tmp_path: Path) -> None:
    observer = Observer()
    exports = Exports(observer)
    bodies: list[Any] = [
        {"graph": "typed", "input": {"amount": SECRET}},
        {"graph": "private", "input": SECRET},
        {"graph": "private", "input": {}, "deadline_s": SECRET},
        {"graph": "private", "input": {}, SECRET: SECRET},
        {"graph": SECRET, "input": {}},
        {"graph": "private", "command": {"resume": SECRET}, "thread_id": "nobody"},
        {"graph": "private", "command": {"goto": SECRET}, "thread_id": "nobody"},
    ]
    with observer.logging(level="INFO"):
        async with observer.serving(graph_file(tmp_path)) as server:
            run_id = await server.ended("held", {"n": 1})
            answers: list[Answer] = [await server.post("/v1/runs", body) for body in bodies]
            broken = b'{"graph": "private", "input": ' + SECRET.encode()
            json_type = {"content-type": "application/json"}
            answers.append(await server.request("POST", "/v1/runs", body=broken, headers=json_type))
            await exports.read(server, run_id, "afterwards")

    assert {answer.status // 100 for answer in answers} == {4}
    assert exports.where(SECRET) == set()


async def test_a_state_that_does_not_validate_is_not_quoted(tmp_path: Path) -> None:
    assert await run_of_a_failure(tmp_path, "typed", {"amount": 1}) == set()


@pytest.mark.parametrize(
    ("how", "level"),
    [
        (QUOTED[0], "INFO"),
        pytest.param(QUOTED[0], "DEBUG"),
        (QUOTED[1], "INFO"),
        pytest.param(QUOTED[1], "DEBUG"),
        pytest.param(QUOTED[2], "INFO"),
        pytest.param(QUOTED[2], "DEBUG"),
    ],
)
async def test_what_does_not_validate_is_not_quoted(tmp_path: Path, how: str, level: str) -> None:
    given = {"secret": SECRET, "how": how}

    assert await run_of_a_failure(tmp_path, "careless", given, level=level) == set()


@pytest.mark.parametrize("how", SAID)
async def test_exceptions_say_what_their_authors_wrote(tmp_path: Path, how: str) -> None:
    found = await run_of_a_failure(tmp_path, "careless", {"secret": SECRET, "how": how})

    assert {name.split()[0] for name in found} >= {"span", "log", "trace"}
    assert {name.split()[0] for name in found} <= {"span", "log", "trace"}


@pytest.mark.parametrize(
    ("how", "level"),
    [
        *((how, "INFO") for how in (*SAID, *QUOTED)),
        *(pytest.param(how, "DEBUG") for how in (SAID[0], *SAID[3:5], QUOTED[0])),
        *((how, "DEBUG") for how in (*SAID[1:3], SAID[5], *QUOTED[1:])),
    ],
)
async def test_unless_they_must_not(tmp_path: Path, how: str, level: str) -> None:
    given = {"secret": SECRET, "how": how}
    found = await run_of_a_failure(tmp_path, "careless", given, messages=False, level=level)

    assert found == set()


async def run_of_a_failure(
    folder: Path, graph: str, input: Any, *, messages: bool = True, level: str = "INFO"
) -> set[str]:
    """Where the secret of a run that failed is found."""
    observer = Observer()
    exports = Exports(observer)
    with observer.logging(level=level, exception_messages=messages):
        async with observer.serving(graph_file(folder), exception_messages=messages) as server:
            config = {"configurable": {"secret": SECRET}}
            run_id = await server.start(graph, input, config=config, stream=["custom"])
            assert (await server.wait(run_id))["status"] == "error"
            await exports.read(server, run_id, "afterwards")
            lines = (await server.replay(run_id)).body.decode()

    assert SECRET not in lines, "a client is told the class of an error only"
    return exports.where(SECRET)
