"""Processes that are measured: started in an environment without settings, and ended for sure."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

__all__ = ["cpu_seconds", "forget_settings", "free_port", "machine", "running", "serving"]

_SETTINGS = ("SERENO_", "OTEL_")
_ROOT = Path(__file__).parent.parent


def forget_settings() -> None:
    """Measure what the product does by default, whatever the shell says."""
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with these arguments, killed when it is left; what it says goes to stderr,
    for stdout is for figures."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    process = subprocess.Popen(
        [sys.executable, *arguments], env=own | environment, cwd=_ROOT, stdout=sys.stderr
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def serving(
    kind: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[int, psutil.Process]]:
    """A server of `benchmarks.servers` with a new folder of its own: its port, its process."""
    folder.mkdir()
    port = free_port()
    command: Sequence[str] = ("-m", "benchmarks.servers", kind, str(port), str(folder))
    with running(*command, **environment or {}) as process:
        for _ in range(600):
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                yield port, psutil.Process(process.pid)
                return
            time.sleep(0.1)
        raise RuntimeError(f"{kind} did not start")


def cpu_seconds(process: psutil.Process) -> float:
    """What a process has spent in all its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def machine() -> str:
    """Where and when, for those who read the figures later."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"commit {commit or '?'}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"
    )
