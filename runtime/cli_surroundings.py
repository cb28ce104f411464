"""What commands touch outside of themselves: the network, the time and the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2
from rich.console import Console

from runtime.cli_screen import Screen
from runtime.cli_view import Plain, RunView, View

__all__ = ["Surroundings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The real ones; tests give their own as the context's object."""

    transport: httpx2.BaseTransport | None = None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    #: Where to draw; None asks whether stdout is a terminal.
    console: Console | None = None

    def screen(self, as_json: bool) -> Console | None:
        """The terminal, unless the output is for a program."""
        if as_json:
            return None
        return self.console or (Screen() if sys.stdout.isatty() else None)

    def view(self, as_json: bool, command: Callable[..., str] | None = None) -> View:
        """Where a run is shown; `command` makes the command lines that it names."""
        screen = self.screen(as_json)
        return Plain() if screen is None else RunView(screen, self.clock, command)
