"""Starts servers in a tenth of the time: imports what `sereno serve` imports once, then forks.

Each child runs `sereno` from its command line on, in a process of its own that can be killed.
Reads one JSON object a line: `{"argv", "env", "cwd", "log"}` → `{"pid"}`, or `{"poll": pid}` →
`{"code"}`, null while it runs and negative for a signal, as in subprocess.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import chaos


def main() -> None:
    _preload()
    codes: dict[int, int | None] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        if "poll" in ask:
            pid = ask["poll"]
            if codes[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if found else None
            print(json.dumps({"code": codes[pid]}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _serve(ask)
        codes[pid] = None
        print(json.dumps({"pid": pid}), flush=True)
    for pid, code in codes.items():
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _preload() -> None:
    os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
    for name in (
        "httptools",
        "langchain_core.language_models.fake_chat_models",
        "runtime.app",
        "runtime.cli",
        "runtime.engines.sqlite.engine",
        "uvicorn.protocols.http.httptools_impl",
        "uvloop",
    ):
        importlib.import_module(name)


def _serve(ask: dict[str, Any]) -> None:
    code = 1
    try:
        os.environ.update(ask["env"])
        os.chdir(ask["cwd"])
        log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        sys.argv = ["sereno", *ask["argv"]]
        chaos.install(Path(ask["cwd"]))
        from runtime.cli import main as sereno

        try:
            sereno()
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
