"""Shows what a server does now: the runs that go on, and how their nodes stand."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from runtime.cli_screen import SPINNER, Held, clean, on_one_line
from runtime.cli_view import (
    ASKS,
    STATUSES,
    Entered,
    counted,
    due,
    seconds,
    took,
    truncating,
    when,
)

__all__ = ["TYPES", "Keys", "Run", "Snapshot", "Source", "Top", "rows_of", "watch"]

#: Seconds between two questions to the server, and between two pictures: countdowns go on.
LOOK_S, FRAME_S = 1.0, 0.25
#: Below it, ids have lines of their own.
NARROW = 60
#: Most runs of a status that are asked for, and most of which the nodes are looked up.
MOST, LOOKED_INTO = 500, 30
#: Ends that somebody may have to look at, for how long they are told of, and most that are shown.
ENDS, LATELY_S, SHOWN = ("error", "timeout", "interrupted"), 3600.0, 5
#: Most runs that are asked for of each of them.
MOST_ENDED = 150
#: Lines that tell how nodes stand.
TYPES = (
    "run.recovered",
    "run.requeued",
    "node.started",
    "node.retrying",
    "node.completed",
    "node.failed",
    "node.interrupted",
    "node.cancelled",
    "call.retrying",
)


class Source(Protocol):
    """A server, as far as its public endpoints tell what goes on."""

    def info(self) -> Mapping[str, Any]: ...

    def runs(self, status: str, most: int, since: float = 0) -> Sequence[Mapping[str, Any]]:
        """The newest runs with this status, of those that changed since then."""
        ...

    def lines(self, run_id: str, after: int) -> Iterable[Mapping[str, Any]]:
        """The lines of `TYPES` that there are after a cursor, and `caught_up` or a terminal one."""
        ...

    def asks(self, row: Mapping[str, Any]) -> bool:
        """Whether the thread of a run that ended badly waits for an answer, and it is the latest
        there; once false, it stays so.
        """
        ...

    def live(self) -> Mapping[str, Any] | None:
        """What the admin listener tells of this worker; None without one."""
        ...


@dataclass(slots=True)
class _Node(Entered):
    task: str = ""
    path: tuple[str, ...] = ()
    #: The least that no open node of this label had when it was entered.
    number: int = 1
    #: Whether there are others of this label.
    beside: bool = False

    @property
    def name(self) -> str:
        return f"{self.label} #{self.number}" if self.beside else self.label


@dataclass(slots=True)
class Run:
    """A run that goes on, and its open nodes by task, as its lines tell of them."""

    row: Mapping[str, Any]
    cursor: int = 0
    nodes: dict[str, _Node] = field(default_factory=dict)
    #: Whether its lines have been read, as those of the newest runs are.
    looked_into: bool = False
    #: Seconds since its last line, by the admin listener.
    silence_s: float | None = None
    #: Whether its thread waits for an answer.
    asks: bool = False

    def take(self, lines: Iterable[Mapping[str, Any]], now: float) -> None:
        """Take in what is new in the log."""
        self.looked_into = True
        for said in lines:
            self._line(said, now)
            self.cursor = said.get("seq", said.get("after", self.cursor))

    def _line(self, said: Mapping[str, Any], now: float) -> None:
        data, task = said.get("data") or {}, said.get("task", "")
        match said.get("type"):
            case "node.started":
                self._node(said, now).started(said.get("attempt", 1))
            case "node.retrying":
                self._node(said, now).retrying(said, due(said, data, now))
                self._close(task, itself=False)
            case "call.retrying":
                self._node(said, now).call_retrying(data, due(said, data, now))
            case "run.recovered" | "run.requeued":
                self.nodes.clear()
            case str() as type if type.startswith("node."):
                self._close(task, itself=True)

    def _node(self, said: Mapping[str, Any], now: float) -> _Node:
        task = said.get("task", "")
        if task not in self.nodes:
            label = "/".join(map(on_one_line, [*said.get("ns", ()), said.get("node", "")]))
            path = tuple(said.get("path", ()))
            node = _Node(label=label, since=when(said, now), task=task, path=path)
            taken = set()
            for other in self.nodes.values():
                if other.label == label:
                    taken.add(other.number)
                    node.beside = other.beside = True
            node.number = next(n for n in count(1) if n not in taken)
            self.nodes[task] = node
        return self.nodes[task]

    def _close(self, task: str, *, itself: bool) -> None:
        inside = [t for t, node in self.nodes.items() if task in node.path]
        for gone in [*inside, *([task] if itself else [])]:
            self.nodes.pop(gone, None)

    def innermost(self) -> Iterator[_Node]:
        """Open nodes that have no open node inside."""
        around = {task for node in self.nodes.values() for task in node.path}
        return (node for task, node in self.nodes.items() if task not in around)

    def sleeping(self, now: float) -> int:
        return sum(
            node.due is not None or any(at > now for _, at in node.calls.values())
            for node in self.nodes.values()
        )

    def json(self, now: float) -> dict[str, Any]:
        """The run as one row, with how its nodes stand."""
        row = dict(self.row)
        started = seconds(self.row.get("started_at"))
        row["age_s"] = round(max(0.0, now - started), 3) if started is not None else None
        if self.silence_s is not None:
            row["silence_s"] = self.silence_s
        if self.asks:
            row["needs_answer"] = True
        if self.looked_into:
            row["nodes"] = [_json(node, now) for node in self.nodes.values()]
        return row


def _json(node: _Node, now: float) -> dict[str, Any]:
    told: dict[str, Any] = {
        "node": node.label,
        "task": node.task,
        "attempt": node.attempt,
        "state": "retrying" if node.due is not None else "running",
        "age_s": round(max(0.0, now - node.since), 3),
    }
    if node.due is not None:
        told["retry_in_s"] = round(max(0.0, node.due - now), 3)
        if node.jitter:
            told["jitter_s"] = node.jitter
    if node.calls:
        told["calls"] = {
            name: {"attempt": attempt, "retry_in_s": round(max(0.0, at - now), 3)}
            for name, (attempt, at) in node.calls.items()
        }
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a server does at a moment."""

    #: Those that wait to retry first, then the oldest: what hangs stands on top.
    running: Sequence[Run]
    #: Newest first.
    pending: Sequence[Run]
    slots: int
    #: Runs that came to one of `ENDS` lately, newest first; of the interrupted those that wait.
    ended: Sequence[Run] = ()
    #: Whether the admin listener was asked and answered.
    admin: bool = False

    @property
    def nodes(self) -> int:
        return sum(len(run.nodes) for run in self.running)

    def sleeping(self, now: float) -> int:
        """Nodes and calls that wait for their next attempt."""
        return sum(run.sleeping(now) for run in self.running)

    def came_to(self, status: str) -> int:
        """How many runs ended like this lately."""
        return sum(run.row["status"] == status for run in self.ended)

    def rows(self, now: float) -> Iterator[dict[str, Any]]:
        """For programs: the server, then its runs."""
        yield {
            "type": "server",
            "running": len(self.running),
            "pending": len(self.pending),
            "slots": self.slots,
            "nodes": self.nodes,
            "sleeping": self.sleeping(now),
            "last_hour": {status: self.came_to(status) for status in ENDS},
            "complete": max(len(self.running), len(self.pending)) < MOST
            and max(map(self.came_to, ENDS)) < MOST_ENDED
            and all(run.looked_into for run in self.running),
        }
        for run in [*self.running, *self.pending, *self.ended]:
            yield {"type": "run"} | run.json(now)


