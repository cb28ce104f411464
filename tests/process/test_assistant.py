"""The assistant, served as it is: its model is called over a real socket of this machine."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import psutil
import pytest
from lines import texts, violations
from server import Line, Server

FOLDER = Path(__file__).parents[2] / "examples" / "assistant"
#: Fast, but slow enough that a text comes in more than one line.
PACE = 0.2
HELLO = "Puedo mirar un pedido"


@pytest.fixture
def assistant(serving: Callable[..., Server]) -> Server:
    # An empty variable is none: whoever runs this may have a key.
    ours = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", "EXAMPLES_PACE": str(PACE)}
    return serving("--config", str(FOLDER), **ours).start()


def shown(language: str) -> str:
    """The blocks of this language in the example's README, one after the other."""
    text = (FOLDER / "README.md").read_text("utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    assert found
    return "".join(found)


def executed(command: list[str], **environment: str) -> str:
    """What a command of the README prints, in the example's folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SERENO_", "OPENAI_"))}
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command,
        cwd=FOLDER,
        env=kept | local | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def ask(server: Server, text: str, thread: str = "t") -> str:
    messages = [{"role": "user", "content": text}]
    return server.submit("assistant", thread, input={"messages": messages})


def of(lines: list[Line], type: str, node: str | None = None) -> list[Line]:
    return [line for line in lines if line["type"] == type and node in (None, line.get("node"))]


def ports(server: Server) -> set[int]:
    """Where the server's process listens; all of it must be on this machine alone."""
    listening = [
        connection.laddr
        for connection in psutil.Process(server.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    return {address.port for address in listening}


class Trace:
    """The spans of a run, by what hangs below what."""

    def __init__(self, server: Server, run_id: str) -> None:
        answer = server.get(f"/v1/runs/{run_id}/trace").json()
        self.spans: dict[str, dict[str, Any]] = {
            span["spanId"]: span
            for resource in answer["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        }

    def below(self, start: str) -> set[tuple[str, ...]]:
        """The names from each span whose name starts so up to the run's span, innermost first."""
        return {
            tuple(self._names(span))
            for span in self.spans.values()
            if span["name"].startswith(start)
        }

    def _names(self, span: dict[str, Any] | None) -> Iterator[str]:
        while span is not None and not span["name"].startswith("run "):
            yield span["name"]
            span = self.spans.get(span.get("parentSpanId", ""))


def test_the_stand_in_listens_from_the_first_run_on(assistant: Server) -> None:
    before = ports(assistant)
    assistant.lines(ask(assistant, "hola"))
    during = ports(assistant)
    assistant.lines(ask(assistant, "hola", "u"))

    assert len(before) == 2
    assert before < during
    assert len(during) == 3
    assert ports(assistant) == during


def test_the_default_question_is_answered_with_tools(assistant: Server) -> None:
    answer = assistant.get("/api/stream", thread_id="demo")
    assert answer.status_code == 200
    run_id = answer.headers["X-Run-Id"]
    lines = assistant.lines(run_id)
    trace = Trace(assistant, run_id)

    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert len(of(lines, "token", "ask")) > 1
    assert "- 3 * 19.95 = 59.85\n" in "\n".join(texts(lines))
    (retrying,) = of(lines, "call.retrying")
    assert retrying["data"]["call"] == "shop.Carrier.where"
    assert trace.below("chat") == {
        ("chat stand-in", "attempt graph.reply_to", "attempt ask", "node ask")
    }
    assert {path[:2] for path in trace.below("POST")} == {("POST", "chat stand-in")}
    assert trace.below("execute_tool") == {
        ("execute_tool calculate", "attempt tools", "node tools"),
        ("execute_tool track_parcel", "attempt tools", "node tools"),
    }


def test_a_cut_stream_is_asked_for_again_and_its_tokens_do_not_count(assistant: Server) -> None:
    lines = assistant.lines(ask(assistant, "hola #cut"))
    (retrying,) = of(lines, "node.retrying")
    (message,) = of(lines, "message")
    first = [line for line in of(lines, "token") if line["attempt"] == 1]

    assert violations(lines) == []
    assert retrying["data"]["error_class"] == "connection"
    assert first
    assert all(line["seq"] >= retrying["data"]["discard_from"] for line in first)
    assert texts(lines) == [message["data"]["text"]]
    assert message["data"]["text"].startswith(HELLO)
    assert message["data"]["usage"]["output_tokens"] == len(message["data"]["text"].split())


def test_a_429_is_the_call_s_and_an_internal_error_the_node_s(assistant: Server) -> None:
    lines = assistant.lines(ask(assistant, "hola #429 #500"))
    (refused,) = of(lines, "call.retrying")
    failed = of(lines, "node.retrying")

    assert violations(lines) == []
    assert refused["data"]["error_class"] == "rate_limited"
    assert refused["data"]["retry_in_ms"] == 1000 * PACE  # what Retry-After says
    assert [line["data"]["error_class"] for line in failed] == ["upstream_5xx"] * 2
    assert lines[-1]["data"]["retries"] == 3
    assert texts(lines)[0].startswith(HELLO)


@pytest.mark.parametrize("agreed", [True, False])
def test_a_refund_waits_for_a_person_even_over_a_kill(assistant: Server, agreed: bool) -> None:
    asked = assistant.lines(ask(assistant, "Devuelve el pedido 1003"))
    assistant.kill()
    assistant.start()
    lines = assistant.lines(assistant.resume("t", {"approve": agreed}))

    (waiting,) = asked[-1]["data"]["interrupts"]
    assert asked[-1]["type"] == "run.interrupted"
    assert waiting["value"]["calls"] == [{"name": "refund_order", "args": {"number": 1003}}]
    assert violations(lines) == []
    assert lines[-1]["type"] == "run.completed"
    assert ("Devueltos 89,90 €" in "".join(texts(lines))) is agreed
    assert bool(of(lines, "node.started", "tools")) is agreed


def test_a_run_that_is_killed_in_the_middle_of_a_text_goes_on(assistant: Server) -> None:
    """With a new stand-in: the one before has died with the server."""
    run_id = ask(assistant, "hola #slow")
    assistant.wait_line(run_id, "token")
    assistant.kill()
    assistant.start()
    lines = assistant.lines(run_id)

    assert violations(lines) == []
    assert of(lines, "run.recovered")
    assert lines[-1]["type"] == "run.completed"
    assert len(texts(lines)) == 1


def test_a_cancelled_text_stops_and_nobody_complains(assistant: Server) -> None:
    run_id = ask(assistant, "hola #slow")
    assistant.wait_line(run_id, "token")
    assistant.post(f"/v1/runs/{run_id}/cancel")
    lines = assistant.lines(run_id)
    assistant.lines(ask(assistant, "hola", "u"))  # the stand-in has had time to notice

    assert lines[-1]["type"] == "run.cancelled"
    assert "Traceback" not in "".join(
        line for line in assistant.output.splitlines() if not line.startswith("{")
    )


def test_the_readme_s_program_asks_and_is_answered() -> None:
    first, last = executed([sys.executable, "-c", shown("python")], EXAMPLES_PACE="0").splitlines()

    assert "Interrupt(value={'question': '¿Lo hago?'" in first
    assert "Devueltos 89,90 € del pedido 1003." in last


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_readme_s_requests_end_as_it_says(assistant: Server) -> None:
    script = shown("sh").replace("make run\n", "").replace("http://127.0.0.1:8009", assistant.url)
    assert script.count(assistant.url) == 3
    lines = executed(["sh", "-euc", script])

    assert re.findall(r'"type":"(run\.(?!queued|started)\w+|final)"', lines) == [
        "final",
        "run.interrupted",
        "run.completed",
    ]
    assert "Devueltos 89,90 € del pedido 1003." in lines


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in in this process, in the place of an endpoint elsewhere."""
    monkeypatch.setenv("EXAMPLES_PACE", "0")
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("standin")
    for name in ("standin", "answers", "pace"):
        sys.modules.pop(name, None)


def test_an_endpoint_of_one_s_own_is_used_instead(
    serving: Callable[..., Server], standin: ModuleType
) -> None:
    endpoint = standin.StandIn()
    with endpoint:
        thread = Thread(target=endpoint.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        server = serving(
            "--config",
            str(FOLDER),
            OPENAI_BASE_URL=endpoint.url,
            OPENAI_API_KEY="k",
            OPENAI_MODEL="small",
            NO_PROXY="127.0.0.1",
        ).start()
        run_id = ask(server, "hola")
        lines = server.lines(run_id)
        endpoint.shutdown()
        thread.join()

    assert texts(lines)[0].startswith(HELLO)
    assert len(ports(server)) == 2
    assert any("chat small" in path for path in Trace(server, run_id).below("chat"))
