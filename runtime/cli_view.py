"""How the command line shows things: a run as it happens, and lists as tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Protocol, Self

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Line", "Plain", "RunView", "View", "clean", "compact", "graphs_table", "runs_table"]

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
#: Mark and style of each way that a run can stand.
STATUSES: Mapping[str, tuple[str, str]] = {
    "pending": ("…", "dim"),
    "running": ("▶", "cyan"),
    "success": ("✓", "green"),
    "error": ("✗", "red"),
    "timeout": ("✗", "red"),
    "interrupted": ("?", "yellow"),
    "cancelled": ("■", "yellow"),
}
#: What could move the cursor, colour the terminal or reorder its text: it comes from models.
_UNPRINTABLE = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10}
)


class Line(NamedTuple):
    """One line of a stream: its bytes without the line break, and what they say."""

    raw: bytes
    data: Mapping[str, Any]


class View(Protocol):
    """Where a run is shown, for as long as it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def line(self, line: Line) -> None:
        """Show a line of the stream."""
        ...

    def note(self, text: str) -> None:
        """Say something about the stream itself."""
        ...


class Plain:
    """The server's lines as they are, for whoever reads the pipe; notes go to stderr."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def line(self, line: Line) -> None:
        sys.stdout.buffer.write(line.raw + b"\n")
        sys.stdout.buffer.flush()

    def note(self, text: str) -> None:
        typer.echo(f"sereno: {clean(text)}", err=True)


@dataclass(slots=True)
class _Row:
    """A node that has started and not ended."""

    label: str
    #: Its task and those of the calls around it: a retry of any of them supersedes it.
    tasks: frozenset[str]
    attempt: int
    #: Unix seconds of its first attempt.
    since: float
    of: int | None = None
    #: When the next attempt is due, while it waits for that.
    due: float | None = None
    #: Calls inside it that wait for their next attempt: name → (attempt, due).
    calls: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(slots=True)
class _Speech:
    """A message of which tokens have come: the part that is not printed yet."""

    label: str
    tasks: frozenset[str]
    text: str = ""


class RunView:
    """A run on a terminal: what is over is printed, what goes on stands below and is redrawn."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._live = Live(self, console=console, refresh_per_second=10, transient=True)
        self._rows: dict[str, _Row] = {}
        self._speeches: dict[str, _Speech] = {}
        #: Messages whose text came as tokens, with the tasks that they belong to.
        self._spoken: dict[str, frozenset[str]] = {}
        #: What the run waits for while no node is open.
        self._waiting: str | None = "waiting for the first line"

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._waiting = None
        self._rows.clear()
        self._speeches.clear()
        self._live.stop()

    def note(self, text: str) -> None:
        self._print(Text(f"! {clean(text)}", "yellow"))

    def line(self, line: Line) -> None:
        said = line.data
        data = said.get("data") or {}
        task = said.get("task", "")
        tasks = frozenset([task, *said.get("path", ())])
        label = "/".join(map(clean, [*said.get("ns", ()), said.get("node") or ""]))
        match said.get("type"):
            case "run.queued":
                run_id, thread_id = clean(said["run_id"]), clean(said["thread_id"])
                thread = f" · thread {thread_id}" if thread_id != run_id else ""
                self._print(Text(f"▶ run {run_id}{thread}", "dim"))
                self._waiting = "queued"
            case "run.started":
                self._waiting = "running"
            case "run.recovered":
                self._end_all()
                lost = len(data.get("lost") or ())
                again = f"; {_count(lost, 'task')} again" if lost else ""
                reason = data.get("reason") or "restart"
                self.note(f"recovered after a {reason}, epoch {said['epoch']}{again}")
            case "run.requeued":
                self._end_all()
                self._waiting = "queued"
                self.note(f"given back to the queue: {data.get('reason')}")
            case "node.started":
                self._started(task, tasks, label, said)
            case "node.retrying":
                self._retrying(task, tasks, label, said, data)
            case "call.retrying":
                self._call_retrying(task, label, said, data)
            case "token":
                self._token(tasks, label, data)
            case "message":
                self._message(label, data)
            case "custom":
                self._print(_tagged(label, compact(data.get("value")), "cyan"))
            case "values":
                self._print(_tagged("state", compact(data.get("values")), "dim"))
            case "node.completed" | "node.failed" | "node.interrupted" | "node.cancelled" as kind:
                self._end_inside(task)
                self._rows.pop(task, None)
                self._print(_node_end(kind, label, data))
            case _ if data.get("final"):
                self._waiting = None
                self._end_all()
                for text in _summary(data):
                    self._print(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """What goes on now. Called by the thread that redraws, hence the copies."""
        now = self._clock()
        spinner = SPINNER[int(now * 10) % len(SPINNER)]
        for speech in list(self._speeches.values()):
            yield _tagged(speech.label, speech.text)
        rows = list(self._rows.values())
        room = max(3, console.height - 6)
        for row in rows[:room]:
            yield _truncating(_row(row, now, spinner))
        if len(rows) > room:
            yield Text(f"  … and {len(rows) - room} more", "dim")
        if not rows and self._waiting is not None:
            yield Text(f"{spinner} {self._waiting}", "dim")

    def _started(
        self, task: str, tasks: frozenset[str], label: str, said: Mapping[str, Any]
    ) -> None:
        row = self._rows.get(task)
        if row is None:
            self._rows[task] = _Row(label, tasks, said["attempt"], self._when(said))
        else:
            row.attempt, row.due = said["attempt"], None
            row.calls = {}

    def _retrying(
        self,
        task: str,
        tasks: frozenset[str],
        label: str,
        said: Mapping[str, Any],
        data: Mapping[str, Any],
    ) -> None:
        row = self._rows.setdefault(task, _Row(label, tasks, said["attempt"], self._when(said)))
        self._end_inside(task)
        for message_id in [m for m, tasks in self._spoken.items() if task in tasks]:
            del self._spoken[message_id]
        row.attempt, row.of = said["attempt"] + 1, data.get("max_attempts")
        row.due, row.calls = self._due(said, data), {}
        self._print(_retry(label, said["attempt"], data))

    def _call_retrying(
        self, task: str, label: str, said: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        call, attempt = clean(data.get("call") or "call"), data.get("attempt", 1)
        for message_id in data.get("message_ids") or ():
            if message_id in self._speeches:
                self._end_speech(message_id)
            self._spoken.pop(message_id, None)
        if (row := self._rows.get(task)) is not None:
            row.calls = {call: (attempt + 1, self._due(said, data))}
        self._print(_retry(f"{label} · {call}", attempt, data))

    # What models say, printed line by line as it comes.

    def _token(self, tasks: frozenset[str], label: str, data: Mapping[str, Any]) -> None:
        message_id = data["message_id"]
        self._spoken[message_id] = tasks
        speech = self._speeches.setdefault(message_id, _Speech(label, tasks))
        *whole, rest = (speech.text + clean(data.get("text") or "")).split("\n")
        *full, speech.text = self._wrapped(label, rest)
        full = [*(text for paragraph in whole for text in self._wrapped(label, paragraph)), *full]
        self._print(*(_tagged(label, text) for text in full))

    def _message(self, label: str, data: Mapping[str, Any]) -> None:
        message_id = data.get("message_id") or ""
        if message_id in self._speeches:
            self._end_speech(message_id)
        elif data.get("text") and message_id not in self._spoken:
            for paragraph in clean(data["text"]).split("\n"):
                self._print(*(_tagged(label, text) for text in self._wrapped(label, paragraph)))
        for call in data.get("tool_calls") or ():
            name, args = clean(str(call.get("name"))), compact(call.get("args"))
            self._print(_tagged(label, f"→ {name} {args}", "magenta"))

    def _end_inside(self, task: str) -> None:
        """A task's attempt is over: print what is left of it, close what is open in it."""
        for message_id in [m for m, speech in self._speeches.items() if task in speech.tasks]:
            self._end_speech(message_id)
        for inner in [t for t, row in self._rows.items() if task in row.tasks and t != task]:
            del self._rows[inner]

    def _end_all(self) -> None:
        for message_id in list(self._speeches):
            self._end_speech(message_id)
        self._rows.clear()

    def _end_speech(self, message_id: str) -> None:
        speech = self._speeches.pop(message_id)
        if speech.text:
            self._print(_tagged(speech.label, speech.text))

    def _wrapped(self, label: str, paragraph: str) -> list[str]:
        width = max(20, self._console.width - cell_len(label) - 3)
        return [line.plain for line in Text(paragraph).wrap(self._console, width)] or [""]

    def _print(self, *texts: Text) -> None:
        for text in texts:
            self._console.print(text, highlight=False)

    # Times are the server's; a clock that is off must not show nonsense.

    def _when(self, said: Mapping[str, Any]) -> float:
        return min(datetime.fromisoformat(said["ts"]).timestamp(), self._clock())

    def _due(self, said: Mapping[str, Any], data: Mapping[str, Any]) -> float:
        return self._when(said) + float(data.get("retry_in_ms") or 0) / 1000


def runs_table(runs: Sequence[Mapping[str, Any]], now: float, width: int) -> Table:
    """Runs in the order given. An id is never cut: what is less needed gives way to it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    wide = width >= 100
    table.add_column("run", no_wrap=True)
    table.add_column("graph", overflow="fold", min_width=8)
    if wide:
        table.add_column("thread", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in ("age", "took", "lines") if wide else ("age", "took"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        mark, style = STATUSES.get(run["status"], ("·", ""))
        started, ended = _seconds(run.get("started_at")), _seconds(run.get("ended_at"))
        took = (ended if ended is not None else now) - started if started is not None else None
        created = _seconds(run.get("created_at"))
        cells = [Text(clean(run["run_id"])), Text(clean(run["graph"]))]
        if wide:
            cells.append(Text(clean(run["thread_id"])))
        cells.append(Text(f"{mark} {run['status']}", style))
        cells.append(Text(_took(now - created) if created is not None else ""))
        cells.append(Text(_took(took) if took is not None else ""))
        if wide:
            cells.append(Text(str(run.get("last_seq", ""))))
        table.add_row(*cells)
    return table


def graphs_table(graphs: Sequence[Mapping[str, Any]]) -> Table:
    """Graphs that a server has, with what a run of one can start from."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("graph", overflow="fold", min_width=8)
    for name in ("nodes", "default input", "description"):
        table.add_column(name, overflow="fold")
    for graph in graphs:
        given = graph.get("default_input")
        table.add_row(
            Text(clean(graph["name"])),
            Text(clean(", ".join(graph.get("nodes") or ()))),
            Text(compact(given, 80) if given is not None else ""),
            Text(clean(graph.get("description") or "")),
        )
    return table


def clean(text: str) -> str:
    """Text that leaves the terminal alone."""
    return str(text).translate(_UNPRINTABLE)


def compact(value: Any, most: int = 400) -> str:
    """A value as JSON on one line, cut when long."""
    text = clean(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= most else text[: most - 1] + "…"


def _row(row: _Row, now: float, spinner: str) -> Text:
    if row.due is not None:
        return Text(f"↻ {row.label}  {_next_attempt(row.attempt, row.of, row.due - now)}", "yellow")
    text = Text.assemble((spinner, "cyan"), f" {row.label}  ", (_took(now - row.since), "dim"))
    if row.attempt > 1:
        text.append(f"  attempt {row.attempt}" + (f" of {row.of}" if row.of else ""), "dim")
    for call, (attempt, due) in row.calls.items():
        if due > now:
            text.append(f"  ↻ {call}  {_next_attempt(attempt, None, due - now)}", "yellow")
    return text


def _next_attempt(attempt: int, of: int | None, left: float) -> str:
    return f"attempt {attempt}{f' of {of}' if of else ''} " + (
        f"in {left:.1f} s" if left > 0 else "is due"
    )


def _retry(label: str, attempt: int, data: Mapping[str, Any]) -> Text:
    pause = _took(float(data.get("retry_in_ms") or 0) / 1000)
    return Text(f"↻ {label}  attempt {attempt} failed: {_cause(data)}; again in {pause}", "yellow")


def _node_end(kind: str, label: str, data: Mapping[str, Any]) -> Text:
    took = _took(float(data.get("duration_ms") or 0) / 1000)
    attempts = data.get("attempts") or 0
    tries = f" · {attempts} attempts" if attempts > 1 else ""
    match kind:
        case "node.completed":
            how = "cached" if data.get("cached") else "recovered" if data.get("recovered") else took
            return Text.assemble(("✓", "green"), f" {label}  ", (how + tries, "dim"))
        case "node.failed":
            return Text.assemble(("✗", "red"), f" {label}  {_cause(data)} ", (took + tries, "dim"))
        case "node.interrupted":
            return Text.assemble(("?", "yellow"), f" {label}  waits for an answer")
        case _:
            return Text.assemble(("■", "yellow"), f" {label}  cancelled ", (took + tries, "dim"))


def _summary(data: Mapping[str, Any]) -> Iterator[Text]:
    mark, style = STATUSES.get(data["status"], ("·", ""))
    numbers = [
        _count(data[name], name.removesuffix("s"))
        for name in ("nodes", "attempts")
        if data.get(name)
    ]
    retries = data.get("retries") or 0
    numbers.append("1 retry" if retries == 1 else f"{retries} retries")
    if data.get("backoff_ms"):
        numbers.append(f"{_took(data['backoff_ms'] / 1000)} of back-off")
    if tokens := data.get("tokens"):
        numbers.append(" / ".join(f"{count} {kind}" for kind, count in tokens.items()) + " tokens")
    after = f" after {_took(data['duration_ms'] / 1000)}" if data.get("duration_ms") else ""
    yield Text.assemble(
        (f"{mark} {data['status']}", f"bold {style}"), (f"{after} · {' · '.join(numbers)}", "dim")
    )
    if error := data.get("error"):
        where = f" in {clean(error['node'])}" if error.get("node") else ""
        yield Text(f"  {clean(error.get('code') or 'error')}{where}: {_cause(error)}", "red")
    if data.get("reason"):
        yield Text(f"  reason: {clean(data['reason'])}")
    for interrupt in data.get("interrupts") or ():
        yield Text(f"  asks: {compact(interrupt.get('value'), 2000)}", "yellow")
    if data.get("output") is not None:
        yield Text(f"  output: {compact(data['output'], 2000)}")


def _cause(data: Mapping[str, Any]) -> str:
    said = [data.get("error_class") or "error"]
    if data.get("error_type"):
        said.append(f"({data['error_type']})")
    if data.get("detail"):
        said.append(f"— {' '.join(str(data['detail']).split())}")
    return clean(" ".join(said))


def _tagged(label: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{label} │ ", "dim"), (text, style))


def _truncating(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _seconds(stamp: str | None) -> float | None:
    return datetime.fromisoformat(stamp).timestamp() if stamp else None


def _took(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} m"
    return f"{hours // 24} d {hours % 24:02d} h"