class Top:
    """Looks at a server again and again, and reads of each run only what is new."""

    def __init__(self, source: Source, clock: Callable[[], float]) -> None:
        self._source = source
        self._clock = clock
        self._runs: dict[str, Run] = {}
        #: Runs that ended lately and are known to ask nothing, or nothing any more.
        self._settled: set[str] = set()

    def look(self) -> Snapshot:
        running = [self._known(row) for row in self._source.runs("running", MOST)]
        running.sort(key=lambda run: run.row.get("started_at") or "")
        pending = [Run(row) for row in self._source.runs("pending", MOST)]
        now = self._clock()
        ended = self._ended(now)
        self._runs = {run.row["run_id"]: run for run in running}
        for run in running[:LOOKED_INTO]:
            if not run.looked_into or run.cursor < run.row.get("last_seq", 0):
                run.take(self._source.lines(run.row["run_id"], run.cursor), self._clock())
        live = self._source.live()
        for told in (live or {}).get("runs", ()):
            if (known := self._runs.get(told["run_id"])) is not None:
                known.silence_s = told.get("silence_s")
        slots = int(self._source.info().get("slots", 0))
        running.sort(key=lambda run: not run.sleeping(now))
        return Snapshot(
            running=running, pending=pending, slots=slots, ended=ended, admin=live is not None
        )

    def _ended(self, now: float) -> list[Run]:
        """Runs that somebody may have to look at, without those that were answered."""
        since = now - LATELY_S
        ended = [Run(row) for end in ENDS for row in self._source.runs(end, MOST_ENDED, since)]
        ended.sort(key=lambda run: run.row.get("ended_at") or "", reverse=True)
        self._settled &= {run.row["run_id"] for run in ended}
        for run in [run for run in ended if run.row["run_id"] not in self._settled][:LOOKED_INTO]:
            run.asks = self._source.asks(run.row)
            if not run.asks:
                self._settled.add(run.row["run_id"])
        return [
            run
            for run in ended
            if run.row["status"] != "interrupted" or run.row["run_id"] not in self._settled
        ]

    def _known(self, row: Mapping[str, Any]) -> Run:
        run = self._runs.get(row["run_id"])
        if run is None:
            return Run(row)
        run.row = row
        return run


