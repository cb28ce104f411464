"""The services of compose.yml as processes of this machine, on free ports of its loopback.

Their commands, files and environments are those of compose.yml. What a file does not take from the
environment, `Ports.adapt` rewrites: `service:port` becomes the address that stands for it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from server import environment, until

__all__ = ["COMPOSE", "ROOT", "Ports", "Program", "Programs", "answer", "find", "programs"]

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sereno"
HTTP = httpx2.Client(timeout=10, trust_env=False)
COMPOSE: Mapping[str, Any] = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]

#: What a program may be called; where it may be, besides PATH.
NAMES = {
    "otel-collector": ("otelcol-sereno", "otelcol-contrib"),
    "alertmanager": ("alertmanager", "prometheus-alertmanager"),
}
FOLDERS = (CACHE / "collector", CACHE, CACHE / "debian/usr/bin")


def find(name: str) -> str:
    """The path of a program. Without it the test is skipped, or fails if it must not be."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, FOLDERS)])
    for called in NAMES.get(name, (name,)):
        if found := shutil.which(called, path=path):
            return found
    missing = f"there is no {name} here; .ci/programs finds or builds it"
    if os.environ.get("SERENO_REQUIRE_STACK") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


class Ports:
    """For each port of each service of compose.yml a free one here."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], int] = {}

    def at(self, service: str, port: int) -> str:
        """The address that stands for `service:port`."""
        if (service, port) not in self._taken:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._taken[service, port] = free.getsockname()[1]
        return f"127.0.0.1:{self._taken[service, port]}"

    def adapt(self, text: str) -> str:
        """A file of compose.yml's network, for this machine."""
        names = "|".join(map(re.escape, COMPOSE))
        return re.sub(rf"\b({names}):(\d+)\b", lambda m: self.at(m[1], int(m[2])), text)

    def environments(self, folder: Path) -> dict[str, dict[str, str]]:
        """How services are told by their environment where to listen and whom to talk to."""
        at = self.at
        return {
            "otel-collector": {
                "OTELCOL_GRPC_ENDPOINT": at("otel-collector", 4317),
                "OTELCOL_HTTP_ENDPOINT": at("otel-collector", 4318),
                "OTELCOL_HEALTH_ENDPOINT": at("otel-collector", 13133),
                "OTELCOL_PROMETHEUS_ENDPOINT": at("otel-collector", 8889),
                "OTELCOL_SELF_HOST": "127.0.0.1",
                "OTELCOL_SELF_PORT": at("otel-collector", 8888).rsplit(":", 1)[1],
                "OTELCOL_QUEUE_DIR": str(folder / "otel-collector/queue"),
                "TRACES_ENDPOINT": at("jaeger", 4317),
                "LOGS_ENDPOINT": f"http://{at('loki', 3100)}/otlp",
            },
            "jaeger": {
                "JAEGER_DIR": str(folder / "jaeger"),
                "JAEGER_OTLP_ENDPOINT": at("jaeger", 4317),
                "JAEGER_QUERY_ENDPOINT": at("jaeger", 16686),
                "JAEGER_QUERY_GRPC_ENDPOINT": at("jaeger", 16685),
                "JAEGER_HEALTH_ENDPOINT": at("jaeger", 13133),
            },
            "loki": {
                "LOKI_HOST": "127.0.0.1",
                "LOKI_PORT": at("loki", 3100).rsplit(":", 1)[1],
                "LOKI_GRPC_PORT": at("loki", 9095).rsplit(":", 1)[1],
                "LOKI_DIR": str(folder / "loki"),
            },
        }

    def options(self) -> dict[str, list[str]]:
        """The same for those that are told by an option."""
        return {
            service: [f"--web.listen-address={self.at(service, port)}"]
            for service, port in (("prometheus", 9090), ("alertmanager", 9093))
        }


#: Where a service says that it is ready.
READY = {
    "otel-collector": (13133, "/"),
    "jaeger": (13133, "/status"),
    "loki": (3100, "/ready"),
    "prometheus": (9090, "/-/ready"),
    "alertmanager": (9093, "/-/ready"),
}


@dataclass(frozen=True, slots=True)
class Program:
    """A process that runs, and what it says."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """As the kernel does it."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()


class Programs:
    """Starts programs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = Ports()
        self._started: list[Program] = []

    def start(self, name: str, *args: str, **env: str) -> Program:
        """Start a program, and do not wait for it."""
        binary = find(name)
        log = self.folder / f"{name}-{len(self._started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [binary, *args],
                cwd=self.folder,
                env=environment(**env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        program = Program(name, process, log)
        self._started.append(program)
        return program

    def up(self, service: str, *more: str, **env: str) -> Program:
        """Start a service of compose.yml and wait until it is ready.

        `more` options and an `env` that differs from compose.yml's are the caller's.
        """
        described = COMPOSE[service]
        args = list(described["command"])
        for volume in described["volumes"]:
            source, target = volume.split(":")[:2]
            # A path begins after `=` or on its own: /prometheus is not a part of /etc/prometheus.
            place = re.compile(rf"(?<![\w/.-]){re.escape(target)}(?![\w-])")
            here = str(self._mounted(service, source))
            args = [place.sub(here, arg) for arg in args]
        variables = self.environment(service) | env
        args += self.ports.options().get(service, []) + list(more)
        program = self.start(service, *args, **variables)
        port, path = READY[service]

        def ready() -> bool:
            assert program.process.poll() is None, f"{service} ended:\n{program.output[-3000:]}"
            return answer(f"http://{self.ports.at(service, port)}{path}") is not None

        until(ready, f"{service} is ready", 90)
        return program

    def environment(self, service: str) -> dict[str, str]:
        """What compose.yml tells a service, and where things are here."""
        said = COMPOSE[service].get("environment", {})
        adapted = {key: self.ports.adapt(str(value)) for key, value in said.items()}
        return adapted | self.ports.environments(self.folder).get(service, {})

    def url(self, service: str, port: int = 0) -> str:
        return f"http://{self.ports.at(service, port or READY[service][0])}"

    def close(self) -> None:
        for program in reversed(self._started):
            program.stop()

    def _mounted(self, service: str, source: str) -> Path:
        """A volume: a folder of its own; a file as it stands; a folder of files, adapted."""
        path = ROOT / source
        if not source.startswith("./"):
            path = self.folder / service / source
            path.mkdir(parents=True, exist_ok=True)
        elif path.is_dir():
            copy = self.folder / service / path.name
            copy.mkdir(parents=True, exist_ok=True)
            for file in path.glob("*.y*ml"):
                (copy / file.name).write_text(self.hurried(self.ports.adapt(file.read_text())))
            path = copy
        return path

    @staticmethod
    def hurried(text: str) -> str:
        """Prometheus scrapes and evaluates each second, so that tests end soon."""
        return re.sub(r"^(  (scrape|evaluation)_interval:) 15s$", r"\1 1s", text, flags=re.M)


@contextmanager
def programs(folder: Path) -> Iterator[Programs]:
    """Programs that end with the context, each by its process."""
    made = Programs(folder)
    try:
        yield made
    finally:
        made.close()


def answer(url: str, **params: Any) -> Any:
    """What a GET is answered with, JSON read; None unless it is a success."""
    try:
        response = HTTP.get(url, params=params or None)
    except httpx2.TransportError:
        return None
    if not response.is_success:
        return None
    if "json" in response.headers.get("Content-Type", ""):
        return response.json()
    return response.text
