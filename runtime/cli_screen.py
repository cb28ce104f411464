"""Keeps a terminal in order while something is drawn on it: its size, its letters, its keys."""

from __future__ import annotations

import codecs
import json
import os
import signal
import sys
import termios
import threading
from typing import Any, NoReturn, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions

__all__ = ["SPINNER", "Held", "Screen", "clean", "compact", "on_one_line", "stand_in"]

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
#: What is written where a terminal's encoding has no such letter; each as wide as what it is for.
STAND_INS = str.maketrans(
    "▶✓✗■↻…·│→←━┄—" + SPINNER,
    ">+x#~.-|><=--" + "".join("|/-\\"[i % 4] for i in range(len(SPINNER))),
)

#: What could move the cursor, colour the terminal or reorder its text: it comes from models.
_UNPRINTABLE = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10}
) | {ord("\t"): "    "}


def clean(text: str) -> str:
    """Text that leaves the terminal alone."""
    return str(text).translate(_UNPRINTABLE)


def on_one_line(text: str) -> str:
    """A name of somebody's choice."""
    return " ".join(clean(text).split())


def compact(value: Any, most: int = 400) -> str:
    """A value as JSON on one line, cut when long."""
    text = clean(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= most else text[: most - 1] + "…"


def stand_in(error: UnicodeError) -> tuple[str, int]:
    """Write something else for letters that cannot be encoded."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(STAND_INS)
    return "".join(c if c.isascii() else "?" * cell_len(c) for c in text), error.end


class Screen(Console):
    """What stdout is shown on, never taken for larger than it is, whatever COLUMNS says."""

    def __init__(self) -> None:
        codecs.register_error("sereno", stand_in)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="sereno")
        super().__init__()

    @property  # type: ignore[misc]  # nobody sets it
    def size(self) -> ConsoleDimensions:
        width, height = super().size
        try:
            real = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):  # no terminal
            return ConsoleDimensions(width, height)
        # A terminal that does not know its size says 0.
        return ConsoleDimensions(
            min(width, real.columns or width), min(height, real.lines or height)
        )

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Held:
    """The keyboard while something is drawn: what is typed is not seen, as it would break that.

    Ctrl-Z becomes a wish that whoever draws grants with `stop` when the terminal is in order.
    """

    def __init__(self, *, keys: bool = False) -> None:
        #: Whether Ctrl-Z was pressed.
        self.asked = False
        #: Modes to take away: lines are of no use to who reads keys.
        self._modes = termios.ECHO | (termios.ICANON if keys else 0)
        #: The terminal's own modes; None when keys come from elsewhere.
        self._before: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._take()
        self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._ask)
        for end in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[end] = signal.signal(end, _leave)
        return self

    def __exit__(self, *exc: object) -> None:
        self._give_back()
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def stop(self) -> None:
        """Leave the terminal to the shell until the shell gives it back."""
        self.asked = False
        self._give_back()
        # To this thread: sent to the process, it could go on for a moment.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        self._take()

    def _take(self) -> None:
        if sys.stdin is None or not sys.stdin.isatty() or _in_background():
            return
        self._before = termios.tcgetattr(sys.stdin)
        modes = termios.tcgetattr(sys.stdin)
        modes[3] &= ~self._modes
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)

    def _give_back(self) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)
            self._before = None

    def _ask(self, signum: int, frame: object) -> None:
        self.asked = True


def _in_background() -> bool:
    """Whether the keyboard is another job's, and touching its modes would stop us (SIGTTOU)."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp()
    except OSError:  # no terminal of ours: nobody controls jobs there
        return False


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)