class Keys(Held):
    """Keys that are pressed, one by one and unseen, as long as it is entered."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(keys=True)
        self._sleep = sleep

    def within(self, seconds: float) -> str:
        """What is typed until then; as soon as something is."""
        if self._before is None:
            self._sleep(seconds)
            return ""
        if not select.select([sys.stdin], [], [], seconds)[0]:
            return ""
        # An end of the input is a wish to leave as well.
        return os.read(sys.stdin.fileno(), 64).decode(errors="ignore") or "q"


def watch(
    top: Top,
    screen: Console,
    url: str,
    clock: Callable[[], float],
    keys: Keys,
    *,
    away: type[Exception],
) -> None:
    """Show the server until `q`; `away` is raised while it does not answer. Raises it at first."""
    picture = _Picture(top.look(), url, clock)
    looked = clock()
    with keys, Live(picture, console=screen, screen=True, auto_refresh=False) as live:
        while True:
            if keys.asked:
                live.stop()
                keys.stop()
                live.start()
            live.refresh()
            if "q" in keys.within(FRAME_S).lower():
                return
            if not 0 <= clock() - looked < LOOK_S:
                try:
                    picture.seen, picture.trouble = top.look(), ""
                except away as exc:
                    picture.trouble = str(exc)
                looked = clock()


class _Picture:
    """A snapshot as it fills a screen."""

    def __init__(self, seen: Snapshot, url: str, clock: Callable[[], float]) -> None:
        self.seen = seen
        #: Why what is seen is old; empty while it is not.
        self.trouble = ""
        self._url = url
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        now = self._clock()
        rows = list(rows_of(self.seen, now, options.max_width))
        title, numbers = _head(self.seen, self._url, now)
        head = [title, *numbers.wrap(console, options.max_width)]
        if self.trouble:
            trouble = Text(f"! {clean(self.trouble)}; asking again", "yellow")
            head += trouble.wrap(console, options.max_width)
        room = max(1, (options.height or console.height) - len(head) - 2)
        if len(rows) > room:
            hidden = len(rows) - room + 1
            rows = [*rows[: room - 1], Text(f"… and {counted(hidden, 'line')} more", "dim")]
        rows += [Text()] * (room - len(rows))
        for text in [*head, Text(), *rows, Text("q quits", "dim")]:
            yield truncating(text)


def _head(seen: Snapshot, url: str, now: float) -> tuple[Text, Text]:
    title = Text.assemble(("sereno top", "bold"), (f"  {clean(url)}", "dim"))
    numbers = [
        f"{_many(len(seen.running))} running of {seen.slots} slots",
        f"{_many(len(seen.pending))} queued",
        f"{counted(seen.nodes, 'node')} open",
        f"{seen.sleeping(now)} waiting to retry",
        *([f"nodes of {LOOKED_INTO} runs only"] if len(seen.running) > LOOKED_INTO else ()),
    ]
    if lately := [f"{_many(n, MOST_ENDED)} {end}" for end in ENDS if (n := seen.came_to(end))]:
        numbers.append(f"in the last hour: {', '.join(lately)}")
    return title, Text(" · ".join(numbers))


def rows_of(seen: Snapshot, now: float, width: int) -> Iterator[Text]:
    """Runs with their open nodes, what ended lately, then those that wait for a slot."""
    spinner = SPINNER[int(now / FRAME_S) % len(SPINNER)]
    for run in seen.running:
        yield from _run(run, now, width)
        for node in run.innermost():
            yield Text.assemble("  ", node.row(now, spinner))
    if not seen.running and not seen.pending:
        yield Text("no run goes on", "dim")
    for run in [*seen.ended[:SHOWN], *seen.pending]:
        yield from _run(run, now, width)


def _run(run: Run, now: float, width: int) -> Iterator[Text]:
    row = run.row
    status = row["status"]
    mark, style = STATUSES.get(status, ("·", ""))
    began = {"pending": "created_at", "running": "started_at"}.get(status, "ended_at")
    since = seconds(row.get(began))
    age = took(now - since) if since is not None else ""
    facts = {"pending": [f"queued {age}"], "running": [age]}.get(status, [f"{status} {age} ago"])
    if run.asks:
        facts.insert(0, ASKS)
    if run.silence_s is not None and run.silence_s >= 1:
        facts.append(f"silent for {took(run.silence_s)}")
    if row["thread_id"] != row["run_id"]:
        facts.append(f"thread {clean(row['thread_id'])}")
    run_id, graph, told = clean(row["run_id"]), clean(row["graph"]), "  ".join(facts)
    if width >= NARROW:
        yield Text.assemble((mark, style), f" {run_id} {graph}  ", (told, "dim"))
    else:
        yield Text.assemble((mark, style), f" {graph}  ", (told, "dim"))
        yield Text(f"  {run_id}")


def _many(runs: int, most: int = MOST) -> str:
    return f"{runs}{'+' if runs >= most else ''}"
