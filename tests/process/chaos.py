"""What goes wrong inside a server on purpose, at exact points, told by files in its folder.

`kill` holds a number N: the process kills itself after its Nth commit from now on; `killed` then
names what was committed. While `full` exists, no file may grow beyond the size that the write-ahead
log had. A run on a thread `fail-N` fails to commit its Nth write, once.
"""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Writes that belong to no run.
UNCOUNTED = ("writable", "_nothing", "renew", "_adopt")


def install(folder: Path) -> None:
    """Patch the writer of this process."""
    from runtime.engines.sqlite import writer

    kill, killed, full = folder / "kill", folder / "killed", folder / "full"
    committed = 0
    capped = False
    written: Counter[str] = Counter()
    plain = writer.Writer._commit
    slow = float(os.environ.get("CHAOS_SLOW_S", "0"))
    one_by_one = bool(os.environ.get("CHAOS_ONE_BY_ONE"))

    def commit(self: Any, db: sqlite3.Connection, batch: list[Any]) -> None:
        nonlocal capped
        if full.exists() != capped:
            capped = not capped
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            size = (folder / "s.db-wal").stat().st_size if capped else most
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        for part in [[posted] for posted in batch] if one_by_one else [batch]:
            commit_part(self, db, part)

    def commit_part(self: Any, db: sqlite3.Connection, batch: list[Any]) -> None:
        nonlocal committed
        counted = [posted for posted in batch if not _name(posted).startswith(UNCOUNTED)]
        for posted in counted:
            thread = _thread(posted.operation)
            if thread is not None and thread.startswith("fail-"):
                written[thread] += 1
                if written[thread] == int(thread.split("-")[1]):
                    posted.operation = _failing(posted.operation)
        time.sleep(slow)
        plain(self, db, batch)
        if counted and kill.exists():
            committed += 1
            if committed == int(kill.read_text()):
                killed.write_text(", ".join(_name(posted) for posted in counted))
                os.kill(os.getpid(), signal.SIGKILL)

    writer.Writer._commit = commit  # type: ignore[method-assign]


def _name(posted: Any) -> str:
    name: str = posted.operation.__qualname__
    return name.removeprefix("SqliteEngine.").replace(".<locals>", "")


def _thread(operation: Callable[..., Any]) -> str | None:
    """The thread of the run that a write is for, from what its function holds."""
    for cell in operation.__closure__ or ():
        held = cell.cell_contents
        if isinstance(thread := getattr(held, "thread_id", None), str):
            return thread
        if isinstance(held, list) and held and isinstance(held[0], tuple):
            return str(held[0][0])
        if isinstance(held, tuple) and held and isinstance(held[0], str):
            return held[0]
    return None


def _failing(operation: Callable[[sqlite3.Connection], Any]) -> Callable[..., Any]:
    def fail(db: sqlite3.Connection) -> Any:
        raise sqlite3.OperationalError("disk I/O error")

    fail.__qualname__ = operation.__qualname__
    return fail
