"""A real `sereno serve` process in a folder of its own, and how tests talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["GRAPHS", "Reader", "Server", "Zygote", "until"]

HERE = Path(__file__).parent
GRAPHS = ("--config", str(HERE / "langgraph.json"))
SERENO = Path(sys.executable).with_name("sereno")
#: Generous: others may be using the machine.
PATIENCE = 60.0

Line = dict[str, Any]


def until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """The first true value of a condition. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.01)
    return value


class Zygote:
    """Forks servers from a process that has imported everything already."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._lock = threading.Lock()
        assert self._read() == {"ready": True}

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return self._read()

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


def environment(**more: str) -> dict[str, str]:
    """Ours without settings that would reach the server."""
    ours = ("SERENO_", "OTEL_", "PYTHON", "LANG")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**kept, **more}


class Server:
    """One folder, one store, and the processes that served it one after the other."""

    def __init__(self, folder: Path, zygote: Zygote | None, *sources: str, **env: str) -> None:
        self.folder = folder
        self.sources = sources or GRAPHS
        self.env = env
        self.pid = 0
        self.url = ""
        #: The admin listener.
        self.admin = ""
        self._zygote = zygote
        self._popen: subprocess.Popen[bytes] | None = None
        self.log_name = "log"
        self._starts = 0
        self.http = httpx2.Client(timeout=PATIENCE, trust_env=False)
        (folder / "hold").mkdir(exist_ok=True, parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pid and self.code is None:
            self.kill()
        self.http.close()

    # The process.

    def launch(self, *args: str, **env: str) -> Self:
        """Start a process and do not wait for it."""
        assert not self.pid or self.code is not None, "the process before still runs"
        self._starts += 1
        self.log_file.touch()
        argv = ["serve", *self.sources, "--port", "0", "--engine", "sqlite:///./s.db", *args]
        variables = {"SERENO_DRAIN_S": "20", "SERENO_ADMIN_PORT": "0", **self.env, **env}
        if self._zygote is not None:
            self.pid = self._zygote.ask(
                argv=argv, env=variables, cwd=str(self.folder), log=str(self.log_file)
            )["pid"]
        else:
            with self.log_file.open("ab") as log:
                self._popen = subprocess.Popen(
                    [str(SERENO), *argv],
                    cwd=self.folder,
                    env=environment(**variables),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self.pid = self._popen.pid
        return self

    def start(self, *args: str, **env: str) -> Self:
        """Start a process and wait until it serves."""
        self.launch(*args, **env)
        return self.wait_ready()

    def wait_ready(self) -> Self:
        def serving() -> Any:
            found = self.logged("Serving")
            assert found or self.code is None, f"it ended with {self.code}:\n{self.output}"
            return found

        self.url = f"http://127.0.0.1:{until(serving, 'it serves')[-1]['port']}"
        self.admin = f"http://127.0.0.1:{self.logged('Admin listener')[-1]['port']}"
        return self

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._zygote is not None:
            code: int | None = self._zygote.ask(poll=self.pid)["code"]
            return code
        assert self._popen is not None
        return self._popen.poll()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the process to end; its exit code."""
        code: int = until(lambda: self.code is not None and [self.code], "it ends", timeout)[0]
        return code

    def kill(self) -> None:
        """As the kernel does it."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def term(self) -> None:
        """As an orchestrator does it; does not wait."""
        os.kill(self.pid, signal.SIGTERM)

    @property
    def log_file(self) -> Path:
        """stdout and stderr of the latest process."""
        return self.folder / f"{self.log_name}-{self._starts}.txt"

    @property
    def output(self) -> str:
        return self.log_file.read_text()

    def logged(self, msg: str, **fields: Any) -> list[Line]:
        """Log lines of the latest process with this message."""
        return self._logged(msg=msg, **fields)

    def events(self, event: str, **fields: Any) -> list[Line]:
        """Log lines of the latest process that tell of this event."""
        return self._logged(event=event, **fields)

    def _logged(self, **fields: Any) -> list[Line]:
        found = []
        for raw in self.output.splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(raw)
                if all(line.get(k) == v for k, v in fields.items()):
                    found.append(line)
        return found

    # Nodes.

    def hold(self, thread: str, node: str) -> None:
        """The node will wait once it is entered."""
        (self.folder / "hold" / f"{thread}.{node}").touch()

    def release(self, thread: str, node: str) -> None:
        (self.folder / "hold" / f"{thread}.{node}").unlink()

    def marks(self, thread: str) -> list[str]:
        """The nodes that were entered, in order, over all processes."""
        file = self.folder / "marks"
        text = file.read_text() if file.exists() else ""
        marks = [line.split(" ", 1) for line in text.splitlines()]
        return [node for whose, node in marks if whose == thread]

    def entered(self, thread: str, node: str, times: int = 1) -> None:
        """Wait until a node was entered."""
        until(lambda: self.marks(thread).count(node) >= times, f"{node} of {thread} is entered")

    # Runs.

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.http.post(self.url + path, json=body)

    def get(self, path: str, **params: Any) -> httpx2.Response:
        return self.http.get(self.url + path, params=params)

    def submit(self, graph: str, thread: str, **more: Any) -> str:
        """Start a run; its id."""
        body = {"graph": graph, "thread_id": thread, "input": {"seen": []}} | more
        answer = self.post("/v1/runs", **body)
        assert answer.status_code == 202, answer.text
        run_id: str = answer.json()["run_id"]
        return run_id

    def resume(self, thread: str, answer: Any) -> str:
        """Answer an interrupt; the id of the new run."""
        response = self.post(f"/v1/threads/{thread}/resume", resume=answer)
        assert response.status_code == 202, response.text
        run_id: str = response.json()["run_id"]
        return run_id

    def run_on(self, thread: str) -> str | None:
        """The latest run on a thread."""
        runs = self.get("/v1/runs", thread_id=thread).json()["runs"]
        return runs[0]["run_id"] if runs else None

    def raw(self, run_id: str, after: int = 0, **params: Any) -> bytes:
        """A run's bytes from a cursor to the end of the stream."""
        answer = self.get(f"/v1/runs/{run_id}/stream", after=after, heartbeat=0, **params)
        assert answer.status_code in (200, 204), answer.text
        return answer.content

    def lines(self, run_id: str, after: int = 0, **params: Any) -> list[Line]:
        """A run's stored lines from a cursor to the end of the stream."""
        return stored(self.raw(run_id, after, **params))

    def wait_line(self, run_id: str, type: str, **fields: Any) -> Line:
        """Wait until a line of a type is in the log."""

        def found() -> Line | None:
            for line in self.lines(run_id, follow=0):
                if line["type"] == type and all(line.get(k) == v for k, v in fields.items()):
                    return line
            return None

        line: Line = until(found, f"{type} {fields or ''} of run {run_id}")
        return line

    def scrape(self, accept: str = "") -> str:
        """What the admin listener shows of the latest process's metrics."""
        answer = self.http.get(f"{self.admin}/metrics", headers={"Accept": accept})
        assert answer.status_code == 200, answer.text
        return answer.text

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 without any."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.scrape())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def ready(self) -> dict[str, str]:
        """Failing checks of /readyz, by name."""
        answer = self.get("/readyz")
        failing = {
            c["name"]: c.get("output", "") for c in answer.json()["checks"] if c["status"] != "pass"
        }
        assert answer.status_code == (503 if failing else 200)
        return failing


