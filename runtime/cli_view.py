"""How the command line shows things: a run as it happens, and lists as tables."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from runtime.cli_question import asked
from runtime.cli_screen import SPINNER, Held, clean, compact, on_one_line

__all__ = [
    "ASKS",
    "STATUSES",
    "Entered",
    "Line",
    "Plain",
    "RunView",
    "View",
    "counted",
    "due",
    "graphs_table",
    "runs_table",
    "seconds",
    "took",
    "truncating",
    "when",
]

#: Columns of a list of runs, and the width from which all of them are wanted.
COLUMNS = ("run", "graph", "thread", "status", "age", "took", "lines")
WIDE = 100
#: Seconds between two pictures of what goes on.
FRAME_S = 0.1
#: Values that a node may write before the oldest are left out.
MOST_INSIDE = 200
#: Levels that are indented: a narrow terminal has to hold the text as well.
DEEPEST = 6
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
#: What is said of a run whose thread waits for somebody.
ASKS = "needs an answer"


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


@dataclass(slots=True, kw_only=True)
class Entered:
    """A node that was entered, and how it stands."""

    #: Its name, as far as it is not told by what is around it.
    label: str
    #: Unix seconds of its first attempt.
    since: float
    attempt: int = 1
    of: int | None = None
    #: When the next attempt is due at the earliest, the seconds by which that may be later, and
    #: why it is needed, while the node waits for it.
    due: float | None = None
    jitter: float = 0.0
    cause: str = ""
    #: Calls inside it that wait for their next attempt: name → (attempt, due).
    calls: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells it from its neighbours."""
        return self.label

    def started(self, attempt: int) -> None:
        self.attempt, self.due, self.calls = attempt, None, {}

    def retrying(self, said: Mapping[str, Any], due: float) -> None:
        """Take in a `node.retrying`."""
        data = said.get("data") or {}
        self.attempt, self.of = said.get("attempt", 1) + 1, data.get("max_attempts")
        self.due, self.jitter, self.cause, self.calls = due, _jitter(data), _cause(data), {}

    def call_retrying(self, data: Mapping[str, Any], due: float) -> None:
        """Take in a `call.retrying`; the calls before it have come through."""
        self.calls = {clean(data.get("call") or "call"): (data.get("attempt", 1) + 1, due)}

    def row(self, now: float, spinner: str) -> Text:
        """The node on one line."""
        if self.due is not None:
            again = _next_attempt(self.attempt, self.of, self.due - now, self.jitter)
            return Text.assemble(
                (f"↻ {self.name}  {again}", "yellow"),
                (f"  {self.cause}" if self.cause else "", "dim"),
            )
        text = Text.assemble((spinner, "cyan"), f" {self.name}  ", (took(now - self.since), "dim"))
        if self.attempt > 1:
            of = f" of {self.of}" if self.of else ""
            text.append(f"  attempt {self.attempt}{of}", "dim")
        for call, (attempt, due) in self.calls.items():
            if due > now:
                text.append(f"  ↻ {call}  {_next_attempt(attempt, None, due - now)}", "yellow")
        return text


@dataclass(slots=True, eq=False)
class _Said:
    """Something inside a node: text of a model, a value, an attempt that failed."""

    seq: int
    text: str
    style: str = ""
    message_id: str = ""
    #: Whether it is output, which a failed attempt takes with it.
    output: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class _Visit(Entered):
    """A node in the tree, with what is inside it in the order in which it began."""

    task: str
    seq: int
    step: int | None
    #: Its place among the visits of this node that go on beside each other, and their count.
    number: int = 1
    twins: list[int] = field(default_factory=lambda: [1])
    ended: Text | None = None
    #: Whether nobody executes it now, after a crash or a drain; it will begin anew.
    stopped: bool = False
    inside: list[_Visit | _Said] = field(default_factory=list)
    #: How many values are left out because there were too many.
    left_out: int = 0

    @property
    def name(self) -> str:
        return f"{self.label} #{self.number}" if self.twins[0] > 1 else self.label

    def say(self, said: _Said) -> None:
        self.inside.append(said)
        if len(self.inside) > 2 * MOST_INSIDE:
            values = [i for i in self.inside if isinstance(i, _Said) and not i.message_id]
            old = set(map(id, values[:-MOST_INSIDE]))
            self.left_out += len(old)
            self.inside = [i for i in self.inside if id(i) not in old]

    @property
    def open(self) -> bool:
        return self.ended is None and not self.stopped

    def visits(self) -> Iterator[_Visit]:
        return (item for item in self.inside if isinstance(item, _Visit))

    def below(self) -> Iterator[_Visit]:
        """All visits inside it, at any depth."""
        for visit in self.visits():
            yield visit
            yield from visit.below()


