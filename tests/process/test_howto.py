"""What the how-to pages show is executed, block by block, against a real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from server import GRAPHS, Server, until

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "howto"
EXAMPLES = tuple(
    part
    for name in ("screening", "research")
    for part in ("--config", str(ROOT / "examples" / name / "langgraph.json"))
)
#: What each page must have printed, in this order; a page that is not here fails.
PRINTS = {
    "follow-a-run": [
        '"type":"run.queued"',
        '"type":"run.completed"',
        '"type":"run.completed"',
        '"type":"call.retrying"',
        '"success"',
        '("load")',
        '"type":"run.completed"',
    ],
    "cancel-a-run": [
        '["run.cancelled","the question has changed"]',
        '"cancelled"',
        '["timeout","deadline"]',
    ],
    "resume-after-a-cut": ["1 run.queued", "run.completed", "1 run.queued", "run.completed"],
    "answer-an-interrupt": [
        '"interrupted"',
        "¿Publico este informe?",
        '"type":"run.interrupted"',
        '"success"',
        "no interrupt is pending on this thread",
        '"interrupted"',
        '"run.completed"',
        '["approve"]',
    ],
    "retry-standard": ['"attempt":1,"error_class":"connection"', '"attempt":2'],
    "serve-your-own-graph": [
        "Greets whom you name.",
        '"name"',
        "Hello, Eva!",
        '"type":"snapshot"',
        '"type":"final"',
    ],
    "read-a-trace": ["run research", "node fetch_sources", "fetch_sources attempt 1: trace "],
}


class Block(NamedTuple):
    """A block of code: the language, the file that it is, and the code."""

    language: str
    file: str
    code: str


def blocks(page: str, folder: Path = PAGES) -> list[Block]:
    text = (folder / f"{page}.md").read_text("utf-8")
    return [
        Block(*found) for found in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.M | re.S)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(server: Server) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SERENO_", "OTEL_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "SERENO_URL": server.url,
        # In the place of 9009, which `make run` has taken.
        "SERENO_ADMIN_PORT": server.admin.rpartition(":")[2],
    }


@pytest.fixture
def examples(serving: Callable[..., Server]) -> Server:
    """The server that the pages take for granted."""
    return serving(*EXAMPLES, EXAMPLES_PACE="0.1").start()


def prints(expected: list[str], script: str, server: Server, folder: Path) -> None:
    """Execute what is shown against a server; what is expected is printed in this order."""
    if missing := [name for name in ("curl", "jq") if name in script and not shutil.which(name)]:
        pytest.skip(f"there is no {missing[0]}")
    script = script.replace("localhost:8009", server.url.removeprefix("http://"))
    script = script.replace("localhost:8010", "127.0.0.1:8010").replace("8010", str(free_port()))
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=folder,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    at = 0
    for fragment in expected:
        at = done.stdout.find(fragment, at) + 1
        assert at, f"{fragment} is not in\n{done.stdout[-4000:]}"


def test_every_page_is_listed_and_tested() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    listed = set(re.findall(r"\]\(([\w-]+)\.md\)", (PAGES / "README.md").read_text("utf-8")))

    assert pages == listed == PRINTS.keys()


@pytest.mark.parametrize("page", sorted(PRINTS))
def test_what_a_page_shows_is_so(page: str, examples: Server, tmp_path: Path) -> None:
    left_out = []
    script = ["set -eu"]
    for language, file, code in blocks(page):
        if file:
            (tmp_path / file).write_text(code)
        elif code.startswith("node ") and shutil.which("node") is None:
            left_out.append("there is no node")
        else:
            assert language == "sh", f"a block of {language} without a name is not executed"
            script.append(code)
    expected = PRINTS[page][: len(PRINTS[page]) // 2] if left_out else PRINTS[page]
    prints(expected, "\n".join(script), examples, tmp_path)
    if left_out:
        pytest.skip(left_out[0])


def test_the_commands_of_the_readme_do_what_it_says(examples: Server, tmp_path: Path) -> None:
    (shown,) = [code for _, _, code in blocks("README", ROOT) if "curl " in code]
    expected = [
        '"type":"final"',
        '"type":"node.retrying"',
        '"type":"token"',
        '"type":"run.interrupted"',
        '"type":"run.completed"',
        '{"v":1,"seq":4,',
        '"type":"final"',
    ]
    prints(expected, f"set -eu\n{shown}", examples, tmp_path)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_the_shown_fetch_reader_stops_at_once_when_there_is_nothing_more(
    examples: Server, tmp_path: Path
) -> None:
    run_id = examples.submit("screening", "t", input={})
    last = examples.lines(run_id)[-1]["seq"]
    for _, file, code in blocks("resume-after-a-cut"):
        if file == "follow.mjs":
            (tmp_path / file).write_text(code)
    url = f"{examples.url}/v1/runs/{run_id}/stream"
    program = f"""
        import {{ follow }} from "./follow.mjs";
        await follow("{url}", (line) => console.log(line.type), {last});
        await follow("{url}", (line) => console.log(line.data.code), {last + 1});
    """
    (tmp_path / "last.mjs").write_text(program)
    done = subprocess.run(
        ["node", "last.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )

    assert (done.returncode, done.stdout) == (0, "cursor_ahead\n"), done.stderr


@pytest.fixture(params=["python", "node"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The command of a reader that a page shows."""
    if shutil.which(request.param) is None and request.param == "node":
        pytest.skip("there is no node")
    for _, file, code in blocks("resume-after-a-cut"):
        if file:
            (tmp_path / file).write_text(code)
    program = {
        "python": [sys.executable, str(tmp_path / "follow.py")],
        "node": ["node", str(tmp_path / "main.mjs")],
    }
    return program[str(request.param)]


def test_a_shown_reader_loses_no_line_to_a_kill(
    reader: list[str], serving: Callable[..., Server], tmp_path: Path
) -> None:
    server, port = serving(*GRAPHS), str(free_port())
    server.start("--port", port)
    server.hold("t", "b")
    run_id = server.submit("chain", "t")
    url = f"{server.url}/v1/runs/{run_id}/stream"
    shown = tmp_path / "shown"
    with (
        shown.open("wb") as out,
        subprocess.Popen(
            [*reader, url], stdout=out, stderr=subprocess.STDOUT, env=environment(server)
        ) as process,
    ):
        try:
            server.entered("t", "b")
            until(lambda: "node.started" in shown.read_text(), "it has read something")
            server.kill()
            server.release("t", "b")
            server.start("--port", port)
            code = process.wait(60)
        finally:
            process.kill()
    lines = [line.split() for line in shown.read_text().splitlines()]
    numbered = [(int(seq), type) for seq, type in lines if type not in ("caught_up", "heartbeat")]

    assert code == 0
    assert numbered == [(line["seq"], line["type"]) for line in server.lines(run_id)]
    assert "run.recovered" in {type for _, type in numbered}