def parse(raw: bytes) -> list[Line]:
    """Whole lines; a line that was cut does not count."""
    return [json.loads(line) for line in raw.split(b"\n")[:-1]]


def stored(raw: bytes) -> list[Line]:
    return [line for line in parse(raw) if "seq" in line]


def whole(raw: bytes) -> bytes:
    """The bytes of the stored lines."""
    lines = raw.split(b"\n")[:-1]
    return b"".join(line + b"\n" for line in lines if "seq" in json.loads(line))


class Reader(threading.Thread):
    """A client that reads a stream as far as the server lets it. Use as a context manager."""

    def __init__(
        self, server: Server, run_id: str, after: int = 0, *, pause: float = 0, **params: Any
    ) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/v1/runs/{run_id}/stream"
        self._pause = pause
        self.after = after
        self._params = {"after": after, "heartbeat": 0, **params}
        self._raw = b""
        #: Whether the response ended properly.
        self.eof = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.join(PATIENCE)
        assert not self.is_alive()

    def run(self) -> None:
        with (
            httpx2.Client(timeout=PATIENCE, trust_env=False) as http,
            contextlib.suppress(httpx2.TransportError),
            http.stream("GET", self._url, params=self._params) as response,
        ):
            for chunk in response.iter_raw():
                self._raw += chunk
                time.sleep(self._pause)
            self.eof = True

    @property
    def all(self) -> list[Line]:
        """Whole lines so far, unstored ones too."""
        return parse(self._raw)

    @property
    def lines(self) -> list[Line]:
        return stored(self._raw)

    @property
    def whole(self) -> bytes:
        """The bytes of the stored lines that came whole."""
        return whole(self._raw)

    @property
    def over(self) -> bool:
        """Whether the terminal line came."""
        lines = self.lines
        return bool(lines) and lines[-1]["data"].get("final") is True

    def saw(self, type: str, **fields: Any) -> None:
        """Wait until a line of this type came."""
        until(
            lambda: any(
                line["type"] == type and all(line.get(k) == v for k, v in fields.items())
                for line in self.all
            ),
            f"{type} {fields or ''} is read",
        )
