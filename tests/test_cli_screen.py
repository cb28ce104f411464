"""What stands on a terminal that is resized, that is small, or that has few letters."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions

from runtime.cli_screen import SPINNER, Held, Screen, stand_in
from runtime.cli_trace import MARKS
from runtime.cli_view import STATUSES, Line, RunView

RUN = "01M87W6BHRS5YA6E7WP2HZWPG6"
NOW = 1_800_000_000.0
CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Emulator(io.StringIO):
    """A terminal of some rows and columns; rows that become too long it breaks or cuts.

    A row is its cells, and whether it goes on in the next one. Rows above `top` are scrolled out.
    """

    def __init__(self, width: int, height: int, *, breaks: bool) -> None:
        super().__init__()
        self.width, self.height, self.breaks = width, height, breaks
        self.rows: list[tuple[str, bool]] = [("", False)]
        self.row = self.column = 0

    def isatty(self) -> bool:
        return True

    @property
    def top(self) -> int:
        return max(0, len(self.rows) - self.height)

    @property
    def all(self) -> list[str]:
        return [text.replace("\0", "").rstrip() for text, _ in self.rows]

    def resize(self, width: int, height: int) -> None:
        if not self.breaks:
            self.rows = [(text[:width], False) for text, _ in self.rows]
        else:
            old, self.rows = self.rows, []
            for number, (text, _) in enumerate(old):
                parts = [text[i : i + width] for i in range(0, len(text), width)] or [""]
                self.rows += [(part, True) for part in parts[:-1]] + [(parts[-1], False)]
                if number == self.row:
                    row = len(self.rows) - 1
            self.row = row
        while len(self.rows) > self.row + 1 and not self.rows[-1][0].strip():
            self.rows.pop()
        self.width, self.height, self.column = width, height, min(self.column, width - 1)

    def write(self, text: str) -> int:
        at = 0
        while at < len(text):
            if (control := CONTROL.match(text, at)) is not None:
                at = control.end()
                self._control(*control.groups())
                continue
            self._put(text[at])
            at += 1
        return len(text)

    def _control(self, number: str, kind: str) -> None:
        if kind == "A":
            self.row = max(self.top, self.row - int(number or 1))
        elif (number, kind) == ("2", "K"):
            self.rows[self.row] = ("", False)
        else:
            assert kind in "hlm", kind

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._down()
            self.column = 0
        else:
            assert char >= " "
            if self.column + cell_len(char) > self.width:
                self.rows[self.row] = (self.rows[self.row][0], True)
                self._down()
                self.column = 0
            text = self.rows[self.row][0].ljust(self.column)
            cells = char.ljust(cell_len(char), "\0")  # a wide letter has two
            rest = text[self.column + len(cells) :]
            self.rows[self.row] = (text[: self.column] + cells + rest, False)
            self.column += len(cells)

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append(("", False))


class Watched:
    """A view of a run that is drawn when a test says so."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.console = Console(
            file=emulator,
            width=emulator.width,
            height=emulator.height,
            color_system=None,
            force_terminal=True,
            _environ={"TERM": "xterm"},
        )
        self.view = RunView(self.console, lambda: NOW)
        self._seq = 0

    def __enter__(self) -> Watched:
        self.view.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.view.__exit__()

    def line(self, type: str, data: dict[str, Any] | None = None, **where: Any) -> None:
        self._seq += 1
        said = {"seq": self._seq, "ts": "2027-01-15T08:00:00.000Z", "type": type, "run_id": RUN}
        said |= {"thread_id": RUN, "epoch": 1, "data": data or {}} | where
        self.view.line(Line(json.dumps(said).encode(), said))
        self.draw()

    def node(self, type: str, name: str, data: dict[str, Any] | None = None) -> None:
        self.line(type, data, node=name, task=name, attempt=1, step=1, ns=[], path=[])

    def draw(self) -> None:
        with self.view._lock:
            self.view._live.refresh()

    def resize(self, width: int, height: int) -> None:
        with self.view._lock:
            self.emulator.resize(width, height)
            self.console.size = ConsoleDimensions(width, height)
            self.view._fit()
            self.view._live.refresh()


WORDS = "what a node says is longer than a row of any terminal that is narrow, and wraps"