class _Printed(NamedTuple):
    """Something above what is redrawn: how it is made, and the cells of each of its rows."""

    texts: Callable[[], Iterable[Text]]
    rows: list[int]


class RunView:
    """A run on a terminal, as a tree of its nodes.

    What is over is printed; the superstep that goes on stands below and is redrawn, so that what a
    failed attempt has said can vanish. Where nothing can be redrawn, nodes are printed as they end.
    """

    def __init__(
        self,
        console: Console,
        clock: Callable[[], float] = time.time,
        command: Callable[..., str] | None = None,
    ) -> None:
        self._console = console
        self._clock = clock
        #: Makes the command lines that the summary names.
        self._command = command
        self._redraws = console.is_interactive
        self._width = console.width
        self._held = Held()
        #: What was printed last, and the cells of each row that stands below.
        self._printed_last: deque[_Printed] = deque(maxlen=100)
        self._rows: list[int] = []
        #: Always taken before Live's own: redrawing never sees half of a line's effect.
        self._lock = threading.RLock()
        self._left = threading.Event()
        self._redrawing = threading.Thread(target=self._redraw, daemon=True)
        #: What stands below; its visits are those of the root graph.
        self._root = _Visit(label="", since=0, task="", seq=0, step=None)
        self._visits: dict[str, _Visit] = {}
        #: What the run waits for while no node is open.
        self._waiting: str | None = "waiting for the first line"

    def __enter__(self) -> Self:
        if self._redraws:
            self._held.__enter__()
        self._begin()
        if self._redraws:
            self._redrawing.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        try:
            if self._redraws:
                self._redrawing.join()
            self._waiting = None
            self._settle(all=True)
            self._erase()
        finally:
            self._held.__exit__()

    def _begin(self) -> None:
        self._width = self._console.width
        self._rows = []
        self._live = Live(
            self,
            console=self._console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        self._live.start()

    def _redraw(self) -> None:
        while not self._left.wait(FRAME_S):
            with self._lock:
                if self._held.asked:
                    self._erase()
                    self._held.stop()
                    self._printed_last.clear()  # who knows what stands above now
                    self._begin()
                self._fit()
                self._live.refresh()

    def _fit(self) -> None:
        """Draw anew what stands on a terminal that became narrower, and broke its rows there."""
        width, height = self._console.size
        if not self._redraws or width >= self._width:
            return
        up = _broken(self._rows, width)
        room, again = height - up, list[_Printed]()
        up -= len(self._rows)  # which go with the picture
        while self._printed_last:
            rows = _broken(self._printed_last[-1].rows, width)
            if rows > room:  # it is scrolled out of reach
                break
            room, up = room - rows, up + rows
            again.append(self._printed_last.pop())
        self._erase()
        erasing = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)) * up
        self._console.control(Control(ControlType.CARRIAGE_RETURN, *erasing))
        self._printed_last.clear()
        self._begin()
        for printed in reversed(again):
            self._tell(printed.texts)

    def _erase(self) -> None:
        """Take the picture away, without a last one that could scroll what is above."""
        self._live.update(Text())
        self._live.stop()

    def note(self, text: str) -> None:
        with self._lock:
            self._print(Text(f"! {clean(text)}", "yellow"))

    def line(self, line: Line) -> None:
        with self._lock:
            self._line(line.data, line.data.get("data") or {})

    def _line(self, said: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        match said.get("type"):
            case "run.queued":
                run_id, thread_id = clean(said["run_id"]), clean(said["thread_id"])
                thread = f" · thread {thread_id}" if thread_id != run_id else ""
                self._print(Text(f"▶ run {run_id}{thread}", "dim"))
                self._waiting = "queued"
            case "run.started":
                self._waiting = "running"
            case "run.recovered":
                lost = data.get("lost") or ()
                self._recovered({task["task"] for task in lost}, data.get("discard_from") or 0)
                again = f"; {counted(len(lost), 'task')} again" if lost else ""
                reason = data.get("reason") or "restart"
                self._waiting = "running"
                self.note(f"recovered after a {reason}, epoch {said['epoch']}{again}")
            case "run.requeued":
                for visit in self._root.below():
                    visit.stopped = visit.ended is None
                self._waiting = "queued"
                self.note(f"given back to the queue: {data.get('reason')}")
            case "node.started":
                self._started(said)
            case "node.retrying":
                self._retrying(self._visit(said), said, data)
            case "call.retrying":
                self._call_retrying(self._visit(said), said, data)
            case "token":
                self._token(self._visit(said), said, data)
            case "message":
                self._message(self._visit(said), said, data)
            case "custom":
                self._visit(said).say(_Said(said["seq"], _plain(data.get("value")), "cyan"))
            case "values":
                self._settle()
                self._print(_tagged("state", compact(data.get("values")), "dim"))
            case "node.completed" | "node.failed" | "node.interrupted" | "node.cancelled" as kind:
                visit = self._visit(said)
                visit.ended = _node_end(kind, visit, data)
                visit.inside = [
                    i for i in visit.inside if not (isinstance(i, _Visit) and i.stopped)
                ]
                self._visits.pop(visit.task, None)
                if not self._redraws and not said.get("path"):
                    self._settle()
            case _ if data.get("final"):
                self._waiting = None
                self._settle(all=True)
                self._end(said, data)

    # The tree.

    def _visit(self, said: Mapping[str, Any]) -> _Visit:
        """The visit that a line is from; made when it is the first that we see of it."""
        task, path = said.get("task", ""), said.get("path") or ()
        if (known := self._visits.get(task)) is not None:
            return known
        names = [on_one_line(name) for name in [*(said.get("ns") or ()), said.get("node") or ""]]
        around, label = self._root, "/".join(names)
        for depth in range(len(path), 0, -1):
            if (outer := self._visits.get(path[depth - 1])) is not None:
                around, label = outer, "/".join(names[depth:])
                break
        step = said.get("step")
        visit = _Visit(
            label=label,
            since=when(said, self._clock()),
            attempt=said.get("attempt", 1),
            task=task,
            seq=said["seq"],
            step=step,
        )
        beside = [v for v in around.visits() if v.label == label and v.step == step]
        if beside:
            visit.twins = beside[0].twins
            visit.twins[0] += 1
            visit.number = visit.twins[0]
        around.inside.append(visit)
        self._visits[task] = visit
        return visit

    def _started(self, said: Mapping[str, Any]) -> None:
        outermost = not said.get("path")
        if outermost and any(v.step != said.get("step") for v in self._root.visits()):
            self._settle()
        visit = self._visit(said)
        visit.ended, visit.stopped = None, False
        visit.started(said["attempt"])

    def _retrying(self, visit: _Visit, said: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        self._discard(visit, data.get("discard_from") or visit.seq)
        visit.retrying(said, self._due(said, data))
        self._failed_once(visit, said, _retry(said["attempt"], data))

    def _call_retrying(
        self, visit: _Visit, said: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        gone = set(data.get("message_ids") or ())
        for speaker in (visit, *visit.below()):
            speaker.inside = [
                i for i in speaker.inside if isinstance(i, _Visit) or i.message_id not in gone
            ]
        visit.call_retrying(data, self._due(said, data))
        call = clean(data.get("call") or "call")
        self._failed_once(visit, said, f"{call}  {_retry(data.get('attempt', 1), data)}")

    def _failed_once(self, visit: _Visit, said: Mapping[str, Any], text: str) -> None:
        if self._redraws:
            visit.say(_Said(said["seq"], f"↻ {text}", "yellow", output=False))
        else:
            self._print(Text(f"↻ {visit.name}  {text}", "yellow"))

    def _discard(self, visit: _Visit, seq: int) -> None:
        """The visit's attempt failed: what it has said and what was inside it do not count."""
        for inner in visit.below():
            self._visits.pop(inner.task, None)
        visit.inside = [
            i for i in visit.inside if i.seq < seq or (isinstance(i, _Said) and not i.output)
        ]
        self._visits |= {inner.task: inner for inner in visit.below() if inner.ended is None}

    def _recovered(self, lost: set[str], seq: int) -> None:
        """Visits that are lost have said nothing, and begin anew where they stand."""
        for visit in [self._root, *self._root.below()]:
            if visit.task in lost:
                visit.inside = [
                    i for i in visit.inside if i.seq < seq or isinstance(i, _Visit) or not i.output
                ]
                visit.ended, visit.stopped = None, True
                self._visits[visit.task] = visit

    def _token(self, visit: _Visit, said: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        text = clean(data.get("text") or "")
        if (speech := _speech(visit, data["message_id"])) is not None:
            speech.text += text
        else:
            visit.say(_Said(said["seq"], text, message_id=data["message_id"]))

    def _message(self, visit: _Visit, said: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        message_id, text = data.get("message_id") or "", clean(data.get("text") or "")
        if data.get("role") == "tool":
            name = clean(str(data.get("name") or "tool"))
            visit.say(_Said(said["seq"], f"← {name} {compact(text)}", "magenta", message_id))
        elif (speech := _speech(visit, message_id)) is not None:
            speech.text = text or speech.text
        elif text:
            visit.say(_Said(said["seq"], text, message_id=message_id))
        for call in data.get("tool_calls") or ():
            name, args = clean(str(call.get("name"))), compact(call.get("args"))
            visit.say(_Said(said["seq"], f"→ {name} {args}", "magenta", message_id))

    # Printing: what is over.

    def _settle(self, *, all: bool = False) -> None:
        """Print the visits of the root graph that are over; the open ones too when all are."""
        over = [v for v in self._root.visits() if all or v.ended is not None]
        self._root.inside = [v for v in self._root.visits() if not (all or v.ended is not None)]
        for visit in over:
            for gone in [visit, *visit.below()]:
                self._visits.pop(gone.task, None)
        for visit in over:
            self._tell(partial(self._printed, visit, 0))

    def _printed(self, visit: _Visit, depth: int) -> Iterator[Text]:
        indent = "  " * min(depth, DEEPEST)
        yield Text.assemble(indent, visit.ended or Text(f"… {visit.name}  not over", "dim"))
        indent += "  "
        if visit.left_out:
            yield Text(f"{indent}… {visit.left_out} earlier values", "dim")
        for item in visit.inside:
            if isinstance(item, _Visit):
                yield from self._printed(item, depth + 1)
            elif item.output:
                for text in self._wrapped(item.text, len(indent) + 2):
                    yield _barred(indent, text, item.style)
            else:
                for number, text in enumerate(self._wrapped(item.text, len(indent) + 2)):
                    yield Text(indent + "  " * (number > 0) + text, item.style)

    def _wrapped(self, text: str, taken: int) -> Iterator[str]:
        width = max(10, self._console.width - taken)
        for paragraph in text.strip("\n").split("\n"):
            wrapped = Text(paragraph).wrap(self._console, width)
            yield from [line.plain.rstrip() for line in wrapped] or [""]

    def _print(self, *texts: Text) -> None:
        self._tell(lambda: texts)

    def _tell(self, texts: Callable[[], Iterable[Text]]) -> None:
        self._fit()
        if not (told := Group(*texts())).renderables:
            return
        self._console.print(told, highlight=False)
        if self._redraws:
            rows = map(Segment.get_line_length, self._console.render_lines(told, pad=False))
            self._printed_last.append(_Printed(texts, [*rows]))

    def _asked(self, interrupt: Mapping[str, Any]) -> Iterator[Text]:
        yield Text("  asks", "yellow")
        for told in asked(interrupt):
            yield from (_barred("  ", text, "") for text in self._wrapped(told, 4))

    def _end(self, said: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        self._print(*_summary(data))
        interrupts = data.get("interrupts") or ()
        if isinstance(interrupts, Mapping):  # too large for the line
            self._print(Text(f"  asks: {compact(interrupts)}", "yellow"))
            interrupts = ()
        for interrupt in interrupts:
            self._tell(partial(self._asked, interrupt))
        if data.get("output") is not None:
            self._print(Text(f"  output: {compact(data['output'])}"))
        if said.get("trace_id"):
            self._copied(f"  trace {clean(said['trace_id'])}")
        if self._command is not None:
            self._copied(f"  {self._command('trace', said['run_id']).strip('`')}")

    def _copied(self, text: str) -> None:
        """Print what is there to be copied: never broken by us."""
        self._console.print(Text(text, "dim"), soft_wrap=True, highlight=False)

    # Redrawing: what goes on.

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width, height = options.size
        drawn = [truncating(text) for text in self._drawn(console)][:height]
        self._rows = [min(text.cell_len, width) for text in drawn]
        yield from drawn

    def _drawn(self, console: Console) -> Iterator[Text]:
        now = self._clock()
        spinner = SPINNER[int(now / FRAME_S) % len(SPINNER)]
        room = max(1, console.height - 2)
        rows = list(_preorder(self._root, 0))
        if len(rows) > room:
            rows = [(visit, depth) for visit, depth in rows if visit.ended is None]
        speaking = sum(1 for visit, _ in rows if visit.open and _latest(visit))
        share = (room - min(len(rows), room)) // max(1, speaking)
        for visit, depth in rows if len(rows) <= room else rows[: room - 1]:
            yield Text.assemble("  " * depth, _row(visit, now, spinner))
            latest = _latest(visit) if visit.open else None
            if latest is not None and share:
                indent = "  " * (depth + 1)
                # As much as can be shown; wrapping a whole book ten times a second would be slow.
                tail = latest.text[-share * console.width :]
                for text in [*self._wrapped(tail, len(indent) + 2)][-share:]:
                    yield _barred(indent, text, latest.style)
        if len(rows) > room:
            yield Text(f"… and {len(rows) - room + 1} more", "dim")
        if self._waiting is not None and not any(visit.open for visit, _ in rows):
            yield Text(f"{spinner} {self._waiting}", "dim")

    def _due(self, said: Mapping[str, Any], data: Mapping[str, Any]) -> float:
        return due(said, data, self._clock())


def when(said: Mapping[str, Any], now: float) -> float:
    """A line's time, by the server's clock: one that is ahead must not show nonsense."""
    return min(datetime.fromisoformat(said["ts"]).timestamp(), now)


def due(said: Mapping[str, Any], data: Mapping[str, Any], now: float) -> float:
    """When what a retry line tells of is tried again at the earliest."""
    return when(said, now) + float(data.get("retry_in_ms") or 0) / 1000


def runs_table(
    runs: Sequence[Mapping[str, Any]], now: float, width: int, asking: Collection[str] = ()
) -> Table:
    """Runs in the order given; `asking` are the ids of those whose thread waits for an answer.

    Ids are never cut, nor are graphs while a column can go instead.
    """
    gap = 2 if width >= WIDE else 1
    columns = {name: [_cell(run, name, now) for run in runs] for name in COLUMNS}
    for run, cell in zip(runs, columns["status"], strict=True):
        if run["run_id"] in asking:
            also = "" if run["status"] == "interrupted" else f"{run['status']}, "
            cell.plain = f"{cell.plain[:1]} {also}{ASKS}"

    def needed() -> int:
        widths = (max(cell_len(c.plain) for c in [Text(n), *cs]) for n, cs in columns.items())
        return sum(widths) + gap * (len(columns) - 1)

    for name in ("thread", "lines") if width < WIDE else ():
        del columns[name]
    for name in ("took", "age"):
        if needed() > width:
            del columns[name]
    if needed() > width:  # the mark says it as well
        columns["status"] = [Text(cell.plain[:1], cell.style) for cell in columns["status"]]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for name in columns:
        folds = name in ("graph", "thread")
        heading = name if name != "status" or needed() <= width else ""
        table.add_column(
            heading,
            justify="right" if name in ("age", "took", "lines") else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "crop",
            min_width=min(8, width // 4) if name == "graph" else None,
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _cell(run: Mapping[str, Any], column: str, now: float) -> Text:
    started, ended = seconds(run.get("started_at")), seconds(run.get("ended_at"))
    created = seconds(run.get("created_at"))
    match column:
        case "run":
            return Text(clean(run["run_id"]))
        case "graph":
            return Text(clean(run["graph"]))
        case "thread":
            return Text(clean(run["thread_id"]))
        case "status":
            mark, style = STATUSES.get(run["status"], ("·", ""))
            return Text(f"{mark} {run['status']}", style)
        case "age":
            return Text(took(now - created) if created is not None else "")
        case "took":
            until = ended if ended is not None else now
            return Text(took(until - started) if started is not None else "")
        case _:
            return Text(str(run.get("last_seq", "")))


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


def _broken(rows: Iterable[int], width: int) -> int:
    """How many rows a terminal makes of rows that became too long for it."""
    return sum(max(1, -(-cells // width)) for cells in rows)


def _preorder(visit: _Visit, depth: int) -> Iterator[tuple[_Visit, int]]:
    for inner in list(visit.visits()):
        yield inner, min(depth, DEEPEST)
        yield from _preorder(inner, depth + 1)


def _row(visit: _Visit, now: float, spinner: str) -> Text:
    if visit.ended is not None:
        return visit.ended
    if visit.stopped:
        return Text(f"… {visit.name}  will begin anew", "dim")
    return visit.row(now, spinner)


def _latest(visit: _Visit) -> _Said | None:
    """What the node says now: the newest output of itself."""
    last = visit.inside[-1] if visit.inside else None
    return last if isinstance(last, _Said) and last.output else None


def _speech(visit: _Visit, message_id: str) -> _Said | None:
    """What was heard of a message so far."""
    for item in reversed(visit.inside):
        if isinstance(item, _Said) and item.message_id == message_id != "":
            return item
    return None


def _next_attempt(attempt: int, of: int | None, left: float, jitter: float = 0.0) -> str:
    if left > 0:
        when = f"in {left:.1f}{f' to {left + jitter:.1f}' if jitter else ''} s"
    else:  # the dice have fallen, but nobody has told how
        when = f"within {left + jitter:.1f} s" if left + jitter > 0 else "is due"
    return f"attempt {attempt}{f' of {of}' if of else ''} {when}"


def _retry(attempt: int, data: Mapping[str, Any]) -> str:
    least, jitter = float(data.get("retry_in_ms") or 0) / 1000, _jitter(data)
    if jitter and least + jitter < 60:
        pause = f"{least:.1f} to {least + jitter:.1f} s"
    else:
        pause = f"{took(least)} to {took(least + jitter)}" if jitter else took(least)
    return f"attempt {attempt} failed: {_cause(data)}; again in {pause}"


def _jitter(data: Mapping[str, Any]) -> float:
    """Seconds that LangGraph may add to a back-off, at random."""
    return float(data.get("jitter_ms") or 0) / 1000


def _node_end(kind: str, visit: _Visit, data: Mapping[str, Any]) -> Text:
    lasted = took(float(data.get("duration_ms") or 0) / 1000)
    attempts = data.get("attempts") or 0
    tries = f" · {attempts} attempts" if attempts > 1 else ""
    name = visit.name
    match kind:
        case "node.completed":
            how = (
                "cached" if data.get("cached") else "recovered" if data.get("recovered") else lasted
            )
            return Text.assemble(("✓", "green"), f" {name}  ", (how + tries, "dim"))
        case "node.failed":
            return Text.assemble(("✗", "red"), f" {name}  {_cause(data)} ", (lasted + tries, "dim"))
        case "node.interrupted":
            return Text.assemble(("?", "yellow"), f" {name}  waits for an answer")
        case _:
            return Text.assemble(("■", "yellow"), f" {name}  cancelled ", (lasted + tries, "dim"))


def _summary(data: Mapping[str, Any]) -> Iterator[Text]:
    mark, style = STATUSES.get(data["status"], ("·", ""))
    numbers = [
        counted(data[name], name.removesuffix("s"))
        for name in ("nodes", "attempts")
        if data.get(name)
    ]
    retries = data.get("retries") or 0
    numbers.append("1 retry" if retries == 1 else f"{retries} retries")
    if data.get("backoff_ms"):
        numbers.append(f"{took(data['backoff_ms'] / 1000)} of back-off")
    if tokens := data.get("tokens"):
        numbers.append(" / ".join(f"{count} {kind}" for kind, count in tokens.items()) + " tokens")
    after = f" after {took(data['duration_ms'] / 1000)}" if data.get("duration_ms") else ""
    yield Text.assemble(
        (f"{mark} {data['status']}", f"bold {style}"), (f"{after} · {' · '.join(numbers)}", "dim")
    )
    if error := data.get("error"):
        where = f" in {clean(error['node'])}" if error.get("node") else ""
        yield Text(f"  {clean(error.get('code') or 'error')}{where}: {_cause(error)}", "red")
    if data.get("reason"):
        yield Text(f"  reason: {clean(data['reason'])}")


def _plain(value: Any) -> str:
    """A custom value as a person would say it."""
    said = value.get("message") if isinstance(value, Mapping) else value
    return clean(said) if isinstance(said, str) else compact(value)


def _cause(data: Mapping[str, Any]) -> str:
    said = [data.get("error_class") or "error"]
    if data.get("error_type"):
        said.append(f"({data['error_type']})")
    if data.get("detail"):
        said.append(f"— {' '.join(str(data['detail']).split())}")
    return clean(" ".join(said))


def _tagged(label: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{label} │ ", "dim"), (text, style))


def _barred(indent: str, text: str, style: str) -> Text:
    return Text.assemble((f"{indent}│ ", "dim"), (text, style))


def truncating(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds(stamp: str | None) -> float | None:
    return datetime.fromisoformat(stamp).timestamp() if stamp else None


def took(seconds: float) -> str:
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