@pytest.fixture(params=[True, False], ids=["breaks", "cuts"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    emulator = Emulator(80, 24, breaks=request.param)
    emulator.write("$ sereno run agent\n")
    with Watched(emulator) as watched:
        watched.line("run.queued")
        watched.node("node.started", "first")
        watched.node("token", "first", {"message_id": "m1", "text": WORDS})
        watched.node("node.completed", "first")
        watched.line("values", {"values": {"words": WORDS}})
        for name in ("left", "right"):
            watched.node("node.started", name)
            watched.node("token", name, {"message_id": name, "text": WORDS})
        yield watched


@pytest.mark.parametrize(
    "widths", [(40,), (20,), (60, 40, 30, 20), (20, 80), (50, 90, 45)], ids=str
)
def test_a_resize_leaves_no_piece_of_an_old_picture(
    watched: Watched, widths: tuple[int, ...]
) -> None:
    for width in widths:
        watched.resize(width, 40)

    text = "\n".join(watched.emulator.all)
    for once in ("▶ run", "✓ first", "state │", "⠋ left", "⠋ right"):
        assert text.count(once) == 1, text
    assert re.findall(r"^  │ (\w+)", text, re.MULTILINE)[0] == "what"
    assert all(len(row) <= width for row in watched.emulator.all)


def test_after_a_resize_it_goes_on_as_if_there_had_been_none(watched: Watched) -> None:
    watched.resize(30, 24)
    for name in ("left", "right"):
        watched.node("node.completed", name)
    watched.line("run.completed", {"final": True, "status": "success"})

    after = [row for row in watched.emulator.all if row]
    assert sum(row.startswith("✓ left") for row in after) == 1
    assert not any("⠋" in row for row in after)
    assert after[-1].startswith("✓ success")


def test_what_is_scrolled_out_is_not_printed_again() -> None:
    emulator = Emulator(60, 8, breaks=True)
    with Watched(emulator) as watched:
        for number in range(30):
            watched.line("run.requeued", {"reason": f"{number}: {WORDS}"})
        watched.resize(30, 8)

    text = "\n".join(emulator.all)
    for number in range(30):
        assert text.count(f"queue: {number}:") == 1


@pytest.mark.parametrize("height", [1, 2, 3, 5])
def test_a_picture_never_needs_more_rows_than_there_are(height: int) -> None:
    emulator = Emulator(40, height, breaks=True)
    with Watched(emulator) as watched:
        watched.line("run.queued")
        for name in "abcdefgh":
            watched.node("node.started", name)
            watched.node("token", name, {"message_id": name, "text": WORDS})
        emulator.rows = [("", False)]
        emulator.row = 0
        watched.view._begin()
        watched.draw()
        watched.draw()

        assert len(emulator.rows) <= height


def test_wide_letters_and_emoji_fit_as_well() -> None:
    emulator = Emulator(20, 24, breaks=True)
    with Watched(emulator) as watched:
        watched.node("node.started", "節点")
        watched.node("token", "節点", {"message_id": "m", "text": "日本語の長い文章です。🙂" * 4})
        watched.node("node.completed", "節点")

    assert any("節点" in row for row in emulator.all)
    assert not any(goes_on for _, goes_on in emulator.rows)


def test_a_name_of_several_lines_is_one_line_and_drives_nothing() -> None:
    emulator = Emulator(60, 24, breaks=True)
    with Watched(emulator) as watched:
        watched.node("node.started", "a\nb\x1b[2J\x1b]0;title\x07\r\tc")
        watched.draw()

        assert "⠋ a b[2J]0;title c  0 ms" in emulator.all


# Letters.


def test_every_mark_has_a_stand_in_of_its_width() -> None:
    marks = {mark for mark, _ in [*STATUSES.values(), *MARKS.values()]} | {*SPINNER, *"│→←━┄↻·—…"}

    for mark in marks - {"?"}:
        with pytest.raises(UnicodeEncodeError) as failed:
            mark.encode("ascii")
        text, at = stand_in(failed.value)
        assert (len(text), at) == (1, 1)
        assert text != "?"


def test_a_terminal_without_our_letters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))

    screen = Screen()
    screen.print("✓ score ⠙ │ ñ 日 …")
    sys.stdout.flush()

    assert raw.getvalue() == b"+ score / | ? ?? .\n"


# Size.


@pytest.mark.parametrize(
    ("env", "real", "size"),
    [
        pytest.param({}, (40, 10), (40, 10), id="real"),
        pytest.param({"COLUMNS": "200", "LINES": "90"}, (40, 10), (40, 10), id="too-large"),
        pytest.param({"COLUMNS": "30"}, (40, 10), (30, 10), id="smaller"),
        pytest.param({"TERM": "dumb"}, (40, 10), (40, 10), id="dumb"),
        pytest.param({"COLUMNS": "70", "LINES": "20"}, (0, 0), (70, 20), id="unknown"),
    ],
)
def test_a_terminal_is_never_taken_for_larger_than_it_is(
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    real: tuple[int, int],
    size: tuple[int, int],
) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (real[1], real[0]))
    with os.fdopen(theirs, "w") as tty:
        monkeypatch.setattr(sys, "stdout", tty)

        assert Screen().size == size
    os.close(ours)


# Keys.


def test_the_keyboard_is_given_back_when_it_stops_and_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = os.openpty()
    stopped = []

    def modes() -> int:
        return int(termios.tcgetattr(theirs)[3]) & (termios.ECHO | termios.ICANON)

    def kill(thread: int, number: int) -> None:
        stopped.append((thread, number, modes()))

    before, handler = modes(), signal.getsignal(signal.SIGTSTP)
    with os.fdopen(os.dup(theirs)) as tty:
        monkeypatch.setattr(sys, "stdin", tty)
        monkeypatch.setattr(signal, "pthread_kill", kill)
        with Held(keys=True) as held:
            signal.raise_signal(signal.SIGTSTP)
            assert held.asked
            assert modes() == 0
            held.stop()
            assert not held.asked
            assert modes() == 0

    assert stopped == [(threading.get_ident(), signal.SIGSTOP, before)]
    assert (modes(), signal.getsignal(signal.SIGTSTP)) == (before, handler)
    for end in (ours, theirs):
        os.close(end)


def test_a_request_to_end_leaves_as_an_end_does() -> None:
    with pytest.raises(SystemExit) as left, Held():
        signal.raise_signal(signal.SIGTERM)

    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
